/* Cases of what training adds to a forward pass: every backward but a linear layer's and
 * attention's, the loss, the update. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"

/* What may differ between two calls of a norm's backward, for some dtype d of dy. */
typedef struct norm_form {
    const char *name;
    bool dres, in_place; /* in_place: dx lies on dres */
    bool frozen;         /* the weight is of d, or F32 beside a wide x, and has no gradient */
    bool wide_x;         /* x is in F32, as the residual line begins */
    bool wide_sums;      /* dres and dx are in F32, for float16 alone */
    bool rounded;        /* dx comes again in d, where dy lies */
    bool apart;          /* rows with something between them, off their alignment */
    bool many_rows;      /* also as many as blocks come to one after the other */
} norm_form;

static void add_rmsnorm_bwd(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t cols,
                            const norm_form *form)
{
    gpu_case *c = cases_add(cases, PML_OP_rmsnorm_bwd, "%s [%d,%d]%s", pml_dtype_name(d), (int)rows,
                            (int)cols, form->name);
    int64_t border = form->apart ? 8 : 0;
    pml_dtype of_x = form->wide_x ? PML_F32 : d, sums = form->wide_sums ? PML_F32 : d;
    pml_rmsnorm_bwd_args *a = &c->args.rmsnorm_bwd;
    *a = (pml_rmsnorm_bwd_args){.dy = shaped(rows, cols, border, d),
                                .x = shaped(rows, cols, 2 * border, of_x),
                                .weight = shaped(1, cols, 0, form->frozen ? of_x : PML_F32),
                                .rstd = shaped(1, rows, 0, PML_F32),
                                .dx = shaped(rows, cols, border, sums)};
    c->tolerance = cases_once(d);
    c->of_f32 = 1e-5; /* sums, and the gradient of the weight */
    c->shift = form->apart ? 1 : 0;
    if (form->dres)
        a->dres = shaped(rows, cols, border, sums);
    if (!form->frozen)
        a->dweight = shaped(1, cols, 0, PML_F32);
    if (form->in_place)
        c->inside[PML_OPERAND(rmsnorm_bwd, dx)] = PML_OPERAND(rmsnorm_bwd, dres);
    if (form->rounded) {
        a->rounded = shaped(rows, cols, border, d);
        c->inside[PML_OPERAND(rmsnorm_bwd, rounded)] = PML_OPERAND(rmsnorm_bwd, dy);
    }
}

static const norm_form norm_forms[] = {
    {.name = "", .frozen = true},
    {.name = " + dres, dweight", .dres = true, .apart = true},
    {.name = " in place of dres, dweight", .dres = true, .in_place = true, .many_rows = true},
    {.name = " in place of dres, frozen", .dres = true, .in_place = true, .frozen = true},
    {.name = ", x in F32", .wide_x = true, .dres = true, .in_place = true, .many_rows = true},
    {.name = ", x in F32, frozen", .wide_x = true, .frozen = true, .dres = true, .in_place = true},
    {.name = ", x in F32, apart", .wide_x = true, .dres = true, .apart = true},
    /* float16's own: sums as good as float32 gets, and with their rounding on dy */
    {.name = " to F32 in place of dres",
     .dres = true,
     .in_place = true,
     .wide_sums = true,
     .many_rows = true},
    {.name = " to F32, rounded on dy", .wide_sums = true, .rounded = true, .many_rows = true},
    {.name = " to F32, frozen", .dres = true, .wide_sums = true, .frozen = true},
    {.name = ", x in F32, to F32",
     .wide_x = true,
     .dres = true,
     .in_place = true,
     .wide_sums = true,
     .many_rows = true},
    {.name = ", x in F32, to F32, frozen", .wide_x = true, .wide_sums = true, .frozen = true}};

static void add_rmsnorm_bwds(gpu_cases *cases, pml_dtype d)
{
    static const int64_t widths[] = {8, 63, 128, 896, 2048, 4096, 16384, 40000};
    static const int64_t weighted[] = {16, 768, 2048, 4096, 8192}; /* blocks of many rows */
    for (size_t form = 0; form < sizeof norm_forms / sizeof *norm_forms; form++) {
        const norm_form *f = &norm_forms[form];
        if ((f->wide_sums && d != PML_F16) || (f->wide_x && d == PML_F32))
            continue;
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
            add_rmsnorm_bwd(cases, d, widths[w] < 1000 ? 131 : 5, widths[w], f);
        for (size_t w = 0; f->many_rows && w < sizeof weighted / sizeof *weighted; w++)
            add_rmsnorm_bwd(cases, d, weighted[w] < 1000 ? 5001 : 601, weighted[w], f);
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
        c->tolerance = cases_tight(d);
        c = cases_add(cases, PML_OP_swiglu_bwd, "%s [%d,%d]+%d%s", name, (int)rows, (int)cols,
                      (int)border, s % 2 ? " in place" : "");
        c->args.swiglu_bwd = (pml_swiglu_bwd_args){.dh = shaped(rows, cols, border, d),
                                                   .gate_up = shaped(rows, 2 * cols, border, d),
                                                   .dgate_up = shaped(rows, 2 * cols, border, d)};
        c->tolerance = cases_tight(d);
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
            c->tolerance = cases_tight(d);
        }
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
    c->tolerance =
        d == PML_F32 ? cases_loose(d) : 2 * cases_loose(d); /* logits of up to 30, rounded to d */
}

/* Qwen3's norm of heads over frozen weights, and over trained ones, which are in float32, with
 * their gradients. */
static void add_head_norm(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t heads, int32_t kv,
                          int32_t dim)
{
    int64_t cols = (int64_t)(heads + kv) * dim;
    for (int trains = 0; trains < 2; trains++) {
        pml_view weight = shaped(1, dim, 0, trains ? PML_F32 : d);
        gpu_case *c = cases_add(cases, PML_OP_head_norm, "%s %d x %d+%d of %d%s", pml_dtype_name(d),
                                (int)rows, heads, kv, dim, trains ? ", trained" : "");
        c->args.head_norm = (pml_head_norm_args){.x = shaped(rows, cols, 8, d),
                                                 .q_weight = weight,
                                                 .k_weight = weight,
                                                 .y = shaped(rows, cols, 0, d),
                                                 .rstd = shaped(rows, heads + kv, 1, PML_F32),
                                                 .heads = heads,
                                                 .kv_heads = kv,
                                                 .head_dim = dim,
                                                 .eps = 1e-6F};
        c->tolerance = cases_once(d);
        c = cases_add(cases, PML_OP_head_norm_bwd, "%s %d x %d+%d of %d%s", pml_dtype_name(d),
                      (int)rows, heads, kv, dim, trains ? " in place, dweights" : "");
        c->args.head_norm_bwd =
            (pml_head_norm_bwd_args){.dy = shaped(rows, cols, 0, d),
                                     .x = shaped(rows, cols, 8, d),
                                     .q_weight = weight,
                                     .k_weight = weight,
                                     .rstd = shaped(rows, heads + kv, 1, PML_F32),
                                     .dx = shaped(rows, cols, 0, d),
                                     .heads = heads,
                                     .kv_heads = kv,
                                     .head_dim = dim};
        c->tolerance = d == PML_F32 ? 1e-5 : cases_tight(d);
        if (trains) {
            c->args.head_norm_bwd.dq_weight = shaped(1, dim, 0, PML_F32);
            c->args.head_norm_bwd.dk_weight = shaped(1, dim, 0, PML_F32);
            c->inside[PML_OPERAND(head_norm_bwd, dx)] = PML_OPERAND(head_norm_bwd, dy);
        }
    }
}

/* Heads of one block, of no whole packs, and whole ones in float32 alone; of lanes that are no
 * power of two, two packs a lane in float32; one pack; more heads than a block has; more tokens
 * than blocks stay for. */
static void add_head_norms(gpu_cases *cases, pml_dtype d)
{
    static const int32_t shapes[][4] = {{77, 4, 2, 128},  {77, 3, 1, 22},   {77, 3, 1, 20},
                                        {31, 3, 2, 96},   {31, 2, 1, 256},  {5, 1, 1, 8},
                                        {13, 40, 8, 128}, {13, 32, 8, 128}, {2113, 2, 1, 64}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        add_head_norm(cases, d, shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3]);
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
                            copy < 0 ? "none" : pml_dtype_name(cases_floats[copy]));
    pml_view v = shaped(1, n, 0, PML_F32), codes = shaped(1, n, 0, PML_U8);
    pml_view largest = shaped(1, (n + PML_ADAMW_8BIT_BLOCK - 1) / PML_ADAMW_8BIT_BLOCK, 0, PML_F32);
    c->args.adamw_8bit = (pml_adamw_8bit_args){
        v, v, codes, codes, largest, largest, shaped(1, PML_HYPER_COUNT, 0, PML_F32), {0}};
    if (copy >= 0)
        c->args.adamw_8bit.copy = shaped(1, n, 0, cases_floats[copy]);
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
        for (int f = -1; f < CASES_FLOATS; f++) {
            c = cases_add(cases, PML_OP_adamw, "[1,%d] copy %s", (int)n,
                          f < 0 ? "none" : pml_dtype_name(cases_floats[f]));
            pml_view v = shaped(1, n, 0, PML_F32);
            c->args.adamw =
                (pml_adamw_args){v, v, v, v, shaped(1, PML_HYPER_COUNT, 0, PML_F32), {0}};
            if (f >= 0)
                c->args.adamw.copy = shaped(1, n, 0, cases_floats[f]);
            c->positive = PML_OPERAND(adamw, v);
            c->given[PML_OPERAND(adamw, hyper)] = hyper;
            c->tolerance = f > 0 ? cases_tight(cases_floats[f]) : 1e-6;
            c->shift = s == 3 ? 1 : 0;
        }
    }
    static const int64_t lengths[] = {1, 255, 4096, 300001};
    for (size_t s = 0; s < sizeof lengths / sizeof *lengths; s++)
        for (int f = -1; f < CASES_FLOATS; f++)
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
        c->tolerance = cases_tight(PML_BF16);
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
    for (int f = 0; f < CASES_FLOATS; f++) {
        pml_dtype d = cases_floats[f];
        add_rmsnorm_bwds(cases, d);
        add_elementwise(cases, d);
        add_head_norms(cases, d);
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
