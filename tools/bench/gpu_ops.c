/* Ops that are bound by memory, each by itself on a GPU, as a share of a copy: at the shapes of
 * Llama-3.1-8B (4 rows of 2048 tokens) and Llama-3.2-1B (8 rows).
 *
 *   bench_gpu_ops [--only TEXT] [--length 2048] [--times 9]
 *
 * Each op is recorded several times into one graph, on as many sets of operands as are more than a
 * cache holds; the median of some replays (and the shortest) is set against what all sets must
 * move: every operand once, updated ones twice, of tables the rows that are there, workspace not at
 * all. It is set against two copies, timed in the same way: one of 1 GiB and one that moves as many
 * bytes as the op, which is short if the op is. Prints a line an op. */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/philox.h"
#include "pml_op/backend.h"

enum { MOST_CASES = 64, MOST_SETS = 32, TIMES = 99, PIECE = 1 << 20, MOST_LENGTH = 1 << 16 };
static const size_t CACHE = (size_t)256 << 20, GIB = (size_t)1 << 30;

typedef struct op_case {
    char name[64];
    pml_op op;
    pml_op_args args; /* shapes; on the device a set's operands */
    int32_t indices;  /* I32 operands are below this */
    double bytes;     /* 0: what the operands are */
} op_case;

typedef struct bench {
    const pml_backend *gpu;
    pml_device *device;
    pml_queue *queue;
    op_case cases[MOST_CASES];
    int count, times;
    double copy; /* bytes a second */
} bench;

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error must = PML_ERROR_INIT, *err = &must;                                             \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "bench_gpu_ops: %s (%s:%d)\n", must.message, must.file, must.line);    \
            exit(EXIT_FAILURE);                                                                    \
        }                                                                                          \
    } while (0)

static void stop(const char *why)
{
    fprintf(stderr, "bench_gpu_ops: %s\n", why);
    exit(EXIT_FAILURE);
}

/* A shape: any address but NULL, until there is one. */
static pml_view shaped(int64_t rows, int64_t cols, int64_t border, pml_dtype dtype)
{
    static char somewhere;
    return (pml_view){
        .data = &somewhere, .rows = rows, .cols = cols, .ld = cols + border, .dtype = dtype};
}

static size_t span(const pml_view *v)
{
    return (size_t)(v->rows * v->ld) * pml_dtype_size(v->dtype);
}

static op_case *add(bench *b, pml_op op, const char *name)
{
    if (b->count == MOST_CASES)
        stop("more cases than there is room for: MOST_CASES");
    op_case *c = &b->cases[b->count++];
    *c = (op_case){.op = op};
    snprintf(c->name, sizeof c->name, "%s", name);
    return c;
}

/* ---- the cases ---- */

static void add_norms(bench *b, int64_t tokens, int64_t hidden, pml_dtype d)
{
    pml_view rows = shaped(tokens, hidden, 0, d), one = shaped(1, hidden, 0, d);
    pml_view rstd = shaped(1, tokens, 0, PML_F32);
    op_case *c = add(b, PML_OP_rmsnorm, "rmsnorm, residual");
    c->args.rmsnorm = (pml_rmsnorm_args){rows, rows, one, rows, rows, rstd, 1e-5F};
    pml_view wide = shaped(tokens, hidden, 0, PML_F32), trained = shaped(1, hidden, 0, PML_F32);
    c = add(b, PML_OP_rmsnorm, "rmsnorm, x in F32"); /* as the first of a whole model is */
    c->args.rmsnorm =
        (pml_rmsnorm_args){.x = wide, .weight = trained, .y = rows, .rstd = rstd, .eps = 1e-5F};
    c = add(b, PML_OP_rmsnorm_bwd, "rmsnorm_bwd, weight, x in F32");
    c->args.rmsnorm_bwd = (pml_rmsnorm_bwd_args){.dy = rows,
                                                 .x = wide,
                                                 .weight = trained,
                                                 .rstd = rstd,
                                                 .dres = rows,
                                                 .dx = rows,
                                                 .dweight = trained};
    for (int trains = 0; trains < 2; trains++) {
        c = add(b, PML_OP_rmsnorm_bwd, trains ? "rmsnorm_bwd, weight" : "rmsnorm_bwd");
        c->args.rmsnorm_bwd = (pml_rmsnorm_bwd_args){
            .dy = rows, .x = rows, .weight = one, .rstd = rstd, .dres = rows, .dx = rows};
        if (trains)
            c->args.rmsnorm_bwd.weight = c->args.rmsnorm_bwd.dweight = trained;
    }
}

static void add_embed(bench *b, int64_t tokens, int64_t hidden, int64_t vocab, pml_dtype d)
{
    op_case *c = add(b, PML_OP_embed, "embed");
    pml_view ids = shaped(1, tokens, 0, PML_I32), y = shaped(tokens, hidden, 0, d);
    c->args.embed = (pml_embed_args){ids, shaped(vocab, hidden, 0, d), y};
    c->indices = (int32_t)vocab;
    c->bytes = (double)span(&ids) + 2 * (double)span(&y);
    for (int few = 0; few < 2; few++) {
        int64_t kinds = few ? 64 : vocab;
        c = add(b, PML_OP_embed_bwd, few ? "embed_bwd, 64 ids" : "embed_bwd");
        c->args.embed_bwd =
            (pml_embed_bwd_args){.ids = ids, .dy = y, .dtable = shaped(vocab, hidden, 0, PML_F32)};
        c->indices = (int32_t)kinds;
        double rows = (double)kinds * (1 - pow(1 - 1 / (double)kinds, (double)tokens));
        c->bytes = (double)(span(&ids) + span(&y)) + 2 * rows * (double)hidden * sizeof(float);
    }
}

/* On queries and keys side by side in what holds values as well. */
static void add_rope(bench *b, int64_t tokens, int32_t heads, int32_t kv_heads, int32_t head_dim,
                     pml_dtype d)
{
    enum { POSITIONS = 2048 };
    int64_t kv = (int64_t)kv_heads * head_dim, cols = (int64_t)heads * head_dim + kv;
    for (int inverse = 0; inverse < 2; inverse++) {
        op_case *c = add(b, PML_OP_rope, inverse ? "rope backward" : "rope");
        c->args.rope = (pml_rope_args){.x = shaped(tokens, cols, kv, d),
                                       .pos = shaped(1, tokens, 0, PML_I32),
                                       .table = shaped(POSITIONS, head_dim, 0, PML_F32),
                                       .heads = heads + kv_heads,
                                       .head_dim = head_dim,
                                       .inverse = inverse};
        c->indices = POSITIONS;
    }
}

/* Qwen3's, over frozen weights and over trained ones, in float32. */
static void add_head_norms(bench *b, int64_t tokens, int32_t heads, int32_t kv_heads,
                           int32_t head_dim, pml_dtype d)
{
    int64_t kv = (int64_t)kv_heads * head_dim, cols = (int64_t)heads * head_dim + kv;
    pml_view x = shaped(tokens, cols, kv, d), qk = shaped(tokens, cols, 0, d);
    pml_view rstd = shaped(tokens, heads + kv_heads, 0, PML_F32);
    pml_view weight = shaped(1, head_dim, 0, d), trained = shaped(1, head_dim, 0, PML_F32);
    op_case *c = add(b, PML_OP_head_norm, "head_norm");
    c->args.head_norm =
        (pml_head_norm_args){x, weight, weight, qk, rstd, heads, kv_heads, head_dim, 1e-6F};
    for (int trains = 0; trains < 2; trains++) {
        c = add(b, PML_OP_head_norm_bwd, trains ? "head_norm_bwd, weights" : "head_norm_bwd");
        pml_head_norm_bwd_args *a = &c->args.head_norm_bwd;
        *a = (pml_head_norm_bwd_args){.dy = x,
                                      .x = x,
                                      .q_weight = trains ? trained : weight,
                                      .k_weight = trains ? trained : weight,
                                      .rstd = rstd,
                                      .dx = x,
                                      .heads = heads,
                                      .kv_heads = kv_heads,
                                      .head_dim = head_dim};
        if (trains)
            a->dq_weight = a->dk_weight = trained;
    }
}

/* A bias' gradient of a fused layer of queries, keys and values (Qwen2). */
static void add_bias(bench *b, int64_t tokens, int64_t hidden, int32_t kv, pml_dtype d)
{
    enum { NARROW = 8 };
    int64_t n = hidden + 2 * (int64_t)kv;
    op_case *c = add(b, PML_OP_linear_bwd, "bias' gradient");
    c->args.linear_bwd = (pml_linear_bwd_args){.dy = shaped(tokens, n, 0, d),
                                               .w = {.cols = NARROW, .dtype = d},
                                               .dbias = shaped(1, n, 0, PML_F32),
                                               .parts = 1,
                                               .part_cols = {(int32_t)n}};
}

/* beside: with what the adapters of rank 16 want, whose operands count as the others do. */
static void add_swiglu(bench *b, int64_t tokens, int64_t inner, pml_dtype d, bool beside)
{
    enum { RANK = 16, BORDER = 64 };
    int64_t border = beside ? BORDER : 0;
    pml_view half = shaped(tokens, inner, border, d), both = shaped(tokens, 2 * inner, border, d);
    pml_view low = shaped(tokens, RANK, 48, d), low2 = shaped(tokens, 2 * RANK, 32, d);
    op_case *c = add(b, PML_OP_swiglu, beside ? "swiglu, u" : "swiglu");
    c->args.swiglu = (pml_swiglu_args){.gate_up = both, .h = half};
    if (beside) {
        c->args.swiglu.a = shaped(RANK, inner, 0, d);
        c->args.swiglu.u = low;
        c->args.swiglu.lora_scale = 1;
    }
    for (int writes = 0; writes < 2; writes++) {
        c = add(b, PML_OP_swiglu_bwd,
                beside   ? (writes ? "swiglu_bwd, v dB dA, h" : "swiglu_bwd, v dB dA")
                : writes ? "swiglu_bwd, h"
                         : "swiglu_bwd");
        pml_swiglu_bwd_args *a = &c->args.swiglu_bwd;
        *a = (pml_swiglu_bwd_args){.dh = half, .gate_up = both, .dgate_up = both};
        if (writes)
            a->h = half;
        if (!beside)
            continue;
        a->u = a->v = low2;
        a->b = shaped(2 * inner, RANK, 0, d);
        a->db = shaped(2 * inner, RANK, 0, PML_F32);
        a->v_down = low;
        a->da = shaped(RANK, inner, 0, PML_F32);
        a->lora_parts = 3;
        a->rank = RANK;
        a->lora_scale[0] = a->lora_scale[1] = 1;
    }
}

/* v and dB of a layer's adapters of rank 16. */
static void add_adapters(bench *b, int64_t tokens, int64_t hidden, int32_t kv, pml_dtype d)
{
    enum { RANK = 16, BORDER = 64, NARROW = 8 };
    const int32_t outputs[2][PML_LINEAR_MAX_PARTS] = {{(int32_t)hidden}, {(int32_t)hidden, kv, kv}};
    for (int parts = 1; parts <= PML_LINEAR_MAX_PARTS; parts += 2) {
        const int32_t *cols = outputs[parts / 2];
        int64_t n = (int64_t)cols[0] + cols[1] + cols[2], rank = (int64_t)parts * RANK;
        op_case *c = add(b, PML_OP_linear_bwd, parts == 1 ? "v dB of o" : "v dB of qkv");
        pml_linear_bwd_args *a = &c->args.linear_bwd;
        *a = (pml_linear_bwd_args){.dy = shaped(tokens, n, BORDER, d),
                                   .w = {.cols = NARROW, .dtype = d},
                                   .a = shaped(rank, NARROW, 0, d),
                                   .b = shaped(n, RANK, 0, d),
                                   .u = shaped(tokens, rank, BORDER, d),
                                   .db = shaped(n, RANK, 0, PML_F32),
                                   .v = shaped(tokens, rank, BORDER, d),
                                   .parts = parts,
                                   .lora_parts = (1U << parts) - 1,
                                   .rank = RANK,
                                   .lora_scale = {1, 1, 1}};
        memcpy(a->part_cols, cols, sizeof a->part_cols);
    }
}

static void add_updates(bench *b, int64_t n, pml_dtype d)
{
    pml_view v = shaped(1, n, 0, PML_F32), hyper = shaped(1, PML_HYPER_COUNT, 0, PML_F32);
    pml_view codes = shaped(1, n, 0, PML_U8), copy = shaped(1, n, 0, d);
    pml_view largest = shaped(1, (n + PML_ADAMW_8BIT_BLOCK - 1) / PML_ADAMW_8BIT_BLOCK, 0, PML_F32);
    op_case *c = add(b, PML_OP_adamw, "adamw");
    c->args.adamw = (pml_adamw_args){v, v, v, v, hyper, copy};
    c = add(b, PML_OP_adamw_8bit, "adamw_8bit");
    c->args.adamw_8bit = (pml_adamw_8bit_args){v, v, codes, codes, largest, largest, hyper, copy};
    c = add(b, PML_OP_sumsq, "sumsq");
    c->args.sumsq = (pml_sumsq_args){.x = v, .total = shaped(1, 1, 0, PML_F64)};
}

static void add_model(bench *b, const char *what, int64_t tokens, int64_t hidden, int64_t inner,
                      int64_t vocab, int64_t trained)
{
    enum { HEADS = 32, KV_HEADS = 8 };
    int first = b->count;
    add_norms(b, tokens, hidden, PML_BF16);
    add_rope(b, tokens, HEADS, KV_HEADS, (int32_t)(hidden / HEADS), PML_BF16);
    add_head_norms(b, tokens, HEADS, KV_HEADS, (int32_t)(hidden / HEADS), PML_BF16);
    add_embed(b, tokens, hidden, vocab, PML_BF16);
    add_swiglu(b, tokens, inner, PML_BF16, false);
    add_swiglu(b, tokens, inner, PML_BF16, true);
    add_adapters(b, tokens, hidden, (int32_t)(hidden / HEADS * KV_HEADS), PML_BF16);
    add_bias(b, tokens, hidden, (int32_t)(hidden / HEADS * KV_HEADS), PML_BF16);
    add_updates(b, trained, PML_BF16);
    for (int i = first; i < b->count; i++) {
        char name[sizeof b->cases[i].name];
        snprintf(name, sizeof name, "%s %.50s", what, b->cases[i].name);
        memcpy(b->cases[i].name, name, sizeof name);
    }
}

/* ---- running one ---- */

static double operand_bytes(const op_case *c)
{
    const pml_op_info *info = pml_op_describe(c->op);
    pml_op_args args = c->args;
    double sum = 0;
    for (int i = 0; i < info->n_views; i++) {
        const pml_view *v = &pml_op_views(&args)[i];
        char letter = info->signature[i];
        if (v->data == NULL || letter == 'W' || letter == 'w')
            continue;
        double bytes = (double)(v->rows * v->cols) * (double)pml_dtype_size(v->dtype);
        sum += letter == 'U' || letter == 'u' ? 2 * bytes : bytes;
    }
    return sum;
}

/* Numbers of about one in magnitude, ids, codes; the same PIECE again and again. */
static void draw(const op_case *c, const pml_view *v, unsigned char *piece)
{
    size_t size = pml_dtype_size(v->dtype);
    for (size_t i = 0; i < PIECE / size; i++) {
        uint32_t word = pml_philox_at(3, 0, PML_PURPOSE_SAMPLE, i).word[0];
        float x = ((float)(word >> 8) * 0x1p-24F - 0.5F) * 3;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        if (v->dtype == PML_F32)
            memcpy(piece + i * size, &x, size);
        else if (v->dtype == PML_BF16)
            memcpy(piece + i * size, (unsigned char *)&bits + 2, size);
        else if (v->dtype == PML_I32) {
            int32_t id = (int32_t)(word % (uint32_t)c->indices);
            memcpy(piece + i * size, &id, size);
        } else
            memset(piece + i * size, v->dtype == PML_U8 ? (int)(word & 255) : 0, size);
    }
}

static void fill(bench *b, const op_case *c, int operand, const pml_view *v, unsigned char *piece)
{
    static const float hyper[PML_HYPER_COUNT] = {1e-5F, 0.1F,  1e-3F, 1e-8F, 0.01F,
                                                 0.3F,  4e-3F, 0.02F, 1.5F,  0.7F};
    const pml_op_info *info = pml_op_describe(c->op);
    const char *name = info->operands[operand];
    bool moments = c->op == PML_OP_adamw &&
                   (operand == PML_OPERAND(adamw, m) || operand == PML_OPERAND(adamw, v));
    bool first_state = moments || strcmp(name, "m_largest") == 0 || strcmp(name, "v_largest") == 0;
    if (strcmp(name, "hyper") == 0) {
        MUST(b->gpu->upload(b->queue, v->data, hyper, sizeof hyper, err));
    } else if (first_state) {
        pml_op_args zero = {.fill = {*v, 0}};
        MUST(pml_op_run(b->gpu, PML_OP_fill, b->queue, &zero, err));
    } else {
        draw(c, v, piece);
        size_t there = span(v) < PIECE ? span(v) : PIECE;
        MUST(b->gpu->upload(b->queue, v->data, piece, there, err));
        while (there < span(v)) { /* twice as much each time */
            int64_t more = (int64_t)(span(v) - there < there ? span(v) - there : there);
            pml_op_args again = {.copy = {pml_vector(v->data, more, PML_U8),
                                          pml_vector((char *)v->data + there, more, PML_U8)}};
            MUST(pml_op_run(b->gpu, PML_OP_copy, b->queue, &again, err));
            there += (size_t)more;
        }
    }
    MUST(b->gpu->sync(b->queue, err)); /* the piece is drawn anew */
}

static size_t rounded(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct took {
    double median, least; /* seconds */
} took;

/* One of `sets` ops, of b->times replays of all of them. */
static took replayed(bench *b, pml_op op, const pml_op_args *args, int sets)
{
    double seconds[TIMES];
    pml_graph *graph = NULL;
    size_t bytes = 0;
    for (int s = 0; s < sets; s++)
        MUST(pml_op_run(b->gpu, op, b->queue, &args[s], err));
    MUST(b->gpu->graph_begin(b->queue, err));
    for (int s = 0; s < sets; s++)
        MUST(pml_op_run(b->gpu, op, b->queue, &args[s], err));
    MUST(b->gpu->graph_end(b->queue, SIZE_MAX, &graph, &bytes, err));
    for (int i = -2; i < b->times; i++) {
        double all;
        MUST(b->gpu->mark(b->queue, 0, err));
        MUST(b->gpu->graph_launch(b->queue, graph, err));
        MUST(b->gpu->mark(b->queue, 1, err));
        MUST(b->gpu->sync(b->queue, err));
        MUST(b->gpu->between(b->queue, 0, 1, &all, err));
        seconds[i < 0 ? 0 : i] = all / sets;
    }
    b->gpu->graph_destroy(&graph);
    qsort(seconds, (size_t)b->times, sizeof *seconds, by_value);
    return (took){seconds[b->times / 2], seconds[0]};
}

/* Bytes a second, read and written, of copies of `bytes`: as many in turn as ops are. */
static double copy_rate(bench *b, size_t bytes, int sets)
{
    static pml_op_args args[MOST_SETS];
    void *arena = NULL;
    size_t each = rounded(bytes);
    MUST(b->gpu->alloc(b->device, 2 * (size_t)sets * each, &arena, err));
    for (int s = 0; s < sets; s++) {
        char *from = (char *)arena + (size_t)(2 * s) * each;
        args[s].copy = (pml_copy_args){pml_vector(from, (int64_t)bytes, PML_U8),
                                       pml_vector(from + each, (int64_t)bytes, PML_U8)};
    }
    double rate = 2 * (double)bytes / replayed(b, PML_OP_copy, args, sets).median;
    b->gpu->free(b->device, &arena, 2 * (size_t)sets * each);
    return rate;
}

static void run(bench *b, const op_case *c)
{
    static pml_op_args args[MOST_SETS];
    const pml_op_info *info = pml_op_describe(c->op);
    pml_op_args shapes = c->args;
    size_t ws = rounded(b->gpu->workspace(b->device, c->op, &shapes)), set = 0;
    for (int i = 0; i < info->n_views; i++)
        if (pml_op_views(&shapes)[i].data != NULL)
            set += rounded(span(&pml_op_views(&shapes)[i]));
    int sets = (int)(CACHE / set) + 2;
    sets = sets < 4 ? 4 : sets > MOST_SETS ? MOST_SETS : sets;
    unsigned char *piece = malloc(PIECE), *at;
    void *arena = NULL;
    if (piece == NULL)
        stop("no memory for a piece");
    MUST(b->gpu->alloc(b->device, ws + (size_t)sets * set, &arena, err));
    at = (unsigned char *)arena + ws;
    for (int s = 0; s < sets; s++) {
        args[s] = c->args;
        for (int i = 0; i < info->n_views; i++) {
            pml_view *v = &pml_op_views(&args[s])[i];
            char letter = info->signature[i];
            if (letter == 'W' || letter == 'w') {
                *v = ws > 0 ? pml_vector(arena, (int64_t)ws, PML_U8) : (pml_view){0};
            } else if (v->data != NULL) {
                v->data = at;
                at += rounded(span(v));
                fill(b, c, i, v, piece);
            }
        }
    }
    took t = replayed(b, c->op, args, sets);
    double bytes = c->bytes > 0 ? c->bytes : operand_bytes(c);
    b->gpu->free(b->device, &arena, ws + (size_t)sets * set);
    double alike = copy_rate(b, (size_t)(bytes / 32) * 16, sets); /* in packs, as ops move them */
    printf("%-30s %8.1f us (%7.1f) %7.1f MB %6.0f GB/s %6.1f%% (%5.1f%%) of copy, %5.1f%% of its "
           "bytes' copy\n",
           c->name, t.median * 1e6, t.least * 1e6, bytes * 1e-6, bytes / t.median * 1e-9,
           100 * bytes / t.median / b->copy, 100 * bytes / t.least / b->copy,
           100 * bytes / t.median / alike);
    fflush(stdout);
    free(piece);
}

static void measure_copy(bench *b, size_t bytes)
{
    double rate = copy_rate(b, bytes, 2);
    b->copy = bytes == GIB ? rate : b->copy;
    printf("copy of %4zu MiB %51.0f GB/s %6.1f%%\n", bytes >> 20, rate * 1e-9,
           100 * rate / b->copy);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"only", required_argument, NULL, 'o'},
                                          {"length", required_argument, NULL, 'l'},
                                          {"times", required_argument, NULL, 't'},
                                          {NULL, 0, NULL, 0}};
    static bench b = {.times = 9};
    const char *only = "";
    int64_t length = 2048;
    for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        if (c == 'o')
            only = optarg;
        else if (c == 'l')
            length = atol(optarg);
        else if (c == 't')
            b.times = atoi(optarg);
        else
            b.times = 0;
    }
    if (optind != argc || b.times < 1 || b.times > TIMES || length < 1 || length > MOST_LENGTH)
        stop("[--only TEXT] [--length 1 to 65536] [--times 1 to 99]");
    MUST(pml_backend_cuda(&b.gpu, err));
    MUST(b.gpu->open(&(pml_device_options){.index = 0}, &b.device, err));
    MUST(b.gpu->queue_new(b.device, &b.queue, err));
    add_model(&b, "8B", 4 * length, 4096, 14336, 128256, 42000000);
    add_model(&b, "1B", 8 * length, 2048, 8192, 128256, 500000000);
    measure_copy(&b, GIB);
    measure_copy(&b, (size_t)64 << 20);
    int ran = 0;
    for (int i = 0; i < b.count; i++)
        if (strstr(b.cases[i].name, only) != NULL) {
            run(&b, &b.cases[i]);
            ran++;
        }
    if (ran == 0)
        stop("no case has this in its name");
    b.gpu->queue_destroy(&b.queue);
    b.gpu->close(&b.device);
    return EXIT_SUCCESS;
}
