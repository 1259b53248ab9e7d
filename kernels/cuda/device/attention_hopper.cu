// Attention's backward on sm_90a, heads of 128 in bfloat16, causal, as FlashAttention has it (Dao,
// 2023; Shah et al., 2024), with the query heads of a head of keys side by side in a tile, so that
// their dk and dv are summed where they arise.
//
// A block keeps 128 keys and values of one document in shared memory and their dk and dv in
// registers, and lets the document's queries pass in tiles of 64 rows: 16 tokens by 4 heads, say.
// Two warp groups have 64 keys each; all products are theirs:
//
//   S^T = K Q^T     P^T = exp(S^T - lse)       dV += P^T dO
//   dP^T = V dO^T   dS^T = P^T (dP^T - dots)   dK += dS^T Q    dQ = dS K, half the columns each
//
// For dQ, dS crosses between the groups in shared memory, and dq is added up in memory, where all
// blocks of a document meet: they pass its queries in step (attention_hopper_plan.cu), so that the
// sums are in the L2 cache while they are at it. Who has the document's first keys writes a tile's
// sums and says so by a word; the others wait for it, then add in any order. Where bits
// must repeat dQ is not made here but by attention_hopper_q.cu, which makes S and dP once more; the
// groups then never wait for one another. A third group of warps brings and takes:
//
//   warp 0: keys, values, tiles of queries and gradients; warp 1: their statistics;
//   warps 2, 3: dq from shared memory to its sums, half the columns each
//
// What is asked for before what, below, is so that the tensor cores have something to do while
// exponentials are taken, and while dq is written down.
#include "attention_hopper.cuh"

#if ON_HOPPER

enum {
    DQ_HALF = ROWS * 64 * 4,
    STATS = 2 * ROWS * 4,
    WITH_WARP = GROUP + 32,
    // numbered barriers beside BOTH: a group and its warp, twice each
    DQ_FREE = 2,
    DQ_THERE = 6
};

// Where things lie in shared memory; without sums, more queries under way.
template <bool SUMS> struct Place {
    static constexpr int STAGES = SUMS ? 2 : 4;
    static constexpr int K = 0;
    static constexpr int V = K + 2 * HALF_KEYS;
    static constexpr int Q = V + 2 * HALF_KEYS;
    static constexpr int DO = Q + STAGES * 2 * HALF_ROWS;
    static constexpr int DS = DO + STAGES * 2 * HALF_ROWS;        // [keys][rows], two in turn
    static constexpr int DQ = DS + (SUMS ? 2 * HALF_KEYS : 0);    // float32, two in turn
    static constexpr int LSE = DQ + (SUMS ? 2 * 2 * DQ_HALF : 0); // and the dots behind it, a stage
    static constexpr int KEYS_CAME = LSE + STAGES * STATS;        // a barrier each
    static constexpr int KEYS_FREE = KEYS_CAME + 8;
    static constexpr int Q_CAME = KEYS_FREE + 8; // a stage each
    static constexpr int DO_CAME = Q_CAME + STAGES * 8;
    static constexpr int ROWS_FREE = DO_CAME + STAGES * 8;
    static constexpr int DS_THERE = ROWS_FREE + STAGES * 8; // two
    static_assert(DS_THERE + 2 * 8 + 1024 <= HOPPER_SHARED, "what the host asks for");
};

// A piece of work, and how the document's queries pass it, tile by tile.
struct Pass {
    pmli_hopper_piece piece;
    int tiles, first, step; // tokens within the document
    __device__ inline Pass(const pmli_attention_hopper_params &p, int index, int positions)
    {
        const int4 *from = (const int4 *)(p.pieces + index);
        ((int4 *)&piece)[0] = from[0];
        ((int4 *)&piece)[1] = from[1];
        const int begin = piece.first_key / positions,
                  end = (piece.rows + positions - 1) / positions;
        tiles = end - begin;
        first = (piece.upwards ? begin : end - 1) * positions;
        step = piece.upwards ? positions : -positions;
    }
};

template <bool SUMS>
__device__ inline void bring_rows(const pmli_attention_hopper_params &p, unsigned shared, int group)
{
    typedef Place<SUMS> At;
    Ring<At::STAGES> rows(1);
    unsigned keys = 1;
    const int positions = ROWS / group, bytes = 2 * positions * group * 128;
    for (int at = p.lists[blockIdx.x]; at >= 0;) {
        const Pass pass(p, at, positions);
        const int first = pass.piece.token + pass.piece.first_key, kv = pass.piece.kv_head;
        barrier_wait(shared + At::KEYS_FREE, keys);
        keys ^= 1;
        barrier_expect(shared + At::KEYS_CAME, 4 * HALF_KEYS);
        for (int half = 0; half < 2; half++) {
            bring_box(shared + At::K + half * HALF_KEYS, &p.k, half * 64, kv, first,
                      shared + At::KEYS_CAME);
            bring_box(shared + At::V + half * HALF_KEYS, &p.v, half * 64, kv, first,
                      shared + At::KEYS_CAME);
        }
        int token = pass.piece.token + pass.first;
        for (int i = 0; i < pass.tiles; i++, token += pass.step, rows.step()) {
            const unsigned q = shared + At::Q + rows.stage * 2 * HALF_ROWS,
                           dout = q + At::DO - At::Q, q_came = shared + At::Q_CAME + rows.stage * 8,
                           do_came = q_came + At::DO_CAME - At::Q_CAME;
            barrier_wait(shared + At::ROWS_FREE + rows.stage * 8, rows.phase);
            barrier_expect(q_came, bytes);
            bring_box(q, &p.q, 0, kv * group, token, q_came);
            bring_box(q + HALF_ROWS, &p.q, 64, kv * group, token, q_came);
            barrier_expect(do_came, bytes);
            bring_box(dout, &p.dout, 0, kv * group, token, do_came);
            bring_box(dout + HALF_ROWS, &p.dout, 64, kv * group, token, do_came);
        }
        at = pass.piece.next;
    }
}

// A row of a tile that is no query of the document has a probability of 0: its lse is infinite.
template <bool SUMS>
__device__ inline void bring_statistics(const pmli_attention_hopper_params &p, unsigned shared,
                                        int group)
{
    typedef Place<SUMS> At;
    Ring<At::STAGES> ring(1);
    const int lane = threadIdx.x % 32, positions = ROWS / group;
    for (int at = p.lists[blockIdx.x]; at >= 0;) {
        const Pass pass(p, at, positions);
        int begin = pass.first;
        for (int i = 0; i < pass.tiles; i++, begin += pass.step, ring.step()) {
            float2 x[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = lane + r * 32, token = begin + row / group;
                const bool there = row < positions * group && token < pass.piece.rows;
                x[r] = there ? ((const float2 *)
                                    p.stats)[(long long)(pass.piece.token + token) * p.heads +
                                             pass.piece.kv_head * group + row % group]
                             : make_float2(INFINITE, 0.0f);
            }
            barrier_wait(shared + At::ROWS_FREE + ring.stage * 8, ring.phase);
#pragma unroll
            for (int r = 0; r < 2; r++)
                asm volatile("st.shared.f32 [%0], %1;\n"
                             "st.shared.f32 [%0 + 256], %2;" ::"r"(
                                 shared + At::LSE + ring.stage * STATS + (lane + r * 32) * 4),
                             "f"(x[r].x), "f"(x[r].y)
                             : "memory");
            __syncwarp();
            if (lane == 0)
                barrier_arrive(shared + At::Q_CAME + ring.stage * 8);
        }
        at = pass.piece.next;
    }
}

__device__ inline void take(const pmli_attention_hopper_params &p, unsigned shared, int group,
                            int half)
{
    typedef Place<true> At;
    const int lane = threadIdx.x % 32, positions = ROWS / group;
    int turn = 0;
    // both places are free at first
    barrier_pass(DQ_FREE + half, WITH_WARP);
    barrier_pass(DQ_FREE + 2 + half, WITH_WARP);
    for (int at = p.lists[blockIdx.x]; at >= 0;) {
        const Pass pass(p, at, positions);
        const bool begins = pass.piece.first_key == 0;
        int tile = pass.piece.first_sums + pass.first / positions;
        for (int i = 0; i < pass.tiles; i++, turn ^= 1, tile += pass.piece.upwards ? 1 : -1) {
            const unsigned from = shared + At::DQ + (2 * turn + half) * DQ_HALF;
            float *to = p.sums + tile * (long long)(ROWS * HEAD) + half * (ROWS * 64);
            int *begun = p.begun + 2 * tile + half;
            barrier_meet(DQ_THERE + 2 * turn + half, WITH_WARP);
            if (lane == 0) {
                if (begins) {
                    write_to_memory(to, from, DQ_HALF);
                } else {
                    wait_for_word(begun);
                    add_to_memory(to, from, DQ_HALF);
                }
                additions_read();
            }
            __syncwarp();
            barrier_pass(DQ_FREE + 2 * turn + half, WITH_WARP);
            if (lane == 0 && begins)
                tell_by_word(begun);
        }
        at = pass.piece.next;
    }
    if (lane == 0)
        additions_done();
}

// One of the two groups that multiply: 64 of a piece's keys, and half the columns of dq.
template <bool SUMS>
__device__ inline void multiply_all(const pmli_attention_hopper_params &p, unsigned shared,
                                    int group, int half)
{
    typedef Place<SUMS> At;
    const int thread = threadIdx.x % GROUP, warp = thread / 32, lane = thread % 32;
    const int positions = ROWS / group;
    const unsigned token_of_row = 65536 / group + 1; // row / group without a division, rows < 64
    const float scale = p.scale * LOG2_E;
    const unsigned long long keys = along(shared + At::K + half * 64 * 128),
                             values = along(shared + At::V + half * 64 * 128),
                             columns = down(shared + At::K + half * HALF_KEYS, HALF_KEYS);
    const unsigned dq_place = shared + At::DQ + half * DQ_HALF + thread * 16;
    const unsigned ds_row = shared + At::DS + (half * 64 + warp * 16 + lane % 16) * 128;
    float dk[64], dv[64];    // [64 keys, 128]
    float s[32], dp[32];     // [64 keys, 64 queries]: S^T, then P^T; dP^T
    float dq[32];            // [64 queries, 64 columns]
    unsigned pw[16], ew[16]; // P^T and dS^T in 16 bits, first operands of products
    Ring<At::STAGES> ring(0);
    int tile = 0, given = 0; // counted over all pieces
    unsigned keys_phase = 0;

    const auto scores = [&]() {
        const unsigned long long rows = along(shared + At::Q + ring.stage * 2 * HALF_ROWS);
        barrier_wait(shared + At::Q_CAME + ring.stage * 8, ring.phase);
        multiply_heads(s, keys, HALF_KEYS, rows, HALF_ROWS);
    };
    const auto gradients = [&]() {
        const unsigned long long rows = along(shared + At::DO + ring.stage * 2 * HALF_ROWS);
        barrier_wait(shared + At::DO_CAME + ring.stage * 8, ring.phase);
        multiply_heads(dp, values, HALF_KEYS, rows, HALF_ROWS);
    };
    // P^T. begin: the tile's first token; key: that of this thread's first row
    const auto probabilities = [&](int begin, int key, bool edge) {
        const unsigned lse = shared + At::LSE + ring.stage * STATS + lane % 4 * 8;
        settled(s);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            float low, high;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(low), "=f"(high)
                         : "r"(lse + b * 32));
            s[4 * b] = exp2_fast(fmaf(s[4 * b], scale, -low));
            s[4 * b + 1] = exp2_fast(fmaf(s[4 * b + 1], scale, -high));
            s[4 * b + 2] = exp2_fast(fmaf(s[4 * b + 2], scale, -low));
            s[4 * b + 3] = exp2_fast(fmaf(s[4 * b + 3], scale, -high));
        }
        if (edge) {
            unsigned by =
                token_of_row; // not to be multiplied ahead of the loop: no registers are left
            asm volatile("" : "+r"(by));
#pragma unroll
            for (int b = 0; b < 8; b++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int row = b * 8 + lane % 4 * 2 + c, token = begin + (int)(row * by >> 16);
                    s[4 * b + c] = key > token ? 0.0f : s[4 * b + c];
                    s[4 * b + 2 + c] = key + 8 > token ? 0.0f : s[4 * b + 2 + c];
                }
        }
    };
    const auto add_dv = [&]() {
#pragma unroll
        for (int i = 0; i < 16; i++)
            pw[i] = narrow_two<bf16>(s[2 * i], s[2 * i + 1]);
        settled(pw);
        const unsigned long long rows =
            down(shared + At::DO + ring.stage * 2 * HALF_ROWS, HALF_ROWS);
        multiply_words<4>(dv, pw, rows);
    };
    // dS^T, for dq into shared memory as well.
    const auto add_dk = [&]() {
        const unsigned dots = shared + At::LSE + ring.stage * STATS + ROWS * 4 + lane % 4 * 8;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            float low, high;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(low), "=f"(high)
                         : "r"(dots + b * 32));
            ew[2 * b] = narrow_two<bf16>(s[4 * b] * (dp[4 * b] - low),
                                         s[4 * b + 1] * (dp[4 * b + 1] - high));
            ew[2 * b + 1] = narrow_two<bf16>(s[4 * b + 2] * (dp[4 * b + 2] - low),
                                             s[4 * b + 3] * (dp[4 * b + 3] - high));
        }
        if constexpr (SUMS) {
            const unsigned to = ds_row + tile % 2 * HALF_KEYS;
#pragma unroll
            for (int i = 0; i < 4; i++)
                asm volatile(
                    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                        to + ((2 * i + lane / 16) ^ lane % 8) * 16),
                    "r"(ew[4 * i]), "r"(ew[4 * i + 1]), "r"(ew[4 * i + 2]), "r"(ew[4 * i + 3])
                    : "memory");
        }
        settled(ew);
        const unsigned long long rows =
            down(shared + At::Q + ring.stage * 2 * HALF_ROWS, HALF_ROWS);
        multiply_words<4>(dk, ew, rows);
    };
    const auto make_dq = [&]() {
        const unsigned there = shared + At::DS_THERE + tile % 2 * 8;
        const unsigned long long ds = down(shared + At::DS + tile % 2 * HALF_KEYS, HALF_KEYS);
        show_writes();
        __syncwarp();
        if (lane == 0)
            barrier_arrive(there);
        barrier_wait(there, tile / 2 % 2);
        products_begin();
        multiply_first<1, 1>(dq, ds, columns);
#pragma unroll
        for (int i = 1; i < 8; i++)
            multiply_more<1, 1>(dq, ds + i * 128, columns + i * 128);
        products_asked();
        tile++;
    };
    // Behind the last product of it a stage may be filled again.
    const auto leave_stage = [&]() {
        settled(pw), settled(ew);
        if (lane == 0)
            barrier_arrive(shared + At::ROWS_FREE + ring.stage * 8);
        ring.step();
    };
    const auto write_dq = [&]() {
        settled(dq);
        barrier_meet(DQ_FREE + given % 2 * 2 + half, WITH_WARP);
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                             dq_place + given % 2 * 2 * DQ_HALF + i * GROUP * 16),
                         "f"(dq[4 * i]), "f"(dq[4 * i + 1]), "f"(dq[4 * i + 2]), "f"(dq[4 * i + 3])
                         : "memory");
    };
    const auto tell_dq = [&]() {
        show_writes();
        barrier_pass(DQ_THERE + given % 2 * 2 + half, WITH_WARP);
        given++;
    };

    // Rows behind a document's end are another's, or nobody's: zeros, lest 0 times them be no
    // number. Each group has half the columns of both matrices; rows from `first` on, of `all`.
    const auto clear = [&](unsigned one, unsigned other, int first, int all) {
        for (int row = first + thread / 8; row < all; row += GROUP / 8)
            for (int m = 0; m < 2; m++)
                asm volatile(
                    "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                        (m == 0 ? one : other) + half * all * 128 + row * 128 + thread % 8 * 16),
                    "r"(0)
                    : "memory");
        show_writes();
        barrier_meet(BOTH, 2 * GROUP);
    };
    const auto clear_behind = [&](int begin, int rows) {
        if (begin + positions <= rows)
            return;
        barrier_wait(shared + At::Q_CAME + ring.stage * 8, ring.phase);
        barrier_wait(shared + At::DO_CAME + ring.stage * 8, ring.phase);
        clear(shared + At::Q + ring.stage * 2 * HALF_ROWS,
              shared + At::DO + ring.stage * 2 * HALF_ROWS, (rows - begin) * group, ROWS);
    };

    for (int at = p.lists[blockIdx.x]; at >= 0;) {
        const Pass pass(p, at, positions);
        const int key = pass.piece.first_key + half * 64 + warp * 16 + lane / 4;
        const int last_edge = pass.piece.first_key + KEYS;
        int begin = pass.first;
#pragma unroll
        for (int i = 0; i < 64; i++)
            dk[i] = 0, dv[i] = 0;
        settled(dk), settled(dv);
        barrier_wait(shared + At::KEYS_CAME, keys_phase);
        keys_phase ^= 1;
        if (pass.piece.first_key + KEYS > pass.piece.rows)
            clear(shared + At::K, shared + At::V, pass.piece.rows - pass.piece.first_key, KEYS);
        clear_behind(begin, pass.piece.rows);
        scores();
        gradients();
        products_left<1>();
        probabilities(begin, key, begin < last_edge);
        products_left<0>();
        settled(dp);
#pragma unroll 1
        for (int i = 1; i < pass.tiles; i++) {
            add_dv();
            add_dk();
            if constexpr (SUMS)
                make_dq();
            products_left<SUMS ? 1 : 0>();
            leave_stage();
            begin += pass.step;
            clear_behind(begin, pass.piece.rows);
            scores();
            if constexpr (SUMS) {
                products_left<1>();
                write_dq();
            }
            gradients();
            if constexpr (SUMS)
                tell_dq();
            products_left<1>();
            probabilities(begin, key, begin < last_edge);
            products_left<0>();
            settled(dp);
        }
        add_dv();
        add_dk();
        if constexpr (SUMS)
            make_dq();
        products_left<0>();
        leave_stage();
        if constexpr (SUMS) {
            write_dq();
            tell_dq();
        }
        settled(dk), settled(dv);
        if (lane == 0)
            barrier_arrive(shared + At::KEYS_FREE);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (key + 8 * r >= pass.piece.rows)
                continue;
            const long long row = pass.piece.token + key + 8 * r,
                            column = pass.piece.kv_head * HEAD + lane % 4 * 2;
            unsigned *to_k = (unsigned *)((bf16 *)p.dk + row * p.ld_dk + column),
                     *to_v = (unsigned *)((bf16 *)p.dv + row * p.ld_dv + column);
#pragma unroll
            for (int b = 0; b < 16; b++)
                to_v[4 * b] = narrow_two<bf16>(dv[4 * b + 2 * r], dv[4 * b + 2 * r + 1]);
            if (p.pos != nullptr)
                turn_back(dk, r, angles_of(p, row));
#pragma unroll
            for (int b = 0; b < 16; b++)
                to_k[4 * b] =
                    narrow_two<bf16>(dk[4 * b + 2 * r] * p.scale, dk[4 * b + 2 * r + 1] * p.scale);
        }
        at = pass.piece.next;
    }
}

template <bool SUMS> __device__ inline void attend_backward(const pmli_attention_hopper_params &p)
{
    typedef Place<SUMS> At;
    extern __shared__ char raw[];
    const unsigned shared = boxes_from(raw);
    const int role = threadIdx.x / GROUP, warp = threadIdx.x % GROUP / 32;
    const int group = p.heads / p.kv_heads;
    if (threadIdx.x == 0) {
        barrier_begin(shared + At::KEYS_CAME, 1);
        barrier_begin(shared + At::KEYS_FREE, WARPS);
        for (int i = 0; i < At::STAGES; i++) {
            barrier_begin(shared + At::Q_CAME + i * 8, 2); // the rows, and their statistics
            barrier_begin(shared + At::DO_CAME + i * 8, 1);
            barrier_begin(shared + At::ROWS_FREE + i * 8, WARPS);
        }
        for (int i = 0; i < 2; i++)
            barrier_begin(shared + At::DS_THERE + i * 8, WARPS);
        barriers_begun();
    }
    // rows of a tile that the copy engine never brings, where 64 is no multiple of the heads
    for (unsigned at = At::Q + threadIdx.x * 16; at < At::DS; at += 3 * GROUP * 16)
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared + at), "r"(0)
                     : "memory");
    show_writes();
    __syncthreads();
    if (role > 0) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        multiply_all<SUMS>(p, shared, group, role - 1);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == 0) {
            if (threadIdx.x == 0)
                bring_rows<SUMS>(p, shared, group);
        } else if (warp == 1) {
            bring_statistics<SUMS>(p, shared, group);
        } else if constexpr (SUMS) {
            take(p, shared, group, warp - 2);
        }
    }
}

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1)
    attend_hopper_bwd(const __grid_constant__ pmli_attention_hopper_params p)
{
    attend_backward<true>(p);
}

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1)
    attend_hopper_bwd_kv(const __grid_constant__ pmli_attention_hopper_params p)
{
    attend_backward<false>(p);
}

#else
extern "C" __global__ void attend_hopper_bwd(const pmli_attention_hopper_params)
{
}
extern "C" __global__ void attend_hopper_bwd_kv(const pmli_attention_hopper_params)
{
}
#endif
