/* Matrix products by cuBLASLt, and large ones by our own kernel where that is faster; row-major:
 *
 *   c [m,n] = alpha * op(a) [m,k] * op(b) [k,n] + beta * c (+ bias [1,n] on every row)
 *
 * or, where in is U8, of codes of E4M3, b lying as [n,k], and with scales, where they are given:
 *
 *   c [m,n] = scale_a [m] * scale_b [n] * (a [m,k] * b^T [k,n]) + beta * c (+ bias)
 *
 * What cuBLASLt needs to know about a product (descriptor, layouts, algorithm) is made at the first
 * use of a shape and kept with the device, so that a step that has run once allocates nothing and
 * can be recorded. Shape here means everything that decides the algorithm: sizes, leading
 * dimensions, dtypes, transposes, a factor, epilogue, alignment of the addresses and workspace
 * size. The algorithm is the fastest of some that are timed then; a large product whose shape has
 * only fewer rows of a than one timed before goes by that one's (docs/decisions/0131). */
#ifndef PMLI_CUDA_GEMM_H
#define PMLI_CUDA_GEMM_H

#include <stdbool.h>
#include <stdint.h>

#include "choices.h"
#include "pml_op/backend.h"

/* Offered to every product. On Hopper none of the shapes of a language model uses more than a few
 * bytes of it; older chips split long inner dimensions and need room for the partial sums. */
enum { PMLI_GEMM_WORKSPACE = 32 << 20 };

typedef struct pmli_gemm {
    const void *a, *b, *bias; /* bias may be NULL, its dtype is c's */
    void *c;
    int64_t m, n, k;
    int64_t lda, ldb, ldc;
    const float *scale_a, *scale_b; /* of 8-bit operands, both or none; on sm_90 only */
    bool transpose_a, transpose_b;  /* a lies as [k,m], b as [n,k] */
    pml_dtype in, out;              /* of a and b; of c: F32, BF16 or F16. in = U8: E4M3 */
    float alpha, beta;
    void *workspace; /* may be NULL with size 0 */
    size_t workspace_size;
} pmli_gemm;

/* Whether scale_a and scale_b can be given on this device: by compute capability 9.0 alone, and by
 * cuBLASLt from 12.9 on. */
bool pmli_gemm_scales_rows(const pml_device *device);

/* Queue the product. PML_UNSUPPORTED: cuBLASLt has no algorithm for it. */
pml_status pmli_gemm_run(pml_queue *queue, const pmli_gemm *gemm, pml_error *err);

/* The products a device knows. Owned by the device. choices: those that were timed, owned by the
 * cache from here on; NULL: each is timed for itself, and not kept. */
typedef struct pmli_gemm_cache pmli_gemm_cache;
pml_status pmli_gemm_cache_new(pmli_choices *choices, pmli_gemm_cache **cache, pml_error *err);
void pmli_gemm_cache_destroy(pmli_gemm_cache **cache);

#endif
