/* linear of at most eight rows by kernels of our own that read the weight once, at the speed of
 * memory; cuBLASLt's products begin to pay with more. For 16-bit operands whose rows are whole
 * 16-byte packs, without dropout. */
#ifndef PMLI_CUDA_FEW_ROWS_H
#define PMLI_CUDA_FEW_ROWS_H

#include <stdbool.h>

#include "pml_op/backend.h"

/* Whether a checked call is done so. */
bool pmli_few_rows_serves(const pml_linear_args *a);

/* u: where the adapters' factor goes, absent without an adapter. */
pml_status pmli_few_rows(pml_queue *queue, const pml_linear_args *a, const pml_view *u,
                         pml_error *err);

#endif
