// Attention backward on tensor cores, in two kernels that each own what they write, so that no sum
// depends on timing: one makes dk and dv of 128 keys over all their queries, the other dq of 128
// queries over all their keys. Scores are made in both, for two products of seven more than a
// version that adds up dq with atomics. With p = exp(s - lse), D = sum(dout o) of a query's row:
//
//   dv = p^T dout,   ds = p (dout v^T - D),   dk = scale ds^T q,   dq = scale ds k
#include "attention.cuh"

#define WARPS   8
#define THREADS (WARPS * 32)
#define OWN     128 // rows a block owns, 16 a warp

// shared: | k [128,D] | v [128,D] | two stages of: q [STEP,D] | dout [STEP,D] | lse, D [2,STEP] |
// Scores are computed transposed, keys by queries: p^T and ds^T are then left operands as they
// come.
template <typename T, int D, int STEP>
__device__ void keys_and_values(const pmli_attention_params &p)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const Tile tile = find_tile(p.cu_k, p.slots, p.tokens_k, OWN, (int)blockIdx.x);
    if (tile.document < 0)
        return;
    const int2 queries = partner(p.cu_q, p.slots, tile.document);
    const int kv_head = blockIdx.y, group = p.heads / p.kv_heads;
    const int offset = tile.rows - queries.y;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int keys = min(OWN, tile.rows - tile.first);
    const T *k = (const T *)p.k + (long long)(tile.begin + tile.first) * p.ld_k + kv_head * D;
    const T *v = (const T *)p.v + (long long)(tile.begin + tile.first) * p.ld_v + kv_head * D;

    constexpr unsigned OWN_BYTES = OWN * D * 2, STEP_BYTES = STEP * D * 2;
    constexpr unsigned STAGE = 2 * STEP_BYTES + 2 * STEP * sizeof(float);
    const unsigned k_tile = shared_address(shared), v_tile = k_tile + OWN_BYTES;
    const unsigned stages = v_tile + OWN_BYTES;

    // Queries that see any of these keys: from the diagonal on, to the end of the last key's
    // window.
    const int begin = max(0, tile.first - offset) / STEP * STEP;
    int end = queries.y;
    if (p.window > 0)
        end = min(end, tile.first + keys - 1 - offset + p.window);
    const int steps = end > begin ? (end - begin + STEP - 1) / STEP : 0, all = steps * group;

    auto load_step = [&](int turn) {
        const int head = kv_head * group + turn / steps, at = begin + turn % steps * STEP;
        const unsigned to = stages + (turn & 1) * STAGE;
        const long long row = queries.x + at;
        load_tile<T, D, STEP, THREADS>(to, (const T *)p.q + row * p.ld_q + head * D, p.ld_q,
                                       queries.y - at);
        load_tile<T, D, STEP, THREADS>(to + STEP_BYTES,
                                       (const T *)p.dout + row * p.ld_dout + head * D, p.ld_dout,
                                       queries.y - at);
        float *numbers = (float *)(shared + (to - k_tile) + 2 * STEP_BYTES);
        if (threadIdx.x < 2 * STEP) {
            const int i = threadIdx.x % STEP;
            const bool there = at + i < queries.y;
            numbers[threadIdx.x] = !there               ? 0.0f
                                   : threadIdx.x < STEP ? p.lse[head * p.ld_lse + row + i] * LOG2_E
                                                        : p.dots[head * p.tokens_q + row + i];
        }
    };
    load_tile<T, D, OWN, THREADS>(k_tile, k, p.ld_k, keys);
    load_tile<T, D, OWN, THREADS>(v_tile, v, p.ld_v, keys);
    if (all > 0)
        load_step(0);
    copy_commit();

    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    const float factor = p.scale * LOG2_E;
    const int key = tile.first + warp * 16 + g;
    for (int turn = 0; turn < all; turn++) {
        if (turn + 1 < all)
            load_step(turn + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const int at = begin + turn % steps * STEP;
        const unsigned q_tile = stages + (turn & 1) * STAGE, d_tile = q_tile + STEP_BYTES;
        const float *lse = (const float *)(shared + (d_tile + STEP_BYTES - k_tile));
        const float *dots = lse + STEP;

        float s[STEP / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            unsigned a[4];
            fragment_a<D>(a, k_tile, warp * 16, d * 2);
#pragma unroll
            for (int n = 0; n < STEP / 16; n++) {
                unsigned b[4];
                fragment_b<D>(b, q_tile, n * 16, d * 2);
                multiply<T>(s[2 * n], a, b[0], b[1]);
                multiply<T>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
        const bool edge =
            at + offset < tile.first + OWN || at + STEP > queries.y || p.window > 0 || keys < OWN;
#pragma unroll
        for (int n = 0; n < STEP / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = n * 8 + t * 2 + (e & 1), query = at + i, mine = key + (e >> 1) * 8;
                float x = exp2_fast(s[n][e] * factor - lse[i]);
                if (edge && (mine > query + offset || query >= queries.y || mine >= tile.rows ||
                             (p.window > 0 && mine <= query + offset - p.window)))
                    x = 0;
                s[n][e] = x;
            }

#pragma unroll
        for (int j = 0; j < STEP / 16; j++) {
            const unsigned a[4] = {packed<T>(s[2 * j][0], s[2 * j][1]),
                                   packed<T>(s[2 * j][2], s[2 * j][3]),
                                   packed<T>(s[2 * j + 1][0], s[2 * j + 1][1]),
                                   packed<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                unsigned b[4];
                fragment_b_across<D>(b, d_tile, j * 16, n * 2);
                multiply<T>(dv[2 * n], a, b[0], b[1]);
                multiply<T>(dv[2 * n + 1], a, b[2], b[3]);
            }
        }

        float dp[STEP / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            unsigned a[4];
            fragment_a<D>(a, v_tile, warp * 16, d * 2);
#pragma unroll
            for (int n = 0; n < STEP / 16; n++) {
                unsigned b[4];
                fragment_b<D>(b, d_tile, n * 16, d * 2);
                multiply<T>(dp[2 * n], a, b[0], b[1]);
                multiply<T>(dp[2 * n + 1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < STEP / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] *= dp[n][e] - dots[n * 8 + t * 2 + (e & 1)];

#pragma unroll
        for (int j = 0; j < STEP / 16; j++) {
            const unsigned a[4] = {packed<T>(s[2 * j][0], s[2 * j][1]),
                                   packed<T>(s[2 * j][2], s[2 * j][3]),
                                   packed<T>(s[2 * j + 1][0], s[2 * j + 1][1]),
                                   packed<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                unsigned b[4];
                fragment_b_across<D>(b, q_tile, j * 16, n * 2);
                multiply<T>(dk[2 * n], a, b[0], b[1]);
                multiply<T>(dk[2 * n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    copy_wait<0>();
    __syncthreads();
    const long long row = tile.begin + tile.first + warp * 16;
    store_rows<T, D>(dk, p.scale, p.scale, k_tile, warp * 16,
                     (T *)p.dk + row * p.ld_dk + kv_head * D, p.ld_dk, keys - warp * 16);
    store_rows<T, D>(dv, 1.0f, 1.0f, v_tile, warp * 16, (T *)p.dv + row * p.ld_dv + kv_head * D,
                     p.ld_dv, keys - warp * 16);
}

// shared: | q [128,D] | dout [128,D] | two stages of: k [STEP,D] | v [STEP,D] |
template <typename T, int D, int STEP> __device__ void queries_of(const pmli_attention_params &p)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const Tile tile =
        find_tile(p.cu_q, p.slots, p.tokens_q, OWN, (int)(gridDim.x - 1 - blockIdx.x));
    if (tile.document < 0)
        return;
    const int2 keys = partner(p.cu_k, p.slots, tile.document);
    const int head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads);
    const int offset = keys.y - tile.rows;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int queries = min(OWN, tile.rows - tile.first);
    const long long row = tile.begin + tile.first;
    const T *k = (const T *)p.k + (long long)keys.x * p.ld_k + kv_head * D;
    const T *v = (const T *)p.v + (long long)keys.x * p.ld_v + kv_head * D;

    constexpr unsigned OWN_BYTES = OWN * D * 2, STEP_BYTES = STEP * D * 2, STAGE = 2 * STEP_BYTES;
    const unsigned q_tile = shared_address(shared), d_tile = q_tile + OWN_BYTES;
    const unsigned stages = d_tile + OWN_BYTES;
    const int end = keys.y == 0 ? 0 : max(0, min(keys.y, tile.first + queries + offset));
    int begin = p.window > 0 ? max(0, tile.first + offset - p.window + 1) / STEP * STEP : 0;
    if (begin > end)
        begin = end;

    auto load_step = [&](int at, int turn) {
        const unsigned to = stages + (turn & 1) * STAGE;
        load_tile<T, D, STEP, THREADS>(to, k + at * p.ld_k, p.ld_k, keys.y - at);
        load_tile<T, D, STEP, THREADS>(to + STEP_BYTES, v + at * p.ld_v, p.ld_v, keys.y - at);
    };
    load_tile<T, D, OWN, THREADS>(q_tile, (const T *)p.q + row * p.ld_q + head * D, p.ld_q,
                                  queries);
    load_tile<T, D, OWN, THREADS>(d_tile, (const T *)p.dout + row * p.ld_dout + head * D, p.ld_dout,
                                  queries);
    if (begin < end)
        load_step(begin, 0);
    copy_commit();

    float dq[D / 8][4] = {}, lse[2], dots[2];
    const float factor = p.scale * LOG2_E;
    const int query = tile.first + warp * 16 + g;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = warp * 16 + half * 8 + g;
        lse[half] = i < queries ? p.lse[head * p.ld_lse + row + i] * LOG2_E : 0.0f;
        dots[half] = i < queries ? p.dots[head * p.tokens_q + row + i] : 0.0f;
    }
    for (int at = begin, turn = 0; at < end; at += STEP, turn++) {
        if (at + STEP < end)
            load_step(at + STEP, turn + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const unsigned k_tile = stages + (turn & 1) * STAGE, v_tile = k_tile + STEP_BYTES;

        float s[STEP / 8][4] = {}, dp[STEP / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            unsigned a[4], c[4];
            fragment_a<D>(a, q_tile, warp * 16, d * 2);
            fragment_a<D>(c, d_tile, warp * 16, d * 2);
#pragma unroll
            for (int n = 0; n < STEP / 16; n++) {
                unsigned b[4];
                fragment_b<D>(b, k_tile, n * 16, d * 2);
                multiply<T>(s[2 * n], a, b[0], b[1]);
                multiply<T>(s[2 * n + 1], a, b[2], b[3]);
                fragment_b<D>(b, v_tile, n * 16, d * 2);
                multiply<T>(dp[2 * n], c, b[0], b[1]);
                multiply<T>(dp[2 * n + 1], c, b[2], b[3]);
            }
        }
        const bool edge =
            at + STEP > tile.first + warp * 16 + offset + 1 || at + STEP > keys.y || p.window > 0;
#pragma unroll
        for (int n = 0; n < STEP / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = at + n * 8 + t * 2 + (e & 1), last = query + (e >> 1) * 8 + offset;
                float x = exp2_fast(s[n][e] * factor - lse[e >> 1]) * (dp[n][e] - dots[e >> 1]);
                if (edge &&
                    (key > last || key >= keys.y || (p.window > 0 && key <= last - p.window)))
                    x = 0;
                s[n][e] = x;
            }
#pragma unroll
        for (int j = 0; j < STEP / 16; j++) {
            const unsigned a[4] = {packed<T>(s[2 * j][0], s[2 * j][1]),
                                   packed<T>(s[2 * j][2], s[2 * j][3]),
                                   packed<T>(s[2 * j + 1][0], s[2 * j + 1][1]),
                                   packed<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                unsigned b[4];
                fragment_b_across<D>(b, k_tile, j * 16, n * 2);
                multiply<T>(dq[2 * n], a, b[0], b[1]);
                multiply<T>(dq[2 * n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    copy_wait<0>();
    __syncthreads();
    store_rows<T, D>(dq, p.scale, p.scale, q_tile, warp * 16,
                     (T *)p.dq + (row + warp * 16) * p.ld_dq + head * D, p.ld_dq,
                     queries - warp * 16);
}

#define BACKWARD(name, body, T, D)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const pmli_attention_params p)   \
    {                                                                                              \
        body<T, D, 64>(p);                                                                         \
    }
#define BOTH(T, D, suffix)                                                                         \
    BACKWARD(attend_bwd_kv_##D##_##suffix, keys_and_values, T, D)                                  \
    BACKWARD(attend_bwd_q_##D##_##suffix, queries_of, T, D)
BOTH(bf16, 64, bf16)
BOTH(f16, 64, f16)
BOTH(bf16, 128, bf16)
BOTH(f16, 128, f16)
