// Backward of RMSNorm. A row at a time, held in registers as 16-byte packs like the forward: three
// reads and one write of tokens*hidden. The weight's gradient is a sum over tokens and is made by
// columns.cu, before dx, which may lie on dy.
#include "params.h"
#include "row_total.cuh"
#include "types.cuh"

template <typename T, int PACKS>
__device__ void norm_bwd_registers(const pmli_rmsnorm_bwd_params &p)
{
    constexpr int N = 16 / sizeof(T);
    typedef Pack<T, N> pack;
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const int packs = row < p.rows ? (int)(p.cols / N) : 0;
    const pack *dy = (const pack *)((const T *)p.dy + row * p.ld_dy);
    const pack *x = (const pack *)((const T *)p.x + row * p.ld_x);
    const pack *dres =
        p.dres != nullptr ? (const pack *)((const T *)p.dres + row * p.ld_dres) : nullptr;
    const pack *weight = (const pack *)p.weight;
    pack *dx = (pack *)((T *)p.dx + row * p.ld_dx);

    pack held_dy[PACKS], held_x[PACKS], held_res[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        held_dy[k] = dy[c];
        held_x[k] = x[c];
        if (dres != nullptr)
            held_res[k] = dres[c];
    }
    float dot = 0;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        const pack w = weight[c];
#pragma unroll
        for (int e = 0; e < N; e++)
            dot += widen(held_dy[k].at[e]) * widen(w.at[e]) * widen(held_x[k].at[e]);
    }
    const float rstd = row < p.rows ? p.rstd[row] : 0.0f;
    const float back = row_total(dot) * rstd * rstd * rstd / (float)p.cols;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        const pack w = weight[c];
        pack out;
#pragma unroll
        for (int e = 0; e < N; e++) {
            float d =
                widen(held_dy[k].at[e]) * widen(w.at[e]) * rstd - widen(held_x[k].at[e]) * back;
            if (dres != nullptr)
                d += widen(held_res[k].at[e]);
            out.at[e] = narrow<T>(d);
        }
        dx[c] = out;
    }
}

// Any row: element by element. A thread reads only what it wrote itself where dx lies on an input.
template <typename T> __device__ void norm_bwd_any(const pmli_rmsnorm_bwd_params &p)
{
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const long long cols = row < p.rows ? p.cols : 0;
    const T *dy = (const T *)p.dy + row * p.ld_dy, *x = (const T *)p.x + row * p.ld_x;
    const T *dres = (const T *)p.dres + row * p.ld_dres, *weight = (const T *)p.weight;
    T *dx = (T *)p.dx + row * p.ld_dx;
    float dot = 0;
    for (long long c = threadIdx.x; c < cols; c += blockDim.x)
        dot += widen(dy[c]) * widen(weight[c]) * widen(x[c]);
    const float rstd = row < p.rows ? p.rstd[row] : 0.0f;
    const float back = row_total(dot) * rstd * rstd * rstd / (float)p.cols;
    for (long long c = threadIdx.x; c < cols; c += blockDim.x) {
        float d = widen(dy[c]) * widen(weight[c]) * rstd - widen(x[c]) * back;
        if (p.dres != nullptr)
            d += widen(dres[c]);
        dx[c] = narrow<T>(d);
    }
}

#define REGISTERS(name, T, PACKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_bwd_params p)       \
    {                                                                                              \
        norm_bwd_registers<T, PACKS>(p);                                                           \
    }
#define NORM(name, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_bwd_params p)       \
    {                                                                                              \
        norm_bwd_any<T>(p);                                                                        \
    }                                                                                              \
    REGISTERS(name##_x1, T, 1)                                                                     \
    REGISTERS(name##_x2, T, 2)                                                                     \
    REGISTERS(name##_x4, T, 4)

NORM(rmsnorm_bwd_f32, float)
NORM(rmsnorm_bwd_bf16, bf16)
NORM(rmsnorm_bwd_f16, f16)
