/* The rope table against transformers' own numbers (rope_numbers.h). */
#include "scratch.h"

#include <math.h>

#include "pml/model/spec.h"
#include "rope_numbers.h"

enum { N_POSITIONS = sizeof rope_positions / sizeof *rope_positions, TABLE = 8192 };

/* One ulp of the inverse frequency (another pow) turns by position * frequency * 2^-23, and the
 * float32 cosine adds its own rounding. */
static void expect_table(const pml_model_spec *spec, const float *wanted)
{
    int half = spec->head_dim / 2;
    float *table = malloc((size_t)TABLE * (size_t)spec->head_dim * sizeof *table);
    assert_non_null(table);
    pml_rope_table(spec, TABLE, table);
    int differ = 0;
    for (int p = 0; p < N_POSITIONS; p++)
        for (int i = 0; i < spec->head_dim; i++) {
            double got = table[rope_positions[p] * spec->head_dim + i];
            double want = wanted[p * spec->head_dim + i];
            double frequency = pow(spec->rope.theta, -2.0 * (i % half) / spec->head_dim);
            double angle = rope_positions[p] * frequency;
            if (fabs(got - want) > 0x1p-24 + angle * 0x1p-23)
                fail_msg("position %d, column %d: %.9g, transformers %.9g", rope_positions[p], i,
                         got, want);
            differ += got != want;
        }
    /* Almost all of them agree to the last bit: a formula that is merely close would not. */
    assert_true(differ * 20 < N_POSITIONS * spec->head_dim);
    free(table);
}

static void test_default(void **state)
{
    (void)state;
    pml_model_spec spec = {.head_dim = 16, .rope = {.theta = 10000.0}};
    expect_table(&spec, rope_default_16[0]);
    spec = (pml_model_spec){.head_dim = 64, .rope = {.theta = 1000000.0}};
    expect_table(&spec, rope_qwen_64[0]);
}

static void test_llama3(void **state)
{
    (void)state;
    pml_model_spec spec = {.head_dim = 64,
                           .rope = {.type = PML_ROPE_LLAMA3,
                                    .theta = 500000.0,
                                    .factor = 32,
                                    .low_freq_factor = 1,
                                    .high_freq_factor = 4,
                                    .original_max_positions = 8192}};
    expect_table(&spec, rope_llama3_64[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_default),
        cmocka_unit_test(test_llama3),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
