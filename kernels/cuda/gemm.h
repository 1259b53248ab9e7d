/* Matrix products by cuBLASLt, row-major:
 *
 *   c [m,n] = alpha * op(a) [m,k] * op(b) [k,n] + beta * c (+ bias [1,n] on every row)
 *
 * What cuBLASLt needs to know about a product (descriptor, layouts, algorithm) is made at the first
 * use of a shape and kept with the device, so that a step that has run once allocates nothing and
 * can be recorded. Shape here means everything that decides the algorithm: sizes, leading
 * dimensions, dtypes, transposes, epilogue, alignment of the addresses and workspace size. */
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
    bool transpose_a, transpose_b; /* a lies as [k,m], b as [n,k] */
    pml_dtype in, out;             /* of a and b; of c: F32, BF16 or F16 */
    float alpha, beta;
    void *workspace; /* may be NULL with size 0 */
    size_t workspace_size;
} pmli_gemm;

/* Queue the product. PML_UNSUPPORTED: cuBLASLt has no algorithm for it. */
pml_status pmli_gemm_run(pml_queue *queue, const pmli_gemm *gemm, pml_error *err);

/* The products a device knows. Owned by the device. choices: where timed ones are kept on disk,
 * owned by the cache from here on; NULL: nowhere. */
typedef struct pmli_gemm_cache pmli_gemm_cache;
pml_status pmli_gemm_cache_new(pmli_choices *choices, pmli_gemm_cache **cache, pml_error *err);
void pmli_gemm_cache_destroy(pmli_gemm_cache **cache);

#endif
