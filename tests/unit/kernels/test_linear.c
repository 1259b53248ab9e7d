/* linear and linear_bwd: parts, bias, adapters on some of the parts, dropout. */
#include "kernels/fixture.h"

#include "pml/base/philox.h"

typedef struct shape {
    int64_t tokens, k;
    int parts;
    int cols[PML_LINEAR_MAX_PARTS];
    uint32_t adapted;
    int rank;
    bool bias;
    float dropout;
    int border;
    bool mixed; /* each part has its own scale */
} shape;

/* Everything in float64, mask included: mask[part][t*k+c] is 0 or about 1/(1-dropout). */
typedef struct layer {
    const shape *s;
    int64_t n, width;
    double *x, *w, *bias, *a, *b, *dy, *mask;
    double *y, *u; /* outputs, when asked for */
    const float *scale;
} layer;

UNWATCHED static double branch(const layer *p, int part, int64_t u_col, int64_t b_row, int64_t t,
                               double *u)
{
    const shape *s = p->s;
    double y = 0;
    for (int r = 0; r < s->rank; r++) {
        double sum = 0;
        for (int64_t c = 0; c < s->k; c++)
            sum += p->x[t * s->k + c] * p->mask[((int64_t)part * s->tokens + t) * s->k + c] *
                   p->a[(u_col + r) * s->k + c];
        u[r] = p->scale[part] * sum;
        y += u[r] * p->b[b_row * s->rank + r];
    }
    return y;
}

UNWATCHED static double layer_all(void *context)
{
    layer *p = context;
    const shape *s = p->s;
    double result = 0, u[8];
    for (int64_t t = 0; t < s->tokens; t++) {
        int64_t col = 0, u_col = 0, b_row = 0;
        for (int part = 0; part < s->parts; part++) {
            bool adapted = s->adapted >> part & 1;
            for (int j = 0; j < s->cols[part]; j++, col++) {
                double y = s->bias ? p->bias[col] : 0;
                for (int64_t c = 0; c < s->k; c++)
                    y += p->x[t * s->k + c] * p->w[col * s->k + c];
                if (adapted)
                    y += branch(p, part, u_col, b_row++, t, u);
                if (p->y != NULL)
                    p->y[t * p->n + col] = y;
                result += y * p->dy[t * p->n + col];
            }
            if (adapted && p->u != NULL)
                memcpy(p->u + t * p->width + u_col, u, (size_t)s->rank * sizeof *u);
            u_col += adapted ? s->rank : 0;
        }
    }
    return result;
}

enum { SEED = 77, STEP = 12, PURPOSE = PML_PURPOSE_DROPOUT + 40 };

/* Tokens of the data lie in a batch in any order, and some far from the others. */
static int64_t place_of(int64_t t)
{
    return t % 3 == 0 ? 1000000000000 - t : 7 * t;
}

static double *make_mask(const shape *s)
{
    double *mask = malloc((size_t)(s->parts * s->tokens * s->k) * sizeof *mask);
    for (int part = 0; part < s->parts; part++)
        for (int64_t i = 0; i < s->tokens * s->k; i++) {
            int64_t t = i / s->k, c = i % s->k;
            uint64_t index = (uint64_t)(place_of(t) * ((s->k + 7) / 8) + c / 8);
            pml_philox random = pml_philox_at(SEED, STEP, PURPOSE + (uint32_t)part, index);
            double number = random.word[c % 8 / 2] / (c % 2 == 0 ? 1 : 65536) % 65536;
            double dropped = round((double)s->dropout * 65536);
            mask[part * s->tokens * s->k + i] = number >= dropped ? 65536 / (65536 - dropped) : 0;
        }
    return mask;
}

/* The same gradients in two calls: first those that do not read x, which is absent. */
static void run_halves(const pml_op_args *args)
{
    pml_op_args first = *args, second = *args;
    first.linear_bwd.x = first.linear_bwd.dw = first.linear_bwd.da = (pml_view){0};
    second.linear_bwd.u = second.linear_bwd.dx = second.linear_bwd.dbias = (pml_view){0};
    second.linear_bwd.db = (pml_view){0};
    run_op(PML_OP_linear_bwd, &first);
    run_op(PML_OP_linear_bwd, &second);
}

static void check_backward(layer *p, const pml_linear_args *f, pml_view u, bool frozen, bool input,
                           bool halves)
{
    const shape *s = p->s;
    pml_op_args args = {
        .linear_bwd = {.dy = random_view(s->tokens, p->n, s->border),
                       .x = f->x,
                       .w = f->w,
                       .a = f->a,
                       .b = f->b,
                       .u = u,
                       .rng = f->rng,
                       .places = f->places,
                       .parts = s->parts,
                       .part_cols = {s->cols[0], s->cols[1], s->cols[2]},
                       .lora_parts = s->adapted,
                       .rank = s->rank,
                       .lora_scale = {f->lora_scale[0], f->lora_scale[1], f->lora_scale[2]},
                       .lora_dropout = s->dropout,
                       .lora_purpose = PURPOSE}};
    pml_linear_bwd_args *b = &args.linear_bwd;
    double *dw = NULL, *dbias = NULL, *da = NULL, *db = NULL;
    if (frozen && s->adapted == 0)
        b->x = (pml_view){0}; /* nothing that is trained: dx does not read it */
    if (input)
        b->dx = view_new(s->tokens, s->k, s->border, PML_F32);
    if (!frozen) {
        b->dw = random_view(p->n, s->k, s->border);
        dw = doubles(&b->dw);
        b->dbias = random_view(1, p->n, 0);
        dbias = doubles(&b->dbias);
    }
    if (s->adapted != 0) {
        b->da = random_view(p->width, s->k, s->border);
        b->db = random_view(b->b.rows, s->rank, s->border);
        da = doubles(&b->da);
        db = doubles(&b->db);
    }
    p->dy = doubles(&b->dy);
    if (halves)
        run_halves(&args);
    else
        run_op(PML_OP_linear_bwd, &args);
    const double tolerance = 3e-6;
    if (input)
        expect_gradient("dx", &b->dx, NULL, layer_all, p, p->x, 20, tolerance);
    if (!frozen)
        expect_gradient("dw", &b->dw, dw, layer_all, p, p->w, 20, tolerance);
    if (!frozen && s->bias)
        expect_gradient("dbias", &b->dbias, dbias, layer_all, p, p->bias, 20, tolerance);
    if (s->adapted != 0) {
        expect_gradient("da", &b->da, da, layer_all, p, p->a, 20, tolerance);
        expect_gradient("db", &b->db, db, layer_all, p, p->b, 20, tolerance);
    }
    free(dw);
    free(dbias);
    free(da);
    free(db);
    free(p->dy);
    p->dy = NULL;
    b->x = b->w = b->a = b->b = b->u = b->rng = b->places = (pml_view){0};
    free_views(PML_OP_linear_bwd, &args);
}

static void check_layer(const shape *s)
{
    layer p = {.s = s, .mask = make_mask(s)};
    int64_t adapted = 0;
    for (int part = 0; part < s->parts; part++) {
        p.n += s->cols[part];
        adapted += s->adapted >> part & 1 ? s->cols[part] : 0;
        p.width += s->adapted >> part & 1 ? s->rank : 0;
    }
    pml_op_args args = {
        .linear = {.x = random_view(s->tokens, s->k, s->border),
                   .w = random_view(p.n, s->k, s->border),
                   .y = view_new(s->tokens, p.n, s->border, PML_F32),
                   .parts = s->parts,
                   .part_cols = {s->cols[0], s->cols[1], s->cols[2]},
                   .lora_parts = s->adapted,
                   .rank = s->rank,
                   .lora_scale = {0.75F, s->mixed ? 2 : 0.75F, s->mixed ? 0.3F : 0.75F},
                   .lora_dropout = s->dropout,
                   .lora_purpose = PURPOSE}};
    pml_linear_args *f = &args.linear;
    pml_view u = {0};
    if (s->bias)
        f->bias = random_view(1, p.n, 0);
    if (s->adapted != 0) {
        f->a = random_view(p.width, s->k, s->border);
        f->b = random_view(adapted, s->rank, s->border);
        f->u = u = view_new(s->tokens, p.width, s->border, PML_F32);
    }
    if (s->dropout > 0) {
        f->rng = view_new(1, 2, 0, PML_I64);
        memcpy(f->rng.data, (int64_t[]){SEED, STEP}, 2 * sizeof(int64_t));
        f->places = view_new(1, s->tokens, 0, PML_I64);
        for (int64_t t = 0; t < s->tokens; t++)
            ((int64_t *)f->places.data)[t] = place_of(t);
    }
    p.scale = f->lora_scale;
    p.x = doubles(&f->x);
    p.w = doubles(&f->w);
    p.bias = s->bias ? doubles(&f->bias) : NULL;
    p.a = s->adapted ? doubles(&f->a) : NULL;
    p.b = s->adapted ? doubles(&f->b) : NULL;
    p.y = calloc((size_t)(s->tokens * p.n), sizeof *p.y);
    p.u = calloc((size_t)(s->tokens * p.width) + 1, sizeof *p.u);
    p.dy = p.y; /* any: the sum is not looked at */
    layer_all(&p);
    for (int keep = 1; keep >= 0; keep--) { /* u kept for the backward, or in the workspace */
        run_op(PML_OP_linear, &args);
        expect_view("y", &f->y, p.y, 2e-6);
        if (s->adapted != 0 && keep)
            expect_view("u", &f->u, p.u, 2e-6);
        f->u = (pml_view){0};
    }
    free(p.y);
    free(p.u);
    p.y = p.u = NULL;
    check_backward(&p, f, u, false, true, false);
    check_backward(&p, f, u, false, true, true);
    check_backward(&p, f, u, true, true, false);
    check_backward(&p, f, u, s->adapted != 0, false, false);
    free(p.x);
    free(p.w);
    free(p.bias);
    free(p.a);
    free(p.b);
    free(p.mask);
    f->u = u;
    free_views(PML_OP_linear, &args);
}

static void test_layers(void **state)
{
    (void)state;
    static const shape shapes[] = {
        {1, 5, 1, {3}, 0, 0, false, 0, 0, false},
        {1, 40, 1, {70}, 1, 4, true, 0, 3, false},
        {7, 16, 1, {24}, 0, 0, true, 0, 1, false},
        {7, 33, 2, {10, 60}, 3, 2, false, 0, 2, false},
        {130, 24, 3, {48, 9, 16}, 7, 3, true, 0, 0, false},
        {130, 24, 3, {5, 9, 16}, 5, 8, false, 0, 4, false},
        {20, 24, 3, {5, 9, 16}, 2, 3, true, 0, 4, false},
        {20, 24, 2, {5, 9}, 1, 1, false, 0, 0, false},
        {130, 60, 1, {8}, 1, 8, false, 0, 0, false},
        {3, 24, 3, {5, 9, 16}, 5, 4, false, 0.25F, 2, false},
        {1, 24, 1, {5}, 1, 2, true, 0.5F, 0, false},
        {130, 10, 2, {7, 6}, 3, 2, false, 0.1F, 0, false},
        {9, 24, 3, {5, 9, 16}, 7, 4, true, 0, 1, true},
        {6, 23, 3, {5, 9, 16}, 6, 4, true, 0.3F, 0, true},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_layer(&shapes[i]);
}

/* u, a and b in borders of x and w, q, k, v as slices of one buffer: the layouts planners make. */
static void test_borders_of_each_other(void **state)
{
    (void)state;
    enum { T = 9, K = 12, N = 10, R = 2 };
    pml_view xu = random_view(T, K + R, 0), wb = random_view(N, K + R, 0);
    pml_op_args args = {.linear = {.x = pml_view_columns(xu, 0, K),
                                   .w = pml_view_columns(wb, 0, K),
                                   .a = random_view(R, K, 0),
                                   .b = pml_view_columns(wb, K, R),
                                   .y = view_new(T, N, 0, PML_F32),
                                   .u = pml_view_columns(xu, K, R),
                                   .parts = 1,
                                   .part_cols = {N},
                                   .lora_parts = 1,
                                   .rank = R,
                                   .lora_scale = {1}}};
    pml_linear_args *a = &args.linear;
    double *x = doubles(&a->x), *w = doubles(&wb);
    run_op(PML_OP_linear, &args);
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            double want = 0;
            for (int c = 0; c < K; c++)
                want += x[t * K + c] * w[n * (K + R) + c];
            for (int r = 0; r < R; r++)
                for (int c = 0; c < K; c++)
                    want += x[t * K + c] * *at(&a->a, r, c) * w[n * (K + R) + K + r];
            assert_true(fabs(*at(&a->y, t, n) - want) < 1e-5);
        }
    free(x);
    free(w);
    free(a->a.data);
    free(a->y.data);
    free(xu.data);
    free(wb.data);
}

/* No tokens: nothing is written, gradients stay as they are. */
static void test_no_tokens(void **state)
{
    (void)state;
    pml_op_args args = {.linear_bwd = {.dy = view_new(0, 4, 0, PML_F32),
                                       .x = view_new(0, 3, 0, PML_F32),
                                       .w = random_view(4, 3, 0),
                                       .dx = view_new(0, 3, 0, PML_F32),
                                       .dw = random_view(4, 3, 0),
                                       .parts = 1,
                                       .part_cols = {4}}};
    double *before = doubles(&args.linear_bwd.dw);
    run_op(PML_OP_linear_bwd, &args);
    expect_view("dw", &args.linear_bwd.dw, before, 0);
    free(before);
    free_views(PML_OP_linear_bwd, &args);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_borders_of_each_other),
        cmocka_unit_test(test_no_tokens),
    };
    return run_on_devices(tests);
}
