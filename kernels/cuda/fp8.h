/* The frozen product over a weight in 8 bits: y = x w^T and dx = dy w, both factors E4M3
 * (fp8_quantise and w_scale in pml_op/ops.h).
 *
 *   forward    codes of x [T,K], a scale a token     x  w [N,K], its scales          = y
 *   backward   codes of dy w_scale [T,N], likewise   x  w turned round [K,N], ones   = dx
 *
 * cuBLASLt multiplies 8-bit operands in one arrangement only, the rows of both along the inner
 * dimension: so the backward's weight is turned round first, into workspace. On sm_90 it takes the
 * rows' scales itself; elsewhere, and for float32 results, it multiplies codes alone, times
 * 2^-FP8_DOWN, and a kernel of ours applies them.
 *
 * Low-rank factors of 16 bits stand in borders of the codes (docs/decisions/0106), each number as
 * two codes, high + low:
 *
 *                K          3 R                          K           3 R
 *        ┌─────────────┬──────────────┐        ┌─────────────┬──────────────┐
 *     T  │ x / s_t     │ f u / s_t    │     N  │ w / s_n     │ b / (f s_n)  │
 *        └─────────────┴──────────────┘        └─────────────┴──────────────┘
 *                        high low high                         high high low
 *
 * f = the largest |b| / s_n over 448: so all of b has codes. s_t is top / 448 of x, times the least
 * power of two under which f u has codes. The backward likewise, with v for u, a for b and 1 for
 * s_n. */
#ifndef PMLI_CUDA_FP8_H
#define PMLI_CUDA_FP8_H

#include <stdbool.h>

#include "cpu/check.h"
#include "pml_op/backend.h"

/* Scratch memory, behind that of products; 0 where the weight is not in 8 bits. */
size_t pmli_fp8_ws(const pml_linear_args *a);
size_t pmli_fp8_bwd_ws(const pml_linear_bwd_args *a);

/* w and w_scale of a layer of these widths, in units that 8-bit products come in. */
void pmli_fp8_need(pmli_check *c, const pml_view *w, const pml_view *w_scale, int64_t outputs,
                   int64_t inputs);

/* Whether u, or v, is to stand in a border of so many columns: there is room, and it pays. */
bool pmli_fp8_takes(const pml_view *u, int32_t border);

/* y written whole (with the bias); dx likewise. With u: and what the adapters add; v: likewise. */
pml_status pmli_fp8_linear(pml_queue *queue, const pml_linear_args *a, const pml_view *u, void *ws,
                           pml_error *err);
pml_status pmli_fp8_linear_bwd(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                               void *ws, pml_error *err);

#endif
