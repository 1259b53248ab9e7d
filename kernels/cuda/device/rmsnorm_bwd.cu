// Backward of RMSNorm. A row at a time, held in registers as 16-byte packs like the forward: three
// reads and one write of tokens*hidden. The weight's gradient is a sum over tokens and is made by
// columns.cu, before dx, which may lie on dy.
//
// T is the dtype of dy, x and the weight, R that of the gradient which runs down the residual line:
// float where T is f16. It is then written twice, the second time as T for products to read.
#include "params.h"
#include "row_total.cuh"
#include "types.cuh"

template <typename T, typename R, int PACKS>
__device__ void norm_bwd_registers(const pmli_rmsnorm_bwd_params &p)
{
    constexpr int N = 16 / sizeof(T);
    constexpr bool narrow_sum = same<T, R>; // dres waits in registers, too; a wide one has no room
    typedef Pack<T, N> pack;
    typedef Pack<R, N> sum_pack;
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const int packs = row < p.rows ? (int)(p.cols / N) : 0;
    const pack *dy = (const pack *)((const T *)p.dy + row * p.ld_dy);
    const pack *x = (const pack *)((const T *)p.x + row * p.ld_x);
    const sum_pack *dres =
        p.dres != nullptr ? (const sum_pack *)((const R *)p.dres + row * p.ld_dres) : nullptr;
    const pack *weight = (const pack *)p.weight;
    sum_pack *dx = (sum_pack *)((R *)p.dx + row * p.ld_dx);
    pack *rounded = p.rounded != nullptr ? (pack *)((T *)p.rounded + row * p.ld_rounded) : nullptr;

    pack held_dy[PACKS], held_x[PACKS];
    sum_pack held_res[narrow_sum ? PACKS : 1];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        held_dy[k] = dy[c];
        held_x[k] = x[c];
        if (narrow_sum && dres != nullptr)
            held_res[narrow_sum ? k : 0] = dres[c];
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
        sum_pack out, res;
        pack less;
        if (dres != nullptr)
            res = narrow_sum ? held_res[narrow_sum ? k : 0] : dres[c];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float d =
                widen(held_dy[k].at[e]) * widen(w.at[e]) * rstd - widen(held_x[k].at[e]) * back;
            if (dres != nullptr)
                d += widen(res.at[e]);
            out.at[e] = narrow<R>(d);
            less.at[e] = narrow<T>(d);
        }
        dx[c] = out;
        if (rounded != nullptr)
            rounded[c] = less;
    }
}

// Any row: element by element. A thread reads only what it wrote itself where dx lies on an input.
template <typename T, typename R> __device__ void norm_bwd_any(const pmli_rmsnorm_bwd_params &p)
{
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const long long cols = row < p.rows ? p.cols : 0;
    const T *dy = (const T *)p.dy + row * p.ld_dy, *x = (const T *)p.x + row * p.ld_x;
    const T *weight = (const T *)p.weight;
    const R *dres = (const R *)p.dres + row * p.ld_dres;
    R *dx = (R *)p.dx + row * p.ld_dx;
    T *rounded = (T *)p.rounded + row * p.ld_rounded;
    float dot = 0;
    for (long long c = threadIdx.x; c < cols; c += blockDim.x)
        dot += widen(dy[c]) * widen(weight[c]) * widen(x[c]);
    const float rstd = row < p.rows ? p.rstd[row] : 0.0f;
    const float back = row_total(dot) * rstd * rstd * rstd / (float)p.cols;
    for (long long c = threadIdx.x; c < cols; c += blockDim.x) {
        float d = widen(dy[c]) * widen(weight[c]) * rstd - widen(x[c]) * back;
        if (p.dres != nullptr)
            d += widen(dres[c]);
        dx[c] = narrow<R>(d);
        if (p.rounded != nullptr)
            rounded[c] = narrow<T>(d);
    }
}

#define REGISTERS(name, T, R, PACKS)                                                               \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_bwd_params p)       \
    {                                                                                              \
        norm_bwd_registers<T, R, PACKS>(p);                                                        \
    }
#define NORM(name, T, R)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_bwd_params p)       \
    {                                                                                              \
        norm_bwd_any<T, R>(p);                                                                     \
    }                                                                                              \
    REGISTERS(name##_x1, T, R, 1)                                                                  \
    REGISTERS(name##_x2, T, R, 2)                                                                  \
    REGISTERS(name##_x4, T, R, 4)

NORM(rmsnorm_bwd_f32, float, float)
NORM(rmsnorm_bwd_bf16, bf16, bf16)
NORM(rmsnorm_bwd_f16, f16, f16)
NORM(rmsnorm_bwd_f16_to_f32, f16, float)
