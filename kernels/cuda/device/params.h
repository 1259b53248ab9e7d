/* What the host hands to a kernel: one struct each, read by the C compiler and by the CUDA
 * compiler, so that the two cannot disagree. Built-in types only: run-time compilers have no
 * system headers. Leading dimensions count elements. */
#ifndef PMLI_CUDA_PARAMS_H
#define PMLI_CUDA_PARAMS_H

/* Units that a thread of rows.cu moves at a time. */
#define UNITS_A_THREAD 4

/* Places in a row of hyper, as enum pml_hyper has them: op_update.c asserts that they agree. */
#define HYPER_LR              0
#define HYPER_ONE_MINUS_BETA1 1
#define HYPER_ONE_MINUS_BETA2 2
#define HYPER_EPS             3
#define HYPER_WEIGHT_DECAY    4
#define HYPER_BIAS1           5
#define HYPER_BIAS2           6
#define HYPER_MEAN            7
#define HYPER_MAX_NORM        8
#define HYPER_GRAD_SCALE      9
#define HYPER_MOMENTUM        10
#define HYPER_NEW_GRAD        11

/* y[to(i),:] = x[from(i),:] for i < rows; an absent index means i itself; to(i) < 0: skipped;
 * from(i) < 0: zeros. */
typedef struct pmli_rows_params {
    const void *x;
    void *y;
    const int *from, *to;
    long long rows, cols, ld_x, ld_y;
} pmli_rows_params;

typedef struct pmli_fill_params {
    void *y;
    long long rows, cols, ld_y;
    double value;
} pmli_fill_params;

/* y = m x, or y += m x: m is 0 or keep, by the 16 bits that (rng, purpose, place, column) have:
 * keep where they, in a word's high half, are `least` or more. blocks_a_row: for rows of whole
 * packs. */
typedef struct pmli_dropout_params {
    const void *x;
    void *y;
    const long long *rng, *places;
    long long rows, cols, ld_x, ld_y;
    unsigned purpose, least, blocks_a_row;
    float keep;
    int add;
} pmli_dropout_params;

/* What masked.cu works in: sets of 16 ranks (groups) a launch, at the most; columns of a warp; rows
 * at a time; threads of a forward's block. */
#define MASKED_GROUPS  3
#define MASKED_STRIP   64
#define MASKED_ROWS    16
#define MASKED_THREADS 256

/* Forward: how many strips a warp has under way, and a block's shared memory, which partial sums
 * fit, too. */
#define MASKED_DOWN_STAGES 3
#define MASKED_DOWN_SHARED (MASKED_DOWN_STAGES * MASKED_THREADS * 64)

/* Backward, of code for a GPU of that capability (86: 8.6), of which a block may have 99 KiB of
 * shared memory, 163 (8.0) or 227: threads, and how many tiles are under way. both: da and dx. A
 * tile is of x, of dx or of both, v and places; a stays. */
#define MASKED_SMALL(code) ((code) == 86 || (code) == 89 || (code) / 10 == 12)
#define MASKED_BACK_THREADS(groups, both, code)                                                    \
    ((groups) == 1 && (both) && (code) >= 90 && !MASKED_SMALL(code) ? 512 : 256)
#define MASKED_STAGES(both, code)                                                                  \
    ((both) ? (MASKED_SMALL(code) ? 2 : 3) : (MASKED_SMALL(code) ? 3 : 4))
#define MASKED_TILE(groups, both, code)                                                            \
    (MASKED_BACK_THREADS(groups, both, code) * ((both) ? 128 : 64) + (groups)*512 + 128)
#define MASKED_SHARED(groups, both, code)                                                          \
    (MASKED_STAGES(both, code) * MASKED_TILE(groups, both, code) +                                 \
     MASKED_BACK_THREADS(groups, both, code) * 64 * (groups))

/* Of group g, ranks[g] <= 16 rows of a and columns of u and v from first[g] on, under the mask of
 * purpose[g]:  forward  u = scale (m x) a^T, where scale has keep in it already;  backward
 * parts [y][all groups' ranks][cols] = keep v^T (m x) of the y-th block's rows, dx += keep m (v a),
 * each where given. least, keep: as dropout's. */
typedef struct pmli_masked_params {
    const void *x, *a, *v;
    void *u, *dx;
    float *parts;
    const long long *rng, *places;
    long long ld_x, ld_u, ld_v, ld_dx;
    int rows, cols, ld_a, first[MASKED_GROUPS], ranks[MASKED_GROUPS];
    unsigned purpose[MASKED_GROUPS], least;
    float scale[MASKED_GROUPS], keep;
} pmli_masked_params;

/* What a linear layer keeps in its borders, `columns` wide, adapters side by side and zeros behind
 * the last:  w[i, k..] = b's row of i in the columns of the part that row i belongs to;
 * w[n.., :k] = a;  x = u, which may be x itself. x points at the border's first column. */
typedef struct pmli_border_params {
    const void *a, *b, *u;
    void *w, *x;
    long long n, k, tokens, ld_a, ld_b, ld_u, ld_w, ld_x;
    long long first[3], end[3]; /* rows of w that an adapter's part has */
    int columns, rank, adapters;
} pmli_border_params;

#define FEW_ROWS_THREADS 128

/* A linear layer of few rows: y [rows,n] of x [rows,k], w [n,k]; adapters a, b, u as in pml_op,
 * of which the i-th is on rows [first, end) of w. bias may be absent. */
typedef struct pmli_few_rows_params {
    const void *x, *w, *bias, *a, *b;
    void *u, *y;
    long long k, n, ld_x, ld_w, ld_a, ld_b, ld_u, ld_y;
    long long first[3], end[3];
    float scale[3];
    int rows, rank, adapters;
} pmli_few_rows_params;

/* What low_rank.cu works in: rows and columns of dy at a time, the greatest rank, and how many such
 * tiles are under way in a block's shared memory. */
#define LOW_RANK_ROWS    32
#define LOW_RANK_COLUMNS 512
#define LOW_RANK_RANK    16
#define LOW_RANK_STAGES  4

/* v_p = scale[p] dy_p b_p;  db_p += dy_p^T u_p, for each adapter p: its part of dy are columns
 * [column, column + columns), its part of b and db the rows from b_row on, its part of u and v
 * `rank` columns. tile[p]: its first tile of columns, tile[adapters]: how many there are. v_parts
 * [tiles][tokens][16], b_parts [parts][16][tiles * 512]. */
typedef struct pmli_low_rank_params {
    const void *dy, *u, *b;
    void *v;
    float *db, *v_parts, *b_parts;
    long long tokens, ld_dy, ld_u, ld_b, ld_v, ld_db, b_row[3];
    int column[3], columns[3], tile[4];
    int adapters, rank, parts;
    float scale[3];
} pmli_low_rank_params;

/* A matrix as the copy engine reads it: cuda.h's CUtensorMap, which the driver fills in. */
typedef struct pmli_tensor_map {
    unsigned long long words[16];
} __attribute__((aligned(64))) pmli_tensor_map;

/* What pass.cu works in: a stage is a tile of PASS_ROWS x PASS_COLUMNS and the same rows of u, 16
 * columns; so many stages are under way in a block's shared memory. A block has PASS_HALVES stages'
 * columns, and b of them beside; the rest is what the driver's alignment takes from 1024 bytes, and
 * barriers. */
#define PASS_ROWS    64
#define PASS_COLUMNS 256
#define PASS_HALVES  2
#define PASS_STAGES  5
#define PASS_THREADS 288
#define PASS_STAGE   (PASS_ROWS * 2 * (PASS_COLUMNS + 16))
#define PASS_B       (PASS_HALVES * PASS_COLUMNS * 16 * 2)
#define PASS_SHARED  (1024 + PASS_STAGES * PASS_STAGE + PASS_B + 256)

/* v_p = scale[p] x_p b_p;  d_p += x_p^T u_p  for each adapter p, as low_rank has them.
 * x [rows, columns[p]], b [columns[p], rank], u [rows, *]: as boxes of 64, 16 and 16 columns.
 * d_row[p]: its first row of d. tile[p]: its first tile of columns, tile[adapters]: how many there
 * are. rank: columns of each b and v. groups: blocks that share a tile's rows. Four sums at a time,
 * as a lane has them: v_parts [tiles][rows in 64s][16], d_parts [groups][tiles][its columns][16].
 */
typedef struct pmli_pass_params {
    pmli_tensor_map x[3], b[3], u;
    void *v;
    float *d, *v_parts, *d_parts;
    long long rows, ld_v, ld_d, d_row[3];
    int columns[3], tile[4];
    int adapters, rank, groups;
    float scale[3];
} pmli_pass_params;

/* What gemm_hopper.cu works in: a block's tile of c, k of a stage and how many of them are under
 * way; units of 4 x 2 tiles, which are what is handed out. Stages, what is written of a tile, the
 * driver's alignment and barriers are a block's shared memory. */
#define GEMM_ROWS    128
#define GEMM_COLUMNS 256
#define GEMM_STEP    64
#define GEMM_STAGES  4
#define GEMM_DOWN    4
#define GEMM_ACROSS  2
#define GEMM_TWO     2 /* tiles below each other, of a cluster of two */
#define GEMM_THREADS 384
#define GEMM_STAGE   ((GEMM_ROWS + GEMM_COLUMNS) * GEMM_STEP * 2)
#define GEMM_OUT     (4 * 64 * 64 * 2)
#define GEMM_SHARED  (1024 + GEMM_STAGES * GEMM_STAGE + GEMM_OUT + 64)
#define GEMM_LEAST   9 /* steps: a tile is written while the first eight of the next are made */

/* c [m,n] = a [m,k] b, b [n,k] or [k,n]: as boxes of 64 columns. steps: of k, the last of them with
 * `last` times 16. units_m x units_n units lie in bands of `band` along m, and are counted down a
 * band's columns, one column after the other. Of them clusters of eight have `eights`, those of two
 * `twos`, and those of two what lies below them, if it is no more than two rows of tiles: `halves`,
 * a unit's columns each, or none. */
typedef struct pmli_gemm_hopper_params {
    pmli_tensor_map a, b, c;
    int steps, last, units_m, units_n, band, eights, twos, halves;
} pmli_gemm_hopper_params;

typedef struct pmli_rmsnorm_params {
    const void *x, *add, *weight; /* add may be absent, and sum then is */
    void *sum, *y;
    float *rstd;
    long long rows, cols, ld_x, ld_add, ld_sum, ld_y;
    float eps;
} pmli_rmsnorm_params;

/* Rows that wait in shared memory where the weight's gradient is made, too; where x or sums are
 * wider than dy. */
#define RMSNORM_PLACES      4
#define RMSNORM_PLACES_WIDE 3

/* dx = rstd (g - n mean(g n)) + dres with g = dy weight, n = x rstd; dres may be absent. parts
 * [blocks][cols]: of each block's rows, the sum of dy n; for the kernels that make it. */
typedef struct pmli_rmsnorm_bwd_params {
    const void *dy, *x, *weight, *dres;
    const float *rstd;
    void *dx, *rounded; /* rounded may be absent */
    float *parts;
    long long rows, cols, ld_dy, ld_x, ld_dres, ld_dx, ld_rounded;
} pmli_rmsnorm_bwd_params;

/* parts[p,c] = the sum over the p-th block of rows of x[t,c] (times y[t,c] rstd[t], where given).
 */
typedef struct pmli_columns_params {
    const void *x, *y;
    const float *rstd;
    float *parts;
    long long rows, cols, ld_x, ld_y, rows_a_part;
} pmli_columns_params;

/* out[s][c] += the sum over p of parts[s,p,c]. */
typedef struct pmli_add_parts_params {
    const float *parts;
    float *out[2];
    long long count, cols;
} pmli_add_parts_params;

typedef struct pmli_rope_params {
    void *x;
    const int *pos;
    const float *table;
    long long tokens, ld_x;
    int heads, half; /* half = head_dim / 2 */
    float sign;      /* -1: the transpose */
} pmli_rope_params;

/* gate_up [rows, 2 cols]. Forward: h is written. Backward: dh is read, y written, which may be
 * gate_up, and h where given, which may be dh. */
typedef struct pmli_swiglu_params {
    const void *gate_up, *dh;
    void *y, *h;
    long long rows, cols, ld_gate_up, ld_dh, ld_y, ld_h;
    unsigned blocks_a_row;
} pmli_swiglu_params;

/* What mlp.cu works in: rows and columns at a time, the greatest rank, and how many such tiles are
 * under way in a block's shared memory, forward and backward. */
#define MLP_ROWS        16
#define MLP_COLUMNS     512
#define MLP_RANK        16
#define MLP_STAGES      5
#define MLP_BACK_STAGES 4

/* h = silu(gate) up;  u = scale h a^T.  gate_up [tokens, 2 cols]; a [rank, cols]; parts
 * [tiles][tokens][16], tiles of 512 columns. mlp_codes: h are codes in pieces. */
typedef struct pmli_mlp_params {
    const void *gate_up, *a;
    void *h, *u;
    float *parts, *pieces;
    long long tokens, cols, ld_gate_up, ld_a, ld_h, ld_u, ld_pieces;
    int rank, tiles;
    float scale;
} pmli_mlp_params;

/* dgate_up (may be gate_up) and h (may be absent) of dh, and with them, of gate and up by
 * themselves,  v = scale dy b,  db += dy^T u,  and  da += v_down^T h.  factor: u of gate and of up,
 * and v_down; rank: columns of each; absent: none of that. v_parts [2][tiles][tokens][16],
 * row_parts [parts][16][3][tiles * 512]. mlp_bwd_codes: dgate_up, times `by`, are codes in pieces,
 * gate's before up's. */
typedef struct pmli_mlp_bwd_params {
    const void *gate_up, *dh, *factor[3], *b[2];
    const float *by;
    void *dgate_up, *h, *v[2];
    float *db[2], *da, *v_parts, *row_parts, *pieces;
    long long tokens, cols, ld_gate_up, ld_dh, ld_dgate_up, ld_h, ld_factor[3], ld_b, ld_v, ld_db,
        ld_da, ld_pieces;
    int rank[3], tiles, parts;
    float scale[2];
} pmli_mlp_bwd_params;

/* Tokens that are sorted at a time, and how many of the sorted ones at most make a part of a sum.
 */
#define EMBED_CHUNK       1024
#define EMBED_WINDOW      32
#define EMBED_IDS         (1 << 22) /* times a chunk: 32 bits */
#define EMBED_RANK_KEYS   64        /* and chunks to search that a block has at a time */
#define EMBED_RANK_CHUNKS 16

/* sorted [tokens]: id and place in the chunk, by chunks; keys [tokens]: id and token, all of them;
 * parts [2 a window][ld_parts]. */
typedef struct pmli_embed_bwd_params {
    const int *ids;
    const void *dy;
    float *dtable, *parts;
    unsigned long long *keys;
    unsigned *sorted;
    long long tokens, cols, ld_dy, ld_dtable, ld_parts;
} pmli_embed_bwd_params;

/* What loss.cu holds of a row: packs of eight logits a block, at the most, threads a block, and
 * blocks a cluster, at the most. A block has LOSS_BESIDE bytes of shared memory more, the driver's
 * own among them: three fit the 228 KiB of a processor. */
#define LOSS_SHARE   4752
#define LOSS_BESIDE  1664
#define LOSS_THREADS 256
#define LOSS_BLOCKS  8

/* logits [count,vocab] become their gradient where grad is set. rows[i] < 0: an empty slot. Held
 * rows: ld is whole packs, and what is behind a row's last logit in its last pack is overwritten.
 */
typedef struct pmli_cross_entropy_params {
    void *logits;
    const int *rows, *labels;
    const float *scale; /* absent: 1 */
    float *loss;
    long long count, vocab, ld;
    int grad;
} pmli_cross_entropy_params;

/* parts[b] = the sum over the b-th block's elements; then total[0] += the sum of parts, in order.
 */
typedef struct pmli_sum_params {
    const float *x;
    double *parts, *total;
    long long rows, cols, ld;
    int count; /* parts */
} pmli_sum_params;

typedef struct pmli_clip_params {
    const double *sumsq, *loss; /* loss and norm may be absent */
    float *hyper, *norm;
    long long groups, ld;
} pmli_clip_params;

typedef struct pmli_adamw_params {
    float *p, *m, *v;
    const float *g, *hyper;
    void *copy; /* may be absent */
    long long count;
} pmli_adamw_params;

/* wide: p, g, m, v and copy allow a lane's four elements at a time. */
typedef struct pmli_adamw_8bit_params {
    float *p, *m_largest, *v_largest;
    unsigned char *m, *v;
    const float *g, *hyper;
    void *copy; /* may be absent */
    long long count;
    int wide;
    float m_map[256], v_map[256];
} pmli_adamw_8bit_params;

/* m may be absent. */
typedef struct pmli_sgd_params {
    float *p, *m;
    const float *g, *hyper;
    void *copy; /* may be absent */
    long long count;
    int nesterov;
} pmli_sgd_params;

/* Numbers that a warp unpacks at a time: 32 blocks. */
#define NF4_TILE 2048

/* Quantised weights, one for each row of the grid, of count elements in rows of cols. tiles: how
 * many whole ones there are, 0 where codes, y or its rows do not allow 8 elements at a time. Unit i
 * of 8 elements lies in row (i * magic >> 32) >> shift. */
typedef struct pmli_nf4_params {
    struct {
        const unsigned char *codes, *absmax;
        const float *nested, *offset;
        void *y;
        long long count;
        unsigned tiles;
    } part[3];
    long long cols, ld_y;
    unsigned magic, shift;
    float values[16];
} pmli_nf4_params;

/* One weight of count elements to NF4. magnitudes [blocks]; partial [sums,32]: sums of 2^power rows
 * of 32 magnitudes. wide: x and codes allow a thread's 8 at a time. */
typedef struct pmli_nf4_quantise_params {
    const void *x;
    unsigned char *codes, *absmax;
    float *nested, *offset, *magnitudes, *partial;
    long long count, blocks, sums;
    int power, grid, wide;
    float values[16];
} pmli_nf4_quantise_params;

#define FP8_PARTS  128 /* partial results of a largest magnitude, and its blocks */
#define FP8_HELD   8   /* packs of a row that a thread keeps, so that it is read once */
#define FP8_BESIDE 16  /* columns of a border that a thread has */
#define FP8_TILE   128 /* rows and columns of a tile that a block turns round */
#define FP8_DOWN   18 /* codes alone are multiplied times 2^-18, so that float16 holds their sums */

#define FP8_PIECE 256 /* as PML_FP8_PIECE */
#define FP8_STEP  4   /* a piece's scale is a power of 2^4 */

/* Rows of x, their columns times `by` where that is given, to codes and a scale each. Where u
 * [*,u_cols] is given its codes stand in the border behind them, those of each adapter's u_rank
 * columns times its factor.
 * Or to pieces, [rows,pieces_a_row] scales, counted anew in each part_cols columns; or from those
 * to a scale each. ones [count_ones] = 1, on the way. */
typedef struct pmli_fp8_rows_params {
    const void *x, *u;
    const float *by, *factors;
    unsigned char *codes;
    float *scale, *pieces, *ones;
    long long rows, cols, part_cols, ld_x, ld_u, ld_codes, ld_pieces;
    int u_cols, u_rank, border, pieces_a_row, count_ones;
} pmli_fp8_rows_params;

/* A weight's rows to codes: none counts as less than 2^-8 of the largest, which parts [FP8_PARTS]
 * say. */
typedef struct pmli_fp8_weight_params {
    const void *x;
    const float *parts;
    unsigned char *codes;
    float *scale;
    long long cols, ld_x, ld_codes;
} pmli_fp8_weight_params;

/* parts [adapters][FP8_PARTS] of the largest of |x| in each adapter's rows [first, end), divided
 * where `over` is given by over[row + shift], which belongs to the layer's output that the row of a
 * stacked b is of. */
typedef struct pmli_fp8_largest_params {
    const void *x;
    const float *over;
    float *parts;
    long long cols, ld, first[3], end[3], shift[3];
} pmli_fp8_largest_params;

/* Columns [cols, cols + border) of codes' rows, from x times the inverse of its adapter's factor,
 * which is the largest that parts say over 448 and is left in factors: a stacked b, on the layer's
 * outputs [first, end) and less `shift` there, whose rows are divided by `over`; or where that is
 * NULL, a [u_cols,rows]. */
typedef struct pmli_fp8_border_params {
    const void *x;
    const float *over, *parts;
    float *factors;
    unsigned char *codes;
    long long rows, cols, ld, ld_codes, first[3], end[3], shift[3];
    int u_cols, border, adapters, rank;
} pmli_fp8_border_params;

/* to [cols,rows] = w [rows,cols]^T, both multiples of 16. */
typedef struct pmli_fp8_transpose_params {
    const unsigned char *w;
    unsigned char *to;
    long long rows, cols, ld_w, ld_to;
} pmli_fp8_transpose_params;

/* y [rows,cols], times 2^FP8_DOWN; row [rows]; column [cols]; bias [cols] may be NULL. */
typedef struct pmli_fp8_scales_params {
    void *y;
    const float *row, *column;
    const void *bias;
    long long rows, cols, ld;
} pmli_fp8_scales_params;

/* heads: of queries and keys together. In the backward y is dx. For heads of whole packs lanes
 * threads have a head, a power of two up to 32, and a block heads_a_block of them side by side. */
#define HEAD_NORM_TOKENS      4 /* that a thread has under way, forward and backward */
#define HEAD_NORM_BACK_TOKENS 2

typedef struct pmli_head_norm_params {
    const void *x, *dy, *q_weight, *k_weight;
    void *y;
    float *rstd, *parts;
    long long tokens, ld_x, ld_dy, ld_y, ld_rstd, rows_a_part;
    int heads, queries, head_dim, lanes, heads_a_block;
    float eps;
} pmli_head_norm_params;

/* Shared by all attention kernels. Rows of q, dout, o, dq are tokens_q, of k, v, dk, dv tokens_k.
 * dots [heads, tokens_q] holds sum(dout * o) of each row. */
typedef struct pmli_attention_params {
    const void *q, *k, *v, *dout, *out;
    const int *cu_q, *cu_k;
    void *o, *dq, *dk, *dv;
    float *lse, *dots;
    long long tokens_q, tokens_k, ld_q, ld_k, ld_v, ld_o, ld_dout, ld_out, ld_dq, ld_dk, ld_dv;
    long long ld_lse;
    int slots, heads, kv_heads, head_dim, window;
    float scale;
} pmli_attention_params;

/* offsets[a,i] = cu[i] ld[a], a < arrays, i <= slots_in_calls: those behind the last are empty.
 * clear: up to three buffers of 16-bit elements. */
typedef struct pmli_sdpa_params {
    const int *cu;
    float *lse, *stats;
    int *lengths;
    long long *offsets;
    long long ld_offsets, ld[9], ld_lse, tokens, longest;
    void *clear[3];
    long long ld_clear[3];
    int clear_cols[3];
    int arrays, slots, slots_in_calls, heads;
} pmli_sdpa_params;

/* A piece of attention's backward on Hopper: keys [first_key, first_key + 128) of one document and
 * one head of keys, with all queries that see them. */
typedef struct pmli_hopper_piece {
    int token, rows; /* the document's */
    int kv_head;
    int first_key;  /* within the document */
    int first_sums; /* the tile of dq's sums that the document's first queries have in this head */
    int upwards;    /* queries from the first on; else from the last */
    int next;       /* the same block's next piece, negative: none */
    int reserved;
} pmli_hopper_piece;

/* What a tile of dq's sums stands for: `positions` tokens from `token` on, and the heads of queries
 * that kv_head has. */
typedef struct pmli_hopper_sums {
    int token, positions, kv_head, reserved;
} pmli_hopper_sums;

/* Without sums: queries of two tiles from token `first` of a document on, with all keys they see.
 */
typedef struct pmli_hopper_queries {
    int token, rows; /* the document's */
    int kv_head;
    int first; /* within the document */
} pmli_hopper_queries;

#define HOPPER_BLOCKS    256          /* at the most, and as many lists of pieces */
#define HOPPER_DOCUMENTS 512          /* at the most */
#define HOPPER_LONGEST   131072       /* tokens of a document, at the most */
#define HOPPER_KEYS      128          /* of a piece */
#define HOPPER_SHARED    (227 * 1024) /* bytes of a block's shared memory */
#define HOPPER_ROWS      64           /* of a tile: tokens by the query heads of a head of keys */

typedef struct pmli_attention_hopper_params {
    pmli_tensor_map q, k, v, dout; /* boxes of 64 columns: a tile of queries, a piece of keys */
    const void *out, *dout_rows;
    const float *lse;
    const int *cu;
    const int *pos; /* of tokens, rows of the table: dq and dk go back through rope; NULL: not */
    const float *table;
    void *dq, *dk, *dv;
    float *stats; /* [tokens, heads, 2]: lse in powers of two, the dot of o and its gradient */
    float *sums;  /* of dq, a tile's in the order of the registers that make them; NULL: none */
    int *lists;   /* [HOPPER_BLOCKS + 1]: each block's first piece; how many of queries there are */
    pmli_hopper_piece *pieces;
    pmli_hopper_sums *sum_tiles;  /* [most_tiles] */
    int *begun;                   /* [most_tiles, 2]: half the columns of a tile hold sums */
    pmli_hopper_queries *queries; /* those with the most keys first */
    long long tokens, most_tiles, ld_out, ld_dout, ld_lse, ld_dq, ld_dk, ld_dv;
    int slots, heads, kv_heads, blocks;
    float scale;
} pmli_attention_hopper_params;

#endif
