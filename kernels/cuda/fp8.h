/* The frozen product over a weight in 8 bits: y = x w^T and dx = dy w, both factors E4M3
 * (fp8_quantise and w_scale in pml_op/ops.h).
 *
 *   forward    codes of x [T,K], a scale a token     x  w [N,K], its scales          = y
 *   backward   codes of dy w_scale [T,N], likewise   x  w turned round [K,N], ones   = dx
 *
 * cuBLASLt multiplies 8-bit operands in one arrangement only, the rows of both along the inner
 * dimension: so the backward's weight comes turned round (fp8_turn). On sm_90 it takes the
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
 * f = the largest |b| / s_n over 448, of each adapter its own: so all of b has codes. s_t is the
 * least power of two that is no less than top / 448 of x, or a larger one under which f u has
 * codes, too. The backward likewise, with v for u, a for b and 1 for s_n. */
#ifndef PMLI_CUDA_FP8_H
#define PMLI_CUDA_FP8_H

#include <stdbool.h>

#include "cpu/check.h"
#include "pml_op/backend.h"

enum { PMLI_FIRST_WITH_E4M3 = 89 /* compute capability that cuBLASLt multiplies E4M3 from */ };

/* Scratch memory, behind that of products; 0 where the weight is not in 8 bits. */
size_t pmli_fp8_ws(const pml_linear_args *a);
size_t pmli_fp8_bwd_ws(const pml_linear_bwd_args *a);

/* Codes of a weight [rows,cols], in units that 8-bit products come in. */
void pmli_fp8_need(pmli_check *c, const pml_view *w, int64_t rows, int64_t cols);

/* Whether u, or v, is to stand in a border of so many columns: there is room, and it pays. */
bool pmli_fp8_takes(const pml_view *u, int32_t border);

/* Codes in pieces (pml_op/ops.h) of so many parts, each as wide, with their scales: in units that
 * kernels and products come in. */
void pmli_fp8_need_pieces(pmli_check *c, const char *name, const pml_view *codes,
                          const char *scale_name, const pml_view *scale, int64_t parts);

/* x [T,N] in 16 or 32 bits, times by [N] where that is given, to pieces. */
typedef struct pmli_fp8_in_pieces {
    pml_view x, codes, scale;
    const float *by;
    int64_t parts;
} pmli_fp8_in_pieces;
pml_status pmli_fp8_round(pml_queue *queue, const pmli_fp8_in_pieces *p, pml_error *err);

/* y written whole (with the bias); dx likewise. With u: and what the adapters add; v: likewise. */
pml_status pmli_fp8_linear(pml_queue *queue, const pml_linear_args *a, const pml_view *u, void *ws,
                           pml_error *err);
pml_status pmli_fp8_linear_bwd(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                               void *ws, pml_error *err);

#endif
