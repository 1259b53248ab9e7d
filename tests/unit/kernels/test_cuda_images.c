/* Which compiled image a GPU gets. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h> /* wants the ones above before it */

#include "cuda/images.c"

const pmli_image pmli_images[] = {
    {"rows", "sm_75", 75, false, true, NULL},    {"rows", "compute_75", 75, false, false, NULL},
    {"rows", "sm_80", 80, false, true, NULL},    {"rows", "sm_86", 86, false, true, NULL},
    {"rows", "sm_90a", 90, true, true, NULL},    {"rows", "compute_80", 80, false, false, NULL},
    {"other", "sm_100", 100, false, true, NULL}, {"other", "compute_90a", 90, true, false, NULL},
};
const size_t pmli_image_count = sizeof pmli_images / sizeof *pmli_images;
const char pmli_images_compiler[] = "none";

static void expect_image(const char *family, int capability, const char *target)
{
    const pmli_image *image = pmli_image_for(family, capability);
    if (target == NULL) {
        assert_null(image);
        return;
    }
    assert_non_null(image);
    assert_string_equal(image->target, target);
    assert_string_equal(image->family, family);
}

static void machine_code_of_the_generation(void **state)
{
    (void)state;
    expect_image("rows", 75, "sm_75");
    expect_image("rows", 80, "sm_80");
    expect_image("rows", 86, "sm_86");
    expect_image("rows", 87, "sm_86"); /* the newest that is not newer */
    expect_image("rows", 90, "sm_90a");
}

static void else_the_newest_portable_code(void **state)
{
    (void)state;
    expect_image("rows", 100, "compute_80");
    expect_image("rows", 120, "compute_80");
    expect_image("other", 103, "sm_100");
}

static void else_none(void **state)
{
    (void)state;
    expect_image("rows", 70, NULL);
    expect_image("other", 120, NULL); /* sm_100 is another generation, 90a another chip */
    expect_image("nothing", 90, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(machine_code_of_the_generation),
        cmocka_unit_test(else_the_newest_portable_code),
        cmocka_unit_test(else_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
