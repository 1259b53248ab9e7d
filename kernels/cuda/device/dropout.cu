// Dropout in front of a LoRA branch: the mask is a function of where a token is in the data, so
// that forward, backward and recompute agree. A thread does the four columns that one Philox block
// serves.
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
        // As pml_uniform: the top 24 bits, exact.
        const bool kept = (float)(random.at[i] >> 8) * 0x1p-24f >= p.dropout;
        const float masked = kept ? widen(x[c]) * p.keep : 0.0f;
        y[c] = narrow<T>(p.add ? widen(y[c]) + masked : masked);
    }
}

#define KERNEL(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        dropout_##suffix(const pmli_dropout_params p)                                              \
    {                                                                                              \
        dropout<T>(p);                                                                             \
    }
KERNEL(float, f32)
KERNEL(bf16, bf16)
KERNEL(f16, f16)
