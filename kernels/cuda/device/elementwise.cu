// Rotary embedding in place, and SwiGLU forward and backward. All are bound by memory: a thread
// works on packs as wide as alignment allows.
#include "params.h"
#include "swiglu.cuh"

// A thread rotates N neighbouring pairs (x_i, x_{i+half}) of one head of one token.
template <typename T, int N> __device__ void rope(const pmli_rope_params &p)
{
    const int a_head = p.half / N;
    const long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long token = item / (a_head * p.heads);
    if (token >= p.tokens)
        return;
    const int rest = (int)(item - token * (a_head * p.heads)), head = rest / a_head;
    const int i = (rest - head * a_head) * N;
    T *x = (T *)p.x + token * p.ld_x + (long long)head * 2 * p.half + i;
    const float *row = p.table + (long long)p.pos[token] * 2 * p.half + i;
    Pack<T, N> low = *(Pack<T, N> *)x, high = *(Pack<T, N> *)(x + p.half);
#pragma unroll
    for (int e = 0; e < N; e++) {
        const float c = row[e], s = row[p.half + e] * p.sign;
        const float a = widen(low.at[e]), b = widen(high.at[e]);
        low.at[e] = narrow<T>(a * c - b * s);
        high.at[e] = narrow<T>(b * c + a * s);
    }
    *(Pack<T, N> *)x = low;
    *(Pack<T, N> *)(x + p.half) = high;
}

// The first pack of this thread and its row; a block stays in one row.
template <int N> __device__ inline long long pack_of(const pmli_swiglu_params &p, long long *row)
{
    *row = blockIdx.x / p.blocks_a_row;
    return ((long long)(blockIdx.x - *row * p.blocks_a_row) * blockDim.x + threadIdx.x) * N;
}

template <typename T, int N> __device__ void swiglu(const pmli_swiglu_params &p)
{
    long long row, c = pack_of<N>(p, &row);
    if (c >= p.cols)
        return;
    const T *gate = (const T *)p.gate_up + row * p.ld_gate_up + c;
    const Pack<T, N> g = *(const Pack<T, N> *)gate, u = *(const Pack<T, N> *)(gate + p.cols);
    *(Pack<T, N> *)((T *)p.h + row * p.ld_h + c) = swiglu_of<T, N>(g, u);
}

template <typename T, int N> __device__ void swiglu_bwd(const pmli_swiglu_params &p)
{
    long long row, c = pack_of<N>(p, &row);
    if (c >= p.cols)
        return;
    const T *gate = (const T *)p.gate_up + row * p.ld_gate_up + c;
    T *out = (T *)p.y + row * p.ld_y + c;
    Pack<T, N> g = read_once<T, N>(gate), u = read_once<T, N>(gate + p.cols);
    Pack<T, N> d = read_once<T, N>((const T *)p.dh + row * p.ld_dh + c);
    swiglu_back<T, N>(g, u, d);
    write_once<T, N>(out, g);
    write_once<T, N>(out + p.cols, u);
    if (p.h != nullptr)
        write_once<T, N>((T *)p.h + row * p.ld_h + c, d);
}

#define KERNEL(name, params, body)                                                                 \
    extern "C" __global__ void __launch_bounds__(256) name(const params p)                         \
    {                                                                                              \
        body(p);                                                                                   \
    }
// One element at a time, and its wide form.
#define BOTH(name, params, body, T, suffix)                                                        \
    KERNEL(name##_##suffix, params, (body<T, 1>))                                                  \
    KERNEL(name##_##suffix##_wide, params, (body<T, 16 / sizeof(T)>))
#define ALL(name, params, body)                                                                    \
    BOTH(name, params, body, float, f32)                                                           \
    BOTH(name, params, body, bf16, bf16)                                                           \
    BOTH(name, params, body, f16, f16)

ALL(rope, pmli_rope_params, rope)
ALL(swiglu, pmli_swiglu_params, swiglu)
ALL(swiglu_bwd, pmli_swiglu_params, swiglu_bwd)
