/* Matrix products over the pool: C = alpha op(A) op(B) + beta C, by OpenBLAS' single-threaded sgemm
 * on pieces of C. The pieces depend on the shape and the number of threads only. */
#ifndef PMLI_CPU_GEMM_H
#define PMLI_CPU_GEMM_H

#include "pml/base/view.h"
#include "pool.h"

typedef enum pmli_form {
    PMLI_NN, /* C[m,n] = A[m,k]   B[k,n]   */
    PMLI_NT, /* C[m,n] = A[m,k]   B[n,k]^T */
    PMLI_TN  /* C[m,n] = A[k,m]^T B[k,n]   */
} pmli_form;

/* All F32, shapes checked by the op. With beta = 0 C is not read. */
void pmli_gemm(pmli_pool *pool, pmli_form form, float alpha, pml_view a, pml_view b, float beta,
               pml_view c);

/* The same on the calling thread, for use inside a task. */
void pmli_gemm_here(pmli_form form, float alpha, pml_view a, pml_view b, float beta, pml_view c);

/* Rows [first, first + rows) of v. */
static inline pml_view pmli_rows(pml_view v, int64_t first, int64_t rows)
{
    v.data = (unsigned char *)v.data + (size_t)(first * v.ld) * pml_dtype_size(v.dtype);
    v.rows = rows;
    return v;
}

#endif
