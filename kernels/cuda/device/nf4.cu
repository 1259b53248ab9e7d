// NF4 weights back to numbers, as bitsandbytes does: each multiplication and the addition rounded
// by itself, so that float32 results are its bits. Nine tenths of the bytes are written: what
// counts is that a warp writes whole lines and that there is always a store under way.
#include "nf4.cuh"
#include "params.h"
#include "types.cuh"

#define BLOCK 256
#define UNIT  8 // elements: 4 bytes of codes, within one block of 64
#define UNITS 4 // of a thread at a time, BLOCK apart

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

template <typename T> __device__ void nf4(const pmli_nf4_params &all)
{
    const auto &p = all.part[blockIdx.y];
    __shared__ float map[256], values[16];
    if ((long long)blockIdx.x * BLOCK * (p.wide ? UNIT * UNITS : 1) >= p.count)
        return;
    map[threadIdx.x] = nf4_magnitude(threadIdx.x);
    if (threadIdx.x < 16)
        values[threadIdx.x] = all.values[threadIdx.x];
    const float offset = *p.offset;
    const unsigned units_a_row = (unsigned)(all.cols / UNIT); // 32 bits: it is divided by
    const long long units = p.count / UNIT, step = (long long)gridDim.x * BLOCK * UNITS;
    T *y = (T *)p.y;
    __syncthreads();
    long long first = (long long)blockIdx.x * BLOCK * UNITS + threadIdx.x;
    for (; p.wide && first < units; first += step) {
        unsigned codes[UNITS], absmax[UNITS];
        float nested[UNITS];
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            const long long unit = min(first + k * BLOCK, units - 1);
            codes[k] = ((const unsigned *)p.codes)[unit];
            absmax[k] = p.absmax[unit / 8];
            nested[k] = p.nested[unit / (8 * 256)];
        }
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            const unsigned unit = (unsigned)(first + k * BLOCK), row = unit / units_a_row;
            if (unit < units)
                write_unit<T>(y + row * all.ld_y + (unit - row * units_a_row) * UNIT, codes[k],
                              __fadd_rn(__fmul_rn(map[absmax[k]], nested[k]), offset), values);
        }
    }
    // What is not whole units at aligned places, element by element.
    const long long threads = (long long)gridDim.x * BLOCK;
    for (long long i = (p.wide ? units * UNIT : 0) + (long long)blockIdx.x * BLOCK + threadIdx.x;
         i < p.count; i += threads) {
        const long long block = i / 64;
        const float scale =
            __fadd_rn(__fmul_rn(map[p.absmax[block]], p.nested[block / 256]), offset);
        y[i / all.cols * all.ld_y + i % all.cols] =
            narrow<T>(__fmul_rn(values[p.codes[i / 2] >> (i % 2 ? 0 : 4) & 15], scale));
    }
}

#define NF4(name, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK) name(const pmli_nf4_params p)              \
    {                                                                                              \
        nf4<T>(p);                                                                                 \
    }
NF4(nf4_f32, float)
NF4(nf4_bf16, bf16)
NF4(nf4_f16, f16)
