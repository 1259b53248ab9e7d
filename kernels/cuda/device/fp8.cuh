// E4M3 and the scales of rows, for every kernel that rounds to 8 bits.
#ifndef PMLI_CUDA_FP8_CUH
#define PMLI_CUDA_FP8_CUH

#include "params.h"
#include "types.cuh"

#define MOST     448.0f    // the largest code
#define SMALLEST 0x1p-100f // a largest number below it counts as 0

__device__ inline float larger(float a, float b)
{
    return b > a ? b : a; // a NaN loses
}

// The largest of a block's threads, in every one of them.
__device__ inline float block_top(float top)
{
    __shared__ float of_warp[32];
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, d));
    __syncthreads(); // what a call before this one left has been read by all
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = top;
    __syncthreads();
    top = threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0.0f;
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, d));
    return top;
}

// As kernels/maps.c has it: what runs where the code was compiled for an older chip than its own.
__device__ inline unsigned code_of(float x)
{
    const float magnitude = fabsf(x);
    const unsigned bits = __float_as_uint(magnitude), sign = __float_as_uint(x) >> 24 & 0x80;
    if (x != x)
        return 0x7f;
    if (magnitude >= MOST)
        return sign | 0x7e;
    if (magnitude < 0x1p-6f)
        return sign | (unsigned)rintf(magnitude * 0x1p9f);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

// Two codes, that of `low` in the low byte.
__device__ inline unsigned two_codes(float low, float high)
{
#if __CUDA_ARCH__ >= 890
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
#else
    return code_of(low) | code_of(high) << 8;
#endif
}

// What a code means that is none of NaN's.
__device__ inline float value_of(unsigned code)
{
    const unsigned exponent = code >> 3 & 15, fraction = code & 7;
    const float magnitude = exponent == 0
                                ? (float)fraction * 0x1p-9f
                                : __uint_as_float((exponent + 120) << 23 | fraction << 20);
    return code & 0x80 ? -magnitude : magnitude;
}

// The largest of a warp's threads, none of which is below 0, in every one of them.
__device__ inline float warp_top(float top)
{
#if __CUDA_ARCH__ >= 800
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(top)));
#else
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, d));
    return top;
#endif
}

struct Scale {
    float into, back;
};

// The least power of 2^step that is no less than top / 448: step is a power of two. 0 times an
// infinity is NaN.
__device__ inline Scale power_for(float top, unsigned step)
{
    const unsigned up = __float_as_uint(__fmul_rn(top, 1.0f / MOST)) + 0x7fffffu;
    const unsigned exponent = (((up >> 23) + step) & ~(step - 1)) - 1; // 127 is that of 1
    const bool any = top >= SMALLEST;
    return {any && is_finite(top) ? __uint_as_float((254 - exponent) << 23) : 0.0f,
            any ? __uint_as_float(exponent << 23) : 0.0f};
}

// Eight neighbours' factors, read where nobody writes: 16 bytes aligned.
struct Factors {
    float4 low, high;
};

__device__ inline Factors factors_at(const float *by)
{
    return {__ldg((const float4 *)by), __ldg((const float4 *)by + 1)};
}

template <typename T>
__device__ inline void numbers_of(const Pack<T, 8> &in, const Factors *by, float x[8])
{
#pragma unroll
    for (int e = 0; e < 8; e++)
        x[e] = widen(in.at[e]);
    if (by == nullptr)
        return;
    const float factor[8] = {by->low.x,  by->low.y,  by->low.z,  by->low.w,
                             by->high.x, by->high.y, by->high.z, by->high.w};
#pragma unroll
    for (int e = 0; e < 8; e++)
        x[e] = __fmul_rn(x[e], factor[e]);
}

// The largest of eight, times their factors where there are any: by may be null.
template <typename T> __device__ inline float top_of(const Pack<T, 8> &in, const Factors *by)
{
    float x[8], top = 0;
    numbers_of(in, by, x);
#pragma unroll
    for (int e = 0; e < 8; e++)
        top = fmaxf(top, fabsf(x[e])); // a NaN loses
    return top;
}

// Eight codes of a piece.
template <typename T>
__device__ inline Pack<unsigned short, 4> codes_of(const Pack<T, 8> &in, const Factors *by,
                                                   float into)
{
    float x[8];
    Pack<unsigned short, 4> codes;
    numbers_of(in, by, x);
#pragma unroll
    for (int e = 0; e < 8; e += 2)
        codes.at[e / 2] =
            (unsigned short)two_codes(__fmul_rn(x[e], into), __fmul_rn(x[e + 1], into));
    return codes;
}

// COUNT eights of rows, each a thread's share of a warp's piece, to codes and their pieces' scales:
// all reductions are under way at once. there: whether any are, and are written.
template <typename T, int COUNT>
__device__ inline void put_pieces(const Pack<T, 8> (&in)[COUNT], const Factors *by,
                                  const bool (&there)[COUNT], unsigned char *to, long long ld,
                                  float *scale, long long ld_scale)
{
    float top[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        top[i] = there[i] ? top_of(in[i], by) : 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        top[i] = warp_top(top[i]);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const Scale s = power_for(top[i], FP8_STEP);
        const Pack<unsigned short, 4> codes = codes_of(in[i], by, s.into);
        if (there[i])
            *(Pack<unsigned short, 4> *)(to + i * ld) = codes;
        if (there[i] && threadIdx.x % 32 == 0)
            scale[i * ld_scale] = s.back;
    }
}

#endif
