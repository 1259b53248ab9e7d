// SwiGLU of one element, forward and backward: the same for every kernel, so that what the backward
// makes again has the bits of the forward.
#ifndef PMLI_CUDA_SWIGLU_CUH
#define PMLI_CUDA_SWIGLU_CUH

#include "types.cuh"

template <typename T> __device__ inline float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}
// By the special function unit, in four instructions: its error is far below half a unit of a
// 16-bit result.
__device__ inline float sigmoid_fast(float x)
{
    float e, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
    return s;
}
template <> __device__ inline float sigmoid<bf16>(float x)
{
    return sigmoid_fast(x);
}
template <> __device__ inline float sigmoid<f16>(float x)
{
    return sigmoid_fast(x);
}

template <typename T> __device__ inline float swiglu_of(float gate, float up)
{
    return gate * sigmoid<T>(gate) * up;
}

// gate, up and dh become dgate, dup and h.
template <typename T> __device__ inline void swiglu_back(float &gate, float &up, float &dh)
{
    const float s = sigmoid<T>(gate), silu = gate * s, u = up, d = dh;
    up = d * silu;
    gate = d * u * (s + silu * (1.0f - s));
    dh = silu * u;
}

// h = silu(gate) up.
template <typename T, int N>
__device__ inline Pack<T, N> swiglu_of(const Pack<T, N> &gate, const Pack<T, N> &up)
{
    Pack<T, N> h;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        const unsigned *g = (const unsigned *)&gate, *u = (const unsigned *)&up;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float2 x = widen_two<T>(g[i]), y = widen_two<T>(u[i]);
            ((unsigned *)&h)[i] = narrow_two<T>(swiglu_of<T>(x.x, y.x), swiglu_of<T>(x.y, y.y));
        }
    } else {
#pragma unroll
        for (int e = 0; e < N; e++)
            h.at[e] = narrow<T>(swiglu_of<T>(widen(gate.at[e]), widen(up.at[e])));
    }
    return h;
}

template <typename T, int N>
__device__ inline void swiglu_back(Pack<T, N> &gate, Pack<T, N> &up, Pack<T, N> &dh)
{
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        unsigned *g = (unsigned *)&gate, *u = (unsigned *)&up, *d = (unsigned *)&dh;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            float2 x = widen_two<T>(g[i]), y = widen_two<T>(u[i]), z = widen_two<T>(d[i]);
            swiglu_back<T>(x.x, y.x, z.x);
            swiglu_back<T>(x.y, y.y, z.y);
            g[i] = narrow_two<T>(x.x, x.y);
            u[i] = narrow_two<T>(y.x, y.y);
            d[i] = narrow_two<T>(z.x, z.y);
        }
    } else {
#pragma unroll
        for (int e = 0; e < N; e++) {
            float x = widen(gate.at[e]), y = widen(up.at[e]), z = widen(dh.at[e]);
            swiglu_back<T>(x, y, z);
            gate.at[e] = narrow<T>(x);
            up.at[e] = narrow<T>(y);
            dh.at[e] = narrow<T>(z);
        }
    }
}

#endif
