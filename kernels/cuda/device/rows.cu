// Moving rows: copy, gather, scatter, embedding lookup, conversion between dtypes; and filling.
//
// All are bound by memory. A block is (columns, rows) threads, sized by the host so that narrow
// rows fill it too; every thread moves one unit of a row at a time, as wide as alignment allows.
#include "params.h"
#include "types.cuh"

// The element a program works on here is a unit: N neighbouring elements, N dividing cols.
template <typename From, typename To, int N> __device__ void move_rows(const pmli_rows_params &p)
{
    const long long units = p.cols / N;
    const long long row_step = (long long)gridDim.y * blockDim.y;
    const long long unit_step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.y * blockDim.y + threadIdx.y; i < p.rows;
         i += row_step) {
        const long long from = p.from != nullptr ? p.from[i] : i;
        const long long to = p.to != nullptr ? p.to[i] : i;
        if (to < 0)
            continue;
        const Pack<From, N> *x = (const Pack<From, N> *)((const From *)p.x + from * p.ld_x);
        Pack<To, N> *y = (Pack<To, N> *)((To *)p.y + to * p.ld_y);
        for (long long u = (long long)blockIdx.x * blockDim.x + threadIdx.x; u < units;
             u += unit_step) {
            const Pack<From, N> in = x[u];
            Pack<To, N> out;
#pragma unroll
            for (int e = 0; e < N; e++) {
                if constexpr (__is_same(From, To))
                    out.at[e] = in.at[e];
                else
                    out.at[e] = narrow<To>(widen(in.at[e]));
            }
            y[u] = out;
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

// In units of N elements, as above.
template <typename T, int N> __device__ void fill_rows(const pmli_fill_params &p, T value)
{
    const long long units = p.cols / N;
    const long long row_step = (long long)gridDim.y * blockDim.y;
    const long long unit_step = (long long)gridDim.x * blockDim.x;
    Pack<T, N> filled;
#pragma unroll
    for (int e = 0; e < N; e++)
        filled.at[e] = value;
    for (long long i = (long long)blockIdx.y * blockDim.y + threadIdx.y; i < p.rows; i += row_step)
        for (long long u = (long long)blockIdx.x * blockDim.x + threadIdx.x; u < units;
             u += unit_step)
            ((Pack<T, N> *)((T *)p.y + i * p.ld_y))[u] = filled;
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
