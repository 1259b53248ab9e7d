#include "cases.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 256 };

gpu_case *cases_add(gpu_cases *cases, pml_op op, const char *format, ...)
{
    if (cases->count == CASES_MAX) {
        fprintf(stderr, "more than %d cases\n", CASES_MAX);
        exit(1);
    }
    gpu_case *c = &cases->at[cases->count++];
    memset(c, 0, sizeof *c);
    c->op = op;
    c->positive = c->exact = -1;
    for (int i = 0; i < PML_OP_MAX_VIEWS; i++)
        c->inside[i] = -1;
    int n = snprintf(c->name, sizeof c->name, "%-12s ", pml_op_describe(op)->name);
    va_list list;
    va_start(list, format);
    vsnprintf(c->name + n, sizeof c->name - (size_t)n, format, list);
    va_end(list);
    return c;
}

pml_view shaped(int64_t rows, int64_t cols, int64_t border, pml_dtype dtype)
{
    return (pml_view){NULL, rows, cols, cols + border, dtype};
}

size_t view_span(const pml_view *v)
{
    if (v->rows == 0 || v->cols == 0)
        return 0;
    return (size_t)((v->rows - 1) * v->ld + v->cols) * pml_dtype_size(v->dtype);
}

/* rows x cols shapes: single, odd, around the units kernels work in, and more than one block. */
static void add_moves(gpu_cases *cases)
{
    static const int64_t shapes[][3] = {/* rows, cols, border */
                                        {1, 1, 0},   {3, 7, 0},       {37, 64, 0},  {37, 63, 2},
                                        {5, 896, 8}, {129, 1000, 24}, {2, 70001, 0}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int f = 0; f < CASES_FLOATS; f++) {
            int64_t rows = shapes[s][0], cols = shapes[s][1], border = shapes[s][2];
            pml_dtype d = cases_floats[f], other = cases_floats[(f + 1) % CASES_FLOATS];
            const char *name = pml_dtype_name(d);
            gpu_case *c = cases_add(cases, PML_OP_embed, "%s [%d,%d]+%d", name, (int)rows,
                                    (int)cols, (int)border);
            c->args.embed =
                (pml_embed_args){shaped(1, rows, 0, PML_I32), shaped(101, cols, border, d),
                                 shaped(rows, cols, 2 * border, d)};
            c->indices = 101;

            c = cases_add(cases, PML_OP_copy, "%s to %s [%d,%d]+%d", name, pml_dtype_name(other),
                          (int)rows, (int)cols, (int)border);
            c->args.copy = (pml_copy_args){shaped(rows, cols, border, d),
                                           shaped(rows, cols, 2 * border, other)};

            c = cases_add(cases, PML_OP_copy, "%s [%d,%d]+%d shifted", name, (int)rows, (int)cols,
                          (int)border);
            c->args.copy =
                (pml_copy_args){shaped(rows, cols, border, d), shaped(rows, cols, border, d)};
            c->shift = 1 + (int)s % 3;

            c = cases_add(cases, PML_OP_fill, "%s [%d,%d]+%d", name, (int)rows, (int)cols,
                          (int)border);
            c->args.fill = (pml_fill_args){shaped(rows, cols, border, d), -0.3};
        }
    static const pml_dtype others[] = {PML_F64, PML_I32, PML_I64, PML_U8};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        gpu_case *c = cases_add(cases, PML_OP_fill, "%s [13,100]+4", pml_dtype_name(others[i]));
        c->args.fill = (pml_fill_args){shaped(13, 100, 4, others[i]), 201};
    }
    gpu_case *c = cases_add(cases, PML_OP_gather_rows, "BF16 [29,48]");
    c->args.gather_rows = (pml_gather_rows_args){
        shaped(77, 48, 0, PML_BF16), shaped(1, 29, 0, PML_I32), shaped(29, 48, 8, PML_BF16)};
    c->indices = 77;
    c = cases_add(cases, PML_OP_scatter_rows, "F32 [29,50]");
    c->args.scatter_rows = (pml_scatter_rows_args){
        shaped(29, 50, 0, PML_F32), shaped(1, 29, 0, PML_I32), shaped(77, 50, 2, PML_F32)};
    c->indices = 77;
    c->distinct = true;
}

/* What a norm may read: a residual to add, a weight that is trained, rows that begin the residual
 * line in float32. */
static void add_norms(gpu_cases *cases)
{
    static const int64_t widths[] = {8,    63,   64,   128,  576,   896,  1024,
                                     2048, 4096, 5120, 8192, 16384, 40000};
    static const struct {
        const char *name;
        bool adds, in_place, trained, wide_x;
    } forms[] = {{.name = ""},
                 {.name = " + residual", .adds = true},
                 {.name = " + residual in place", .adds = true, .in_place = true},
                 {.name = ", trained", .trained = true},
                 {.name = ", trained + residual", .adds = true, .trained = true},
                 {.name = ", x in F32", .trained = true, .wide_x = true},
                 {.name = ", x in F32 + residual", .adds = true, .trained = true, .wide_x = true}};
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
        for (size_t i = 0; i < CASES_FLOATS * (sizeof forms / sizeof *forms); i++) {
            int64_t cols = widths[w], rows = cols < 1000 ? 131 : 5;
            pml_dtype d = cases_floats[i % CASES_FLOATS];
            size_t form = i / CASES_FLOATS;
            const bool adds = forms[form].adds;
            if (forms[form].wide_x && d == PML_F32)
                continue;
            int64_t border = adds && !forms[form].in_place ? 8 : 0;
            gpu_case *c = cases_add(cases, PML_OP_rmsnorm, "%s [%d,%d]%s", pml_dtype_name(d),
                                    (int)rows, (int)cols, forms[form].name);
            pml_rmsnorm_args *a = &c->args.rmsnorm;
            *a = (pml_rmsnorm_args){
                .x = shaped(rows, cols, border, forms[form].wide_x ? PML_F32 : d),
                .weight = shaped(1, cols, 0, forms[form].trained ? PML_F32 : d),
                .y = shaped(rows, cols, 2 * border, d),
                .rstd = shaped(1, rows, 0, PML_F32),
                .eps = 1e-5F};
            c->tolerance = adds ? cases_tight(d) : cases_once(d);
            if (adds) { /* rstd is of the sum, which the reference does not round */
                a->add = a->sum = shaped(rows, cols, border, d);
                c->exact = PML_OPERAND(rmsnorm, sum);
            } else {
                c->of_f32 = 1e-5;
            }
            if (forms[form].in_place)
                c->inside[PML_OPERAND(rmsnorm, sum)] = PML_OPERAND(rmsnorm, x);
            c->shift = border > 0 && w % 2 == 0 ? 1 : 0;
        }
}

static gpu_case *add_linear(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t n, int64_t k,
                            const char *what)
{
    gpu_case *c = cases_add(cases, PML_OP_linear, "%s [%d,%d]x[%d,%d]%s", pml_dtype_name(d),
                            (int)rows, (int)k, (int)n, (int)k, what);
    c->args.linear = (pml_linear_args){.x = shaped(rows, k, 0, d),
                                       .w = shaped(n, k, 0, d),
                                       .y = shaped(rows, n, 0, d),
                                       .parts = 1,
                                       .part_cols = {(int32_t)n}};
    c->tolerance = cases_tight(d);
    return c;
}

/* Three parts of unequal width, adapters on the first and the last. */
static void add_parts(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                      int32_t rank, bool keeps_u)
{
    gpu_case *c =
        add_linear(cases, d, rows, 2 * n, k, keeps_u ? " parts, LoRA, bias" : " parts, LoRA, no u");
    pml_linear_args *a = &c->args.linear;
    a->parts = 3;
    a->part_cols[0] = n;
    a->part_cols[1] = n / 2;
    a->part_cols[2] = n - n / 2;
    a->lora_parts = 5;
    a->rank = rank;
    a->lora_scale[0] = 0.75F;
    a->lora_scale[2] = rank % 2 == 0 ? 0.75F : 0.5F; /* one product, or one a part */
    a->a = shaped(2 * rank, k, 0, d);
    a->b = shaped(n + (n - n / 2), rank, 0, d);
    if (keeps_u) {
        a->u = shaped(rows, 2 * rank, 8, d);
        a->bias = shaped(1, 2 * n, 0, d);
    }
}

int64_t cases_adapted(const int32_t part_cols[], uint32_t adapted)
{
    int64_t rows = 0;
    for (int p = 0; p < PML_LINEAR_MAX_PARTS; p++)
        rows += adapted >> p & 1 ? part_cols[p] : 0;
    return rows;
}

void cases_drop(gpu_case *c, int at, int64_t rows)
{
    static const int64_t rng[] = {0x123456789abcdef, 7};
    enum { PLACES = 8192 };
    static int64_t places[PLACES]; /* far apart, neither ascending nor small */
    for (int64_t t = 0; t < PLACES; t++)
        places[t] = (t * 7919 + 13) % PLACES + (t % 3 == 0 ? INT64_C(1) << 33 : 0);
    pml_view *views = pml_op_views(&c->args);
    views[at] = shaped(1, 2, 0, PML_I64);
    views[at + 1] = shaped(1, rows, 0, PML_I64);
    c->given[at] = rng;
    c->given[at + 1] = places;
}

/* The same with dropout, adapters on parts whose bits are set: one part's mask is not the other's.
 */
static void add_dropped(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                        int32_t rank, bool keeps_u, uint32_t adapted)
{
    add_parts(cases, d, rows, n, k, rank, keeps_u);
    gpu_case *c = &cases->at[cases->count - 1];
    pml_linear_args *a = &c->args.linear;
    size_t length = strlen(c->name);
    snprintf(c->name + length, sizeof c->name - length, " %d of %x, dropout", rank, adapted);
    int64_t columns = rank * __builtin_popcount(adapted);
    a->lora_parts = adapted;
    a->lora_scale[1] = 0.25F;
    a->a = shaped(columns, k, 0, d);
    a->b = shaped(cases_adapted(a->part_cols, adapted), rank, 0, d);
    if (keeps_u)
        a->u = shaped(rows, columns, 8, d);
    a->lora_dropout = 0.3F;
    a->lora_purpose = (1 << 16) + 11;
    cases_drop(c, 6, rows);
}

/* Borders behind x and w and below w: one product. */
static void add_bordered(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                         int32_t rank, int32_t border)
{
    add_parts(cases, d, rows, n, k, rank, rank != 3);
    gpu_case *c = &cases->at[cases->count - 1];
    size_t length = strlen(c->name);
    snprintf(c->name + length, sizeof c->name - length, ", border %d", border);
    pml_linear_args *a = &c->args.linear;
    a->border = border;
    a->x = shaped(rows, k, border, d);
    a->w = shaped(2 * n, k, border, d);
}

static void add_linears(gpu_cases *cases)
{
    static const int64_t shapes[][3] = {/* rows, outputs, inputs */
                                        {1, 8, 8},      {37, 130, 65},    {64, 256, 128},
                                        {3, 1000, 896}, {130, 896, 1000}, {257, 1536, 576}};
    for (int f = 0; f < CASES_FLOATS; f++) {
        pml_dtype d = cases_floats[f];
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            int64_t rows = shapes[s][0], n = shapes[s][1], k = shapes[s][2];
            add_linear(cases, d, rows, n, k, "");
            gpu_case *c = add_linear(cases, d, rows, n, k, " bias, borders");
            c->args.linear.bias = shaped(1, n, 0, d);
            c->args.linear.x = shaped(rows, k, 24, d);
            c->args.linear.w = shaped(n, k, 8, d);
            c->args.linear.y = shaped(rows, n, 40, d);
        }
        add_linear(cases, d, 37, 130, 65, " shifted")->shift = 1;
        if (d != PML_F32) { /* more units than our own kernel's clusters have at once */
            add_linear(cases, d, 16100, 1040, 24, " many");
            add_linear(cases, d, 33100, 520, 600, " many");
        }
        for (int64_t rows = 1; rows <= 9; rows++) { /* what sampling has, and one row more */
            add_linear(cases, d, rows, 515, 2056, " few");
            add_parts(cases, d, rows, 130, 136 * rows, rows % 3 == 0 ? 3 : 16, rows % 2 == 0);
        }
        add_bordered(cases, d, 2, 384, 4096, 40, 128);
        add_parts(cases, d, 37, 64, 129, 3, true);
        add_parts(cases, d, 200, 256, 512, 16, true);
        add_parts(cases, d, 200, 256, 512, 16, false);
        add_dropped(cases, d, 37, 64, 129, 3, true, 5);
        add_dropped(cases, d, 200, 256, 512, 16, false, 5);
        add_dropped(cases, d, 200, 256, 2568, 16, true, 7); /* strips by turns */
        add_dropped(cases, d, 5, 24, 8208, 8, true, 7);     /* a row has masks by several blocks */
        add_dropped(cases, d, 130, 64, 72, 24, false,
                    5); /* a strip and a piece; a group and a half */
        add_dropped(cases, d, 333, 64, 1032, 32, true, 7);
        add_dropped(cases, d, 4321, 64, 136, 16, true, 2);
        add_dropped(cases, d, 77, 64, 136, 40, true, 5); /* by masked copies */
        add_bordered(cases, d, 100, 384, 256, 16, 64);   /* in packs */
        add_bordered(cases, d, 70, 65, 129, 3, 11);      /* zeros behind, nothing aligned */
        add_bordered(cases, d, 256, 128, 512, 40, 128);
        add_bordered(cases, d, 37, 130, 64, 4, 64); /* too few tokens for it */
    }
}

void cases_of_forward(gpu_cases *cases)
{
    add_moves(cases);
    add_norms(cases);
    add_linears(cases);
}

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

pml_view cases_reach(const gpu_case *c, int operand)
{
    const pml_view *views = pml_op_views((pml_op_args *)&c->args);
    pml_view v = views[operand];
    bool forward = c->op == PML_OP_linear, backward = c->op == PML_OP_linear_bwd;
    int64_t border = forward ? c->args.linear.border : backward ? c->args.linear_bwd.border : 0;
    const pml_view *scale = forward ? &c->args.linear.w_scale : &c->args.linear_bwd.w_scale;
    bool codes = border > 0 && scale->rows > 0; /* behind the weight alone */
    int x = forward ? PML_OPERAND(linear, x) : PML_OPERAND(linear_bwd, dy);
    int w = forward ? PML_OPERAND(linear, w) : PML_OPERAND(linear_bwd, w);
    bool activations = operand == x && (!codes || views[x].dtype == PML_U8), weight = operand == w;
    if (border > 0 && (activations || weight))
        v.cols += border;
    if (border > 0 && weight && !codes)
        v.rows += border;
    return v;
}

/* What lies inside another operand may reach beyond that operand's last row: its row is longer. */
static size_t room_for(const gpu_case *c, const pml_view *views, int operand, int count)
{
    pml_view reach = cases_reach(c, operand);
    size_t bytes = view_span(&reach);
    for (int i = 0; i < count; i++) {
        size_t reach = (size_t)c->column[i] * pml_dtype_size(views[i].dtype) + view_span(&views[i]);
        if (c->inside[i] == operand && reach > bytes)
            bytes = reach;
    }
    return bytes + (size_t)c->shift * pml_dtype_size(views[operand].dtype);
}

static bool is_chosen(const gpu_case *c, const gpu_choice *choice)
{
    if (choice->only != NULL && strstr(c->name, choice->only) == NULL)
        return false;
    for (int i = 0; i < 8 && choice->without[i] != NULL; i++)
        if (strstr(c->name, choice->without[i]) != NULL)
            return false;
    return true;
}

void cases_keep(gpu_cases *cases, const gpu_choice *choice)
{
    int kept = 0, chosen = 0;
    for (int n = 0; n < cases->count; n++)
        if (is_chosen(&cases->at[n], choice) &&
            (choice->parts == 0 || chosen++ % choice->parts == choice->part))
            cases->at[kept++] = cases->at[n];
    cases->count = kept;
}

void cases_place(gpu_cases *cases, const pml_backend *backend)
{
    cases->workspace = cases->operands = 0;
    for (int n = 0; n < cases->count; n++) {
        gpu_case *c = &cases->at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        pml_view *views = pml_op_views(&c->args);
        for (int i = 0; i < info->n_views; i++) {
            if (views[i].rows == 0 || c->inside[i] >= 0)
                continue;
            size_t size = pml_dtype_size(views[i].dtype);
            views[i].data = (void *)(uintptr_t)(cases->operands + (size_t)c->shift * size);
            cases->operands += aligned(room_for(c, views, i, info->n_views));
        }
        for (int i = 0; i < info->n_views; i++)
            if (c->inside[i] >= 0)
                views[i].data = (char *)views[c->inside[i]].data +
                                (size_t)c->column[i] * pml_dtype_size(views[i].dtype);
        c->workspace = backend->workspace(NULL, c->op, &c->args);
        if (aligned(c->workspace) > cases->workspace)
            cases->workspace = aligned(c->workspace);
    }
}

void cases_rebase(gpu_cases *cases, unsigned char *base)
{
    for (int n = 0; n < cases->count; n++) {
        gpu_case *c = &cases->at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        pml_view *views = pml_op_views(&c->args);
        for (int i = 0; i < info->n_views; i++) {
            if (toupper(info->signature[i]) == 'W' && c->workspace > 0)
                views[i] = pml_vector(base + cases->workspace - aligned(c->workspace),
                                      (int64_t)c->workspace, PML_U8);
            else if (views[i].rows > 0)
                views[i].data = base + cases->workspace + (uintptr_t)views[i].data;
        }
    }
}
