// AdamW with moments in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
// 2022). A warp has a block of 256 elements, a lane eight of them: in two runs of four. Sums and
// products are fused exactly where the CPU reference fuses them, so that the bits are the same.
#include "params.h"
#include "types.cuh"

#define BLOCK    256
#define SMALLEST 1.17549435e-38f // FLT_MIN

// The nearest code is the number of middles below x. What the exponent and seven bits of the
// mantissa of |x| say of it is in a table, a cell each: between two neighbouring cells' first
// numbers there is one middle at most, so that one comparison tells the rest.
//
//   |x| as bits:  0 eeeeeeee mmmmmmm|mmmmmmmmmmmmmmmm      cell: these 15 bits, less those of
//   2^-24,
//                                                          under which no middle is but in cell 0
#define FIRST_CELL ((127 - 24) << 7)
#define CELLS      ((24 << 7) + 1) // up to 1

__device__ inline int cell_of(float size)
{
    return min(max((int)(__float_as_uint(size) >> 16 & 0x7fff) - FIRST_CELL, 0), CELLS - 1);
}

// How many of n middles (ascending, positive) are below the first number of each cell.
__device__ inline void count_below(const float *middle, int n, unsigned char *below)
{
    for (int cell = threadIdx.x; cell < CELLS; cell += blockDim.x) {
        const float first = cell > 0 ? __uint_as_float((unsigned)(cell + FIRST_CELL) << 16) : 0.0f;
        int low = 0, high = n;
        while (low < high) {
            const int at = (low + high) / 2;
            if (middle[at] < first)
                low = at + 1;
            else
                high = at;
        }
        below[cell] = (unsigned char)low;
    }
}

// Of numbers that have no sign: middle has 255 and an infinite one behind them.
__device__ inline int nearest_of(const float *middle, const unsigned char *below, float x)
{
    const int n = below[cell_of(x)];
    return n + (middle[n] < x);
}

// Zero has code 127, and the middles below it are those above it, mirrored; but for the last one,
// between the largest of both signs and 1. `middle` are those above zero.
#define ZERO 127
__device__ inline int nearest_signed(const float *middle, const unsigned char *below, float x)
{
    const float size = fabsf(x);
    const int n = below[cell_of(size)];
    return x < 0 ? ZERO - min(n + (middle[n] <= size), ZERO) : ZERO + n + (middle[n] < size);
}

__device__ inline float warp_largest(float x)
{
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// Four neighbours from `at` on, as far as they are there; 0 for the others.
template <typename T>
__device__ inline void load_four(T to[4], const T *from, long long at, long long count, bool wide)
{
    if (wide && at + 4 <= count) {
        *(Pack<T, 4> *)to = *(const Pack<T, 4> *)(from + at);
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        to[e] = at + e < count ? from[at + e] : T(0);
}

template <typename T>
__device__ inline void store_four(T *to, const T from[4], long long at, long long count, bool wide)
{
    if (wide && at + 4 <= count) {
        *(Pack<T, 4> *)(to + at) = *(const Pack<T, 4> *)from;
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        if (at + e < count)
            to[at + e] = from[e];
}

template <typename T> __device__ void adamw_8bit(const pmli_adamw_8bit_params &p)
{
    __shared__ float m_map[256], v_map[256], m_middle[256], v_middle[256];
    __shared__ unsigned char m_below[CELLS], v_below[CELLS];
    if (!is_finite(p.hyper[HYPER_GRAD_SCALE]))
        return;
    const int i = threadIdx.x; // there are as many threads as codes
    m_map[i] = p.m_map[i];
    v_map[i] = p.v_map[i];
    m_middle[i] = i < 255 ? (p.m_map[i] + p.m_map[i + 1]) * 0.5f : INFINITE;
    v_middle[i] = i < 255 ? (p.v_map[i] + p.v_map[i + 1]) * 0.5f : INFINITE;
    __syncthreads();
    count_below(m_middle + ZERO, 255 - ZERO, m_below);
    count_below(v_middle, 255, v_below);
    __syncthreads();

    const double lr = p.hyper[HYPER_LR], wide2 = p.hyper[HYPER_ONE_MINUS_BETA2];
    const float keep = (float)(1.0 - lr * p.hyper[HYPER_WEIGHT_DECAY]);
    const float step = (float)(lr / p.hyper[HYPER_BIAS1]),
                root2 = (float)sqrt((double)p.hyper[HYPER_BIAS2]);
    const float new1 = p.hyper[HYPER_ONE_MINUS_BETA1], new2 = (float)wide2,
                beta2 = (float)(1.0 - wide2);
    const float eps = p.hyper[HYPER_EPS], scale = p.hyper[HYPER_GRAD_SCALE];
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const long long blocks = (p.count + BLOCK - 1) / BLOCK;
    for (long long block = (long long)blockIdx.x * warps + threadIdx.x / 32; block < blocks;
         block += (long long)gridDim.x * warps) {
        const float m_was = p.m_largest[block], v_was = p.v_largest[block];
        const long long first = block * BLOCK + lane * 4;
        alignas(16) float m[2][4], v[2][4];
        float m_top = 0, v_top = 0;
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const long long at = first + run * (BLOCK / 2);
            alignas(16) float value[4], g[4];
            alignas(4) unsigned char m_code[4], v_code[4];
            alignas(16) T copy[4];
            load_four(value, p.p, at, p.count, p.wide);
            load_four(g, p.g, at, p.count, p.wide);
            load_four(m_code, p.m, at, p.count, p.wide);
            load_four(v_code, p.v, at, p.count, p.wide);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const bool there = at + e < p.count;
                const float grad = __fmul_rn(g[e], scale), code = m_map[m_code[e]];
                const float new_m =
                    __fmaf_rn(__fmaf_rn(-code, m_was, grad), new1, __fmul_rn(code, m_was));
                const float new_v = __fmaf_rn(__fmul_rn(new2, grad), grad,
                                              __fmul_rn(beta2, __fmul_rn(v_map[v_code[e]], v_was)));
                m[run][e] = there ? new_m : 0.0f;
                v[run][e] = there ? new_v : 0.0f;
                m_top = fmaxf(m_top, fabsf(m[run][e]));
                v_top = fmaxf(v_top, v[run][e]);
                const float size = __fadd_rn(__fdiv_rn(__fsqrt_rn(new_v), root2), eps);
                value[e] = __fmaf_rn(value[e], keep, -__fdiv_rn(__fmul_rn(step, new_m), size));
                copy[e] = narrow<T>(value[e]);
            }
            store_four(p.p, value, at, p.count, p.wide);
            if (p.copy != nullptr)
                store_four((T *)p.copy, copy, at, p.count, p.wide);
        }
        m_top = warp_largest(m_top);
        v_top = warp_largest(v_top);
        if (lane == 0) {
            p.m_largest[block] = m_top;
            p.v_largest[block] = v_top;
        }
        const float m_inverse = m_top >= SMALLEST ? __fdiv_rn(1.0f, m_top) : 0.0f;
        const float v_inverse = v_top >= SMALLEST ? __fdiv_rn(1.0f, v_top) : 0.0f;
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const long long at = first + run * (BLOCK / 2);
            alignas(4) unsigned char m_code[4], v_code[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int code =
                    nearest_signed(m_middle + ZERO, m_below, __fmul_rn(m[run][e], m_inverse));
                m_code[e] = (unsigned char)(m[run][e] < 0 && code == ZERO ? ZERO - 1 : code);
                v_code[e] =
                    (unsigned char)nearest_of(v_middle, v_below, __fmul_rn(v[run][e], v_inverse));
            }
            store_four(p.m, m_code, at, p.count, p.wide);
            store_four(p.v, v_code, at, p.count, p.wide);
        }
    }
}

#define ADAMW_8BIT(name, T)                                                                        \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_adamw_8bit_params p)         \
    {                                                                                              \
        adamw_8bit<T>(p);                                                                          \
    }
ADAMW_8BIT(adamw_8bit_f32, float)
ADAMW_8BIT(adamw_8bit_bf16, bf16)
ADAMW_8BIT(adamw_8bit_f16, f16)
