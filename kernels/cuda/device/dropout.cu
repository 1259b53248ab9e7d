// Dropout in front of a LoRA branch: the mask is a function of where a token is in the data, so
// that forward, backward and recompute agree. One Philox block serves four columns.
#include "params.h"
#include "types.cuh"

struct Words {
    unsigned at[4];
};

// Philox 4x32-10, word for word as engine/src/base/philox.c. Salmon et al., SC 2011.
__device__ inline Words philox(unsigned long long seed, unsigned long long step, unsigned purpose,
                               unsigned long long index)
{
    unsigned key0 = (unsigned)seed, key1 = (unsigned)(seed >> 32);
    Words c = {{(unsigned)index, (unsigned)(index >> 32), (unsigned)step, purpose}};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(0xD2511F53u, c.at[0]), low0 = 0xD2511F53u * c.at[0];
        const unsigned high1 = __umulhi(0xCD9E8D57u, c.at[2]), low1 = 0xCD9E8D57u * c.at[2];
        c = {{high1 ^ c.at[1] ^ key0, low1, high0 ^ c.at[3] ^ key1, low0}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// Whether a word of them keeps its element: as pml_uniform, its top 24 bits decide.
__device__ inline bool kept(unsigned word, const pmli_dropout_params &p)
{
    return word >= p.least;
}

template <typename T> __device__ void dropout(const pmli_dropout_params &p)
{
    const long long fours = (p.cols + 3) / 4;
    const long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = item / fours, four = item - row * fours;
    if (row >= p.rows)
        return;
    const Words random =
        philox(p.rng[0], p.rng[1], p.purpose, (unsigned long long)p.places[row] * fours + four);
    const T *x = (const T *)p.x + row * p.ld_x;
    T *y = (T *)p.y + row * p.ld_y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const long long c = 4 * four + i;
        if (c >= p.cols)
            return;
        const float masked = kept(random.at[i], p) ? widen(x[c]) * p.keep : 0.0f;
        y[c] = narrow<T>(p.add ? widen(y[c]) + masked : masked);
    }
}

// Rows of whole 16-byte packs; a block has a part of one row, a thread two packs of it.
template <typename T> __device__ void dropout_wide(const pmli_dropout_params &p)
{
    constexpr int N = 16 / sizeof(T), PACKS = 2;
    const long long row = blockIdx.x / p.blocks_a_row;
    const int packs = (int)(p.cols / N), part = blockIdx.x % p.blocks_a_row;
    const int first = part * PACKS * (int)blockDim.x + (int)threadIdx.x;
    const Pack<T, N> *x = (const Pack<T, N> *)((const T *)p.x + row * p.ld_x);
    Pack<T, N> *y = (Pack<T, N> *)((T *)p.y + row * p.ld_y);
    const unsigned long long seed = p.rng[0], step = p.rng[1];
    const unsigned long long begin = (unsigned long long)p.places[row] * (p.cols / 4);
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
        Floats<N> masked = widened(held[k]);
#pragma unroll
        for (int four = 0; four < N / 4; four++) {
            const Words random = philox(seed, step, p.purpose, begin + c * (N / 4) + four);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &at = masked.at[4 * four + i];
                at = kept(random.at[i], p) ? at * p.keep : 0.0f;
            }
        }
        if (p.add) {
            const Floats<N> before = widened(sum[k]);
#pragma unroll
            for (int e = 0; e < N; e++)
                masked.at[e] += before.at[e];
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
