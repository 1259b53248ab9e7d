// Rows to 8 bits (E4M3) with a scale each, to the bit as cpu/ref/fp8.c has them; a weight's codes
// the other way round; and scales where the product itself takes none.
#include "params.h"
#include "types.cuh"

#define MOST     448.0f
#define SMALLEST 0x1p-100f // below it rows are zeros

__device__ inline float larger(float a, float b)
{
    return b > a ? b : a; // a NaN loses
}

// The largest of a block's threads, in every one of them.
__device__ inline float block_top(float top)
{
    __shared__ float of_warp[32];
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, d));
    __syncthreads(); // what a call before this one left has been read by all
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = top;
    __syncthreads();
    top = threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0.0f;
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, d));
    return top;
}

// As kernels/maps.c has it: what runs where the code was compiled for an older chip than its own.
__device__ inline unsigned code_of(float x)
{
    const float magnitude = fabsf(x);
    const unsigned bits = __float_as_uint(magnitude), sign = __float_as_uint(x) >> 24 & 0x80;
    if (x != x)
        return 0x7f;
    if (magnitude >= MOST)
        return sign | 0x7e;
    if (magnitude < 0x1p-6f)
        return sign | (unsigned)rintf(magnitude * 0x1p9f);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

// Two codes, that of `low` in the low byte.
__device__ inline unsigned two_codes(float low, float high)
{
#if __CUDA_ARCH__ >= 890
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
#else
    return code_of(low) | code_of(high) << 8;
#endif
}

__device__ inline float by_column(float x, const float *by, long long column)
{
    return by != nullptr ? __fmul_rn(x, by[column]) : x;
}

// What a code means that is none of NaN's.
__device__ inline float value_of(unsigned code)
{
    const unsigned exponent = code >> 3 & 15, fraction = code & 7;
    const float magnitude = exponent == 0
                                ? (float)fraction * 0x1p-9f
                                : __uint_as_float((exponent + 120) << 23 | fraction << 20);
    return code & 0x80 ? -magnitude : magnitude;
}

struct Scale {
    float into, back;
};

__device__ inline Scale scale_of(float top)
{
    if (top < SMALLEST)
        return {0.0f, 0.0f};
    return {__fdiv_rn(MOST, top), __fdiv_rn(top, MOST)};
}

// ---- the largest of a matrix ----

__device__ inline float largest_of(const float *parts)
{
    return block_top(threadIdx.x < FP8_PARTS ? parts[threadIdx.x] : 0.0f);
}

template <typename T> __device__ void largest(const pmli_fp8_largest_params &p)
{
    float top = 0;
    const long long count = p.rows * p.cols, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long row = i / p.cols;
        float x = fabsf(widen(((const T *)p.x)[row * p.ld + i % p.cols]));
        if (p.over != nullptr) {
            int a = 0;
            while (a + 1 < p.adapters.count && row >= p.adapters.at[a + 1])
                a++;
            x = __fdiv_rn(x, p.over[row - p.adapters.at[a] + p.adapters.first[a]]);
        }
        top = larger(top, x);
    }
    top = block_top(top);
    if (threadIdx.x == 0)
        p.parts[blockIdx.x] = top;
}

// ---- low-rank factors in borders ----

// Both sides hold each number as two codes, its own and that of what is left, in three blocks of
// columns: high, low, high here and high, high, low there. So three of the four products of parts
// are made; the fourth is below their error. third: which block.
__device__ inline unsigned char part_of(float x, bool low)
{
    const unsigned high = two_codes(x, 0.0f) & 0xff;
    const float left = (high & 0x7f) == 0x7f ? x : __fadd_rn(x, -value_of(high));
    return (unsigned char)(low ? two_codes(left, 0.0f) & 0xff : high);
}

// Element c of a row of u, times its factor.
template <typename T>
__device__ float of_u(const pmli_fp8_rows_params &p, long long row, int c, float factor)
{
    return __fmul_rn(widen(((const T *)p.u)[row * p.ld_u + c]), factor);
}

// What u is multiplied by for the border, so that what stands beside the weight has codes; 0: no u.
__device__ inline float factor_of(const pmli_fp8_rows_params &p)
{
    return p.u != nullptr ? __fdiv_rn(largest_of(p.parts), MOST) : 0.0f;
}

template <typename T>
__device__ float top_of_u(const pmli_fp8_rows_params &p, long long row, float factor)
{
    float top = 0;
    for (int c = threadIdx.x; p.u != nullptr && c < p.u_cols; c += blockDim.x)
        top = larger(top, fabsf(of_u<T>(p, row, c, factor)));
    return top;
}

template <typename T>
__device__ void put_u(const pmli_fp8_rows_params &p, long long row, float factor, float into)
{
    unsigned char *to = p.codes + row * p.ld_codes + p.cols;
    for (int c = threadIdx.x; p.u != nullptr && c < p.border; c += blockDim.x) {
        const int third = c / p.u_cols;
        const float x = __fmul_rn(of_u<T>(p, row, c % p.u_cols, factor), into);
        to[c] = third < 3 ? part_of(x, third == 1) : 0;
    }
}

// The border of a weight. A thread has FP8_BESIDE columns of a row.
template <typename T> __device__ void border(const pmli_fp8_border_params &p)
{
    const float most = largest_of(p.parts), back = most > 0 ? __fdiv_rn(MOST, most) : 0.0f;
    const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int first = (int)blockIdx.y * FP8_BESIDE;
    if (row >= p.rows)
        return;
    int a = 0;
    while (a < p.adapters.count && row >= p.adapters.end[a])
        a++;
    const bool adapted = a < p.adapters.count && row >= p.adapters.first[a];
    const float scale = p.over != nullptr ? __fdiv_rn(back, p.over[row]) : back;
    for (int c = first; c < min(p.border, first + FP8_BESIDE); c++) {
        const int third = c / p.u_cols, column = c % p.u_cols;
        float x = 0;
        if (p.over == nullptr)
            x = widen(((const T *)p.x)[column * p.ld + row]);
        else if (adapted && column / p.adapters.rank == a)
            x = widen(((const T *)p.x)[(row - p.adapters.first[a] + p.adapters.at[a]) * p.ld +
                                       column % p.adapters.rank]);
        p.codes[row * p.ld_codes + p.cols + c] =
            third < 3 ? part_of(__fmul_rn(x, scale), third == 2) : 0;
    }
}

// ---- rows ----

// A row's scale for its largest magnitude, times the least power of two under which what stands in
// the border has codes, too: so x has the codes that it has alone, but for the smallest.
__device__ inline Scale scale_with(float top, float top_u)
{
    Scale s = scale_of(top);
    const float over = __fmul_rn(top_u, s.into) * (1.0f / MOST);
    if (over > 1.0f) {
        const float power = __uint_as_float((__float_as_uint(over) + 0x7fffffu) & 0x7f800000u);
        s.into = __fdiv_rn(s.into, power);
        s.back = __fmul_rn(s.back, power);
    }
    return s;
}

// Pack c of a row, in float32 and times its columns' factors.
template <typename T, int N>
__device__ Pack<float, N> numbers(const pmli_fp8_rows_params &p, const Pack<T, N> *x, int c)
{
    Pack<float, N> out;
    const Pack<T, N> in = x[c];
#pragma unroll
    for (int e = 0; e < N; e++)
        out.at[e] = widen(in.at[e]);
    if (p.by == nullptr)
        return out;
#pragma unroll
    for (int e = 0; e < N; e += 4) {
        const Pack<float, 4> by = ((const Pack<float, 4> *)p.by)[(c * N + e) / 4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            out.at[e + i] = __fmul_rn(out.at[e + i], by.at[i]);
    }
    return out;
}

// A block a row; of at most FP8_HELD packs a thread, which wait in registers for the largest of
// them.
template <typename T> __device__ void rows_wide(const pmli_fp8_rows_params &p)
{
    constexpr int N = 16 / sizeof(T);
    const long long row = blockIdx.x;
    const int packs = (int)(p.cols / N);
    const Pack<T, N> *x = (const Pack<T, N> *)((const T *)p.x + row * p.ld_x);
    Pack<float, N> held[FP8_HELD];
#pragma unroll
    for (int k = 0; k < FP8_HELD; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c < packs)
            held[k] = numbers<T, N>(p, x, c);
    }
    const float factor = factor_of(p);
    const float top_u = p.u != nullptr ? block_top(top_of_u<T>(p, row, factor)) : 0.0f;
    float top = 0;
#pragma unroll
    for (int k = 0; k < FP8_HELD; k++)
        if ((int)(k * blockDim.x + threadIdx.x) < packs)
#pragma unroll
            for (int e = 0; e < N; e++)
                top = larger(top, fabsf(held[k].at[e]));
    const Scale s = scale_with(block_top(top), top_u);
    if (threadIdx.x == 0)
        p.scale[row] = s.back;
    typedef Pack<unsigned short, N / 2> codes;
    codes *to = (codes *)(p.codes + row * p.ld_codes);
#pragma unroll
    for (int k = 0; k < FP8_HELD; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        codes out;
#pragma unroll
        for (int e = 0; e < N; e += 2)
            out.at[e / 2] = (unsigned short)two_codes(__fmul_rn(held[k].at[e], s.into),
                                                      __fmul_rn(held[k].at[e + 1], s.into));
        to[c] = out;
    }
    put_u<T>(p, row, factor, s.into);
}

// Any row, read twice.
template <typename T> __device__ void rows_any(const pmli_fp8_rows_params &p)
{
    const long long row = blockIdx.x;
    const T *x = (const T *)p.x + row * p.ld_x;
    const float factor = factor_of(p);
    const float top_u = p.u != nullptr ? block_top(top_of_u<T>(p, row, factor)) : 0.0f;
    float top = 0;
    for (long long c = threadIdx.x; c < p.cols; c += blockDim.x)
        top = larger(top, fabsf(by_column(widen(x[c]), p.by, c)));
    const Scale s = scale_with(block_top(top), top_u);
    if (threadIdx.x == 0)
        p.scale[row] = s.back;
    for (long long c = threadIdx.x; c < p.cols; c += blockDim.x)
        p.codes[row * p.ld_codes + c] =
            (unsigned char)two_codes(__fmul_rn(by_column(widen(x[c]), p.by, c), s.into), 0.0f);
    put_u<T>(p, row, factor, s.into);
}

// A weight's: none counts as less than 2^-8 of the largest. parts: of all of it.
template <typename T> __device__ void weight(const pmli_fp8_rows_params &p)
{
    const long long row = blockIdx.x;
    const T *x = (const T *)p.x + row * p.ld_x;
    const float most = largest_of(p.parts);
    float top = most * 0x1p-8f;
    for (long long c = threadIdx.x; c < p.cols; c += blockDim.x)
        top = larger(top, fabsf(widen(x[c])));
    const Scale s = scale_of(block_top(top));
    if (threadIdx.x == 0)
        p.scale[row] = most < SMALLEST ? 1.0f : s.back;
    for (long long c = threadIdx.x; c < p.cols; c += blockDim.x)
        p.codes[row * p.ld_codes + c] =
            (unsigned char)two_codes(__fmul_rn(widen(x[c]), s.into), 0.0f);
}

#define KERNEL(name, params, most, body)                                                           \
    extern "C" __global__ void __launch_bounds__(most) name(const params p)                        \
    {                                                                                              \
        body(p);                                                                                   \
    }
#define ALL(T, suffix)                                                                             \
    KERNEL(fp8_rows_##suffix, pmli_fp8_rows_params, 512, rows_any<T>)                              \
    KERNEL(fp8_rows_##suffix##_wide, pmli_fp8_rows_params, 512, rows_wide<T>)                      \
    KERNEL(fp8_weight_##suffix, pmli_fp8_rows_params, 256, weight<T>)                              \
    KERNEL(fp8_largest_##suffix, pmli_fp8_largest_params, 256, largest<T>)                         \
    KERNEL(fp8_border_##suffix, pmli_fp8_border_params, 256, border<T>)
ALL(float, f32)
ALL(bf16, bf16)
ALL(f16, f16)

// ---- a weight turned round ----

#define TILE  FP8_TILE
#define WARPS 8

// to [cols,rows] = w [rows,cols]^T. A thread takes 4 x 4 codes from four rows, turns them in
// registers and leaves them in shared memory, where word r of column k lies at r ^ k/4: neither the
// columns' writes nor the rows' reads meet in a bank.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    fp8_transpose(const pmli_fp8_transpose_params p)
{
    __shared__ unsigned turned[TILE][TILE / 4];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long row0 = (long long)blockIdx.y * TILE, col0 = (long long)blockIdx.x * TILE;
    const long long col = col0 + lane * 4;
#pragma unroll
    for (int r = warp; r < TILE / 4; r += WARPS) {
        const long long row = row0 + r * 4;
        if (row >= p.rows || col >= p.cols)
            continue; // whole fours: both are multiples of 16
        unsigned w[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = *(const unsigned *)(p.w + (row + i) * p.ld_w + col);
        const unsigned low01 = __byte_perm(w[0], w[1], 0x5140);
        const unsigned low23 = __byte_perm(w[2], w[3], 0x5140);
        const unsigned high01 = __byte_perm(w[0], w[1], 0x7362);
        const unsigned high23 = __byte_perm(w[2], w[3], 0x7362);
        turned[4 * lane + 0][r ^ lane] = __byte_perm(low01, low23, 0x5410);
        turned[4 * lane + 1][r ^ lane] = __byte_perm(low01, low23, 0x7632);
        turned[4 * lane + 2][r ^ lane] = __byte_perm(high01, high23, 0x5410);
        turned[4 * lane + 3][r ^ lane] = __byte_perm(high01, high23, 0x7632);
    }
    __syncthreads();
#pragma unroll
    for (int k = warp; k < TILE; k += WARPS)
        if (col0 + k < p.cols && row0 + lane * 4 < p.rows)
            *(unsigned *)(p.to + (col0 + k) * p.ld_to + row0 + lane * 4) =
                turned[k][lane ^ (k / 4)];
    if (blockIdx.y == 0 && threadIdx.x < TILE && col0 + threadIdx.x < p.cols)
        p.ones[col0 + threadIdx.x] = 1.0f;
}

// y = y * 2^FP8_DOWN * row scale * column scale (+ bias), where cuBLASLt multiplied codes alone.
template <typename T> __device__ void apply_scales(const pmli_fp8_scales_params &p)
{
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = blockIdx.y * (long long)blockDim.y + threadIdx.y;
    if (column >= p.cols || row >= p.rows)
        return;
    T *y = (T *)p.y + row * p.ld + column;
    const float up = (float)(1 << FP8_DOWN);
    const float factor = p.row[row] * p.column[column] * up;
    const float bias = p.bias != nullptr ? widen(((const T *)p.bias)[column]) : 0.0f;
    *y = narrow<T>(widen(*y) * factor + bias);
}

#define SCALES(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        fp8_scales_##suffix(const pmli_fp8_scales_params p)                                        \
    {                                                                                              \
        apply_scales<T>(p);                                                                        \
    }
SCALES(float, f32)
SCALES(bf16, bf16)
SCALES(f16, f16)
