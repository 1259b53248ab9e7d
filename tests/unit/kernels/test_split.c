/* Float32 in three bfloat16 parts: layouts against their definition, accuracy against float64 and
 * against the product that it takes the place of, what is no number, and the machine's own unit,
 * where it has one, against the plain product. */
#include "kernels/fixture.h"

#include "../../../kernels/cpu/simd/tile.h"
#include "../../../kernels/cpu/split.h"

static float random_value(uint32_t *seed)
{
    *seed = *seed * 1664525U + 1013904223U;
    int exponent = (int)(*seed >> 8 & 7) - 4;
    return ldexpf((float)(int32_t)*seed / 2147483648.0F, exponent);
}

static void *take(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xff, (bytes + 63) / 64 * 64);
    return p;
}

static float part_of(const unsigned char *strips, int64_t pitch, pmli_side side, int64_t i,
                     int64_t l, int part)
{
    const uint16_t *tile =
        (const void *)(strips + i / 16 * pitch + l / 32 * PMLI_CELL_BYTES + part * 1024);
    int64_t at = side == PMLI_LEFT ? i % 16 * 32 + l % 32 : l % 32 / 2 * 32 + i % 16 * 2 + l % 2;
    uint32_t bits = (uint32_t)tile[at] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Every element is the sum of its parts, and what is beyond rows, columns and k is zero. */
static void check_layout(pmli_side side, bool along, int64_t n, int64_t k, int64_t ld)
{
    const int64_t cells = (k + 31) / 32, strips = (n + 15) / 16,
                  pitch = (cells + 1) * PMLI_CELL_BYTES;
    int64_t floats = (along ? n : k) * ld;
    float *x = take((size_t)floats * sizeof *x);
    unsigned char *out = take((size_t)(strips * pitch));
    uint32_t seed = 7;
    for (int64_t i = 0; i < floats; i++)
        x[i] = random_value(&seed);
    pml_view view = {x, along ? n : k, along ? k : n, ld, PML_F32};
    pmli_split(side, along, view, 0.5F, PMLI_PARTS, out, pitch);
    for (int64_t i = 0; i < strips * 16; i++)
        for (int64_t l = 0; l < cells * 32; l++) {
            float want = i < n && l < k ? 0.5F * (along ? x[i * ld + l] : x[l * ld + i]) : 0;
            float first = part_of(out, pitch, side, i, l, 0);
            float second = part_of(out, pitch, side, i, l, 1);
            float third = part_of(out, pitch, side, i, l, 2);
            assert_true(first + (second + third) == want);
            assert_true(fabsf(second) <= ldexpf(fabsf(want), -8));
            assert_true(fabsf(third) <= ldexpf(fabsf(want), -16));
        }
    for (int64_t s = 0; s < strips; s++) /* between strips nothing is written */
        for (int64_t b = cells * PMLI_CELL_BYTES; b < pitch; b++)
            assert_int_equal(out[s * pitch + b], 0xff);
    free(x);
    free(out);
}

static void test_layouts(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{16, 32}, {1, 1}, {17, 33}, {48, 31}, {40, 96}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int side = 0; side < 2; side++)
            for (int along = 0; along < 2; along++) {
                int64_t n = sizes[i][0], k = sizes[i][1];
                check_layout((pmli_side)side, along, n, k, (along ? k : n) + 3);
            }
}

typedef struct product {
    int64_t m, n, k;
    float *a, *b; /* [m,k], [k,n] */
    unsigned char *left, *right;
    int64_t pitch;
} product;

static product make(int64_t m, int64_t n, int64_t k, uint32_t seed)
{
    product p = {.m = m, .n = n, .k = k, .pitch = (k + 31) / 32 * PMLI_CELL_BYTES};
    p.a = take((size_t)(m * k) * sizeof *p.a);
    p.b = take((size_t)(k * n) * sizeof *p.b);
    p.left = take((size_t)((m + 15) / 16 * p.pitch));
    p.right = take((size_t)((n + 15) / 16 * p.pitch));
    for (int64_t i = 0; i < m * k; i++)
        p.a[i] = random_value(&seed);
    for (int64_t i = 0; i < k * n; i++)
        p.b[i] = random_value(&seed);
    return p;
}

static void run(const product *p, pmli_split_fn *function, float *c, int64_t ldc, bool add)
{
    pmli_split(PMLI_LEFT, true, pml_matrix(p->a, p->m, p->k, PML_F32), 1, PMLI_PARTS, p->left,
               p->pitch);
    pmli_split(PMLI_RIGHT, false, pml_matrix(p->b, p->k, p->n, PML_F32), 1, PMLI_PARTS, p->right,
               p->pitch);
    function(p->m, p->n, (p->k + 31) / 32, PMLI_PARTS, p->left, p->pitch, p->right, p->pitch, c,
             ldc, add);
}

static void drop(product *p)
{
    free(p->a);
    free(p->b);
    free(p->left);
    free(p->right);
}

/* Root of the mean squared error, in units of what the sum of |a b| rounds to. */
static double error_of(const product *p, const float *c)
{
    double sum = 0;
    for (int64_t i = 0; i < p->m; i++)
        for (int64_t j = 0; j < p->n; j++) {
            double want = 0, size = 0;
            for (int64_t l = 0; l < p->k; l++) {
                double term = (double)p->a[i * p->k + l] * p->b[l * p->n + j];
                want += term;
                size += fabs(term);
            }
            double error = (c[i * p->n + j] - want) / (size * 0x1p-24);
            sum += error * error;
        }
    return sqrt(sum / (double)(p->m * p->n));
}

/* The claim of split.h. Signs alike make sums grow, where rounding harms most. */
static void test_accuracy(void **state)
{
    (void)state;
    for (int64_t k = 32; k <= 2048; k *= 8)
        for (int positive = 0; positive < 2; positive++) {
            product p = make(32, 32, k, 3);
            float *split = take(32 * 32 * sizeof *split), *floats = take(32 * 32 * sizeof *floats);
            for (int64_t i = 0; positive && i < 32 * k; i++) {
                p.a[i] = fabsf(p.a[i]);
                p.b[i] = fabsf(p.b[i]);
            }
            run(&p, pmli_split_plain, split, 32, false);
            pmli_tile_pick()(32, 32, k, p.a, k, 1, p.b, 32, floats, 32, false);
            double ours = error_of(&p, split), theirs = error_of(&p, floats);
            print_message("k %4lld, %s signs: %.3f, by floats %.3f\n", (long long)k,
                          positive ? "equal" : "mixed", ours, theirs);
            assert_true(ours <= theirs);
            free(split);
            free(floats);
            drop(&p);
        }
}

static void test_no_numbers(void **state)
{
    (void)state;
    static const uint32_t patterns[] = {0x7fc00000, 0xffffffff, 0x7fffffff, 0x7f800001, 0x7f800000};
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        product p = make(16, 16, 32, 5);
        float c[256];
        memcpy(&p.a[3 * 32 + 9], &patterns[i], sizeof(float));
        run(&p, pmli_split_plain, c, 16, false);
        for (int e = 0; e < 256; e++)
            assert_int_equal(isfinite(c[e]), e / 16 != 3);
        drop(&p);
    }
}

/* Bit for bit; elsewhere said by name that it was skipped. */
static void test_unit(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = {{32, 32, 32}, {64, 96, 576}, {1, 16, 5},
                                       {17, 48, 40}, {47, 16, 100}, {33, 64, 704}};
    pmli_split_fn *unit = pmli_split_unit();
    if (unit == NULL) {
        print_message("no matrix unit here\n");
        skip();
    }
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int add = 0; add < 2; add++) {
            product p = make(sizes[i][0], sizes[i][1], sizes[i][2], 11);
            int64_t ldc = p.n + 5;
            size_t bytes = (size_t)(p.m * ldc) * sizeof(float);
            float *one = take(bytes), *other = take(bytes);
            for (int64_t e = 0; e < p.m * ldc; e++)
                one[e] = other[e] = (float)(e % 7);
            run(&p, pmli_split_plain, one, ldc, add);
            run(&p, unit, other, ldc, add);
            assert_memory_equal(one, other, bytes);
            free(one);
            free(other);
            drop(&p);
        }
}

/* B in bfloat16, both ways round, as one part and as three: the bits of the same numbers as
 * float32, on the unit too where there is one. */
static void test_narrow(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = {{32, 32, 32}, {17, 48, 40}, {33, 64, 100}, {1, 16, 5}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int way = 0; way < 4; way++) {
            product p = make(sizes[i][0], sizes[i][1], sizes[i][2], 13);
            const int parts = way & 1 ? 1 : PMLI_PARTS;
            const bool along = way & 2;
            const int64_t cells = (p.k + 31) / 32, pitch = cells * parts * PMLI_PART_BYTES;
            uint16_t *halves = take((size_t)(p.k * p.n) * sizeof *halves);
            float want[33 * 64], got[33 * 64];
            for (int64_t e = 0; e < p.k * p.n; e++) {
                uint32_t bits;
                memcpy(&bits, &p.b[e], sizeof bits);
                bits &= 0xffff0000;
                memcpy(&p.b[e], &bits, sizeof bits);
                halves[along ? e % p.n * p.k + e / p.n : e] = (uint16_t)(bits >> 16);
            }
            run(&p, pmli_split_plain, want, p.n, false);
            memset(p.right, 0xff, (size_t)(p.n / 16 * p.pitch));
            pml_view view = pml_matrix(halves, along ? p.n : p.k, along ? p.k : p.n, PML_BF16);
            pmli_split(PMLI_RIGHT, along, view, 1, parts, p.right, pitch);
            for (int unit = 0; unit < 2; unit++) {
                pmli_split_fn *function = unit ? pmli_split_unit() : pmli_split_plain;
                if (function == NULL)
                    continue;
                function(p.m, p.n, cells, parts, p.left, p.pitch, p.right, pitch, got, p.n, false);
                assert_memory_equal(got, want, (size_t)(p.m * p.n) * sizeof *got);
            }
            free(halves);
            drop(&p);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_layouts),
                                       cmocka_unit_test(test_accuracy),
                                       cmocka_unit_test(test_no_numbers),
                                       cmocka_unit_test(test_unit), cmocka_unit_test(test_narrow)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
