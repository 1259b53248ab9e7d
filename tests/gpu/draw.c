/* What goes into the op tests: numbers that are the same each time, and the CPU's own operands. */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"

void session_stop(const char *what, const pml_error *err)
{
    fprintf(stderr, "%s: %s (%s:%d)\n", what, err->message, err->file, err->line);
    exit(1);
}

void *must_alloc(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    if (memory == NULL) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return memory;
}

static uint64_t state;

/* A case's numbers are its own, whichever others are beside it: by FNV-1a of its name. */
static void begin_case(const gpu_case *c)
{
    state = 0xcbf29ce484222325U;
    for (const char *at = c->name; *at != '\0'; at++)
        state = (state ^ (unsigned char)*at) * 0x100000001b3U;
}

/* splitmix64 */
static uint64_t random_bits(void)
{
    uint64_t z = state += 0x9E3779B97F4A7C15U;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
    z = (z ^ z >> 27) * 0x94D049BB133111EBU;
    return z ^ z >> 31;
}

/* About normal: twelve uniform numbers less their mean. */
static float random_normal(void)
{
    float sum = -6;
    for (int i = 0; i < 12; i += 3) {
        uint64_t bits = random_bits();
        sum += (float)(bits & 0x1fffff) * 0x1p-21F + (float)(bits >> 21 & 0x1fffff) * 0x1p-21F +
               (float)(bits >> 42 & 0x1fffff) * 0x1p-21F;
    }
    return sum;
}

pml_view in_image(const session *s, pml_view v, unsigned char *image)
{
    v.data = image + ((unsigned char *)v.data - s->arena);
    return v;
}

static bool is_float(pml_dtype dtype)
{
    return dtype == PML_F32 || dtype == PML_BF16 || dtype == PML_F16;
}

void cpu_copy(const session *s, pml_view from, pml_view to)
{
    pml_op_args args = {.copy = {from, to}};
    MUST(pml_op_run(s->cpu, PML_OP_copy, s->cpu_queue, &args, err));
}

static void draw_indices(const gpu_case *c, pml_view v)
{
    int32_t *out = v.data;
    for (int64_t i = 0; i < v.cols; i++)
        out[i] = c->distinct ? (int32_t)(i * 31 % c->indices)
                             : (int32_t)(random_bits() % (uint64_t)c->indices);
    for (int64_t i = 2; c->distinct && i < v.cols; i += 5)
        out[i] = -1;
}

static void draw_bytes(const gpu_case *c, pml_view v)
{
    for (int64_t r = 0; r < v.rows; r++)
        for (int64_t i = 0; i < v.cols; i++) {
            uint8_t byte = (uint8_t)random_bits();
            bool none = c->e4m3 && (byte & 0x7f) == 0x7f;
            ((uint8_t *)v.data)[r * v.ld + i] = none ? 0 : byte;
        }
}

static void put_given(const void *given, pml_view v)
{
    size_t row = (size_t)v.cols * pml_dtype_size(v.dtype);
    for (size_t r = 0; r < (size_t)v.rows; r++)
        memcpy((char *)v.data + r * (size_t)v.ld * pml_dtype_size(v.dtype),
               (const char *)given + r * row, row);
}

/* Random numbers in the operand's dtype, or those that the case brings. */
static void draw(const session *s, const gpu_case *c, int operand, pml_view v)
{
    bool positive = operand == c->positive;
    if (c->given[operand] != NULL) {
        put_given(c->given[operand], v);
        return;
    }
    if (v.dtype == PML_I32) {
        draw_indices(c, v);
        return;
    }
    if (v.dtype == PML_U8) {
        draw_bytes(c, v);
        return;
    }
    if (v.dtype == PML_F64) {
        *(double *)v.data = positive ? 1e4 : random_normal();
        return;
    }
    pml_view numbers =
        pml_matrix(must_alloc((size_t)(v.rows * v.cols) * sizeof(float)), v.rows, v.cols, PML_F32);
    for (int64_t i = 0; i < v.rows * v.cols; i++)
        ((float *)numbers.data)[i] = positive ? fabsf(random_normal()) : random_normal();
    cpu_copy(s, numbers, v);
    free(numbers.data);
}

void twin_of(const session *s, const gpu_case *c, pml_op_args *twin)
{
    const pml_op_info *info = pml_op_describe(c->op);
    *twin = c->args;
    pml_view *views = pml_op_views(twin);
    for (int i = 0; i < info->n_views; i++) {
        pml_view v = views[i];
        if (v.data == NULL || toupper(info->signature[i]) == 'W')
            continue;
        pml_dtype dtype = is_float(v.dtype) ? PML_F32 : v.dtype;
        views[i] = pml_matrix(must_alloc((size_t)(v.rows * v.cols) * pml_dtype_size(dtype)), v.rows,
                              v.cols, dtype);
        cpu_copy(s, in_image(s, v, s->start), views[i]);
    }
    for (int i = 0; i < info->n_views; i++) {
        if (toupper(info->signature[i]) != 'W')
            continue;
        size_t bytes = s->cpu->workspace(NULL, c->op, twin);
        views[i] = (pml_view){0};
        if (bytes > 0)
            views[i] = pml_vector(must_alloc(bytes), (int64_t)bytes, PML_U8);
    }
}

void free_views(pml_op op, pml_op_args *args)
{
    for (int i = 0; i < pml_op_describe(op)->n_views; i++)
        free(pml_op_views(args)[i].data);
}

/* A backward's output and weights are those of its forward: a query that sees one key has no
 * gradient of its own only if they are. */
static void settle_attention(const session *s, const gpu_case *c)
{
    pml_op_args twin;
    twin_of(s, c, &twin);
    const pml_attention_bwd_args *b = &twin.attention_bwd;
    pml_op_args forward = {.attention = {.q = b->q,
                                         .k = b->k,
                                         .v = b->v,
                                         .cu_q = b->cu_q,
                                         .cu_k = b->cu_k,
                                         .o = b->o,
                                         .lse = b->lse,
                                         .heads = b->heads,
                                         .kv_heads = b->kv_heads,
                                         .head_dim = b->head_dim,
                                         .window = b->window,
                                         .max_q = b->max_q,
                                         .scale = b->scale}};
    size_t bytes = s->cpu->workspace(NULL, PML_OP_attention, &forward);
    if (bytes > 0)
        forward.attention.ws = pml_vector(must_alloc(bytes), (int64_t)bytes, PML_U8);
    MUST(pml_op_run(s->cpu, PML_OP_attention, s->cpu_queue, &forward, err));
    cpu_copy(s, b->o, in_image(s, c->args.attention_bwd.o, s->start));
    cpu_copy(s, b->lse, in_image(s, c->args.attention_bwd.lse, s->start));
    free(forward.attention.ws.data);
    free_views(c->op, &twin);
}

void draw_start(session *s)
{
    memset(s->start, 0xFF, s->size); /* NaN in every floating dtype */
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case *c = &s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        begin_case(c);
        for (int i = 0; i < info->n_views; i++) {
            pml_view v = pml_op_views(&c->args)[i];
            char letter = (char)toupper(info->signature[i]);
            if (v.data != NULL && (letter == 'I' || letter == 'U'))
                draw(s, c, i, in_image(s, v, s->start));
        }
        if (c->op == PML_OP_attention_bwd)
            settle_attention(s, c);
    }
}
