/* What passes between swiglu and the linear layers beside it: u of the next, v and db of the one
 * before, da of the next; and the linear ops that are given u or v. */
#include "kernels/fixture.h"

/* x y, either of them transposed where asked, times scale, added to start where given. */
static double *product(const pml_view *x, bool transposed, const pml_view *y, bool y_transposed,
                       double scale, const double *start)
{
    int64_t n = transposed ? x->cols : x->rows, inner = transposed ? x->rows : x->cols;
    int64_t m = y_transposed ? y->rows : y->cols;
    double *out = must_alloc((size_t)(n * m) * sizeof *out);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < m; j++) {
            double sum = 0;
            for (int64_t k = 0; k < inner; k++)
                sum += (double)*(transposed ? at(x, k, i) : at(x, i, k)) *
                       *(y_transposed ? at(y, j, k) : at(y, k, j));
            out[i * m + j] = scale * sum + (start != NULL ? start[i * m + j] : 0);
        }
    return out;
}

static void expect_product(const char *what, const pml_view *got, double *want)
{
    expect_view(what, got, want, 2e-6);
    free(want);
}

static void check_forward(int64_t rows, int64_t cols, int rank)
{
    pml_op_args args = {.swiglu = {.gate_up = random_view(rows, 2 * cols, 3),
                                   .h = view_new(rows, cols, 1, PML_F32),
                                   .a = random_view(rank, cols, 2),
                                   .u = view_new(rows, rank, 5, PML_F32),
                                   .lora_scale = 0.75F}};
    pml_op_args plain = {
        .swiglu = {.gate_up = args.swiglu.gate_up, .h = view_new(rows, cols, 1, PML_F32)}};
    run_op(PML_OP_swiglu, &args);
    run_op(PML_OP_swiglu, &plain);
    for (int64_t t = 0; t < rows; t++)
        assert_memory_equal(at(&args.swiglu.h, t, 0), at(&plain.swiglu.h, t, 0),
                            (size_t)cols * sizeof(float));
    expect_product("u", &args.swiglu.u,
                   product(&plain.swiglu.h, false, &args.swiglu.a, true, 0.75, NULL));
    plain.swiglu.gate_up.data = NULL;
    free_views(PML_OP_swiglu, &args);
    free_views(PML_OP_swiglu, &plain);
}

/* Against dgate_up and h of the plain op. h: it is asked for, in dh's place. */
static void check_backward(int64_t rows, int64_t cols, uint32_t parts, int rank, int down, bool h)
{
    int count = __builtin_popcount(parts);
    pml_op_args args = {.swiglu_bwd = {.dh = random_view(rows, cols, 2),
                                       .gate_up = random_view(rows, 2 * cols, 1),
                                       .dgate_up = view_new(rows, 2 * cols, 4, PML_F32),
                                       .lora_parts = parts,
                                       .rank = rank,
                                       .lora_scale = {0.75F, 0.5F}}};
    pml_swiglu_bwd_args *b = &args.swiglu_bwd;
    pml_op_args plain = {.swiglu_bwd = {.dh = random_view(rows, cols, 2),
                                        .gate_up = b->gate_up,
                                        .dgate_up = view_new(rows, 2 * cols, 0, PML_F32),
                                        .h = view_new(rows, cols, 0, PML_F32)}};
    memcpy(plain.swiglu_bwd.dh.data, b->dh.data, span_bytes(&b->dh));
    double *db = NULL, *da = NULL;
    if (count > 0) {
        b->u = random_view(rows, count * rank, 2);
        b->b = random_view(count * cols, rank, 1);
        b->v = view_new(rows, count * rank, 3, PML_F32);
        b->db = random_view(count * cols, rank, 0);
        db = doubles(&b->db);
    }
    if (down > 0) {
        b->v_down = random_view(rows, down, 1);
        b->da = random_view(down, cols, 2);
        da = doubles(&b->da);
    }
    if (h)
        b->h = b->dh;
    run_op(PML_OP_swiglu_bwd, &plain);
    run_op(PML_OP_swiglu_bwd, &args);
    for (int64_t t = 0; t < rows; t++) {
        assert_memory_equal(at(&b->dgate_up, t, 0), at(&plain.swiglu_bwd.dgate_up, t, 0),
                            2 * (size_t)cols * sizeof(float));
        if (h)
            assert_memory_equal(at(&b->h, t, 0), at(&plain.swiglu_bwd.h, t, 0),
                                (size_t)cols * sizeof(float));
    }
    for (int part = 0, i = 0; part < 2; part++) {
        if (!(parts >> part & 1))
            continue;
        pml_view dy = pml_view_columns(b->dgate_up, part * cols, cols), rows_of_b = b->b;
        pml_view v = pml_view_columns(b->v, i * rank, rank), rows_of_db = b->db;
        pml_view u = pml_view_columns(b->u, i * rank, rank);
        rows_of_b.data = at(&b->b, i * cols, 0);
        rows_of_db.data = at(&b->db, i * cols, 0);
        rows_of_b.rows = rows_of_db.rows = cols;
        expect_product("v", &v,
                       product(&dy, false, &rows_of_b, false, part == 0 ? 0.75 : 0.5, NULL));
        expect_product("db", &rows_of_db, product(&dy, true, &u, false, 1, db + i * cols * rank));
        i++;
    }
    if (down > 0)
        expect_product("da", &b->da, product(&b->v_down, true, &plain.swiglu_bwd.h, false, 1, da));
    free(db);
    free(da);
    plain.swiglu_bwd.gate_up.data = NULL;
    free_views(PML_OP_swiglu_bwd, &args);
    free_views(PML_OP_swiglu_bwd, &plain);
}

static void test_swiglu_beside(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{1, 5}, {7, 33}, {37, 176}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int64_t rows = shapes[s][0], cols = shapes[s][1];
        check_forward(rows, cols, 3);
        check_forward(rows, cols, 16);
        check_backward(rows, cols, 3, 4, 3, false);
        check_backward(rows, cols, 3, 3, 8, true);
        check_backward(rows, cols, 1, 16, 0, false);
        check_backward(rows, cols, 2, 2, 5, false);
        check_backward(rows, cols, 0, 0, 6, s == 1);
    }
}

/* u or v given is what the op would have made itself. */
static void test_given(void **state)
{
    (void)state;
    enum { T = 19, K = 14, N = 11, RANK = 3 };
    pml_op_args one = {.linear = {.x = random_view(T, K, 0),
                                  .w = random_view(N, K, 0),
                                  .a = random_view(RANK, K, 0),
                                  .b = random_view(N, RANK, 0),
                                  .y = view_new(T, N, 0, PML_F32),
                                  .u = view_new(T, RANK, 2, PML_F32),
                                  .parts = 1,
                                  .part_cols = {N},
                                  .lora_parts = 1,
                                  .rank = RANK,
                                  .lora_scale = {0.75F}}};
    run_op(PML_OP_linear, &one);
    pml_op_args other = one;
    other.linear.y = view_new(T, N, 0, PML_F32);
    other.linear.a = random_view(RANK, K, 0); /* not read any more */
    other.linear.u_made = true;
    run_op(PML_OP_linear, &other);
    assert_memory_equal(one.linear.y.data, other.linear.y.data, span_bytes(&one.linear.y));

    pml_op_args whole = {.linear_bwd = {.dy = random_view(T, N, 0),
                                        .x = one.linear.x,
                                        .w = one.linear.w,
                                        .a = one.linear.a,
                                        .b = one.linear.b,
                                        .u = one.linear.u,
                                        .dx = view_new(T, K, 0, PML_F32),
                                        .da = random_view(RANK, K, 0),
                                        .db = random_view(N, RANK, 0),
                                        .parts = 1,
                                        .part_cols = {N},
                                        .lora_parts = 1,
                                        .rank = RANK,
                                        .lora_scale = {0.75F}}};
    pml_op_args first = whole, second = whole;
    pml_view v = view_new(T, RANK, 1, PML_F32);
    first.linear_bwd.db = random_view(N, RANK, 0);
    memcpy(first.linear_bwd.db.data, whole.linear_bwd.db.data, span_bytes(&whole.linear_bwd.db));
    first.linear_bwd.da = (pml_view){0};
    first.linear_bwd.dx = (pml_view){0};
    first.linear_bwd.v = second.linear_bwd.v = v;
    second.linear_bwd.kept = PML_V_MADE;
    second.linear_bwd.db = second.linear_bwd.u = (pml_view){0};
    second.linear_bwd.b = random_view(N, RANK, 0); /* not read any more */
    second.linear_bwd.dx = view_new(T, K, 0, PML_F32);
    second.linear_bwd.da = random_view(RANK, K, 0);
    memcpy(second.linear_bwd.da.data, whole.linear_bwd.da.data, span_bytes(&whole.linear_bwd.da));
    run_op(PML_OP_linear_bwd, &whole);
    run_op(PML_OP_linear_bwd, &first);
    run_op(PML_OP_linear_bwd, &second);
    assert_memory_equal(first.linear_bwd.db.data, whole.linear_bwd.db.data,
                        span_bytes(&whole.linear_bwd.db));
    assert_memory_equal(second.linear_bwd.dx.data, whole.linear_bwd.dx.data,
                        span_bytes(&whole.linear_bwd.dx));
    assert_memory_equal(second.linear_bwd.da.data, whole.linear_bwd.da.data,
                        span_bytes(&whole.linear_bwd.da));
    free(first.linear_bwd.db.data);
    free(second.linear_bwd.b.data);
    free(second.linear_bwd.dx.data);
    free(second.linear_bwd.da.data);
    free(v.data);
    free(other.linear.a.data);
    free(other.linear.y.data);
    free(one.linear.y.data);
    free_views(PML_OP_linear_bwd, &whole); /* x, w, a, b and u are the forward's */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_swiglu_beside),
        cmocka_unit_test(test_given),
    };
    return run_groups(tests, sizeof tests / sizeof *tests);
}
