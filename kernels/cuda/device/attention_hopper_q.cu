// Attention's backward on sm_90a, heads of 128 in bfloat16, causal: the gradients of queries
// (attention_hopper.cu has those of keys and values, and the words), in a fixed order of sums.
//
// Two warp groups have a tile of 64 rows each, of tokens side by side: their queries and gradients
// stay in shared memory, their dq in registers, and keys and values pass, 128 at a time, from the
// last that they see to the document's first. A row's statistics are in the registers of its
// threads.
//
//   S = Q K^T   P = exp(S - lse)   dP = dO V^T   dS = P (dP - dots)   dQ += dS K
//
// Of a third group one warp brings all of it. Blocks take tiles out of a list in order of their
// keys (attention_hopper_plan.cu), each block in its turn, forwards and backwards alternately.
#include "attention_hopper.cuh"

#if ON_HOPPER

enum {
    STAGES = 2,
    // in shared memory
    AT_Q = 0, // a group's, then the other's
    AT_DO = AT_Q + 2 * 2 * HALF_ROWS,
    AT_K = AT_DO + 2 * 2 * HALF_ROWS,
    AT_V = AT_K + STAGES * 2 * HALF_KEYS,
    AT_BARRIERS = AT_V + STAGES * 2 * HALF_KEYS,
    ROWS_CAME = AT_BARRIERS, // a barrier each
    ROWS_FREE = ROWS_CAME + 8,
    K_CAME = ROWS_FREE + 8, // a stage each
    V_CAME = K_CAME + STAGES * 8,
    K_FREE = V_CAME + STAGES * 8,
    V_FREE = K_FREE + STAGES * 8,
    END = V_FREE + STAGES * 8
};
static_assert(END + 1024 <= HOPPER_SHARED, "what the host asks for");

// The round-th tile of this block's; false: there is none, nor in a later round, for all rounds but
// the last are full.
struct Turn {
    pmli_hopper_queries tile;
    int keys; // tiles of them
    __device__ inline bool take(const pmli_attention_hopper_params &p, int round, int tokens)
    {
        const int place = round % 2 == 0 ? (int)blockIdx.x : (int)(gridDim.x - 1 - blockIdx.x);
        const int at = round * (int)gridDim.x + place;
        if (at >= p.lists[HOPPER_BLOCKS])
            return false;
        *(int4 *)&tile = *(const int4 *)(p.queries + at);
        keys = (min(tile.first + 2 * tokens, tile.rows) + KEYS - 1) / KEYS;
        return true;
    }
};

__device__ inline void bring_all(const pmli_attention_hopper_params &p, unsigned shared, int group)
{
    Ring<STAGES> ring(1);
    unsigned rows = 1;
    const int tokens = ROWS / group, bytes = 2 * 2 * 2 * tokens * group * 128;
    Turn turn = {};
    for (int round = 0; turn.take(p, round, tokens); round++) {
        const int kv = turn.tile.kv_head, first = turn.tile.token + turn.tile.first;
        barrier_wait(shared + ROWS_FREE, rows);
        rows ^= 1;
        barrier_expect(shared + ROWS_CAME, bytes);
        for (int tile = 0; tile < 2; tile++)
            for (int half = 0; half < 2; half++) {
                const unsigned to = shared + (2 * tile + half) * HALF_ROWS;
                bring_box(to + AT_Q, &p.q, half * 64, kv * group, first + tile * tokens,
                          shared + ROWS_CAME);
                bring_box(to + AT_DO, &p.dout, half * 64, kv * group, first + tile * tokens,
                          shared + ROWS_CAME);
            }
        for (int i = turn.keys - 1; i >= 0; i--, ring.step()) {
            const unsigned k_came = shared + K_CAME + ring.stage * 8,
                           v_came = shared + V_CAME + ring.stage * 8;
            const unsigned to = shared + ring.stage * 2 * HALF_KEYS;
            const int key = turn.tile.token + i * KEYS;
            barrier_wait(shared + K_FREE + ring.stage * 8, ring.phase);
            barrier_expect(k_came, 2 * HALF_KEYS);
            bring_box(to + AT_K, &p.k, 0, kv, key, k_came);
            bring_box(to + AT_K + HALF_KEYS, &p.k, 64, kv, key, k_came);
            barrier_wait(shared + V_FREE + ring.stage * 8, ring.phase);
            barrier_expect(v_came, 2 * HALF_KEYS);
            bring_box(to + AT_V, &p.v, 0, kv, key, v_came);
            bring_box(to + AT_V + HALF_KEYS, &p.v, 64, kv, key, v_came);
        }
    }
}

// One of the two groups that multiply.
__device__ inline void multiply_all(const pmli_attention_hopper_params &p, unsigned shared,
                                    int group, int half)
{
    const int thread = threadIdx.x % GROUP, warp = thread / 32, lane = thread % 32;
    const int tokens = ROWS / group;
    const float scale = p.scale * LOG2_E;
    const unsigned long long queries = along(shared + AT_Q + half * 2 * HALF_ROWS),
                             douts = along(shared + AT_DO + half * 2 * HALF_ROWS);
    float dq[64];        // [64 rows, 128]
    float s[64], dp[64]; // [64 rows, 128 keys]
    unsigned ew[32];     // dS in 16 bits, first operand of a product
    float lse[2], dots[2];
    int token[2]; // of the thread's two rows, within the document
    Ring<STAGES> ring(0);
    unsigned rows_phase = 0;
    Turn turn = {};

    const auto scores = [&]() {
        const unsigned long long keys = along(shared + AT_K + ring.stage * 2 * HALF_KEYS);
        barrier_wait(shared + K_CAME + ring.stage * 8, ring.phase);
        multiply_heads(s, queries, HALF_ROWS, keys, HALF_KEYS);
    };
    const auto gradients = [&]() {
        const unsigned long long values = along(shared + AT_V + ring.stage * 2 * HALF_KEYS);
        barrier_wait(shared + V_CAME + ring.stage * 8, ring.phase);
        multiply_heads(dp, douts, HALF_ROWS, values, HALF_KEYS);
    };
    // P, of keys from `key` on.
    const auto probabilities = [&](int key) {
        settled(s);
#pragma unroll
        for (int i = 0; i < 64; i++)
            s[i] = exp2_fast(fmaf(s[i], scale, -lse[i / 2 % 2]));
        if (key + KEYS > turn.tile.first + half * tokens) {
#pragma unroll
            for (int i = 0; i < 64; i++) {
                const int at = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                s[i] = at > token[i / 2 % 2] ? 0.0f : s[i];
            }
        }
    };
    const auto add_dq = [&]() {
#pragma unroll
        for (int i = 0; i < 32; i++)
            ew[i] = narrow_two<bf16>(s[2 * i] * (dp[2 * i] - dots[i % 2]),
                                     s[2 * i + 1] * (dp[2 * i + 1] - dots[i % 2]));
        settled(ew);
        const unsigned long long keys = down(shared + AT_K + ring.stage * 2 * HALF_KEYS, HALF_KEYS);
        multiply_words<8>(dq, ew, keys);
    };
    const auto leave = [&](unsigned barrier) {
        if (lane == 0)
            barrier_arrive(shared + barrier);
    };
    // Keys and values behind the document's end are another's, or nobody's: zeros, lest 0 times
    // them be no number. Each group has half the columns.
    const auto clear_behind = [&](int first) {
        if (first >= KEYS)
            return;
        barrier_wait(shared + K_CAME + ring.stage * 8, ring.phase);
        barrier_wait(shared + V_CAME + ring.stage * 8, ring.phase);
        for (int row = first + thread / 8; row < KEYS; row += GROUP / 8)
            for (int at = AT_K; at <= AT_V; at += AT_V - AT_K)
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                                 shared + at + (ring.stage * 2 + half) * HALF_KEYS + row * 128 +
                                 thread % 8 * 16),
                             "r"(0)
                             : "memory");
        show_writes();
        barrier_meet(BOTH, 2 * GROUP);
    };

    for (int round = 0; turn.take(p, round, tokens); round++) {
        int key = (turn.keys - 1) * KEYS;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = warp * 16 + lane / 4 + 8 * r;
            token[r] = turn.tile.first + half * tokens + row / group;
            const bool there = row < tokens * group && token[r] < turn.tile.rows;
            const float2 x =
                there
                    ? ((const float2 *)p.stats)[(long long)(turn.tile.token + token[r]) * p.heads +
                                                turn.tile.kv_head * group + row % group]
                    : make_float2(INFINITE, 0.0f);
            lse[r] = x.x, dots[r] = x.y;
        }
#pragma unroll
        for (int i = 0; i < 64; i++)
            dq[i] = 0;
        settled(dq);
        barrier_wait(shared + ROWS_CAME, rows_phase);
        rows_phase ^= 1;
        clear_behind(turn.tile.rows - key);
        scores();
        gradients();
        products_left<1>();
        probabilities(key);
        products_left<0>();
        settled(dp);
#pragma unroll 1
        for (int i = 1; i < turn.keys; i++) {
            const int stage = ring.stage;
            leave(V_FREE + stage * 8);
            add_dq();
            ring.step();
            key -= KEYS;
            scores();
            products_left<1>();
            settled(ew);
            leave(K_FREE + stage * 8);
            gradients();
            products_left<1>();
            probabilities(key);
            products_left<0>();
            settled(dp);
        }
        leave(ROWS_FREE);
        leave(V_FREE + ring.stage * 8);
        add_dq();
        products_left<0>();
        settled(ew), settled(dq);
        leave(K_FREE + ring.stage * 8);
        ring.step();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = warp * 16 + lane / 4 + 8 * r;
            if (row >= tokens * group || token[r] >= turn.tile.rows)
                continue;
            if (p.pos != nullptr)
                turn_back(dq, r, angles_of(p, turn.tile.token + token[r]));
            unsigned *to =
                (unsigned *)((bf16 *)p.dq + (long long)(turn.tile.token + token[r]) * p.ld_dq +
                             (turn.tile.kv_head * group + row % group) * HEAD) +
                lane % 4;
#pragma unroll
            for (int b = 0; b < 16; b++)
                to[b * 4] =
                    narrow_two<bf16>(dq[4 * b + 2 * r] * p.scale, dq[4 * b + 2 * r + 1] * p.scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1)
    attend_hopper_bwd_q(const __grid_constant__ pmli_attention_hopper_params p)
{
    extern __shared__ char raw[];
    const unsigned shared = boxes_from(raw);
    const int role = threadIdx.x / GROUP, group = p.heads / p.kv_heads;
    if (threadIdx.x == 0) {
        barrier_begin(shared + ROWS_CAME, 1);
        barrier_begin(shared + ROWS_FREE, WARPS);
        for (int i = 0; i < STAGES; i++) {
            barrier_begin(shared + K_CAME + i * 8, 1);
            barrier_begin(shared + V_CAME + i * 8, 1);
            barrier_begin(shared + K_FREE + i * 8, WARPS);
            barrier_begin(shared + V_FREE + i * 8, WARPS);
        }
        barriers_begun();
    }
    __syncthreads();
    if (role > 0) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        multiply_all(p, shared, group, role - 1);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0)
            bring_all(p, shared, group);
    }
}

#else
extern "C" __global__ void attend_hopper_bwd_q(const pmli_attention_hopper_params)
{
}
#endif
