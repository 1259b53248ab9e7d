// Attention for every dtype and head width, a warp a row: what the tensor-core kernels do not take
// (float32, other widths), and a generated token's single row. And the row sums that both backwards
// need. A lane has the elements lane, lane + 32, … of a head: at most MOST of them.
#include "attention.cuh"

#define MOST  8 // head_dim <= 256
#define WARPS 8

// Which document a row belongs to: the last whose begin is not behind it.
__device__ inline int document_of(const int *cu, int slots, int row)
{
    int low = 0, high = slots; // cu[low] <= row
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (cu[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return row < cu[slots] ? low : slots;
}

__device__ inline float warp_total(float x)
{
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}

template <typename T> __device__ inline void load_row(float x[MOST], const T *from, int n)
{
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int c = i * 32 + threadIdx.x % 32;
        x[i] = c < n ? widen(from[c]) : 0.0f;
    }
}

template <typename T> __device__ inline void store_row(const float x[MOST], float by, T *to, int n)
{
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int c = i * 32 + threadIdx.x % 32;
        if (c < n)
            to[c] = narrow<T>(x[i] * by);
    }
}

__device__ inline float dot(const float a[MOST], const float b[MOST])
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < MOST; i++)
        sum += a[i] * b[i];
    return warp_total(sum);
}

// The row of this warp; blocks are WARPS rows of one head.
__device__ inline long long row_of()
{
    return (long long)blockIdx.x * WARPS + threadIdx.x / 32;
}

// Where the keys of a query lie: absolute rows [first, end).
struct Range {
    int first, end;
};

__device__ inline Range keys_of(const pmli_attention_params &p, int row)
{
    const int d = document_of(p.cu_q, p.slots, row);
    if (d >= p.slots)
        return {0, 0};
    const int begin = p.cu_k[d], count = p.cu_k[d + 1] - begin;
    const int last = row - p.cu_q[d] + count - (p.cu_q[d + 1] - p.cu_q[d]);
    const int first = p.window > 0 ? max(0, last - p.window + 1) : 0;
    return {begin + first, begin + max(first, min(last + 1, count))};
}

__device__ inline Range queries_of_key(const pmli_attention_params &p, int row)
{
    const int d = document_of(p.cu_k, p.slots, row);
    if (d >= p.slots)
        return {0, 0};
    const int begin = p.cu_q[d], count = p.cu_q[d + 1] - begin;
    const int same = row - p.cu_k[d] - (p.cu_k[d + 1] - p.cu_k[d] - count); // sees it as its last
    const int first = max(0, same);
    const int end = p.window > 0 ? min(count, same + p.window) : count;
    return {begin + first, begin + max(first, end)};
}

template <typename T> __device__ void attend(const pmli_attention_params &p)
{
    const long long row = row_of();
    if (row >= p.tokens_q)
        return;
    const int head = blockIdx.y, n = p.head_dim, kv = head / (p.heads / p.kv_heads) * n;
    const Range keys = keys_of(p, (int)row);
    float q[MOST], k[MOST], v[MOST], acc[MOST] = {}, top = -INFINITE, sum = 0;
    load_row(q, (const T *)p.q + row * p.ld_q + head * n, n);
    for (int j = keys.first; j < keys.end; j++) {
        load_row(k, (const T *)p.k + j * p.ld_k + kv, n);
        load_row(v, (const T *)p.v + j * p.ld_v + kv, n);
        const float s = dot(q, k) * p.scale, high = fmaxf(top, s);
        const float shrink = sum > 0 ? expf(top - high) : 0.0f, e = expf(s - high);
        sum = sum * shrink + e;
#pragma unroll
        for (int i = 0; i < MOST; i++)
            acc[i] = acc[i] * shrink + e * v[i];
        top = high;
    }
    store_row(acc, sum > 0 ? 1.0f / sum : 0.0f, (T *)p.o + row * p.ld_o + head * n, n);
    if (threadIdx.x % 32 == 0)
        p.lse[head * p.ld_lse + row] = sum > 0 ? top + logf(sum) : 0.0f;
}

// The same for few rows, where a warp a row would wait for one key after the other: a block for
// each row and head, whose warps have GROUP neighbouring keys in turn and put together what they
// found.
#define GROUP 4

template <typename T> __device__ void attend_few(const pmli_attention_params &p)
{
    __shared__ float tops[WARPS], sums[WARPS], values[WARPS][MOST * 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long row = blockIdx.x;
    const int head = blockIdx.y, n = p.head_dim, kv = head / (p.heads / p.kv_heads) * n;
    const Range keys = keys_of(p, (int)row);
    float q[MOST], k[GROUP][MOST], v[GROUP][MOST], s[GROUP], acc[MOST] = {}, top = -INFINITE,
                                                             sum = 0;
    load_row(q, (const T *)p.q + row * p.ld_q + head * n, n);
    for (int j = keys.first + warp * GROUP; j < keys.end; j += WARPS * GROUP) {
        float high = top;
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const long long key = min(j + g, keys.end - 1);
            load_row(k[g], (const T *)p.k + key * p.ld_k + kv, n);
            load_row(v[g], (const T *)p.v + key * p.ld_v + kv, n);
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            s[g] = dot(q, k[g]) * p.scale;
            high = j + g < keys.end ? fmaxf(high, s[g]) : high;
        }
        const float shrink = sum > 0 ? expf(top - high) : 0.0f;
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < MOST; i++)
            acc[i] *= shrink;
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float e = j + g < keys.end ? expf(s[g] - high) : 0.0f;
            sum += e;
#pragma unroll
            for (int i = 0; i < MOST; i++)
                acc[i] += e * v[g][i];
        }
        top = high;
    }
    if (lane == 0) {
        tops[warp] = top;
        sums[warp] = sum;
    }
#pragma unroll
    for (int i = 0; i < MOST; i++)
        values[warp][i * 32 + lane] = acc[i];
    __syncthreads();
    for (int w = 0; w < WARPS; w++)
        top = fmaxf(w == 0 ? -INFINITE : top, tops[w]);
    sum = 0;
    float of_warp[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        of_warp[w] = sums[w] > 0 ? expf(tops[w] - top) : 0.0f;
        sum += sums[w] * of_warp[w];
    }
    const float by = sum > 0 ? 1.0f / sum : 0.0f;
    for (int c = threadIdx.x; c < n; c += WARPS * 32) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            total += values[w][c] * of_warp[w];
        ((T *)p.o)[row * p.ld_o + head * n + c] = narrow<T>(total * by);
    }
    if (threadIdx.x == 0)
        p.lse[head * p.ld_lse + row] = sum > 0 ? top + logf(sum) : 0.0f;
}

template <typename T> __device__ void attend_dots(const pmli_attention_params &p)
{
    const long long row = row_of();
    if (row >= p.tokens_q)
        return;
    const int head = blockIdx.y, n = p.head_dim;
    float o[MOST], d[MOST];
    load_row(o, (const T *)p.out + row * p.ld_out + head * n, n);
    load_row(d, (const T *)p.dout + row * p.ld_dout + head * n, n);
    const float sum = dot(o, d);
    if (threadIdx.x % 32 == 0)
        p.dots[head * p.tokens_q + row] = sum;
}

template <typename T> __device__ void attend_bwd_q(const pmli_attention_params &p)
{
    const long long row = row_of();
    if (row >= p.tokens_q)
        return;
    const int head = blockIdx.y, n = p.head_dim, kv = head / (p.heads / p.kv_heads) * n;
    const Range keys = keys_of(p, (int)row);
    const float lse = p.lse[head * p.ld_lse + row], sum = p.dots[head * p.tokens_q + row];
    float q[MOST], d[MOST], k[MOST], v[MOST], acc[MOST] = {};
    load_row(q, (const T *)p.q + row * p.ld_q + head * n, n);
    load_row(d, (const T *)p.dout + row * p.ld_dout + head * n, n);
    for (int j = keys.first; j < keys.end; j++) {
        load_row(k, (const T *)p.k + j * p.ld_k + kv, n);
        load_row(v, (const T *)p.v + j * p.ld_v + kv, n);
        const float ds = expf(dot(q, k) * p.scale - lse) * (dot(d, v) - sum);
#pragma unroll
        for (int i = 0; i < MOST; i++)
            acc[i] += ds * k[i];
    }
    store_row(acc, p.scale, (T *)p.dq + row * p.ld_dq + head * n, n);
}

template <typename T> __device__ void attend_bwd_kv(const pmli_attention_params &p)
{
    const long long row = row_of();
    if (row >= p.tokens_k)
        return;
    const int kv_head = blockIdx.y, n = p.head_dim, group = p.heads / p.kv_heads;
    const Range queries = queries_of_key(p, (int)row);
    float q[MOST], d[MOST], k[MOST], v[MOST], dk[MOST] = {}, dv[MOST] = {};
    load_row(k, (const T *)p.k + row * p.ld_k + kv_head * n, n);
    load_row(v, (const T *)p.v + row * p.ld_v + kv_head * n, n);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int i = queries.first; i < queries.end; i++) {
            load_row(q, (const T *)p.q + i * p.ld_q + head * n, n);
            load_row(d, (const T *)p.dout + i * p.ld_dout + head * n, n);
            const float e = expf(dot(q, k) * p.scale - p.lse[head * p.ld_lse + i]);
            const float ds = e * (dot(d, v) - p.dots[head * p.tokens_q + i]);
#pragma unroll
            for (int c = 0; c < MOST; c++) {
                dv[c] += e * d[c];
                dk[c] += ds * q[c];
            }
        }
    store_row(dk, p.scale, (T *)p.dk + row * p.ld_dk + kv_head * n, n);
    store_row(dv, 1.0f, (T *)p.dv + row * p.ld_dv + kv_head * n, n);
}

#define KERNEL(name, T, suffix)                                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                       \
        name##_##suffix(const pmli_attention_params p)                                             \
    {                                                                                              \
        name<T>(p);                                                                                \
    }
#define ALL(name) KERNEL(name, float, f32) KERNEL(name, bf16, bf16) KERNEL(name, f16, f16)
ALL(attend)
ALL(attend_few)
ALL(attend_dots)
ALL(attend_bwd_q)
ALL(attend_bwd_kv)
