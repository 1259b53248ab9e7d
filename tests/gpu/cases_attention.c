/* Cases of attention and its backward: documents of every length packed into a batch, tokens of
 * none behind them, query heads that share a head of keys, windows, rope's turn, and cached keys.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"

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

/* What ops are told of documents' lengths: the longest's, or, of an even number of documents that
 * are not equal, somewhat more. */
static int32_t longest_of(const packing *p, const int32_t *bounds, int32_t slots)
{
    int32_t longest = 0;
    for (int32_t d = 0; d < slots; d++)
        if (bounds[d + 1] - bounds[d] > longest)
            longest = bounds[d + 1] - bounds[d];
    if (p->equal > 0 || slots % 2 == 1)
        return longest;
    return longest + 5 < p->tokens ? longest + 5 : p->tokens;
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

/* Each document counts from 0, every second one from 5; of a long one, as far as the table goes,
 * again and again. */
static const int32_t *positions_of(const packing *p, const int32_t *bounds, int32_t slots)
{
    int32_t *positions = calloc((size_t)p->tokens, sizeof *positions);
    if (positions == NULL)
        exit(1);
    for (int32_t d = 0; d < slots; d++)
        for (int32_t row = bounds[d]; row < bounds[d + 1]; row++)
            positions[row] = (row - bounds[d] + d % 2 * 5) % POSITIONS;
    return positions;
}

/* A case of heads over a packing. */
static gpu_case *add_over(gpu_cases *cases, pml_op op, pml_dtype d, const packing *p, heads h,
                          const char *what)
{
    char window[32] = "";
    if (h.window > 0)
        snprintf(window, sizeof window, ", window %d", h.window);
    return cases_add(cases, op, "%s %d/%d of %d%s: %s%s", pml_dtype_name(d), h.heads, h.kv_heads,
                     h.dim, window, p->name, what);
}

/* turned: back through rope, and dq, dk and dv in one buffer where the number of documents is odd,
 * as a program lays them. */
static void add_attention_bwd(gpu_cases *cases, pml_dtype d, const packing *p, heads h, bool turned)
{
    int32_t slots, *bounds = bounds_of(p, &slots);
    int64_t q = (int64_t)h.heads * h.dim, kv = (int64_t)h.kv_heads * h.dim, t = p->tokens;
    gpu_case *c = add_over(cases, PML_OP_attention_bwd, d, p, h, turned ? ", turned" : "");
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
                                  .max_q = longest_of(p, bounds, slots),
                                  .equal = p->equal > 0,
                                  .scale = 1.0F / (float)h.dim};
    c->given[PML_OPERAND(attention_bwd, cu_q)] = bounds;
    c->given[PML_OPERAND(attention_bwd, cu_k)] = bounds;
    c->tolerance = cases_loose(d);
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
    gpu_case *c = add_over(cases, PML_OP_attention, d, p, h, "");
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
                                             .max_q = longest_of(p, bounds, slots),
                                             .equal = p->equal > 0,
                                             .scale = 1.0F / (float)h.dim};
    c->given[PML_OPERAND(attention, cu_q)] = bounds;
    c->given[PML_OPERAND(attention, cu_k)] = bounds;
    c->tolerance = d == PML_F32 ? 3e-6 : cases_tight(d);
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
    c->tolerance = d == PML_F32 ? 3e-6 : cases_tight(d);
}

static void add_all(gpu_cases *cases, pml_dtype d)
{
    static const heads shapes[] = {{4, 2, 64, 0}, {4, 1, 128, 0}, {3, 3, 16, 0}, {2, 1, 80, 0}};
    for (size_t p = 0; p < sizeof packings / sizeof *packings; p++)
        for (size_t h = 0; h < sizeof shapes / sizeof *shapes; h++)
            add_attention(cases, d, &packings[p], shapes[h]);
    /* Tiles of 64 rows for all heads of a head of keys: 1, 7 (one row over) and 64 of them. */
    static const heads groups[] = {{4, 4, 128, 0}, {28, 4, 128, 0}, {64, 1, 128, 0}};
    static const packing crowd = {"300 of 1 to 40, 3 outside", 6133, {-1}, 0, 300};
    add_attention(cases, d, &crowd, (heads){8, 2, 128, 0});
    add_attention(cases, d, &crowd, (heads){8, 2, 64, 0}); /* cuDNN's backward in several calls */
    for (size_t h = 0; h < sizeof groups / sizeof *groups; h++) {
        add_attention(cases, d, &packings[3], groups[h]);
        add_attention(cases, d, &packings[5], groups[h]);
    }
    add_attention(cases, d, &packings[3], (heads){4, 2, 64, 50});
    add_attention(cases, d, &packings[3], (heads){4, 2, 128, 130});
    add_attention(cases, d, &packings[2], (heads){2, 1, 24, 9});
    /* Windows of equal documents, one of them of a single key; wider than some documents, and than
     * all but a few. */
    add_attention(cases, d, &packings[7], (heads){4, 1, 128, 64});
    add_attention(cases, d, &packings[7], (heads){4, 2, 64, 100});
    add_attention(cases, d, &packings[6], (heads){4, 1, 128, 1});
    add_attention(cases, d, &packings[8], (heads){4, 2, 128, 200});
    add_attention(cases, d, &crowd, (heads){8, 2, 128, 33});
    /* More pieces of keys in one document than a chip has processors, and than 8 bits count. */
    static const packing lengthy = {"33100", 33100, {33100, -1}, 0, 0};
    if (d == PML_BF16)
        add_attention_bwd(cases, d, &lengthy, (heads){4, 4, 128, 0}, true);
    add_cached_attention(cases, d, 1, 300);
    add_cached_attention(cases, d, 70, 300);
}

void cases_of_attention(gpu_cases *cases)
{
    for (int f = 0; f < CASES_FLOATS; f++)
        add_all(cases, cases_floats[f]);
}
