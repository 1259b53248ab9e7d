/* Choosing a token: against transformers' processors (tools/fixtures/make_choose.py), and whether
 * draws follow the probabilities. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "choose.h"
#include "pml/model/convert.h"
#include "pml/model/safetensors.h"

enum { CASES = 12, VOCAB_MAX = 1000 };

/* Its elements, at most `room` bytes of them. */
static int32_t read_tensor(const pml_safetensors *file, const char *what, int i, void *to,
                           size_t room)
{
    pml_error err = PML_ERROR_INIT;
    char name[32];
    snprintf(name, sizeof name, "%s.%d", what, i);
    const pml_stored *t = pml_safetensors_find(file, name);
    assert_non_null(t);
    assert_true(t->bytes <= room);
    if (pml_stored_read(t, 0, t->bytes, to, &err) != PML_OK)
        fail_msg("%s", err.message);
    return (int32_t)t->elements;
}

static void test_processors(void **state)
{
    (void)state;
    pml_safetensors *file = NULL;
    pml_error err = PML_ERROR_INIT;
    const char *path = SOURCE_DIR "/tests/unit/train/fixtures/choose.safetensors";
    if (pml_safetensors_open(path, &file, &err) != PML_OK)
        fail_msg("%s", err.message);
    for (int i = 0; i < CASES; i++) {
        int32_t said[64], scratch[VOCAB_MAX];
        float logits[VOCAB_MAX], want[VOCAB_MAX], settings[4];
        int32_t vocab = read_tensor(file, "logits", i, logits, sizeof logits);
        assert_int_equal(read_tensor(file, "after", i, want, sizeof want), vocab);
        int32_t n = read_tensor(file, "said", i, said, sizeof said);
        assert_int_equal(read_tensor(file, "settings", i, settings, sizeof settings), 4);
        assert_true(pmli_choose_scratch(vocab) <= VOCAB_MAX);
        const pml_generate_options options = {.repetition_penalty = (double)settings[0],
                                              .temperature = (double)settings[1],
                                              .top_k = (int32_t)settings[2],
                                              .top_p = (double)settings[3]};
        pmli_process_logits(logits, vocab, said, n, &options, scratch);
        int kept = 0;
        for (int32_t t = 0; t < vocab; t++) {
            if (isinf(want[t]) != isinf(logits[t]))
                fail_msg("case %d: token %d is %g, transformers has %g", i, t, (double)logits[t],
                         (double)want[t]);
            kept += !isinf(want[t]);
            if (!isinf(want[t]) && fabsf(logits[t] - want[t]) > 2e-6F * fabsf(want[t]))
                fail_msg("case %d: token %d is %.9g, transformers has %.9g", i, t,
                         (double)logits[t], (double)want[t]);
        }
        assert_true(kept >= 1);
    }
    pml_safetensors_close(&file);
}

/* 40,000 draws over 8 tokens, one of them excluded: chi-squared with 6 degrees of freedom stays
 * below its 99.99% point. The seeds are fixed, so this passes or fails for ever. */
static void test_draws_follow_the_probabilities(void **state)
{
    (void)state;
    enum { VOCAB = 8, DRAWS = 40000 };
    static const float start[VOCAB] = {1.0F, 0.0F, -1.0F, 2.0F, 0.5F, -6.0F, 1.5F, -0.5F};
    const pml_generate_options base = {.temperature = 1.25, .top_k = 7, .top_p = 1};
    double weights[VOCAB], sum = 0, chi = 0;
    int count[VOCAB] = {0};
    for (int i = 0; i < VOCAB; i++)
        sum += weights[i] = i == 5 ? 0 : exp((double)start[i] / 1.25);
    for (int d = 0; d < DRAWS; d++) {
        float logits[VOCAB];
        int32_t scratch[VOCAB], said[1] = {0};
        pml_generate_options options = base;
        options.seed = (uint64_t)d;
        memcpy(logits, start, sizeof start);
        count[pmli_choose(logits, VOCAB, said, 1, &options, scratch)]++;
    }
    assert_int_equal(count[5], 0);
    for (int i = 0; i < VOCAB; i++) {
        double expected = DRAWS * weights[i] / sum;
        if (i != 5)
            chi += (count[i] - expected) * (count[i] - expected) / expected;
    }
    if (chi > 27.9)
        fail_msg("chi-squared is %g", chi);
}

static void test_greedy(void **state)
{
    (void)state;
    float logits[4] = {1, 3, 3, 2};
    int32_t scratch[4], said[2] = {1, 1};
    pml_generate_options options = {0};
    assert_int_equal(pmli_choose(logits, 4, said, 2, &options, scratch), 1); /* lowest id */
    options.repetition_penalty = 2; /* once, though token 1 is there twice */
    assert_int_equal(pmli_choose(logits, 4, said, 2, &options, scratch), 2);
    assert_true(logits[1] == 1.5F && logits[0] == 1 && logits[3] == 2);
    options.top_k = 1; /* of no account without a temperature */
    options.top_p = 0.1;
    pmli_process_logits(logits, 4, said, 0, &options, scratch);
    assert_true(!isinf(logits[0]) && !isinf(logits[3]));
}

static float number_of(uint16_t bits, pml_dtype dtype)
{
    return dtype == PML_BF16 ? pml_bf16_to_f32(bits) : pml_f16_to_f32(bits);
}

/* In 16 bits the same token as of the same numbers in float32, and no number is noticed anywhere:
 * all lengths around a block, all signs, ties, zeros of both signs. */
static void test_greatest_narrow(void **state)
{
    (void)state;
    enum { MOST = 400 };
    static const pml_dtype dtypes[] = {PML_BF16, PML_F16};
    uint32_t seed = 7;
    for (int32_t n = 1; n <= MOST; n++)
        for (int kind = 0; kind < 8; kind++) {
            const pml_dtype dtype = dtypes[kind % 2];
            uint16_t bits[MOST];
            float wide[MOST];
            bool finite;
            for (int32_t i = 0; i < n; i++) {
                seed = seed * 1664525U + 1013904223U;
                bits[i] = (uint16_t)(seed >> 16);
                if (kind < 2) /* few values: ties */
                    bits[i] &= 0x8180;
                if (kind >= 6) /* none is above zero */
                    bits[i] = seed >> 30 == 0 ? (uint16_t)(seed >> 14 & 0x8000) : bits[i] | 0x8000;
                if ((bits[i] & 0x7c00) == 0x7c00)
                    bits[i] &= 0xbfff;
                wide[i] = number_of(bits[i], dtype);
            }
            assert_int_equal(pmli_greatest_narrow(bits, n, dtype, &finite), pmli_greatest(wide, n));
            assert_true(finite);
            static const uint16_t none[2][3] = {{0x7f80, 0xff80, 0x7fc1}, {0x7c00, 0xfc00, 0x7e01}};
            bits[seed % (uint32_t)n] = none[kind % 2][kind / 2 % 3];
            pmli_greatest_narrow(bits, n, dtype, &finite);
            assert_false(finite);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_processors),
        cmocka_unit_test(test_draws_follow_the_probabilities),
        cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_greatest_narrow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
