// c = a b on sm_90a, 16 bits in and out, sums in float32: large products at the card's power limit,
// where a product costs what it moves. (gemm.c times it beside cuBLASLt's kernels.)
//
//   c [m, n]     ┌───┬───┐   A cluster of eight blocks has a unit, 4 x 2 tiles of 128 x 256, at
//                │ 0 │ 4 │   once. What two tiles side by side share of a, and four below each
//                ├───┼───┤   other of b, is brought once: a block asks for its share of it, and
//                │ 1 │ 5 │   the copy engine writes that to all of them. (b is n, k or k, n.)
//                ├───┼───┤
//                │ 2 │ 6 │   A chip has more processors than such clusters fill, for a cluster's
//                ├───┼───┤   are neighbours: 120 of 132. The others have clusters of two, tiles
//                │ 3 │ 7 │   below each other, by a second kernel that begins when all blocks of
//                └───┴───┘   the first one have; units are shared out beforehand.
//
// Blocks stay. A warp asks for tiles, up to four stages ahead; two groups of four warps multiply 64
// of the rows each. A tile's sums are rounded when they are done, and kept in registers: they are
// written while the next tile is multiplied. Every sum is made by one block in the order of k, so
// bits do not depend on who had which unit.
#include "gemm_tiles.cuh"
#include "hopper.cuh"

#if ON_HOPPER

enum {
    A_BYTES = GEMM_ROWS * GEMM_STEP * 2,
    OUT_BOX = 64 * 64 * 2, // bytes of what is written at a time: a group's rows by 64 columns
    GROUP = 128,           // threads that multiply together, two such groups a block
    GROUP_ROWS = 64,
    PAIRS = GEMM_COLUMNS / 4, // of neighbouring sums, that a thread has
    PARTS = 8 // of a tile, written one behind each of the first steps of the next: 32 columns
};
static_assert(PARTS < GEMM_LEAST, "a tile is written before the next is done");

// ---- what blocks of a cluster do to each other ----

// The box, at the same place in the shared memory of these blocks of the cluster, of which each
// one's barrier counts it.
__device__ inline void bring_to(unsigned short blocks, unsigned to, const pmli_tensor_map *map,
                                int column, int row, unsigned barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
                 : "memory");
}

__device__ inline void barrier_arrive_at(int block, unsigned barrier)
{
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
                 "r"(block)
                 : "memory");
}

__device__ inline void cluster_meets()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

// ---- products ----

#define EIGHT(i)                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS                                                                                       \
    EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56),          \
        EIGHT(64), EIGHT(72), EIGHT(80), EIGHT(88), EIGHT(96), EIGHT(104), EIGHT(112), EIGHT(120)
#define PLACES                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "   \
    "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
    "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "   \
    "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "   \
    "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "     \
    "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "   \
    "%123, %124, %125, %126, %127"

// d [64, 256] = a [64, 16] b, or += it. A thread's place in d is that of mma.m16n8: rows lane / 4
// and 8 more of its warp's 16, pairs of columns lane % 4 * 2. TURNED: b lies as [16, 256].
template <typename T, int TURNED>
__device__ inline void multiply(float (&d)[128], unsigned long long a, unsigned long long b,
                                int adds)
{
#define PRODUCT(type)                                                                              \
    asm volatile("{ .reg .pred add;\n"                                                             \
                 "setp.ne.b32 add, %130, 0;\n"                                                     \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" PLACES "}, "    \
                 "%128, %129, add, 1, 1, 0, %131; }"                                               \
                 : SUMS                                                                            \
                 : "l"(a), "l"(b), "r"(adds), "n"(TURNED))
    if constexpr (same<T, bf16>)
        PRODUCT("bf16");
    else
        PRODUCT("f16");
#undef PRODUCT
}

#undef PLACES
#undef SUMS
#undef EIGHT

// Where things lie in shared memory, by address.
struct Places {
    unsigned stages, out, full, empty;
};

__device__ inline Places places_in(unsigned char *memory)
{
    Places m;
    m.stages = boxes_from(memory);
    m.out = m.stages + GEMM_STAGES * GEMM_STAGE;
    m.full = m.out + GEMM_OUT;
    m.empty = m.full + 8 * GEMM_STAGES;
    return m;
}

// Asks for everything: one thread. Its share of a stage goes to the blocks beside it and below it,
// once all of them have room.
template <int TURNED, int M, int N>
__device__ inline void fetch(const pmli_gemm_hopper_params &p, const Places &m)
{
    enum { A_ROWS = GEMM_ROWS / N, B_ROWS = GEMM_COLUMNS / M, B_BOXES = GEMM_COLUMNS / 64 / M };
    Tiles<M, N> tiles(rank_in_cluster());
    Ring<GEMM_STAGES> stages(1);
    unsigned short beside = 0, below = 0;
    for (int i = 0; i < N; i++)
        beside |= (unsigned short)(1 << (tiles.down + i * M));
    for (int i = 0; i < M; i++)
        below |= (unsigned short)(1 << (i + tiles.across * M));
    while (tiles.next(p))
        for (int step = 0; step < p.steps; step++, stages.step()) {
            const unsigned full = m.full + 8 * stages.stage;
            const unsigned a = m.stages + stages.stage * GEMM_STAGE, b = a + A_BYTES;
            const int k = step * GEMM_STEP;
            barrier_wait(m.empty + 8 * stages.stage, stages.phase);
            barrier_expect(full, GEMM_STAGE);
            bring_to(beside, a + tiles.across * A_ROWS * 128, &p.a, k,
                     tiles.row + tiles.across * A_ROWS, full);
            if constexpr (TURNED) {
#pragma unroll
                for (int i = 0; i < B_BOXES; i++) {
                    const int box = tiles.down * B_BOXES + i;
                    bring_to(below, b + box * GEMM_STEP * 128, &p.b, tiles.column + box * 64, k,
                             full);
                }
            } else {
                bring_to(below, b + tiles.down * B_ROWS * 128, &p.b, k,
                         tiles.column + tiles.down * B_ROWS, full);
            }
        }
}

// What is kept of a tile that is done, and where it belongs.
struct Done {
    unsigned words[PAIRS]; // in the order of the sums they are made of
    int row, column;
    bool there;
};

// The next 32 columns of it: to shared memory, and every second time from there to c.
__device__ inline void write_part(const pmli_gemm_hopper_params &p, const Done &done, int part,
                                  unsigned out, int group)
{
    const int thread = threadIdx.x % GROUP, lane = thread % 32, row = thread / 32 * 16 + lane % 16;
    const unsigned box = out + part / 2 % 2 * OUT_BOX;
    if (part % 2 == 0) {
        if (thread == 0) // the box before the last one is on its way
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        barrier_meet(1 + group, GROUP);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) { // 16 columns: eight rows and eight more, either eight columns
        const int pack = part % 2 * 4 + i * 2 + lane / 16;
        const unsigned *x = done.words + (part * 2 + i) * 4;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         box + row * 128 + ((pack ^ row % 8) << 4)),
                     "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                     : "memory");
    }
    if (part % 2 == 1) {
        show_writes();
        barrier_meet(1 + group, GROUP);
        if (thread == 0)
            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], "
                         "[%1];\n"
                         "cp.async.bulk.commit_group;" ::"l"(&p.c),
                         "r"(box), "r"(done.column + part / 2 * 64),
                         "r"(done.row + group * GROUP_ROWS)
                         : "memory");
    }
}

// A step's products, of so many times 16 of k; the group's 64 rows. Fewer than four are waited for:
// the compiler knows no group that a loop asks for.
template <typename T, int TURNED>
__device__ inline void ask_step(float (&d)[128], unsigned stage, int group, int first, int sixteens)
{
    const unsigned long long a = operand<BYTES_128>(stage + group * GROUP_ROWS * 128, 16, 1024);
    const unsigned long long b =
        operand<BYTES_128>(stage + A_BYTES, TURNED ? GEMM_STEP * 128 : 16, 1024);
    const int along = 2, down = 128; // 16 of k, in units of 16 bytes
    if (sixteens == 4) {
        products_begin();
#pragma unroll
        for (int i = 0; i < 4; i++)
            multiply<T, TURNED>(d, a + i * along, b + i * (TURNED ? down : along), !first || i);
        products_asked();
    } else {
#pragma unroll 1
        for (int i = 0; i < sixteens; i++) {
            products_begin();
            multiply<T, TURNED>(d, a + i * along, b + i * (TURNED ? down : along), 1);
            products_asked();
            products_left<0>();
        }
    }
}

template <typename T, int TURNED, int M, int N>
__device__ inline void multiply_all(const pmli_gemm_hopper_params &p, const Places &m, int group)
{
    const int thread = threadIdx.x % GROUP;
    const unsigned out = m.out + group * 2 * OUT_BOX;
    Tiles<M, N> tiles(rank_in_cluster());
    Ring<GEMM_STAGES> stages(0);
    // The blocks whose fetchers write to this one's memory: beside it, then below and above it.
    const int i = thread - N, other = i < tiles.down ? i : i + 1;
    const int fetcher = thread < N ? tiles.down + thread * M : other + tiles.across * M;
    const bool tells = thread < N + M - 1;
    int before = -1; // the stage of the step before, which its products still read
    float d[128];
    Done done;
    done.there = false;
    auto release = [&](int stage) {
        if (stage >= 0 && tells)
            barrier_arrive_at(fetcher, m.empty + 8 * stage);
    };
    auto make_step = [&](int first, int sixteens) {
        barrier_wait(m.full + 8 * stages.stage, stages.phase);
        ask_step<T, TURNED>(d, m.stages + stages.stage * GEMM_STAGE, group, first, sixteens);
    };
    auto end_step = [&] {
        products_left<1>();
        release(before);
        before = stages.stage;
        stages.step();
    };
    while (tiles.next(p)) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            make_step(part == 0, 4);
            if (done.there)
                write_part(p, done, part, out, group);
            end_step();
        }
#pragma unroll 1
        for (int step = PARTS; step + 1 < p.steps; step++) {
            make_step(0, 4);
            end_step();
        }
        make_step(0, p.last);
        products_left<0>();
        settled(d);
        release(before);
        release(stages.stage);
        stages.step();
        before = -1;
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            done.words[i] = narrow_two<T>(d[2 * i], d[2 * i + 1]);
        done.row = tiles.row, done.column = tiles.column, done.there = true;
    }
    if (done.there)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            write_part(p, done, part, out, group);
    if (thread == 0)
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// SECOND: beside the kernel before it, which is this product's other part, and ends behind it.
template <typename T, int TURNED, int M, int N, bool SECOND>
__device__ inline void gemm(const pmli_gemm_hopper_params &p)
{
    extern __shared__ unsigned char memory[];
    const Places m = places_in(memory);
    const int role = threadIdx.x / GROUP; // two groups multiply
    if (threadIdx.x == 0) {
        prefetch(&p.a), prefetch(&p.b), prefetch(&p.c);
        for (int i = 0; i < GEMM_STAGES; i++) {
            barrier_begin(m.full + 8 * i, 1);
            barrier_begin(m.empty + 8 * i, 2 * (M + N - 1)); // a group each
        }
        barriers_begun();
    }
    __syncthreads();
    cluster_meets();
    if (!SECOND)
        let_next_begin();
    if (role < 2) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        multiply_all<T, TURNED, M, N>(p, m, role);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x % GROUP == 0)
            fetch<TURNED, M, N>(p, m);
    }
    __syncthreads();
    cluster_meets(); // no block goes before what others send it has come
    if (SECOND)
        wait_for_kernel_before();
}
#endif

#if ON_HOPPER
#define BODY(T, turned, m, n, second) gemm<T, turned, m, n, second>(p)
#else
#define BODY(T, turned, m, n, second)
#endif
#define KERNELS(name, T)                                                                           \
    KERNEL(eight_nt_##name, T, 0, GEMM_DOWN, GEMM_ACROSS, false)                                   \
    KERNEL(eight_nn_##name, T, 1, GEMM_DOWN, GEMM_ACROSS, false)                                   \
    KERNEL(two_nt_##name, T, 0, GEMM_TWO, 1, true)                                                 \
    KERNEL(two_nn_##name, T, 1, GEMM_TWO, 1, true)
#define KERNEL(name, T, turned, m, n, second)                                                      \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)                                  \
        gemm_hopper_##name(const __grid_constant__ pmli_gemm_hopper_params p)                      \
    {                                                                                              \
        BODY(T, turned, m, n, second);                                                             \
    }
KERNELS(bf16, bf16)
KERNELS(f16, f16)
