// What attention on sm_90a takes beside hopper.cuh: boxes of three dimensions, sums added up in
// memory by the copy engine, products of its shapes, and rope's turn back.
//
// A tile in shared memory is rows of 128 bytes (64 elements), as the copy engine's swizzle of 128
// bytes lays them; wider matrices are several such tiles `apart` bytes from each other.
#ifndef PMLI_CUDA_ATTENTION_HOPPER_CUH
#define PMLI_CUDA_ATTENTION_HOPPER_CUH

#include "hopper.cuh"

#if ON_HOPPER

enum {
    KEYS = HOPPER_KEYS, // of a tile of them
    ROWS = HOPPER_ROWS, // of a tile of queries
    HEAD = 128,
    HALF_KEYS = KEYS * 128, // bytes: 64 columns of all keys
    HALF_ROWS = ROWS * 128,
    GROUP = 128, // threads that multiply together, two such groups a block
    WARPS = 2 * GROUP / 32,
    BOTH = 1 // a numbered barrier: of the two groups
};

// The box of a map at (x, y, z), innermost first, into shared memory.
__device__ inline void bring_box(unsigned to, const pmli_tensor_map *map, int x, int y, int z,
                                 unsigned barrier)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}

// float32 in shared memory added to as many in memory, in any order.
__device__ inline void add_to_memory(float *to, unsigned from, int bytes)
{
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(from), "r"(bytes)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// The same, written.
__device__ inline void write_to_memory(float *to, unsigned from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// What this thread has written so far is in memory, for who waits for the word and then adds to it.
__device__ inline void tell_by_word(int *word)
{
    asm volatile("cp.async.bulk.wait_group 0;\n"
                 "fence.proxy.async;\n"
                 "st.release.gpu.global.s32 [%0], 1;" ::"l"(word)
                 : "memory");
}

__device__ inline void wait_for_word(const int *word)
{
    int told = 0;
    while (told == 0)
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(told) : "l"(word) : "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}

// Until this thread's additions have read what they add.
__device__ inline void additions_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ inline void additions_done()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Descriptors of tiles: with the sum running along a row, or down the rows. What is added to one is
// in units of 16 bytes.
static constexpr unsigned long long SWIZZLED = 1ull << 62, EIGHT_ROWS = 64ull << 32;

__device__ inline unsigned long long along(unsigned at)
{
    return (at >> 4 & 0x3fff) | 1ull << 16 | EIGHT_ROWS | SWIZZLED;
}

__device__ inline unsigned long long down(unsigned at, unsigned apart)
{
    return (at >> 4 & 0x3fff) | (unsigned long long)(apart >> 4) << 16 | EIGHT_ROWS | SWIZZLED;
}

#define EIGHT(how, i)                                                                              \
    how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]),          \
        how(d[i + 6]), how(d[i + 7])

#define SUMS_32(how) EIGHT(how, 0), EIGHT(how, 8), EIGHT(how, 16), EIGHT(how, 24)
#define SUMS_64(how) SUMS_32(how), EIGHT(how, 32), EIGHT(how, 40), EIGHT(how, 48), EIGHT(how, 56)
#define PLACES_32                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PLACES_64                                                                                  \
    PLACES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
              "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define PRODUCT_64(how, adds)                                                                      \
    asm volatile("{ .reg .pred add;\n"                                                             \
                 "setp.ne.b32 add, %34, 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "                           \
                 "{" PLACES_32 "}, %32, %33, add, 1, 1, %35, %36; }"                               \
                 : SUMS_32(how)                                                                    \
                 : "l"(a), "l"(b), "r"(adds), "n"(A_DOWN), "n"(B_DOWN))
#define PRODUCT_128(how, adds)                                                                     \
    asm volatile("{ .reg .pred add;\n"                                                             \
                 "setp.ne.b32 add, %66, 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "                          \
                 "{" PLACES_64 "}, %64, %65, add, 1, 1, %67, %68; }"                               \
                 : SUMS_64(how)                                                                    \
                 : "l"(a), "l"(b), "r"(adds), "n"(A_DOWN), "n"(B_DOWN))

// d [64,64] or [64,128] = a b, or += it, over 16 elements of their sums; A_DOWN, B_DOWN:
// descriptors by down(). A thread's place in d is that of mma.m16n8: rows lane / 4 and 8 more of
// its warp's 16, pairs of columns lane % 4 * 2. The first does not read d: no registers are kept
// for it before.
template <int A_DOWN, int B_DOWN>
__device__ inline void multiply_first(float (&d)[32], unsigned long long a, unsigned long long b)
{
    PRODUCT_64("=f", 0);
}
template <int A_DOWN, int B_DOWN>
__device__ inline void multiply_first(float (&d)[64], unsigned long long a, unsigned long long b)
{
    PRODUCT_128("=f", 0);
}
template <int A_DOWN, int B_DOWN>
__device__ inline void multiply_more(float (&d)[32], unsigned long long a, unsigned long long b)
{
    PRODUCT_64("+f", 1);
}
template <int A_DOWN, int B_DOWN>
__device__ inline void multiply_more(float (&d)[64], unsigned long long a, unsigned long long b)
{
    PRODUCT_128("+f", 1);
}

// d [64,128] += a b, a [64,16] in registers as mma.m16n8k16 has it.
template <int B_DOWN>
__device__ inline void multiply_more(float (&d)[64], const unsigned *a, unsigned long long b)
{
    asm volatile("{ .reg .pred add;\n"
                 "setp.ne.b32 add, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" PLACES_64 "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70; }"
                 : SUMS_64("+f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1), "n"(B_DOWN));
}

#undef PRODUCT_128
#undef PRODUCT_64
#undef PLACES_64
#undef PLACES_32
#undef SUMS_64
#undef SUMS_32
#undef EIGHT

// A group of products: d = a b^T over 128 columns of both, of which the second 64 lie a_apart and
// b_apart bytes behind the first.
template <int N>
__device__ inline void multiply_heads(float (&d)[N], unsigned long long a, int a_apart,
                                      unsigned long long b, int b_apart)
{
    products_begin();
    multiply_first<0, 0>(d, a, b);
#pragma unroll
    for (int i = 1; i < 8; i++)
        multiply_more<0, 0>(d, a + i / 4 * (a_apart / 16) + i % 4 * 2,
                            b + i / 4 * (b_apart / 16) + i % 4 * 2);
    products_asked();
}

// Another: d [64,128] += a b, a [64, 16 N] in registers, b's rows 16 after 16 from a descriptor by
// down().
template <int N>
__device__ inline void multiply_words(float (&d)[64], const unsigned (&a)[4 * N],
                                      unsigned long long b)
{
    products_begin();
#pragma unroll
    for (int i = 0; i < N; i++)
        multiply_more<1>(d, a + 4 * i, b + i * 128);
    products_asked();
}

// A token's row of rope's table: cosines, then as many sines.
__device__ inline const float *angles_of(const pmli_attention_hopper_params &p, long long token)
{
    return p.table + p.pos[token] * (long long)HEAD;
}

// Two columns of a gradient and those 64 further on, as they were before rope: by the angles'
// cosines and sines, the other way round.
__device__ inline void turn_back(float2 &low, float2 &high, float2 c, float2 s)
{
    const float2 x = low, y = high;
    low = make_float2(x.x * c.x + y.x * s.x, x.y * c.y + y.y * s.y);
    high = make_float2(y.x * c.x - x.x * s.x, y.y * c.y - x.y * s.y);
}

// The same of a whole row, the r-th of the two that this thread has of sums [64, 128]: of every
// eight columns two. Which two is hidden from the compiler, lest it work out their place ahead of
// the loop that makes the sums, where no registers are left.
__device__ inline void turn_back(float (&x)[64], int r, const float *angles)
{
    int lane = threadIdx.x % 4;
    asm volatile("" : "+r"(lane));
    const float *mine = angles + lane * 2;
#pragma unroll
    for (int b = 0; b < 8; b++) {
        float2 low = make_float2(x[4 * b + 2 * r], x[4 * b + 2 * r + 1]),
               high = make_float2(x[4 * b + 32 + 2 * r], x[4 * b + 32 + 2 * r + 1]);
        turn_back(low, high, *(const float2 *)(mine + b * 8),
                  *(const float2 *)(mine + HEAD / 2 + b * 8));
        x[4 * b + 2 * r] = low.x, x[4 * b + 2 * r + 1] = low.y;
        x[4 * b + 32 + 2 * r] = high.x, x[4 * b + 32 + 2 * r + 1] = high.y;
    }
}

#endif
#endif
