/* The loss scale's rule: what is found by trying, and what follows from update to update. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "pml/train/loss_scale.h"

/* Against a device whose gradients are finite up to the exponent `bears`. */
static int tries_to_find(int bears, double *found)
{
    pml_loss_scale_search search = pml_loss_scale_search_begin();
    int tries = 0;
    for (double scale; (scale = pml_loss_scale_try(&search)) > 0; tries++) {
        int exponent;
        assert_true(frexp(scale, &exponent) == 0.5); /* a power of two */
        assert_in_range(tries, 0, 9);
        pml_loss_scale_tried(&search, exponent - 1 <= bears);
    }
    *found = pml_loss_scale_found(&search);
    return tries;
}

static void test_search(void **state)
{
    (void)state;
    for (int bears = -30; bears <= 40; bears++) {
        double found;
        int most = bears < PML_LOSS_SCALE_MOST ? bears : PML_LOSS_SCALE_MOST;
        int want = most - PML_LOSS_SCALE_HEADROOM;
        assert_in_range(tries_to_find(bears, &found), 4, 5);
        assert_true(found == ldexp(1, want > PML_LOSS_SCALE_LEAST ? want : PML_LOSS_SCALE_LEAST));
    }
}

static void test_back_off(void **state)
{
    (void)state;
    pml_loss_scale s = {.value = 64, .finite = 1500, .dynamic = true};
    assert_true(pml_loss_scale_next(&s, false));
    assert_true(s.value == 32 && s.finite == 0);
    assert_false(pml_loss_scale_next(&s, true));
    assert_true(s.value == 32 && s.finite == 1);
    for (int i = 0; i < 13; i++)
        assert_true(pml_loss_scale_next(&s, false));
    assert_true(s.value == ldexp(1, PML_LOSS_SCALE_LEAST));
    assert_false(pml_loss_scale_next(&s, false)); /* nothing smaller can help */
    assert_true(s.value == ldexp(1, PML_LOSS_SCALE_LEAST));
}

static void test_growth(void **state)
{
    (void)state;
    pml_loss_scale s = {.value = ldexp(1, PML_LOSS_SCALE_MOST - 1), .dynamic = true};
    for (int i = 1; i < PML_LOSS_SCALE_INTERVAL; i++)
        assert_false(pml_loss_scale_next(&s, true));
    assert_true(s.value == ldexp(1, PML_LOSS_SCALE_MOST - 1));
    assert_false(pml_loss_scale_next(&s, true));
    assert_true(s.value == ldexp(1, PML_LOSS_SCALE_MOST) && s.finite == 0);
    for (int i = 0; i < 2 * PML_LOSS_SCALE_INTERVAL; i++)
        assert_false(pml_loss_scale_next(&s, true));
    assert_true(s.value == ldexp(1, PML_LOSS_SCALE_MOST)); /* and no further */
}

/* Not float16: a gradient that is not finite is no overflow. */
static void test_fixed(void **state)
{
    (void)state;
    pml_loss_scale s = {.value = 1};
    assert_false(pml_loss_scale_next(&s, false));
    for (int i = 0; i < PML_LOSS_SCALE_INTERVAL + 1; i++)
        assert_false(pml_loss_scale_next(&s, true));
    assert_true(s.value == 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_search),
                                       cmocka_unit_test(test_back_off),
                                       cmocka_unit_test(test_growth), cmocka_unit_test(test_fixed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
