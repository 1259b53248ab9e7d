// NF4 weights back to numbers, as bitsandbytes does: each multiplication and the addition rounded
// by itself, so that float32 results are its bits. Four fifths of the bytes are written: what
// counts is that a warp writes whole lines and that there is always a store under way.
//
// A warp takes a tile of 32 blocks at a time. Each lane has the scale of one block, and works on
// eight units, of neighbouring lanes side by side:
//
//   tile   | block 0, 64 numbers              | block 1 … | … block 31           |
//   unit k | lane 0: 8 numbers | … | lane 7: 8 | lane 8 …  | … lane 31: block 4k + 3 |
#include "nf4.cuh"
#include "params.h"
#include "types.cuh"

#define BLOCK 256
#define UNIT  8 // numbers: 4 bytes of codes, 16 of bf16
#define UNITS 8 // of a lane in a tile
#define TILE  (32 * UNIT * UNITS)

static_assert(TILE == NF4_TILE, "the host counts tiles");

template <typename T>
__device__ void write_unit(T *y, unsigned codes, float scale, const float *values)
{
    constexpr int N = 16 / sizeof(T);
    Pack<T, N> out[UNIT / N];
#pragma unroll
    for (int e = 0; e < UNIT; e++) // the first of two is in the high half of its byte
        out[e / N].at[e % N] =
            narrow<T>(__fmul_rn(values[codes >> (e / 2 * 8 + (e % 2 ? 0 : 4)) & 15], scale));
#pragma unroll
    for (int k = 0; k < UNIT / N; k++)
        ((Pack<T, N> *)y)[k] = out[k];
}

// What is not whole tiles at aligned places, number by number.
template <typename T, typename Part>
__device__ void write_rest(const pmli_nf4_params &all, const Part &p, const float *values)
{
    const long long threads = (long long)gridDim.x * BLOCK;
    for (long long i = (long long)p.tiles * TILE + (long long)blockIdx.x * BLOCK + threadIdx.x;
         i < p.count; i += threads) {
        const long long block = i / 64;
        const float scale = nf4_scale(p.absmax[block], p.nested[block / 256], *p.offset);
        ((T *)p.y)[i / all.cols * all.ld_y + i % all.cols] =
            narrow<T>(__fmul_rn(values[p.codes[i / 2] >> (i % 2 ? 0 : 4) & 15], scale));
    }
}

// A warp has one tile, or none: blocks that come and go keep the memory busier than ones that stay.
template <typename T> __device__ void nf4(const pmli_nf4_params &all)
{
    const auto &p = all.part[blockIdx.y];
    __shared__ float values[16];
    const unsigned tile = blockIdx.x * (BLOCK / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < 16)
        values[threadIdx.x] = all.values[threadIdx.x];
    unsigned codes[UNITS];
    float scale = 0;
    if (tile < p.tiles) {
#pragma unroll
        for (int k = 0; k < UNITS; k++) // read once
            codes[k] = __ldcs((const unsigned *)p.codes + tile * (TILE / UNIT) + k * 32 + lane);
        scale = nf4_scale(p.absmax[tile * 32 + lane], p.nested[tile / (256 / 32)], *p.offset);
    }
    __syncthreads();
    if (tile < p.tiles) {
        const unsigned units_a_row = (unsigned)(all.cols / UNIT);
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            const unsigned unit = tile * (TILE / UNIT) + k * 32 + lane;
            const unsigned row = __umulhi(unit, all.magic) >> all.shift; // unit / units_a_row
            write_unit<T>((T *)p.y + row * all.ld_y + (unit - row * units_a_row) * UNIT, codes[k],
                          __shfl_sync(~0u, scale, k * 4 + lane / 8), values);
        }
    }
    write_rest<T>(all, p, values);
}

#define NF4(name, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK) name(const pmli_nf4_params p)              \
    {                                                                                              \
        nf4<T>(p);                                                                                 \
    }
NF4(nf4_f32, float)
NF4(nf4_bf16, bf16)
NF4(nf4_f16, f16)
