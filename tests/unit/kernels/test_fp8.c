/* Weights in 8 bits: the codes against a search through all of them, the linear layer over them
 * against float64 loops. */
#include "kernels/fixture.h"

/* E4M3 by its definition, of which there is another in kernels/maps.c. */
static double meaning(int code)
{
    int exponent = code >> 3 & 15, fraction = code & 7;
    double magnitude =
        exponent == 0 ? fraction / 8.0 * pow(2, -6) : (1 + fraction / 8.0) * pow(2, exponent - 7);
    return (code & 0x7f) == 0x7f ? NAN : code & 0x80 ? -magnitude : magnitude;
}

/* The nearest code by search; of two the even one. */
static int nearest(float x)
{
    int best = -1;
    double least = INFINITY;
    for (int code = 0; code < 256; code++) {
        double away = fabs(meaning(code) - x);
        bool sign = (code & 0x80) != 0;
        if (sign == (signbit(x) != 0) &&
            (away < least || (away == least && code % 2 == 0))) { /* false for NaN */
            least = away;
            best = code;
        }
    }
    return best;
}

static void test_codes(void **state)
{
    (void)state;
    for (int code = 0; code < 256; code++) {
        if ((code & 0x7f) == 0x7f) {
            assert_true(isnan(pml_e4m3_value((uint8_t)code)));
            continue;
        }
        float value = pml_e4m3_value((uint8_t)code);
        assert_true(value == (float)meaning(code));
        assert_int_equal(pml_e4m3_code(value), code);
    }
    for (int code = 0; code < 0x7e; code++) { /* around the middle between neighbours */
        float low = pml_e4m3_value((uint8_t)code), high = pml_e4m3_value((uint8_t)(code + 1));
        float middle = (low + high) / 2;
        assert_int_equal(pml_e4m3_code(middle), code % 2 == 0 ? code : code + 1);
        assert_int_equal(pml_e4m3_code(nextafterf(middle, 0)), code);
        assert_int_equal(pml_e4m3_code(nextafterf(middle, INFINITY)), code + 1);
        assert_int_equal(pml_e4m3_code(-middle), 0x80 | (code % 2 == 0 ? code : code + 1));
    }
    assert_int_equal(pml_e4m3_code(448.01F), 0x7e);
    assert_int_equal(pml_e4m3_code(-INFINITY), 0xfe);
    assert_int_equal(pml_e4m3_code(NAN), 0x7f);
    assert_int_equal(pml_e4m3_code(-0.0F), 0x80);
    assert_int_equal(pml_e4m3_code(0x1p-11F), 0);
}

static float top_of(const float *x, int64_t n)
{
    float top = 0;
    for (int64_t i = 0; i < n; i++)
        top = fmaxf(top, fabsf(x[i]));
    return top;
}

/* What a weight's row becomes: its codes, and what they are worth. least: of top. */
static float quantise_row(const float *x, int64_t n, float least, int *codes)
{
    float top = fmaxf(top_of(x, n), least);
    float into = top < 0x1p-100F ? 0 : 448.0F / top;
    for (int64_t i = 0; i < n; i++)
        codes[i] = nearest(x[i] * into);
    return top < 0x1p-100F ? 0 : top / 448.0F;
}

/* What an activation's row, or a piece of one, becomes: by powers of 2^step. */
static float round_row(const float *x, int64_t n, int step, int *codes)
{
    float top = top_of(x, n), scale = 0x1p-120F;
    while (top >= 0x1p-100F && 448.0F * scale < top)
        scale *= (float)(1 << step);
    for (int64_t i = 0; i < n; i++)
        codes[i] = nearest(top < 0x1p-100F ? x[i] * 0 : x[i] / scale);
    return top < 0x1p-100F ? 0 : scale;
}

enum { WIDEST = 200 };

static void test_quantise(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{1, 1, 0}, {7, 33, 3}, {40, 200, 0}};
    for (size_t s = 0; s < 3; s++) {
        int64_t rows = shapes[s][0], cols = shapes[s][1];
        pml_op_args args = {.fp8_quantise = {random_view(rows, cols, shapes[s][2]),
                                             view_new(rows, cols, 2 * shapes[s][2], PML_U8),
                                             view_new(1, rows, 0, PML_F32)}};
        pml_fp8_quantise_args *a = &args.fp8_quantise;
        for (int64_t c = 0; rows > 4 && c < cols; c++) {
            *at(&a->x, 1, c) = 0;
            *at(&a->x, 2, c) *= 0x1p-9F; /* less than the least that a row counts as */
            *at(&a->x, 3, c) *= 1.9F;
            *at(&a->x, 4, c) = powf(-0.7F, (float)c); /* down to what has no code of its own */
        }
        float largest = 0;
        for (int64_t r = 0; r < rows; r++)
            largest = fmaxf(largest, top_of(at(&a->x, r, 0), cols));
        run_op(PML_OP_fp8_quantise, &args);
        for (int64_t r = 0; r < rows; r++) {
            int codes[WIDEST];
            float scale = quantise_row(at(&a->x, r, 0), cols, largest / 256, codes);
            assert_true(*at(&a->scale, 0, r) == scale);
            for (int64_t c = 0; c < cols; c++)
                assert_int_equal(((uint8_t *)a->codes.data)[r * a->codes.ld + c], codes[c]);
        }
        free_views(PML_OP_fp8_quantise, &args);
    }
}

static float value_of(const pml_fp8_quantise_args *a, int64_t r, int64_t c)
{
    return pml_e4m3_value(((uint8_t *)a->codes.data)[r * a->codes.ld + c]) * *at(&a->scale, 0, r);
}

/* A number that is none is not hidden: a NaN comes back, an infinity makes a NaN of all. A weight
 * of zeros has scales that can be divided by. */
static void test_not_finite(void **state)
{
    (void)state;
    pml_op_args args = {.fp8_quantise = {random_view(2, 5, 0), view_new(2, 5, 0, PML_U8),
                                         view_new(1, 2, 0, PML_F32)}};
    pml_fp8_quantise_args *a = &args.fp8_quantise;
    *at(&a->x, 0, 3) = NAN;
    run_op(PML_OP_fp8_quantise, &args);
    for (int i = 0; i < 10; i++)
        assert_int_equal(isnan(value_of(a, i / 5, i % 5)) != 0, i == 3);
    *at(&a->x, 1, 2) = -INFINITY;
    run_op(PML_OP_fp8_quantise, &args);
    for (int i = 0; i < 10; i++)
        assert_true(isnan(value_of(a, i / 5, i % 5)));
    for (int i = 0; i < 10; i++)
        *at(&a->x, i / 5, i % 5) = i % 2 ? 0 : 0x1p-101F;
    run_op(PML_OP_fp8_quantise, &args);
    for (int i = 0; i < 10; i++)
        assert_true(value_of(a, i / 5, i % 5) == 0 && *at(&a->scale, 0, i / 5) == 1);
    free_views(PML_OP_fp8_quantise, &args);
}

/* x [rows,cols] as 8 bits leave it, in float64; by: factors of its columns, or NULL. */
static double *rounded(const pml_view *x, const float *by)
{
    double *out = must_alloc((size_t)(x->rows * x->cols) * sizeof *out);
    for (int64_t r = 0; r < x->rows; r++) {
        int codes[WIDEST];
        float row[WIDEST];
        for (int64_t c = 0; c < x->cols; c++)
            row[c] = *at(x, r, c) * (by != NULL ? by[c] : 1);
        float scale = round_row(row, x->cols, 1, codes);
        for (int64_t c = 0; c < x->cols; c++)
            out[r * x->cols + c] = meaning(codes[c]) * (double)scale;
    }
    return out;
}

enum { T = 70, K = 48, N0 = 32, N1 = 64, N = N0 + N1, R = 4 };

/* Parts of N0 and N1 columns, the second with an adapter. */
static void set_shape(int32_t *parts, int32_t part_cols[], uint32_t *lora_parts, int32_t *rank,
                      float scale[], bool adapter)
{
    *parts = 2;
    part_cols[0] = N0;
    part_cols[1] = N1;
    *lora_parts = adapter ? 2 : 0;
    *rank = adapter ? R : 0;
    scale[1] = 0.75F;
}

/* codes and scales of a weight, and what they mean. */
static double *draw_weight(pml_view *w, pml_view *w_scale)
{
    *w = view_new(N, K, 0, PML_U8);
    *w_scale = view_new(1, N, 0, PML_F32);
    pml_op_args args = {.fp8_quantise = {random_view(N, K, 0), *w, *w_scale}};
    run_op(PML_OP_fp8_quantise, &args);
    free(args.fp8_quantise.x.data);
    double *means = must_alloc(sizeof(double) * N * K);
    for (int64_t i = 0; i < N * K; i++)
        means[i] = meaning(((uint8_t *)w->data)[i]);
    return means;
}

/* The codes as the backward takes them. */
static void turn(pml_view *w)
{
    pml_op_args args = {.fp8_turn = {*w, view_new(w->cols, w->rows, 3, PML_U8)}};
    run_op(PML_OP_fp8_turn, &args);
    const pml_view *y = &args.fp8_turn.y;
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t c = 0; c < w->cols; c++)
            assert_int_equal(((uint8_t *)y->data)[c * y->ld + r],
                             ((uint8_t *)w->data)[r * w->ld + c]);
    free(w->data);
    *w = *y;
}

static void test_linear(void **state)
{
    (void)state;
    for (int adapter = 0; adapter < 2; adapter++) {
        pml_op_args args = {.linear = {.x = random_view(T, K, 5),
                                       .bias = random_view(1, N, 0),
                                       .y = view_new(T, N, 3, PML_F32)}};
        pml_linear_args *a = &args.linear;
        set_shape(&a->parts, a->part_cols, &a->lora_parts, &a->rank, a->lora_scale, adapter);
        double *w = draw_weight(&a->w, &a->w_scale), *x = rounded(&a->x, NULL);
        if (adapter) {
            a->a = random_view(R, K, 0);
            a->b = random_view(N1, R, 0);
        }
        double *want = calloc((size_t)T * N, sizeof *want);
        assert_non_null(want);
        for (int64_t t = 0; t < T; t++)
            for (int64_t n = 0; n < N; n++) {
                double *y = &want[t * N + n];
                for (int64_t k = 0; k < K; k++)
                    *y += x[t * K + k] * w[n * K + k] * (double)*at(&a->w_scale, 0, n);
                *y += (double)*at(&a->bias, 0, n);
                for (int64_t r = 0; adapter && n >= N0 && r < R; r++)
                    for (int64_t k = 0; k < K; k++) /* the adapter sees x as it is */
                        *y += 0.75 * *at(&a->x, t, k) * *at(&a->a, r, k) * *at(&a->b, n - N0, r);
            }
        run_op(PML_OP_linear, &args);
        expect_view("y", &a->y, want, 2e-6);
        free(want);
        free(w);
        free(x);
        free_views(PML_OP_linear, &args);
    }
}

static void test_linear_bwd(void **state)
{
    (void)state;
    for (int adapter = 0; adapter < 2; adapter++) {
        pml_op_args args = {
            .linear_bwd = {.dy = random_view(T, N, 2), .dx = view_new(T, K, 1, PML_F32)}};
        pml_linear_bwd_args *a = &args.linear_bwd;
        set_shape(&a->parts, a->part_cols, &a->lora_parts, &a->rank, a->lora_scale, adapter);
        double *w = draw_weight(&a->w, &a->w_scale), *dy = rounded(&a->dy, a->w_scale.data);
        turn(&a->w);
        if (adapter) {
            a->a = random_view(R, K, 0);
            a->b = random_view(N1, R, 0);
        }
        double *want = calloc((size_t)T * K, sizeof *want);
        assert_non_null(want);
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < K; k++) {
                double *dx = &want[t * K + k];
                for (int64_t n = 0; n < N; n++)
                    *dx += dy[t * N + n] * w[n * K + k];
                for (int64_t r = 0; adapter && r < R; r++)
                    for (int64_t n = N0; n < N; n++)
                        *dx += 0.75 * *at(&a->dy, t, n) * *at(&a->b, n - N0, r) * *at(&a->a, r, k);
            }
        run_op(PML_OP_linear_bwd, &args);
        expect_view("dx", &a->dx, want, 2e-6);
        free(want);
        free(w);
        free(dy);
        free_views(PML_OP_linear_bwd, &args);
    }
}

enum { WIDE = 2 * PML_FP8_PIECE + 40, SOME = 5 };

/* What pieces of a row of x, each of whose parts has `part` columns, leave of it, in float64; and
 * their codes and scales where those are given: they must be these, bit for bit. */
static void round_pieces(const float *x, int64_t n, int64_t part, double *out, const uint8_t *codes,
                         const float *scales)
{
    for (int64_t first = 0, count; first < n; first += count) {
        int64_t left = part - first % part;
        int made[PML_FP8_PIECE];
        count = left < PML_FP8_PIECE ? left : PML_FP8_PIECE;
        float scale = round_row(x + first, count, 4, made);
        for (int64_t i = 0; i < count; i++) {
            out[first + i] = meaning(made[i]) * (double)scale;
            if (codes != NULL)
                assert_int_equal(codes[first + i], made[i]);
        }
        if (scales != NULL)
            assert_true(*scales++ == scale);
    }
}

/* Rows whose pieces are far apart, one of zeros among them. */
static pml_view draw_pieces(int64_t cols)
{
    pml_view x = random_view(SOME, cols, 4);
    for (int64_t r = 0; r < SOME; r++)
        for (int64_t c = 0; c < cols; c++)
            *at(&x, r, c) *= r == 1 && c >= PML_FP8_PIECE ? 0x1p-9F : r == 2 ? 0 : r == 3 ? 64 : 1;
    return x;
}

/* h in codes is what h alone becomes, u of h before that; and a layer that reads the codes. */
static void test_swiglu_to_linear(void **state)
{
    (void)state;
    pml_op_args plain = {.swiglu = {.gate_up = draw_pieces(2 * WIDE),
                                    .h = view_new(SOME, WIDE, 0, PML_F32),
                                    .a = random_view(R, WIDE, 0),
                                    .u = view_new(SOME, R, 0, PML_F32),
                                    .lora_scale = 0.75F}};
    pml_op_args args = plain;
    pml_swiglu_args *a = &args.swiglu;
    run_op(PML_OP_swiglu, &plain);
    a->h = view_new(SOME, WIDE, 8, PML_U8);
    a->u = view_new(SOME, R, 1, PML_F32);
    a->h_scale = view_new(SOME, 3, 1, PML_F32);
    run_op(PML_OP_swiglu, &args);
    double *h = must_alloc(sizeof(double) * SOME * WIDE);
    for (int64_t r = 0; r < SOME; r++) {
        round_pieces(at(&plain.swiglu.h, r, 0), WIDE, WIDE, h + r * WIDE,
                     (uint8_t *)a->h.data + r * a->h.ld, at(&a->h_scale, r, 0));
        for (int64_t c = 0; c < R; c++)
            assert_true(*at(&a->u, r, c) == *at(&plain.swiglu.u, r, c));
    }

    float ones[N];
    uint8_t codes[N * WIDE];
    for (int64_t i = 0; i < N; i++)
        ones[i] = 1 + (float)i / N;
    for (int64_t i = 0; i < N * WIDE; i++)
        codes[i] = (uint8_t)(i * 37 % 0x7f | (i % 3 == 0 ? 0x80 : 0));
    pml_op_args next = {.linear = {.x = a->h,
                                   .x_scale = a->h_scale,
                                   .w = {codes, N, WIDE, WIDE, PML_U8},
                                   .w_scale = {ones, 1, N, N, PML_F32},
                                   .y = view_new(SOME, N, 0, PML_F32),
                                   .parts = 1,
                                   .part_cols = {N}}};
    run_op(PML_OP_linear, &next);
    double *want = calloc((size_t)SOME * N, sizeof *want);
    assert_non_null(want);
    for (int64_t i = 0; i < SOME * N; i++)
        for (int64_t k = 0; k < WIDE; k++)
            want[i] += h[i / N * WIDE + k] * meaning(codes[i % N * WIDE + k]) * (double)ones[i % N];
    expect_view("y", &next.linear.y, want, 2e-6);
    free(want);
    free(h);
    free(next.linear.y.data);
    free(plain.swiglu.h.data);
    free(plain.swiglu.u.data);
    free_views(PML_OP_swiglu, &args);
}

/* dgate_up in codes, times the weight's scales; v, db of it before that; and the dx that reads it.
 */
static void test_swiglu_bwd_to_linear(void **state)
{
    (void)state;
    float by[2 * WIDE];
    for (int64_t i = 0; i < 2 * WIDE; i++)
        by[i] = 0.5F + (float)(i % 9);
    pml_op_args plain = {.swiglu_bwd = {.dh = draw_pieces(WIDE),
                                        .gate_up = random_view(SOME, 2 * WIDE, 0),
                                        .dgate_up = view_new(SOME, 2 * WIDE, 0, PML_F32),
                                        .u = random_view(SOME, 2 * R, 0),
                                        .b = random_view(2 * WIDE, R, 0),
                                        .v = view_new(SOME, 2 * R, 0, PML_F32),
                                        .db = random_view(2 * WIDE, R, 0),
                                        .lora_parts = 3,
                                        .rank = R,
                                        .lora_scale = {0.75F, 0.5F}}};
    pml_op_args args = plain;
    pml_swiglu_bwd_args *a = &args.swiglu_bwd;
    a->dgate_up = view_new(SOME, 2 * WIDE, 8, PML_U8);
    a->v = view_new(SOME, 2 * R, 0, PML_F32);
    a->db = view_new(2 * WIDE, R, 0, PML_F32);
    memcpy(a->db.data, plain.swiglu_bwd.db.data, sizeof(float) * 2 * WIDE * R);
    a->w_scale = view_new(1, 2 * WIDE, 0, PML_F32);
    memcpy(a->w_scale.data, by, sizeof by);
    a->scale = view_new(SOME, 2 * 3, 0, PML_F32);
    run_op(PML_OP_swiglu_bwd, &plain);
    run_op(PML_OP_swiglu_bwd, &args);
    double *dy = must_alloc(sizeof(double) * SOME * 2 * WIDE);
    for (int64_t r = 0; r < SOME; r++) {
        float row[2 * WIDE];
        for (int64_t c = 0; c < 2 * WIDE; c++)
            row[c] = *at(&plain.swiglu_bwd.dgate_up, r, c) * by[c];
        round_pieces(row, 2 * WIDE, WIDE, dy + r * 2 * WIDE,
                     (uint8_t *)a->dgate_up.data + r * a->dgate_up.ld, at(&a->scale, r, 0));
        for (int64_t c = 0; c < 2 * R; c++)
            assert_true(*at(&a->v, r, c) == *at(&plain.swiglu_bwd.v, r, c));
    }
    for (int64_t i = 0; i < 2 * WIDE * R; i++)
        assert_true(((float *)a->db.data)[i] == ((float *)plain.swiglu_bwd.db.data)[i]);

    uint8_t codes[K * 2 * WIDE];
    for (int64_t i = 0; i < K * 2 * WIDE; i++)
        codes[i] = (uint8_t)(i * 29 % 0x7f | (i % 3 == 0 ? 0x80 : 0));
    pml_op_args next = {.linear_bwd = {.dy = a->dgate_up,
                                       .dy_scale = a->scale,
                                       .w = {codes, K, 2 * WIDE, 2 * WIDE, PML_U8},
                                       .w_scale = a->w_scale,
                                       .dx = view_new(SOME, K, 0, PML_F32),
                                       .parts = 2,
                                       .part_cols = {WIDE, WIDE}}};
    run_op(PML_OP_linear_bwd, &next);
    double *want = calloc((size_t)SOME * K, sizeof *want);
    assert_non_null(want);
    for (int64_t i = 0; i < SOME * K; i++)
        for (int64_t n = 0; n < 2 * WIDE; n++)
            want[i] += dy[i / K * 2 * WIDE + n] * meaning(codes[i % K * 2 * WIDE + n]);
    expect_view("dx", &next.linear_bwd.dx, want, 4e-6);
    free(want);
    free(dy);
    free(next.linear_bwd.dx.data);
    free(plain.swiglu_bwd.dgate_up.data);
    free(plain.swiglu_bwd.v.data);
    free(plain.swiglu_bwd.db.data);
    free_views(PML_OP_swiglu_bwd, &args);
}

static void expect_refusal(pml_op op, pml_op_args *args, const char *word)
{
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(call_op(op, args, &err), PML_INVALID);
    if (strstr(err.message, word) == NULL)
        fail_msg("'%s' does not say '%s'", err.message, word);
}

static void test_refusals(void **state)
{
    (void)state;
    pml_op_args args = {.linear = {.x = random_view(3, K, 0), .y = view_new(3, N, 0, PML_F32)}};
    pml_linear_args *a = &args.linear;
    set_shape(&a->parts, a->part_cols, &a->lora_parts, &a->rank, a->lora_scale, false);
    free(draw_weight(&a->w, &a->w_scale));
    expect_refusal(PML_OP_linear, &args, "'ws'");
    pml_view scale = a->w_scale;
    a->w_scale = (pml_view){0}; /* codes alone mean nothing */
    expect_refusal(PML_OP_linear, &args, "'w' is U8");
    a->w_scale = scale;
    a->w_scale.cols = N - 1;
    expect_refusal(PML_OP_linear, &args, "'w_scale'");
    a->w_scale = scale;

    pml_op_args back = {.linear_bwd = {.dy = a->y,
                                       .x = a->x,
                                       .w = a->w,
                                       .w_scale = a->w_scale,
                                       .dw = view_new(N, K, 0, PML_F32)}};
    pml_linear_bwd_args *b = &back.linear_bwd;
    set_shape(&b->parts, b->part_cols, &b->lora_parts, &b->rank, b->lora_scale, false);
    expect_refusal(PML_OP_linear_bwd, &back, "'w' is [96,48]"); /* not turned round */
    turn(&b->w);
    a->w = b->w;
    expect_refusal(PML_OP_linear_bwd, &back, "'dw'");
    free(b->dw.data);
    b->dw = (pml_view){0};
    b->dy_scale = view_new(3, 2, 0, PML_F32);
    expect_refusal(PML_OP_linear_bwd, &back, "'dy' is F32");
    free(b->dy_scale.data);
    free_views(PML_OP_linear, &args);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_codes),
        cmocka_unit_test(test_quantise),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_bwd),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_swiglu_to_linear),
        cmocka_unit_test(test_swiglu_bwd_to_linear),
    };
    return run_on_devices(tests);
}
