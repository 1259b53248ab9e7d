// The optimizer step: sums over all gradients, the clipping factor, AdamW (Loshchilov & Hutter,
// "Decoupled Weight Decay Regularization", 2019; arithmetic in the order of torch.optim.AdamW).
#include "params.h"
#include "types.cuh"

#define BLOCK 256
#define RUN   64 // elements a thread adds in float32 before they join its float64 sum
#define PACKS 4  // loads of 16 bytes that a thread has on their way

__device__ inline double block_total(double x)
{
    __shared__ double of_warp[BLOCK / 32];
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < BLOCK / 32; w++)
        x += of_warp[w];
    return x;
}

template <bool SQUARES> __device__ inline float term(float x)
{
    return SQUARES ? x * x : x;
}

// Of a buffer whose elements follow each other from a 16-byte address on: all but the last three at
// most. Which element belongs to which thread depends on the shape and that alone.
template <bool SQUARES> __device__ double sum_of_packs(const float *x, long long packs)
{
    typedef Pack<float, 4> pack;
    const long long threads = (long long)gridDim.x * BLOCK;
    double sum = 0;
    long long i = (long long)blockIdx.x * BLOCK + threadIdx.x;
    for (; i + (PACKS - 1) * threads < packs; i += PACKS * threads) {
        pack held[PACKS];
        float run = 0;
#pragma unroll
        for (int k = 0; k < PACKS; k++)
            held[k] = ((const pack *)x)[i + k * threads];
#pragma unroll
        for (int k = 0; k < PACKS; k++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                run += term<SQUARES>(held[k].at[e]);
        sum += run;
    }
    for (; i < packs; i += threads) {
        const pack held = ((const pack *)x)[i];
        float run = 0;
#pragma unroll
        for (int e = 0; e < 4; e++)
            run += term<SQUARES>(held.at[e]);
        sum += run;
    }
    return sum;
}

// Which element belongs to which thread depends on the shape alone.
template <bool SQUARES> __device__ void sum_parts(const pmli_sum_params &p)
{
    const long long count = p.rows * p.cols, threads = (long long)gridDim.x * BLOCK;
    const bool flat = p.ld == p.cols;
    const long long packs = flat && (size_t)p.x % 16 == 0 ? count / 4 : 0;
    double sum = sum_of_packs<SQUARES>(p.x, packs);
    long long i = 4 * packs + (long long)blockIdx.x * BLOCK + threadIdx.x;
    while (i < count) {
        float run = 0;
#pragma unroll 8
        for (int n = 0; n < RUN && i < count; n++, i += threads)
            run += term<SQUARES>(p.x[flat ? i : i / p.cols * p.ld + i % p.cols]);
        sum += run;
    }
    sum = block_total(sum);
    if (threadIdx.x == 0)
        p.parts[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK) sum_parts(const pmli_sum_params p)
{
    sum_parts<false>(p);
}

extern "C" __global__ void __launch_bounds__(BLOCK) sumsq_parts(const pmli_sum_params p)
{
    sum_parts<true>(p);
}

extern "C" __global__ void __launch_bounds__(BLOCK) sum_total(const pmli_sum_params p)
{
    double sum = 0;
    for (int i = threadIdx.x; i < p.count; i += BLOCK)
        sum += p.parts[i];
    sum = block_total(sum);
    if (threadIdx.x == 0)
        *p.total += sum;
}

extern "C" __global__ void clip_scale(const pmli_clip_params p)
{
    const double mean = p.hyper[HYPER_MEAN], limit = p.hyper[HYPER_MAX_NORM],
                 norm = sqrt(*p.sumsq) * mean;
    double factor = limit > 0 ? limit / (norm + 1e-6) : 1.0;
    factor = factor > 1.0 ? 1.0 : factor;
    const bool sound =
        is_finite((float)norm) && (p.loss == nullptr || fabs(*p.loss) <= MOST_DOUBLE);
    for (long long g = 0; g < p.groups; g++)
        p.hyper[g * p.ld + HYPER_GRAD_SCALE] = sound ? (float)(mean * factor) : NOT_A_NUMBER;
    if (p.norm != nullptr)
        *p.norm = (float)norm;
}

template <typename T, int N> __device__ void adamw(const pmli_adamw_params &p)
{
    const double lr = p.hyper[HYPER_LR], new2 = p.hyper[HYPER_ONE_MINUS_BETA2];
    const float keep = (float)(1.0 - lr * p.hyper[HYPER_WEIGHT_DECAY]);
    const float step = (float)(lr / p.hyper[HYPER_BIAS1]),
                root2 = (float)sqrt((double)p.hyper[HYPER_BIAS2]);
    const float new1 = p.hyper[HYPER_ONE_MINUS_BETA1], eps = p.hyper[HYPER_EPS],
                beta2 = (float)(1.0 - new2);
    const float scale = p.hyper[HYPER_GRAD_SCALE];
    if (!is_finite(scale))
        return;
    typedef Pack<float, N> pack;
    const long long packs = p.count / N, threads = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < packs; i += threads) {
        pack value = ((pack *)p.p)[i], m = ((pack *)p.m)[i], v = ((pack *)p.v)[i];
        const pack g = ((const pack *)p.g)[i];
        Pack<T, N> copy;
#pragma unroll
        for (int e = 0; e < N; e++) {
            const float grad = g.at[e] * scale;
            m.at[e] += (grad - m.at[e]) * new1;
            v.at[e] = beta2 * v.at[e] + (float)new2 * grad * grad;
            value.at[e] = value.at[e] * keep - step * m.at[e] / (sqrtf(v.at[e]) / root2 + eps);
            copy.at[e] = narrow<T>(value.at[e]);
        }
        ((pack *)p.p)[i] = value;
        ((pack *)p.m)[i] = m;
        ((pack *)p.v)[i] = v;
        if (p.copy != nullptr)
            ((Pack<T, N> *)p.copy)[i] = copy;
    }
}

#define ADAMW(name, T, N)                                                                          \
    extern "C" __global__ void __launch_bounds__(BLOCK) name(const pmli_adamw_params p)            \
    {                                                                                              \
        adamw<T, N>(p);                                                                            \
    }
#define BOTH(name, T) ADAMW(name, T, 1) ADAMW(name##_wide, T, 4)
BOTH(adamw_f32, float)
BOTH(adamw_bf16, bf16)
BOTH(adamw_f16, f16)

template <typename T> __device__ void sgd(const pmli_sgd_params &p)
{
    const float lr = p.hyper[HYPER_LR], decay = p.hyper[HYPER_WEIGHT_DECAY],
                scale = p.hyper[HYPER_GRAD_SCALE];
    const float momentum = p.hyper[HYPER_MOMENTUM], fresh = p.hyper[HYPER_NEW_GRAD];
    if (!is_finite(scale))
        return;
    const long long threads = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < p.count;
         i += threads) {
        float value = p.p[i], d = p.g[i] * scale + decay * value;
        if (p.m != nullptr) {
            const float m = momentum * p.m[i] + fresh * d;
            p.m[i] = m;
            d = p.nesterov ? d + momentum * m : m;
        }
        p.p[i] = value -= lr * d;
        if (p.copy != nullptr)
            ((T *)p.copy)[i] = narrow<T>(value);
    }
}

#define SGD(name, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK) name(const pmli_sgd_params p)              \
    {                                                                                              \
        sgd<T>(p);                                                                                 \
    }
SGD(sgd_f32, float)
SGD(sgd_bf16, bf16)
SGD(sgd_f16, f16)
