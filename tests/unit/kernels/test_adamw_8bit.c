/* AdamW with moments in 8 bits: against a plain loop over bitsandbytes' rules, block by block. What
 * bitsandbytes itself makes is in tests/unit/plan/test_adamw_8bit.c. */
#include "kernels/fixture.h"

enum { BLOCK = PML_ADAMW_8BIT_BLOCK, CODES = 256 };

/* The map from its definition in float64: means of neighbours on lines of 0.1 to 1, decade by
 * decade. */
static int make_map(bool is_signed, double map[CODES])
{
    int count = 0;
    for (int decade = 0; decade < 7; decade++) {
        int items = (is_signed ? 1 : 2) << decade;
        for (int i = 0; i < items; i++) {
            double value = pow(10, decade - 6) * (0.1 + 0.9 * (i + 0.5) / items);
            map[count++] = value;
            if (is_signed)
                map[count++] = -value;
        }
    }
    map[count++] = 0;
    map[count++] = 1;
    for (int i = 1; i < count; i++) /* insertion */
        for (int k = i; k > 0 && map[k] < map[k - 1]; k--) {
            double other = map[k];
            map[k] = map[k - 1];
            map[k - 1] = other;
        }
    return count;
}

static void fill_hyper(pml_view *v, double decay)
{
    float hyper[PML_HYPER_COUNT] = {[PML_HYPER_LR] = 1e-2F,
                                    [PML_HYPER_ONE_MINUS_BETA1] = 0.1F,
                                    [PML_HYPER_ONE_MINUS_BETA2] = 1e-3F,
                                    [PML_HYPER_EPS] = 1e-8F,
                                    [PML_HYPER_WEIGHT_DECAY] = (float)decay,
                                    [PML_HYPER_BIAS1] = 0.271F,
                                    [PML_HYPER_BIAS2] = 2.997e-3F,
                                    [PML_HYPER_GRAD_SCALE] = 0.3F};
    memcpy(v->data, hyper, sizeof hyper);
}

static pml_op_args make(int64_t n, pml_dtype copy)
{
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    pml_op_args args = {.adamw_8bit = {.p = random_view(1, n, 0),
                                       .g = random_view(1, n, 0),
                                       .m = view_new(1, n, 0, PML_U8),
                                       .v = view_new(1, n, 0, PML_U8),
                                       .m_largest = view_new(1, blocks, 0, PML_F32),
                                       .v_largest = view_new(1, blocks, 0, PML_F32),
                                       .hyper = view_new(1, PML_HYPER_COUNT, 0, PML_F32)}};
    pml_adamw_8bit_args *a = &args.adamw_8bit;
    if (copy != PML_DTYPE_COUNT)
        a->copy = view_new(1, n, 0, copy);
    memset(a->m.data, 0, (size_t)n);
    memset(a->v.data, 0, (size_t)n);
    memset(a->m_largest.data, 0, (size_t)blocks * sizeof(float));
    memset(a->v_largest.data, 0, (size_t)blocks * sizeof(float));
    fill_hyper(&a->hyper, 0.1);
    for (int64_t i = 0; i < n; i++) /* sizes from 1e-8 to 1 in one block */
        *at(&a->g, 0, i) *= (float)pow(10, -(double)(i % 9));
    return args;
}

/* One moment's new codes: each is as near to its number as any other, and the block's largest is
 * exact. A code of 0 stands for no negative number. */
static void expect_codes(const char *what, const double *want, const uint8_t *code, float largest,
                         int64_t n, bool is_signed)
{
    double map[CODES], top = 0;
    assert_int_equal(make_map(is_signed, map), CODES);
    for (int64_t i = 0; i < n; i++)
        top = fmax(top, fabs(want[i]));
    if (fabs(largest - top) > 1e-6 * top)
        fail_msg("%s: largest is %g, not %g", what, (double)largest, top);
    for (int64_t i = 0; top > 0 && i < n; i++) {
        double least = INFINITY, mine = fabs(map[code[i]] - want[i] / top);
        for (int k = 0; k < CODES; k++)
            if (!(want[i] < 0 && map[k] == 0))
                least = fmin(least, fabs(map[k] - want[i] / top));
        if (mine > least + 1e-6)
            fail_msg("%s: %g of %g got code %d (%g)", what, want[i], top, code[i], map[code[i]]);
        if (is_signed && want[i] < 0 && map[code[i]] >= 0)
            fail_msg("%s: a negative number got code %d", what, code[i]);
    }
}

/* Three updates; before each, what the state means is read out by the map of this file. */
static void check_update(int64_t n, pml_dtype copy)
{
    pml_op_args args = make(n, copy);
    pml_adamw_8bit_args *a = &args.adamw_8bit;
    double m_map[CODES], v_map[CODES], m[BLOCK], v[BLOCK];
    make_map(true, m_map);
    make_map(false, v_map);
    for (int step = 0; step < 3; step++) {
        double *p = doubles(&a->p), *g = doubles(&a->g);
        double *was[2] = {doubles(&a->m_largest), doubles(&a->v_largest)};
        uint8_t *codes = malloc(2 * (size_t)n);
        assert_non_null(codes);
        memcpy(codes, a->m.data, (size_t)n);
        memcpy(codes + n, a->v.data, (size_t)n);
        run_op(PML_OP_adamw_8bit, &args);
        for (int64_t first = 0, block = 0; first < n; first += BLOCK, block++) {
            int64_t count = n - first < BLOCK ? n - first : BLOCK;
            for (int64_t i = 0; i < count; i++) {
                double grad = g[first + i] * 0.3, keep = 1 - 1e-2 * 0.1;
                m[i] = 0.9 * m_map[codes[first + i]] * was[0][block] + 0.1 * grad;
                v[i] = 0.999 * v_map[codes[n + first + i]] * was[1][block] + 1e-3 * grad * grad;
                p[first + i] =
                    p[first + i] * keep - 1e-2 / 0.271 * m[i] / (sqrt(v[i] / 2.997e-3) + 1e-8);
            }
            expect_codes("m", m, (uint8_t *)a->m.data + first, *at(&a->m_largest, 0, block), count,
                         true);
            expect_codes("v", v, (uint8_t *)a->v.data + first, *at(&a->v_largest, 0, block), count,
                         false);
        }
        expect_view("p", &a->p, p, 2e-6);
        free(p);
        free(g);
        free(was[0]);
        free(was[1]);
        free(codes);
    }
    if (copy == PML_BF16)
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)((uint16_t *)a->copy.data)[i] << 16;
            float got;
            memcpy(&got, &bits, sizeof got);
            assert_true(fabsf(got - *at(&a->p, 0, i)) <= 0x1p-8F * fabsf(got));
        }
    free_views(PML_OP_adamw_8bit, &args);
}

static void test_update(void **state)
{
    (void)state;
    check_update(1, PML_DTYPE_COUNT);
    check_update(255, PML_F32);
    check_update(257, PML_BF16);
    check_update(70001, PML_DTYPE_COUNT); /* more than one thread's piece */
}

/* A block of zeros keeps codes of zero, and nothing in it moves but by decay; what its codes were
 * does not matter. */
static void test_zeros(void **state)
{
    (void)state;
    enum { N = 2 * BLOCK };
    pml_op_args args = make(N, PML_DTYPE_COUNT);
    pml_adamw_8bit_args *a = &args.adamw_8bit;
    memset(a->m.data, 200, N);
    memset(a->v.data, 7, N);
    memset(a->g.data, 0, BLOCK * sizeof(float));
    fill_hyper(&a->hyper, 0);
    double *p = doubles(&a->p);
    run_op(PML_OP_adamw_8bit, &args);
    for (int i = 0; i < BLOCK; i++) {
        assert_true(*at(&a->p, 0, i) == (float)p[i]);
        assert_int_equal(((uint8_t *)a->m.data)[i], 127);
        assert_int_equal(((uint8_t *)a->v.data)[i], 0);
    }
    assert_true(*at(&a->m_largest, 0, 0) == 0 && *at(&a->v_largest, 0, 0) == 0);
    assert_true(*at(&a->m_largest, 0, 1) > 0 && *at(&a->v_largest, 0, 1) > 0);
    free(p);
    free_views(PML_OP_adamw_8bit, &args);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_update), cmocka_unit_test(test_zeros)};
    return run_on_devices(tests);
}
