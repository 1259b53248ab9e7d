// v = dy b and db = dy^T u, both from one pass over dy, which is all that takes time here: one of
// the two products alone is bound by reading it.
//
//   dy [T, N]      a block has COLUMNS columns of one adapter's part, and every n-th 32-row tile,
//   ┌───┬───┬──┐   n blocks for all of them, which pass through STAGES places in shared memory. Of
//   │ ▓ │   │  │   each tile a warp's 64 columns give 32 x 16 of v's partial sums, added over the
//   ├───┼───┼──┤   warps, and stay as 16 x 64 partial sums of db^T in registers.
//   └───┴───┴──┘   low_rank_sum adds the blocks' sums in order.
//
// All blocks begin with the last rows, which are in the second-level cache: dy has just been
// written, the first row first.
#include "attention.cuh"

static constexpr int ROWS = LOW_RANK_ROWS, COLUMNS = LOW_RANK_COLUMNS, RANK = LOW_RANK_RANK;
static constexpr int STAGES = LOW_RANK_STAGES, WARPS = 8, THREADS = 32 * WARPS;
static constexpr int TILE = ROWS * COLUMNS * 2, STAGE = TILE + ROWS * RANK * 2;
static constexpr int WARP_COLUMNS = COLUMNS / WARPS, STEPS = WARP_COLUMNS / 16;

// What a block works on.
struct Share {
    int adapter, column, columns; // of dy; the last may be short
    long long first, step;        // row tiles: the first, and how far it is to the next
    int count;                    // of them
};

__device__ inline Share share_of(const pmli_low_rank_params &p)
{
    Share s;
    s.adapter = 0;
    while (s.adapter + 1 < p.adapters && (int)blockIdx.x >= p.tile[s.adapter + 1])
        s.adapter++;
    const int at = (blockIdx.x - p.tile[s.adapter]) * COLUMNS;
    s.column = p.column[s.adapter] + at;
    s.columns = min(COLUMNS, p.columns[s.adapter] - at);
    const long long tiles = (p.tokens + ROWS - 1) / ROWS;
    s.first = tiles - 1 - blockIdx.y; // there are no more blocks than tiles
    s.step = -(long long)gridDim.y;
    s.count = (int)(s.first / gridDim.y) + 1;
    return s;
}

// Where this thread reads: its 16 bytes of a tile's first rows, and again every ROWS_A_PASS rows;
// with the first threads a piece of u. A row of 1 << 30 is nowhere.
static constexpr int UNITS = COLUMNS / 8, ROWS_A_PASS = THREADS / UNITS;
static_assert(ROWS_A_PASS == 4, "places repeat every second pass");

template <typename T> struct Places {
    const T *dy, *u;
    int row, u_row;
    unsigned place[2]; // in even and odd passes
};

template <typename T>
__device__ inline Places<T> places_of(const pmli_low_rank_params &p, const Share &s)
{
    const int row = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
    const int u_row = threadIdx.x / (RANK / 8), column = threadIdx.x % (RANK / 8) * 8;
    const long long first = s.first * ROWS;
    Places<T> t;
    t.dy = (const T *)p.dy + (first + row) * p.ld_dy + s.column + unit * 8;
    t.u = (const T *)p.u + (first + u_row) * p.ld_u + s.adapter * p.rank + column;
    t.row = unit * 8 < s.columns ? row : 1 << 30;
    t.u_row = u_row < ROWS && column < p.rank ? u_row : 1 << 30;
    t.place[0] = place<COLUMNS>(0, row, unit);
    t.place[1] = place<COLUMNS>(0, row + ROWS_A_PASS, unit);
    return t;
}

// A tile of dy and the same rows of u, which begin where its adapter's do; zeros around them. The
// next tile's places, `step` tiles on, are left in t.
template <typename T>
__device__ inline void load(const pmli_low_rank_params &p, Places<T> &t, unsigned stage,
                            long long tile, long long step)
{
    const int rows = (int)min((long long)ROWS, p.tokens - tile * ROWS);
#pragma unroll
    for (int i = 0; i < ROWS / ROWS_A_PASS; i++) {
        const bool there = t.row + i * ROWS_A_PASS < rows;
        copy_16(stage + t.place[i % 2] + i / 2 * 2 * ROWS_A_PASS * COLUMNS * 2,
                there ? t.dy + i * ROWS_A_PASS * p.ld_dy : (const T *)p.dy, there);
    }
    t.dy += step * ROWS * p.ld_dy;
    if (threadIdx.x < ROWS * RANK / 8) { // their places follow one another
        const bool there = t.u_row < rows;
        copy_16(stage + TILE + threadIdx.x * 16, there ? t.u : (const T *)p.u, there);
        t.u += step * ROWS * p.ld_u;
    }
}

// b of this warp's columns as right operands [16 columns, 8 of rank].
template <typename T>
__device__ inline void load_b(const pmli_low_rank_params &p, const Share &s,
                              unsigned b[STEPS][2][2])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int from = s.column - p.column[s.adapter];
    const T *rows = (const T *)p.b + (p.b_row[s.adapter] + from) * p.ld_b;
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const int n = warp * WARP_COLUMNS + k * 16 + pair * 8 + lane % 4 * 2;
                const int r = half * 8 + lane / 4;
                const bool there = n < s.columns && r < p.rank; // columns are whole eights
                b[k][half][pair] = there ? packed<T>(widen(rows[n * p.ld_b + r]),
                                                     widen(rows[(n + 1) * p.ld_b + r]))
                                         : 0;
            }
}

// The warps' sums of v's tile, one after the other; a thread has two neighbours.
__device__ inline void sum_v(const pmli_low_rank_params &p, const float *warps, long long tile)
{
    const int at = threadIdx.x * 2;
    const long long row = tile * ROWS + at / RANK;
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float2 more = *(const float2 *)(warps + w * ROWS * RANK + at);
        sum.x += more.x;
        sum.y += more.y;
    }
    if (row < p.tokens)
        *(float2 *)(p.v_parts + (blockIdx.x * p.tokens + row) * RANK + at % RANK) = sum;
}

// One 16-row half of a tile: v's part into `v`, db's onto `db`.
template <typename T>
__device__ inline void products(unsigned stage, int half, const unsigned b[STEPS][2][2],
                                float v[2][4], float db[STEPS * 2][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = half * 16;
    unsigned u[4], d[4];
    load_transposed(u, stage + TILE + (row + (lane & 7) + ((lane >> 4) & 1) * 8) * RANK * 2 +
                           ((lane >> 3) & 1) * 16);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const int unit = warp * (WARP_COLUMNS / 8) + k * 2;
        fragment_b_across<COLUMNS>(d, stage, row, unit);
        multiply<T>(db[2 * k], u, d[0], d[1]);
        multiply<T>(db[2 * k + 1], u, d[2], d[3]);
        fragment_a<COLUMNS>(d, stage, row, unit);
        multiply<T>(v[0], d, b[k][0][0], b[k][0][1]);
        multiply<T>(v[1], d, b[k][1][0], b[k][1][1]);
    }
}

// A fragment's 16 x 8 sums to rows of `ld` floats.
__device__ inline void store(float *to, long long ld, const float sums[4])
{
    const int lane = threadIdx.x % 32;
    float *at = to + lane / 4 * ld + lane % 4 * 2;
    *(float2 *)at = make_float2(sums[0], sums[1]);
    *(float2 *)(at + 8 * ld) = make_float2(sums[2], sums[3]);
}

template <typename T> __device__ void low_rank(const pmli_low_rank_params &p)
{
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned base = shared_address(memory);
    float *sums = (float *)(memory + STAGES * STAGE); // [2][WARPS][ROWS][RANK]
    const int warp = threadIdx.x / 32;
    const Share s = share_of(p);
    unsigned b[STEPS][2][2];
    float db[STEPS * 2][4] = {};
    Places<T> places = places_of<T>(p, s);
    load_b<T>(p, s, b);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < s.count)
            load<T>(p, places, base + i * STAGE, s.first + i * s.step, s.step);
        copy_commit();
    }
    for (int at = 0; at < s.count; at++) {
        const long long tile = s.first + at * s.step;
        const int next = at + STAGES - 1;
        copy_wait<STAGES - 2>();
        __syncthreads(); // the tile is there, and nobody reads the one before it
        if (next < s.count)
            load<T>(p, places, base + next % STAGES * STAGE, s.first + next * s.step, s.step);
        copy_commit();
        if (at > 0)
            sum_v(p, sums + (at - 1) % 2 * WARPS * ROWS * RANK, tile - s.step);
        float v[2][2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++)
            products<T>(base + at % STAGES * STAGE, half, b, v[half], db);
        float *mine = sums + (at % 2 * WARPS + warp) * ROWS * RANK;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                store(mine + half * 16 * RANK + r * 8, RANK, v[half][r]);
    }
    __syncthreads();
    sum_v(p, sums + (s.count - 1) % 2 * WARPS * ROWS * RANK, s.first + (s.count - 1) * s.step);
    const long long width = (long long)gridDim.x * COLUMNS;
    float *out = p.b_parts + blockIdx.y * RANK * width + (long long)blockIdx.x * COLUMNS +
                 warp * WARP_COLUMNS;
#pragma unroll
    for (int n = 0; n < STEPS * 2; n++)
        store(out + n * 8, width, db[n]);
}

// v = scale times the sum over its adapter's column tiles; db += the sum over parts. A thread has
// four neighbours of v, or four of a row of db. What it adds comes from far: eight reads at a time
// are under way.
template <typename T> __device__ void low_rank_sum(const pmli_low_rank_params &p)
{
    const int fours = p.rank / 4;
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item < p.tokens * p.adapters * fours) {
        const int quad = (int)(item % (p.adapters * fours)), adapter = quad / fours;
        const long long row = item / (p.adapters * fours);
        const int r = quad % fours * 4;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
        for (int tile = p.tile[adapter]; tile < p.tile[adapter + 1]; tile++) {
            const float4 x = *(const float4 *)(p.v_parts + (tile * p.tokens + row) * RANK + r);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        const float scale = p.scale[adapter];
        unsigned *v = (unsigned *)((T *)p.v + row * p.ld_v + adapter * p.rank + r);
        v[0] = packed<T>(scale * sum.x, scale * sum.y);
        v[1] = packed<T>(scale * sum.z, scale * sum.w);
        return;
    }
    item -= p.tokens * p.adapters * fours;
    const long long width = (long long)p.tile[p.adapters] * COLUMNS;
    const long long at = item % width; // neighbours read neighbouring columns
    const int r = (int)(item / width) * 4;
    int adapter = 0;
    while (adapter + 1 < p.adapters && at >= (long long)p.tile[adapter + 1] * COLUMNS)
        adapter++;
    const long long n = at - (long long)p.tile[adapter] * COLUMNS;
    if (r >= p.rank || n >= p.columns[adapter])
        return;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int part = 0; part < p.parts; part++) {
        const float *x = p.b_parts + (part * RANK + r) * width + at;
        sum.x += x[0], sum.y += x[width], sum.z += x[2 * width], sum.w += x[3 * width];
    }
    float4 *db = (float4 *)(p.db + (p.b_row[adapter] + n) * p.ld_db + r);
    const float4 old = *db;
    *db = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
}

#define KERNEL(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 1)                                           \
        low_rank_##suffix(const pmli_low_rank_params p)                                            \
    {                                                                                              \
        low_rank<T>(p);                                                                            \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        low_rank_sum_##suffix(const pmli_low_rank_params p)                                        \
    {                                                                                              \
        low_rank_sum<T>(p);                                                                        \
    }
KERNEL(bf16, bf16)
KERNEL(f16, f16)
