/* state.json: the loss scale that a run goes on with, and numbers that none can have. */
#include "snapshot.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char path[] = "/tmp/pml-state-XXXXXX";

static pml_status through_file(pml_loss_scale scale, pml_loss_scale *back, pml_error *err)
{
    pml_train_state state = {.step = 3, .applied = 2, .accumulation = 1, .loss_scale = scale}, read;
    assert_int_equal(pmli_state_write(path, &state, err), PML_OK);
    pml_status status = pmli_state_read(path, &read, err);
    if (status == PML_OK)
        *back = read.loss_scale;
    return status;
}

static void test_scale_comes_back(void **unused)
{
    (void)unused;
    static const pml_loss_scale all[] = {{2048, 7, true},
                                         {0, 0, true}, /* to be found */
                                         {0x1p-8, PML_LOSS_SCALE_INTERVAL - 1, true},
                                         {0x1p127, PML_LOSS_SCALE_INTERVAL, true},
                                         {1, 0, false}};
    pml_error err = PML_ERROR_INIT;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        pml_loss_scale back;
        assert_int_equal(through_file(all[i], &back, &err), PML_OK);
        assert_memory_equal(&back, &all[i], sizeof back);
    }
}

static void test_what_no_run_has_is_refused(void **unused)
{
    (void)unused;
    static const struct {
        pml_loss_scale scale;
        const char *field;
    } bad[] = {{{-1, 0, true}, "value"},
               {{0x1p128, 0, true}, "value"}, /* infinite in float32 */
               {{1, -1, true}, "finite"},
               {{1, INT32_MAX, true}, "finite"}}; /* one is added to it */
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        pml_error err = PML_ERROR_INIT;
        pml_loss_scale back;
        assert_int_equal(through_file(bad[i].scale, &back, &err), PML_INVALID);
        assert_non_null(strstr(err.message, "loss_scale"));
        assert_non_null(strstr(err.message, bad[i].field));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_scale_comes_back),
                                       cmocka_unit_test(test_what_no_run_has_is_refused)};
    int file = mkstemp(path);
    if (file < 0)
        return EXIT_FAILURE;
    close(file);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return failed;
}
