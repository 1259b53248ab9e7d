/* Dropout in front of a LoRA branch, as pml_linear_args has it. */
#ifndef PMLI_CUDA_DROPOUT_H
#define PMLI_CUDA_DROPOUT_H

#include "operand.h"
#include "pml_op/backend.h"

typedef struct pmli_dropout {
    const pml_view *rng, *places;
    uint32_t purpose; /* of the part */
    float dropout;
} pmli_dropout;

/* rng [1,2] and places [1,rows], I64, and 0 <= dropout < 1. */
void pmli_need_dropout(pmli_check *c, const pmli_dropout *d, int64_t rows);

/* y = m x, or y += m x with add: m is the part's mask, 0 or about 1/(1 - dropout). */
pml_status pmli_cuda_dropout(pml_queue *queue, const pmli_dropout *d, const pml_view *x, bool add,
                             const pml_view *y, pml_error *err);

#endif
