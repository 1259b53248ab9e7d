/* Sums over tokens, column by column: out[c] += sum_t x[t,c] (times y[t,c] rstd[t], where given).
 */
#ifndef PMLI_CUDA_COLUMNS_H
#define PMLI_CUDA_COLUMNS_H

#include "pml_op/backend.h"

/* Bytes of workspace for so many columns, whatever the number of rows. */
size_t pmli_cuda_columns_ws(int64_t cols);

/* As above, on the queue. x [T,C], y likewise (in x's dtype or F32) or NULL, rstd [T] or NULL, out
 * [C] F32; ws as pmli_cuda_columns_ws has it. The order of the sums depends on T alone. */
pml_status pmli_cuda_columns(pml_queue *queue, const pml_view *x, const pml_view *y,
                             const float *rstd, float *out, void *ws, pml_error *err);

/* out[s][c] += the sum of parts[s,p,c], p < count, in an order that depends on count alone; s <
 * sets, of which there are 1 or 2. */
pml_status pmli_cuda_add_parts(pml_queue *queue, const float *parts, int64_t count, int64_t cols,
                               float *const out[], int sets, pml_error *err);

#endif
