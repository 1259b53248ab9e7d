// What stands between our operands and cuDNN's attention: its lengths and ragged offsets out of the
// documents' bounds, its statistics [tokens, heads] from and to our lse [heads, tokens], and zeros
// for the rows behind the last document, which it leaves alone.
#include "params.h"

#define TILE 32
#define ROWS 8

extern "C" __global__ void __launch_bounds__(256) sdpa_offsets(const pmli_sdpa_params p)
{
    for (int i = threadIdx.x; i <= p.slots_in_calls; i += blockDim.x) {
        const long long first = p.cu[min(i, p.slots)];
        if (i < p.slots_in_calls)
            p.lengths[i] = i < p.slots ? (int)(p.cu[i + 1] - first) : 0;
        for (int a = 0; a < p.arrays; a++)
            p.offsets[a * p.ld_offsets + i] = first * p.ld[a];
    }
}

// Rows of 16-bit elements from the last document's end on, those of this block's tokens.
__device__ inline void clear_rows(const pmli_sdpa_params &p, long long first)
{
    const long long live = p.cu[p.slots];
    for (int a = 0; a < 3; a++) {
        if (p.clear[a] == nullptr)
            continue;
        for (long long t = max(first, live); t < min(first + TILE, p.tokens); t++)
            for (int c = threadIdx.y * TILE + threadIdx.x; c < p.clear_cols[a]; c += TILE * ROWS)
                ((unsigned short *)p.clear[a])[t * p.ld_clear[a] + c] = 0;
    }
}

// A tile of 32 tokens by 32 heads through shared memory, so that both sides are whole rows.
extern "C" __global__ void __launch_bounds__(TILE *ROWS) sdpa_lse(const pmli_sdpa_params p)
{
    __shared__ float tile[TILE][TILE + 1];
    const long long first = (long long)blockIdx.x * TILE, live = p.cu[p.slots];
    const int head0 = blockIdx.y * TILE;
    for (int r = threadIdx.y; r < TILE; r += ROWS)
        if (first + r < live && head0 + threadIdx.x < p.heads)
            tile[r][threadIdx.x] = p.stats[(first + r) * p.heads + head0 + threadIdx.x];
        else
            tile[r][threadIdx.x] = 0;
    __syncthreads();
    for (int h = threadIdx.y; h < TILE; h += ROWS)
        if (first + threadIdx.x < p.tokens && head0 + h < p.heads)
            p.lse[(head0 + h) * p.ld_lse + first + threadIdx.x] = tile[threadIdx.x][h];
    if (blockIdx.y == 0)
        clear_rows(p, first);
}

extern "C" __global__ void __launch_bounds__(TILE *ROWS) sdpa_stats(const pmli_sdpa_params p)
{
    __shared__ float tile[TILE][TILE + 1];
    const long long first = (long long)blockIdx.x * TILE;
    const int head0 = blockIdx.y * TILE;
    for (int h = threadIdx.y; h < TILE; h += ROWS)
        if (first + threadIdx.x < p.tokens && head0 + h < p.heads)
            tile[h][threadIdx.x] = p.lse[(head0 + h) * p.ld_lse + first + threadIdx.x];
    __syncthreads();
    for (int r = threadIdx.y; r < TILE; r += ROWS)
        if (first + r < p.tokens && head0 + threadIdx.x < p.heads)
            p.stats[(first + r) * p.heads + head0 + threadIdx.x] = tile[threadIdx.x][r];
    if (blockIdx.y == 0)
        clear_rows(p, first);
}

// [slots, heads, longest] of equal documents: a block row is a head of one of them.
extern "C" __global__ void __launch_bounds__(256) sdpa_packed(const pmli_sdpa_params p)
{
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long slot = blockIdx.y / p.heads, head = blockIdx.y % p.heads;
    if (at < p.longest)
        p.stats[blockIdx.y * p.longest + at] = p.lse[head * p.ld_lse + slot * p.longest + at];
}
