/* The ops of a layer that work row by row: embed, rmsnorm, rope, swiglu, forward and backward. */
#include "kernels/fixture.h"

static const int token_counts[] = {1, 7, 130};
enum { N_COUNTS = sizeof token_counts / sizeof *token_counts };

static void test_embed(void **state)
{
    (void)state;
    for (int n = 0; n < N_COUNTS; n++) {
        int tokens = token_counts[n];
        pml_op_args args = {.embed = {.ids = view_new(1, tokens, 0, PML_I32),
                                      .table = random_view(11, 83, 2),
                                      .y = view_new(tokens, 83, 3, PML_F32)}};
        pml_op_args back = {.embed_bwd = {.ids = args.embed.ids,
                                          .dy = random_view(tokens, 83, 1),
                                          .dtable = random_view(11, 83, 5)}};
        pml_embed_args *f = &args.embed;
        pml_embed_bwd_args *b = &back.embed_bwd;
        int32_t *ids = f->ids.data;
        for (int t = 0; t < tokens; t++)
            ids[t] = (int32_t)(random_bits() % 11);
        double *want = doubles(&b->dtable);
        run_op(PML_OP_embed, &args);
        run_op(PML_OP_embed_bwd, &back);
        for (int t = 0; t < tokens; t++)
            for (int c = 0; c < 83; c++) {
                assert_true(*at(&f->y, t, c) == *at(&f->table, ids[t], c));
                want[ids[t] * 83 + c] += *at(&b->dy, t, c);
            }
        expect_view("dtable", &b->dtable, want, 1e-6);
        free(want);
        f->ids.data = NULL;
        free_views(PML_OP_embed, &args);
        free_views(PML_OP_embed_bwd, &back);
    }
}

typedef struct norm {
    int64_t rows, cols;
    double *x, *weight, *dy, *dres, eps;
    double *y, *rstd;
} norm;

/* sum y * dy + sum x * dres: the residual stream goes on beside the norm. */
static double norm_all(void *context)
{
    norm *p = context;
    double result = 0;
    for (int64_t t = 0; t < p->rows; t++) {
        double square = 0;
        for (int64_t c = 0; c < p->cols; c++)
            square += p->x[t * p->cols + c] * p->x[t * p->cols + c];
        double rstd = 1 / sqrt(square / (double)p->cols + p->eps);
        if (p->rstd != NULL)
            p->rstd[t] = rstd;
        for (int64_t c = 0; c < p->cols; c++) {
            int64_t i = t * p->cols + c;
            double y = p->x[i] * rstd * p->weight[c];
            if (p->y != NULL)
                p->y[i] = y;
            result += y * p->dy[i] + (p->dres != NULL ? p->x[i] * p->dres[i] : 0);
        }
    }
    return result;
}

/* The backward, from x (the forward's sum): fresh gradients, then in place on dres or on dy. */
static void check_norm_backward(norm *p, const pml_view *x, const pml_view *weight,
                                const pml_view *rstd, bool residual, bool train_weight, bool on_dy,
                                bool on_dres)
{
    pml_op_args args = {
        .rmsnorm_bwd = {
            .dy = random_view(p->rows, p->cols, 2), .x = *x, .weight = *weight, .rstd = *rstd}};
    pml_rmsnorm_bwd_args *b = &args.rmsnorm_bwd;
    if (residual)
        b->dres = random_view(p->rows, p->cols, 1);
    if (train_weight)
        b->dweight = random_view(1, p->cols, 0);
    b->dx = on_dy ? b->dy : on_dres ? b->dres : view_new(p->rows, p->cols, 4, PML_F32);
    if (!on_dy)
        b->rounded = on_dres ? b->dy : view_new(p->rows, p->cols, 3, PML_F32);
    p->dy = doubles(&b->dy);
    p->dres = residual ? doubles(&b->dres) : NULL;
    double *start = train_weight ? doubles(&b->dweight) : NULL;
    run_op(PML_OP_rmsnorm_bwd, &args);
    expect_gradient("dx", &b->dx, NULL, norm_all, p, p->x, 60, 2e-6);
    for (int64_t r = 0; b->rounded.data != NULL && r < p->rows; r++)
        assert_memory_equal(at(&b->rounded, r, 0), at(&b->dx, r, 0),
                            (size_t)p->cols * sizeof(float));
    if (train_weight)
        expect_gradient("dweight", &b->dweight, start, norm_all, p, p->weight, 60, 2e-6);
    free(start);
    free(p->dy);
    free(p->dres);
    b->x = b->weight = b->rstd = (pml_view){0};
    free_views(PML_OP_rmsnorm_bwd, &args);
}

static void check_norm(int64_t rows, int64_t cols, bool add, bool sum_on_x)
{
    pml_op_args args = {.rmsnorm = {.x = random_view(rows, cols, 1),
                                    .weight = random_view(1, cols, 0),
                                    .y = view_new(rows, cols, 2, PML_F32),
                                    .rstd = view_new(1, rows, 0, PML_F32),
                                    .eps = 1e-5F}};
    pml_rmsnorm_args *f = &args.rmsnorm;
    norm p = {.rows = rows, .cols = cols, .weight = doubles(&f->weight), .eps = f->eps};
    p.x = doubles(&f->x);
    if (add) {
        f->add = random_view(rows, cols, 3);
        for (int64_t i = 0; i < rows * cols; i++) /* exact: both have 20 bits */
            p.x[i] += *at(&f->add, i / cols, i % cols);
        f->sum = sum_on_x ? f->x : view_new(rows, cols, 5, PML_F32);
    }
    run_op(PML_OP_rmsnorm, &args);
    p.y = malloc((size_t)(rows * cols) * sizeof *p.y);
    p.rstd = malloc((size_t)rows * sizeof *p.rstd);
    p.dy = p.x; /* any: only y is looked at */
    norm_all(&p);
    if (add)
        expect_view("sum", &f->sum, p.x, 0);
    expect_view("y", &f->y, p.y, 1e-6);
    expect_view("rstd", &f->rstd, p.rstd, 1e-6);
    free(p.y);
    free(p.rstd);
    p.y = p.rstd = NULL;
    const pml_view *x = add ? &f->sum : &f->x;
    check_norm_backward(&p, x, &f->weight, &f->rstd, false, true, false, false);
    check_norm_backward(&p, x, &f->weight, &f->rstd, true, true, false, false);
    check_norm_backward(&p, x, &f->weight, &f->rstd, true, true, true, false);
    check_norm_backward(&p, x, &f->weight, &f->rstd, true, false, false, true);
    free(p.x);
    free(p.weight);
    free_views(PML_OP_rmsnorm, &args);
}

static void test_rmsnorm(void **state)
{
    (void)state;
    for (int n = 0; n < N_COUNTS; n++) {
        check_norm(token_counts[n], 19, false, false);
        check_norm(token_counts[n], 64, true, false);
        check_norm(token_counts[n], 131, true, true);
    }
    check_norm(700, 8, true,
               false); /* more rows than the partial sums of dweight take one by one */
}

/* Rows of nothing but zeros: eps decides, nothing is divided by zero. */
static void test_rmsnorm_of_zeros(void **state)
{
    (void)state;
    pml_op_args args = {.rmsnorm = {.x = view_new(2, 8, 0, PML_F32),
                                    .weight = random_view(1, 8, 0),
                                    .y = view_new(2, 8, 0, PML_F32),
                                    .rstd = view_new(1, 2, 0, PML_F32),
                                    .eps = 0.25F}};
    memset(args.rmsnorm.x.data, 0, span_bytes(&args.rmsnorm.x));
    run_op(PML_OP_rmsnorm, &args);
    assert_true(*at(&args.rmsnorm.rstd, 0, 1) == 2.0F);
    assert_true(*at(&args.rmsnorm.y, 1, 7) == 0.0F);
    free_views(PML_OP_rmsnorm, &args);
}

static void check_rope(int64_t tokens, int heads, int dim)
{
    int64_t cols = (int64_t)heads * dim;
    pml_op_args args = {.rope = {.x = random_view(tokens, cols, 6),
                                 .pos = view_new(1, tokens, 0, PML_I32),
                                 .table = random_view(50, dim, 3),
                                 .heads = heads,
                                 .head_dim = dim}};
    pml_rope_args *a = &args.rope;
    for (int64_t t = 0; t < tokens; t++)
        ((int32_t *)a->pos.data)[t] = (int32_t)(random_bits() % 50);
    for (int inverse = 0; inverse < 2; inverse++) {
        double *x = doubles(&a->x), *want = doubles(&a->x);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < heads; h++)
                for (int i = 0; i < dim / 2; i++) {
                    int32_t pos = ((int32_t *)a->pos.data)[t];
                    double c = *at(&a->table, pos, i), s = *at(&a->table, pos, dim / 2 + i);
                    int64_t low = t * cols + h * dim + i, high = low + dim / 2;
                    s = inverse ? -s : s;
                    want[low] = x[low] * c - x[high] * s;
                    want[high] = x[high] * c + x[low] * s;
                }
        a->inverse = inverse;
        run_op(PML_OP_rope, &args);
        expect_view("x", &a->x, want, 1e-6);
        free(x);
        free(want);
    }
    free_views(PML_OP_rope, &args);
}

static void test_rope(void **state)
{
    (void)state;
    for (int n = 0; n < N_COUNTS; n++) {
        check_rope(token_counts[n], 1, 2);
        check_rope(token_counts[n], 3, 24);
        check_rope(token_counts[n], 5, 64);
    }
}

typedef struct glu {
    int64_t rows, cols;
    double *gate_up, *dh, *h;
} glu;

static double glu_all(void *context)
{
    glu *p = context;
    double result = 0;
    for (int64_t i = 0; i < p->rows * p->cols; i++) {
        const double *gate = p->gate_up + i / p->cols * 2 * p->cols + i % p->cols;
        double h = *gate / (1 + exp(-*gate)) * gate[p->cols];
        if (p->h != NULL)
            p->h[i] = h;
        result += h * p->dh[i];
    }
    return result;
}

/* The backward's h is the forward's to the bit, also where it overwrites dh. */
static void check_swiglu(int64_t rows, int64_t cols, bool in_place)
{
    pml_op_args args = {.swiglu = {.gate_up = random_view(rows, 2 * cols, 3),
                                   .h = view_new(rows, cols, 1, PML_F32)}};
    pml_swiglu_args *f = &args.swiglu;
    for (size_t i = 0; i < span_bytes(&f->gate_up) / sizeof(float); i++)
        ((float *)f->gate_up.data)[i] *= 6;
    pml_op_args back = {.swiglu_bwd = {.dh = random_view(rows, cols, 2), .gate_up = f->gate_up}};
    pml_swiglu_bwd_args *b = &back.swiglu_bwd;
    b->dgate_up = in_place ? f->gate_up : view_new(rows, 2 * cols, 1, PML_F32);
    b->h = in_place ? b->dh : view_new(rows, cols, 4, PML_F32);
    glu p = {rows, cols, doubles(&f->gate_up), doubles(&b->dh), NULL};
    run_op(PML_OP_swiglu, &args);
    p.h = malloc((size_t)(rows * cols) * sizeof *p.h);
    glu_all(&p);
    expect_view("h", &f->h, p.h, 1e-6);
    free(p.h);
    p.h = NULL;
    run_op(PML_OP_swiglu_bwd, &back);
    expect_gradient("dgate_up", &b->dgate_up, NULL, glu_all, &p, p.gate_up, 80, 1e-6);
    for (int64_t t = 0; t < rows; t++)
        assert_memory_equal((float *)b->h.data + t * b->h.ld, (float *)f->h.data + t * f->h.ld,
                            (size_t)cols * sizeof(float));
    free(p.gate_up);
    free(p.dh);
    f->gate_up.data = NULL;
    if (in_place)
        b->h.data = NULL;
    free_views(PML_OP_swiglu, &args);
    free_views(PML_OP_swiglu_bwd, &back);
}

static void test_swiglu(void **state)
{
    (void)state;
    for (int n = 0; n < N_COUNTS; n++) {
        check_swiglu(token_counts[n], 5, false);
        check_swiglu(token_counts[n], 33, true);
        check_swiglu(token_counts[n], 176, false);
    }
}

/* silu's exp, seen through h with up = 1: accurate over all floats, silent at the ends. */
static void test_silu_everywhere(void **state)
{
    (void)state;
    enum { N = 4000 };
    pml_op_args args = {
        .swiglu = {.gate_up = view_new(1, 2 * N, 0, PML_F32), .h = view_new(1, N, 0, PML_F32)}};
    float *gate = args.swiglu.gate_up.data, *h = args.swiglu.h.data;
    for (int i = 0; i < N; i++) {
        gate[i] = (float)(i - N / 2) * 0.043F;
        gate[N + i] = 1;
    }
    gate[0] = INFINITY;
    gate[1] = -1e30F;
    gate[2] = 1e30F;
    gate[3] = NAN;
    run_op(PML_OP_swiglu, &args);
    for (int i = 4; i < N; i++) {
        double want = gate[i] / (1 + exp(-(double)gate[i]));
        if (!(fabs(h[i] - want) <= 3.5e-7 * fabs(want) + 1e-36))
            fail_msg("silu(%.9g) is %.9g, must be %.9g", gate[i], h[i], want);
    }
    assert_true(h[0] == INFINITY && h[1] == 0 && h[2] == 1e30F && isnan(h[3]));
    free_views(PML_OP_swiglu, &args);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_rmsnorm_of_zeros),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_silu_everywhere),
    };
    return run_on_devices(tests);
}
