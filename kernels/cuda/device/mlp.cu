// SwiGLU, forward and backward, with what the adapters of the linear layers beside it want of the
// elements in hand: sums of products with matrices of at most 16 columns, whose arithmetic hides
// behind the pass over gate, up and dh that SwiGLU is.
//
//   gate_up [T, 2I], dh [T, I]     a block has COLUMNS columns of gate, the same of up (and of dh),
//   ┌───┬───┬──┐                   and a range of 16-row tiles, which pass through a few places in
//   │ ▓ │   │  │                   shared memory. 512 threads make h of a tile (or dgate, dup, h)
//   ├───┼───┼──┤                   where it lies and write it out; a tile later the 16 warps
//   └───┴───┴──┘                   multiply it, so that one barrier a tile is enough.
//
// Sums over columns are added over the warps and left for each column tile, sums over rows for each
// range; mlp_sum and mlp_bwd_sum add them in order.
#include "attention.cuh"
#include "fp8.cuh"
#include "swiglu.cuh"

static constexpr int ROWS = MLP_ROWS, COLUMNS = MLP_COLUMNS, RANK = MLP_RANK;
static constexpr int THREADS = 512, TILE = ROWS * COLUMNS * 2, FACTOR = ROWS * RANK * 2;
static constexpr int UNITS = COLUMNS / 8, PASSES = ROWS * UNITS / THREADS;
static_assert(THREADS / UNITS == 8, "a pass moves on by whole eights of rows");

// What a block works on.
struct Share {
    int column, columns;  // of gate; the last may be short
    long long first, end; // row tiles
};

__device__ inline Share share_of(long long tokens, long long cols)
{
    Share s;
    s.column = blockIdx.x * COLUMNS;
    s.columns = (int)min((long long)COLUMNS, cols - s.column);
    const long long tiles = (tokens + ROWS - 1) / ROWS;
    s.first = tiles * blockIdx.y / gridDim.y;
    s.end = tiles * (blockIdx.y + 1) / gridDim.y;
    return s;
}

// This thread's 16 bytes of a tile: in row `row`, and again every ROWS_A_PASS rows, where they lie
// at the same place modulo eight rows. Of a column that is not there, no row is.
static constexpr int ROWS_A_PASS = THREADS / UNITS;

struct Unit {
    int row, column;
    unsigned place;
};

__device__ inline Unit unit_of(const Share &s)
{
    const int row = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
    return {unit * 8 < s.columns ? row : 1 << 30, s.column + unit * 8,
            place<COLUMNS>(0, row, unit)};
}

__device__ inline int rows_of(long long tokens, long long tile)
{
    return (int)min((long long)ROWS, tokens - tile * ROWS);
}

// Two neighbours in shared or global memory as one register.
template <typename T> __device__ inline unsigned two(const T *p)
{
    return *(const unsigned *)p;
}

// A fragment's 16 x 8 sums to rows of `ld` floats.
__device__ inline void store(float *to, long long ld, const float sums[4])
{
    const int lane = threadIdx.x % 32;
    float *at = to + lane / 4 * ld + lane % 4 * 2;
    *(float2 *)at = make_float2(sums[0], sums[1]);
    *(float2 *)(at + 8 * ld) = make_float2(sums[2], sums[3]);
}

// ---- forward: h, and u = h a^T ----

static constexpr int STAGES = MLP_STAGES, STAGE = 2 * TILE, GROUPS = 8;

// gate's and up's tile, from this thread's place in its first row on.
template <typename T>
__device__ inline void load(const pmli_mlp_params &p, const Unit &u, unsigned stage, const T *gate,
                            int rows)
{
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const bool there = u.row + i * ROWS_A_PASS < rows;
        const T *from = there ? gate + i * ROWS_A_PASS * p.ld_gate_up : (const T *)p.gate_up;
        const unsigned to = stage + u.place + i * ROWS_A_PASS * COLUMNS * 2;
        copy_16(to, from, there);
        copy_16(to + TILE, there ? from + p.cols : from, there);
    }
}

// a's rows nt*8.. as right operands [16 columns, 8 of rank] for this warp's 64 columns.
template <typename T>
__device__ inline void load_a(const pmli_mlp_params &p, const Share &s, unsigned a[4][2])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int r = warp % 2 * 8 + lane / 4;
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int n = warp / 2 * 64 + k * 16 + pair * 8 + lane % 4 * 2;
            const bool there = n < s.columns && r < p.rank; // columns are whole eights
            a[k][pair] = there ? two((const T *)p.a + r * p.ld_a + s.column + n) : 0;
        }
}

// The groups' sums of u's tile, one after the other.
__device__ inline void sum_u(const pmli_mlp_params &p, const float *groups, long long tile)
{
    const int at = threadIdx.x;
    const long long row = tile * ROWS + at / RANK;
    if (at >= ROWS * RANK || row >= p.tokens)
        return;
    float sum = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        sum += groups[g * ROWS * RANK + at];
    p.parts[(blockIdx.x * p.tokens + row) * RANK + at % RANK] = sum;
}

// A warp has a piece of a row, as linear layers in 8 bits take it.
static_assert(COLUMNS % FP8_PIECE == 0 && FP8_PIECE == 32 * 8, "units of a warp are a piece");

// The same numbers, of which the compiler does not see how each was rounded: it would round those
// that are used by themselves one by one, by an instruction a quarter as fast as that for a pair.
template <typename T> __device__ inline Pack<T, 8> in_pairs(const Pack<T, 8> &x)
{
    Pack<unsigned, 4> pairs = *(const Pack<unsigned, 4> *)&x;
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm("" : "+r"(pairs.at[i]));
    return *(const Pack<T, 8> *)&pairs;
}

// A tile in shared memory, and h: gate becomes h. CODES: h are codes, an element a byte.
template <typename T, bool CODES>
__device__ inline void forth(const pmli_mlp_params &p, const Unit &u, unsigned char *stage,
                             unsigned char *h, float *pieces, int rows)
{
    Pack<T, 8> made[PASSES];
    bool there[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        unsigned char *at = stage + u.place + i * ROWS_A_PASS * COLUMNS * 2;
        const Pack<T, 8> gate = *(Pack<T, 8> *)at, up = *(Pack<T, 8> *)(at + TILE);
        made[i] = in_pairs(swiglu_of<T, 8>(gate, up));
        *(Pack<T, 8> *)at = made[i];
        there[i] = u.row + i * ROWS_A_PASS < rows;
        if (!CODES && there[i])
            *(Pack<T, 8> *)(h + i * ROWS_A_PASS * p.ld_h * sizeof(T)) = made[i];
    }
    if constexpr (CODES)
        put_pieces<T, PASSES>(made, nullptr, there, h, ROWS_A_PASS * p.ld_h, pieces,
                              ROWS_A_PASS * p.ld_pieces);
}

template <typename T, bool CODES> __device__ void mlp(const pmli_mlp_params &p)
{
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned base = shared_address(memory);
    float *sums = (float *)(memory + STAGES * STAGE); // [2][GROUPS][ROWS][RANK]
    const int warp = threadIdx.x / 32, group = warp / 2, half = warp % 2;
    const Share s = share_of(p.tokens, p.cols);
    const Unit unit = unit_of(s);
    const long long first = s.first * ROWS + unit.row; // only looked at where the column is there
    const T *gate = (const T *)p.gate_up + first * p.ld_gate_up + unit.column;
    constexpr int SIZE = CODES ? 1 : sizeof(T);
    unsigned char *h = (unsigned char *)p.h + (first * p.ld_h + unit.column) * SIZE;
    float *pieces = CODES ? p.pieces + first * p.ld_pieces + unit.column / FP8_PIECE : nullptr;
    unsigned a[4][2];
    load_a<T>(p, s, a);
#pragma unroll
    for (int i = 0; i < STAGES - 2; i++, gate += ROWS * p.ld_gate_up) {
        if (s.first + i < s.end)
            load<T>(p, unit, base + i * STAGE, gate, rows_of(p.tokens, s.first + i));
        copy_commit();
    }
    for (long long tile = s.first; tile <= s.end; tile++) {
        const int at = (int)(tile - s.first), next = at + STAGES - 2;
        copy_wait<STAGES - 3>();
        __syncthreads(); // the tile is there, h of the one before it too
        if (s.first + next < s.end)
            load<T>(p, unit, base + next % STAGES * STAGE, gate, rows_of(p.tokens, s.first + next));
        gate += ROWS * p.ld_gate_up;
        copy_commit();
        if (at >= 2)
            sum_u(p, sums + at % 2 * GROUPS * ROWS * RANK, tile - 2);
        if (tile < s.end)
            forth<T, CODES>(p, unit, memory + at % STAGES * STAGE, h, pieces,
                            rows_of(p.tokens, tile));
        h += ROWS * p.ld_h * SIZE;
        if (CODES)
            pieces += ROWS * p.ld_pieces;
        if (at > 0) {
            const unsigned stage = base + (at - 1) % STAGES * STAGE;
            float u[4] = {};
            unsigned x[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                fragment_a<COLUMNS>(x, stage, 0, group * 8 + k * 2);
                multiply<T>(u, x, a[k][0], a[k][1]);
            }
            store(sums + ((at - 1) % 2 * GROUPS + group) * ROWS * RANK + half * 8, RANK, u);
        }
    }
    __syncthreads();
    if (s.end > s.first)
        sum_u(p, sums + (s.end - s.first - 1) % 2 * GROUPS * ROWS * RANK, s.end - 1);
}

// Four neighbours of a row of u (or v): scale times the sum over column tiles, in order; eight
// reads at a time are under way.
template <typename T>
__device__ inline void add_tiles(const float *parts, int tiles, long long stride, float scale,
                                 void *to)
{
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int tile = 0; tile < tiles; tile++) {
        const float4 x = *(const float4 *)(parts + tile * stride);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    unsigned *out = (unsigned *)to;
    out[0] = packed<T>(scale * sum.x, scale * sum.y);
    out[1] = packed<T>(scale * sum.z, scale * sum.w);
}

template <typename T> __device__ void mlp_sum(const pmli_mlp_params &p)
{
    const unsigned fours = p.rank / 4, item = blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = item / fours;
    const int r = (int)(item % fours) * 4;
    if (row < p.tokens)
        add_tiles<T>(p.parts + row * RANK + r, p.tiles, p.tokens * RANK, p.scale,
                     (T *)p.u + row * p.ld_u + r);
}

// ---- backward: dgate, dup; v and db of gate_up, da of down ----

static constexpr int BACK_STAGES = MLP_BACK_STAGES, BACK_STAGE = 3 * TILE + 3 * FACTOR;
static constexpr int BACK_GROUPS = 4, ARRAYS = 3; // dgate, dup, h

// Where this thread reads and writes: its place in a tile's first row, and with the first threads a
// piece of a factor.
template <typename T> struct Places {
    const T *gate, *dh, *factor;
    unsigned char *dgate; // an element is a byte where they are codes
    T *h;                 // none then
    int factor_row;       // 1 << 30: none
};

template <typename T, bool CODES>
__device__ inline Places<T> places_of(const pmli_mlp_bwd_params &p, const Share &s, const Unit &u)
{
    constexpr int SIZE = CODES ? 1 : sizeof(T);
    const long long row = s.first * ROWS + u.row; // only looked at where the column is there
    const int array = threadIdx.x / (ROWS * RANK / 8), at = threadIdx.x % (ROWS * RANK / 8);
    const int r = at / (RANK / 8), column = at % (RANK / 8) * 8;
    Places<T> t = {(const T *)p.gate_up + row * p.ld_gate_up + u.column,
                   (const T *)p.dh + row * p.ld_dh + u.column,
                   nullptr,
                   (unsigned char *)p.dgate_up + (row * p.ld_dgate_up + u.column) * SIZE,
                   CODES || p.h == nullptr ? nullptr : (T *)p.h + row * p.ld_h + u.column,
                   1 << 30};
    if (array < ARRAYS && p.factor[array] != nullptr && column < p.rank[array]) {
        t.factor = (const T *)p.factor[array] + (s.first * ROWS + r) * p.ld_factor[array] + column;
        t.factor_row = r;
    }
    return t;
}

// The tiles of gate, up and dh, and behind them the same rows of u's two parts and v_down; zeros
// where there is no such factor. The next tile's places are left in t.
template <typename T>
__device__ inline void load(const pmli_mlp_bwd_params &p, const Unit &u, unsigned stage,
                            Places<T> &t, int rows)
{
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const bool there = u.row + i * ROWS_A_PASS < rows;
        const T *gate = there ? t.gate + i * ROWS_A_PASS * p.ld_gate_up : (const T *)p.gate_up;
        const T *dh = there ? t.dh + i * ROWS_A_PASS * p.ld_dh : (const T *)p.gate_up;
        const unsigned to = stage + u.place + i * ROWS_A_PASS * COLUMNS * 2;
        copy_16(to, gate, there);
        copy_16(to + TILE, there ? gate + p.cols : gate, there);
        copy_16(to + 2 * TILE, dh, there);
    }
    t.gate += ROWS * p.ld_gate_up;
    t.dh += ROWS * p.ld_dh;
    if (threadIdx.x < ARRAYS * ROWS * RANK / 8) { // their places follow one another
        const bool there = t.factor_row < rows;
        copy_16(stage + 3 * TILE + threadIdx.x * 16, there ? t.factor : (const T *)p.gate_up,
                there);
        t.factor += ROWS * p.ld_factor[threadIdx.x / (ROWS * RANK / 8)];
    }
}

// b of one half of the rank and 128 columns of gate or up as right operands.
template <typename T>
__device__ inline void load_b(const pmli_mlp_bwd_params &p, const Share &s, int array, int group,
                              int half, unsigned b[8][2])
{
    const int lane = threadIdx.x % 32, r = half * 8 + lane / 4;
    const T *rows = (const T *)p.b[array];
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int n = group * 128 + k * 16 + pair * 8 + lane % 4 * 2;
            const bool there = rows != nullptr && n < s.columns && r < p.rank[array];
            const T *at = rows + (s.column + n) * p.ld_b + r;
            b[k][pair] = there ? packed<T>(widen(at[0]), widen(at[p.ld_b])) : 0;
        }
}

// The groups' sums of v's tile for gate and up: a thread has one of them.
__device__ inline void sum_v(const pmli_mlp_bwd_params &p, const float *groups, long long tile)
{
    const int array = threadIdx.x / (ROWS * RANK), at = threadIdx.x % (ROWS * RANK);
    const long long row = tile * ROWS + at / RANK;
    float sum = 0;
#pragma unroll
    for (int g = 0; g < BACK_GROUPS; g++)
        sum += groups[(g * 2 + array) * ROWS * RANK + at];
    if (row < p.tokens)
        p.v_parts[((array * (long long)gridDim.x + blockIdx.x) * p.tokens + row) * RANK +
                  at % RANK] = sum;
}

// A tile in shared memory and dgate_up: gate, up, dh become dgate, dup, h.
template <typename T, bool CODES>
__device__ inline void back(const pmli_mlp_bwd_params &p, const Unit &u, unsigned char *stage,
                            Places<T> &t, long long tile)
{
    constexpr int SIZE = CODES ? 1 : sizeof(T);
    const int rows = rows_of(p.tokens, tile);
    Pack<T, 8> dgate[PASSES], dup[PASSES];
    bool there[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        unsigned char *at = stage + u.place + i * ROWS_A_PASS * COLUMNS * 2;
        Pack<T, 8> gate = *(Pack<T, 8> *)at, up = *(Pack<T, 8> *)(at + TILE);
        Pack<T, 8> dh = *(Pack<T, 8> *)(at + 2 * TILE);
        swiglu_back<T, 8>(gate, up, dh);
        gate = in_pairs(gate), up = in_pairs(up);
        *(Pack<T, 8> *)at = gate;
        *(Pack<T, 8> *)(at + TILE) = up;
        *(Pack<T, 8> *)(at + 2 * TILE) = dh;
        there[i] = u.row + i * ROWS_A_PASS < rows;
        dgate[i] = gate, dup[i] = up;
        if (!there[i])
            continue;
        unsigned char *out = t.dgate + i * ROWS_A_PASS * p.ld_dgate_up * SIZE;
        if (!CODES) {
            *(Pack<T, 8> *)out = gate;
            *(Pack<T, 8> *)(out + p.cols * SIZE) = up;
        }
        if (!CODES && t.h != nullptr)
            *(Pack<T, 8> *)(t.h + i * ROWS_A_PASS * p.ld_h) = dh;
    }
    if constexpr (CODES) {
        const long long half = (p.cols + FP8_PIECE - 1) / FP8_PIECE; // up's first piece
        const long long ld = ROWS_A_PASS * p.ld_dgate_up, ld_pieces = ROWS_A_PASS * p.ld_pieces;
        const float *by = p.by + (u.row < ROWS ? u.column : 0);
        Factors factors = factors_at(by);
        float *pieces = p.pieces + (tile * ROWS + u.row) * p.ld_pieces + u.column / FP8_PIECE;
        put_pieces<T, PASSES>(dgate, &factors, there, t.dgate, ld, pieces, ld_pieces);
        factors = factors_at(by + p.cols);
        put_pieces<T, PASSES>(dup, &factors, there, t.dgate + p.cols, ld, pieces + half, ld_pieces);
    }
    t.dgate += ROWS * p.ld_dgate_up * SIZE;
    if (!CODES && t.h != nullptr)
        t.h += ROWS * p.ld_h;
}

// What one tile gives to the sums over rows: factor^T [16, 16 rows] times 32 columns of each array.
template <typename T> __device__ inline void add_rows(unsigned stage, float sums[ARRAYS][4][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned f[4], d[4];
#pragma unroll
    for (int array = 0; array < ARRAYS; array++) {
        load_transposed(f, stage + 3 * TILE + array * FACTOR +
                               ((lane & 7) + ((lane >> 4) & 1) * 8) * RANK * 2 +
                               ((lane >> 3) & 1) * 16);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            fragment_b_across<COLUMNS>(d, stage + array * TILE, 0, warp * 4 + n * 2);
            multiply<T>(sums[array][2 * n], f, d[0], d[1]);
            multiply<T>(sums[array][2 * n + 1], f, d[2], d[3]);
        }
    }
}

template <typename T, bool CODES> __device__ void mlp_bwd(const pmli_mlp_bwd_params &p)
{
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned base = shared_address(memory);
    float *sums = (float *)(memory + BACK_STAGES * BACK_STAGE); // [2][GROUPS][2][ROWS][RANK]
    constexpr int SUMS = BACK_GROUPS * 2 * ROWS * RANK;
    const int warp = threadIdx.x / 32, array = warp / 8, group = warp / 2 % 4, half = warp % 2;
    const Share s = share_of(p.tokens, p.cols);
    const Unit unit = unit_of(s);
    Places<T> places = places_of<T, CODES>(p, s, unit);
    unsigned b[8][2];
    float rows[ARRAYS][4][4] = {};
    load_b<T>(p, s, array, group, half, b);
#pragma unroll
    for (int i = 0; i < BACK_STAGES - 2; i++) {
        if (s.first + i < s.end)
            load<T>(p, unit, base + i * BACK_STAGE, places, rows_of(p.tokens, s.first + i));
        copy_commit();
    }
    for (long long tile = s.first; tile <= s.end; tile++) {
        const int at = (int)(tile - s.first), next = at + BACK_STAGES - 2;
        copy_wait<BACK_STAGES - 3>();
        __syncthreads();
        if (s.first + next < s.end)
            load<T>(p, unit, base + next % BACK_STAGES * BACK_STAGE, places,
                    rows_of(p.tokens, s.first + next));
        copy_commit();
        if (at >= 2)
            sum_v(p, sums + at % 2 * SUMS, tile - 2);
        if (tile < s.end)
            back<T, CODES>(p, unit, memory + at % BACK_STAGES * BACK_STAGE, places, tile);
        if (at > 0) {
            const unsigned stage = base + (at - 1) % BACK_STAGES * BACK_STAGE;
            add_rows<T>(stage, rows);
            float v[4] = {};
            unsigned d[4];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                fragment_a<COLUMNS>(d, stage + array * TILE, 0, group * 16 + k * 2);
                multiply<T>(v, d, b[k][0], b[k][1]);
            }
            store(sums + (at - 1) % 2 * SUMS + (group * 2 + array) * ROWS * RANK + half * 8, RANK,
                  v);
        }
    }
    __syncthreads();
    if (s.end > s.first)
        sum_v(p, sums + (s.end - s.first - 1) % 2 * SUMS, s.end - 1);
    const long long width = (long long)gridDim.x * COLUMNS;
    float *out = p.row_parts + blockIdx.y * RANK * ARRAYS * width + s.column + warp * 32;
#pragma unroll
    for (int i = 0; i < ARRAYS; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            store(out + i * width + n * 8, ARRAYS * width, rows[i][n]);
}

// The sum over parts [p.parts][16][ARRAYS * width] of four neighbouring columns of one row of da.
__device__ inline void add_da(const pmli_mlp_bwd_params &p, int r, long long column)
{
    const long long pitch = (long long)p.tiles * COLUMNS * ARRAYS;
    const float *at = p.row_parts + r * pitch + pitch / ARRAYS * 2 + column;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int part = 0; part < p.parts; part++) {
        const float4 x = *(const float4 *)(at + part * RANK * pitch);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    float4 *da = (float4 *)(p.da + r * p.ld_da + column);
    const float4 old = *da;
    *da = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
}

// The same of four neighbours of the rank of one column, which is a row of db.
__device__ inline void add_db(const pmli_mlp_bwd_params &p, int array, int r, long long column)
{
    const long long pitch = (long long)p.tiles * COLUMNS * ARRAYS;
    const float *at = p.row_parts + r * pitch + pitch / ARRAYS * array + column;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int part = 0; part < p.parts; part++) {
        const float *x = at + part * RANK * pitch;
        sum.x += x[0], sum.y += x[pitch], sum.z += x[2 * pitch], sum.w += x[3 * pitch];
    }
    float4 *db = (float4 *)(p.db[array] + column * p.ld_db + r);
    const float4 old = *db;
    *db = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
}

template <typename T> __device__ void mlp_bwd_sum(const pmli_mlp_bwd_params &p)
{
    unsigned item = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned tokens = (unsigned)p.tokens, cols = (unsigned)p.cols;
    for (int array = 0; array < 2; array++) {
        if (p.db[array] == nullptr)
            continue;
        const unsigned fours = p.rank[array] / 4, here = tokens * fours;
        if (item < here) {
            const long long row = item / fours;
            const int r = (int)(item % fours) * 4;
            add_tiles<T>(p.v_parts + (array * p.tiles * p.tokens + row) * RANK + r, p.tiles,
                         p.tokens * RANK, p.scale[array], (T *)p.v[array] + row * p.ld_v + r);
            return;
        }
        item -= here;
    }
    for (int array = 0; array < 2; array++) { // neighbours read neighbouring columns
        if (p.db[array] == nullptr)
            continue;
        const unsigned here = cols * (p.rank[array] / 4);
        if (item < here) {
            add_db(p, array, (int)(item / cols) * 4, item % cols);
            return;
        }
        item -= here;
    }
    const unsigned fours = cols / 4;
    if (p.da != nullptr && item < fours * p.rank[2])
        add_da(p, (int)(item / fours), item % fours * 4);
}

#define KERNEL(name, body, threads, params)                                                        \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const params p)                  \
    {                                                                                              \
        body(p);                                                                                   \
    }
#define ALL(T, suffix)                                                                             \
    KERNEL(mlp_##suffix, (mlp<T, false>), 512, pmli_mlp_params)                                    \
    KERNEL(mlp_codes_##suffix, (mlp<T, true>), 512, pmli_mlp_params)                               \
    KERNEL(mlp_sum_##suffix, mlp_sum<T>, 256, pmli_mlp_params)                                     \
    KERNEL(mlp_bwd_##suffix, (mlp_bwd<T, false>), 512, pmli_mlp_bwd_params)                        \
    KERNEL(mlp_bwd_codes_##suffix, (mlp_bwd<T, true>), 512, pmli_mlp_bwd_params)                   \
    KERNEL(mlp_bwd_sum_##suffix, mlp_bwd_sum<T>, 256, pmli_mlp_bwd_params)
ALL(bf16, bf16)
ALL(f16, f16)
