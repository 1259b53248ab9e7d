// Sums over tokens: the gradients of a bias (sum of dy) and of a norm's weight (sum of dy x rstd).
// A thread has a column of one block of rows, neighbours read neighbouring columns; the blocks'
// sums are added by a second kernel in an order of their own, so that bits depend on shapes only.
#include "params.h"
#include "types.cuh"

template <typename T, typename Y> __device__ void column_parts(const pmli_columns_params &p)
{
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= p.cols)
        return;
    const long long first = blockIdx.y * p.rows_a_part;
    const long long end = min(first + p.rows_a_part, p.rows);
    const T *x = (const T *)p.x + c;
    const Y *y = (const Y *)p.y + c;
    float sum = 0;
    if (p.y == nullptr)
        for (long long t = first; t < end; t++)
            sum += widen(x[t * p.ld_x]);
    else
        for (long long t = first; t < end; t++)
            sum += widen(x[t * p.ld_x]) * widen(y[t * p.ld_y]) * p.rstd[t];
    p.parts[blockIdx.y * p.cols + c] = sum;
}

#define COLUMNS(name, T, Y)                                                                        \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_columns_params p)            \
    {                                                                                              \
        column_parts<T, Y>(p);                                                                     \
    }
COLUMNS(column_parts_f32, float, float)
COLUMNS(column_parts_bf16, bf16, bf16)
COLUMNS(column_parts_f16, f16, f16)
COLUMNS(column_parts_bf16_by_f32, bf16, float)
COLUMNS(column_parts_f16_by_f32, f16, float)

// A warp has every 32nd part of 32 columns, then the sums of one of them.
extern "C" __global__ void __launch_bounds__(1024) add_parts(const pmli_add_parts_params p)
{
    __shared__ float sums[32][33];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long first = blockIdx.x * 32LL, c = first + lane;
    const float *parts = p.parts + blockIdx.y * p.count * p.cols;
    float sum = 0;
    if (c < p.cols) {
#pragma unroll 8
        for (long long i = warp; i < p.count; i += 32)
            sum += parts[i * p.cols + c];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    sum = sums[lane][warp];
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane == 0 && first + warp < p.cols)
        (blockIdx.y == 0 ? p.out[0] : p.out[1])[first + warp] += sum;
}
