// Gradient of the embedding table. Tokens with one id meet in one row, which is added to once:
//
//   embed_sort    a chunk of tokens in ascending order of id and token, a block each
//   embed_rank    where each key stands among those of all chunks: which is their order
//   embed_bwd     a block for each run of one id within a window of keys: its sum, to the table
//   where
//                 the run is all there is of the id, else to its place among the parts
//   embed_parts   a block for each window in which an id begins that goes on behind it: adds its
//                 parts, in order
//
//   keys:  | 3 3 7 7 | 7 7 7 7 | 7 9 9 12 |   windows;  parts: 1 behind it (7), 2 and 4 before (7)
//
// A window has two parts: of the run at its beginning and of another that goes on behind its end.
// The order of a row's sum depends on the ids alone.
#include "params.h"
#include "types.cuh"

#define CHUNK  EMBED_CHUNK
#define WINDOW EMBED_WINDOW
#define ALL    0xffffffffffffffffull // behind every key

typedef unsigned long long Key;

__device__ inline int id_of(Key key)
{
    return (int)(key >> 32);
}

// Bitonic, a key a thread: partners within a warp meet in registers, others in shared memory.
// Within a chunk the id and the token's number in it are 32 bits.
extern "C" __global__ void __launch_bounds__(CHUNK) embed_sort(const pmli_embed_bwd_params p)
{
    __shared__ unsigned shared[CHUNK];
    const unsigned i = threadIdx.x;
    const long long token = (long long)blockIdx.x * CHUNK + i;
    unsigned key = token < p.tokens ? (unsigned)p.ids[token] * CHUNK + i : 0xffffffffu;
#pragma unroll
    for (unsigned size = 2; size <= CHUNK; size *= 2)
#pragma unroll
        for (unsigned step = size / 2; step > 0; step /= 2) {
            unsigned other;
            if (step < 32) {
                other = __shfl_xor_sync(0xffffffffu, key, step);
            } else {
                __syncthreads();
                shared[i] = key;
                __syncthreads();
                other = shared[i ^ step];
            }
            const bool smaller = ((i & size) == 0) == ((i & step) == 0);
            key = smaller ? min(key, other) : max(key, other);
        }
    if (token < p.tokens)
        p.sorted[token] = key;
}

// How many of n ascending keys are below `key`.
__device__ inline int below(const unsigned *keys, int n, unsigned key)
{
    int low = 0;
#pragma unroll
    for (int half = CHUNK / 2; half > 0; half /= 2)
        if (low + half <= n && keys[low + half - 1] < key)
            low += half;
    return low + (low < n && keys[low] < key);
}

// RANK_KEYS neighbours among a chunk's keys; in each other chunk the smaller ids are before them,
// and the same id in chunks before theirs. A chunk's search is a chain of loads: RANK_CHUNKS at a
// time.
#define RANK_KEYS   EMBED_RANK_KEYS
#define RANK_CHUNKS EMBED_RANK_CHUNKS

extern "C" __global__ void __launch_bounds__(RANK_KEYS *RANK_CHUNKS)
    embed_rank(const pmli_embed_bwd_params p)
{
    __shared__ int ranks[RANK_CHUNKS][RANK_KEYS];
    const long long at = (long long)blockIdx.x * RANK_KEYS + threadIdx.x;
    const unsigned key = at < p.tokens ? p.sorted[at] : 0, id = key / CHUNK;
    const long long mine = at / CHUNK;
    int rank = 0;
    if (at < p.tokens)
        for (long long c = threadIdx.y; c * CHUNK < p.tokens; c += RANK_CHUNKS)
            rank += c == mine ? (int)(at % CHUNK)
                              : below(p.sorted + c * CHUNK,
                                      (int)min((long long)CHUNK, p.tokens - c * CHUNK),
                                      (id + (c < mine)) * CHUNK);
    ranks[threadIdx.y][threadIdx.x] = rank;
    __syncthreads();
    if (threadIdx.y > 0 || at >= p.tokens)
        return;
#pragma unroll
    for (int y = 1; y < RANK_CHUNKS; y++)
        rank += ranks[y][threadIdx.x];
    p.keys[rank] = (Key)id << 32 | (Key)(mine * CHUNK + key % CHUNK);
}

template <typename T, int N> __device__ void embed_bwd(const pmli_embed_bwd_params &p)
{
    __shared__ Key window[WINDOW + 1];
    const long long at = blockIdx.x, first = at / WINDOW * WINDOW;
    const int here = (int)(at - first), id = id_of(p.keys[at]);
    const bool begins = at == 0 || id_of(p.keys[at - 1]) != id;
    if (!begins && here > 0)
        return;
    for (int i = threadIdx.x; i <= WINDOW - here; i += blockDim.x)
        window[i] = at + i < p.tokens ? p.keys[at + i] : ALL;
    __syncthreads();
    int count = 1;
    while (count < WINDOW - here && id_of(window[count]) == id)
        count++;
    const bool ends = here + count < WINDOW || id_of(window[count]) != id;
    const bool whole = begins && ends;
    float *row =
        whole ? p.dtable + id * p.ld_dtable : p.parts + (at / WINDOW * 2 + (here > 0)) * p.ld_parts;
    for (long long c = (long long)threadIdx.x * N; c < p.cols; c += (long long)blockDim.x * N) {
        Pack<float, N> sum = {};
        if (whole)
            sum = read_once<float, N>(row + c);
#pragma unroll 8
        for (int i = 0; i < count; i++) {
            const Pack<T, N> x = *(
                const Pack<T, N> *)((const T *)p.dy + (long long)(unsigned)window[i] * p.ld_dy + c);
#pragma unroll
            for (int e = 0; e < N; e++)
                sum.at[e] += widen(x.at[e]);
        }
        write_once<float, N>(row + c, sum);
    }
}

// The first window from w on that does not begin with id; ids ascend.
__device__ inline long long windows_of(const pmli_embed_bwd_params &p, int id, long long w)
{
    long long end = (p.tokens + WINDOW - 1) / WINDOW;
    while (w < end) {
        const long long at = (w + end) / 2;
        if (id_of(p.keys[at * WINDOW]) == id)
            w = at + 1;
        else
            end = at;
    }
    return w;
}

// The parts of the id that stands last in a window, if it begins there and goes on.
template <int N> __device__ void embed_parts(const pmli_embed_bwd_params &p)
{
    const long long first = (long long)blockIdx.x * WINDOW, next = first + WINDOW;
    const int id = id_of(p.keys[next - 1]); // the grid has no window that is the last
    const bool all = id_of(p.keys[first]) == id;
    if (id_of(p.keys[next]) != id || (all && first > 0 && id_of(p.keys[first - 1]) == id))
        return;
    const long long end = windows_of(p, id, blockIdx.x + 1LL);
    float *row = p.dtable + id * p.ld_dtable;
    const float *part = p.parts + (blockIdx.x * 2LL + (all ? 0 : 1)) * p.ld_parts;
    const long long across = (long long)gridDim.y * blockDim.x;
    for (long long c = ((long long)blockIdx.y * blockDim.x + threadIdx.x) * N; c < p.cols;
         c += across * N) {
        Pack<float, N> sum = *(const Pack<float, N> *)(row + c);
        const Pack<float, N> begun = *(const Pack<float, N> *)(part + c);
#pragma unroll
        for (int e = 0; e < N; e++)
            sum.at[e] += begun.at[e];
#pragma unroll 8
        for (long long w = blockIdx.x + 1LL; w < end; w++) {
            const Pack<float, N> x = *(const Pack<float, N> *)(p.parts + w * 2 * p.ld_parts + c);
#pragma unroll
            for (int e = 0; e < N; e++)
                sum.at[e] += x.at[e];
        }
        *(Pack<float, N> *)(row + c) = sum;
    }
}

#define EMBED(name, T, N)                                                                          \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_embed_bwd_params p)          \
    {                                                                                              \
        embed_bwd<T, N>(p);                                                                        \
    }
#define BOTH(name, T) EMBED(name, T, 1) EMBED(name##_wide, T, 4)
BOTH(embed_bwd_f32, float)
BOTH(embed_bwd_bf16, bf16)
BOTH(embed_bwd_f16, f16)

#define PARTS(name, N)                                                                             \
    extern "C" __global__ void __launch_bounds__(256) name(const pmli_embed_bwd_params p)          \
    {                                                                                              \
        embed_parts<N>(p);                                                                         \
    }
PARTS(embed_parts, 1)
PARTS(embed_parts_wide, 4)
