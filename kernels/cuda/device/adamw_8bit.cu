// AdamW with moments in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
// 2022). A warp has a block of 256 elements, a lane eight of them: in two runs of four. Sums and
// products are fused exactly where the CPU reference fuses them, so that the bits are the same.
#include "params.h"
#include "types.cuh"

#define BLOCK    256
#define SMALLEST 1.17549435e-38f // FLT_MIN

// The nearest code is the number of middles below x. The map has 2^i (of one sign: 2^(i+1)) evenly
// spaced values in its i-th decade from below, so that a guess by arithmetic is right or one off;
// comparing with the middles themselves makes it right.
template <bool SIGNED> __device__ inline int nearest(const float *middle, float x)
{
    const float size = fabsf(x);
    int decade = 0;
    float scale = 1e6f;
    const float begins[6] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f};
    const float scales[6] = {1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1.0f};
#pragma unroll
    for (int i = 0; i < 6; i++)
        if (size >= begins[i]) {
            decade = i + 1;
            scale = scales[i];
        }
    const int items = SIGNED ? 1 << decade : 2 << decade;
    int item = (int)((size * scale - 0.1f) * (float)items * (1.0f / 0.9f));
    item =
        min(max(item, 0), items - 1) + items; // items - 1 lie in the decades below, and there is 0
    int code = SIGNED ? (x < 0 ? 127 - item : 127 + item) : item - 1;
    while (code < 255 && middle[code] < x)
        code++;
    while (code > 0 && !(middle[code - 1] < x))
        code--;
    return code;
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
    if (!is_finite(p.hyper[HYPER_GRAD_SCALE]))
        return;
    const int i = threadIdx.x; // there are as many threads as codes
    m_map[i] = p.m_map[i];
    v_map[i] = p.v_map[i];
    m_middle[i] = i < 255 ? (p.m_map[i] + p.m_map[i + 1]) * 0.5f : INFINITE;
    v_middle[i] = i < 255 ? (p.v_map[i] + p.v_map[i + 1]) * 0.5f : INFINITE;
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
                const int code = nearest<true>(m_middle, __fmul_rn(m[run][e], m_inverse));
                m_code[e] = (unsigned char)(m[run][e] < 0 && code == 127 ? 126 : code);
                v_code[e] =
                    (unsigned char)nearest<false>(v_middle, __fmul_rn(v[run][e], v_inverse));
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
