// The borders of a linear layer's operands: what makes the frozen product one with its adapters'.
// A thread moves N neighbouring elements, of which one adapter has all or none.
#include "params.h"
#include "types.cuh"

template <typename T, int N> __device__ Pack<T, N> zeros()
{
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++)
        out.at[i] = narrow<T>(0.0f);
    return out;
}

// Columns [c, c + N) of b's part of w's border, in row i.
template <typename T, int N>
__device__ Pack<T, N> of_b(const pmli_border_params &p, long long i, int c)
{
    const int adapter = c / p.rank;
    long long row = i;
    if (adapter >= p.adapters)
        return zeros<T, N>();
    for (int before = 0; before < adapter; before++) // b has the rows of adapters only
        row += p.end[before] - p.first[before];
    if (i < p.first[adapter] || i >= p.end[adapter])
        return zeros<T, N>();
    row -= p.first[adapter];
    return *(const Pack<T, N> *)((const T *)p.b + row * p.ld_b + c % p.rank);
}

template <typename T, int N> __device__ void border(const pmli_border_params &p)
{
    const int packs = p.columns / N, used = p.rank * p.adapters;
    const long long beside = p.n * packs, below = p.columns * (p.k / N);
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item < beside) {
        const long long i = item / packs;
        const int c = (int)(item % packs) * N;
        *(Pack<T, N> *)((T *)p.w + i * p.ld_w + p.k + c) = of_b<T, N>(p, i, c);
        return;
    }
    item -= beside;
    if (item < below) {
        const long long i = item / (p.k / N), c = item % (p.k / N) * N;
        *(Pack<T, N> *)((T *)p.w + (p.n + i) * p.ld_w + c) =
            i < used ? *(const Pack<T, N> *)((const T *)p.a + i * p.ld_a + c) : zeros<T, N>();
        return;
    }
    item -= below;
    const long long t = item / packs;
    const int c = (int)(item % packs) * N;
    if (t < p.tokens)
        *(Pack<T, N> *)((T *)p.x + t * p.ld_x + c) =
            c < used ? *(const Pack<T, N> *)((const T *)p.u + t * p.ld_u + c) : zeros<T, N>();
}

#define KERNEL(T, N, suffix)                                                                       \
    extern "C" __global__ void __launch_bounds__(256) border_##suffix(const pmli_border_params p)  \
    {                                                                                              \
        border<T, N>(p);                                                                           \
    }
KERNEL(float, 1, f32)
KERNEL(float, 4, f32_wide)
KERNEL(bf16, 1, bf16)
KERNEL(bf16, 8, bf16_wide)
KERNEL(f16, 1, f16)
KERNEL(f16, 8, f16_wide)
