// RMSNorm with the residual add in front of it. Zhang & Sennrich, "Root Mean Square Layer
// Normalization", 2019.
//
// Bound by memory: 2 reads + 2 writes of tokens*hidden (1 + 1 without the residual), so a row is
// read once and waits in registers, as 16-byte packs, while its sum of squares is made:
//
//   thread:      0    1    …   n-1 |  0    1   …          n = blockDim.x threads a row
//   pack:      | p0 | p1 | … | pn-1 | pn | pn+1 …          PACKS of them a thread
//
// Where x is wider than the rest, its packs are the 16-byte ones and those of the rest have 8
// bytes: lanes then read what lies side by side, which they would not with two packs of x each.
//
// The sum is rounded to the operand's dtype before it is used: what the backward pass will read is
// then exactly what was normalised.
//
// T is the dtype of the rows, W the weight's: T, or float where it is trained. X is that of x: T,
// or float where the residual line begins with a table that is trained.
#include "params.h"
#include "row_total.cuh"
#include "types.cuh"

__device__ inline float rstd_of(float squares, const pmli_rmsnorm_params &p)
{
    return 1.0f / sqrtf(squares / (float)p.cols + p.eps);
}

// Rows that are whole packs, at most PACKS of them a thread. Rows of one block share no data, so a
// block of several short rows needs no barrier; with a barrier there is one row a block. Threads
// beyond the last row have no packs, but take part in the shuffles of their warp.
template <typename X, typename T, typename W, int PACKS>
__device__ void norm_registers(const pmli_rmsnorm_params &p)
{
    constexpr int N = 16 / sizeof(X);
    typedef Pack<T, N> pack;
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const int packs = row < p.rows ? (int)(p.cols / N) : 0;
    const Pack<X, N> *x = (const Pack<X, N> *)((const X *)p.x + row * p.ld_x);
    const pack *add =
        p.add != nullptr ? (const pack *)((const T *)p.add + row * p.ld_add) : nullptr;
    const Pack<W, N> *weight = (const Pack<W, N> *)p.weight;
    pack *sum = (pack *)((T *)p.sum + row * p.ld_sum);
    pack *y = (pack *)((T *)p.y + row * p.ld_y);

    Pack<X, N> held[PACKS];
    float squares = 0;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c < packs)
            held[k] = x[c];
    }
    if (add != nullptr) {
        pack other[PACKS];
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int c = k * blockDim.x + threadIdx.x;
            if (c < packs)
                other[k] = add[c];
        }
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int c = k * blockDim.x + threadIdx.x;
            if (c >= packs)
                continue;
            Floats<N> of_both = widened(held[k]), more = widened(other[k]);
#pragma unroll
            for (int e = 0; e < N; e++)
                of_both.at[e] += more.at[e];
            const pack rounded = narrowed<T>(of_both);
            sum[c] = rounded;
            if constexpr (same<X, T>)
                held[k] = rounded;
            else
                held[k] = narrowed<X>(widened(rounded));
        }
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if ((int)(k * blockDim.x + threadIdx.x) >= packs)
            continue;
        const Floats<N> s = widened(held[k]);
#pragma unroll
        for (int e = 0; e < N; e++)
            squares += s.at[e] * s.at[e];
    }
    const float rstd = rstd_of(row_total(squares), p);
    if (threadIdx.x == 0 && row < p.rows)
        p.rstd[row] = rstd;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        Floats<N> s = widened(held[k]);
        const Floats<N> w = widened(weight[c]);
#pragma unroll
        for (int e = 0; e < N; e++)
            s.at[e] = s.at[e] * rstd * w.at[e];
        y[c] = narrowed<T>(s);
    }
}

// Any row: element by element, read a second time (out of the cache) for the output.
template <typename X, typename T, typename W> __device__ void norm_any(const pmli_rmsnorm_params &p)
{
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const long long cols = row < p.rows ? p.cols : 0;
    const X *x = (const X *)p.x + row * p.ld_x;
    const T *add = (const T *)p.add + row * p.ld_add;
    const W *weight = (const W *)p.weight;
    T *sum = (T *)p.sum + row * p.ld_sum, *y = (T *)p.y + row * p.ld_y;
    float squares = 0;
    for (long long c = threadIdx.x; c < cols; c += blockDim.x) {
        float s = widen(x[c]);
        if (p.add != nullptr) {
            const T rounded = narrow<T>(s + widen(add[c]));
            sum[c] = rounded;
            s = widen(rounded);
        }
        squares += s * s;
    }
    const float rstd = rstd_of(row_total(squares), p);
    if (threadIdx.x == 0 && row < p.rows)
        p.rstd[row] = rstd;
    // x may have been overwritten by sum: from here on the thread reads what it wrote itself.
    for (long long c = threadIdx.x; c < cols; c += blockDim.x) {
        const float s = p.add != nullptr ? widen(sum[c]) : widen(x[c]);
        y[c] = narrow<T>(s * rstd * widen(weight[c]));
    }
}

#define REGISTERS(name, X, T, W, PACKS)                                                            \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_params p)           \
    {                                                                                              \
        norm_registers<X, T, W, PACKS>(p);                                                         \
    }
#define NORM(name, X, T, W)                                                                        \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_params p)           \
    {                                                                                              \
        norm_any<X, T, W>(p);                                                                      \
    }                                                                                              \
    REGISTERS(name##_x1, X, T, W, 1)                                                               \
    REGISTERS(name##_x2, X, T, W, 2)                                                               \
    REGISTERS(name##_x4, X, T, W, 4)

NORM(rmsnorm_f32, float, float, float)
NORM(rmsnorm_bf16, bf16, bf16, bf16)
NORM(rmsnorm_f16, f16, f16, f16)
NORM(rmsnorm_trained_bf16, bf16, bf16, float)
NORM(rmsnorm_trained_f16, f16, f16, float)
NORM(rmsnorm_begins_bf16, float, bf16, float)
NORM(rmsnorm_begins_f16, float, f16, float)
