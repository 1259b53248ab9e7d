/* Known answers of philox4x32-10 from the Random123 distribution (kat_vectors). */
#include "scratch.h"

#include <math.h>

#include "pml/base/philox.h"

typedef struct answer {
    uint32_t counter[4], key[2], result[4];
} answer;

static const answer answers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

static void test_known_answers(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        const answer *a = &answers[i];
        uint64_t seed = (uint64_t)a->key[1] << 32 | a->key[0];
        uint64_t index = (uint64_t)a->counter[1] << 32 | a->counter[0];
        pml_philox r = pml_philox_at(seed, a->counter[2], a->counter[3], index);
        assert_memory_equal(r.word, a->result, sizeof r.word);
    }
}

static void test_uniform_is_half_open(void **state)
{
    (void)state;
    assert_true(pml_uniform(0) == 0.0F);
    assert_true(pml_uniform(UINT32_MAX) < 1.0F);
    assert_true(pml_uniform(UINT32_MAX) > 0.9999999F);
}

static void test_dropout_is_of_16_bits(void **state)
{
    (void)state;
    static const struct {
        float dropout;
        uint32_t least;
    } cases[] = {{0, 0},     {0.5F, 32768},        {0.05F, 3277},
                 {1e-9F, 1}, {0.99999994F, 65535}, {0.25F, 16384}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint32_t least = pml_dropout_least(cases[i].dropout);
        assert_int_equal(least, cases[i].least);
        float kept = (float)(65536 - least) / 65536.0F; /* of so many numbers */
        assert_true(fabsf(kept * pml_dropout_keep(least) - 1.0F) < 1e-6F);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_answers),
        cmocka_unit_test(test_uniform_is_half_open),
        cmocka_unit_test(test_dropout_is_of_16_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
