/* Products over the pool, against a float64 loop: every form, panels and what is left of them,
 * chunks of k and of columns, adapters, and that the cut decides no bit. Runs a second time with
 * PANTHERAML_MATRIX=plain, where there is a matrix unit everywhere. */
#include "kernels/fixture.h"

#include "../../../kernels/cpu/gemm.h"
#include "../../../kernels/cpu/simd/tile.h"
#include "../../../kernels/cpu/split.h"

typedef struct shape {
    int64_t m, n, k, k2; /* k2 > 0: a second pair */
    pmli_form form;
    float alpha;
    bool add;
    int64_t gap; /* floats between a row's end and the next row */
} shape;

static float *values(int64_t n, uint32_t seed)
{
    float *v = malloc((size_t)n * sizeof *v);
    assert_non_null(v);
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525U + 1013904223U;
        v[i] = (float)(int32_t)seed / 4294967296.0F;
    }
    return v;
}

static pml_view matrix(int64_t rows, int64_t cols, int64_t gap, uint32_t seed)
{
    pml_view v = pml_matrix(values(rows * (cols + gap), seed), rows, cols + gap, PML_F32);
    v.cols = cols;
    return v;
}

static pml_view left(const shape *s, int64_t k, uint32_t seed)
{
    return s->form == PMLI_TN ? matrix(k, s->m, s->gap, seed) : matrix(s->m, k, s->gap, seed);
}

static pml_view right(const shape *s, int64_t k, uint32_t seed)
{
    return s->form == PMLI_NT ? matrix(s->n, k, s->gap, seed) : matrix(k, s->n, s->gap, seed);
}

static double element(const pml_view *v, int64_t row, int64_t col)
{
    return ((const float *)v->data)[row * v->ld + col];
}

static double product(const shape *s, const pml_view *a, const pml_view *b, int64_t k, int64_t i,
                      int64_t j)
{
    double sum = 0;
    for (int64_t l = 0; l < k; l++)
        sum += (s->form == PMLI_TN ? element(a, l, i) : element(a, i, l)) *
               (s->form == PMLI_NT ? element(b, j, l) : element(b, l, j));
    return sum;
}

static void run(const shape *s, int threads, const pml_view f[4], pml_view c)
{
    pml_error err = PML_ERROR_INIT;
    pmli_pool *pool = NULL;
    assert_int_equal(pmli_pool_new(threads, &pool, &err), PML_OK);
    for (int64_t i = 0; i < c.rows * c.ld; i++)
        ((float *)c.data)[i] = s->add ? (float)(i % 3) : NAN;
    pmli_product product = {
        .form = s->form, .alpha = s->alpha, .beta = s->add ? 1 : 0, .a = f[0], .b = f[1], .c = c};
    if (s->k2 > 0) {
        product.a2 = f[2];
        product.b2 = f[3];
    }
    pmli_gemm_all(pool, &product, 1);
    pmli_pool_destroy(&pool);
}

static void check_values(const shape *s, const pml_view f[4], pml_view c)
{
    /* Of a large product some: a step that meets every row and column of a tile. */
    const int64_t step = s->m * s->n * (s->k + s->k2) > 10000000 ? 7 : 1;
    for (int64_t i = 0; i < s->m; i++) {
        for (int64_t j = i % step; j < s->n; j += step) {
            double want = s->add ? (double)((i * c.ld + j) % 3) : 0;
            want += (double)s->alpha * product(s, &f[0], &f[1], s->k, i, j);
            want += product(s, &f[2], &f[3], s->k2, i, j);
            double slack = 1e-6 * sqrt((double)(s->k + s->k2 + 1)) + 1e-6 * fabs(want);
            if (!(fabs(element(&c, i, j) - want) <= slack))
                fail_msg("%lld x %lld x %lld+%lld, form %d: [%lld,%lld] is %g, not %g",
                         (long long)s->m, (long long)s->n, (long long)s->k, (long long)s->k2,
                         (int)s->form, (long long)i, (long long)j, element(&c, i, j), want);
        }
        for (int64_t j = s->n; j < c.ld && i + 1 < s->m; j++) /* what lies between rows stays */
            assert_true(s->add ? element(&c, i, j) == (double)((i * c.ld + j) % 3)
                               : isnan(element(&c, i, j)));
    }
}

/* With few threads and with many, which are cut, and may be multiplied, in other ways. */
static void check(const shape *s)
{
    static const int threads[][2] = {{3, 1}, {9, 8}};
    const pml_view f[4] = {left(s, s->k, 1), right(s, s->k, 2), left(s, s->k2, 3),
                           right(s, s->k2, 4)};
    pml_view c = matrix(s->m, s->n, s->gap, 5), other = matrix(s->m, s->n, s->gap, 6);
    for (int way = 0; way < 2; way++) {
        run(s, threads[way][0], f, c);
        check_values(s, f, c);
        if (s->n % PMLI_TILE_COLS != 0 || s->m < 8 || pmli_tile_width() == 0)
            continue;
        run(s, threads[way][1], f, other);
        for (int64_t i = 0; i < s->m; i++)
            assert_memory_equal((float *)c.data + i * c.ld, (float *)other.data + i * other.ld,
                                (size_t)s->n * sizeof(float));
    }
    for (int i = 0; i < 4; i++)
        free(f[i].data);
    free(c.data);
    free(other.data);
}

static void test_shapes(void **state)
{
    (void)state;
    const int64_t sizes[][4] = {
        {1, 1, 1, 0},    {1, 40, 17, 0},   {7, 16, 5, 0},      {8, 16, 1, 0},    {9, 17, 3, 2},
        {14, 32, 64, 8}, {15, 48, 300, 0}, {29, 33, 257, 16},  {100, 15, 40, 0}, {64, 112, 96, 4},
        {33, 80, 0, 0},  {40, 64, 0, 8},   {203, 160, 31, 16}, {3, 160, 31, 16},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int form = 0; form < 3; form++)
            for (int variant = 0; variant < 4; variant++)
                check(&(shape){sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], (pmli_form)form,
                               variant & 1 ? 0.5F : 1.0F, (variant & 2) != 0, variant});
}

/* Deeper and wider than the common memory holds at once, and rows a power of two apart. */
static void test_chunks(void **state)
{
    (void)state;
    for (int form = 0; form < 3; form++) {
        check(&(shape){16, 2048, 1400, 8, (pmli_form)form, 1, false, 0});
        check(&(shape){18, 64, 17000, 300, (pmli_form)form, 2, true, 0});
        check(&(shape){30, 48, 1024, 0, (pmli_form)form, 1, false, 1024});
        check(&(shape){1000, 32, 20, 0, (pmli_form)form, 1, true, 0});
        check(&(shape){9, 1100 * 16, 70, 16, (pmli_form)form, 1, false, 0});
        /* The same where a matrix unit takes them. */
        check(&(shape){70, 1040, 1400, 8, (pmli_form)form, 1, false, 0});
        check(&(shape){66, 80, 8000, 300, (pmli_form)form, 2, true, 0});
        check(&(shape){65, 7500, 90, 16, (pmli_form)form, 1, false, 0});
        check(&(shape){600, 64, 50, 16, (pmli_form)form, 1, true, 3});
    }
}

/* Together as each alone: more than are taken at a time, large ones and odd ones among them. */
static void test_together(void **state)
{
    (void)state;
    enum { MANY = PMLI_PRODUCTS + 3 };
    static const int64_t sizes[MANY][3] = {{40, 32, 48},   {512, 16, 100},   {9, 17, 20},
                                           {96, 64, 300},  {70, 1040, 1100}, {3, 48, 30},
                                           {128, 256, 64}, {100, 512, 2000}, {64, 80, 32},
                                           {33, 16, 7},    {256, 128, 96}};
    pml_error err = PML_ERROR_INIT;
    pmli_pool *pool = NULL;
    pmli_product together[MANY];
    pml_view alone[MANY];
    assert_int_equal(pmli_pool_new(3, &pool, &err), PML_OK);
    for (int i = 0; i < MANY; i++) {
        shape s = {
            .m = sizes[i][0], .n = sizes[i][1], .k = sizes[i][2], .form = (pmli_form)(i % 3)};
        together[i] = (pmli_product){.form = s.form,
                                     .alpha = 1,
                                     .beta = (float)(i % 2),
                                     .a = left(&s, s.k, 1),
                                     .b = right(&s, s.k, 2),
                                     .c = matrix(s.m, s.n, 0, 5)};
        alone[i] = matrix(s.m, s.n, 0, 5);
        pmli_gemm(pool, s.form, 1, together[i].a, together[i].b, together[i].beta, alone[i]);
    }
    pmli_gemm_all(pool, together, MANY);
    for (int i = 0; i < MANY; i++) {
        assert_memory_equal(together[i].c.data, alone[i].data,
                            (size_t)(sizes[i][0] * sizes[i][1]) * sizeof(float));
        free(together[i].a.data);
        free(together[i].b.data);
        free(together[i].c.data);
        free(alone[i].data);
    }
    pmli_pool_destroy(&pool);
}

/* The matrix unit is named where it decides bits: for all products with few threads, with many for
 * those whose right factor is bfloat16. */
static void test_names(void **state)
{
    (void)state;
    const pml_backend *cpu = pml_backend_cpu();
    const int threads[] = {2, 8};
    for (int i = 0; i < 2; i++) {
        const pml_device_options options = {.threads = threads[i]};
        pml_device *device = NULL;
        pml_device_info info;
        char all[64];
        pml_error err = PML_ERROR_INIT;
        assert_int_equal(cpu->open(&options, &device, &err), PML_OK);
        assert_int_equal(cpu->info(device, &info, &err), PML_OK);
        bool every = pmli_gemm_on_unit(threads[i], PML_F32);
        assert_int_equal(every, i == 0);
        assert_true(pmli_gemm_on_unit(threads[i], PML_BF16));
        snprintf(all, sizeof all, "%s%s", pmli_instructions(), every ? pmli_split_name() : "");
        assert_string_equal(info.instructions, all);
        assert_string_equal(info.narrow, every ? "" : pmli_split_name());
        cpu->close(&device);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_shapes), cmocka_unit_test(test_chunks),
                                       cmocka_unit_test(test_together),
                                       cmocka_unit_test(test_names)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
