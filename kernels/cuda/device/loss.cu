// Cross-entropy of rows of logits, which turn in place into their gradient.
//
// From sm_90 on a cluster of blocks holds a row of 16-bit logits, so that it is read once;
// elsewhere, and of longer rows or wider logits, a block reads its row twice, the second time out
// of the L2 cache.
#include "hopper.cuh"
#include "params.h"
#include "types.cuh"

struct __align__(8) Softmax
{                   // stored at once
    float top, sum; // sum of exp(x - top)
};

__device__ inline Softmax joined(Softmax a, Softmax b)
{
    const float top = fmaxf(a.top, b.top);
    // Nothing seen yet on one side: its sum is 0, and -inf - -inf would not be a number.
    const float left = a.sum == 0.0f ? 0.0f : a.sum * expf(a.top - top);
    const float right = b.sum == 0.0f ? 0.0f : b.sum * expf(b.top - top);
    return {top, left + right};
}

__device__ inline Softmax of_block(Softmax x)
{
    __shared__ Softmax of_warp[32];
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x = joined(
            x, {__shfl_xor_sync(0xffffffffu, x.top, d), __shfl_xor_sync(0xffffffffu, x.sum, d)});
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : Softmax{-INFINITE, 0.0f};
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x = joined(
            x, {__shfl_xor_sync(0xffffffffu, x.top, d), __shfl_xor_sync(0xffffffffu, x.sum, d)});
    return x;
}

// Rows begin on 16 bytes (the host pads ld); what is beyond the last whole pack goes one by one.
template <typename T> __device__ void cross_entropy(const pmli_cross_entropy_params &p)
{
    constexpr int N = 16 / sizeof(T);
    typedef Pack<T, N> pack;
    const long long slot = blockIdx.x;
    T *row = (T *)p.logits + slot * p.ld;
    const int whole = (int)(p.vocab / N), label = p.labels[slot];
    const bool empty = p.rows[slot] < 0;

    Softmax mine = {-INFINITE, 0.0f};
    for (int c = threadIdx.x; c < whole; c += blockDim.x) {
        const pack x = ((const pack *)row)[c];
        float top = mine.top;
#pragma unroll
        for (int e = 0; e < N; e++)
            top = fmaxf(top, widen(x.at[e]));
        float sum = 0;
#pragma unroll
        for (int e = 0; e < N; e++)
            sum += expf(widen(x.at[e]) - top);
        mine = {top, sum + (mine.sum == 0.0f ? 0.0f : mine.sum * expf(mine.top - top))};
    }
    for (long long c = (long long)whole * N + threadIdx.x; c < p.vocab; c += blockDim.x)
        mine = joined(mine, {widen(row[c]), 1.0f});
    const Softmax all = of_block(mine);
    const float at_label = empty ? 0.0f : widen(row[label]);
    if (threadIdx.x == 0)
        p.loss[slot] = empty ? 0.0f : logf(all.sum) + (all.top - at_label);
    if (!p.grad)
        return;
    __syncthreads(); // everybody has the label's logit before it is overwritten
    const float scale = empty ? 0.0f : p.scale != nullptr ? *p.scale : 1.0f;
    const float factor = scale / all.sum;
    for (int c = threadIdx.x; c < whole; c += blockDim.x) {
        pack x = ((const pack *)row)[c];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float d = expf(widen(x.at[e]) - all.top) * factor;
            if (c * N + e == label)
                d -= scale;
            x.at[e] = narrow<T>(d);
        }
        ((pack *)row)[c] = x;
    }
    for (long long c = (long long)whole * N + threadIdx.x; c < p.vocab; c += blockDim.x) {
        float d = expf(widen(row[c]) - all.top) * factor;
        row[c] = narrow<T>(c == label ? d - scale : d);
    }
}

// ---- rows held on the chip ----
//
//   row:  | block 0 | block 1 | …    of a cluster, a share of LOSS_SHARE packs of 16 bytes at the
//                                    most in each one's shared memory
//
// A share comes by the copy engine in chunks, and a chunk's exponentials are summed while the next
// ones are on their way: reading takes as long as reading does, and so does writing. In between a
// row's blocks meet once, over one Softmax a warp. The last rows come first: the cache may still
// have them of the product that wrote them.

#if __CUDA_ARCH__ >= 900
static constexpr int CHUNK = 2 * LOSS_THREADS, CHUNKS = (LOSS_SHARE + CHUNK - 1) / CHUNK;
static constexpr int WARPS = LOSS_THREADS / 32;
static_assert(CHUNKS < LOSS_THREADS, "a thread a chunk, and one for the sums");
static constexpr float LOW = -1e38f; // below what logits are, and no infinity: it is subtracted

template <typename T> __device__ inline unsigned highest(unsigned a, unsigned b);
template <> __device__ inline unsigned highest<bf16>(unsigned a, unsigned b)
{
    const __nv_bfloat162 x = __hmax2(*(const __nv_bfloat162 *)&a, *(const __nv_bfloat162 *)&b);
    return *(const unsigned *)&x;
}
template <> __device__ inline unsigned highest<f16>(unsigned a, unsigned b)
{
    const __half2 x = __hmax2(*(const __half2 *)&a, *(const __half2 *)&b);
    return *(const unsigned *)&x;
}
template <typename T> __device__ inline unsigned highest(const uint4 &x)
{
    return highest<T>(highest<T>(x.x, x.y), highest<T>(x.z, x.w));
}

// Two times -inf, which no sum sees.
template <typename T> static constexpr unsigned NOTHING = same<T, bf16> ? 0xff80ff80u : 0xfc00fc00u;

// What this block has of its row: packs [begin, begin + packs).
struct Share {
    int blocks, block, begin, packs;
    int past; // elements of the last pack that are none of the row's
};

__device__ inline Share share_of(const pmli_cross_entropy_params &p)
{
    Share s;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(s.blocks));
    s.block = rank_in_cluster();
    const int all = (int)((p.vocab + 7) / 8), each = (all + s.blocks - 1) / s.blocks;
    s.begin = s.block * each;
    s.packs = min(each, all - s.begin);
    s.past = s.begin + s.packs == all ? (int)(all * 8LL - p.vocab) : 0;
    return s;
}

// What tells a block that bytes are there: those of each chunk, and all warps' sums.
struct Arrivals {
    unsigned long long chunk[CHUNKS], sums;
};

// By one thread, before the others come here.
__device__ inline void begin(Arrivals *arrivals)
{
    for (int c = 0; c < CHUNKS; c++)
        barrier_begin(shared_address(&arrivals->chunk[c]), 1);
    barrier_begin(shared_address(&arrivals->sums), 1);
    barriers_begun();
}

// Until what is expected is there, by the copy engine or, with other_blocks, from those.
template <bool other_blocks> __device__ inline void wait_for(unsigned long long *barrier)
{
    unsigned there = 0;
    while (there == 0)
        if constexpr (other_blocks)
            asm volatile("{ .reg .pred p;\n"
                         "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(there)
                         : "r"(shared_address(barrier))
                         : "memory");
        else
            asm volatile("{ .reg .pred p;\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(there)
                         : "r"(shared_address(barrier))
                         : "memory");
}

// The share into shared memory: a thread a chunk.
__device__ inline void fetch(uint4 *share, const uint4 *row, const Share &s, Arrivals *arrivals)
{
    const int at = (int)threadIdx.x * CHUNK, bytes = min(CHUNK, s.packs - at) * 16;
    if (at < s.packs) {
        const unsigned barrier = shared_address(&arrivals->chunk[threadIdx.x]);
        barrier_expect(barrier, bytes);
        bring_row(shared_address(share + at), row + at, bytes, barrier);
    }
    if (threadIdx.x == CHUNKS)
        barrier_expect(shared_address(&arrivals->sums), s.blocks * WARPS * (int)sizeof(Softmax));
}

__device__ inline unsigned in_block(const void *shared, int block)
{
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(there)
        : "r"(shared_address(shared)), "r"(block));
    return there;
}

// To the same place of another block's shared memory; its barrier counts the bytes. (A barrier of
// the cluster would make every thread wait for its writes to memory.)
__device__ inline void hand_over(Softmax *here, int block, Softmax x, Arrivals *arrivals)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, "
                 "[%3];" ::"r"(in_block(here, block)),
                 "f"(x.top), "f"(x.sum), "r"(in_block(&arrivals->sums, block))
                 : "memory");
}

// exp(x), 16-bit logits' own error being far above this one's.
__device__ inline float power(float x)
{
    return exp2_fast(x * LOG2_E);
}

__device__ inline Softmax of_warp(Softmax x)
{
    float top = x.top;
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
    float sum = x.sum * power(x.top - top);
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, d);
    return {top, sum};
}

// What all warps of the cluster have, in every thread. Its blocks have begun.
__device__ inline Softmax of_cluster(Softmax x, const Share &s, Arrivals *arrivals)
{
    __shared__ Softmax of_warps[LOSS_BLOCKS * WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = of_warp(x);
    if (s.blocks == 1) {
        if (lane == 0)
            of_warps[warp] = x;
        __syncthreads();
    } else {
        if (lane < s.blocks)
            hand_over(&of_warps[s.block * WARPS + warp], lane, x, arrivals);
        wait_for<true>(&arrivals->sums);
    }
    x = {LOW, 0.0f};
    for (int w = lane; w < s.blocks * WARPS; w += 32) {
        const Softmax more = of_warps[w];
        const float top = fmaxf(x.top, more.top);
        x = {top, x.sum * power(x.top - top) + more.sum * power(more.top - top)};
    }
    return of_warp(x);
}

// What is summed is exp2(x LOG2_E - base), base being about LOG2_E times the highest x.
struct Sum {
    float top, base, sum;

    // base is rounded and an x's product is not: by how much each power is too large for that.
    __device__ float excess() const
    {
        return exp2_fast(top * LOG2_E - base);
    }
};

// Two packs more. A thread's highest logit changes seldom: what was summed is scaled only then.
template <typename T> __device__ inline void add(Sum &s, uint4 a, uint4 b)
{
    const unsigned words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    const float2 two = widen_two<T>(highest<T>(highest<T>(a), highest<T>(b)));
    const float top = fmaxf(two.x, two.y), base = top * LOG2_E;
    if (top > s.top)
        s = {top, base, s.sum * exp2_fast(s.base - base)};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float2 x = widen_two<T>(words[i]);
        s.sum += exp2_fast(x.x * LOG2_E - s.base) + exp2_fast(x.y * LOG2_E - s.base);
    }
}

// A pack of the last chunk, which may not be there, or not wholly.
template <typename T> __device__ inline uint4 last_pack(uint4 *share, const Share &s, int at)
{
    constexpr unsigned none = NOTHING<T>;
    if (at >= s.packs)
        return make_uint4(none, none, none, none);
    if (at == s.packs - 1) {
        T *pack = (T *)(share + at); // this thread's alone
        for (int e = 8 - s.past; e < 8; e++)
            pack[e] = narrow<T>(-INFINITE);
    }
    return share[at];
}

template <typename T>
__device__ inline Softmax softmax_of(uint4 *share, const Share &s, Arrivals *arrivals)
{
    Sum sum = {LOW, LOW * LOG2_E, 0.0f};
    const int last = (s.packs - 1) / CHUNK, first = (int)threadIdx.x;
    for (int c = 0; c < last; c++) {
        wait_for<false>(&arrivals->chunk[c]);
        const uint4 *mine = share + c * CHUNK + first;
        add<T>(sum, mine[0], mine[LOSS_THREADS]);
    }
    wait_for<false>(&arrivals->chunk[last]);
    const int at = last * CHUNK + first;
    add<T>(sum, last_pack<T>(share, s, at), last_pack<T>(share, s, at + LOSS_THREADS));
    return {sum.top, sum.sum / sum.excess()};
}

// What a row's gradient is made with: scale (exp(x - top) / sum - [x is the label's]).
struct Slope {
    float base, factor, scale;

    __device__ float of(float x) const
    {
        return exp2_fast(x * LOG2_E - base) * factor;
    }
};

template <typename T> __device__ inline uint4 gradient(uint4 pack, const Slope &s)
{
    unsigned *two = (unsigned *)&pack;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = widen_two<T>(two[i]);
        two[i] = narrow_two<T>(s.of(x.x), s.of(x.y));
    }
    return pack;
}

template <typename T>
__device__ inline void write_gradient(uint4 *row, const uint4 *share, const Share &s,
                                      const Slope &slope, int label)
{
    const int whole = s.packs / LOSS_THREADS * LOSS_THREADS, first = (int)threadIdx.x;
    const uint4 *from = share + first, *const end = share + whole;
    uint4 *to = row + first;
#pragma unroll 4
    for (; from < end; from += LOSS_THREADS, to += LOSS_THREADS)
        __stcs(to, gradient<T>(*from, slope));
    if (whole + first < s.packs)
        __stcs(to, gradient<T>(*from, slope));
    if (label >= 0 && label < s.packs * 8 && label / 8 % LOSS_THREADS == first) // it wrote it, too
        ((T *)row)[label] = narrow<T>(slope.of(widen(((const T *)share)[label])) - slope.scale);
}

template <typename T> __device__ void cross_entropy_held(const pmli_cross_entropy_params &p)
{
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ Arrivals arrivals;
    uint4 *const share = (uint4 *)memory;
    const Share s = share_of(p);
    const long long slot = p.count - 1 - blockIdx.x / s.blocks;
    uint4 *const row = (uint4 *)((T *)p.logits + slot * p.ld) + s.begin;
    if (threadIdx.x == 0)
        begin(&arrivals);
    __syncthreads();
    fetch(share, row, s, &arrivals);
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); // this one has begun
    const bool empty = p.rows[slot] < 0;
    const int label = empty ? -1 : p.labels[slot] - s.begin * 8; // its place in the share
    const float scale = empty ? 0.0f : p.scale != nullptr ? *p.scale : 1.0f;
    const Softmax mine = softmax_of<T>(share, s, &arrivals);
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); // as have the others
    const Softmax all = of_cluster(mine, s, &arrivals);
    const bool has_label = empty ? s.block == 0 : label >= 0 && label < s.packs * 8;
    if (threadIdx.x == 0 && has_label)
        p.loss[slot] = empty ? 0.0f : logf(all.sum) + (all.top - widen(((T *)share)[label]));
    if (!p.grad)
        return;
    const Sum of_row = {all.top, all.top * LOG2_E, all.sum};
    const float factor = scale / (of_row.sum * of_row.excess());
    write_gradient<T>(row, share, s, {of_row.base, factor, scale}, label);
}

#else
// Never started: the host knows.
template <typename T> __device__ void cross_entropy_held(const pmli_cross_entropy_params &)
{
}
#endif

#define LOSS(name, threads, body)                                                                  \
    extern "C" __global__ void __launch_bounds__(threads) name(const pmli_cross_entropy_params p)  \
    {                                                                                              \
        body(p);                                                                                   \
    }
LOSS(cross_entropy_f32, 1024, cross_entropy<float>)
LOSS(cross_entropy_bf16, 1024, cross_entropy<bf16>)
LOSS(cross_entropy_f16, 1024, cross_entropy<f16>)
LOSS(cross_entropy_held_bf16, LOSS_THREADS, cross_entropy_held<bf16>)
LOSS(cross_entropy_held_f16, LOSS_THREADS, cross_entropy_held<f16>)
