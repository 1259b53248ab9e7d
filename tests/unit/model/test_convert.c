#include "scratch.h"

#include <math.h>

#include "pml/model/convert.h"

/* float16 from its definition: (-1)^s 2^(e-15) (1 + f/1024), subnormals 2^-14 f/1024. */
static double f16_by_definition(uint16_t bits)
{
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31)
        magnitude = fraction == 0 ? INFINITY : NAN;
    return bits & 0x8000 ? -magnitude : magnitude;
}

static void test_every_f16(void **state)
{
    (void)state;
    for (uint32_t bits = 0; bits <= UINT16_MAX; bits++) {
        double wanted = f16_by_definition((uint16_t)bits);
        float got = pml_f16_to_f32((uint16_t)bits);
        if (isnan(wanted))
            assert_true(isnan(got));
        else
            assert_true((double)got == wanted && !signbit(got) == !signbit(wanted));
    }
}

static void test_unaligned_arrays(void **state)
{
    (void)state;
    unsigned char bytes[40] = {0};
    float out[4];
    const float f32[4] = {1.5F, -2, 1e-40F, 3e38F};
    const double f64[4] = {0.1, -1, 1e300, 2};
    const uint16_t bf16[4] = {0x3FC0, 0xC000, 0x0001, 0x7F80}; /* 1.5, -2, 2^-133, inf */
    const uint16_t f16[4] = {0x3E00, 0xC000, 0x0001, 0x7C00};  /* 1.5, -2, 2^-24, inf */

    memcpy(bytes + 1, f32, sizeof f32);
    EXPECT_OK(pml_convert_to_f32(bytes + 1, PML_F32, 4, out, e));
    assert_memory_equal(out, f32, sizeof out);
    memcpy(bytes + 1, bf16, sizeof bf16);
    EXPECT_OK(pml_convert_to_f32(bytes + 1, PML_BF16, 4, out, e));
    assert_true(out[0] == 1.5F && out[1] == -2 && out[2] == 0x1p-133F && isinf(out[3]));
    memcpy(bytes + 1, f16, sizeof f16);
    EXPECT_OK(pml_convert_to_f32(bytes + 1, PML_F16, 4, out, e));
    assert_true(out[0] == 1.5F && out[1] == -2 && out[2] == 0x1p-24F && isinf(out[3]));
    memcpy(bytes + 1, f64, sizeof f64);
    EXPECT_OK(pml_convert_to_f32(bytes + 1, PML_F64, 4, out, e));
    assert_true(out[0] == 0.1F && out[1] == -1 && isinf(out[2]) && out[3] == 2);
    EXPECT_FAIL(PML_UNSUPPORTED, "I32", pml_convert_to_f32(bytes, PML_I32, 4, out, e));
    EXPECT_FAIL(PML_UNSUPPORTED, "?", pml_convert_to_f32(bytes, PML_DTYPE_COUNT, 4, out, e));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_f16),
        cmocka_unit_test(test_unaligned_arrays),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
