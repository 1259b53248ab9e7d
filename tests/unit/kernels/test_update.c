/* The end of a step: sum, sumsq, clip_scale, adamw. */
#include "kernels/fixture.h"

static void check_reduce(int64_t rows, int64_t cols, int64_t border)
{
    pml_op_args args = {
        .sum = {.x = random_view(rows, cols, border), .total = view_new(1, 1, 0, PML_F64)}};
    double *x = doubles(&args.sum.x), *total = args.sum.total.data;
    double sum = 2.5, square = -4; /* added to what is there */
    for (int64_t i = 0; i < rows * cols; i++) {
        sum += x[i];
        square += x[i] * x[i];
    }
    *total = 2.5;
    run_op(PML_OP_sum, &args);
    assert_true(fabs(*total - sum) <= 1e-12 * (double)(rows * cols + 1));
    *total = -4;
    run_op(PML_OP_sumsq, &args); /* the same operands */
    assert_true(fabs(*total - square) <= 1e-12 * (double)(rows * cols + 1));
    free(x);
    free_views(PML_OP_sum, &args);
}

static void test_reductions(void **state)
{
    (void)state;
    check_reduce(1, 1, 0);
    check_reduce(0, 5, 0);
    check_reduce(1, 130, 0);
    check_reduce(7, 33, 5);
    check_reduce(1, 3000001, 0);
    check_reduce(9001, 3, 1);
}

/* What float32 squares cannot hold: the sum is made in float64. */
static void test_sumsq_of_large_numbers(void **state)
{
    (void)state;
    pml_op_args args = {
        .sumsq = {.x = view_new(1, 10, 0, PML_F32), .total = view_new(1, 1, 0, PML_F64)}};
    for (int i = 0; i < 10; i++)
        *at(&args.sumsq.x, 0, i) = 1e30F;
    *(double *)args.sumsq.total.data = 0;
    run_op(PML_OP_sumsq, &args);
    double want = 10 * (double)1e30F * (double)1e30F;
    assert_true(fabs(*(double *)args.sumsq.total.data - want) <= 1e-14 * want);
    free_views(PML_OP_sumsq, &args);
}

static void check_clip(double sumsq, double mean, double limit, double scale, double norm)
{
    pml_op_args args = {.clip_scale = {.sumsq = view_new(1, 1, 0, PML_F64),
                                       .hyper = random_view(3, PML_HYPER_COUNT, 2),
                                       .norm = view_new(1, 1, 0, PML_F32)}};
    pml_clip_scale_args *a = &args.clip_scale;
    *(double *)a->sumsq.data = sumsq;
    *at(&a->hyper, 0, PML_HYPER_MEAN) = (float)mean;
    *at(&a->hyper, 0, PML_HYPER_MAX_NORM) = (float)limit;
    double *want = doubles(&a->hyper);
    for (int g = 0; g < 3; g++)
        want[g * PML_HYPER_COUNT + PML_HYPER_GRAD_SCALE] = scale;
    run_op(PML_OP_clip_scale, &args);
    expect_view("hyper", &a->hyper, want, 1e-7);
    expect_view("norm", &a->norm, &norm, 1e-7);
    free(a->norm.data);
    a->norm = (pml_view){0};
    run_op(PML_OP_clip_scale, &args); /* the norm need not be wanted */
    free(want);
    free_views(PML_OP_clip_scale, &args);
}

static void test_clip_scale(void **state)
{
    (void)state;
    check_clip(100, 0.5, 1, 0.5 * (1 / (5 + 1e-6)), 5);
    check_clip(100, 0.5, 10, 0.5, 5);
    check_clip(100, 0.5, 0, 0.5, 5); /* no limit */
    check_clip(100, 0.5, -1, 0.5, 5);
    check_clip(0, 0.25, 1, 0.25, 0);
}

/* A norm or a loss that is not finite must not pass as one: nothing is to be updated. */
static void check_unsound(double sumsq, double loss, float norm)
{
    pml_op_args args = {.clip_scale = {.sumsq = view_new(1, 1, 0, PML_F64),
                                       .hyper = random_view(2, PML_HYPER_COUNT, 0),
                                       .norm = view_new(1, 1, 0, PML_F32),
                                       .loss = view_new(1, 1, 0, PML_F64)}};
    pml_clip_scale_args *a = &args.clip_scale;
    *(double *)a->sumsq.data = sumsq;
    *(double *)a->loss.data = loss;
    *at(&a->hyper, 0, PML_HYPER_MEAN) = 0.5F;
    *at(&a->hyper, 0, PML_HYPER_MAX_NORM) = 1;
    run_op(PML_OP_clip_scale, &args);
    assert_true(isnan(*at(&a->hyper, 0, PML_HYPER_GRAD_SCALE)));
    assert_true(isnan(*at(&a->hyper, 1, PML_HYPER_GRAD_SCALE)));
    float got = *at(&a->norm, 0, 0);
    assert_true(isnan(norm) ? isnan(got) : got == norm);
    free_views(PML_OP_clip_scale, &args);
}

static void test_clip_scale_of_what_is_not_finite(void **state)
{
    (void)state;
    check_unsound(NAN, 1, NAN);
    check_unsound(INFINITY, 1, INFINITY);
    check_unsound(1e300, 1, INFINITY); /* as float32, which is what is told */
    check_unsound(4, NAN, 1);
    check_unsound(4, -INFINITY, 1);
}

/* What clip_scale says no to, each update leaves as it is, the copy too. */
static void test_skipped_updates(void **state)
{
    (void)state;
    enum { N = 300 };
    static const pml_op ops[] = {PML_OP_adamw, PML_OP_sgd, PML_OP_adamw_8bit};
    for (int i = 0; i < 3; i++) {
        pml_view v[4], copy = view_new(1, N, 0, PML_BF16);
        pml_view hyper = random_view(1, PML_HYPER_COUNT, 0);
        *at(&hyper, 0, PML_HYPER_GRAD_SCALE) = NAN;
        for (int k = 0; k < 4; k++)
            v[k] = random_view(1, N, 0);
        pml_op_args args = {.adamw = {v[0], v[1], v[2], v[3], hyper, copy}};
        if (ops[i] == PML_OP_sgd)
            args.sgd = (pml_sgd_args){v[0], v[1], v[2], hyper, copy, 0};
        if (ops[i] == PML_OP_adamw_8bit) {
            pml_view codes[2] = {pml_vector(v[2].data, N, PML_U8),
                                 pml_vector(v[3].data, N, PML_U8)};
            pml_view largest[2] = {pml_vector((float *)v[2].data + N - 2, 2, PML_F32),
                                   pml_vector((float *)v[3].data + N - 2, 2, PML_F32)};
            args.adamw_8bit = (pml_adamw_8bit_args){v[0],       v[1],       codes[0], codes[1],
                                                    largest[0], largest[1], hyper,    copy};
        }
        float before[4][N];
        for (int k = 0; k < 4; k++)
            memcpy(before[k], v[k].data, sizeof before[k]);
        run_op(ops[i], &args);
        for (int k = 0; k < 4; k++)
            assert_memory_equal(before[k], v[k].data, sizeof before[k]);
        for (int k = 0; k < 2 * N; k++)
            assert_int_equal(((unsigned char *)copy.data)[k], 0xFF); /* as run_op leaves it */
        *at(&hyper, 0, PML_HYPER_GRAD_SCALE) = 1;                    /* and would not have, else */
        *at(&hyper, 0, PML_HYPER_LR) = 0.1F;
        run_op(ops[i], &args);
        assert_memory_not_equal(before[0], v[0].data, sizeof before[0]);
        for (int k = 0; k < 4; k++)
            free(v[k].data);
        free(hyper.data);
        free(copy.data);
    }
}

static void check_adamw(int64_t n, pml_dtype copy)
{
    pml_op_args args = {.adamw = {.p = random_view(1, n, 0),
                                  .g = random_view(1, n, 0),
                                  .m = random_view(1, n, 0),
                                  .v = random_view(1, n, 0),
                                  .hyper = view_new(1, PML_HYPER_COUNT, 0, PML_F32)}};
    pml_adamw_args *a = &args.adamw;
    if (copy != PML_DTYPE_COUNT)
        a->copy = view_new(1, n, 0, copy);
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.1, scale = 0.3;
    const double bias1 = 1 - pow(beta1, 3), bias2 = 1 - pow(beta2, 3);
    float hyper[PML_HYPER_COUNT] = {[PML_HYPER_LR] = (float)lr,
                                    [PML_HYPER_ONE_MINUS_BETA1] = (float)(1 - beta1),
                                    [PML_HYPER_ONE_MINUS_BETA2] = (float)(1 - beta2),
                                    [PML_HYPER_EPS] = (float)eps,
                                    [PML_HYPER_WEIGHT_DECAY] = (float)decay,
                                    [PML_HYPER_BIAS1] = (float)bias1,
                                    [PML_HYPER_BIAS2] = (float)bias2,
                                    [PML_HYPER_GRAD_SCALE] = (float)scale};
    memcpy(a->hyper.data, hyper, sizeof hyper);
    for (int64_t i = 0; i < n; i++)
        *at(&a->v, 0, i) = fabsf(*at(&a->v, 0, i));
    if (n > 2)
        *at(&a->v, 0, 2) = *at(&a->g, 0, 2) = *at(&a->m, 0, 2) = 0; /* eps alone divides */
    if (n > 3)
        *at(&a->v, 0, 3) = *at(&a->m, 0, 3) = 0; /* as in the first step */
    double *p = doubles(&a->p), *g = doubles(&a->g), *m = doubles(&a->m), *v = doubles(&a->v);
    for (int64_t i = 0; i < n; i++) {
        double grad = g[i] * scale;
        m[i] = beta1 * m[i] + (1 - beta1) * grad;
        v[i] = beta2 * v[i] + (1 - beta2) * grad * grad;
        p[i] = p[i] * (1 - lr * decay) - lr * (m[i] / bias1) / (sqrt(v[i] / bias2) + eps);
    }
    run_op(PML_OP_adamw, &args);
    expect_view("p", &a->p, p, 5e-7);
    expect_view("m", &a->m, m, 5e-7);
    expect_view("v", &a->v, v, 5e-7);
    /* 1 - beta is small beside 1: it must not have been made from beta in float. */
    if (n > 3)
        assert_true(fabs(*at(&a->v, 0, 3) - v[3]) <= 5e-7 * v[3]);
    for (int64_t i = 0; i < n; i++) {
        float value = *at(&a->p, 0, i), got = value;
        if (copy == PML_F32)
            got = *at(&a->copy, 0, i);
        if (copy == PML_BF16) {
            uint32_t bits = (uint32_t)((uint16_t *)a->copy.data)[i] << 16;
            memcpy(&got, &bits, sizeof got);
        }
        assert_true(fabsf(got - value) <= (copy == PML_BF16 ? 0x1p-8F * fabsf(value) : 0));
    }
    free(p);
    free(g);
    free(m);
    free(v);
    free_views(PML_OP_adamw, &args);
}

static void test_adamw(void **state)
{
    (void)state;
    check_adamw(1, PML_DTYPE_COUNT);
    check_adamw(7, PML_F32);
    check_adamw(130, PML_BF16);
    check_adamw(50001, PML_DTYPE_COUNT);
}

/* torch.optim.SGD in float64. */
static void check_sgd(int64_t n, bool momentum, bool nesterov, bool first, pml_dtype copy)
{
    pml_op_args args = {.sgd = {.p = random_view(1, n, 0),
                                .g = random_view(1, n, 0),
                                .hyper = view_new(1, PML_HYPER_COUNT, 0, PML_F32),
                                .nesterov = nesterov}};
    pml_sgd_args *a = &args.sgd;
    if (momentum)
        a->m = random_view(1, n, 0);
    if (copy != PML_DTYPE_COUNT)
        a->copy = view_new(1, n, 0, copy);
    const double lr = 1e-2, mu = 0.9, dampening = first ? 0 : 0.2, decay = 0.1, scale = 0.3;
    float hyper[PML_HYPER_COUNT] = {[PML_HYPER_LR] = (float)lr,
                                    [PML_HYPER_WEIGHT_DECAY] = (float)decay,
                                    [PML_HYPER_MOMENTUM] = (float)mu,
                                    [PML_HYPER_NEW_GRAD] = (float)(1 - dampening),
                                    [PML_HYPER_GRAD_SCALE] = (float)scale};
    memcpy(a->hyper.data, hyper, sizeof hyper);
    for (int64_t i = 0; first && momentum && i < n; i++)
        *at(&a->m, 0, i) = 0;
    double *p = doubles(&a->p), *g = doubles(&a->g), *m = momentum ? doubles(&a->m) : NULL;
    for (int64_t i = 0; i < n; i++) {
        double grad = g[i] * scale + decay * p[i];
        if (momentum) {
            m[i] = mu * m[i] + (1 - dampening) * grad;
            grad = nesterov ? grad + mu * m[i] : m[i];
        }
        p[i] -= lr * grad;
    }
    run_op(PML_OP_sgd, &args);
    expect_view("p", &a->p, p, 5e-7);
    if (momentum)
        expect_view("m", &a->m, m, 5e-7);
    for (int64_t i = 0; copy == PML_F32 && i < n; i++)
        assert_true(*at(&a->copy, 0, i) == *at(&a->p, 0, i));
    free(p);
    free(g);
    free(m);
    free_views(PML_OP_sgd, &args);
}

static void test_sgd(void **state)
{
    (void)state;
    check_sgd(1, false, false, true, PML_DTYPE_COUNT);
    check_sgd(33, true, false, true, PML_F32);
    check_sgd(130, true, true, true, PML_DTYPE_COUNT);
    check_sgd(50001, true, false, false, PML_F32);
    check_sgd(40001, true, true, false, PML_DTYPE_COUNT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reductions),
        cmocka_unit_test(test_sumsq_of_large_numbers),
        cmocka_unit_test(test_clip_scale),
        cmocka_unit_test(test_clip_scale_of_what_is_not_finite),
        cmocka_unit_test(test_skipped_updates),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_sgd),
    };
    return run_on_devices(tests);
}
