// Weights to NF4, to the bit as the CPU reference has it (cpu/ref/nf4.c says where its order of
// sums comes from): every operation is rounded by itself, every sum is added in the reference's
// order.
//
//   x ──codes──► codes, absmax ──rows──► sums of 2^power rows of 32 ──mean──► offset
//                          └───────────────────────scales──────────────────────┴──► 8-bit, nested
#include "nf4.cuh"
#include "params.h"
#include "types.cuh"

#define LANES 32 // magnitudes that are added side by side
#define GROUP 256
#define AHEAD 16 // sums read at once: the additions themselves stand in line

// How many of n ascending values lie below x. NaN: none.
__device__ inline int below(const float *values, int n, float x)
{
    int count = 0;
    for (int step = (n + 1) / 2; step > 0; step /= 2) // n is one less than a power of two
        count += values[count + step - 1] < x ? step : 0;
    return count;
}

__device__ inline float larger(float a, float b)
{
    return b > a ? b : a; // a NaN loses
}

// A thread has 8 elements, the 8 threads of a block share its magnitude.
template <typename T> __device__ void codes(const pmli_nf4_quantise_params &p)
{
    __shared__ float middles[15];
    if (threadIdx.x < 15)
        middles[threadIdx.x] =
            __fmul_rn(__fadd_rn(p.values[threadIdx.x], p.values[threadIdx.x + 1]), 0.5f);
    __syncthreads();
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    const long long block = first / 64, in_block = min(64LL, p.count - block * 64);
    const T *x = (const T *)p.x + first;
    float at[8], top = 0;
    if (p.wide && first < p.count) {
        Pack<T, 16 / sizeof(T)> in[sizeof(T) / 2];
#pragma unroll
        for (int k = 0; k < (int)sizeof(T) / 2; k++)
            in[k] = ((const Pack<T, 16 / sizeof(T)> *)x)[k];
#pragma unroll
        for (int e = 0; e < 8; e++)
            at[e] = widen(in[e / (16 / sizeof(T))].at[e % (16 / sizeof(T))]);
    } else {
        for (int e = 0; e < 8; e++)
            at[e] = first + e < p.count ? widen(x[e]) : 0;
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
        top = larger(top, fabsf(at[e]));
#pragma unroll
    for (int d = 4; d > 0; d /= 2)
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, d));
    if (first >= p.count)
        return;
    const bool partial = in_block < 64;
    top = partial && top < 1e-38f ? 1e-38f : top;
    if (threadIdx.x % 8 == 0)
        p.magnitudes[block] = top;
    const float inverse = __fdiv_rn(1.0f, top < 1e-38f ? 1e-38f : top);
    unsigned packed = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const float scaled = partial ? __fdiv_rn(at[e], top) : __fmul_rn(at[e], inverse);
        const unsigned code = first + e < p.count ? below(middles, 15, scaled) : 7;
        packed |= code << (e / 2 * 8 + (e % 2 ? 0 : 4)); // the first of two in the high half
    }
    unsigned char *to = p.codes + first / 2;
    if (p.wide)
        *(unsigned *)to = packed;
    else
        for (int k = 0; k < 4 && first + 2 * k < p.count; k++)
            to[k] = packed >> 8 * k;
}

#define CODES(name, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_nf4_quantise_params p)       \
    {                                                                                              \
        codes<T>(p);                                                                               \
    }
CODES(nf4_codes_f32, float)
CODES(nf4_codes_bf16, bf16)
CODES(nf4_codes_f16, f16)

// The innermost sums: a warp adds 2^power rows of 32 magnitudes, each lane its own column.
extern "C" __global__ void __launch_bounds__(256) nf4_rows(const pmli_nf4_quantise_params p)
{
    const int lane = threadIdx.x % LANES;
    const long long sum = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (sum >= p.sums)
        return;
    const float *row = p.magnitudes + (sum << p.power) * LANES + lane;
    float total = 0;
#pragma unroll 16
    for (int r = 0; r < 1 << p.power; r++)
        total = __fadd_rn(total, row[r * LANES]);
    p.partial[sum * LANES + lane] = total;
}

// The levels above them, what fills no 2^power rows, and what fills no row; then the lanes. One
// warp.
extern "C" __global__ void __launch_bounds__(32) nf4_mean(const pmli_nf4_quantise_params p)
{
    __shared__ float side[LANES];
    const int lane = threadIdx.x;
    const long long rows = p.blocks / LANES, step = 1LL << p.power;
    float level[4] = {0, 0, 0, 0};
    for (long long s = 0; s < p.sums; s += AHEAD) {
        float next[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            next[k] = s + k < p.sums ? p.partial[(s + k) * LANES + lane] : 0;
#pragma unroll
        for (int k = 0; k < AHEAD && s + k < p.sums; k++) {
            const long long done = (s + k + 1) << p.power;
            level[1] = __fadd_rn(level[1], next[k]);
            if ((done & (step - 1) << p.power) != 0)
                continue;
            level[2] = __fadd_rn(level[2], level[1]);
            level[1] = 0;
            if ((done & (step - 1) << 2 * p.power) != 0)
                continue;
            level[3] = __fadd_rn(level[3], level[2]);
            level[2] = 0;
        }
    }
    for (long long r = p.sums << p.power; r < rows; r++)
        level[0] = __fadd_rn(level[0], p.magnitudes[r * LANES + lane]);
    for (int j = 1; j < 4; j++)
        level[0] = __fadd_rn(level[0], level[j]);
    const float *rest = p.magnitudes + rows * LANES;
    const int left = (int)(p.blocks % LANES), whole = left / 8 * 8;
    for (int i = lane; lane < 8 && i < whole; i += 8)
        level[0] = __fadd_rn(level[0], rest[i]);
    side[lane] = level[0];
    __syncwarp();
    if (lane > 0)
        return;
    float total = 0;
    for (int i = whole; i < left; i++)
        total = __fadd_rn(total, rest[i]);
    for (int i = 0; i < 8; i++) {
        float sum = side[i];
        for (int k = 1; k < 4; k++)
            sum = __fadd_rn(sum, side[k * 8 + i]);
        total = __fadd_rn(total, sum);
    }
    *p.offset = __fdiv_rn(total, (float)p.blocks);
}

// 256 magnitudes, less their mean, in 8 bits and one scale.
extern "C" __global__ void __launch_bounds__(GROUP) nf4_scales(const pmli_nf4_quantise_params p)
{
    __shared__ float middles[GROUP - 1], of_warp[GROUP / 32];
    const int i = threadIdx.x;
    const long long block = (long long)blockIdx.x * GROUP + i;
    const bool there = block < p.blocks;
    if (i < GROUP - 1)
        middles[i] = __fmul_rn(__fadd_rn(nf4_magnitude(i), nf4_magnitude(i + 1)), 0.5f);
    const float away = there ? __fsub_rn(p.magnitudes[block], *p.offset) : 0;
    float scale = fmaxf(0, fabsf(away));
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        scale = fmaxf(scale, __shfl_xor_sync(0xffffffffu, scale, d));
    if (i % 32 == 0)
        of_warp[i / 32] = scale;
    __syncthreads();
    scale = 0;
    for (int w = 0; w < GROUP / 32; w++)
        scale = fmaxf(scale, of_warp[w]);
    if (i == 0)
        p.nested[blockIdx.x] = scale;
    if (!there)
        return;
    float x = scale > 0 ? __fmul_rn(away, __fdiv_rn(1.0f, scale)) : 0;
    x = x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x;
    if (p.grid > 0) {
        const float steps = (float)p.grid;
        const float index = floorf(__fmaf_rn(__fmul_rn(__fadd_rn(x, 1.0f), 0.5f), steps, 0.5f));
        x = __fadd_rn(-1.0f, __fdiv_rn(__fmul_rn(2.0f, index), steps));
    }
    p.absmax[block] = scale > 0 ? below(middles, GROUP - 1, x) : 0;
}
