/* head_loss against log-softmax in float64, and its slopes. */
#include "kernels/fixture.h"

typedef struct head {
    int64_t tokens, hidden, vocab, labels;
    const int32_t *rows, *label;
    double *x, *w, scale;
    double *loss;
} head;

static double head_all(void *context)
{
    head *p = context;
    double total = 0;
    double *logits = must_alloc((size_t)p->vocab * sizeof *logits);
    for (int64_t r = 0; r < p->labels; r++) {
        double sum = 0, loss = 0;
        if (p->rows[r] >= 0) {
            for (int64_t v = 0; v < p->vocab; v++) {
                logits[v] = 0;
                for (int64_t c = 0; c < p->hidden; c++)
                    logits[v] += p->x[p->rows[r] * p->hidden + c] * p->w[v * p->hidden + c];
                sum += exp(logits[v]);
            }
            loss = log(sum) - logits[p->label[r]];
        }
        if (p->loss != NULL)
            p->loss[r] = loss;
        total += p->scale * loss;
    }
    free(logits);
    return total;
}

typedef struct shape {
    int64_t tokens, hidden, vocab, labels;
    int chunk, border;
    bool empty_slots, scaled;
} shape;

static void check_head(const shape *s)
{
    pml_op_args args = {.head_loss = {.x = random_view(s->tokens, s->hidden, s->border),
                                      .w = random_view(s->vocab, s->hidden, s->border),
                                      .rows = view_new(1, s->labels, 0, PML_I32),
                                      .labels = view_new(1, s->labels, 0, PML_I32),
                                      .loss = view_new(1, s->labels, 0, PML_F32),
                                      .chunk = s->chunk}};
    pml_head_loss_args *a = &args.head_loss;
    int32_t *rows = a->rows.data, *labels = a->labels.data;
    for (int64_t r = 0; r < s->labels; r++) { /* distinct, neither ascending nor all tokens */
        rows[r] = (int32_t)((r * 3 + 2) % s->tokens);
        labels[r] = (int32_t)(random_bits() % (uint64_t)s->vocab);
        if (s->empty_slots && r % 3 == 1)
            rows[r] = -1;
    }
    head p = {s->tokens,
              s->hidden,
              s->vocab,
              s->labels,
              rows,
              labels,
              doubles(&a->x),
              doubles(&a->w),
              1,
              must_alloc((size_t)s->labels * sizeof(double))};
    if (s->scaled) {
        a->scale = view_new(1, 1, 0, PML_F32);
        p.scale = *at(&a->scale, 0, 0) = 0.125F;
    }
    head_all(&p);
    run_op(PML_OP_head_loss, &args); /* evaluation: losses alone */
    expect_view("loss", &a->loss, p.loss, 1e-6);

    a->dx = view_new(s->tokens, s->hidden, s->border, PML_F32);
    run_op(PML_OP_head_loss, &args); /* a frozen head */
    expect_view("loss", &a->loss, p.loss, 1e-6);
    free(p.loss);
    p.loss = NULL;
    expect_gradient("dx", &a->dx, NULL, head_all, &p, p.x, 60, 2e-6);
    for (int64_t t = 0; t < s->tokens; t++) {
        bool labelled = false;
        for (int64_t r = 0; r < s->labels; r++)
            labelled |= rows[r] == t;
        for (int64_t c = 0; !labelled && c < s->hidden; c++)
            assert_true(*at(&a->dx, t, c) == 0);
    }

    a->dw = random_view(s->vocab, s->hidden, s->border);
    double *start = doubles(&a->dw);
    run_op(PML_OP_head_loss, &args);
    expect_gradient("dw", &a->dw, start, head_all, &p, p.w, 60, 2e-6);
    expect_gradient("dx", &a->dx, NULL, head_all, &p, p.x, 20, 2e-6);
    free(start);
    free(p.x);
    free(p.w);
    free_views(PML_OP_head_loss, &args);
}

static void test_shapes(void **state)
{
    (void)state;
    static const shape shapes[] = {
        {1, 5, 3, 1, 1, 0, false, false},        {7, 16, 40, 7, 3, 1, false, true},
        {130, 8, 51, 100, 32, 0, false, false},  {130, 8, 51, 100, 32, 2, true, true},
        {130, 8, 51, 101, 1000, 0, true, false}, {20, 12, 300, 6, 2, 3, true, false},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_head(&shapes[i]);
}

static void test_nothing_labelled(void **state)
{
    (void)state;
    pml_op_args args = {.head_loss = {.x = random_view(4, 3, 0),
                                      .w = random_view(5, 3, 0),
                                      .rows = view_new(1, 3, 0, PML_I32),
                                      .labels = view_new(1, 3, 0, PML_I32),
                                      .loss = view_new(1, 3, 0, PML_F32),
                                      .dx = view_new(4, 3, 0, PML_F32),
                                      .chunk = 2}};
    pml_head_loss_args *a = &args.head_loss;
    memset(a->rows.data, 0xFF, span_bytes(&a->rows)); /* -1: every slot empty */
    memset(a->labels.data, 0, span_bytes(&a->labels));
    double zeros[12] = {0};
    run_op(PML_OP_head_loss, &args);
    expect_view("loss", &a->loss, zeros, 0);
    expect_view("dx", &a->dx, zeros, 0);
    a->rows.cols = a->labels.cols = a->loss.cols = 0; /* and no slot at all */
    run_op(PML_OP_head_loss, &args);
    expect_view("dx", &a->dx, zeros, 0);
    free_views(PML_OP_head_loss, &args);
}

/* Logits of hundreds: the loss is exact, the gradient finite. */
static void test_large_logits(void **state)
{
    (void)state;
    pml_op_args args = {.head_loss = {.x = view_new(2, 1, 0, PML_F32),
                                      .w = view_new(3, 1, 0, PML_F32),
                                      .rows = int_view(2, (int32_t[]){0, 1}),
                                      .labels = int_view(2, (int32_t[]){0, 2}),
                                      .loss = view_new(1, 2, 0, PML_F32),
                                      .dx = view_new(2, 1, 0, PML_F32),
                                      .chunk = 2}};
    pml_head_loss_args *a = &args.head_loss;
    *at(&a->x, 0, 0) = 1000;
    *at(&a->x, 1, 0) = 1000;
    for (int v = 0; v < 3; v++)
        *at(&a->w, v, 0) = (float)v;
    run_op(PML_OP_head_loss, &args);
    assert_true(*at(&a->loss, 0, 0) == 2000 && *at(&a->loss, 0, 1) == 0);
    assert_true(*at(&a->dx, 0, 0) == 2 && *at(&a->dx, 1, 0) == 0);
    *at(&a->x, 1, 0) = NAN; /* a damaged row shows in its own loss only */
    run_op(PML_OP_head_loss, &args);
    assert_true(*at(&a->loss, 0, 0) == 2000 && isnan(*at(&a->loss, 0, 1)));
    free_views(PML_OP_head_loss, &args);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_nothing_labelled),
        cmocka_unit_test(test_large_logits),
    };
    return run_on_devices(tests);
}
