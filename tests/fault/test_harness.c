/* The harness itself: what a test that ends in the middle leaves behind is reaped. */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "reap.h"

typedef struct processes {
    pid_t coordinator, workers[2];
} processes;

static int n_arguments;
static char **arguments;

/* A run of two workers that goes on by itself; which processes it has. */
static harness *begin(processes *p)
{
    harness *h = harness_new(2, 1000000, "\"restart\":\"on-failure\"");
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "running");
    p->coordinator = h->coordinator;
    for (int rank = 0; rank < 2; rank++)
        p->workers[rank] = harness_worker_pid(h, rank);
    return h;
}

/* A test program of its own, which is killed in the middle of a test. */
static _Noreturn void be_killed(int tell)
{
    processes p;
    if (!harness_programs(n_arguments, arguments))
        _exit(2);
    (void)begin(&p);
    if (write(tell, &p, sizeof p) != sizeof p)
        _exit(2);
    raise(SIGKILL);
    _exit(2);
}

static void a_killed_test_leaves_nothing(void **state)
{
    (void)state;
    int told[2];
    processes p;
    assert_int_equal(pipe(told), 0);
    pid_t child = fork();
    if (child == 0)
        be_killed(told[1]);
    close(told[1]);
    assert_int_equal(read(told[0], &p, sizeof p), sizeof p);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    harness_wait_gone(p.coordinator, 30);
    for (int rank = 0; rank < 2; rank++)
        harness_wait_gone(p.workers[rank], 30);
    /* The one who reaps has the pipe too: at its end it has found nobody any more. */
    char byte;
    assert_int_equal(read(told[0], &byte, 1), 0);
    close(told[0]);
    char entry[64];
    harness_entry(child, entry);
    assert_int_equal(reap_count(entry), 0);
}

/* As after a test that failed: nobody destroyed its harness. */
static void the_next_test_finds_nothing_left(void **state)
{
    (void)state;
    /* Static, and volatile so that it is kept: a leak checker is to find what nobody destroys. */
    static harness *volatile forgotten;
    processes p;
    forgotten = begin(&p);
    assert_non_null(forgotten);
    assert_true(process_is_there(p.workers[0]));
    harness *next = harness_new(1, 10, NULL);
    assert_false(process_is_there(p.coordinator));
    for (int rank = 0; rank < 2; rank++)
        assert_false(process_is_there(p.workers[rank]));
    harness_destroy(&next);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_killed_test_leaves_nothing),
                                       cmocka_unit_test(the_next_test_finds_nothing_left)};
    n_arguments = argc;
    arguments = argv;
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
