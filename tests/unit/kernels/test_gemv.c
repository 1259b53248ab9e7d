/* A matrix times a vector adds in one order, in whatever registers: where multiplications are fused
 * with their additions the bits are the same with AVX2 and with AVX-512. */
#include "kernels/fixture.h"

#include "../../../kernels/cpu/gemv.h"

enum { LANES = 8, SUMS = 8, BLOCK = SUMS * LANES, MOST = 1100, ROWS = 5 };

/* Whether the code that runs here fuses them: asked of it, with a sum of 2^-24 or of nothing. */
static bool fuses(void)
{
    float w[BLOCK + LANES] = {-1 - 0x1p-11F}, x[BLOCK + LANES] = {1}, y = 0;
    w[BLOCK] = x[BLOCK] = 1 + 0x1p-12F;
    pmli_gemv(pml_matrix(w, 1, BLOCK + LANES, PML_F32), x, 1, false, &y);
    return y != 0;
}

static float plus_product(float sum, float a, float b)
{
    return fuses() ? fmaf(a, b, sum) : sum + a * b;
}

/* Eight lanes of eight sums, whole blocks first; then what is left, by lanes; then the lanes. */
static float by_definition(const float *w, const float *x, int64_t k)
{
    float sum[SUMS][LANES] = {{0}}, total = 0;
    const int64_t whole = k / BLOCK * BLOCK;
    for (int64_t l = 0; l < whole; l++) {
        float *one = &sum[l / LANES % SUMS][l % LANES];
        *one = plus_product(*one, w[l], x[l]);
    }
    for (int s = 1; s < SUMS; s++)
        for (int i = 0; i < LANES; i++)
            sum[0][i] += sum[s][i];
    for (int64_t l = whole; l < k; l++)
        sum[0][l % LANES] = plus_product(sum[0][l % LANES], w[l], x[l]);
    for (int i = 0; i < LANES; i++)
        total += sum[0][i];
    return total;
}

static void check(int64_t k, int64_t border)
{
    static float x[MOST];
    pml_view wide = view_new(ROWS, k, border, PML_F32),
             narrow = view_new(ROWS, k, border, PML_BF16);
    for (int64_t l = 0; l < k; l++)
        x[l] = random_float();
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t l = 0; l < k; l++) {
            const float value = random_float();
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            bits &= 0xffff0000; /* what both can hold */
            memcpy(at(&wide, r, l), &bits, sizeof bits);
            ((uint16_t *)narrow.data)[r * narrow.ld + l] = (uint16_t)(bits >> 16);
        }
    for (int add = 0; add < 2; add++) {
        float want[ROWS], got[2][ROWS];
        for (int r = 0; r < ROWS; r++) {
            const float sum = by_definition(at(&wide, r, 0), x, k);
            want[r] = add ? 3 + sum : sum;
            got[0][r] = got[1][r] = 3;
        }
        pmli_gemv(wide, x, 1, add, got[0]);
        pmli_gemv(narrow, x, 1, add, got[1]);
        assert_memory_equal(got[0], want, sizeof want);
        assert_memory_equal(got[1], want, sizeof want);
    }
    free(wide.data);
    free(narrow.data);
}

static void test_order(void **state)
{
    (void)state;
    for (int64_t k = 1; k < 3 * BLOCK; k++)
        check(k, k % 3);
    check(576, 0);
    check(1024, 1);
    check(1087, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_order)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
