/* Starting a child where descriptors are few: it starts, or it is said why it does not; what the
 * coordinator has open, its log above all, is never written to. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "scratch.h"
#include "spawn.h"

enum { OPEN = 24, GIVEN = 5, ROOM = 24 };

static const char content[] = "{\"seq\":1, a line of a log";

/* All numbers that a child is given are ours already, as in a coordinator. */
static void open_many(int *files, int *last)
{
    put_file(scratch("ours"), content, sizeof content);
    for (int i = 0; i < OPEN; i++)
        assert_true((files[i] = open(scratch("ours"), O_RDWR | O_CLOEXEC)) >= 0);
    *last = files[OPEN - 1];
}

static void expect_ours_untouched(void)
{
    char *text;
    size_t size;
    EXPECT_OK(pml_file_read(scratch("ours"), 1000, false, &text, &size, e));
    assert_int_equal(size, sizeof content);
    assert_memory_equal(text, content, size);
    free(text);
}

static void set_limit(rlim_t files)
{
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = files;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

static void few_descriptors_harm_nothing(void **state)
{
    (void)state;
    int files[OPEN], last, begun = 0, refused = 0;
    struct rlimit before;
    const char *argv[] = {"/bin/true", NULL};
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    open_many(files, &last);
    for (int more = 1; more <= ROOM; more++) {
        pid_t pid;
        pml_error err = PML_ERROR_INIT;
        spawn s = {.argv = argv, .log_path = scratch("log"), .out = -1, .dies_with_us = true};
        for (int i = 0; i < GIVEN; i++)
            s.fds[i] = files[i];
        s.fds[GIVEN] = SPAWN_END;
        set_limit((rlim_t)(last + more));
        pml_status status = spawn_process(&s, &pid, &err);
        set_limit(before.rlim_cur);
        if (status == PML_OK) {
            int how;
            assert_int_equal(waitpid(pid, &how, 0), pid);
            assert_int_equal(how, 0); /* it became what it was to be */
            begun++;
        } else {
            if (strstr(err.message, "ulimit -n") == NULL)
                fail_msg("limit %d: %s", last + more, err.message);
            refused++;
        }
        expect_ours_untouched();
    }
    assert_true(begun > 0 && refused > 0);
    for (int i = 0; i < OPEN; i++)
        close(files[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(few_descriptors_harm_nothing)};
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
