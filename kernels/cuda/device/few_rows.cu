// A linear layer of one to eight rows, as sampling has: bound by reading the weight once.
//
//   few_u   u[t,r] = scale * dot(x[t], a[r])                         a block for each row of a
//   few_y   y[t,i] = dot(x[t], w[i]) + bias[i] + dot(u[t], b[i])     a warp for two rows of w
//
// A lane reads packs of 8 neighbouring elements, 16 bytes; all packs of STEPS steps are asked for
// before the first is used, so that a warp has 4 KiB of w on its way. x comes from the first-level
// cache, for two rows of w at a time. Sums are float32, in an order that depends on k alone.
#include "params.h"
#include "types.cuh"

enum { WARP = 32, PACK = 8, AT_A_TIME = 2, STEPS = 4 };

template <typename T> __device__ Pack<T, PACK> load(const void *from, long long at)
{
    return *(const Pack<T, PACK> *)((const T *)from + at);
}

// The weight is read once: it need not push x out of the cache.
template <typename T> __device__ Pack<T, PACK> stream(const void *from, long long at)
{
    const int4 bits = __ldcs((const int4 *)((const T *)from + at));
    return *(const Pack<T, PACK> *)&bits;
}

template <typename T>
__device__ void add_products(float &sum, const Pack<T, PACK> &a, const Pack<T, PACK> &b)
{
#pragma unroll
    for (int i = 0; i < PACK; i++)
        sum = fmaf(widen(a.at[i]), widen(b.at[i]), sum);
}

__device__ inline float warp_total(float x)
{
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// N: rows of x that are computed, at least as many as there are: the last is there more often.
template <typename T, int N> __device__ const T *row_of_x(const pmli_few_rows_params &p, int t)
{
    return (const T *)p.x + (long long)min(t, p.rows - 1) * p.ld_x;
}

// sum[j][t] += dot of row first + j of m and row t of x, over every `stride`-th pack from `lane`
// on.
template <typename T, int N, int J>
__device__ void dots(float (&sum)[J][N], const pmli_few_rows_params &p, const void *m,
                     long long ld_m, long long first, long long last, int lane, int stride)
{
    const long long packs = p.k / PACK;
    long long row[J];
#pragma unroll
    for (int j = 0; j < J; j++)
        row[j] = min(first + j, last) * ld_m;
    long long c = lane;
    for (; c + (STEPS - 1) * stride < packs; c += STEPS * stride) {
        Pack<T, PACK> w[STEPS][J];
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int j = 0; j < J; j++)
                w[s][j] = stream<T>(m, row[j] + (c + s * stride) * PACK);
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int t = 0; t < N; t++) {
                const Pack<T, PACK> x = load<T>(row_of_x<T, N>(p, t), (c + s * stride) * PACK);
#pragma unroll
                for (int j = 0; j < J; j++)
                    add_products(sum[j][t], w[s][j], x);
            }
    }
    for (; c < packs; c += stride)
#pragma unroll
        for (int t = 0; t < N; t++) {
            const Pack<T, PACK> x = load<T>(row_of_x<T, N>(p, t), c * PACK);
#pragma unroll
            for (int j = 0; j < J; j++)
                add_products(sum[j][t], stream<T>(m, row[j] + c * PACK), x);
        }
}

template <typename T, int N> __device__ void few_u(const pmli_few_rows_params &p)
{
    __shared__ float of_warp[FEW_ROWS_THREADS / WARP][N];
    const int r = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sum[1][N] = {};
    dots<T, N, 1>(sum, p, p.a, p.ld_a, r, r, threadIdx.x, FEW_ROWS_THREADS);
#pragma unroll
    for (int t = 0; t < N; t++) {
        const float total = warp_total(sum[0][t]);
        if (lane == 0)
            of_warp[warp][t] = total;
    }
    __syncthreads();
    const int t = threadIdx.x;
    if (t >= p.rows)
        return;
    float total = 0.0f;
    for (int i = 0; i < FEW_ROWS_THREADS / WARP; i++)
        total += of_warp[i][t];
    ((T *)p.u)[(long long)t * p.ld_u + r] = narrow<T>(total * p.scale[r / p.rank]);
}

// The adapter's share of y[t, i]: a lane for each column of b's row.
template <typename T>
__device__ float adapter(const pmli_few_rows_params &p, long long i, int t, int lane)
{
    long long b_row = 0;
    int part = 0;
    while (part < p.adapters && i >= p.end[part]) {
        b_row += p.end[part] - p.first[part];
        part++;
    }
    if (part == p.adapters || i < p.first[part])
        return 0.0f;
    b_row += i - p.first[part];
    float sum = 0.0f;
    for (int c = lane; c < p.rank; c += WARP)
        sum = fmaf(widen(((const T *)p.b)[b_row * p.ld_b + c]),
                   widen(((const T *)p.u)[(long long)t * p.ld_u + part * p.rank + c]), sum);
    return sum;
}

template <typename T, int N> __device__ void few_y(const pmli_few_rows_params &p)
{
    const int lane = threadIdx.x % WARP;
    const long long warp = ((long long)blockIdx.x * FEW_ROWS_THREADS + threadIdx.x) / WARP,
                    first = warp * AT_A_TIME;
    if (first >= p.n)
        return;
    float sum[AT_A_TIME][N] = {};
    dots<T, N, AT_A_TIME>(sum, p, p.w, p.ld_w, first, p.n - 1, lane, WARP);
#pragma unroll
    for (int j = 0; j < AT_A_TIME; j++) {
        const long long i = first + j;
        if (i >= p.n)
            return;
#pragma unroll
        for (int t = 0; t < N; t++) {
            if (t >= p.rows)
                break;
            const float total = warp_total(sum[j][t] + adapter<T>(p, i, t, lane));
            if (lane == 0)
                ((T *)p.y)[(long long)t * p.ld_y + i] =
                    narrow<T>(total + (p.bias != nullptr ? widen(((const T *)p.bias)[i]) : 0.0f));
        }
    }
}

#define KERNEL(name, T, N, suffix)                                                                 \
    extern "C" __global__ void __launch_bounds__(FEW_ROWS_THREADS)                                 \
        name##_##suffix(const pmli_few_rows_params p)                                              \
    {                                                                                              \
        name<T, N>(p);                                                                             \
    }
#define ROWS(name, T, suffix)                                                                      \
    KERNEL(name, T, 1, suffix##_1)                                                                 \
    KERNEL(name, T, 2, suffix##_2)                                                                 \
    KERNEL(name, T, 4, suffix##_4)                                                                 \
    KERNEL(name, T, 8, suffix##_8)

ROWS(few_u, bf16, bf16)
ROWS(few_u, f16, f16)
ROWS(few_y, bf16, bf16)
ROWS(few_y, f16, f16)
