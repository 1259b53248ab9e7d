// Rows to 8 bits (E4M3) with a scale each, to the bit as cpu/ref/fp8.c has them; a weight's codes
// the other way round; and scales where the product itself takes none.
#include "fp8.cuh"
#include "params.h"

__device__ inline float by_column(float x, const float *by, long long column)
{
    return by != nullptr ? __fmul_rn(x, by[column]) : x;
}

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
    const int adapter = blockIdx.y;
    const T *x = (const T *)p.x + p.first[adapter] * p.ld;
    const float *over = p.over == nullptr ? nullptr : p.over + p.first[adapter] + p.shift[adapter];
    const long long count = (p.end[adapter] - p.first[adapter]) * p.cols;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long row = i / p.cols;
        const float value = fabsf(widen(x[row * p.ld + i % p.cols]));
        top = larger(top, over != nullptr ? __fdiv_rn(value, over[row]) : value);
    }
    top = block_top(top);
    if (threadIdx.x == 0)
        p.parts[adapter * FP8_PARTS + blockIdx.x] = top;
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

// Element c of a row of u, times its adapter's factor, so that what stands beside the weight has
// codes.
template <typename T> __device__ float of_u(const pmli_fp8_rows_params &p, long long row, int c)
{
    return __fmul_rn(widen(((const T *)p.u)[row * p.ld_u + c]), p.factors[c / p.u_rank]);
}

// What one of `threads` threads sees of it.
template <typename T>
__device__ float top_of_u(const pmli_fp8_rows_params &p, long long row, int thread, int threads)
{
    float top = 0;
    for (int c = thread; p.u != nullptr && c < p.u_cols; c += threads)
        top = larger(top, fabsf(of_u<T>(p, row, c)));
    return top;
}

template <typename T>
__device__ void put_u(const pmli_fp8_rows_params &p, long long row, float into, int thread,
                      int threads)
{
    unsigned char *to = p.codes + row * p.ld_codes + p.cols;
    for (int c = thread; p.u != nullptr && c < p.border; c += threads) {
        const int third = c / p.u_cols;
        const float x = __fmul_rn(of_u<T>(p, row, c % p.u_cols), into);
        to[c] = third < 3 ? part_of(x, third == 1) : 0;
    }
}

// The border of a weight. A thread has FP8_BESIDE columns of a row.
template <typename T> __device__ void border(const pmli_fp8_border_params &p)
{
    __shared__ float factor[3];
    for (int a = 0; a < p.adapters; a++) {
        const float most = largest_of(p.parts + a * FP8_PARTS);
        if (threadIdx.x == 0)
            factor[a] = __fdiv_rn(most, MOST);
    }
    __syncthreads();
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < p.adapters)
        p.factors[threadIdx.x] = factor[threadIdx.x];
    const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int first = (int)blockIdx.y * FP8_BESIDE;
    if (row >= p.rows)
        return;
    for (int c = first; c < min(p.border, first + FP8_BESIDE); c++) {
        const int third = c / p.u_cols, column = c % p.u_cols, a = column / p.rank;
        float x = 0;
        if (p.over == nullptr)
            x = widen(((const T *)p.x)[column * p.ld + row]);
        else if (row >= p.first[a] && row < p.end[a])
            x = __fdiv_rn(widen(((const T *)p.x)[(row - p.shift[a]) * p.ld + column % p.rank]),
                          p.over[row]);
        x = factor[a] > 0 ? __fdiv_rn(x, factor[a]) : 0.0f;
        p.codes[row * p.ld_codes + p.cols + c] = third < 3 ? part_of(x, third == 2) : 0;
    }
}

// ---- rows ----

// A row's scale, times the least power of two under which what stands in the border has codes, too:
// so x has the codes that it has alone, but for the smallest.
__device__ inline Scale scale_with(Scale s, float top_u)
{
    const float over = __fmul_rn(top_u, s.into) * (1.0f / MOST);
    if (over > 1.0f) {
        const float power = __uint_as_float((__float_as_uint(over) + 0x7fffffu) & 0x7f800000u);
        s.into = __fdiv_rn(s.into, power);
        s.back = __fmul_rn(s.back, power);
    }
    return s;
}

// The other factor's scales, where they are 1: each block has a few of them.
__device__ inline void put_ones(const pmli_fp8_rows_params &p)
{
    const long long all = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < p.count_ones; i += all)
        p.ones[i] = 1.0f;
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
    put_ones(p);
    const int packs = (int)(p.cols / N);
    const Pack<T, N> *x = (const Pack<T, N> *)((const T *)p.x + row * p.ld_x);
    Pack<float, N> held[FP8_HELD];
#pragma unroll
    for (int k = 0; k < FP8_HELD; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c < packs)
            held[k] = numbers<T, N>(p, x, c);
    }
    const float top_u =
        p.u != nullptr ? block_top(top_of_u<T>(p, row, threadIdx.x, blockDim.x)) : 0.0f;
    float top = 0;
#pragma unroll
    for (int k = 0; k < FP8_HELD; k++)
        if ((int)(k * blockDim.x + threadIdx.x) < packs)
#pragma unroll
            for (int e = 0; e < N; e++)
                top = larger(top, fabsf(held[k].at[e]));
    const Scale s = scale_with(power_for(block_top(top), 1), top_u);
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
    put_u<T>(p, row, s.into, threadIdx.x, blockDim.x);
}

// Any row, read twice.
template <typename T> __device__ void rows_any(const pmli_fp8_rows_params &p)
{
    const long long row = blockIdx.x;
    const T *x = (const T *)p.x + row * p.ld_x;
    put_ones(p);
    const float top_u =
        p.u != nullptr ? block_top(top_of_u<T>(p, row, threadIdx.x, blockDim.x)) : 0.0f;
    float top = 0;
    for (long long c = threadIdx.x; c < p.cols; c += blockDim.x)
        top = larger(top, fabsf(by_column(widen(x[c]), p.by, c)));
    const Scale s = scale_with(power_for(block_top(top), 1), top_u);
    if (threadIdx.x == 0)
        p.scale[row] = s.back;
    for (long long c = threadIdx.x; c < p.cols; c += blockDim.x)
        p.codes[row * p.ld_codes + c] =
            (unsigned char)two_codes(__fmul_rn(by_column(widen(x[c]), p.by, c), s.into), 0.0f);
    put_u<T>(p, row, s.into, threadIdx.x, blockDim.x);
}

// A weight's.
template <typename T> __device__ void weight(const pmli_fp8_weight_params &p)
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

// ---- rows in pieces ----

// Which columns piece `piece` of a row has: each part's begin anew.
struct Piece {
    long long column;
    int columns;
};

__device__ inline Piece piece_of(const pmli_fp8_rows_params &p, int piece)
{
    const int a_part = (int)((p.part_cols + FP8_PIECE - 1) / FP8_PIECE);
    const long long at = (long long)(piece % a_part) * FP8_PIECE;
    return {piece / a_part * p.part_cols + at, (int)min((long long)FP8_PIECE, p.part_cols - at)};
}

// A warp a piece: its codes, and what they are worth.
template <typename T> __device__ void pieces(const pmli_fp8_rows_params &p)
{
    const int lane = threadIdx.x % 32;
    const long long item = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const long long row = item / p.pieces_a_row;
    const int piece = (int)(item % p.pieces_a_row);
    if (row >= p.rows)
        return;
    const Piece here = piece_of(p, piece);
    const bool there = lane * 8 < here.columns; // they are whole eights
    const long long column = here.column + (there ? lane * 8 : 0);
    const T *x = (const T *)p.x + row * p.ld_x + column;
    Pack<T, 8> in[1];
#pragma unroll
    for (int e = 0; e < 8; e++)
        in[0].at[e] = x[e];
    const bool written[1] = {there};
    Factors by;
    if (p.by != nullptr)
        by = factors_at(p.by + column);
    put_pieces<T, 1>(in, p.by != nullptr ? &by : nullptr, written,
                     p.codes + row * p.ld_codes + column, 0, p.pieces + row * p.ld_pieces + piece,
                     0);
}

// Eight codes times a power of two below 1.
__device__ inline Pack<unsigned short, 4> times(Pack<unsigned short, 4> codes, float power)
{
    Pack<unsigned short, 4> out;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float x[2];
#if __CUDA_ARCH__ >= 890
        unsigned both;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(codes.at[e]));
        const __half2 wide = *(const __half2 *)&both;
        x[0] = __low2float(wide), x[1] = __high2float(wide);
#else
        for (int i = 0; i < 2; i++) {
            const unsigned code = codes.at[e] >> 8 * i & 0xff;
            x[i] = (code & 0x7f) == 0x7f ? NOT_A_NUMBER : value_of(code);
        }
#endif
        out.at[e] = (unsigned short)two_codes(__fmul_rn(x[0], power), __fmul_rn(x[1], power));
    }
    return out;
}

// The pieces of a row to one scale, the largest of theirs, or that which the border needs; a warp a
// row. Most have it already: they are not touched.
template <typename T> __device__ void level(const pmli_fp8_rows_params &p)
{
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    put_ones(p);
    if (row >= p.rows)
        return;
    float back = 0;
    const float *scales = p.pieces + row * p.ld_pieces;
    for (int i = lane; i < p.pieces_a_row; i += 32)
        back = larger(back, scales[i]);
    back = warp_top(back);
    const bool any = back > 0 && is_finite(back);
    const Scale s = scale_with({any ? __fdiv_rn(1.0f, back) : 0.0f, back},
                               warp_top(top_of_u<T>(p, row, lane, 32)));
    if (lane == 0)
        p.scale[row] = s.back;
    for (int first = 0; first < p.pieces_a_row; first += 32) {
        const float own = first + lane < p.pieces_a_row ? scales[first + lane] : 0.0f;
        unsigned low = __ballot_sync(0xffffffffu, own > 0.0f && own < s.back);
        while (low != 0) {
            const int i = __ffs(low) - 1;
            const float power = __fmul_rn(__shfl_sync(0xffffffffu, own, i), s.into);
            const Piece here = piece_of(p, first + i);
            Pack<unsigned short, 4> *at =
                (Pack<unsigned short, 4> *)(p.codes + row * p.ld_codes + here.column) + lane;
            if (lane * 8 < here.columns)
                *at = times(*at, power);
            low &= low - 1;
        }
    }
    put_u<T>(p, row, s.into, lane, 32);
}

#define KERNEL(name, params, most, body)                                                           \
    extern "C" __global__ void __launch_bounds__(most) name(const params p)                        \
    {                                                                                              \
        body(p);                                                                                   \
    }
#define ALL(T, suffix)                                                                             \
    KERNEL(fp8_rows_##suffix, pmli_fp8_rows_params, 512, rows_any<T>)                              \
    KERNEL(fp8_rows_##suffix##_wide, pmli_fp8_rows_params, 512, rows_wide<T>)                      \
    KERNEL(fp8_pieces_##suffix, pmli_fp8_rows_params, 256, pieces<T>)                              \
    KERNEL(fp8_level_##suffix, pmli_fp8_rows_params, 256, level<T>)                                \
    KERNEL(fp8_weight_##suffix, pmli_fp8_weight_params, 256, weight<T>)                            \
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
