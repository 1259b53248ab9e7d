// NF4 weights back to numbers, as bitsandbytes does: each multiplication and the addition rounded
// by itself, so that float32 results are its bits. A thread has 8 elements: 4 bytes of codes.
#include "params.h"
#include "types.cuh"

template <typename T> __device__ void nf4(const pmli_nf4_params &p)
{
    __shared__ float map[256], values[16];
    for (int i = threadIdx.x; i < 256; i += blockDim.x)
        map[i] = p.map[i];
    if (threadIdx.x < 16)
        values[threadIdx.x] = p.values[threadIdx.x];
    __syncthreads();
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first >= p.count)
        return;
    const long long block = first / 64; // of one scale; 8 elements never cross it
    const float scale =
        __fadd_rn(__fmul_rn(map[p.absmax[block]], p.nested[block / 256]), *p.offset);
    T *y = (T *)p.y;
    if (p.wide) {
        const unsigned codes = *(const unsigned *)(p.codes + first / 2);
        Pack<T, 16 / sizeof(T)> out[sizeof(T) / 2];
#pragma unroll
        for (int e = 0; e < 8; e++) // the first of two is in the high half of its byte
            out[e / (16 / sizeof(T))].at[e % (16 / sizeof(T))] =
                narrow<T>(__fmul_rn(values[codes >> (e / 2 * 8 + (e % 2 ? 0 : 4)) & 15], scale));
        y += first / p.cols * p.ld_y + first % p.cols;
#pragma unroll
        for (int k = 0; k < (int)sizeof(T) / 2; k++)
            ((Pack<T, 16 / sizeof(T)> *)y)[k] = out[k];
        return;
    }
    for (int e = 0; e < 8 && first + e < p.count; e++) {
        const int code = p.codes[(first + e) / 2] >> (e % 2 ? 0 : 4) & 15;
        y[(first + e) / p.cols * p.ld_y + (first + e) % p.cols] =
            narrow<T>(__fmul_rn(values[code], scale));
    }
}

#define NF4(name, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_nf4_params p)                \
    {                                                                                              \
        nf4<T>(p);                                                                                 \
    }
NF4(nf4_f32, float)
NF4(nf4_bf16, bf16)
NF4(nf4_f16, f16)
