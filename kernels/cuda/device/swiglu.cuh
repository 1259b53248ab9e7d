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

// h = silu(gate) up.
template <typename T, int N>
__device__ inline Pack<T, N> swiglu_of(const Pack<T, N> &gate, const Pack<T, N> &up)
{
    Pack<T, N> h;
#pragma unroll
    for (int e = 0; e < N; e++) {
        const float x = widen(gate.at[e]);
        h.at[e] = narrow<T>(x * sigmoid<T>(x) * widen(up.at[e]));
    }
    return h;
}

// gate, up and dh become dgate, dup and h.
template <typename T, int N>
__device__ inline void swiglu_back(Pack<T, N> &gate, Pack<T, N> &up, Pack<T, N> &dh)
{
#pragma unroll
    for (int e = 0; e < N; e++) {
        const float x = widen(gate.at[e]), s = sigmoid<T>(x), silu = x * s;
        const float u = widen(up.at[e]), d = widen(dh.at[e]);
        up.at[e] = narrow<T>(d * silu);
        gate.at[e] = narrow<T>(d * u * (s + silu * (1.0f - s)));
        dh.at[e] = narrow<T>(silu * u);
    }
}

#endif
