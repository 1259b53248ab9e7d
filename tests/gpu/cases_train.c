/* Cases of what training adds to a forward pass: every backward but a linear layer's, attention,
 * the loss, the update. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"

static const pml_dtype floats[] = {PML_F32, PML_BF16, PML_F16};
enum { FLOATS = 3 };

/* A few roundings to the dtype on the way, and products of rounded numbers. */
static double loose(pml_dtype dtype)
{
    return dtype == PML_F32 ? 5e-6 : dtype == PML_BF16 ? 1.2e-2 : 1.5e-3;
}

static double tight(pml_dtype dtype)
{
    return dtype == PML_F32 ? 2e-6 : dtype == PML_BF16 ? 4e-3 : 6e-4;
}

/* Of the forms the last two are F16's, with sums in float32: those alone, which must be as good as
 * float32 gets, and with their rounding on dy. */
static void add_rmsnorm_bwd(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t cols, int form)
{
    static const char *const forms[] = {"", " + dres, dweight", " in place of dres, dweight",
                                        " to F32 in place of dres", " to F32, rounded on dy"};
    gpu_case *c = cases_add(cases, PML_OP_rmsnorm_bwd, "%s [%d,%d]%s", pml_dtype_name(d), (int)rows,
                            (int)cols, forms[form]);
    int64_t border = form == 1 ? 8 : 0;
    pml_rmsnorm_bwd_args *a = &c->args.rmsnorm_bwd;
    *a = (pml_rmsnorm_bwd_args){.dy = shaped(rows, cols, border, d),
                                .x = shaped(rows, cols, 2 * border, d),
                                .weight = shaped(1, cols, 0, d),
                                .rstd = shaped(1, rows, 0, PML_F32),
                                .dx = shaped(rows, cols, border, d)};
    c->tolerance = d == PML_F32 ? 1e-5 : tight(d);
    c->shift = form == 1 ? 1 : 0;
    if (form > 0) {
        a->dres = shaped(rows, cols, border, d);
        a->dweight = shaped(1, cols, 0, PML_F32);
    }
    if (form == 2 || form == 3)
        c->inside[PML_OPERAND(rmsnorm_bwd, dx)] = PML_OPERAND(rmsnorm_bwd, dres);
    if (form < 3)
        return;
    a->dx.dtype = a->dres.dtype = PML_F32;
    c->tolerance = form == 3 ? 1e-5 : tight(d);
    if (form == 4) {
        a->rounded = shaped(rows, cols, border, d);
        a->dres = (pml_view){0};
        c->inside[PML_OPERAND(rmsnorm_bwd, rounded)] = PML_OPERAND(rmsnorm_bwd, dy);
    }
}

static void add_embed_bwd(gpu_cases *cases, pml_dtype d, int64_t tokens, int64_t cols,
                          int64_t border, int32_t ids)
{
    gpu_case *c = cases_add(cases, PML_OP_embed_bwd, "%s [%d,%d]+%d of %d", pml_dtype_name(d),
                            (int)tokens, (int)cols, (int)border, ids);
    c->args.embed_bwd = (pml_embed_bwd_args){.ids = shaped(1, tokens, 0, PML_I32),
                                             .dy = shaped(tokens, cols, border, d),
                                             .dtable = shaped(ids, cols, border, PML_F32)};
    c->indices = ids;
    c->tolerance = 1e-6;
}

static void add_elementwise(gpu_cases *cases, pml_dtype d)
{
    static const int64_t shapes[][3] = {
        {1, 8, 0}, {37, 63, 2}, {130, 704, 8}, {5, 14336, 64}, {300, 16, 0}};
    const char *name = pml_dtype_name(d);
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int64_t rows = shapes[s][0], cols = shapes[s][1], border = shapes[s][2];
        gpu_case *c = cases_add(cases, PML_OP_swiglu, "%s [%d,%d]+%d", name, (int)rows, (int)cols,
                                (int)border);
        c->args.swiglu = (pml_swiglu_args){.gate_up = shaped(rows, 2 * cols, border, d),
                                           .h = shaped(rows, cols, 2 * border, d)};
        c->tolerance = tight(d);
        c = cases_add(cases, PML_OP_swiglu_bwd, "%s [%d,%d]+%d%s", name, (int)rows, (int)cols,
                      (int)border, s % 2 ? " in place" : "");
        c->args.swiglu_bwd = (pml_swiglu_bwd_args){.dh = shaped(rows, cols, border, d),
                                                   .gate_up = shaped(rows, 2 * cols, border, d),
                                                   .dgate_up = shaped(rows, 2 * cols, border, d)};
        c->tolerance = tight(d);
        if (s % 2)
            c->inside[PML_OPERAND(swiglu_bwd, dgate_up)] = PML_OPERAND(swiglu_bwd, gate_up);
        if (s > 0) /* h again, in the place of dh or in one of its own */
            c->args.swiglu_bwd.h = shaped(rows, cols, border, d);
        if (s > 0 && s % 2)
            c->inside[PML_OPERAND(swiglu_bwd, h)] = PML_OPERAND(swiglu_bwd, dh);
        add_embed_bwd(cases, d, rows, cols, border, 23);
    }
    /* More than one chunk to sort; ids of many windows, of one and a bit, and of less. */
    add_embed_bwd(cases, d, 2500, 40, 0, 3);
    add_embed_bwd(cases, d, 2049, 72, 4, 60);
    add_embed_bwd(cases, d, 1025, 13, 1, 1);
    add_embed_bwd(cases, d, 3000, 16, 0, 100000);
    static const int32_t heads[][2] = {{1, 2}, {3, 6}, {5, 64}, {40, 128}, {7, 80}};
    for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
        for (int inverse = 0; inverse < 2; inverse++) {
            int64_t cols = (int64_t)heads[h][0] * heads[h][1];
            gpu_case *c = cases_add(cases, PML_OP_rope, "%s %d heads of %d%s", name, heads[h][0],
                                    heads[h][1], inverse ? ", inverse" : "");
            c->args.rope = (pml_rope_args){.x = shaped(77, cols, inverse ? 13 : 64, d),
                                           .pos = shaped(1, 77, 0, PML_I32),
                                           .table = shaped(50, heads[h][1], 0, PML_F32),
                                           .heads = heads[h][0],
                                           .head_dim = heads[h][1],
                                           .inverse = inverse};
            c->indices = 50;
            c->tolerance = tight(d);
        }
}

/* Lengths of documents; -1 ends. What is left of the tokens belongs to none. equal: the op is told
 * that all of them have so many. */
typedef struct packing {
    const char *name;
    int32_t tokens;
    int32_t lengths[8];
    int32_t equal, many; /* many: so many documents of 1 to 40 tokens, in place of lengths */
} packing;

static const packing packings[] = {
    {"1", 1, {1, -1}, 0, 0},
    {"37", 37, {37, -1}, 0, 0},
    {"64+0+1+200, 7 outside", 272, {64, 0, 1, 200, -1}, 0, 0},
    {"5+128+129+300", 562, {5, 128, 129, 300, -1}, 0, 0},
    {"0+0+513", 513, {0, 0, 513, -1}, 0, 0},
    {"200, equal", 200, {200, -1}, 200, 0},
    {"96+96+96, equal", 288, {96, 96, 96, -1}, 96, 0},
    {"256+256, equal", 512, {256, 256, -1}, 256, 0},
    {"700+3+257+0+640, 9 outside", 1609, {700, 3, 257, 0, 640, -1}, 0, 0}};

static int32_t *bounds_of(const packing *p, int32_t *slots)
{
    int32_t *bounds = calloc(16 + (size_t)p->many, sizeof *bounds);
    if (bounds == NULL)
        exit(1);
    for (*slots = 0; p->many > 0 ? *slots < p->many : p->lengths[*slots] >= 0; ++*slots)
        bounds[*slots + 1] =
            bounds[*slots] + (p->many > 0 ? 1 + *slots * 7 % 40 : p->lengths[*slots]);
    return bounds; /* lives as long as the cases */
}

typedef struct heads {
    int32_t heads, kv_heads, dim, window;
} heads;

/* A row of angles for each position as a model's are: cosines, then sines. */
enum { POSITIONS = 768, WIDEST = 256 };
static const float *angles_of(int32_t dim)
{
    static float *made[WIDEST + 1]; /* they live as long as the cases */
    if (made[dim] != NULL)
        return made[dim];
    made[dim] = calloc((size_t)POSITIONS * (size_t)dim, sizeof(float));
    if (made[dim] == NULL)
        exit(1);
    for (int32_t i = 0; i < POSITIONS * (dim / 2); i++) {
        int32_t position = i / (dim / 2), column = i % (dim / 2);
        double angle = position * pow(10000, -2.0 * column / dim);
        made[dim][position * dim + column] = (float)cos(angle);
        made[dim][position * dim + dim / 2 + column] = (float)sin(angle);
    }
    return made[dim];
}

/* Each document counts from 0, every second one from 5. */
static const int32_t *positions_of(const packing *p, const int32_t *bounds, int32_t slots)
{
    int32_t *positions = calloc((size_t)p->tokens, sizeof *positions);
    if (positions == NULL)
        exit(1);
    for (int32_t d = 0; d < slots; d++)
        for (int32_t row = bounds[d]; row < bounds[d + 1]; row++)
            positions[row] = row - bounds[d] + d % 2 * 5;
    return positions;
}

/* turned: back through rope, and dq, dk and dv in one buffer where the number of documents is odd,
 * as a program lays them. */
static void add_attention_bwd(gpu_cases *cases, pml_dtype d, const packing *p, heads h, bool turned)
{
    int32_t slots, *bounds = bounds_of(p, &slots);
    int64_t q = (int64_t)h.heads * h.dim, kv = (int64_t)h.kv_heads * h.dim, t = p->tokens;
    char window[32] = "";
    if (h.window > 0)
        snprintf(window, sizeof window, ", window %d", h.window);
    gpu_case *c =
        cases_add(cases, PML_OP_attention_bwd, "%s %d/%d of %d%s: %s%s", pml_dtype_name(d), h.heads,
                  h.kv_heads, h.dim, window, p->name, turned ? ", turned" : "");
    pml_attention_bwd_args *a = &c->args.attention_bwd;
    *a = (pml_attention_bwd_args){.dout = shaped(t, q, 8, d),
                                  .q = shaped(t, q, 2 * kv, d),
                                  .k = shaped(t, kv, 64, d),
                                  .v = shaped(t, kv, 0, d),
                                  .o = shaped(t, q, 0, d),
                                  .lse = shaped(h.heads, t, 0, PML_F32),
                                  .cu_q = shaped(1, slots + 1, 0, PML_I32),
                                  .cu_k = shaped(1, slots + 1, 0, PML_I32),
                                  .dq = shaped(t, q, 2 * kv, d),
                                  .dk = shaped(t, kv, 16, d),
                                  .dv = shaped(t, kv, 0, d),
                                  .heads = h.heads,
                                  .kv_heads = h.kv_heads,
                                  .head_dim = h.dim,
                                  .window = h.window,
                                  .max_q = p->equal > 0 ? p->equal : (int32_t)t,
                                  .equal = p->equal > 0,
                                  .scale = 1.0F / (float)h.dim};
    c->given[PML_OPERAND(attention_bwd, cu_q)] = bounds;
    c->given[PML_OPERAND(attention_bwd, cu_k)] = bounds;
    c->tolerance = loose(d);
    /* With one key dP - D is nothing: two sums of head_dim products of dO that cancel. */
    c->unit = sqrt(h.dim) * (double)a->scale;
    if (!turned)
        return;
    const int dq = PML_OPERAND(attention_bwd, dq);
    a->pos = shaped(1, t, 0, PML_I32);
    a->table = shaped(t + 5 < POSITIONS ? t + 5 : POSITIONS, h.dim, 0, PML_F32);
    c->given[PML_OPERAND(attention_bwd, pos)] = positions_of(p, bounds, slots);
    c->given[PML_OPERAND(attention_bwd, table)] = angles_of(h.dim);
    for (int i = 1; i <= 2 && slots % 2 == 1; i++) { /* dk, dv */
        pml_op_views(&c->args)[dq + i].ld = a->dq.ld;
        c->inside[dq + i] = dq;
        c->column[dq + i] = q + (i - 1) * kv;
    }
}

static void add_attention(gpu_cases *cases, pml_dtype d, const packing *p, heads h)
{
    int32_t slots, *bounds = bounds_of(p, &slots);
    int64_t q = (int64_t)h.heads * h.dim, kv = (int64_t)h.kv_heads * h.dim, t = p->tokens;
    char window[32] = "";
    if (h.window > 0)
        snprintf(window, sizeof window, ", window %d", h.window);
    gpu_case *c = cases_add(cases, PML_OP_attention, "%s %d/%d of %d%s: %s", pml_dtype_name(d),
                            h.heads, h.kv_heads, h.dim, window, p->name);
    c->args.attention = (pml_attention_args){.q = shaped(t, q, 2 * kv, d),
                                             .k = shaped(t, kv, 64, d),
                                             .v = shaped(t, kv, 0, d),
                                             .cu_q = shaped(1, slots + 1, 0, PML_I32),
                                             .cu_k = shaped(1, slots + 1, 0, PML_I32),
                                             .o = shaped(t, q, 8, d),
                                             .lse = shaped(h.heads, t, 0, PML_F32),
                                             .heads = h.heads,
                                             .kv_heads = h.kv_heads,
                                             .head_dim = h.dim,
                                             .window = h.window,
                                             .max_q = p->equal > 0 ? p->equal : (int32_t)t,
                                             .equal = p->equal > 0,
                                             .scale = 1.0F / (float)h.dim};
    c->given[PML_OPERAND(attention, cu_q)] = bounds;
    c->given[PML_OPERAND(attention, cu_k)] = bounds;
    c->tolerance = d == PML_F32 ? 3e-6 : tight(d);
    for (int turned = 0; turned < 2; turned++)
        add_attention_bwd(cases, d, p, h, turned);
}

/* A chunk of new tokens against cached keys, as generation asks for it. */
static void add_cached_attention(gpu_cases *cases, pml_dtype d, int32_t new_tokens, int32_t keys)
{
    static const heads h = {6, 2, 64, 0};
    int32_t *bounds = calloc(4, sizeof *bounds); /* two tables of two */
    if (bounds == NULL)
        exit(1);
    bounds[1] = new_tokens;
    bounds[3] = keys;
    int64_t q = (int64_t)h.heads * h.dim, kv = (int64_t)h.kv_heads * h.dim;
    gpu_case *c = cases_add(cases, PML_OP_attention, "%s %d new of %d cached", pml_dtype_name(d),
                            new_tokens, keys);
    c->args.attention = (pml_attention_args){.q = shaped(new_tokens, q, 0, d),
                                             .k = shaped(keys, kv, kv, d),
                                             .v = shaped(keys, kv, kv, d),
                                             .cu_q = shaped(1, 2, 0, PML_I32),
                                             .cu_k = shaped(1, 2, 0, PML_I32),
                                             .o = shaped(new_tokens, q, 0, d),
                                             .lse = shaped(h.heads, new_tokens, 0, PML_F32),
                                             .heads = h.heads,
                                             .kv_heads = h.kv_heads,
                                             .head_dim = h.dim,
                                             .max_q = new_tokens,
                                             .scale = 0.125F};
    c->given[PML_OPERAND(attention, cu_q)] = bounds;
    c->given[PML_OPERAND(attention, cu_k)] = bounds + 2;
    c->tolerance = d == PML_F32 ? 3e-6 : tight(d);
}

static void add_attentions(gpu_cases *cases, pml_dtype d)
{
    static const heads shapes[] = {{4, 2, 64, 0}, {4, 1, 128, 0}, {3, 3, 16, 0}, {2, 1, 80, 0}};
    for (size_t p = 0; p < sizeof packings / sizeof *packings; p++)
        for (size_t h = 0; h < sizeof shapes / sizeof *shapes; h++)
            add_attention(cases, d, &packings[p], shapes[h]);
    /* Tiles of 64 rows for all heads of a head of keys: 1, 7 (one row over) and 64 of them. */
    static const heads groups[] = {{4, 4, 128, 0}, {28, 4, 128, 0}, {64, 1, 128, 0}};
    static const packing crowd = {"300 of 1 to 40, 3 outside", 6133, {-1}, 0, 300};
    add_attention(cases, d, &crowd, (heads){8, 2, 128, 0});
    for (size_t h = 0; h < sizeof groups / sizeof *groups; h++) {
        add_attention(cases, d, &packings[3], groups[h]);
        add_attention(cases, d, &packings[5], groups[h]);
    }
    add_attention(cases, d, &packings[3], (heads){4, 2, 64, 50});
    add_attention(cases, d, &packings[3], (heads){4, 2, 128, 130});
    add_attention(cases, d, &packings[2], (heads){2, 1, 24, 9});
    add_cached_attention(cases, d, 1, 300);
    add_cached_attention(cases, d, 70, 300);
}

/* The first and the last words of a vocabulary and of its n-th parts, as blocks share a row. */
static int32_t label_at(int i, int64_t vocab)
{
    int64_t packs = (vocab + 7) / 8, parts = 2 + i / 3 % 7;
    int64_t share = (packs + parts - 1) / parts * 8;
    int64_t label = i % 3 == 0 ? vocab - 1 - i / 3 % 8 : share - i % 3 + 1;
    return (int32_t)(label < 0 ? 0 : label < vocab ? label : i % vocab);
}

/* Some slots empty; a last chunk that is shorter. */
static void add_head_loss(gpu_cases *cases, pml_dtype d, int64_t vocab, int64_t hidden, int form)
{
    static const char *const forms[] = {" loss", " dx", " dx, dw, scale"};
    enum { TOKENS = 90, LABELS = 41 };
    gpu_case *c = cases_add(cases, PML_OP_head_loss, "%s [%d,%d]x[%d,%d]%s", pml_dtype_name(d),
                            LABELS, (int)hidden, (int)vocab, (int)hidden, forms[form]);
    int32_t *rows = calloc(2 * LABELS, sizeof *rows), *labels = rows + LABELS;
    if (rows == NULL)
        exit(1);
    for (int i = 0; i < LABELS; i++) {
        rows[i] = i % 7 == 3 ? -1 : i * 31 % TOKENS;
        labels[i] = label_at(i, vocab);
    }
    pml_head_loss_args *a = &c->args.head_loss;
    *a = (pml_head_loss_args){.x = shaped(TOKENS, hidden, 8, d),
                              .w = shaped(vocab, hidden, 0, d),
                              .rows = shaped(1, LABELS, 0, PML_I32),
                              .labels = shaped(1, LABELS, 0, PML_I32),
                              .loss = shaped(1, LABELS, 0, PML_F32),
                              .chunk = 16};
    if (form > 0)
        a->dx = shaped(TOKENS, hidden, 0, d);
    if (form > 1) {
        a->dw = shaped(vocab, hidden, 0, PML_F32);
        a->scale = shaped(1, 1, 0, PML_F32);
    }
    c->given[PML_OPERAND(head_loss, rows)] = rows;
    c->given[PML_OPERAND(head_loss, labels)] = labels;
    c->indices = (int32_t)vocab;
    c->tolerance = d == PML_F32 ? loose(d) : 2 * loose(d); /* logits of up to 30, rounded to d */
}

/* Qwen3's norm of heads; both weights' gradients or none. */
static void add_head_norms(gpu_cases *cases, pml_dtype d, int32_t heads, int32_t kv, int32_t dim)
{
    int64_t rows = 77, cols = (int64_t)(heads + kv) * dim;
    gpu_case *c =
        cases_add(cases, PML_OP_head_norm, "%s %d+%d of %d", pml_dtype_name(d), heads, kv, dim);
    c->args.head_norm = (pml_head_norm_args){.x = shaped(rows, cols, 8, d),
                                             .q_weight = shaped(1, dim, 0, d),
                                             .k_weight = shaped(1, dim, 0, d),
                                             .y = shaped(rows, cols, 0, d),
                                             .rstd = shaped(rows, heads + kv, 1, PML_F32),
                                             .heads = heads,
                                             .kv_heads = kv,
                                             .head_dim = dim,
                                             .eps = 1e-6F};
    c->tolerance = tight(d);
    for (int trains = 0; trains < 2; trains++) {
        c = cases_add(cases, PML_OP_head_norm_bwd, "%s %d+%d of %d%s", pml_dtype_name(d), heads, kv,
                      dim, trains ? " in place, dweights" : "");
        c->args.head_norm_bwd =
            (pml_head_norm_bwd_args){.dy = shaped(rows, cols, 0, d),
                                     .x = shaped(rows, cols, 8, d),
                                     .q_weight = shaped(1, dim, 0, d),
                                     .k_weight = shaped(1, dim, 0, d),
                                     .rstd = shaped(rows, heads + kv, 1, PML_F32),
                                     .dx = shaped(rows, cols, 0, d),
                                     .heads = heads,
                                     .kv_heads = kv,
                                     .head_dim = dim};
        c->tolerance = d == PML_F32 ? 1e-5 : tight(d);
        if (trains) {
            c->args.head_norm_bwd.dq_weight = shaped(1, dim, 0, PML_F32);
            c->args.head_norm_bwd.dk_weight = shaped(1, dim, 0, PML_F32);
            c->inside[PML_OPERAND(head_norm_bwd, dx)] = PML_OPERAND(head_norm_bwd, dy);
        }
    }
}

/* In float32 the bits of the reference, which are bitsandbytes'. */
/* Parts of so many rows; 0: there are no more. */
static void add_nf4(gpu_cases *cases, pml_dtype d, const int32_t rows[PML_LINEAR_MAX_PARTS],
                    int64_t cols, int32_t border)
{
    gpu_case *c = cases_add(cases, PML_OP_nf4_dequantise, "%s [%d %d %d,%d]+%d", pml_dtype_name(d),
                            rows[0], rows[1], rows[2], (int)cols, border);
    pml_nf4_dequantise_args *a = &c->args.nf4_dequantise;
    int64_t codes = 0, blocks = 0, nested = 0, all = 0;
    for (int i = 0; i < PML_LINEAR_MAX_PARTS && rows[i] > 0; i++) {
        codes += pml_nf4_codes(rows[i] * cols);
        blocks += pml_nf4_blocks(rows[i] * cols);
        nested += pml_nf4_nested(rows[i] * cols);
        all += rows[i];
        a->part_rows[a->parts++] = rows[i];
    }
    a->codes = shaped(1, codes, 0, PML_U8);
    a->absmax = shaped(1, blocks, 0, PML_U8);
    a->nested = shaped(1, nested, 0, PML_F32);
    a->offset = shaped(1, a->parts, 0, PML_F32);
    a->y = shaped(all, cols, border, d);
}

/* No whole units; whole tiles; rows that cut blocks; a part of fewer tiles than the grid has warps
 * for, and a rest; a border that is no whole unit; one row; rows of two units and of one. */
static void add_nf4s(gpu_cases *cases, pml_dtype d)
{
    static const int32_t rows[][PML_LINEAR_MAX_PARTS] = {
        {13, 13, 13}, {256, 256}, {300, 300, 300}, {300, 13, 70}, {13, 13}, {1}, {400, 1}, {400}};
    static const int32_t cols[][2] = {{7, 0},  {512, 0},   {264, 64}, {264, 64},
                                      {24, 3}, {16400, 0}, {16, 0},   {8, 0}}; /* and border */
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        add_nf4(cases, d, rows[i], cols[i][0], cols[i][1]);
}

/* The bytes of the reference, whose own are bitsandbytes'; off: elements by which operands lie off
 * their alignment. */
static void add_nf4_quantise(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t cols,
                             int32_t grid, int off)
{
    gpu_case *c = cases_add(cases, PML_OP_nf4_quantise, "%s [%d,%d] grid %d, %d off",
                            pml_dtype_name(d), (int)rows, (int)cols, grid, off);
    int64_t n = rows * cols;
    c->args.nf4_quantise =
        (pml_nf4_quantise_args){.x = shaped(rows, cols, 0, d),
                                .codes = shaped(1, pml_nf4_codes(n), 0, PML_U8),
                                .absmax = shaped(1, pml_nf4_blocks(n), 0, PML_U8),
                                .nested = shaped(1, pml_nf4_nested(n), 0, PML_F32),
                                .offset = shaped(1, 1, 0, PML_F32),
                                .grid = grid};
    c->shift = off;
}

/* The bits of the reference, codes and all. Codes and scales are drawn as anything they can be. */
static void add_adamw_8bit(gpu_cases *cases, int64_t n, int copy, const float *hyper)
{
    gpu_case *c = cases_add(cases, PML_OP_adamw_8bit, "[1,%d] copy %s", (int)n,
                            copy < 0 ? "none" : pml_dtype_name(floats[copy]));
    pml_view v = shaped(1, n, 0, PML_F32), codes = shaped(1, n, 0, PML_U8);
    pml_view largest = shaped(1, (n + PML_ADAMW_8BIT_BLOCK - 1) / PML_ADAMW_8BIT_BLOCK, 0, PML_F32);
    c->args.adamw_8bit = (pml_adamw_8bit_args){
        v, v, codes, codes, largest, largest, shaped(1, PML_HYPER_COUNT, 0, PML_F32), {0}};
    if (copy >= 0)
        c->args.adamw_8bit.copy = shaped(1, n, 0, floats[copy]);
    c->positive = PML_OPERAND(adamw_8bit, v_largest);
    c->given[PML_OPERAND(adamw_8bit, hyper)] = hyper;
    c->shift = n == 4096 && copy == 1 ? 1 : 0;
}

static void add_update(gpu_cases *cases)
{
    static const float hyper[2 * PML_HYPER_COUNT] = {1e-2F, 0.1F, 1e-3F, 1e-8F, 0.01F, 0.3F,  4e-3F,
                                                     0.02F, 1.5F, 0.7F,  2e-2F, 0.1F,  1e-3F, 1e-8F,
                                                     0.00F, 0.3F, 4e-3F, 0.02F, 1.5F,  0.7F};
    static const int64_t sizes[] = {1, 7, 1000, 4096, 300001};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        int64_t n = sizes[s];
        gpu_case *c = cases_add(cases, PML_OP_sum, "[1,%d]", (int)n);
        c->args.sum =
            (pml_sum_args){.x = shaped(1, n, 0, PML_F32), .total = shaped(1, 1, 0, PML_F64)};
        c->tolerance = 1e-5;
        c = cases_add(cases, PML_OP_sumsq, "[3,%d]+5", (int)n);
        c->args.sumsq =
            (pml_sumsq_args){.x = shaped(3, n, 5, PML_F32), .total = shaped(1, 1, 0, PML_F64)};
        c->tolerance = 1e-6;
        for (int f = -1; f < FLOATS; f++) {
            c = cases_add(cases, PML_OP_adamw, "[1,%d] copy %s", (int)n,
                          f < 0 ? "none" : pml_dtype_name(floats[f]));
            pml_view v = shaped(1, n, 0, PML_F32);
            c->args.adamw =
                (pml_adamw_args){v, v, v, v, shaped(1, PML_HYPER_COUNT, 0, PML_F32), {0}};
            if (f >= 0)
                c->args.adamw.copy = shaped(1, n, 0, floats[f]);
            c->positive = PML_OPERAND(adamw, v);
            c->given[PML_OPERAND(adamw, hyper)] = hyper;
            c->tolerance = f > 0 ? tight(floats[f]) : 1e-6;
            c->shift = s == 3 ? 1 : 0;
        }
    }
    static const int64_t lengths[] = {1, 255, 4096, 300001};
    for (size_t s = 0; s < sizeof lengths / sizeof *lengths; s++)
        for (int f = -1; f < FLOATS; f++)
            add_adamw_8bit(cases, lengths[s], f, hyper);
    for (int form = 0; form < 3; form++) {
        static const char *const forms[] = {"plain", "momentum", "nesterov"};
        gpu_case *c = cases_add(cases, PML_OP_sgd, "[1,3001] %s", forms[form]);
        pml_view v = shaped(1, 3001, 0, PML_F32);
        c->args.sgd = (pml_sgd_args){.p = v,
                                     .g = v,
                                     .hyper = shaped(1, PML_HYPER_COUNT, 0, PML_F32),
                                     .copy = shaped(1, 3001, 0, PML_BF16),
                                     .nesterov = form == 2};
        if (form > 0)
            c->args.sgd.m = v;
        c->given[PML_OPERAND(sgd, hyper)] = hyper;
        c->tolerance = tight(PML_BF16);
    }
    for (int groups = 1; groups < 3; groups++) {
        gpu_case *c = cases_add(cases, PML_OP_clip_scale, "%d groups", groups);
        c->args.clip_scale =
            (pml_clip_scale_args){.sumsq = shaped(1, 1, 0, PML_F64),
                                  .hyper = shaped(groups, PML_HYPER_COUNT, 0, PML_F32),
                                  .norm = shaped(1, 1, 0, PML_F32)};
        if (groups == 2)
            c->args.clip_scale.loss = shaped(1, 1, 0, PML_F64);
        c->positive = PML_OPERAND(clip_scale, sumsq);
        c->given[PML_OPERAND(clip_scale, hyper)] = hyper;
        c->tolerance = 1e-6;
    }
}

/* A step without an update: clip_scale finds what is not finite, and the updates leave everything
 * as it is. The reference's bits, since nothing is near to a NaN. */
static void add_skipped(gpu_cases *cases)
{
    static const double numbers[] = {4, INFINITY, NAN, DBL_MAX};
    static const float skip[PML_HYPER_COUNT] = {[PML_HYPER_LR] = 1e-2F,
                                                [PML_HYPER_BIAS1] = 1,
                                                [PML_HYPER_BIAS2] = 1,
                                                [PML_HYPER_MEAN] = 0.25F,
                                                [PML_HYPER_GRAD_SCALE] = NAN};
    for (int i = 0; i < 4; i++)
        for (int of_loss = 0; of_loss < 2; of_loss++) {
            gpu_case *c = cases_add(cases, PML_OP_clip_scale, "%s %g", of_loss ? "loss" : "sumsq",
                                    numbers[i]);
            c->args.clip_scale = (pml_clip_scale_args){
                shaped(1, 1, 0, PML_F64), shaped(1, PML_HYPER_COUNT, 0, PML_F32),
                shaped(1, 1, 0, PML_F32), shaped(1, 1, 0, PML_F64)};
            c->given[PML_OPERAND(clip_scale, sumsq)] = &numbers[of_loss ? 0 : i];
            c->given[PML_OPERAND(clip_scale, loss)] = &numbers[of_loss ? i : 0];
            c->given[PML_OPERAND(clip_scale, hyper)] = skip;
        }
    pml_view v = shaped(1, 1001, 0, PML_F32), hyper = shaped(1, PML_HYPER_COUNT, 0, PML_F32);
    gpu_case *c = cases_add(cases, PML_OP_adamw, "[1,1001] skipped");
    c->args.adamw = (pml_adamw_args){v, v, v, v, hyper, {0}};
    c->given[PML_OPERAND(adamw, hyper)] = skip;
    c = cases_add(cases, PML_OP_sgd, "[1,1001] skipped");
    c->args.sgd = (pml_sgd_args){.p = v, .g = v, .m = v, .hyper = hyper};
    c->given[PML_OPERAND(sgd, hyper)] = skip;
    add_adamw_8bit(cases, 1001, -1, skip);
}

void cases_of_training(gpu_cases *cases)
{
    static const int64_t widths[] = {8, 63, 128, 896, 2048, 4096, 16384, 40000};
    static const int64_t weighted[] = {16, 768, 2048, 4096, 8192};
    for (int f = 0; f < FLOATS; f++) {
        pml_dtype d = floats[f];
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
            for (int form = 0; form < (d == PML_F16 ? 5 : 3); form++)
                add_rmsnorm_bwd(cases, d, widths[w] < 1000 ? 131 : 5, widths[w], form);
        for (size_t w = 0; w < sizeof weighted / sizeof *weighted; w++) /* blocks of many rows */
            add_rmsnorm_bwd(cases, d, weighted[w] < 1000 ? 5001 : 601, weighted[w], 2);
        if (d == PML_F16)
            add_rmsnorm_bwd(cases, d, 1201, 4096, 3);
        add_elementwise(cases, d);
        add_attentions(cases, d);
        add_head_norms(cases, d, 4, 2, 128);
        add_head_norms(cases, d, 3, 1, 20);
        add_nf4s(cases, d);
        /* Blocks: one; whole ones; a partial last one, in a row and after one; more than one level
         * of sums (2^9 and more rows of 32), with and without what fills none. */
        add_nf4_quantise(cases, d, 1, 1, PML_NF4_GRID, 0);
        add_nf4_quantise(cases, d, 5, 33, PML_NF4_GRID, 1);
        add_nf4_quantise(cases, d, 384, 96, PML_NF4_GRID, 0);
        add_nf4_quantise(cases, d, 384, 96, 0, 3);
        add_nf4_quantise(cases, d, 70, 37, 0, 0);
        add_nf4_quantise(cases, d, 1100, 1024, PML_NF4_GRID, 0);
        for (int form = 0; form < 3; form++) {
            add_head_loss(cases, d, 1000, 96, form);
            add_head_loss(cases, d, 331, 65, form);
            add_head_loss(cases, d, 32000, 64, form);
            add_head_loss(cases, d, 33003, 40, form); /* no whole packs, long rows */
            if (d == PML_F32)
                continue;
            add_head_loss(cases, d, 40001, 16, form); /* two blocks hold a row of 16 bits */
            add_head_loss(cases, d, 128256, 16, form);
        }
        /* One pack; whole chunks; seven blocks; eight full ones; longer than they can hold. */
        static const int64_t vocabs[] = {8, 4096, 262147, 304128, 305161};
        for (size_t i = 0; d != PML_F32 && i < sizeof vocabs / sizeof *vocabs; i++)
            add_head_loss(cases, d, vocabs[i], 8, 1);
    }
    add_update(cases);
    add_skipped(cases);
}
