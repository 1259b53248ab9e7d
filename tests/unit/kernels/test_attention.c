/* attention and attention_bwd against a float64 loop over all pairs, and its slopes. */
#include "kernels/fixture.h"

typedef struct shape {
    int heads, kv_heads, head_dim, window;
    int documents;
    int queries[6], keys[6]; /* of each document */
    int behind;              /* rows behind the last document */
    int border;
} shape;

typedef struct problem {
    const shape *s;
    int32_t cu_q[7], cu_k[7];
    double *q, *k, *v, *dout;
    double *o, *lse; /* outputs of the float64 forward, when asked for */
    double scale;
} problem;

static int64_t rows_q(const problem *p)
{
    return p->cu_q[p->s->documents] + p->s->behind;
}

static int64_t rows_k(const problem *p)
{
    return p->cu_k[p->s->documents] + p->s->behind;
}

/* One query: its scores over the keys it sees, softmax, weighted values. Returns sum o * dout. */
UNWATCHED static double attend_one(const problem *p, int d, int head, int row)
{
    const shape *s = p->s;
    int dim = s->head_dim, kv = head / (s->heads / s->kv_heads);
    int shift = (p->cu_k[d + 1] - p->cu_k[d]) - (p->cu_q[d + 1] - p->cu_q[d]);
    int i = row - p->cu_q[d] + shift;
    double score[1100], top = -INFINITY, sum = 0, result = 0;
    const double *q = p->q + ((int64_t)row * s->heads + head) * dim;
    int first = s->window > 0 && i - s->window + 1 > 0 ? i - s->window + 1 : 0, count = 0;
    for (int j = first; j <= i; j++, count++) {
        const double *k = p->k + ((int64_t)(p->cu_k[d] + j) * s->kv_heads + kv) * dim;
        score[count] = 0;
        for (int c = 0; c < dim; c++)
            score[count] += p->scale * q[c] * k[c];
        top = fmax(top, score[count]);
    }
    for (int j = 0; j < count; j++)
        sum += exp(score[j] - top);
    for (int c = 0; c < dim; c++) {
        double o = 0;
        for (int j = 0; j < count; j++)
            o += exp(score[j] - top) / sum *
                 p->v[((int64_t)(p->cu_k[d] + first + j) * s->kv_heads + kv) * dim + c];
        int64_t at_o = ((int64_t)row * s->heads + head) * dim + c;
        if (p->o != NULL)
            p->o[at_o] = o;
        result += o * p->dout[at_o];
    }
    if (p->lse != NULL)
        p->lse[head * rows_q(p) + row] = count > 0 ? top + log(sum) : 0;
    return result;
}

static double attend_all(void *context)
{
    const problem *p = context;
    double result = 0;
    for (int d = 0; d < p->s->documents; d++)
        for (int row = p->cu_q[d]; row < p->cu_q[d + 1]; row++)
            for (int head = 0; head < p->s->heads; head++)
                result += attend_one(p, d, head, row);
    return result;
}

/* Of numbers, not of bits: rope gives the zeros behind documents signs. */
static void expect_same(const char *what, const pml_view *got, const pml_view *want)
{
    for (int64_t r = 0; r < want->rows; r++)
        for (int64_t c = 0; c < want->cols; c++)
            if (*at(got, r, c) != *at(want, r, c))
                fail_msg("%s[%lld,%lld] is %.9g, by rope %.9g", what, (long long)r, (long long)c,
                         *at(got, r, c), *at(want, r, c));
}

/* With positions the op leaves what rope's inverse makes of its own dq and dk, and the same dv.
 * Each document counts from 0, every second one from 5. Takes the plain results apart. */
static void check_turned(const problem *p, const pml_attention_bwd_args *plain)
{
    const shape *s = p->s;
    int64_t rows = plain->q.rows;
    pml_op_args turned = {.attention_bwd = *plain};
    pml_attention_bwd_args *t = &turned.attention_bwd;
    t->pos = view_new(1, rows, 0, PML_I32);
    int32_t *pos = t->pos.data;
    for (int64_t row = 0, d = 0; row < rows; row++) {
        while (d < s->documents && row >= p->cu_q[d + 1])
            d++;
        pos[row] = d < s->documents ? (int32_t)(row - p->cu_q[d] + d % 2 * 5) : 2;
    }
    t->table = random_view(rows + 5, s->head_dim, s->border);
    t->dq = view_new(rows, plain->dq.cols, s->border, PML_F32);
    t->dk = view_new(rows, plain->dk.cols, s->border, PML_F32);
    t->dv = view_new(rows, plain->dv.cols, s->border, PML_F32);
    run_op(PML_OP_attention_bwd, &turned);
    const pml_view *const ours[] = {&t->dq, &t->dk}, *const theirs[] = {&plain->dq, &plain->dk};
    for (int i = 0; i < 2; i++) {
        pml_op_args rope = {.rope = {.x = *theirs[i],
                                     .pos = t->pos,
                                     .table = t->table,
                                     .heads = i == 0 ? s->heads : s->kv_heads,
                                     .head_dim = s->head_dim,
                                     .inverse = 1}};
        run_op(PML_OP_rope, &rope);
        expect_same(i == 0 ? "dq" : "dk", ours[i], theirs[i]);
    }
    expect_same("dv", &t->dv, &plain->dv);
    free(t->pos.data);
    free(t->table.data);
    free(t->dq.data);
    free(t->dk.data);
    free(t->dv.data);
}

static void check_shape(const shape *s)
{
    problem p = {.s = s, .scale = 1.0 / sqrt(s->head_dim) * 1.5};
    int longest = 0;
    for (int d = 0; d < s->documents; d++) {
        p.cu_q[d + 1] = p.cu_q[d] + s->queries[d];
        p.cu_k[d + 1] = p.cu_k[d] + s->keys[d];
        longest = s->queries[d] > longest ? s->queries[d] : longest;
    }
    int64_t tq = rows_q(&p), tk = rows_k(&p), dq = (int64_t)s->heads * s->head_dim,
            dk = (int64_t)s->kv_heads * s->head_dim;
    pml_op_args args = {.attention = {.q = random_view(tq, dq, s->border),
                                      .k = random_view(tk, dk, s->border),
                                      .v = random_view(tk, dk, s->border),
                                      .cu_q = int_view(s->documents + 1, p.cu_q),
                                      .cu_k = int_view(s->documents + 1, p.cu_k),
                                      .o = view_new(tq, dq, s->border, PML_F32),
                                      .lse = view_new(s->heads, tq, s->border, PML_F32),
                                      .heads = s->heads,
                                      .kv_heads = s->kv_heads,
                                      .head_dim = s->head_dim,
                                      .window = s->window,
                                      .max_q = longest,
                                      .scale = (float)p.scale}};
    pml_attention_args *f = &args.attention;
    p.scale = f->scale;
    run_op(PML_OP_attention, &args);

    pml_op_args back = {.attention_bwd = {.dout = random_view(tq, dq, s->border),
                                          .q = f->q,
                                          .k = f->k,
                                          .v = f->v,
                                          .o = f->o,
                                          .lse = f->lse,
                                          .cu_q = f->cu_q,
                                          .cu_k = f->cu_k,
                                          .dq = view_new(tq, dq, s->border, PML_F32),
                                          .dk = view_new(tk, dk, s->border, PML_F32),
                                          .dv = view_new(tk, dk, s->border, PML_F32),
                                          .heads = s->heads,
                                          .kv_heads = s->kv_heads,
                                          .head_dim = s->head_dim,
                                          .window = s->window,
                                          .max_q = longest,
                                          .scale = f->scale}};
    pml_attention_bwd_args *b = &back.attention_bwd;
    p.q = doubles(&f->q);
    p.k = doubles(&f->k);
    p.v = doubles(&f->v);
    p.dout = doubles(&b->dout);
    p.o = calloc((size_t)(tq * dq) + 1, sizeof *p.o);
    p.lse = calloc((size_t)(s->heads * tq) + 1, sizeof *p.lse);
    attend_all(&p);
    expect_view("o", &f->o, p.o, 2e-6);
    expect_view("lse", &f->lse, p.lse, 1e-6);
    free(p.o);
    free(p.lse);
    p.o = p.lse = NULL;

    run_op(PML_OP_attention_bwd, &back);
    expect_gradient("dq", &b->dq, NULL, attend_all, &p, p.q, 12, 5e-6);
    expect_gradient("dk", &b->dk, NULL, attend_all, &p, p.k, 12, 5e-6);
    expect_gradient("dv", &b->dv, NULL, attend_all, &p, p.v, 12, 5e-6);
    if (tq == tk)
        check_turned(&p, b);

    free(p.q);
    free(p.k);
    free(p.v);
    free(p.dout);
    f->q = f->k = f->v = f->o = f->lse = f->cu_q = f->cu_k = (pml_view){0}; /* back has them */
    free_views(PML_OP_attention, &args);
    free_views(PML_OP_attention_bwd, &back);
}

static void test_shapes(void **state)
{
    (void)state;
    static const shape shapes[] = {
        {1, 1, 16, 0, 1, {1}, {1}, 0, 0},
        {1, 1, 16, 0, 1, {7}, {7}, 0, 3},
        {3, 1, 16, 0, 1, {130}, {130}, 0, 5},
        {6, 2, 24, 0, 3, {7, 0, 70}, {7, 0, 70}, 0, 1},
        {2, 1, 32, 0, 4, {1, 64, 65, 0}, {1, 64, 65, 0}, 3, 0},
        {4, 2, 64, 0, 2, {33, 97}, {33, 97}, 0, 2},
        {2, 2, 128, 0, 2, {5, 66}, {5, 66}, 1, 7},
        {1, 1, 10, 0, 1, {17}, {17}, 0, 0},
        {1, 1, 256, 0, 1, {9}, {9}, 0, 0},
        /* sliding window: narrower than, equal to and wider than a block of keys */
        {2, 1, 16, 5, 2, {130, 3}, {130, 3}, 0, 0},
        {2, 1, 16, 64, 1, {200}, {200}, 0, 0},
        {2, 1, 16, 1, 1, {70}, {70}, 0, 0},
        {2, 1, 16, 100, 2, {150, 40}, {150, 40}, 0, 1},
        /* sampling: fewer queries than keys, one query a document */
        {3, 1, 16, 0, 3, {1, 1, 1}, {1, 77, 130}, 0, 0},
        {4, 2, 32, 0, 2, {5, 70}, {150, 71}, 2, 0},
        {4, 2, 32, 20, 2, {5, 1}, {150, 71}, 0, 0},
        {6, 2, 24, 0, 5, {1, 1, 0, 1, 1}, {2, 3, 9, 4, 5}, 0, 2},
        {2, 1, 10, 7, 2, {1, 1}, {40, 6}, 1, 0},
        {1, 1, 256, 0, 1, {1}, {33}, 0, 3},
        {1, 1, 16, 0, 1, {1}, {1027}, 0, 0}, /* more than are scored at a time */
        /* fewer keys than queries: the first queries see nothing */
        {2, 1, 16, 0, 2, {10, 80}, {4, 9}, 0, 0},
        {1, 1, 16, 0, 2, {3, 2}, {0, 2}, 0, 0},
        /* only rows outside every document */
        {2, 1, 16, 0, 0, {0}, {0}, 5, 0},
        {2, 1, 16, 0, 2, {0, 0}, {0, 0}, 4, 0},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_shape(&shapes[i]);
}

/* Scores as far apart as float32 lets them be: no overflow, the largest wins. */
static void test_extreme_scores(void **state)
{
    (void)state;
    int32_t cu[2] = {0, 100};
    pml_op_args args = {.attention = {.q = view_new(100, 16, 0, PML_F32),
                                      .k = view_new(100, 16, 0, PML_F32),
                                      .v = random_view(100, 16, 0),
                                      .cu_q = int_view(2, cu),
                                      .cu_k = int_view(2, cu),
                                      .o = view_new(100, 16, 0, PML_F32),
                                      .lse = view_new(1, 100, 0, PML_F32),
                                      .heads = 1,
                                      .kv_heads = 1,
                                      .head_dim = 16,
                                      .max_q = 100,
                                      .scale = 1}};
    pml_attention_args *a = &args.attention;
    for (int t = 0; t < 100; t++)
        for (int c = 0; c < 16; c++) {
            *at(&a->q, t, c) = c == 0 ? 1000.0F : 0.0F;
            *at(&a->k, t, c) = c == 0 ? (float)t * 30.0F - 1000.0F : 0.0F;
        }
    run_op(PML_OP_attention, &args);
    for (int t = 0; t < 100; t++) {
        assert_true(*at(&a->lse, 0, t) == ((float)t * 30.0F - 1000.0F) * 1000.0F);
        for (int c = 0; c < 16; c++)
            assert_true(*at(&a->o, t, c) == *at(&a->v, t, c));
    }
    *at(&a->k, 20, 3) = NAN; /* damage is passed on, to those who see it and to nobody else */
    *at(&a->q, 19, 3) = 1.0F;
    run_op(PML_OP_attention, &args);
    for (int t = 0; t < 100; t++)
        assert_true(isnan(*at(&a->o, t, 0)) == (t >= 20));
    free_views(PML_OP_attention, &args);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_extreme_scores),
    };
    return run_on_devices(tests);
}
