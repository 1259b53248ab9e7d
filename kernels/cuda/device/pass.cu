// v = x b and d += x^T u by one pass over x, for sm_90a: reading x is all that takes time.
// (low_rank.cu does the same on other chips.)
//
//   x [rows, N]    a block has the columns of one tile of one adapter's part, and every n-th 64 of
//   ┌───┬───┬──┐   the rows, n blocks for all of them. A warp asks the copy engine for x and u of a
//   │ ▓ │   │  │   stage, 64 x 256, as soon as one of the places in shared memory is free: up to
//   ├───┼───┼──┤   five of 34 KiB are on their way. Four warps make v's sums of it, four d's, which
//   └───┴───┴──┘   stay in registers.
//
// Sums over blocks are made by a second kernel, in order, whose blocks are there before this one
// ends. All blocks begin with the last rows, which are in the second-level cache where x has just
// been written, the first row first.
#include "hopper.cuh"

#if ON_HOPPER
static constexpr int ROWS = PASS_ROWS, STAGES = PASS_STAGES, BOXES = PASS_COLUMNS / 64;
static constexpr int BOX = ROWS * 64 * 2, U_BOX = ROWS * 16 * 2; // bytes
static constexpr int FETCHER = 8;                                // the warp that asks for tiles

static constexpr int HALVES = PASS_HALVES, COLUMNS = HALVES * PASS_COLUMNS; // a block's
static constexpr int STAGE = PASS_STAGE;
static constexpr int FOURS = COLUMNS * 4; // of a block's sums for d
static_assert(STAGE == BOXES * BOX + U_BOX, "a stage is x's boxes, then u's");
static_assert((2 * STAGES + 1) * 8 <= 256, "barriers");

// What a block works on.
struct Share {
    int adapter, column; // of its part
    int first, count;    // row tiles: the last one of all or one before, and how many
};

__device__ inline Share share_of(const pmli_pass_params &p)
{
    Share s;
    s.adapter = 0;
    while (s.adapter + 1 < p.adapters && (int)blockIdx.x >= p.tile[s.adapter + 1])
        s.adapter++;
    s.column = ((int)blockIdx.x - p.tile[s.adapter]) * COLUMNS;
    s.first = (int)((p.rows + ROWS - 1) / ROWS) - 1 - (int)blockIdx.y; // no more groups than tiles
    s.count = s.first / p.groups + 1;
    return s;
}

// Shared memory, by address.
struct Places {
    unsigned stages, b, full, empty, b_there;
};

__device__ inline Places places_in(unsigned char *memory)
{
    Places m;
    m.stages = boxes_from(memory);
    m.b = m.stages + STAGES * STAGE;
    m.full = m.b + PASS_B;
    m.empty = m.full + 8 * STAGES;
    m.b_there = m.empty + 8 * STAGES;
    return m;
}

// Asks for everything: one thread.
__device__ inline void fetch(const pmli_pass_params &p, const Share &s, const Places &m)
{
    const pmli_tensor_map *x = &p.x[s.adapter], *b = &p.b[s.adapter];
    const int u_column = s.adapter * p.rank;
    barrier_expect(m.b_there, PASS_B);
    for (int c = 0; c < COLUMNS; c += 256)
        bring(m.b + c * 32, b, 0, s.column + c, m.b_there);
    int at = 0;
    for (int i = 0; i < s.count; i++) {
        const int row = (s.first - i * p.groups) * ROWS;
#pragma unroll 1
        for (int h = 0; h < HALVES; h++, at++) {
            const int place = at % STAGES, column = s.column + h * PASS_COLUMNS;
            const unsigned stage = m.stages + place * STAGE, full = m.full + 8 * place;
            if (at >= STAGES)
                barrier_wait(m.empty + 8 * place, (at / STAGES - 1) & 1);
            barrier_expect(full, STAGE);
#pragma unroll
            for (int q = 0; q < BOXES; q++)
                bring(stage + q * BOX, x, column + q * 64, row, full);
            bring(stage + BOXES * BOX, &p.u, u_column, row, full);
        }
    }
}

// A lane's sums of eight columns' pairs: half of its rows, of 16 columns.
__device__ inline float4 four_of(const float *sums, int half)
{
    const float *at = sums + 2 * half;
    return make_float4(at[0], at[1], at[4], at[5]);
}

// v's partial sums: four warps. A tile's are written when all of its columns have been here.
template <typename T>
__device__ inline void make_v(const pmli_pass_params &p, const Share &s, const Places &m)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long tiles = (p.rows + ROWS - 1) / ROWS;
    float v[8] = {};
    barrier_wait(m.b_there, 0);
    int at = 0;
    for (int i = 0; i < s.count; i++) {
#pragma unroll
        for (int h = 0; h < HALVES; h++, at++) {
            const int place = at % STAGES;
            const unsigned stage = m.stages + place * STAGE;
            barrier_wait(m.full + 8 * place, (at / STAGES) & 1);
            products_begin();
#pragma unroll
            for (int q = 0; q < BOXES; q++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    product<T, 0, 1>(
                        v, operand<BYTES_128>(stage + q * BOX + k * 32, 16, 1024),
                        operand<BYTES_32>(m.b + ((h * BOXES + q) * 4 + k) * 16 * 32, 256, 256),
                        h | q | k); // the first of a tile's adds to nothing
            products_end();
            if (lane == 0)
                barrier_arrive(m.empty + 8 * place);
        }
        const long long tile = blockIdx.x * tiles + s.first - i * p.groups;
        float4 *to = (float4 *)p.v_parts + tile * (ROWS * 16 / 4) + warp * 64 + lane;
        to[0] = four_of(v, 0);
        to[32] = four_of(v, 1);
    }
}

// d's partial sums: four warps.
template <typename T>
__device__ inline void make_d(const pmli_pass_params &p, const Share &s, const Places &m)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float d[HALVES][BOXES][8] = {};
    int at = 0;
    for (int i = 0; i < s.count; i++)
#pragma unroll
        for (int h = 0; h < HALVES; h++, at++) {
            const int place = at % STAGES;
            const unsigned stage = m.stages + place * STAGE, u = stage + BOXES * BOX;
            barrier_wait(m.full + 8 * place, (at / STAGES) & 1);
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int q = 0; q < BOXES; q++)
                    product<T, 1, 1>(d[h][q],
                                     operand<BYTES_128>(stage + q * BOX + k * 16 * 128, BOX, 1024),
                                     operand<BYTES_32>(u + k * 16 * 32, U_BOX, 256), 1);
            products_end();
            if (lane == 0)
                barrier_arrive(m.empty + 8 * place);
        }
    const long long block = (long long)blockIdx.y * p.tile[p.adapters] + blockIdx.x;
    float4 *to = (float4 *)p.d_parts + block * FOURS + lane;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int q = 0; q < BOXES; q++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                to[(((h * BOXES + q) * 4 + warp % 4) * 2 + half) * 32] = four_of(d[h][q], half);
}

template <typename T> __device__ inline void pass(const pmli_pass_params &p)
{
    extern __shared__ unsigned char memory[];
    const Places m = places_in(memory);
    const Share s = share_of(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == FETCHER && lane < 3)
        prefetch(lane == 0 ? &p.x[s.adapter] : lane == 1 ? &p.b[s.adapter] : &p.u);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_begin(m.full + 8 * i, 1);
            barrier_begin(m.empty + 8 * i, 8); // a warp each
        }
        barrier_begin(m.b_there, 1);
        barriers_begun();
    }
    __syncthreads();
    let_next_begin();
    if (warp == FETCHER) {
        if (lane == 0)
            fetch(p, s, m);
    } else if (warp < 4) {
        make_v<T>(p, s, m);
    } else {
        make_d<T>(p, s, m);
    }
}

// What a thread adds comes from far: eight reads at a time are under way.
__device__ inline float4 sum_of(const float4 *parts, int count, long long step)
{
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int i = 0; i < count; i++) {
        const float4 x = parts[i * step];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    return sum;
}

// v of a lane's four sums: two neighbours each in either eight columns.
template <typename T>
__device__ inline void sum_v(const pmli_pass_params &p, int adapter, long long at, long long each)
{
    const int lane = threadIdx.x % 32, from = p.tile[adapter];
    const long long row = at / 32 * 8 + lane / 4;
    const float4 sum =
        sum_of((const float4 *)p.v_parts + from * each + at, p.tile[adapter + 1] - from, each);
    if (row >= p.rows)
        return;
    const float scale = p.scale[adapter];
    T *v = (T *)p.v + row * p.ld_v + adapter * p.rank + lane % 4 * 2;
    *(unsigned *)v = narrow_two<T>(scale * sum.x, scale * sum.y);
    if (p.rank > 8)
        *(unsigned *)(v + 8) = narrow_two<T>(scale * sum.z, scale * sum.w);
}

// d += the sum over blocks: a column of x, and of u's columns two neighbours in either eight.
// What d had is read before the sums are there.
__device__ inline void sum_d(const pmli_pass_params &p, long long item)
{
    const int lane = threadIdx.x % 32, tile = (int)(item / FOURS), at = (int)(item % FOURS);
    int adapter = 0;
    while (adapter + 1 < p.adapters && tile >= p.tile[adapter + 1])
        adapter++;
    const int n = (tile - p.tile[adapter]) * COLUMNS + at / 32 * 8 + lane / 4;
    const int r = lane % 4 * 2;
    const bool there = tile < p.tile[p.adapters] && n < p.columns[adapter];
    const bool low = there && r < p.rank, high = there && r + 8 < p.rank;
    float *d = p.d + (p.d_row[adapter] + n) * p.ld_d + r;
    float4 old = make_float4(0, 0, 0, 0);
    if (low)
        old.x = d[0], old.y = d[1];
    if (high)
        old.z = d[8], old.w = d[9];
    wait_for_kernel_before();
    if (!there)
        return;
    const float4 sum = sum_of((const float4 *)p.d_parts + (long long)tile * FOURS + at, p.groups,
                              (long long)p.tile[p.adapters] * FOURS);
    if (low)
        d[0] = old.x + sum.x, d[1] = old.y + sum.y;
    if (high)
        d[8] = old.z + sum.z, d[9] = old.w + sum.w;
}

template <typename T> __device__ inline void back_sum(const pmli_pass_params &p)
{
    const long long each = (p.rows + ROWS - 1) / ROWS * (ROWS * 16 / 4), v = each * p.adapters;
    const long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= v) { // whole blocks: a tile has 256 fours
        sum_d(p, item - v);
        return;
    }
    wait_for_kernel_before();
    sum_v<T>(p, (int)(item / each), item % each, each);
}

#define ON_HOPPER_ONLY(body) body
#else
#define ON_HOPPER_ONLY(body)
#endif

#define PASS(name, body)                                                                           \
    extern "C" __global__ void __launch_bounds__(PASS_THREADS, 1)                                  \
        name(const __grid_constant__ pmli_pass_params p)                                           \
    {                                                                                              \
        ON_HOPPER_ONLY(body(p));                                                                   \
    }
#define SUMS(name, body)                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        name(const __grid_constant__ pmli_pass_params p)                                           \
    {                                                                                              \
        ON_HOPPER_ONLY(body);                                                                      \
    }
#define OF_DTYPE(T, suffix)                                                                        \
    PASS(pass_back_##suffix, pass<T>)                                                              \
    SUMS(pass_back_sum_##suffix, back_sum<T>(p))
OF_DTYPE(bf16, bf16)
OF_DTYPE(f16, f16)
