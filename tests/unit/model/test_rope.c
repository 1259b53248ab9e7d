/* The rope table against transformers' own numbers (rope_numbers.h). */
#include "scratch.h"

#include <math.h>

#include "pml/model/spec.h"
#include "rope_numbers.h"

enum { N_POSITIONS = sizeof rope_positions / sizeof *rope_positions, TABLE = 8192 };

/* One ulp of the inverse frequency (another pow) turns by position * frequency * 2^-23, and the
 * float32 cosine adds its own rounding. */
static void expect_table(const pml_model_spec *spec, int32_t length, const float *wanted)
{
    int half = spec->head_dim / 2;
    float *table = malloc((size_t)TABLE * (size_t)spec->head_dim * sizeof *table);
    assert_non_null(table);
    pml_rope_table(spec, TABLE, length, table);
    int differ = 0;
    for (int p = 0; p < N_POSITIONS; p++)
        for (int i = 0; i < spec->head_dim; i++) {
            double got = table[rope_positions[p] * spec->head_dim + i];
            double want = wanted[p * spec->head_dim + i];
            double frequency = pow(spec->rope.theta, -2.0 * (i % half) / spec->head_dim);
            double angle = rope_positions[p] * frequency;
            if (fabs(got - want) > 0x1p-23 + angle * 0x1p-23)
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
    expect_table(&spec, 0, rope_default_16[0]);
    spec = (pml_model_spec){.head_dim = 64, .rope = {.theta = 1000000.0}};
    expect_table(&spec, 0, rope_qwen_64[0]);
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
    expect_table(&spec, 0, rope_llama3_64[0]);
}

static void test_linear(void **state)
{
    (void)state;
    pml_model_spec spec = {.head_dim = 16,
                           .rope = {.type = PML_ROPE_LINEAR, .theta = 10000.0, .factor = 3}};
    expect_table(&spec, 0, rope_linear_16[0]);
}

/* Stretched for 8192 tokens, beyond the 2048 it was trained for; not at all for fewer. */
static void test_dynamic(void **state)
{
    (void)state;
    pml_model_spec spec = {.head_dim = 16,
                           .max_positions = 2048,
                           .rope = {.type = PML_ROPE_DYNAMIC, .theta = 10000.0, .factor = 2.5}};
    expect_table(&spec, 8192, rope_dynamic_16[0]);
    expect_table(&spec, 2048, rope_default_16[0]);
}

static void test_yarn(void **state)
{
    (void)state;
    pml_model_spec spec = {.head_dim = 64,
                           .rope = {.type = PML_ROPE_YARN,
                                    .theta = 1000000.0,
                                    .factor = 4,
                                    .beta_fast = 32,
                                    .beta_slow = 1,
                                    .truncate = true,
                                    .attention_factor = 0.1 * log(4) + 1,
                                    .original_max_positions = 2048}};
    expect_table(&spec, 0, rope_yarn_64[0]);
    spec.rope.beta_fast = 24;
    spec.rope.beta_slow = 2;
    spec.rope.truncate = false;
    spec.rope.attention_factor = (0.1 * 0.8 * log(4) + 1) / (0.1 * 0.5 * log(4) + 1);
    expect_table(&spec, 0, rope_yarn_mscale_64[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_default), cmocka_unit_test(test_llama3),
        cmocka_unit_test(test_linear),  cmocka_unit_test(test_dynamic),
        cmocka_unit_test(test_yarn),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
