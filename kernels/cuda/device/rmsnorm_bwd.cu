// Backward of RMSNorm. A row at a time, held in registers as packs like the forward's: three reads
// and one write of tokens*hidden. The weight's gradient is a sum over tokens: blocks that stay keep
// their rows' part of it in registers, and columns.cu adds those up. Where a row has more packs
// than a block has threads, or no whole ones, columns.cu makes it by itself, before dx, which may
// lie on dy.
//
// T is the dtype of dy, R that of the gradient which runs down the residual line: float where
// T is f16. It is then written twice, the second time as T for products to read. W is the weight's:
// T, or float where it is trained. X is that of x: T, or float where the residual line begins with
// a table that is trained.
#include "hopper.cuh"
#include "params.h"
#include "row_total.cuh"
#include "types.cuh"

template <typename X, typename T, typename R, typename W, int PACKS>
__device__ void norm_bwd_registers(const pmli_rmsnorm_bwd_params &p)
{
    constexpr int N = 16 / sizeof(X);
    constexpr bool narrow_sum = same<T, R>; // dres waits in registers, too; a wide one has no room
    typedef Pack<T, N> pack;
    typedef Pack<R, N> sum_pack;
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const int packs = row < p.rows ? (int)(p.cols / N) : 0;
    const pack *dy = (const pack *)((const T *)p.dy + row * p.ld_dy);
    const Pack<X, N> *x = (const Pack<X, N> *)((const X *)p.x + row * p.ld_x);
    const sum_pack *dres =
        p.dres != nullptr ? (const sum_pack *)((const R *)p.dres + row * p.ld_dres) : nullptr;
    const Pack<W, N> *weight = (const Pack<W, N> *)p.weight;
    sum_pack *dx = (sum_pack *)((R *)p.dx + row * p.ld_dx);
    pack *rounded = p.rounded != nullptr ? (pack *)((T *)p.rounded + row * p.ld_rounded) : nullptr;

    pack held_dy[PACKS];
    Pack<X, N> held_x[PACKS];
    sum_pack held_res[narrow_sum ? PACKS : 1];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        held_dy[k] = read_once<T, N>((const T *)&dy[c]);
        held_x[k] = read_once<X, N>((const X *)&x[c]);
        if (narrow_sum && dres != nullptr)
            held_res[narrow_sum ? k : 0] = read_once<R, N>((const R *)&dres[c]);
    }
    float dot = 0;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        const Floats<N> g = widened(held_dy[k]), w = widened(weight[c]), s = widened(held_x[k]);
#pragma unroll
        for (int e = 0; e < N; e++)
            dot += g.at[e] * w.at[e] * s.at[e];
    }
    const float rstd = row < p.rows ? p.rstd[row] : 0.0f;
    const float back = row_total(dot) * rstd * rstd * rstd / (float)p.cols;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int c = k * blockDim.x + threadIdx.x;
        if (c >= packs)
            continue;
        Floats<N> d = widened(held_dy[k]);
        const Floats<N> w = widened(weight[c]), s = widened(held_x[k]);
#pragma unroll
        for (int e = 0; e < N; e++)
            d.at[e] = d.at[e] * w.at[e] * rstd - s.at[e] * back;
        if (dres != nullptr) {
            const Floats<N> res = widened(narrow_sum ? held_res[narrow_sum ? k : 0] : dres[c]);
#pragma unroll
            for (int e = 0; e < N; e++)
                d.at[e] += res.at[e];
        }
        if (rounded == nullptr) {
            dx[c] = narrowed<R>(d); // what comes next reads it, out of the cache in part
        } else {
            write_once<R, N>((R *)&dx[c], narrowed<R>(d));
            rounded[c] = narrowed<T>(d);
        }
    }
}

enum { MOST_ROWS = 16 }; // of a block, each a warp at least

// Rows that wait in shared memory, in several places by turns. A place has a row's dy, x and dres,
// as packs of 16 bytes: one a thread, two of an operand that is wider.
template <typename X, typename T, typename R> struct Operands {
    static constexpr int N = 16 / sizeof(T), OF_X = sizeof(X) / sizeof(T);
    static constexpr int OF_RES = sizeof(R) / sizeof(T), PACKS = 1 + OF_X + OF_RES;
    static constexpr int PLACES = PACKS == 3 ? RMSNORM_PLACES : RMSNORM_PLACES_WIDE;
};

#if ON_HOPPER

// The copy engine brings whole rows, asked for by a row's first thread:
//
//   [rows of a block][places][dy | x | dres]        and a barrier each place
template <typename X, typename T, typename R> struct Waiting : Operands<X, T, R> {
    typedef Operands<X, T, R> O;
    unsigned base, barriers; // of this thread's row
    int bytes;               // of a row of dy

    __device__ Waiting(const pmli_rmsnorm_bwd_params &p, unsigned memory)
    {
        __shared__ unsigned long long of_places[MOST_ROWS][O::PLACES];
        bytes = (int)p.cols * (int)sizeof(T);
        base = memory + threadIdx.y * O::PLACES * O::PACKS * blockDim.x * 16;
        barriers = shared_address(of_places[threadIdx.y]);
        if (threadIdx.x == 0)
            for (int i = 0; i < O::PLACES; i++)
                barrier_begin(barriers + i * 8, 1);
        barriers_begun();
        __syncthreads();
    }
    __device__ unsigned at(int place, int first) const
    {
        return base + (place * O::PACKS + first) * bytes;
    }

    // Not before all threads have what was in that place.
    __device__ void ask(const pmli_rmsnorm_bwd_params &p, long long row, int, int place) const
    {
        if (threadIdx.x != 0)
            return;
        const unsigned barrier = barriers + place * 8;
        if (row >= p.rows) {
            barrier_arrive(barrier);
            return;
        }
        barrier_expect(barrier, bytes * (1 + O::OF_X + (p.dres != nullptr ? O::OF_RES : 0)));
        bring_row(at(place, 0), (const T *)p.dy + row * p.ld_dy, bytes, barrier);
        bring_row(at(place, 1), (const X *)p.x + row * p.ld_x, bytes * O::OF_X, barrier);
        if (p.dres != nullptr)
            bring_row(at(place, 1 + O::OF_X), (const R *)p.dres + row * p.ld_dres,
                      bytes * O::OF_RES, barrier);
    }
    __device__ void wait(int turn) const
    {
        barrier_wait(barriers + turn % O::PLACES * 8, turn / O::PLACES % 2);
    }

    // Pack c of an operand, COUNT of 16 bytes.
    template <typename E, int COUNT>
    __device__ Pack<E, O::N> arrived(int place, int first, int c) const
    {
        Pack<E, O::N> x;
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            ((uint4 *)&x)[k] = from_shared(at(place, first) + (c * COUNT + k) * 16);
        return x;
    }
};

#else

// Each thread asks for its own packs, so that it need not wait for the other threads to read them:
//
//   [places][packs of dy, x and dres][threads] of 16 bytes
template <typename X, typename T, typename R> struct Waiting : Operands<X, T, R> {
    typedef Operands<X, T, R> O;
    unsigned base, threads;

    __device__ Waiting(const pmli_rmsnorm_bwd_params &, unsigned memory)
    {
        base = memory + (threadIdx.y * blockDim.x + threadIdx.x) * 16;
        threads = blockDim.x * blockDim.y;
    }
    __device__ unsigned at(int place, int pack) const
    {
        return base + ((place * O::PACKS + pack) * threads) * 16;
    }

    // What row has for this thread is on its way to a place.
    __device__ void ask(const pmli_rmsnorm_bwd_params &p, long long row, int c, int place) const
    {
        const bool there = row < p.rows && c < p.cols / O::N;
        ask_for<T, 1>((const T *)p.dy + row * p.ld_dy + c * O::N, there, p.x, place, 0);
        ask_for<X, O::OF_X>((const X *)p.x + row * p.ld_x + c * O::N, there, p.x, place, 1);
        if (p.dres != nullptr)
            ask_for<R, O::OF_RES>((const R *)p.dres + row * p.ld_dres + c * O::N, there, p.x, place,
                                  1 + O::OF_X);
        copy_commit();
    }
    // So many packs of an operand, from pack `first` of a place on; nothing: any address there is.
    template <typename E, int COUNT>
    __device__ void ask_for(const E *from, bool there, const void *nothing, int place,
                            int first) const
    {
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            copy_16(at(place, first + k),
                    there ? (const void *)(from + k * (16 / sizeof(E))) : nothing, there);
    }
    __device__ void wait(int) const
    {
        copy_wait<O::PLACES - 2>();
    }

    template <typename E, int COUNT>
    __device__ Pack<E, O::N> arrived(int place, int first, int) const
    {
        Pack<E, O::N> x;
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            ((uint4 *)&x)[k] = from_shared(at(place, first + k));
        return x;
    }
};

#endif

// The sum over the threads of one row; turn: 0 and 1 alternate, so that one barrier is enough.
__device__ inline float staying_total(float x, int turn)
{
    __shared__ float of_warp[2][32];
    const int warps = blockDim.x / 32, first = threadIdx.y * warps, lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    if (lane == 0)
        of_warp[turn][first + threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < warps ? of_warp[turn][first + lane] : 0.0f;
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// dx and a part of the weight's gradient. A thread has one pack of every row that it comes to;
// those of the next rows are on their way meanwhile.
template <typename X, typename T, typename R>
__device__ void norm_bwd_weight(const pmli_rmsnorm_bwd_params &p)
{
    typedef Waiting<X, T, R> Rows;
    constexpr int N = Rows::N, PLACES = Rows::PLACES;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float
        beside[256 * N]; // of a row of threads; where there are more rows it has no more
    const int c = threadIdx.x;
    const Rows rows(p, shared_address(memory));
    const bool there = c < p.cols / N;
    Pack<float, N> weight = {};
    if (there)
        weight = ((const Pack<float, N> *)p.weight)[c];
    float sums[N] = {};
    const long long stride = (long long)gridDim.x * blockDim.y;
    long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
#pragma unroll
    for (int i = 0; i < PLACES - 1; i++)
        rows.ask(p, row + i * stride, c, i);
    float next = row < p.rows ? p.rstd[row] : 0.0f;
    int turn = 0;
    for (long long first = (long long)blockIdx.x * blockDim.y; first < p.rows; first += stride) {
        const int place = turn % PLACES;
        const float rstd = next;
        rows.wait(turn);
        Pack<T, N> dy = {};
        Pack<X, N> x = {};
        if (there && row < p.rows) {
            dy = rows.template arrived<T, 1>(place, 0, c);
            x = rows.template arrived<X, Rows::OF_X>(place, 1, c);
        }
        next = row + stride < p.rows ? p.rstd[row + stride] : 0.0f;
        float dot = 0;
#pragma unroll
        for (int e = 0; e < N; e++) {
            const float product = widen(dy.at[e]) * widen(x.at[e]);
            dot += product * weight.at[e];
            sums[e] += product * rstd;
        }
        const float back = staying_total(dot, turn % 2) * rstd * rstd * rstd / (float)p.cols;
        // all threads have been here, so they are done with what was in that place
        rows.ask(p, row + (PLACES - 1) * stride, c, (turn + PLACES - 1) % PLACES);
        if (there && row < p.rows) {
            Pack<R, N> out, res = {};
            Pack<T, N> less;
            if (p.dres != nullptr)
                res = rows.template arrived<R, Rows::OF_RES>(place, 1 + Rows::OF_X, c);
#pragma unroll
            for (int e = 0; e < N; e++) {
                float d = widen(dy.at[e]) * weight.at[e] * rstd - widen(x.at[e]) * back;
                if (p.dres != nullptr)
                    d += widen(res.at[e]);
                out.at[e] = narrow<R>(d);
                less.at[e] = narrow<T>(d);
            }
            write_once<R, N>((R *)p.dx + row * p.ld_dx + c * N, out);
            if (p.rounded != nullptr)
                write_once<T, N>((T *)p.rounded + row * p.ld_rounded + c * N, less);
        }
        row += stride;
        turn++;
    }
    for (int y = 1; y < blockDim.y; y++) {
        __syncthreads();
        if (threadIdx.y == y)
#pragma unroll
            for (int e = 0; e < N; e++)
                beside[e * 256 + c] = sums[e];
        __syncthreads();
        if (threadIdx.y == 0)
#pragma unroll
            for (int e = 0; e < N; e++)
                sums[e] += beside[e * 256 + c];
    }
    if (there && threadIdx.y == 0)
#pragma unroll
        for (int e = 0; e < N; e += 4)
            *(float4 *)(p.parts + blockIdx.x * p.cols + c * N + e) =
                make_float4(sums[e], sums[e + 1], sums[e + 2], sums[e + 3]);
}

// Any row: element by element. A thread reads only what it wrote itself where dx lies on an input.
template <typename X, typename T, typename R, typename W>
__device__ void norm_bwd_any(const pmli_rmsnorm_bwd_params &p)
{
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const long long cols = row < p.rows ? p.cols : 0;
    const T *dy = (const T *)p.dy + row * p.ld_dy;
    const X *x = (const X *)p.x + row * p.ld_x;
    const W *weight = (const W *)p.weight;
    const R *dres = (const R *)p.dres + row * p.ld_dres;
    R *dx = (R *)p.dx + row * p.ld_dx;
    T *rounded = (T *)p.rounded + row * p.ld_rounded;
    float dot = 0;
    for (long long c = threadIdx.x; c < cols; c += blockDim.x)
        dot += widen(dy[c]) * widen(weight[c]) * widen(x[c]);
    const float rstd = row < p.rows ? p.rstd[row] : 0.0f;
    const float back = row_total(dot) * rstd * rstd * rstd / (float)p.cols;
    for (long long c = threadIdx.x; c < cols; c += blockDim.x) {
        float d = widen(dy[c]) * widen(weight[c]) * rstd - widen(x[c]) * back;
        if (p.dres != nullptr)
            d += widen(dres[c]);
        dx[c] = narrow<R>(d);
        if (p.rounded != nullptr)
            rounded[c] = narrow<T>(d);
    }
}

#define REGISTERS(name, X, T, R, W, PACKS)                                                         \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_bwd_params p)       \
    {                                                                                              \
        norm_bwd_registers<X, T, R, W, PACKS>(p);                                                  \
    }
#define NORM(name, X, T, R, W)                                                                     \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_bwd_params p)       \
    {                                                                                              \
        norm_bwd_any<X, T, R, W>(p);                                                               \
    }                                                                                              \
    REGISTERS(name##_x1, X, T, R, W, 1)                                                            \
    REGISTERS(name##_x2, X, T, R, W, 2)                                                            \
    REGISTERS(name##_x4, X, T, R, W, 4)
#define WEIGHT(name, X, T, R)                                                                      \
    extern "C" __global__ void __launch_bounds__(1024) name(const pmli_rmsnorm_bwd_params p)       \
    {                                                                                              \
        norm_bwd_weight<X, T, R>(p);                                                               \
    }

NORM(rmsnorm_bwd_f32, float, float, float, float)
NORM(rmsnorm_bwd_bf16, bf16, bf16, bf16, bf16)
NORM(rmsnorm_bwd_f16, f16, f16, f16, f16)
NORM(rmsnorm_bwd_f16_to_f32, f16, f16, float, f16)
NORM(rmsnorm_bwd_trained_bf16, bf16, bf16, bf16, float)
NORM(rmsnorm_bwd_trained_f16, f16, f16, f16, float)
NORM(rmsnorm_bwd_trained_f16_to_f32, f16, f16, float, float)
NORM(rmsnorm_bwd_begins_bf16, float, bf16, bf16, float)
NORM(rmsnorm_bwd_begins_f16, float, f16, f16, float)
NORM(rmsnorm_bwd_begins_f16_to_f32, float, f16, float, float)
WEIGHT(rmsnorm_bwd_weight_f32, float, float, float)
WEIGHT(rmsnorm_bwd_weight_bf16, bf16, bf16, bf16)
WEIGHT(rmsnorm_bwd_weight_f16, f16, f16, f16)
WEIGHT(rmsnorm_bwd_weight_f16_to_f32, f16, f16, float)
WEIGHT(rmsnorm_bwd_weight_begins_bf16, float, bf16, bf16)
WEIGHT(rmsnorm_bwd_weight_begins_f16, float, f16, f16)
WEIGHT(rmsnorm_bwd_weight_begins_f16_to_f32, float, f16, float)
