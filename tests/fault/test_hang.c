/* Hung, silent, and only slow. */
#include "history.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/clock.h"

static void wait_for_mark(harness *h, const char *name)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s", h->folder, name);
    for (double end = pml_clock_monotonic() + harness_bound(20); access(path, F_OK) != 0;) {
        if (pml_clock_monotonic() > end)
            fail_msg("there is never a file %s", name);
        pml_clock_sleep(0.005);
    }
}

/* Either rank hangs while the other waits for it in the step's collective: the one that waits is as
 * late as the one that hangs, and never the cause. */
static void a_hung_worker_is_told_from_a_dead_one(void **state)
{
    (void)state;
    for (int rank = 0; rank < 2; rank++) {
        setenv("FAKE_HANG_STEP", "20", 1);
        setenv("FAKE_HANG_RANK", rank == 0 ? "0" : "1", 1);
        harness *h = harness_new(2, FOR_EVER, GOES_ON ",\"hang_timeout\":6");
        assert_true(harness_start(h, NULL));
        const pml_message *m = history_restart(h, 1);
        assert_string_equal(pml_message_string(m, "cause"), "hung");
        assert_int_equal(pml_message_int(m, "rank"), rank);
        assert_non_null(strstr(pml_message_string(m, "reason"), "while stepping"));
        unsetenv("FAKE_HANG_STEP");
        unsetenv("FAKE_HANG_RANK");
        history_reach(h, 30);
        int64_t steps = history_stop(h);
        assert_int_equal(history_check(h), steps);
        assert_true(history_learnt(h, steps) == history_undisturbed(steps));
        harness_destroy(&h);
    }
}

/* Rank 0 saves for longer than a step may take; the other waits for it and is no culprit. */
static void who_waits_for_a_slow_save_does_not_hang(void **state)
{
    (void)state;
    setenv("FAKE_SAVE_MS", "9000", 1);
    harness *h = harness_new(2, FOR_EVER, GOES_ON ",\"hang_timeout\":6,\"save_steps\":5");
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_SAVE_MS");
    history_reach(h, 11); /* the second one waits until the first is written */
    assert_int_equal(history_restarts(h), 0);
    kill(h->coordinator, SIGTERM);
    harness_destroy(&h);
}

/* Nor is a stop's last save one: it may take what saving may. */
static void a_stop_waits_for_a_slow_save(void **state)
{
    (void)state;
    setenv("FAKE_SAVE_MS", "6000", 1);
    harness *h = harness_new(1, FOR_EVER, GOES_ON ",\"hang_timeout\":1");
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_SAVE_MS");
    history_reach(h, 5);
    int64_t steps = history_stop(h);
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "stopped", NULL);
    assert_string_equal(pml_message_string(m, "reason"), "");
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* As it comes: within hang_timeout's 30 s, to the second. */
static void a_hang_is_found_in_time(void **state)
{
    (void)state;
    if (!harness_is_quiet())
        skip();
    setenv("FAKE_HANG_STEP", "20", 1);
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    wait_for_mark(h, "hung");
    double begin = pml_clock_monotonic();
    while (history_restarts(h) == 0 && pml_clock_monotonic() - begin < 60)
        harness_receive_for(h, 0.01);
    double seconds = pml_clock_monotonic() - begin;
    unsetenv("FAKE_HANG_STEP");
    print_message("a hang was found, and its workers ended, after %.2f s\n", seconds);
    assert_in_range((int)(seconds * 100), 2850, 3000);
    harness_destroy(&h);
}

/* A process that is stopped beats no more: when it was only just begun and the other one may wait
 * for it already, at its work, and while it stands. */
static void a_stopped_worker_is_silent(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON ",\"hang_timeout\":2");
    assert_true(harness_start(h, NULL));
    for (int i = 0; i < 3; i++) {
        if (i == 1)
            history_reach(h, 20);
        if (i == 2) {
            harness_command(h, "pause", "");
            harness_wait_state(h, "paused");
        }
        pid_t pid = harness_wait_worker(h, 1);
        kill(pid, SIGSTOP);
        const pml_message *m = history_restart(h, i + 1);
        assert_string_equal(pml_message_string(m, "cause"), "silent");
        assert_int_equal(pml_message_int(m, "rank"), 1);
        assert_false(process_is_there(pid));
        harness_wait_state(h, i < 2 ? "running" : "paused");
    }
    harness_destroy(&h);
}

/* SIGSTOP of the coordinator, and of all of them as when a machine sleeps: longer than a worker may
 * be silent, and nobody is called so. */
static void absence_is_not_held_against_workers(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON ",\"hang_timeout\":5");
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    pid_t all[] = {h->coordinator, harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    for (int n = 1; n <= 3; n += 2) {
        for (int i = 0; i < n; i++)
            kill(all[i], SIGSTOP);
        pml_clock_sleep(6);
        for (int i = n - 1; i >= 0; i--)
            kill(all[i], SIGCONT);
        pml_message *m = harness_ask(h, "status", "");
        int64_t step = pml_message_int(m, "step");
        pml_message_destroy(&m);
        history_reach(h, step + 50);
        assert_int_equal(history_restarts(h), 0);
        assert_int_equal(harness_worker_pid(h, 0), all[1]);
    }
    harness_destroy(&h);
}

/* Until worker 0 makes no more steps: what it has to tell waits at a full door. */
static void wait_for_a_jam(const harness *h)
{
    size_t before = 0, now = 1;
    for (double end = pml_clock_monotonic() + harness_bound(20); now != before;) {
        if (pml_clock_monotonic() > end)
            fail_msg("steps are made for as long as the coordinator is stopped");
        pml_clock_sleep(1);
        char *used = harness_read(h, "used-0.txt");
        before = now;
        now = strlen(used);
        free(used);
    }
}

/* Stopped, or on a disk that does not come back, for so long that what it is told has no room any
 * more: the workers wait for it, every step comes into the history, and nobody is called hung. */
static void what_a_stopped_coordinator_is_told_is_not_lost(void **state)
{
    (void)state;
    enum { STEPS = 8000, FORMER_PATIENCE = 32 };
    setenv("FAKE_STEP_MS", "0", 1);
    harness *h = harness_new(2, STEPS, GOES_ON ",\"hang_timeout\":5");
    harness_mark(h, "slow", true);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    harness_command(h, "pause", "");
    harness_mark(h, "slow", false);
    harness_wait_state(h, "paused");
    /* Its beat is overdue when it hears the resume, and so says that it stands, before it goes on.
     * The next comes a second later: behind the steps, of which the door may be full by then. */
    pid_t teller = harness_worker_pid(h, 0);
    kill(teller, SIGSTOP);
    pml_clock_sleep(1.2);
    harness_command(h, "resume", "");
    kill(teller, SIGCONT);
    history_reach(h, 1);
    kill(h->coordinator, SIGSTOP);
    wait_for_a_jam(h);
    pml_clock_sleep(FORMER_PATIENCE);
    kill(h->coordinator, SIGCONT);
    harness_wait_state(h, "finished");
    assert_int_equal(history_check(h), STEPS);
    assert_int_equal(history_restarts(h), 0);
    harness_destroy(&h);
}

/* A stop waits for a safe point, but not for ever. */
static void a_stop_does_not_wait_for_a_hung_worker(void **state)
{
    (void)state;
    for (int by_signal = 0; by_signal < 2; by_signal++) {
        setenv("FAKE_HANG_STEP", "20", 1);
        harness *h = harness_new(
            2, FOR_EVER, by_signal ? GOES_ON ",\"hang_timeout\":0" : GOES_ON ",\"hang_timeout\":2");
        harness_is_brief();
        assert_true(harness_start(h, NULL));
        wait_for_mark(h, "hung"); /* a stop that comes before is an ordinary one */
        pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
        if (by_signal) { /* the second is meant to be quicker */
            kill(h->coordinator, SIGTERM);
            harness_event(h, 0, PML_EVENT_command, "verb", "stop", NULL);
            kill(h->coordinator, SIGTERM);
        } else {
            harness_command(h, "stop", "");
        }
        harness_disconnect(h);
        assert_int_equal(harness_wait(h), 0);
        unsetenv("FAKE_HANG_STEP");
        assert_false(process_is_there(pids[0]) || process_is_there(pids[1]));
        char *log = harness_read(h, "events.jsonl");
        assert_non_null(strstr(log, "\"state\":\"stopped\""));
        assert_non_null(strstr(log, "stopped by force"));
        assert_null(strstr(log, "\"type\":\"restart\""));
        free(log);
        harness_destroy(&h);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_hung_worker_is_told_from_a_dead_one),
        cmocka_unit_test(a_hang_is_found_in_time),
        cmocka_unit_test(who_waits_for_a_slow_save_does_not_hang),
        cmocka_unit_test(a_stop_waits_for_a_slow_save),
        cmocka_unit_test(a_stopped_worker_is_silent),
        cmocka_unit_test(absence_is_not_held_against_workers),
        cmocka_unit_test(what_a_stopped_coordinator_is_told_is_not_lost),
        cmocka_unit_test(a_stop_does_not_wait_for_a_hung_worker),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
