// RMSNorm of each head of queries and keys (Qwen3). Bound by memory: a read and a write of all
// heads forward, two reads and a write backward. T is the dtype of the rows, W that of the weights:
// T, or float where they are trained.
//
// Heads of whole 16-byte packs have as many lanes as packs, or the next power of two:
//
//   thread:   0 … 15 | 16 … 31 | 32 …        heads of 128 in 16 bits
//   head:        0   |    1    |  2 …        of one token, then of the next TOKENS
//
// A thread stays with its place in its head, so it has its part of a weight, and of that weight's
// gradient, in registers. Other heads: a warp each, a lane every 32nd element.
#include "params.h"
#include "types.cuh"

#define MOST_HEAD 256
#define MOST      (MOST_HEAD / 32)
#define WARPS     8
#define THREADS   256

__device__ inline float warp_total(float x)
{
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// The head of this warp, counted through all tokens; and its token.
__device__ inline long long head_of(const pmli_head_norm_params &p, long long *token)
{
    const long long at = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    *token = at / p.heads;
    return at;
}

template <typename T, typename W> __device__ void head_norm(const pmli_head_norm_params &p)
{
    long long token, at = head_of(p, &token);
    if (token >= p.tokens)
        return;
    const int head = (int)(at - token * p.heads), lane = threadIdx.x % 32;
    const T *x = (const T *)p.x + token * p.ld_x + head * p.head_dim;
    const W *weight = (const W *)(head < p.queries ? p.q_weight : p.k_weight);
    T *y = (T *)p.y + token * p.ld_y + head * p.head_dim;
    float held[MOST], squares = 0;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int c = i * 32 + lane;
        held[i] = c < p.head_dim ? widen(x[c]) : 0.0f;
        squares += held[i] * held[i];
    }
    const float rstd = 1.0f / sqrtf(warp_total(squares) / (float)p.head_dim + p.eps);
    if (lane == 0)
        p.rstd[token * p.ld_rstd + head] = rstd;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int c = i * 32 + lane;
        if (c < p.head_dim)
            y[c] = narrow<T>(held[i] * rstd * widen(weight[c]));
    }
}

template <typename T, typename W> __device__ void head_norm_bwd(const pmli_head_norm_params &p)
{
    long long token, at = head_of(p, &token);
    if (token >= p.tokens)
        return;
    const int head = (int)(at - token * p.heads), lane = threadIdx.x % 32;
    const T *x = (const T *)p.x + token * p.ld_x + head * p.head_dim;
    const T *dy = (const T *)p.dy + token * p.ld_dy + head * p.head_dim;
    const W *weight = (const W *)(head < p.queries ? p.q_weight : p.k_weight);
    T *dx = (T *)p.y + token * p.ld_y + head * p.head_dim;
    float held[MOST], g[MOST], dot = 0;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int c = i * 32 + lane;
        held[i] = c < p.head_dim ? widen(x[c]) : 0.0f;
        g[i] = c < p.head_dim ? widen(dy[c]) * widen(weight[c]) : 0.0f;
        dot += held[i] * g[i];
    }
    const float rstd = p.rstd[token * p.ld_rstd + head];
    const float back = warp_total(dot) * rstd * rstd * rstd / (float)p.head_dim;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int c = i * 32 + lane;
        if (c < p.head_dim)
            dx[c] = narrow<T>(g[i] * rstd - held[i] * back);
    }
}

// parts[q or k, block, c] = the sum of dy x rstd over the block's tokens and that kind of heads; a
// thread an element of a head.
template <typename T> __device__ void head_norm_parts(const pmli_head_norm_params &p)
{
    const int c = threadIdx.x;
    if (c >= p.head_dim)
        return;
    const long long first = blockIdx.x * p.rows_a_part;
    const long long end = min(first + p.rows_a_part, p.tokens);
    const int from = blockIdx.y == 0 ? 0 : p.queries, to = blockIdx.y == 0 ? p.queries : p.heads;
    float sum = 0;
    for (long long t = first; t < end; t++)
        for (int h = from; h < to; h++)
            sum += widen(((const T *)p.dy)[t * p.ld_dy + h * p.head_dim + c]) *
                   widen(((const T *)p.x)[t * p.ld_x + h * p.head_dim + c]) *
                   p.rstd[t * p.ld_rstd + h];
    p.parts[((long long)blockIdx.y * gridDim.x + blockIdx.x) * p.head_dim + c] = sum;
}

// ---- heads of whole packs ----

template <typename T> struct Place {
    static constexpr int N = 16 / sizeof(T), PACKS = MOST_HEAD / (32 * N);
    int head, of_block, lane, lanes, packs;

    __device__ explicit Place(const pmli_head_norm_params &p)
    {
        of_block = threadIdx.x / p.lanes;
        lane = threadIdx.x % p.lanes;
        lanes = p.lanes;
        head = blockIdx.y * p.heads_a_block + of_block;
        packs = of_block < p.heads_a_block && head < p.heads ? p.head_dim / N : 0;
    }

    // The k-th pack of this thread, of its head, and whether there is one.
    __device__ int pack(int k) const
    {
        return k * lanes + lane;
    }
    __device__ bool has(int k) const
    {
        return pack(k) < packs;
    }
    // Where that begins in a row.
    __device__ int column(const pmli_head_norm_params &p, int k) const
    {
        return head * p.head_dim + pack(k) * N;
    }

    template <typename W> __device__ Floats<N> weight(const pmli_head_norm_params &p, int k) const
    {
        const void *of = head < p.queries ? p.q_weight : p.k_weight;
        return has(k) ? widened(((const Pack<W, N> *)of)[pack(k)]) : Floats<N>{};
    }

    // Over the lanes of this head.
    __device__ float total(float x) const
    {
        for (int d = lanes / 2; d > 0; d /= 2)
            x += __shfl_xor_sync(0xffffffffu, x, d);
        return x;
    }
};

template <typename T, typename W> __device__ void head_norm_wide(const pmli_head_norm_params &p)
{
    constexpr int N = Place<T>::N, PACKS = Place<T>::PACKS, TOKENS = HEAD_NORM_TOKENS;
    const Place<T> at(p);
    const long long first = (long long)blockIdx.x * TOKENS;
    Pack<T, N> held[TOKENS][PACKS];
    Floats<N> weight[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
            if (first + i < p.tokens && at.has(k))
                held[i][k] =
                    *(const Pack<T, N> *)((const T *)p.x + (first + i) * p.ld_x + at.column(p, k));
        weight[k] = at.template weight<W>(p, k);
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        const bool there = first + i < p.tokens;
        float squares = 0;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const Floats<N> s = widened(held[i][k]);
#pragma unroll
            for (int e = 0; e < N; e++)
                squares += there && at.has(k) ? s.at[e] * s.at[e] : 0.0f;
        }
        const float rstd = 1.0f / sqrtf(at.total(squares) / (float)p.head_dim + p.eps);
        if (there && at.lane == 0 && at.packs > 0)
            p.rstd[(first + i) * p.ld_rstd + at.head] = rstd;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (!there || !at.has(k))
                continue;
            Floats<N> s = widened(held[i][k]);
#pragma unroll
            for (int e = 0; e < N; e++)
                s.at[e] = s.at[e] * rstd * weight[k].at[e];
            *(Pack<T, N> *)((T *)p.y + (first + i) * p.ld_y + at.column(p, k)) = narrowed<T>(s);
        }
    }
}

// parts[q or k, block, c] = the sums of this block's threads over their heads, one after the other.
template <typename T>
__device__ void add_heads(const pmli_head_norm_params &p, const Place<T> &at,
                          const Floats<Place<T>::N> (&sums)[Place<T>::PACKS])
{
    constexpr int N = Place<T>::N, PACKS = Place<T>::PACKS;
    __shared__ float of_head[THREADS * N * PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++)
#pragma unroll
        for (int e = 0; e < N; e++)
            if (at.has(k))
                of_head[at.of_block * p.head_dim + at.pack(k) * N + e] = sums[k].at[e];
    __syncthreads();
    const int first = blockIdx.y * p.heads_a_block, heads = min(p.heads_a_block, p.heads - first);
    const long long block = blockIdx.y * gridDim.x + blockIdx.x, blocks = gridDim.x * gridDim.y;
    for (int c = threadIdx.x; c < p.head_dim; c += blockDim.x) {
        float of_queries = 0, of_keys = 0;
        for (int h = 0; h < heads; h++)
            (first + h < p.queries ? of_queries : of_keys) += of_head[h * p.head_dim + c];
        p.parts[block * p.head_dim + c] = of_queries;
        p.parts[(blocks + block) * p.head_dim + c] = of_keys;
    }
}

// TRAINS: with the weights' gradients, by blocks that stay.
template <typename T, typename W, bool TRAINS>
__device__ void head_norm_bwd_wide(const pmli_head_norm_params &p)
{
    constexpr int N = Place<T>::N, PACKS = Place<T>::PACKS, TOKENS = HEAD_NORM_BACK_TOKENS;
    const Place<T> at(p);
    Floats<N> weight[PACKS], sums[PACKS] = {};
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        weight[k] = at.template weight<W>(p, k);
    const long long stride = (long long)gridDim.x * TOKENS;
    for (long long first = (long long)blockIdx.x * TOKENS; first < p.tokens; first += stride) {
        Pack<T, N> held_x[TOKENS][PACKS], held_dy[TOKENS][PACKS];
        float rstd[TOKENS];
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            const long long token = first + i;
            const bool there = token < p.tokens && at.packs > 0;
            rstd[i] = there ? p.rstd[token * p.ld_rstd + at.head] : 0.0f;
#pragma unroll
            for (int k = 0; k < PACKS; k++) {
                held_x[i][k] = held_dy[i][k] = {};
                if (!there || !at.has(k))
                    continue;
                const int c = at.column(p, k);
                held_x[i][k] = read_once<T, N>((const T *)p.x + token * p.ld_x + c);
                held_dy[i][k] = read_once<T, N>((const T *)p.dy + token * p.ld_dy + c);
            }
        }
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            float dot = 0;
#pragma unroll
            for (int k = 0; k < PACKS; k++) {
                const Floats<N> x = widened(held_x[i][k]), dy = widened(held_dy[i][k]);
#pragma unroll
                for (int e = 0; e < N; e++) {
                    const float product = dy.at[e] * x.at[e];
                    dot += product * weight[k].at[e];
                    if (TRAINS)
                        sums[k].at[e] += product * rstd[i];
                }
            }
            const float back = at.total(dot) * rstd[i] * rstd[i] * rstd[i] / (float)p.head_dim;
#pragma unroll
            for (int k = 0; k < PACKS; k++) {
                if (first + i >= p.tokens || !at.has(k))
                    continue;
                const Floats<N> x = widened(held_x[i][k]);
                Floats<N> d = widened(held_dy[i][k]);
#pragma unroll
                for (int e = 0; e < N; e++)
                    d.at[e] = d.at[e] * weight[k].at[e] * rstd[i] - x.at[e] * back;
                *(Pack<T, N> *)((T *)p.y + (first + i) * p.ld_y + at.column(p, k)) = narrowed<T>(d);
            }
        }
    }
    if (TRAINS)
        add_heads(p, at, sums);
}

#define KERNEL(name, call)                                                                         \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_head_norm_params p)          \
    {                                                                                              \
        call(p);                                                                                   \
    }
#define ALL(suffix, T, W)                                                                          \
    KERNEL(head_norm_##suffix, (head_norm<T, W>))                                                  \
    KERNEL(head_norm_##suffix##_wide, (head_norm_wide<T, W>))                                      \
    KERNEL(head_norm_bwd_##suffix, (head_norm_bwd<T, W>))                                          \
    KERNEL(head_norm_bwd_##suffix##_wide, (head_norm_bwd_wide<T, W, false>))
ALL(f32, float, float)
ALL(bf16, bf16, bf16)
ALL(f16, f16, f16)
ALL(trained_bf16, bf16, float)
ALL(trained_f16, f16, float)
KERNEL(head_norm_bwd_weight_f32, (head_norm_bwd_wide<float, float, true>))
KERNEL(head_norm_bwd_weight_bf16, (head_norm_bwd_wide<bf16, float, true>))
KERNEL(head_norm_bwd_weight_f16, (head_norm_bwd_wide<f16, float, true>))
KERNEL(head_norm_parts_f32, head_norm_parts<float>)
KERNEL(head_norm_parts_bf16, head_norm_parts<bf16>)
KERNEL(head_norm_parts_f16, head_norm_parts<f16>)
