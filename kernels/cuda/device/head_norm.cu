// RMSNorm of each head of queries and keys (Qwen3): a warp a head, a lane every 32nd element. T is
// the dtype of the rows, W that of the weights: T, or float where they are trained.
#include "params.h"
#include "types.cuh"

#define MOST  8 // head_dim <= 256
#define WARPS 8

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

#define KERNEL(name, call)                                                                         \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_head_norm_params p)          \
    {                                                                                              \
        call(p);                                                                                   \
    }
#define ALL(suffix, T, W)                                                                          \
    KERNEL(head_norm_##suffix, (head_norm<T, W>))                                                  \
    KERNEL(head_norm_bwd_##suffix, (head_norm_bwd<T, W>))
ALL(f32, float, float)
ALL(bf16, bf16, bf16)
ALL(f16, f16, f16)
ALL(trained_bf16, bf16, float)
ALL(trained_f16, f16, float)
KERNEL(head_norm_parts_f32, head_norm_parts<float>)
KERNEL(head_norm_parts_bf16, head_norm_parts<bf16>)
KERNEL(head_norm_parts_f16, head_norm_parts<f16>)
