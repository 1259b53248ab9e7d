/* head_norm and its gradients against float64 loops and finite differences. */
#include "kernels/fixture.h"

typedef struct norm {
    int64_t rows, heads, kv_heads, dim;
    double *x, *weights[2], *dy, *y, eps; /* queries' weight, keys' */
} norm;

static double norm_all(void *context)
{
    norm *p = context;
    int64_t all = p->heads + p->kv_heads;
    double result = 0;
    for (int64_t r = 0; r < p->rows * all; r++) {
        const double *x = p->x + r * p->dim, *weight = p->weights[r % all >= p->heads];
        double square = 0;
        for (int64_t i = 0; i < p->dim; i++)
            square += x[i] * x[i];
        double rstd = 1 / sqrt(square / (double)p->dim + p->eps);
        for (int64_t i = 0; i < p->dim; i++) {
            p->y[r * p->dim + i] = x[i] * rstd * weight[i];
            result += p->y[r * p->dim + i] * p->dy[r * p->dim + i];
        }
    }
    return result;
}

static void check_backward(norm *p, const pml_head_norm_args *f, bool train, bool in_place)
{
    pml_op_args args = {.head_norm_bwd = {.dy = random_view(f->x.rows, f->x.cols, 3),
                                          .x = f->x,
                                          .q_weight = f->q_weight,
                                          .k_weight = f->k_weight,
                                          .rstd = f->rstd,
                                          .heads = f->heads,
                                          .kv_heads = f->kv_heads,
                                          .head_dim = f->head_dim}};
    pml_head_norm_bwd_args *b = &args.head_norm_bwd;
    b->dx = in_place ? b->dy : view_new(f->x.rows, f->x.cols, 1, PML_F32);
    double *starts[2] = {NULL, NULL};
    if (train) {
        b->dq_weight = random_view(1, p->dim, 0);
        b->dk_weight = random_view(1, p->dim, 0);
        starts[0] = doubles(&b->dq_weight);
        starts[1] = doubles(&b->dk_weight);
    }
    p->dy = doubles(&b->dy);
    run_op(PML_OP_head_norm_bwd, &args);
    expect_gradient("dx", &b->dx, NULL, norm_all, p, p->x, 60, 2e-6);
    if (train) {
        expect_gradient("dq", &b->dq_weight, starts[0], norm_all, p, p->weights[0], 60, 2e-6);
        expect_gradient("dk", &b->dk_weight, starts[1], norm_all, p, p->weights[1], 60, 2e-6);
    }
    free(starts[0]);
    free(starts[1]);
    free(p->dy);
    b->x = b->q_weight = b->k_weight = b->rstd = (pml_view){0};
    free_views(PML_OP_head_norm_bwd, &args);
}

static void check_norm(int rows, int heads, int kv_heads, int dim)
{
    int cols = (heads + kv_heads) * dim;
    pml_op_args args = {.head_norm = {.x = random_view(rows, cols, 2),
                                      .q_weight = random_view(1, dim, 0),
                                      .k_weight = random_view(1, dim, 0),
                                      .y = view_new(rows, cols, 1, PML_F32),
                                      .rstd = view_new(rows, heads + kv_heads, 1, PML_F32),
                                      .heads = heads,
                                      .kv_heads = kv_heads,
                                      .head_dim = dim,
                                      .eps = 1e-5F}};
    pml_head_norm_args *f = &args.head_norm;
    norm p = {.rows = rows, .heads = heads, .kv_heads = kv_heads, .dim = dim, .eps = f->eps};
    p.x = doubles(&f->x);
    p.weights[0] = doubles(&f->q_weight);
    p.weights[1] = doubles(&f->k_weight);
    p.y = calloc((size_t)rows * (size_t)cols, sizeof *p.y);
    assert_non_null(p.y);
    run_op(PML_OP_head_norm, &args);
    p.dy = p.x; /* any: only y is wanted */
    norm_all(&p);
    expect_view("y", &f->y, p.y, 2e-6);
    check_backward(&p, f, false, true);
    check_backward(&p, f, true, false);
    check_backward(&p, f, true, true);
    free(p.x);
    free(p.y);
    free(p.weights[0]);
    free(p.weights[1]);
    free_views(PML_OP_head_norm, &args);
}

static void test_head_norm(void **state)
{
    (void)state;
    check_norm(1, 1, 1, 2);
    check_norm(7, 3, 1, 10);
    check_norm(65, 6, 2, 24); /* several blocks of tokens */
    check_norm(515, 2, 2, 16);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_norm),
    };
    return run_on_devices(tests);
}
