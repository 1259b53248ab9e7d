// Moving rows: copy, gather, scatter, embedding lookup, conversion between dtypes; and filling.
//
// All are bound by memory. A block is (columns, rows) threads, shaped by the host so that narrow
// rows fill it too. The element a program works on here is a unit: N neighbouring elements, as wide
// as alignment allows. A thread moves UNITS_A_THREAD of them, a block's width apart, all of them on
// their way before the first is stored:
//
//   row:  | block 0: t0 t1 … tn-1 | t0 t1 … tn-1 | … UNITS_A_THREAD times | block 1: t0 t1 …
#include "params.h"
#include "types.cuh"

// The first unit of this thread.
__device__ inline long long first_unit()
{
    return (long long)blockIdx.x * blockDim.x * UNITS_A_THREAD + threadIdx.x;
}

template <typename To, typename From> __device__ inline To converted(From x)
{
    if constexpr (same<From, To>)
        return x;
    else
        return narrow<To>(widen(x));
}

template <typename From, typename To, int N> __device__ void move_rows(const pmli_rows_params &p)
{
    const long long units = p.cols / N, first = first_unit();
    for (long long i = (long long)blockIdx.y * blockDim.y + threadIdx.y; i < p.rows;
         i += (long long)gridDim.y * blockDim.y) {
        const long long from = p.from != nullptr ? p.from[i] : i;
        const long long to = p.to != nullptr ? p.to[i] : i;
        if (to < 0)
            continue;
        const Pack<From, N> *x = (const Pack<From, N> *)((const From *)p.x + from * p.ld_x);
        Pack<To, N> *y = (Pack<To, N> *)((To *)p.y + to * p.ld_y);
        Pack<From, N> held[UNITS_A_THREAD] = {};
#pragma unroll
        for (int k = 0; k < UNITS_A_THREAD; k++)
            if (from >= 0 && first + k * blockDim.x < units)
                held[k] = x[first + k * blockDim.x];
#pragma unroll
        for (int k = 0; k < UNITS_A_THREAD; k++) {
            if (first + k * blockDim.x >= units)
                continue;
            Pack<To, N> out;
#pragma unroll
            for (int e = 0; e < N; e++)
                out.at[e] = converted<To>(held[k].at[e]);
            y[first + k * blockDim.x] = out;
        }
    }
}

#define MOVE(name, From, To, N)                                                                    \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_rows_params p)               \
    {                                                                                              \
        move_rows<From, To, N>(p);                                                                 \
    }

// Without a change of dtype only the width of a unit matters; the host counts in units then.
MOVE(copy_1, unsigned char, unsigned char, 1)
MOVE(copy_2, unsigned short, unsigned short, 1)
MOVE(copy_4, unsigned, unsigned, 1)
MOVE(copy_8, unsigned long long, unsigned long long, 1)
MOVE(copy_16, uint4, uint4, 1)

#define CONVERT(name, From, To)                                                                    \
    MOVE(name, From, To, 1)                                                                        \
    MOVE(name##_x4, From, To, 4)

CONVERT(f32_to_bf16, float, bf16)
CONVERT(f32_to_f16, float, f16)
CONVERT(bf16_to_f32, bf16, float)
CONVERT(bf16_to_f16, bf16, f16)
CONVERT(f16_to_f32, f16, float)
CONVERT(f16_to_bf16, f16, bf16)

template <typename T, int N> __device__ void fill_rows(const pmli_fill_params &p, T value)
{
    const long long units = p.cols / N, first = first_unit();
    Pack<T, N> filled;
#pragma unroll
    for (int e = 0; e < N; e++)
        filled.at[e] = value;
    for (long long i = (long long)blockIdx.y * blockDim.y + threadIdx.y; i < p.rows;
         i += (long long)gridDim.y * blockDim.y)
#pragma unroll
        for (int k = 0; k < UNITS_A_THREAD; k++)
            if (first + k * blockDim.x < units)
                ((Pack<T, N> *)((T *)p.y + i * p.ld_y))[first + k * blockDim.x] = filled;
}

#define FILL_BY(name, T, N, value)                                                                 \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_fill_params p)               \
    {                                                                                              \
        fill_rows<T, N>(p, value);                                                                 \
    }
#define FILL(name, T, value)                                                                       \
    FILL_BY(name, T, 1, value)                                                                     \
    FILL_BY(name##_wide, T, 16 / sizeof(T), value)

FILL(fill_f32, float, (float)p.value)
FILL(fill_bf16, bf16, narrow<bf16>((float)p.value))
FILL(fill_f16, f16, narrow<f16>((float)p.value))
FILL(fill_f64, double, p.value)
FILL(fill_i32, int, (int)p.value)
FILL(fill_i64, long long, (long long)p.value)
FILL(fill_u8, unsigned char, (unsigned char)p.value)
