// Dropout in front of a LoRA branch by itself, where no product draws its masks (masked.cu).
#include "params.h"

#include "dropout.cuh"
#include "types.cuh"

// Of the words of eight columns, column i's.
__device__ inline bool kept(const Words &words, int i, unsigned least)
{
    return i % 2 == 0 ? keeps_even(words.at[i / 2], least) : keeps_odd(words.at[i / 2], least);
}

template <typename T> __device__ void dropout(const pmli_dropout_params &p)
{
    const long long eights = (p.cols + 7) / 8;
    const long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = item / eights, eight = item - row * eights;
    if (row >= p.rows)
        return;
    const Words random =
        philox(p.rng[0], p.rng[1], p.purpose, (unsigned long long)p.places[row] * eights + eight);
    const T *x = (const T *)p.x + row * p.ld_x;
    T *y = (T *)p.y + row * p.ld_y;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const long long c = 8 * eight + i;
        if (c >= p.cols)
            return;
        const float masked = kept(random, i, p.least) ? widen(x[c]) * p.keep : 0.0f;
        y[c] = narrow<T>(p.add ? widen(y[c]) + masked : masked);
    }
}

// Rows of whole eights in whole 16-byte packs; a block has a part of one row, a thread two packs.
template <typename T> __device__ void dropout_wide(const pmli_dropout_params &p)
{
    constexpr int N = 16 / sizeof(T), PACKS = 2;
    const long long row = blockIdx.x / p.blocks_a_row;
    const int packs = (int)(p.cols / N), part = blockIdx.x % p.blocks_a_row;
    const int first = part * PACKS * (int)blockDim.x + (int)threadIdx.x;
    const Pack<T, N> *x = (const Pack<T, N> *)((const T *)p.x + row * p.ld_x);
    Pack<T, N> *y = (Pack<T, N> *)((T *)p.y + row * p.ld_y);
    const unsigned long long seed = p.rng[0], step = p.rng[1];
    const unsigned long long begin = (unsigned long long)p.places[row] * (p.cols / 8);
    Pack<T, N> held[PACKS], sum[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = first + k * blockDim.x;
        if (c >= packs)
            continue;
        held[k] = x[c];
        if (p.add)
            sum[k] = y[c];
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = first + k * blockDim.x;
        if (c >= packs)
            continue;
        Words random = philox(seed, step, p.purpose, begin + c / (8 / N));
        if (N == 4 && c % 2 == 1) { // the second half of eight columns
            random.at[0] = random.at[2];
            random.at[1] = random.at[3];
        }
        Floats<N> masked = widened(held[k]);
#pragma unroll
        for (int i = 0; i < N; i++)
            masked.at[i] = kept(random, i, p.least) ? masked.at[i] * p.keep : 0.0f;
        if (p.add) {
            const Floats<N> before = widened(sum[k]);
#pragma unroll
            for (int i = 0; i < N; i++)
                masked.at[i] += before.at[i];
        }
        y[c] = narrowed<T>(masked);
    }
}

#define KERNEL(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        dropout_##suffix(const pmli_dropout_params p)                                              \
    {                                                                                              \
        dropout<T>(p);                                                                             \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        dropout_##suffix##_wide(const pmli_dropout_params p)                                       \
    {                                                                                              \
        dropout_wide<T>(p);                                                                        \
    }
KERNEL(float, f32)
KERNEL(bf16, bf16)
KERNEL(f16, f16)
