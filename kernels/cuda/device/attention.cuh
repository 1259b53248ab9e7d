// What the attention kernels share: finding a tile's document, tensor-core products, shared-memory
// tiles.
#ifndef PMLI_CUDA_ATTENTION_CUH
#define PMLI_CUDA_ATTENTION_CUH

#include "params.h"
#include "types.cuh"

#define ALL_LANES 0xffffffffu
#define LOG2_E    1.4426950408889634f
#define LN_2      0.6931471805599453f

// A tile of at most `size` rows of one document, on the queries' or the keys' side. The rows behind
// the last document are a document of their own without any partner (cu of the other side ends).
struct Tile {
    int document; // -1: the grid has more tiles than there are
    int begin;    // the document's first row
    int rows;     // of the document
    int first;    // of the tile, within the document
};

// Every warp finds it for itself. cu [slots + 1]; total rows of this side.
__device__ inline Tile find_tile(const int *cu, int slots, long long total, int size, int index)
{
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int base = 0; base <= slots; base += 32) {
        const int d = base + lane;
        const int begin = d <= slots ? cu[d] : 0;
        const int rows = d < slots ? cu[d + 1] - begin : d == slots ? (int)total - begin : 0;
        const int tiles = (rows + size - 1) / size;
        int sum = tiles;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int left = __shfl_up_sync(ALL_LANES, sum, step);
            sum += lane >= step ? left : 0;
        }
        const int from = before + sum - tiles;
        const unsigned here = __ballot_sync(ALL_LANES, index >= from && index < from + tiles);
        if (here != 0) {
            const int who = __ffs((int)here) - 1;
            return {base + who, __shfl_sync(ALL_LANES, begin, who),
                    __shfl_sync(ALL_LANES, rows, who),
                    (index - __shfl_sync(ALL_LANES, from, who)) * size};
        }
        before += __shfl_sync(ALL_LANES, sum, 31);
    }
    return {-1, 0, 0, 0};
}

// The partner's rows of a document: begin and count; none for the rows behind the last document.
__device__ inline int2 partner(const int *cu, int slots, int document)
{
    if (document >= slots)
        return {0, 0};
    return {cu[document], cu[document + 1] - cu[document]};
}

__device__ inline unsigned shared_address(const void *p)
{
    return (unsigned)__cvta_generic_to_shared(p);
}

// 16 bytes of shared memory.
__device__ inline uint4 from_shared(unsigned address)
{
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ inline void to_shared(unsigned address, const uint4 &x)
{
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}

// 16 bytes from global to shared memory, zeros where not valid. Asynchronous where the chip can.
__device__ inline void copy_16(unsigned to, const void *from, bool valid)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0));
#else
    to_shared(to, valid ? *(const uint4 *)from : uint4{0, 0, 0, 0});
#endif
}

__device__ inline void copy_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

// Until at most N of the committed groups are under way.
template <int N> __device__ inline void copy_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

__device__ inline void load_matrices(unsigned r[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ inline void load_transposed(unsigned r[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// d [16,8] += a [16,16] b [16,8].
template <typename T>
__device__ inline void multiply(float d[4], const unsigned a[4], unsigned b0, unsigned b1);

template <>
__device__ inline void multiply<bf16>(float d[4], const unsigned a[4], unsigned b0, unsigned b1)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap(); // the host does not choose bfloat16 tiles before sm_80
#endif
}

template <>
__device__ inline void multiply<f16>(float d[4], const unsigned a[4], unsigned b0, unsigned b1)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <typename T> __device__ inline unsigned packed(float low, float high)
{
    Pack<T, 2> two;
    two.at[0] = narrow<T>(low);
    two.at[1] = narrow<T>(high);
    return *(unsigned *)&two;
}

// exp2 by the special function unit: its error is far below that of the 16-bit operands.
__device__ inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A tile in shared memory: rows of D 16-bit elements in 16-byte units, the unit's number xor-ed
// with the row's so that eight rows at one unit lie in eight different bank groups.
template <int D> __device__ inline unsigned place(unsigned tile, int row, int unit)
{
    return tile + (unsigned)(row * D * 2 + ((unit ^ (row & 7)) << 4));
}

// ROWS rows of D elements by THREADS threads; rows from `valid` on become zeros.
template <typename T, int D, int ROWS, int THREADS>
__device__ inline void load_tile(unsigned tile, const T *from, long long ld, int valid)
{
    constexpr int UNITS = D / 8;
#pragma unroll
    for (int i = 0; i < ROWS * UNITS / THREADS; i++) {
        const int at = i * THREADS + threadIdx.x, row = at / UNITS, unit = at % UNITS;
        const bool there = row < valid;
        copy_16(place<D>(tile, row, unit), from + (there ? row : 0) * ld + unit * 8, there);
    }
}

// Fragments. `rows`: the tile's first row of the fragment, `unit`: its first 16-byte unit.
//   a:          16 rows x 16 columns, left operand
//   b:          two right operands [16 columns, 8 rows], rows taken as columns of the product
//   b_across:   two right operands [16 rows, 8 columns], as they lie
template <int D> __device__ inline void fragment_a(unsigned r[4], unsigned tile, int row, int unit)
{
    const int lane = threadIdx.x % 32;
    load_matrices(r, place<D>(tile, row + (lane & 15), unit + (lane >> 4)));
}

template <int D> __device__ inline void fragment_b(unsigned r[4], unsigned tile, int row, int unit)
{
    const int lane = threadIdx.x % 32;
    load_matrices(
        r, place<D>(tile, row + (lane & 7) + ((lane >> 4) & 1) * 8, unit + ((lane >> 3) & 1)));
}

template <int D>
__device__ inline void fragment_b_across(unsigned r[4], unsigned tile, int row, int unit)
{
    const int lane = threadIdx.x % 32;
    load_transposed(r, place<D>(tile, row + (lane & 15), unit + (lane >> 4)));
}

// acc [16, 8 n] of this warp times `by` (one factor for rows 0-7 and 8-15 each) into its 16 rows of
// a tile in shared memory, which no other warp reads, and from there to rows [0, valid) of `to`.
template <typename T, int D>
__device__ inline void store_rows(float acc[D / 8][4], float by_low, float by_high, unsigned tile,
                                  int row, T *to, long long ld, int valid)
{
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(place<D>(tile, row + g, n) + t * 4),
                     "r"(packed<T>(acc[n][0] * by_low, acc[n][1] * by_low)));
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(place<D>(tile, row + g + 8, n) + t * 4),
                     "r"(packed<T>(acc[n][2] * by_high, acc[n][3] * by_high)));
    }
    __syncwarp();
    constexpr int UNITS = D / 8;
#pragma unroll
    for (int i = 0; i < 16 * UNITS / 32; i++) {
        const int at = i * 32 + lane, r = at / UNITS, unit = at % UNITS;
        const uint4 x = from_shared(place<D>(tile, row + r, unit));
        if (r < valid)
            *(uint4 *)(to + r * ld + unit * 8) = x;
    }
}

#endif
