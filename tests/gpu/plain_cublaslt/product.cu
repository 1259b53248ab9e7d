// A matrix product as plainly as it can be said: a thread an element, sums in double, nothing but
// ordinary loads and stores, so that compute-sanitizer sees what is read and what is written.
#include "product.h"
#include "types.cuh"

// Four bits of exponent with bias 7, three of mantissa, no infinities; 0x7f is NaN.
__device__ static float from_e4m3(unsigned char code)
{
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size =
        exponent == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), exponent - 10);
    if ((code & 0x7f) == 0x7f)
        return NOT_A_NUMBER;
    return code & 0x80 ? -size : size;
}

__device__ static float element(const void *from, int type, long long at)
{
    switch (type) {
    case PRODUCT_F32:
        return ((const float *)from)[at];
    case PRODUCT_BF16:
        return widen(((const bf16 *)from)[at]);
    case PRODUCT_F16:
        return widen(((const f16 *)from)[at]);
    default:
        return from_e4m3(((const unsigned char *)from)[at]);
    }
}

extern "C" __global__ void __launch_bounds__(256) product(const product_params p)
{
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.m * p.n)
        return;
    const long long i = at % p.m, j = at / p.m;
    double sum = 0;
    for (long long l = 0; l < p.k; l++)
        sum += (double)element(p.a, p.in, p.transpose_a ? i * p.lda + l : l * p.lda + i) *
               element(p.b, p.in, p.transpose_b ? l * p.ldb + j : j * p.ldb + l);
    sum *= p.alpha;
    if (p.scale_a)
        sum *= (double)p.scale_a[i] * p.scale_b[j];
    const long long to = j * p.ldc + i;
    if (p.beta != 0)
        sum += (double)p.beta * element(p.c, p.out, to);
    if (p.bias)
        sum += element(p.bias, p.out, i);
    if (p.out == PRODUCT_F32)
        ((float *)p.c)[to] = (float)sum;
    else if (p.out == PRODUCT_BF16)
        ((bf16 *)p.c)[to] = narrow<bf16>((float)sum);
    else
        ((f16 *)p.c)[to] = narrow<f16>((float)sum);
}
