// Element types and vector access for device code.
#ifndef PMLI_CUDA_TYPES_CUH
#define PMLI_CUDA_TYPES_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;

// What <cmath> and <type_traits> would bring: the run-time compiler has neither.
#define INFINITE     __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define MOST_DOUBLE  1.7976931348623157e308
__device__ inline bool is_finite(float x)
{
    return fabsf(x) < INFINITE; // false for NaN
}
template <typename A, typename B> constexpr bool same = false;
template <typename A> constexpr bool same<A, A> = true;

__device__ inline float widen(float x)
{
    return x;
}
__device__ inline float widen(bf16 x)
{
    return __bfloat162float(x);
}
__device__ inline float widen(f16 x)
{
    return __half2float(x);
}

// Round to nearest even.
template <typename T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x)
{
    return x;
}
template <> __device__ inline bf16 narrow<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}
template <> __device__ inline f16 narrow<f16>(float x)
{
    return __float2half_rn(x);
}

// Two neighbours in one register: one instruction each, where taking them out by themselves is two.
template <typename T> __device__ inline float2 widen_two(unsigned x);
template <> __device__ inline float2 widen_two<bf16>(unsigned x)
{
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <> __device__ inline float2 widen_two<f16>(unsigned x)
{
    return __half22float2(*(const __half2 *)&x);
}
template <typename T> __device__ inline unsigned narrow_two(float low, float high);
template <> __device__ inline unsigned narrow_two<bf16>(float low, float high)
{
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *(const unsigned *)&x;
}
template <> __device__ inline unsigned narrow_two<f16>(float low, float high)
{
    const __half2 x = __floats2half2_rn(low, high);
    return *(const unsigned *)&x;
}

// N neighbouring elements that move in one access: 16 bytes is the widest there is.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// A pack as floats, two elements at a time, and back, rounded two at a time. The compiler does not
// see how: it would take apart by itself, with two instructions an element, and round one by one,
// by an instruction a quarter as fast, whatever is also used by itself.
template <int N> struct Floats {
    float at[N];
};

template <typename T, int N> __device__ inline Floats<N> widened(const Pack<T, N> &x)
{
    Floats<N> out;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float2 two = widen_two<T>(((const unsigned *)&x)[i]);
            out.at[2 * i] = two.x, out.at[2 * i + 1] = two.y;
        }
    } else {
#pragma unroll
        for (int e = 0; e < N; e++)
            out.at[e] = widen(x.at[e]);
    }
    return out;
}

template <typename T, int N> __device__ inline Pack<T, N> narrowed(const Floats<N> &x)
{
    Pack<T, N> out;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            unsigned two = narrow_two<T>(x.at[2 * i], x.at[2 * i + 1]);
            asm("" : "+r"(two));
            ((unsigned *)&out)[i] = two;
        }
    } else {
#pragma unroll
        for (int e = 0; e < N; e++)
            out.at[e] = narrow<T>(x.at[e]);
    }
    return out;
}

// Whole packs of 16 bytes of what is longer than any cache: they are the first to leave it again,
// so that lines on their way out do not wait for each other (a tenth of SwiGLU's backward).
template <typename T, int N> __device__ inline Pack<T, N> read_once(const T *from)
{
    Pack<T, N> x;
    if constexpr (sizeof x == 16)
        *(uint4 *)&x = __ldcs((const uint4 *)from);
    else
        x = *(const Pack<T, N> *)from;
    return x;
}

template <typename T, int N> __device__ inline void write_once(T *to, const Pack<T, N> &x)
{
    if constexpr (sizeof x == 16)
        __stcs((uint4 *)to, *(const uint4 *)&x);
    else
        *(Pack<T, N> *)to = x;
}

#endif
