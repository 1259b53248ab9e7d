// Gradient of the embedding table. Tokens with one id meet in one row, which must be added to in
// their order: the block of the first of them does all of it, the blocks of the others do nothing.
#include "params.h"
#include "types.cuh"

template <typename T> __device__ void embed_bwd(const pmli_embed_bwd_params &p)
{
    __shared__ int found[256];
    __shared__ int of_warp[8];
    const long long here = blockIdx.x;
    const int id = p.ids[here];
    bool earlier = false;
    for (long long t = threadIdx.x; t < here; t += blockDim.x)
        earlier |= p.ids[t] == id;
    if (__syncthreads_or(earlier))
        return;
    float *row = p.dtable + id * p.ld_dtable;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (long long base = here; base < p.tokens; base += blockDim.x) {
        // The matching tokens of these blockDim.x, in order.
        const long long t = base + threadIdx.x;
        const bool match = t < p.tokens && p.ids[t] == id;
        const unsigned votes = __ballot_sync(0xffffffffu, match);
        if (lane == 0)
            of_warp[warp] = __popc(votes);
        __syncthreads();
        int before = 0, count = 0;
        for (int w = 0; w < 8; w++) {
            before += w < warp ? of_warp[w] : 0;
            count += of_warp[w];
        }
        if (match)
            found[before + __popc(votes & ((1u << lane) - 1))] = threadIdx.x;
        __syncthreads();
        if (count > 0)
            for (long long c = threadIdx.x; c < p.cols; c += blockDim.x) {
                float sum = row[c];
                for (int i = 0; i < count; i++)
                    sum += widen(((const T *)p.dy)[(base + found[i]) * p.ld_dy + c]);
                row[c] = sum;
            }
        __syncthreads();
    }
}

#define EMBED(name, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_embed_bwd_params p)          \
    {                                                                                              \
        embed_bwd<T>(p);                                                                           \
    }
EMBED(embed_bwd_f32, float)
EMBED(embed_bwd_bf16, bf16)
EMBED(embed_bwd_f16, f16)
