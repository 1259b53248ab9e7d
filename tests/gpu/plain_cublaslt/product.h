/* What the host hands to the kernel of product.cu, in cuBLASLt's column-major words:
 *
 *   c [m,n] = scale_a [m] * scale_b [n] * alpha * op(a) [m,k] * op(b) [k,n] + beta * c + bias [m]
 *
 * Built-in types only: the run-time compiler has no system headers. */
#ifndef TESTS_GPU_PRODUCT_H
#define TESTS_GPU_PRODUCT_H

enum product_type { PRODUCT_F32, PRODUCT_BF16, PRODUCT_F16, PRODUCT_E4M3 };

typedef struct product_params {
    const void *a, *b;
    void *c;
    const void *bias;               /* of c's type; NULL: none */
    const float *scale_a, *scale_b; /* NULL: none */
    long long m, n, k, lda, ldb, ldc;
    float alpha, beta;
    int in, out;                  /* enum product_type */
    int transpose_a, transpose_b; /* a lies as [k,m], b as [n,k] */
} product_params;

#endif
