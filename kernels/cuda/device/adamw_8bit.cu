// AdamW with moments in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
// 2022). A warp has a block of 256 elements, a lane eight of them: in two runs of four. Sums and
// products are fused exactly where the CPU reference fuses them, so that the bits are the same.
#include "params.h"
#include "types.cuh"

#define BLOCK    256
#define RUNS     2
#define THREADS  384 // twice a processor: 80 registers each, for a block that is on its way
#define SMALLEST 1.17549435e-38f // FLT_MIN

// The nearest code is the number of middles below x. What the exponent and seven bits of the
// mantissa of x say of it is in a table, a cell each: no cell has more than one middle in it, and
// where that lies is in the same word, so that one addition tells the rest.
//
//   |x| as bits:  0 eeeeeeee mmmmmmm|mmmmmmmmmmmmmmmm      cell: these 15 bits, less those of
//                                     low                  2^-23: below it there is no middle
//
//   a word:       code at the cell's least x | 2^24 - 1 - the middle's low     (word + low) >> 24
//
// Negative numbers have cells of their own and run the other way: their low is inverted.
#define FIRST_CELL ((127 - 23) << 7)
#define CELLS      ((23 << 7) + 1) // up to 1
#define NO_MIDDLE  0xffffffu       // no low is beyond it: nothing is carried

// The number of n middles (ascending) that are below x.
__device__ inline int count_below(const float *middle, int n, float x)
{
    int low = 0, high = n;
    while (low < high) {
        const int at = (low + high) / 2;
        if (middle[at] < x)
            low = at + 1;
        else
            high = at;
    }
    return low;
}

// The words of a run of cells, of numbers without (sign = 0) or with a sign (0x80000000), of which
// no code is above `most`: a negative number keeps its sign. One search a run: from a cell to the
// next the middles that are below it are followed.
__device__ inline void make_words(const float *middle, unsigned *words, unsigned sign, int most)
{
    const int run = (CELLS + THREADS - 1) / THREADS, first = threadIdx.x * run;
    int n = -1;
    for (int cell = first; cell < min(first + run, CELLS); cell++) {
        const unsigned high = sign | (unsigned)(cell + FIRST_CELL) << 16;
        const float least = __uint_as_float(sign != 0 ? high | 0xffff : high);
        if (n < 0)
            n = count_below(middle, 255, least);
        while (n < 255 && middle[n] < least)
            n++;
        while (n > 0 && !(middle[n - 1] < least))
            n--;
        const unsigned bits = __float_as_uint(middle[min(n, 254)]);
        const bool inside = n < most && (bits ^ high) >> 16 == 0;
        const unsigned low = sign != 0 ? ~bits & 0xffff : bits & 0xffff;
        words[cell] = (unsigned)min(n, most) << 24 | (inside ? NO_MIDDLE - low : 0);
    }
}

// Of |x|'s first 16 bits. Cells [0, CELLS) are of numbers from 0 on, behind them come those of
// negative ones.
__device__ inline int cell_of(unsigned high)
{
    return __viaddmin_s32_relu((int)high, -FIRST_CELL, CELLS - 1);
}

// The code in the highest byte. -0 is negative.
__device__ inline unsigned nearest_signed(const unsigned *words, float x)
{
    const unsigned bits = __float_as_uint(x), sign = (unsigned)((int)bits >> 31);
    return words[cell_of(bits >> 16 & 0x7fff) + (sign & CELLS)] + ((bits ^ sign) & 0xffff);
}

__device__ inline unsigned nearest_of(const unsigned *words, float x)
{
    const unsigned bits = __float_as_uint(x);
    return words[cell_of(bits >> 16)] + (bits & 0xffff);
}

// Four words' highest bytes as one.
__device__ inline unsigned highest_bytes(const unsigned w[4])
{
    return __byte_perm(__byte_perm(w[0], w[1], 0x73), __byte_perm(w[2], w[3], 0x73), 0x5410);
}

// Of numbers from 0 on (not -0), which as words have the same order.
__device__ inline float warp_largest(float x)
{
#if __CUDA_ARCH__ >= 800
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
#else
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
#endif
}

// step m / (root(v) + eps), rounded as the operators round. What the compiler makes of division and
// root asks of every number whether it is far from the ends of the range, and takes 0 for one that
// is not, of which there is much: tokens that have not come yet. Here four numbers are asked at
// once, and zeros pass; then come the same instructions that the compiler has for these.
#define LEAST_M 0x1p-50f // and not zero
#define LEAST_V 0x1p-90f
#define MOST    0x1p40f

__device__ inline bool is_plain(float step, float eps)
{
    return step >= 0x1p-40f && step <= 0x1p10f && eps >= 0x1p-60f && eps <= 1.0f;
}

__device__ inline bool is_rare(float m, float v)
{
    return ((__float_as_uint(m) != 0) & !(fabsf(m) >= LEAST_M)) | ((v != 0) & !(v >= LEAST_V));
}

__device__ inline float plain_quotient(float step, float m, float v, float eps)
{
    float r, q;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaxf(v, LEAST_V)));
    const float near = __fmul_rn(v, r);
    const float size =
        __fadd_rn(__fmaf_rn(__fmaf_rn(-near, near, v), __fmul_rn(r, 0.5f), near), eps);
    const float a = __fmul_rn(step, m);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(size));
    r = __fmaf_rn(r, __fmaf_rn(-size, r, 1.0f), r);
    q = __fmul_rn(a, r);
    return __fmaf_rn(r, __fmaf_rn(-size, q, a), q);
}

__device__ inline float any_quotient(float step, float m, float v, float eps)
{
    return __fdiv_rn(__fmul_rn(step, m), __fadd_rn(__fsqrt_rn(v), eps));
}

// Four neighbours from `at` on; unless all are known to be there and in place, as far as they are
// there, and 0 for the others.
template <bool WHOLE, typename T>
__device__ inline Pack<T, 4> load_four(const T *from, long long at, long long count)
{
    Pack<T, 4> to;
    if constexpr (WHOLE) {
        to = read_once<T, 4>(from + at);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            to.at[e] = at + e < count ? from[at + e] : T(0);
    }
    return to;
}

template <bool WHOLE, typename T>
__device__ inline void store_four(T *to, const Pack<T, 4> &from, long long at, long long count)
{
    if constexpr (WHOLE) { // as words: packs of 16-bit numbers are taken apart otherwise
        if constexpr (sizeof(T) == 2)
            __stcs((uint2 *)(to + at), *(const uint2 *)&from);
        else
            write_once<T, 4>(to + at, from);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (at + e < count)
                to[at + e] = from.at[e];
    }
}

struct Tables {
    float m_map[256], v_map[256];
    unsigned m_words[2 * CELLS], v_words[CELLS];
};

struct Step {
    float keep, step, eps, new1, beta1, new2, beta2, scale;
    bool plain;
};

__device__ inline Step step_of(const float *hyper)
{
    const double lr = hyper[HYPER_LR], root2 = sqrt((double)hyper[HYPER_BIAS2]);
    const double new1 = hyper[HYPER_ONE_MINUS_BETA1], new2 = hyper[HYPER_ONE_MINUS_BETA2];
    Step s = {(float)(1.0 - lr * hyper[HYPER_WEIGHT_DECAY]),
              (float)(lr * root2 / hyper[HYPER_BIAS1]),
              (float)(hyper[HYPER_EPS] * root2),
              (float)new1,
              (float)(1.0 - new1),
              (float)new2,
              (float)(1.0 - new2),
              hyper[HYPER_GRAD_SCALE],
              false};
    s.plain = is_plain(s.step, s.eps);
    return s;
}

// What is read of a block. Four codes are a word until they are used: the compiler takes packs of
// bytes apart where they are loaded, and would wait for them there.
struct Loaded {
    Pack<float, 4> value[RUNS], g[RUNS];
    unsigned m_codes[RUNS], v_codes[RUNS];
    float m_largest, v_largest;
};

template <bool WHOLE>
__device__ inline unsigned load_codes(const unsigned char *from, long long at, long long count)
{
    unsigned codes = 0;
    if constexpr (WHOLE) {
        codes = __ldcs((const unsigned *)(from + at));
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            codes |= at + e < count ? (unsigned)from[at + e] << 8 * e : 0;
    }
    return codes;
}

template <bool WHOLE>
__device__ inline void store_codes(unsigned char *to, unsigned codes, long long at, long long count)
{
    if constexpr (WHOLE) {
        __stcs((unsigned *)(to + at), codes);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (at + e < count)
                to[at + e] = (unsigned char)(codes >> 8 * e);
    }
}

__device__ inline unsigned code_of(unsigned codes, int e)
{
    return codes >> 8 * e & 255;
}

template <bool WHOLE>
__device__ inline Loaded load_block(const pmli_adamw_8bit_params &p, long long block)
{
    Loaded x;
    const long long first = block * BLOCK + threadIdx.x % 32 * 4;
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        const long long at = first + run * (BLOCK / RUNS);
        x.m_codes[run] = load_codes<WHOLE>(p.m, at, p.count);
        x.v_codes[run] = load_codes<WHOLE>(p.v, at, p.count);
        x.g[run] = load_four<WHOLE>(p.g, at, p.count);
        x.value[run] = load_four<WHOLE>(p.p, at, p.count);
    }
    x.m_largest = p.m_largest[block];
    x.v_largest = p.v_largest[block];
    return x;
}

// The new moments and numbers of a block, then the codes.
template <bool WHOLE, typename T>
__device__ inline void update_block(const pmli_adamw_8bit_params &p, const Tables &tables,
                                    const Step &s, long long block, const Loaded &x)
{
    const int lane = threadIdx.x % 32;
    const long long first = block * BLOCK + lane * 4;
    Pack<float, 4> m[RUNS], v[RUNS];
    const float m_was = __fmul_rn(s.beta1, x.m_largest);
    const float v_was = __fmul_rn(s.beta2, x.v_largest);
    float m_top = 0, v_top = 0;
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        const long long at = first + run * (BLOCK / RUNS);
        Pack<float, 4> value;
        Pack<T, 4> copy;
        bool rare = !s.plain;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const bool there = WHOLE || at + e < p.count;
            const float grad = __fmul_rn(x.g[run].at[e], s.scale);
            const float new_m =
                __fmaf_rn(s.new1, grad, __fmul_rn(tables.m_map[code_of(x.m_codes[run], e)], m_was));
            const float new_v =
                __fmaf_rn(__fmul_rn(s.new2, grad), grad,
                          __fmul_rn(tables.v_map[code_of(x.v_codes[run], e)], v_was));
            m[run].at[e] = there ? new_m : 0.0f;
            v[run].at[e] = there ? new_v : 0.0f;
            m_top = fmaxf(m_top, fabsf(m[run].at[e]));
            v_top = fmaxf(v_top, v[run].at[e]);
            rare |= is_rare(m[run].at[e], v[run].at[e]);
        }
        rare |= !(m_top <= MOST) | !(v_top <= MOST);
        Pack<float, 4> q;
        if (!rare) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                q.at[e] = plain_quotient(s.step, m[run].at[e], v[run].at[e], s.eps);
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++)
                q.at[e] = any_quotient(s.step, m[run].at[e], v[run].at[e], s.eps);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            value.at[e] = __fmaf_rn(x.value[run].at[e], s.keep, -q.at[e]);
            copy.at[e] = narrow<T>(value.at[e]);
        }
        store_four<WHOLE>(p.p, value, at, p.count);
        if (p.copy != nullptr)
            store_four<WHOLE>((T *)p.copy, copy, at, p.count);
    }
    m_top = warp_largest(m_top);
    v_top = warp_largest(v_top);
    if (lane == 0) {
        p.m_largest[block] = m_top;
        p.v_largest[block] = v_top;
    }
    // Of a block of zeros, or nearly: a factor that leaves nothing but m's sign.
    const float m_inverse = m_top >= SMALLEST ? __fdiv_rn(1.0f, m_top) : SMALLEST;
    const float v_inverse = v_top >= SMALLEST ? __fdiv_rn(1.0f, v_top) : SMALLEST;
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        const long long at = first + run * (BLOCK / RUNS);
        unsigned m_word[4], v_word[4];
#pragma unroll
        for (int e = 0; e < 4;
             e++) { // fused with 0: so that -0 becomes 0, but not what rounds to it
            m_word[e] = nearest_signed(tables.m_words, __fmaf_rn(m[run].at[e], m_inverse, 0.0f));
            v_word[e] = nearest_of(tables.v_words, __fmul_rn(v[run].at[e], v_inverse));
        }
        store_codes<WHOLE>(p.m, highest_bytes(m_word), at, p.count);
        store_codes<WHOLE>(p.v, highest_bytes(v_word), at, p.count);
    }
}

// Maps come from the kernel's arguments, of which a warp reads one number at a time: once each.
__device__ inline void make_tables(const pmli_adamw_8bit_params &p, Tables &tables)
{
    __shared__ float m_middle[255], v_middle[255];
    for (int i = threadIdx.x; i < 512; i += THREADS)
        if (i < 256)
            tables.m_map[i] = p.m_map[i];
        else
            tables.v_map[i - 256] = p.v_map[i - 256];
    __syncthreads();
    for (int i = threadIdx.x; i < 255; i += THREADS) {
        m_middle[i] = (tables.m_map[i] + tables.m_map[i + 1]) * 0.5f;
        v_middle[i] = (tables.v_map[i] + tables.v_map[i + 1]) * 0.5f;
    }
    __syncthreads();
    make_words(m_middle, tables.m_words, 0, 255);
    make_words(m_middle, tables.m_words + CELLS, 0x80000000u, 126);
    make_words(v_middle, tables.v_words, 0, 255);
    __syncthreads();
}

// A block's loads are under way while the one before it is worked on, the first ones while tables
// are made.
template <typename T> __device__ void adamw_8bit(const pmli_adamw_8bit_params &p)
{
    __shared__ Tables tables;
    if (!is_finite(p.hyper[HYPER_GRAD_SCALE]))
        return;
    const long long blocks = (p.count + BLOCK - 1) / BLOCK, whole = p.wide ? p.count / BLOCK : 0;
    const long long step = (long long)gridDim.x * (THREADS / 32);
    long long block = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    Loaded next = {};
    if (block < whole)
        next = load_block<true>(p, block);
    make_tables(p, tables);
    const Step s = step_of(p.hyper);
    for (; block < whole; block += step) {
        const Loaded now = next;
        if (block + step < whole)
            next = load_block<true>(p, block + step);
        update_block<true, T>(p, tables, s, block, now);
    }
    for (; block < blocks; block += step)
        update_block<false, T>(p, tables, s, block, load_block<false>(p, block));
}

#define ADAMW_8BIT(name, T)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(const pmli_adamw_8bit_params p)  \
    {                                                                                              \
        adamw_8bit<T>(p);                                                                          \
    }
ADAMW_8BIT(adamw_8bit_f32, float)
ADAMW_8BIT(adamw_8bit_bf16, bf16)
ADAMW_8BIT(adamw_8bit_f16, f16)
