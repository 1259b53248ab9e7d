// Attention forward on tensor cores: Dao, "FlashAttention-2", 2023. A block has 128 queries of one
// head of one document and walks over its keys, 64 at a time, two tiles deep:
//
//   shared:  | q [128,D] | k [64,D] | v [64,D] | k | v |        four warps, 32 queries each
//
// Scores stay in registers: what mma.sync leaves as an accumulator is, rounded, its left operand.
#include "attention.cuh"

#define QUERIES 128
#define KEYS    64
#define WARPS   4
#define M_TILES 2 // of 16 queries, for each warp

template <typename T, int D> __device__ void attend(const pmli_attention_params &p)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const Tile tile =
        find_tile(p.cu_q, p.slots, p.tokens_q, QUERIES, (int)(gridDim.x - 1 - blockIdx.x));
    if (tile.document < 0)
        return;
    const int2 keys = partner(p.cu_k, p.slots, tile.document);
    const int head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads);
    const int offset = keys.y - tile.rows; // query i sees keys up to i + offset
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const T *q = (const T *)p.q + (long long)(tile.begin + tile.first) * p.ld_q + head * D;
    const T *k = (const T *)p.k + (long long)keys.x * p.ld_k + kv_head * D;
    const T *v = (const T *)p.v + (long long)keys.x * p.ld_v + kv_head * D;
    const int queries = min(QUERIES, tile.rows - tile.first);

    const unsigned q_tile = shared_address(shared), stage = q_tile + QUERIES * D * 2;
    constexpr unsigned STAGE = 2 * KEYS * D * 2, V_AT = KEYS * D * 2;
    const int end = keys.y == 0 ? 0 : max(0, min(keys.y, tile.first + queries + offset));
    int begin = p.window > 0 ? max(0, tile.first + offset - p.window + 1) / KEYS * KEYS : 0;
    if (begin > end)
        begin = end;

    auto load_keys = [&](int at, int turn) {
        const unsigned to = stage + (turn & 1) * STAGE;
        load_tile<T, D, KEYS, WARPS * 32>(to, k + at * p.ld_k, p.ld_k, keys.y - at);
        load_tile<T, D, KEYS, WARPS * 32>(to + V_AT, v + at * p.ld_v, p.ld_v, keys.y - at);
    };
    load_tile<T, D, QUERIES, WARPS * 32>(q_tile, q, p.ld_q, queries);
    if (begin < end)
        load_keys(begin, 0);
    copy_commit();

    float acc[M_TILES][D / 8][4] = {}, top[M_TILES][2], sum[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        top[m][0] = top[m][1] = -INFINITE, sum[m][0] = sum[m][1] = 0;
    const float factor = p.scale * LOG2_E;

    for (int at = begin, turn = 0; at < end; at += KEYS, turn++) {
        if (at + KEYS < end)
            load_keys(at + KEYS, turn + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const unsigned k_tile = stage + (turn & 1) * STAGE, v_tile = k_tile + V_AT;

        float s[M_TILES][KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            unsigned a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; m++)
                fragment_a<D>(a[m], q_tile, (warp * M_TILES + m) * 16, d * 2);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                unsigned b[4];
                fragment_b<D>(b, k_tile, n * 16, d * 2);
#pragma unroll
                for (int m = 0; m < M_TILES; m++) {
                    multiply<T>(s[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
            const int row = tile.first + (warp * M_TILES + m) * 16 + g + offset;
            const bool edge = at + KEYS > tile.first + (warp * M_TILES + m) * 16 + offset + 1 ||
                              at + KEYS > keys.y || p.window > 0;
            if (edge)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = at + n * 8 + t * 2 + (e & 1), last = row + (e >> 1) * 8;
                        if (key > last || key >= keys.y || (p.window > 0 && key <= last - p.window))
                            s[m][n][e] = -INFINITE;
                    }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float high = top[m][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    high = fmaxf(high, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, 1));
                high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, 2));
                // A row that has seen nothing yet: its exponents must be -inf, not NaN.
                const float base = high == -INFINITE ? 0.0f : high * factor;
                const float shrink = exp2_fast(top[m][half] * factor - base);
                top[m][half] = high;
                float line = 0;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[m][n][e] = exp2_fast(s[m][n][e] * factor - base);
                        line += s[m][n][e];
                    }
                sum[m][half] = sum[m][half] * shrink + line;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    acc[m][n][2 * half] *= shrink;
                    acc[m][n][2 * half + 1] *= shrink;
                }
            }
        }

#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            unsigned a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                a[m][0] = packed<T>(s[m][2 * j][0], s[m][2 * j][1]);
                a[m][1] = packed<T>(s[m][2 * j][2], s[m][2 * j][3]);
                a[m][2] = packed<T>(s[m][2 * j + 1][0], s[m][2 * j + 1][1]);
                a[m][3] = packed<T>(s[m][2 * j + 1][2], s[m][2 * j + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                unsigned b[4];
                fragment_b_across<D>(b, v_tile, j * 16, n * 2);
#pragma unroll
                for (int m = 0; m < M_TILES; m++) {
                    multiply<T>(acc[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
    copy_wait<0>();
    __syncthreads();

#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
        const int row = (warp * M_TILES + m) * 16;
        float by[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float all = sum[m][half];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            by[half] = all > 0 ? 1.0f / all : 0.0f;
            if (t == 0 && row + half * 8 + g < queries)
                p.lse[head * p.ld_lse + tile.begin + tile.first + row + half * 8 + g] =
                    all > 0 ? top[m][half] * p.scale + logf(all) : 0.0f;
        }
        T *o = (T *)p.o + (long long)(tile.begin + tile.first + row) * p.ld_o + head * D;
        store_rows<T, D>(acc[m], by[0], by[1], q_tile, row, o, p.ld_o, queries - row);
    }
}

#define ATTEND(name, T, D)                                                                         \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const pmli_attention_params p)   \
    {                                                                                              \
        attend<T, D>(p);                                                                           \
    }
ATTEND(attend_64_bf16, bf16, 64)
ATTEND(attend_64_f16, f16, 64)
ATTEND(attend_128_bf16, bf16, 128)
ATTEND(attend_128_f16, f16, 128)
