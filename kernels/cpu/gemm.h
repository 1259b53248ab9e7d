/* Matrix products over the pool: C = alpha op(A) op(B) + beta C, beta being 0 or 1.
 *
 * B is copied into panels as wide as the register tile (simd/tile.h): once, for all threads to
 * read, or, in products that are deep and not wide (TN), by each thread as it goes. Each thread
 * takes blocks of C. There each element is summed over k in the same order however the work is cut.
 * Few rows (few.h), columns beyond a multiple of 16, and machines without AVX2 are OpenBLAS'.
 */
#ifndef PMLI_CPU_GEMM_H
#define PMLI_CPU_GEMM_H

#include <stdbool.h>

#include "pml/base/view.h"
#include "pool.h"

typedef enum pmli_form {
    PMLI_NN, /* C[m,n] = A[m,k]   B[k,n]   */
    PMLI_NT, /* C[m,n] = A[m,k]   B[n,k]^T */
    PMLI_TN  /* C[m,n] = A[k,m]^T B[k,n]   */
} pmli_form;

/* C = alpha op(A) op(B) + op(A2) op(B2) + beta C: the second pair, which may be absent, is what an
 * adapter adds to a layer, while the block of C is still in the cache. All F32, but that b of the
 * forms NN and NT may be BF16, a row of at most PMLI_NARROW_COLS elements: it is widened while it
 * is copied, and the result has the bits that the same numbers in F32 give. Shapes are checked by
 * the op. With beta = 0 C is not read. */
typedef struct pmli_product {
    pmli_form form;
    float alpha, beta;
    pml_view a, b, a2, b2, c;
} pmli_product;

enum { PMLI_PRODUCTS = 8 }; /* at a time; more are done one batch after another */

/* Products none of which needs another's C. They are packed together and multiplied together: what
 * is too small to busy all threads for long leaves none of them waiting for the others. */
void pmli_gemm_all(pmli_pool *pool, const pmli_product *products, int count);

/* C = alpha op(A) op(B) + beta C. */
void pmli_gemm(pmli_pool *pool, pmli_form form, float alpha, pml_view a, pml_view b, float beta,
               pml_view c);

/* The same by OpenBLAS on the calling thread, for use inside a task, whose scratch it takes. */
void pmli_gemm_here(pmli_form form, float alpha, pml_view a, pml_view b, float beta, pml_view c,
                    void *scratch);

enum { PMLI_NARROW_COLS = PMLI_SCRATCH_BYTES / (int)sizeof(float) };

/* Whether products with such a right factor go to the matrix unit, where there is one and they are
 * large enough. */
bool pmli_gemm_on_unit(int threads, pml_dtype right);

/* The length of the sums. */
static inline int64_t pmli_depth(pmli_form form, const pml_view *a)
{
    return form == PMLI_TN ? a->rows : a->cols;
}

/* Rows [first, first + rows) of v. */
static inline pml_view pmli_rows(pml_view v, int64_t first, int64_t rows)
{
    v.data = (unsigned char *)v.data + (size_t)(first * v.ld) * pml_dtype_size(v.dtype);
    v.rows = rows;
    return v;
}

#endif
