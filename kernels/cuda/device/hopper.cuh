// What machine code for sm_90 can do beside what attention.cuh has: bytes that the copy engine
// brings and barriers in shared memory count; and for sm_90a alone tiles of tensors that it brings,
// and products of such tiles by four warps together. Elsewhere all of this is absent: a kernel that
// uses it is empty there, and the host does not start it.
#ifndef PMLI_CUDA_HOPPER_CUH
#define PMLI_CUDA_HOPPER_CUH

#include "attention.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ON_HOPPER 1
#else
#define ON_HOPPER 0
#endif

// ---- sm_90 and later: barriers in shared memory, by address, and bytes that they count ----

#if __CUDA_ARCH__ >= 900

__device__ inline void barrier_begin(unsigned barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// Behind the last barrier_begin, before a __syncthreads: the copy engine sees them, too.
__device__ inline void barriers_begun()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and bytes are on their way that count before the barrier's phase is over.
__device__ inline void barrier_expect(unsigned barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ inline void barrier_arrive(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Until the barrier's phase of this parity is over: that of the first one is 0.
__device__ inline void barrier_wait(unsigned barrier, unsigned parity)
{
    unsigned over = 0;
    while (over == 0)
        asm volatile("{ .reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(over)
                     : "r"(barrier), "r"(parity)
                     : "memory");
}

// This block's number in its cluster.
__device__ inline int rank_in_cluster()
{
    int block;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    return block;
}

// So many bytes that follow each other, 16 or more of them, both addresses on whole 16.
__device__ inline void bring_row(unsigned to, const void *from, int bytes, unsigned barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                 "%2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

#endif

#if ON_HOPPER

// ---- the copy engine's boxes ----

// Where they may begin in a block's shared memory, by address: the swizzle of 128 bytes repeats
// itself every 1024.
__device__ inline unsigned boxes_from(const void *memory)
{
    return (shared_address(memory) + 1023) & ~1023u;
}

// Its description of a tensor is read from afar: asked for before it is used.
__device__ inline void prefetch(const pmli_tensor_map *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of the tensor, from this column and row on, to shared memory; zeros where there is none.
__device__ inline void bring(unsigned to, const pmli_tensor_map *map, int column, int row,
                             unsigned barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}

// ---- warps of one block that wait for each other, and a ring of stages between them ----

// The numbered barriers of a block: `threads` of it come, those that pass do not wait.
__device__ inline void barrier_meet(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void barrier_pass(int barrier, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What threads wrote to shared memory before it will be seen by products and the copy engine.
__device__ inline void show_writes()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A ring of stages in shared memory: the one whose turn it is, and the parity of its barriers'
// phase.
template <int STAGES> struct Ring {
    int stage = 0;
    unsigned phase;
    __device__ inline explicit Ring(unsigned first) : phase(first)
    {
    }
    __device__ inline void step()
    {
        if (++stage == STAGES)
            stage = 0, phase ^= 1;
    }
};

// ---- a kernel that begins while the one before it ends ----

// By the one before, in every block: from here on the next one's blocks may be started.
__device__ inline void let_next_begin()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// By the next one, in every thread: what the one before wrote is there.
__device__ inline void wait_for_kernel_before()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- products by four warps ----

// A tile in shared memory, as a product's operand: rows of 128 or 32 bytes, as boxes of that width
// lie there. leading, stride: bytes from one such piece to the next, along either side.
enum Width { BYTES_128 = 1, BYTES_32 = 3 };

template <Width width>
__device__ inline unsigned long long operand(unsigned at, int leading, int stride)
{
    return (unsigned long long)((at & 0x3ffff) >> 4) | (unsigned long long)(leading >> 4) << 16 |
           (unsigned long long)(stride >> 4) << 32 | (unsigned long long)width << 62;
}

__device__ inline void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void products_end()
{
    asm volatile("wgmma.commit_group.sync.aligned;\n"
                 "wgmma.wait_group.sync.aligned 0;" ::
                     : "memory");
}

// Between products_begin and this: a group. Groups take place in the order they are
// asked for, and the registers that they write or read are theirs until products_left<N>(), N being
// the groups asked for since. ptxas sees through that only where a loop does not end with a group
// under way whose sums the loop reads.
__device__ inline void products_asked()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> __device__ inline void products_left()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving a use of sums above the wait for them.
template <int N> __device__ inline void settled(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(x[i])::"memory");
}

template <int N> __device__ inline void settled(unsigned (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(x[i])::"memory");
}

// d [64, 16] = a [64, 16] b [16, 16], or += it; by four warps, either operand turned or not.
template <typename T, int TURN_A, int TURN_B>
__device__ inline void product(float (&d)[8], unsigned long long a, unsigned long long b, int adds)
{
#define PRODUCT(type)                                                                              \
    asm volatile("{ .reg .pred p;\n"                                                               \
                 "setp.ne.b32 p, %10, 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " "                   \
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, %12; }"                  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),         \
                   "+f"(d[6]), "+f"(d[7])                                                          \
                 : "l"(a), "l"(b), "r"(adds), "n"(TURN_A), "n"(TURN_B))
    if constexpr (same<T, bf16>)
        PRODUCT("bf16");
    else
        PRODUCT("f16");
#undef PRODUCT
}

#endif
#endif
