// A linear layer's adapters under dropout: products that draw the masks of what they read, so that
// no masked copy is written and read again. By the tensor cores, 16 ranks (a group) at a time; a
// lane has eight neighbouring columns of a row, for which one call of Philox draws.
//
//   masked_down   u_g = scale keep (m x) a_g^T
//   masked_both   parts of da_g = keep v_g^T (m x), and dx += keep m (v_g a_g), from one pass;
//   masked_dx, masked_da   one of them by itself
//
// Which column of a product is which of x's is free, as long as both factors agree: eight
// neighbours of a row, 16 bytes, are four columns of one product and four of another. Tiles pass
// through shared memory, for a row's 128 bytes have to be asked for by eight lanes side by side: by
// any others it takes twice as long.
#include "attention.cuh"
#include "dropout.cuh"

#define CODE (__CUDA_ARCH__ / 10)

enum {
    WARPS = MASKED_THREADS / 32,
    STRIP = MASKED_STRIP,
    TILE = MASKED_ROWS,
    EIGHT = 8,
    RANKS = 16
};

__device__ inline uint4 load_16(const void *from, bool valid)
{
    return valid ? *(const uint4 *)from : uint4{0, 0, 0, 0};
}

// Eight neighbours under their mask.
__device__ inline uint4 masked_eight(uint4 x, const Words &words, unsigned least)
{
    return {masked_two(x.x, words.at[0], least), masked_two(x.y, words.at[1], least),
            masked_two(x.z, words.at[2], least), masked_two(x.w, words.at[3], least)};
}

// A warp's strip of 64 columns of x or dx: eight lanes ask for a row, the 32 for four. A row is 128
// bytes of shared memory, its 16-byte units turned about by xor so that no two of the lanes that
// read side by side want the same banks.
struct Strip {
    const char *at; // this lane's unit of a tile's first rows
    unsigned pitch; // bytes from row to row
    bool there;

    __device__ Strip(const void *base, long long ld, long long first, int column, int cols)
        : at((const char *)base +
             ((first + threadIdx.x % 32 / 8) * ld + column + threadIdx.x % 8 * EIGHT) * 2),
          pitch((unsigned)ld * 2), there(column + (int)threadIdx.x % 8 * EIGHT < cols)
    {
    }

    __device__ static int row(int k)
    {
        return k * 4 + threadIdx.x % 32 / 8;
    }

    // A tile; from its left-th row on, zeros.
    template <int FLIPS> __device__ void load(unsigned to, int left) const
    {
#pragma unroll
        for (int k = 0; k < TILE / 4; k++)
            copy_16(place<FLIPS>(to, row(k), threadIdx.x % 8), at + (unsigned)k * 4 * pitch,
                    there && row(k) < left);
    }

    // FLIPS 7: for lanes that read eight rows of as few units as can be; 4: two rows of four.
    template <int FLIPS> __device__ static unsigned place(unsigned tile, int row, int unit)
    {
        const int flip = FLIPS == 7 ? row & 7 : (row & 1) * 4;
        return tile + row * 128 + ((unit ^ flip) << 4);
    }
};

// ---- forward -----------------------------------------------------------------------------------
// A block has 16 rows of x, a warp of it every WARPS-th strip. Of 32 columns of a strip a lane
// has 8 t to 8 t + 7, of rows l and l + 8 (l = lane / 4, t = lane % 4): the first four are what mma
// wants of it as columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of a first product of 16 columns, the
// others of a second.

template <typename T, int GROUPS, bool ONE_MASK>
__device__ void masked_down(const pmli_masked_params &p)
{
    extern __shared__ __align__(128) unsigned char memory[];
    constexpr int WIDTH = GROUPS * RANKS, STAGES = MASKED_DOWN_STAGES;
    constexpr int STAGE = WARPS * TILE * STRIP * 2, NEXT = WARPS * STRIP;
    float *sums = (float *)memory; // [WARPS][TILE][WIDTH], once no stage is wanted any more
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, l = lane / 4, t = lane % 4;
    const int block = blockIdx.x * TILE, left = p.rows - block;
    const unsigned mine = shared_address(memory) + warp * TILE * STRIP * 2;
    const unsigned long long seed = p.rng[0], update = p.rng[1];
    unsigned long long begin[2]; // the first number of Philox's of a row
#pragma unroll
    for (int k = 0; k < 2; k++)
        begin[k] =
            (unsigned long long)p.places[min(block + k * 8 + l, p.rows - 1)] * (p.cols / EIGHT);
    int ahead = warp * STRIP;
    Strip x(p.x, p.ld_x, block, ahead, p.cols);
    const auto ask = [&](unsigned stage) {
        x.there = ahead + (int)threadIdx.x % 8 * EIGHT < p.cols;
        x.load<4>(mine + stage, left);
        x.at += NEXT * 2;
        ahead += NEXT;
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        ask(i * STAGE);
    float acc[GROUPS][2][4] = {};
    unsigned at = 0, next = (STAGES - 1) * STAGE;
    for (int strip = warp * STRIP; strip < p.cols; strip += NEXT) {
        copy_wait<STAGES - 2>();
        __syncwarp(); // the strip is there, and no lane reads the one before it
        ask(next);
        next = next + STAGE == STAGES * STAGE ? 0 : next + STAGE;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = strip + half * 32 + t * EIGHT;
            uint4 held[2], m[2];
#pragma unroll
            for (int k = 0; k < 2; k++)
                held[k] = from_shared(Strip::place<4>(mine + at, k * 8 + l, half * 4 + t));
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                uint4 a[2];
#pragma unroll
                for (int n = 0; n < 2; n++)
                    a[n] =
                        load_16((const T *)p.a +
                                    (p.first[g] + min(n * 8 + l, p.ranks[g] - 1)) * p.ld_a + column,
                                column < p.cols);
                if (g == 0 || !ONE_MASK) {
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        m[k] = masked_eight(
                            held[k], philox(seed, update, p.purpose[g], begin[k] + column / EIGHT),
                            p.least);
                }
                const unsigned front[4] = {m[0].x, m[1].x, m[0].y, m[1].y};
                const unsigned back[4] = {m[0].z, m[1].z, m[0].w, m[1].w};
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    multiply<T>(acc[g][n], front, a[n].x, a[n].y);
                    multiply<T>(acc[g][n], back, a[n].z, a[n].w);
                }
            }
        }
        at = at + STAGE == STAGES * STAGE ? 0 : at + STAGE;
    }
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float *to = sums + (warp * TILE + l) * WIDTH + g * RANKS + n * 8 + 2 * t;
            *(float2 *)to = make_float2(acc[g][n][0], acc[g][n][1]);
            *(float2 *)(to + 8 * WIDTH) = make_float2(acc[g][n][2], acc[g][n][3]);
        }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * WIDTH / 2; i += MASKED_THREADS) {
        const int row = i / (WIDTH / 2), col = i % (WIDTH / 2) * 2, g = col / RANKS;
        if (row >= left || col % RANKS >= p.ranks[g])
            continue;
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 more = *(const float2 *)(sums + (w * TILE + row) * WIDTH + col);
            sum.x += more.x;
            sum.y += more.y;
        }
        T *u = (T *)p.u + (block + row) * p.ld_u + p.first[g] + col % RANKS;
        *(unsigned *)u = packed<T>(sum.x * p.scale[g], sum.y * p.scale[g]);
    }
}

// ---- backward ----------------------------------------------------------------------------------
// A warp has a strip of 64 columns and every gridDim.y-th tile of 16 rows, the last ones first,
// which the cache still has. In a tile a lane multiplies columns 8 l to 8 l + 7 of rows 2 t, 2 t +
// 1, 2 t + 8 and 2 t + 9:
//
//   da [16 ranks, 64]: eight products of [16 ranks, 16 rows] [16 rows, 8 columns], the j-th of them
//                      of columns 8 l + j;
//   dx^T [64, 16]:     four by two of [16 columns, 16 ranks] [16 ranks, 8 rows], the i-th of
//                      columns 8 l + 2 i (its first eight rows) and 8 l + 2 i + 1.
//
// So both have the same columns of the same rows where they have x and dx, and the masks.

// Which row of a tile is a lane's k-th, but for the 2 t that all of a lane's have.
constexpr __device__ int row_of(int k)
{
    return k / 2 * 8 + k % 2;
}

// 8 bytes from global to shared memory, with copy_16's.
__device__ inline void copy_8(unsigned to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from));
}

__device__ inline unsigned long long read_8(unsigned from)
{
    unsigned long long x;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(from) : "memory");
    return x;
}

// v of a tile of rows from `first` on, and their places, for all warps: each group's first eight
// ranks of 16 rows, then the next eight. What is not there is zero, a row behind the last the last.
template <typename T, int GROUPS>
__device__ inline void load_factors(const pmli_masked_params &p, unsigned to, int first)
{
    const int g = threadIdx.x / 32, half = threadIdx.x / 16 % 2, row = first + threadIdx.x % 16;
    if (g < GROUPS) {
        const bool there = row < p.rows && half * 8 < p.ranks[g];
        copy_16(to + threadIdx.x * 16,
                there ? (const T *)p.v + row * p.ld_v + p.first[g] + half * 8 : p.v, there);
    }
    if (threadIdx.x >= GROUPS * 32 && threadIdx.x < GROUPS * 32 + TILE)
        copy_8(to + GROUPS * 512 + (threadIdx.x - GROUPS * 32) * 8,
               p.places + min(row, p.rows - 1));
}

// Where a lane's row of a group's four 8 x 8 matrices lies, for ldmatrix.
__device__ inline unsigned matrix_row()
{
    const int lane = threadIdx.x % 32;
    return (lane / 8 % 2 * 16 + lane / 16 * 8 + lane % 8) * 16;
}

// Neighbours in a column: the low, or the high halves of two words.
__device__ inline unsigned lows(unsigned first, unsigned second)
{
    return __byte_perm(first, second, 0x5410);
}

__device__ inline unsigned highs(unsigned first, unsigned second)
{
    return __byte_perm(first, second, 0x7632);
}

__device__ inline unsigned word_of(const uint4 &x, int i)
{
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// a of this warp's columns as left operands [16 columns, 16 ranks], four a group, to where each
// lane finds its own again.
template <typename T, int GROUPS, int THREADS>
__device__ inline void keep_a(const pmli_masked_params &p, unsigned to, int column)
{
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        uint4 a[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            a[k] = load_16((const T *)p.a + (p.first[g] + row_of(k) + 2 * t) * p.ld_a + column,
                           row_of(k) + 2 * t < p.ranks[g] && column < p.cols);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned w[4] = {word_of(a[0], i), word_of(a[1], i), word_of(a[2], i),
                                   word_of(a[3], i)};
            to_shared(to + ((g * 4 + i) * THREADS + threadIdx.x) * 16,
                      {lows(w[0], w[1]), highs(w[0], w[1]), lows(w[2], w[3]), highs(w[2], w[3])});
        }
    }
}

// What a pass makes: dx, da, or both.
enum { DX = 1, DA = 2 };

// Two neighbours by the halves of a word: of x what is kept, and what is kept of v a onto dx. As
// the compiler has dx by itself, each comparison is made twice, and what it decides selected once
// more.
template <int WANTS>
__device__ inline void mask(unsigned word, const pmli_masked_params &p, unsigned &x, float &dx_even,
                            float &dx_odd, float even, float odd)
{
    if (WANTS == DA)
        x = masked_two(x, word, p.least);
    else if (WANTS == DX)
        asm("{ .reg .pred e, o;\n\t"
            "setp.ge.u32 e, %2, %4;\n\t"
            "setp.ge.u32 o, %3, %4;\n\t"
            "@e fma.rn.f32 %0, %5, %7, %0;\n\t"
            "@o fma.rn.f32 %1, %6, %7, %1; }"
            : "+f"(dx_even), "+f"(dx_odd)
            : "r"(word << 16), "r"(word), "r"(p.least), "f"(even), "f"(odd), "f"(p.keep));
    else
        asm("{ .reg .pred e, o;\n\t"
            "setp.ge.u32 e, %3, %5;\n\t"
            "setp.ge.u32 o, %4, %5;\n\t"
            "@!e and.b32 %0, %0, 0xffff0000;\n\t"
            "@!o and.b32 %0, %0, 0xffff;\n\t"
            "@e fma.rn.f32 %1, %6, %8, %1;\n\t"
            "@o fma.rn.f32 %2, %7, %8, %2; }"
            : "+r"(x), "+f"(dx_even), "+f"(dx_odd)
            : "r"(word << 16), "r"(word), "r"(p.least), "f"(even), "f"(odd), "f"(p.keep));
}

// Of a group: da of a tile's masked x, and of v a what the mask keeps, onto dx. v: this lane's row
// of its four matrices; a: what this thread keeps of it.
template <typename T, int WANTS, int THREADS>
__device__ inline void add_group(float da[8][4], float dx[4][EIGHT], unsigned v, const uint4 x[4],
                                 unsigned a, const Words words[4], const pmli_masked_params &p)
{
    unsigned v_left[4], v_right[4]; // of da [ranks, rows]; of dx^T [ranks, rows], two by two
    if (WANTS & DA)
        load_transposed(v_left, v);
    if (WANTS & DX)
        load_matrices(v_right, v);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float d[2][4] = {};
        if (WANTS & DX) {
            const uint4 four = from_shared(a + i * THREADS * 16);
            const unsigned left[4] = {four.x, four.y, four.z, four.w};
            multiply<T>(d[0], left, v_right[0], v_right[1]);
            multiply<T>(d[1], left, v_right[2], v_right[3]);
        }
        unsigned m[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            m[k] = (WANTS & DA) ? word_of(x[k], i) : 0;
            const float even = d[k / 2][k % 2], odd = d[k / 2][2 + k % 2];
            mask<WANTS>(words[k].at[i], p, m[k], dx[k][2 * i], dx[k][2 * i + 1], even, odd);
        }
        if (WANTS & DA) {
            multiply<T>(da[2 * i], v_left, lows(m[0], m[1]), lows(m[2], m[3]));
            multiply<T>(da[2 * i + 1], v_left, highs(m[0], m[1]), highs(m[2], m[3]));
        }
    }
}

// A lane's sixteen neighbouring columns of two ranks of each group.
template <int GROUPS>
__device__ inline void store_da(const pmli_masked_params &p, const float da[GROUPS][8][4],
                                int strip)
{
    const int lane = threadIdx.x % 32, l = lane / 4, t = lane % 4;
    const int width = p.first[GROUPS - 1] - p.first[0] + p.ranks[GROUPS - 1];
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const int rank = half * 8 + l, column = strip + (2 * t + odd) * EIGHT;
                if (rank >= p.ranks[g] || column >= p.cols)
                    continue;
                const int e = half * 2 + odd;
                const long long row = (long long)blockIdx.y * width + p.first[g] - p.first[0];
                float4 *to = (float4 *)(p.parts + (row + rank) * p.cols + column);
                to[0] = make_float4(p.keep * da[g][0][e], p.keep * da[g][1][e],
                                    p.keep * da[g][2][e], p.keep * da[g][3][e]);
                to[1] = make_float4(p.keep * da[g][4][e], p.keep * da[g][5][e],
                                    p.keep * da[g][6][e], p.keep * da[g][7][e]);
            }
}

template <typename T, int GROUPS, int WANTS, bool ONE_MASK>
__device__ void masked_back(const pmli_masked_params &p)
{
    extern __shared__ __align__(128) unsigned char memory[];
    constexpr bool BOTH = WANTS == (DX | DA);
    constexpr int THREADS = MASKED_BACK_THREADS(GROUPS, BOTH, CODE), ROW = THREADS * 16;
    constexpr int STAGES = MASKED_STAGES(BOTH, CODE), STAGE = MASKED_TILE(GROUPS, BOTH, CODE);
    constexpr int AT_DX = BOTH ? 4 * ROW : 0, FACTORS = AT_DX + 4 * ROW, TILE_OF_WARP = 32 * 64;
    const unsigned base = shared_address(memory), a = base + STAGES * STAGE;
    const unsigned mine = threadIdx.x / 32 * TILE_OF_WARP, v_mine = FACTORS + matrix_row();
    const int l = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int strip = (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * STRIP;
    const int column = strip + l * EIGHT;
    const unsigned long long seed = p.rng[0], update = p.rng[1];
    const int step = gridDim.y * TILE;
    int first = ((p.rows + TILE - 1) / TILE - 1 - (int)blockIdx.y) * TILE; // a tile's first row
    int ahead = first; // and the next to ask for
    Strip x(p.x, p.ld_x, first, strip, p.cols), dx(p.dx, p.ld_dx, first, strip, p.cols);
    char *out = (char *)dx.at;
    unsigned place[2]; // of this lane's first two rows, as it multiplies them
#pragma unroll
    for (int k = 0; k < 2; k++)
        place[k] = Strip::place<7>(mine, 2 * t + k, l);
    const auto ask = [&](unsigned stage) {
        if (ahead >= 0) {
            if (WANTS & DA)
                x.load<7>(base + stage + mine, p.rows - ahead);
            if (WANTS & DX)
                dx.load<7>(base + stage + AT_DX + mine, p.rows - ahead);
            load_factors<T, GROUPS>(p, base + stage + FACTORS, ahead);
            x.at -= step * p.ld_x * 2;
            dx.at -= step * p.ld_dx * 2;
            ahead -= step;
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        ask(i * STAGE);
    if (WANTS & DX)
        keep_a<T, GROUPS, THREADS>(p, a, column);
    float da[GROUPS][8][4] = {};
    unsigned at = 0, next = (STAGES - 1) * STAGE;
    for (; first >= 0; first -= step) {
        copy_wait<STAGES - 2>();
        __syncthreads(); // the tile is there, and nobody reads the one before it
        ask(next);
        next = next + STAGE == STAGES * STAGE ? 0 : next + STAGE;
        const unsigned tile = base + at;
        at = at + STAGE == STAGES * STAGE ? 0 : at + STAGE;
        unsigned long long index[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            index[k] =
                read_8(tile + FACTORS + GROUPS * 512 + (2 * t + row_of(k)) * 8) * (p.cols / EIGHT) +
                column / EIGHT;
        uint4 held[4];
        float sums[4][EIGHT];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (WANTS & DA)
                held[k] = from_shared(tile + place[k % 2] + k / 2 * 1024);
            if (WANTS & DX) {
                const uint4 old = from_shared(tile + AT_DX + place[k % 2] + k / 2 * 1024);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 two = widen_two<T>(word_of(old, i));
                    sums[k][2 * i] = two.x;
                    sums[k][2 * i + 1] = two.y;
                }
            }
        }
        Words words[4];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            if (g == 0 || !ONE_MASK) {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    words[k] = philox(seed, update, p.purpose[g], index[k]);
            }
            add_group<T, WANTS, THREADS>(da[g], sums, tile + v_mine + g * 512, held,
                                         a + threadIdx.x * 16 + g * 4 * ROW, words, p);
        }
        if (WANTS & DX) { // back by the places that they came by
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float *sum = sums[k];
                to_shared(tile + AT_DX + place[k % 2] + k / 2 * 1024,
                          {narrow_two<T>(sum[0], sum[1]), narrow_two<T>(sum[2], sum[3]),
                           narrow_two<T>(sum[4], sum[5]), narrow_two<T>(sum[6], sum[7])});
            }
            __syncwarp();
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (dx.there && Strip::row(k) < p.rows - first)
                    *(uint4 *)(out + (unsigned)k * 4 * dx.pitch) = from_shared(
                        Strip::place<7>(tile + AT_DX + mine, Strip::row(k), threadIdx.x % 8));
            out -= step * p.ld_dx * 2;
        }
    }
    if (WANTS & DA)
        store_da<GROUPS>(p, da, strip);
}

#define DOWN(T, suffix, name, groups, one_mask)                                                    \
    extern "C" __global__ void __launch_bounds__(MASKED_THREADS, 2)                                \
        masked_down_##name##_##suffix(const pmli_masked_params p)                                  \
    {                                                                                              \
        if constexpr (CODE >= 80)                                                                  \
            masked_down<T, groups, one_mask>(p);                                                   \
    }
#define BACK(T, suffix, name, groups, wants, one_mask, blocks)                                     \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MASKED_BACK_THREADS(groups, (wants) == (DX | DA), CODE), blocks)                           \
        masked_##name##_##suffix(const pmli_masked_params p)                                       \
    {                                                                                              \
        if constexpr (CODE >= 80)                                                                  \
            masked_back<T, groups, wants, one_mask>(p);                                            \
    }
#define KERNELS(T, suffix)                                                                         \
    DOWN(T, suffix, 1, 1, true)                                                                    \
    DOWN(T, suffix, 2, 2, false)                                                                   \
    DOWN(T, suffix, 3, 3, false)                                                                   \
    DOWN(T, suffix, one, 2, true)                                                                  \
    BACK(T, suffix, dx_1, 1, DX, true, 2)                                                          \
    BACK(T, suffix, dx_one, 2, DX, true, 2)                                                        \
    BACK(T, suffix, da_1, 1, DA, true, 2)                                                          \
    BACK(T, suffix, da_one, 2, DA, true, 2)                                                        \
    BACK(T, suffix, both_1, 1, DX | DA, true, 1)                                                   \
    BACK(T, suffix, both_2, 2, DX | DA, false, 1)                                                  \
    BACK(T, suffix, both_3, 3, DX | DA, false, 1)                                                  \
    BACK(T, suffix, both_one, 2, DX | DA, true, 1)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
