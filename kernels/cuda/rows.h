/* Moving rows by index on a queue, for ops that do so on their way. */
#ifndef PMLI_CUDA_ROWS_H
#define PMLI_CUDA_ROWS_H

#include "pml_op/backend.h"

/* y[to(i),:] = x[from(i),:] for i < rows, as pmli_rows_params says: an absent index means i itself,
 * from < 0 writes zeros, to < 0 writes nothing. */
typedef struct pmli_move {
    pml_view x, y;
    const int32_t *from, *to;
    int64_t rows;
} pmli_move;

/* Queue it. */
pml_status pmli_cuda_move_rows(pml_queue *queue, pmli_move move, pml_error *err);

/* v = 0. */
pml_status pmli_cuda_clear(pml_queue *queue, const pml_view *v, pml_error *err);

#endif
