// Cross-entropy of rows of logits, which turn in place into their gradient. A block has a row; it
// is read twice, the second time out of the L2 cache.
#include "params.h"
#include "types.cuh"

struct Softmax {
    float top, sum; // sum of exp(x - top)
};

__device__ inline Softmax joined(Softmax a, Softmax b)
{
    const float top = fmaxf(a.top, b.top);
    // Nothing seen yet on one side: its sum is 0, and -inf - -inf would not be a number.
    const float left = a.sum == 0.0f ? 0.0f : a.sum * expf(a.top - top);
    const float right = b.sum == 0.0f ? 0.0f : b.sum * expf(b.top - top);
    return {top, left + right};
}

__device__ inline Softmax of_block(Softmax x)
{
    __shared__ Softmax of_warp[32];
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x = joined(
            x, {__shfl_xor_sync(0xffffffffu, x.top, d), __shfl_xor_sync(0xffffffffu, x.sum, d)});
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : Softmax{-INFINITE, 0.0f};
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x = joined(
            x, {__shfl_xor_sync(0xffffffffu, x.top, d), __shfl_xor_sync(0xffffffffu, x.sum, d)});
    return x;
}

// Rows begin on 16 bytes (the host pads ld); what is beyond the last whole pack goes one by one.
template <typename T> __device__ void cross_entropy(const pmli_cross_entropy_params &p)
{
    constexpr int N = 16 / sizeof(T);
    typedef Pack<T, N> pack;
    const long long slot = blockIdx.x;
    T *row = (T *)p.logits + slot * p.ld;
    const int whole = (int)(p.vocab / N), label = p.labels[slot];
    const bool empty = p.rows[slot] < 0;

    Softmax mine = {-INFINITE, 0.0f};
    for (int c = threadIdx.x; c < whole; c += blockDim.x) {
        const pack x = ((const pack *)row)[c];
        float top = mine.top;
#pragma unroll
        for (int e = 0; e < N; e++)
            top = fmaxf(top, widen(x.at[e]));
        float sum = 0;
#pragma unroll
        for (int e = 0; e < N; e++)
            sum += expf(widen(x.at[e]) - top);
        mine = {top, sum + (mine.sum == 0.0f ? 0.0f : mine.sum * expf(mine.top - top))};
    }
    for (long long c = (long long)whole * N + threadIdx.x; c < p.vocab; c += blockDim.x)
        mine = joined(mine, {widen(row[c]), 1.0f});
    const Softmax all = of_block(mine);
    const float at_label = empty ? 0.0f : widen(row[label]);
    if (threadIdx.x == 0)
        p.loss[slot] = empty ? 0.0f : logf(all.sum) + (all.top - at_label);
    if (!p.grad)
        return;
    __syncthreads(); // everybody has the label's logit before it is overwritten
    const float scale = empty ? 0.0f : p.scale != nullptr ? *p.scale : 1.0f;
    const float factor = scale / all.sum;
    for (int c = threadIdx.x; c < whole; c += blockDim.x) {
        pack x = ((const pack *)row)[c];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float d = expf(widen(x.at[e]) - all.top) * factor;
            if (c * N + e == label)
                d -= scale;
            x.at[e] = narrow<T>(d);
        }
        ((pack *)row)[c] = x;
    }
    for (long long c = (long long)whole * N + threadIdx.x; c < p.vocab; c += blockDim.x) {
        float d = expf(widen(row[c]) - all.top) * factor;
        row[c] = narrow<T>(c == label ? d - scale : d);
    }
}

#define LOSS(name, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_cross_entropy_params p)     \
    {                                                                                              \
        cross_entropy<T>(p);                                                                       \
    }
LOSS(cross_entropy_f32, float)
LOSS(cross_entropy_bf16, bf16)
LOSS(cross_entropy_f16, f16)
