/* Rows in 8 bits (fp8_quantise in pml_op/ops.h), as the linear layer's reference takes them. */
#ifndef PMLI_CPU_FP8_H
#define PMLI_CPU_FP8_H

#include "check.h"
#include "device.h"

/* y = what is left of x [R,C] F32 when its rows are stored in 8 bits; by [C], where given,
 * multiplies the columns of x first. y may be the same memory as x. */
void pmli_fp8_rounded(pmli_pool *pool, pml_view x, const float *by, pml_view y);

/* x [R,C] F32 in pieces (pml_op/ops.h) of so many parts, each as wide: codes [R,C] U8, scale [R,*].
 * by: as above. And back. */
void pmli_fp8_to_pieces(pmli_pool *pool, pml_view x, const float *by, int64_t parts, pml_view codes,
                        pml_view scale);
void pmli_fp8_of_pieces(pmli_pool *pool, pml_view codes, pml_view scale, int64_t parts, pml_view y);

/* Codes in pieces and their scales. */
void pmli_need_pieces(pmli_check *c, const char *name, const pml_view *codes,
                      const char *scale_name, const pml_view *scale, int64_t rows, int64_t cols,
                      int64_t parts);

/* y [N,K] F32 = codes [N,K] U8, each row times its scale [N] where that is given. */
void pmli_fp8_widen(pmli_pool *pool, pml_view codes, const float *scale, pml_view y);

/* y [N,K] F32 = codes [K,N] U8 turned round. */
void pmli_fp8_widen_turned(pmli_pool *pool, pml_view codes, pml_view y);

/* w and its scales, or where there are none a weight as it always was. */
void pmli_need_stored(pmli_check *c, const pml_view *w, const pml_view *w_scale, int64_t rows,
                      int64_t cols);

#endif
