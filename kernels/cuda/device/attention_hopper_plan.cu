// What stands before attention's backward on Hopper (attention_hopper.cu and _q.cu): who does what,
// and the dots of outputs and their gradients. What stands behind it: dq out of its sums.
#include "attention_hopper.cuh"

#if ON_HOPPER

// PIECES: of a set, which is one head of keys of the longest document, or as many as there are
// blocks.
enum { THREADS = 256, PIECES = HOPPER_LONGEST / HOPPER_KEYS };
static_assert(PIECES >= HOPPER_BLOCKS && PIECES <= 1 << 16, "a piece is a group and 16 bits");

__device__ inline int tiles_of(int rows, int size)
{
    return (rows + size - 1) / size;
}

// The last of `count` that begins at t or before, begin[i] of them being `each` times so far: no
// empty one.
template <typename T> __device__ inline int last_at(const int *begin, int count, T t, T each)
{
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (each * begin[middle] <= t ? low : high) = middle;
    }
    return low;
}

// begin[d]: tiles of documents before d; by one thread.
__device__ inline void count_tiles(const pmli_attention_hopper_params &p, int size, int *begin)
{
    begin[0] = 0;
    for (int d = 0; d < p.slots; d++)
        begin[d + 1] = begin[d] + tiles_of(p.cu[d + 1] - p.cu[d], size);
}

// Whole sets of (document, head of keys) with at most as many pieces together as there are blocks
// are made one set after the other, and a set's pieces in order of their work, so that who has done
// a short one takes a long one of the next set. Queries are passed from the last on in the first
// set, from the first on in the second, and so on: so both end at the same queries at the same
// time, and all blocks of a document are near the same of its queries, whose dq the L2 cache holds
// meanwhile. Who takes which piece is decided here, as if blocks took them as they come: the same
// each time.
//
// Documents stand in order of their length, so that the last pieces are short.
struct Plan {
    int rows[HOPPER_DOCUMENTS], order[HOPPER_DOCUMENTS], sums[HOPPER_DOCUMENTS + 1];
    int group[HOPPER_BLOCKS + 1],
        length[HOPPER_BLOCKS];       // of a set: its first piece, and its tokens
    int piece[PIECES], work[PIECES]; // of a set in order of work: group and key tile; its length
    int load[HOPPER_BLOCKS], last[HOPPER_BLOCKS]; // what blocks have so far, and the last piece
    int documents, groups, set;
};

__device__ inline pmli_hopper_piece piece_of(const pmli_attention_hopper_params &p,
                                             const Plan &plan, int first_group, int code,
                                             bool upwards)
{
    const int group = first_group + (code >> 16), document = plan.order[group / p.kv_heads];
    const int kv = group % p.kv_heads, positions = ROWS / (p.heads / p.kv_heads);
    pmli_hopper_piece x;
    x.token = p.cu[document];
    x.rows = plan.rows[document];
    x.kv_head = kv;
    x.first_key = (code & 0xffff) * KEYS;
    x.first_sums = plan.sums[document] * p.kv_heads + kv * tiles_of(x.rows, positions);
    x.upwards = upwards;
    x.next = -1;
    x.reserved = 0;
    return x;
}

// As many pieces as there are blocks: the longest to who has the least to do, and so on.
__device__ inline void hand_out(const pmli_attention_hopper_params &p, Plan &plan, int begin,
                                int pieces, int first)
{
    int mine[HOPPER_BLOCKS / THREADS];
#pragma unroll
    for (int i = 0; i < HOPPER_BLOCKS / THREADS; i++) {
        const int block = i * THREADS + (int)threadIdx.x;
        const int load = block < p.blocks ? plan.load[block] : 0;
        int rank = 0;
        for (int b = 0; b < p.blocks; b++)
            rank += plan.load[b] < load || (plan.load[b] == load && b < block);
        mine[i] = block < p.blocks && rank < pieces ? begin + rank : -1;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < HOPPER_BLOCKS / THREADS; i++) {
        const int block = i * THREADS + (int)threadIdx.x, at = mine[i];
        if (at < 0)
            continue;
        const int last = plan.last[block];
        *(last < 0 ? &p.lists[block] : &p.pieces[last].next) = first + at;
        plan.load[block] += plan.work[at];
        plan.last[block] = first + at;
    }
    __syncthreads();
}

__device__ inline void plan_pieces(const pmli_attention_hopper_params &p)
{
    __shared__ Plan plan;
    const int positions = ROWS / (p.heads / p.kv_heads);
    for (int i = threadIdx.x; i < HOPPER_BLOCKS; i += THREADS)
        p.lists[i] = plan.last[i] = -1, plan.load[i] = 0;
    for (int d = threadIdx.x; d < p.slots; d += THREADS)
        plan.rows[d] = p.cu[d + 1] - p.cu[d];
    __syncthreads();
    for (int d = threadIdx.x; d < p.slots; d += THREADS) {
        int rank = 0;
        for (int e = 0; e < p.slots; e++)
            rank += plan.rows[e] > plan.rows[d] || (plan.rows[e] == plan.rows[d] && e < d);
        plan.order[rank] = d;
    }
    if (threadIdx.x == 0) {
        plan.sums[0] = plan.documents = plan.set = 0;
        for (int d = 0; d < p.slots; d++) {
            const int rows = plan.rows[d];
            if (rows > HOPPER_LONGEST)
                __trap(); // not what the op was told, and below numbers would run over
            plan.sums[d + 1] = plan.sums[d] + tiles_of(rows, positions);
            plan.documents += rows > 0;
        }
    }
    __syncthreads();
    int first = 0;
    const int groups = plan.documents * p.kv_heads; // empty ones are the last
    for (int from = 0; from < groups; from += plan.groups) {
        __syncthreads();
        if (threadIdx.x == 0) {
            int g = 0, sum = 0, document = from / p.kv_heads, head = from % p.kv_heads;
            int rows = plan.rows[plan.order[document]], tiles = tiles_of(rows, KEYS);
            while (from + g < groups && g < HOPPER_BLOCKS && (g == 0 || sum + tiles <= p.blocks)) {
                plan.length[g] = rows;
                plan.group[g++] = sum;
                sum += tiles;
                if (++head == p.kv_heads && from + g < groups) {
                    head = 0;
                    rows = plan.rows[plan.order[++document]];
                    tiles = tiles_of(rows, KEYS);
                }
            }
            plan.group[g] = sum;
            plan.groups = g;
        }
        __syncthreads();
        const int n = plan.groups, pieces = plan.group[n];
        for (int i = threadIdx.x; i < pieces; i += THREADS) {
            const int g = last_at(plan.group, n, i, 1);
            const int k = i - plan.group[g];
            const int work = plan.length[g] - k * KEYS; // tokens that pass
            int rank = i; // where each group is one piece, they are in order
            if (pieces > n) {
                rank = 0;
                for (int e = 0; e < n; e++) {
                    const int tiles = plan.group[e + 1] - plan.group[e];
                    const int more = plan.length[e] - work;
                    if (more > 0)
                        rank += min(tiles, tiles_of(more, KEYS));
                    if (e < g && more >= 0 && more % KEYS == 0 && more / KEYS < tiles)
                        rank++;
                }
            }
            plan.piece[rank] = g << 16 | k;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < pieces; i += THREADS) {
            const pmli_hopper_piece x =
                piece_of(p, plan, from, plan.piece[i], p.sums != nullptr && plan.set % 2 != 0);
            p.pieces[first + i] = x;
            // keys and values come and their gradients go in the time of about three tiles
            plan.work[i] = tiles_of(x.rows - x.first_key, positions) + 3;
        }
        __syncthreads();
        for (int i = 0; i < pieces; i += p.blocks)
            hand_out(p, plan, i, min(pieces - i, p.blocks), first);
        first += pieces;
        __syncthreads();
        if (threadIdx.x == 0)
            plan.set++;
    }
}

// What each tile of dq's sums stands for.
__device__ inline void plan_sums(const pmli_attention_hopper_params &p)
{
    __shared__ int sums[HOPPER_DOCUMENTS + 1];
    const int positions = ROWS / (p.heads / p.kv_heads);
    if (threadIdx.x == 0)
        count_tiles(p, positions, sums);
    __syncthreads();
    for (long long t = threadIdx.x; t < p.most_tiles; t += THREADS) {
        pmli_hopper_sums x = {0, 0, 0, 0};
        if (t < (long long)sums[p.slots] * p.kv_heads) {
            const int low = last_at(sums, p.slots, t, (long long)p.kv_heads);
            const int tiles = sums[low + 1] - sums[low];
            const int at = (int)(t - sums[low] * (long long)p.kv_heads),
                      begin = at % tiles * positions;
            x.token = p.cu[low] + begin;
            x.positions = min(positions, p.cu[low + 1] - p.cu[low] - begin);
            x.kv_head = at / tiles;
        }
        p.sum_tiles[t] = x;
    }
}

// Two tiles of queries each, those with the most keys first; which of several with as many comes
// first is left to chance, and nothing depends on it.
__device__ inline void plan_queries(const pmli_attention_hopper_params &p)
{
    __shared__ int begin[HOPPER_DOCUMENTS + 1], place[HOPPER_LONGEST / KEYS + 1];
    const int tokens = 2 * (ROWS / (p.heads / p.kv_heads));
    if (threadIdx.x == 0)
        count_tiles(p, tokens, begin);
    for (int i = threadIdx.x; i <= HOPPER_LONGEST / KEYS; i += THREADS)
        place[i] = 0;
    __syncthreads();
    const int all = begin[p.slots];
    for (int pass = 0; pass < 2; pass++) {
        for (int t = threadIdx.x; t < all; t += THREADS) {
            const int low = last_at(begin, p.slots, t, 1);
            pmli_hopper_queries x;
            x.token = p.cu[low];
            x.rows = p.cu[low + 1] - x.token;
            x.first = (t - begin[low]) * tokens;
            int *at = &place[tiles_of(min(x.first + tokens, x.rows), KEYS)];
            if (pass == 0) {
                atomicAdd(at, p.kv_heads);
                continue;
            }
            int to = atomicAdd(at, p.kv_heads);
            for (x.kv_head = 0; x.kv_head < p.kv_heads; x.kv_head++)
                p.queries[to++] = x;
        }
        __syncthreads();
        if (pass == 0 && threadIdx.x == 0) {
            int before = 0;
            for (int i = HOPPER_LONGEST / KEYS; i >= 0; i--) {
                const int many = place[i];
                place[i] = before;
                before += many;
            }
            p.lists[HOPPER_BLOCKS] = before;
        }
        __syncthreads();
    }
}

// A warp a token and four heads. Tokens behind the last document have zeros as gradients.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend_hopper_begin(const pmli_attention_hopper_params p)
{
    if (blockIdx.x == 0) {
        plan_pieces(p);
        return;
    }
    if (blockIdx.x == 1) {
        if (p.sums != nullptr)
            plan_sums(p);
        else
            plan_queries(p);
        return;
    }
    const long long thread = (long long)(blockIdx.x - 2) * THREADS + threadIdx.x;
    // The last tokens first, which the cache may still have.
    const long long unit = (long long)(gridDim.x - 2) * (THREADS / 32) - 1 - thread / 32;
    const int lane = threadIdx.x % 32, fours = p.heads / 4, head = (int)(unit % fours) * 4;
    const long long token = unit / fours;
    uint2 a[4], b[4];
    const bool live = token < p.cu[p.slots];
#pragma unroll
    for (int h = 0; h < 4; h++)
        if (live) {
            a[h] = *(const uint2 *)((const bf16 *)p.out + token * p.ld_out + (head + h) * HEAD +
                                    lane * 4);
            b[h] = *(const uint2 *)((const bf16 *)p.dout_rows + token * p.ld_dout +
                                    (head + h) * HEAD + lane * 4);
        }
    if (p.sums != nullptr)
        for (long long i = thread; i < 2 * p.most_tiles; i += (long long)(gridDim.x - 2) * THREADS)
            p.begun[i] = 0;
    if (!live) {
        if (token < p.tokens) {
            const uint2 zeros = {0, 0};
            for (int h = 0; h < 4; h++)
                *(uint2 *)((bf16 *)p.dq + token * p.ld_dq + (head + h) * HEAD + lane * 4) = zeros;
            for (int h = head; h < min(head + 4, p.kv_heads); h++) {
                *(uint2 *)((bf16 *)p.dk + token * p.ld_dk + h * HEAD + lane * 4) = zeros;
                *(uint2 *)((bf16 *)p.dv + token * p.ld_dv + h * HEAD + lane * 4) = zeros;
            }
        }
        return;
    }
    float mine = 0;
#pragma unroll
    for (int h = 0; h < 4; h++) {
        const float2 a0 = widen_two<bf16>(a[h].x), a1 = widen_two<bf16>(a[h].y);
        const float2 b0 = widen_two<bf16>(b[h].x), b1 = widen_two<bf16>(b[h].y);
        float dot = a0.x * b0.x + a0.y * b0.y + a1.x * b1.x + a1.y * b1.y;
#pragma unroll
        for (int d = 16; d > 0; d /= 2)
            dot += __shfl_xor_sync(ALL_LANES, dot, d);
        mine = lane == h ? dot : mine;
    }
    if (lane < 4)
        ((float2 *)p.stats)[token * p.heads + head + lane] =
            make_float2(p.lse[(head + lane) * p.ld_lse + token] * LOG2_E, mine);
}

// A block a tile. Sums lie as the registers of attention_hopper.cu's dq do: half the columns,
// blocks of eight of them, threads; so that four threads side by side have eight columns of two
// rows. Here a thread has eight columns of the one half and those that rope turns them with, 64
// further on.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend_hopper_end(const pmli_attention_hopper_params p)
{
    const unsigned tile = gridDim.x - 1 - blockIdx.x; // the last sums are in the cache
    const int4 read = *(const int4 *)(p.sum_tiles + tile);
    const int token = read.x, positions = read.y, kv = read.z, group = p.heads / p.kv_heads;
    const int thread = threadIdx.x % 128, block = threadIdx.x / 128 * 4 + thread % 4,
              row = thread / 32 * 16 + thread / 4 % 8;
    if (positions == 0)
        return;
    const float4 *from =
        (const float4 *)p.sums + (long long)tile * (ROWS * HEAD / 4) + block * 128 + thread / 4 * 4;
    float2 x[2][2][4]; // of a row its low half, then the high one
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const float4 of_both = from[half * (ROWS * 64 / 4) + q];
            x[0][half][q] = make_float2(of_both.x, of_both.y);
            x[1][half][q] = make_float2(of_both.z, of_both.w);
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int at = row + 8 * r;
        if (at >= positions * group)
            continue;
        if (p.pos != nullptr) {
            const float4 *angles = (const float4 *)angles_of(p, token + at / group) + block * 2;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float4 c = angles[i], s = angles[HEAD / 8 + i];
                turn_back(x[r][0][2 * i], x[r][1][2 * i], make_float2(c.x, c.y),
                          make_float2(s.x, s.y));
                turn_back(x[r][0][2 * i + 1], x[r][1][2 * i + 1], make_float2(c.z, c.w),
                          make_float2(s.z, s.w));
            }
        }
        bf16 *to = (bf16 *)p.dq + (token + at / group) * p.ld_dq +
                   (kv * group + at % group) * HEAD + block * 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 y;
            unsigned *w = (unsigned *)&y;
#pragma unroll
            for (int q = 0; q < 4; q++)
                w[q] = narrow_two<bf16>(x[r][half][q].x * p.scale, x[r][half][q].y * p.scale);
            *(uint4 *)(to + half * 64) = y;
        }
    }
}

#else
extern "C" __global__ void attend_hopper_begin(const pmli_attention_hopper_params)
{
}
extern "C" __global__ void attend_hopper_end(const pmli_attention_hopper_params)
{
}
#endif
