/* A run that goes on by itself waits for its device's memory while others have it: what is said,
 * what is counted, what it holds meanwhile, and what a stop saves. */
#include "device.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/file.h"

/* Another one has 3,000 MiB where this one had 2,000: they were nobody's between its coordinator's
 * death, which its workers follow, and the start of the next ones. */
static harness *start_crowded_of(int workers, const char *name, pml_reservation **other)
{
    harness *h = device_start(workers, "2000", "\"restart\":\"on-failure\",\"max_restarts\":1");
    history_reach(h, 20);
    harness_mark(h, "slow", true);
    harness_disconnect(h);
    kill(h->coordinator, SIGKILL);
    harness_wait(h);
    device_wait(name, 0);
    *other = device_reserve(name, 3000);
    harness_adopt(h);
    history_restart(h, 1);
    harness_mark(h, "slow", false);
    return h;
}

static harness *start_crowded(pml_reservation **other)
{
    return start_crowded_of(1, device, other);
}

/* The reason of the n-th state `starting` that waits. */
static const char *wait_for_waiting(harness *h, int n)
{
    for (int at = 0;; at++) {
        const pml_message *m = harness_event(h, at, PML_EVENT_state, "state", "starting", &at);
        const char *reason = pml_message_string(m, "reason");
        if (strncmp(reason, "waiting for memory of ", 22) == 0 && --n == 0)
            return reason;
    }
}

static void a_restart_waits_for_memory(void **state)
{
    (void)state;
    size_t pending;
    char who[100];
    pml_reservation *other;
    harness *h = start_crowded(&other);
    const char *reason = wait_for_waiting(h, 1);
    snprintf(who, sizeof who, "(the run other (process %d) has reserved 2.9 GiB; ", (int)getpid());
    if (strstr(reason, "memory of cpu: fake has 1.0 GiB left for this run ") == NULL ||
        strstr(reason, who) == NULL)
        fail_msg("%s", reason);

    /* It is tried again and again, and each time refused; nothing is held by who waits. Workers say
     * that they load: one that is refused is there for a moment only, and may not be seen. */
    for (int n = 0, at = 0; n < 4; n++, at++)
        harness_event(h, at, PML_EVENT_progress, "what", "loading", &at);
    device_wait(device, 3000);
    pml_reservation_destroy(&other);
    harness_wait_state(h, "running");
    assert_int_equal(device_reserved(device, &pending), 2000);
    assert_int_equal(history_restarts(h), 1); /* of 1: to wait is none */
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* A worker whose successors are refused. */
static harness *start_refused(const char *how)
{
    setenv("FAKE_REFUSED", how, 1);
    harness *h = device_start(1, "2000", "\"restart\":\"on-failure\",\"max_restarts\":1");
    unsetenv("FAKE_REFUSED");
    history_reach(h, 20);
    harness_mark(h, "refused", true);
    kill(harness_worker_pid(h, 0), SIGKILL);
    history_restart(h, 1);
    return h;
}

/* For what no other run can mend: it fails. */
static void expect_failure(const char *how, const char *words)
{
    harness *h = start_refused(how);
    harness_wait_state(h, "failed");
    const char *reason = device_reason(h);
    if (strstr(reason, words) == NULL || strstr(reason, "wait until") != NULL)
        fail_msg("%s", reason);
    harness_destroy(&h);
}

static void who_is_too_large_for_an_empty_device_does_not_wait(void **state)
{
    (void)state;
    expect_failure("large", "fake has 3.9 GiB for this run: its plan takes 4.9 GiB");
}

static void who_lacks_the_hosts_memory_does_not_wait(void **state)
{
    (void)state;
    expect_failure("open", "made to find no memory");
    expect_failure("plan", "made to find no memory");
}

/* By NVML: a process that reserves nothing has it all. */
static void a_restart_waits_for_a_full_device(void **state)
{
    (void)state;
    char answers[64];
    const char *libraries = getenv("TEST_NVML");
    assert_non_null(libraries); /* a folder, from CMake */
    snprintf(answers, sizeof answers, "%s-nvml", device_folder());
    const char full[] = "total 4194304000\nreserved 0\nused 4000000000\n";
    assert_int_equal(pml_file_write(answers, full, sizeof full - 1, 0600, NULL), PML_OK);
    setenv("FAKE_NVML", answers, 1);
    setenv("LD_LIBRARY_PATH", libraries, 1);
    harness *h = start_refused("open");
    const char *reason = wait_for_waiting(h, 1);
    if (strstr(reason, "fake: a process that reserves nothing has its memory") == NULL)
        fail_msg("%s", reason);
    harness_mark(h, "refused", false);
    harness_wait_state(h, "running");
    history_stop(h);
    harness_destroy(&h);
    unsetenv("FAKE_NVML");
    unsetenv("LD_LIBRARY_PATH");
    assert_int_equal(unlink(answers), 0);
}

static void who_waits_can_be_stopped(void **state)
{
    (void)state;
    pml_reservation *other;
    harness *h = start_crowded(&other);
    wait_for_waiting(h, 1);
    history_applied(h, harness_command(h, "stop", ""));
    harness_wait_state(h, "stopped");
    const char *reason = pml_message_string(
        harness_event(h, 0, PML_EVENT_state, "state", "stopped", NULL), "reason");
    if (strstr(reason, " 0 steps since the newest checkpoint, checkpoints/step-") == NULL ||
        strstr(reason, "waiting for memory of cpu: ") == NULL)
        fail_msg("%s", reason);
    pml_reservation_destroy(&other);
    harness_destroy(&h);
}

/* Though nothing is left of max_restarts: it is in the try that it was in. */
static void a_coordinator_lost_while_it_waits_is_not_counted(void **state)
{
    (void)state;
    int at;
    pml_reservation *other;
    harness *h = start_crowded(&other);
    wait_for_waiting(h, 1);
    harness_mark(h, "slow", true);
    harness_catch_up(h);
    at = h->n_events;
    harness_event(h, at, PML_EVENT_progress, "what", "loading", NULL); /* one who takes over */
    harness_kill_coordinator(h);
    harness_adopt(h);
    harness_catch_up(h);
    const pml_message *again = harness_event(h, at, PML_EVENT_restart, NULL, NULL, NULL);
    assert_string_equal(pml_message_string(again, "cause"), "coordinator");
    assert_non_null(strstr(pml_message_string(again, "reason"), "waited for memory"));
    assert_int_equal(pml_message_int(again, "attempt"), 1);
    harness_mark(h, "slow", false);
    pml_reservation_destroy(&other);
    harness_wait_state(h, "running");
    history_reach(h, pml_message_int(again, "step") + 10);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    harness_destroy(&h);
}

/* It has gone on since: that was the one restart of max_restarts, and this would be another. */
static void a_coordinator_lost_after_it_waited_is_counted(void **state)
{
    (void)state;
    pml_reservation *other;
    harness *h = start_crowded(&other);
    wait_for_waiting(h, 1);
    pml_reservation_destroy(&other);
    harness_wait_state(h, "running");
    harness_disconnect(h);
    harness_kill_coordinator(h);
    harness_adopt(h);
    harness_wait_state(h, "failed");
    const char *reason = device_reason(h);
    if (strstr(reason, "the coordinator was lost, and the run has gone on by itself 1 times "
                       "already (max_restarts)") == NULL)
        fail_msg("%s", reason);
    assert_int_equal(history_restarts(h), 1);
    harness_destroy(&h);
}

/* And for who has the turn to plan: what it has itself stays reserved meanwhile. */
static void a_restart_waits_for_its_turn(void **state)
{
    (void)state;
    size_t pending;
    char who[160];
    setenv("FAKE_PATIENCE", "0.05", 1);
    harness *h = device_start(1, "1000", "\"restart\":\"on-failure\",\"max_restarts\":1");
    history_reach(h, 20);
    pml_reservation *other = device_reserve(device, 3000);
    assert_int_equal(pml_reservation_turn(other, 240, NULL, NULL, NULL), PML_OK);
    kill(harness_worker_pid(h, 0), SIGKILL);
    history_restart(h, 1);
    const char *reason = wait_for_waiting(h, 1);
    snprintf(who, sizeof who,
             "memory of cpu: fake: the run other (process %d) has been planning with this GPU's "
             "memory for 0.05 s: ",
             (int)getpid());
    if (strstr(reason, who) == NULL)
        fail_msg("%s", reason);
    assert_int_equal(device_reserved(device, &pending), 4000);
    pml_reservation_turn_end(other);
    harness_wait_state(h, "running");
    unsetenv("FAKE_PATIENCE");
    assert_int_equal(device_reserved(device, &pending), 4000);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    pml_reservation_destroy(&other);
    harness_destroy(&h);
}

/* Two runs that wait for a device each, and have the other's, would do so for ever. */
static void who_waits_for_one_device_has_no_other(void **state)
{
    (void)state;
    size_t pending;
    pml_reservation *other;
    setenv("FAKE_EACH", "1", 1);
    harness *h = start_crowded_of(2, "80-fake-device", &other); /* rank 1's */
    wait_for_waiting(h, 1);
    device_wait("90-fake-device", 0);
    device_wait("80-fake-device", 3000);
    pml_reservation_destroy(&other);
    harness_wait_state(h, "running");
    assert_int_equal(device_reserved("90-fake-device", &pending), 2000);
    assert_int_equal(device_reserved("80-fake-device", &pending), 2000);
    assert_int_equal(history_restarts(h), 1);
    history_stop(h);
    harness_destroy(&h);
    unsetenv("FAKE_EACH");
}

/* Nor has it what it was not started with: rank 0 finds that the file which its reservation was in
 * is gone, and reserves in another one. What it has there when it is ended is its try's alone. */
static void what_a_try_reserves_ends_with_it(void **state)
{
    (void)state;
    static const char first[] = "90-fake-device", second[] = "80-fake-device";
    char path[128];
    enum { CONTEXT = 580 };
    setenv("FAKE_EACH", "1", 1);
    setenv("FAKE_PATIENCE", "0.05", 1);
    harness *h = device_start(2, "1000", "\"restart\":\"on-failure\",\"max_restarts\":1");
    history_reach(h, 20);
    pml_reservation *other = device_reserve(second, 3000);
    assert_int_equal(pml_reservation_turn(other, 240, NULL, NULL, NULL), PML_OK);
    snprintf(path, sizeof path, "%s/%s", device_folder(), first);
    assert_int_equal(unlink(path), 0);
    harness_mark(h, "stuck", true); /* rank 0 stays, until it is ended because of rank 1 */
    kill(harness_worker_pid(h, 0), SIGKILL);
    device_wait(first, CONTEXT);
    device_wait(first, 0);
    wait_for_waiting(h, 1);
    harness_mark(h, "stuck", false);
    pml_reservation_turn_end(other);
    harness_wait_state(h, "running");
    pml_reservation_destroy(&other);
    size_t pending;
    assert_int_equal(device_reserved(first, &pending), 1000);
    assert_int_equal(device_reserved(second, &pending), 1000);
    history_stop(h);
    harness_destroy(&h);
    unsetenv("FAKE_EACH");
    unsetenv("FAKE_PATIENCE");
}

/* ---- a stop while it waits ---- */

/* A run whose workers were killed at a pause, and who else has the turn to plan. */
static harness *start_waiting(int workers, pml_reservation **other)
{
    setenv("FAKE_PATIENCE", "0.05", 1);
    harness *h = device_start(workers, "1000", "\"restart\":\"on-failure\",\"max_restarts\":1");
    history_reach(h, 20);
    history_applied(h, harness_command(h, "pause", ""));
    history_applied(h, harness_command(h, "pause", "")); /* by one that stands: has its snapshot */
    *other = device_reserve(device, 1000);
    assert_int_equal(pml_reservation_turn(*other, 240, NULL, NULL, NULL), PML_OK);
    kill(harness_worker_pid(h, 0), SIGKILL);
    wait_for_waiting(h, 1);
    unsetenv("FAKE_PATIENCE");
    return h;
}

static int64_t last_step(const harness *h)
{
    int64_t step = 0;
    for (int i = 0; i < h->n_events; i++)
        if (pml_message_type_of(h->events[i]) == PML_EVENT_step)
            step = pml_message_int(h->events[i], "step");
    return step;
}

static void expect_stopped(harness *h, const char *words)
{
    harness_wait_state(h, "stopped");
    const char *reason = pml_message_string(
        harness_event(h, 0, PML_EVENT_state, "state", "stopped", NULL), "reason");
    if (strncmp(reason, words, strlen(words)) != 0)
        fail_msg("%s (not: %s)", reason, words);
}

static void end_coordinator(harness *h)
{
    harness_disconnect(h);
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
}

/* What no worker can go on from now is saved by one that needs no device, and somebody who resumes
 * goes on from it as if nothing had been. Of one worker the snapshot may be an older one, where the
 * log was slow. */
static void a_stop_of_what_waits_saves_the_snapshot(void **state)
{
    (void)state;
    char words[100];
    for (int workers = 1; workers <= 2; workers++) {
        pml_reservation *other;
        harness *h = start_waiting(workers, &other);
        const pml_message *restart = history_restart(h, 1);
        assert_string_equal(pml_message_string(restart, "from"), "snapshot");
        int64_t step = pml_message_int(restart, "step"), lost = last_step(h) - step;
        assert_true(workers == 1 || lost == 0);
        history_applied(h, harness_command(h, "stop", ""));
        snprintf(words, sizeof words, "the snapshot in memory is checkpoints/step-%06lld",
                 (long long)step);
        expect_stopped(h, words);
        assert_true(history_learnt(h, step) == history_undisturbed(step));
        end_coordinator(h);
        pml_reservation_destroy(&other);
        assert_true(harness_start(h, "--resume", NULL));
        harness_wait_state(h, "running");
        history_reach(h, step + lost + 20);
        int64_t steps = history_stop(h);
        assert_true(history_learnt(h, steps) == history_undisturbed(steps));
        harness_destroy(&h);
    }
}

/* The one that saves, as it is started. */
static pid_t wait_for_saver(harness *h)
{
    for (int at = 0;; at++) {
        const pml_message *m = harness_event(h, at, PML_EVENT_state, "state", "starting", &at);
        if (strncmp(pml_message_string(m, "reason"), "saving the snapshot of step ", 28) == 0)
            break;
    }
    return harness_wait_worker(h, 0);
}

/* It dies, too, or somebody does not want to wait for it: the reason says what is lost. */
static void who_does_not_wait_for_the_save_is_told_what_is_lost(void **state)
{
    (void)state;
    char words[160];
    for (int by_signal = 0; by_signal < 2; by_signal++) {
        pml_reservation *other;
        harness *h = start_waiting(1, &other);
        harness_mark(h, "held", true);
        if (by_signal)
            kill(h->coordinator, SIGTERM);
        else
            history_applied(h, harness_command(h, "stop", ""));
        pid_t pid = wait_for_saver(h);
        snprintf(words, sizeof words,
                 "stopped by force, %lld steps since the beginning, there is no checkpoint, are "
                 "lost: %s",
                 (long long)last_step(h), by_signal ? "a second signal" : "worker 0 (process ");
        kill(by_signal ? h->coordinator : pid, by_signal ? SIGTERM : SIGKILL);
        if (by_signal) {
            harness_disconnect(h);
            assert_int_equal(harness_wait(h), 0);
            char *log = harness_read(h, "events.jsonl");
            assert_non_null(strstr(log, words));
            free(log);
        } else {
            expect_stopped(h, words);
        }
        harness_wait_gone(pid, 10);
        pml_reservation_destroy(&other);
        harness_destroy(&h);
    }
}

/* As of any last checkpoint: tried again for a while, then it is the run's failure. */
static void a_disk_that_refuses_the_snapshot_is_told(void **state)
{
    (void)state;
    pml_reservation *other;
    harness *h = start_waiting(2, &other);
    char path[200]; /* a folder where the fake writes a file */
    snprintf(path, sizeof path, "%s/checkpoints/step-%06lld.part/MANIFEST", h->folder,
             (long long)last_step(h));
    assert_int_equal(pml_folder_make(path, NULL), PML_OK);
    history_applied(h, harness_command(h, "stop", ""));
    harness_event(h, 0, PML_EVENT_log, "level", "error", NULL);
    harness_wait_state(h, "failed");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_string_equal(pml_message_string(m, "code"), "io");
    if (strstr(pml_message_string(m, "reason"), ".part/MANIFEST") == NULL ||
        strstr(pml_message_string(m, "reason"), " since the beginning, there is no") == NULL)
        fail_msg("%s", pml_message_string(m, "reason"));
    pml_reservation_destroy(&other);
    harness_destroy(&h);
}

/* The stop is in the log, and what the save has made is handed over: the next coordinator has
 * nothing left to do, and to be lost there costs no restart either. */
static void a_coordinator_lost_while_it_saves_is_not_counted(void **state)
{
    (void)state;
    pml_reservation *other;
    harness *h = start_waiting(2, &other);
    int64_t step = last_step(h);
    harness_mark(h, "held", true);
    history_applied(h, harness_command(h, "stop", ""));
    wait_for_saver(h);
    harness_disconnect(h);
    kill(h->coordinator, SIGKILL);
    harness_wait(h);
    harness_mark(h, "held", false);
    harness_adopt(h);
    expect_stopped(h, "stopped by force, 0 steps since the newest checkpoint, checkpoints/step-");
    for (int i = 0; i < h->n_events; i++)
        if (pml_message_type_of(h->events[i]) == PML_EVENT_restart)
            assert_int_equal(pml_message_int(h->events[i], "attempt"), 1);
    assert_int_equal(history_restarts(h), 2);
    assert_true(history_learnt(h, step) == history_undisturbed(step));
    pml_reservation_destroy(&other);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_restart_waits_for_memory),
        cmocka_unit_test(who_is_too_large_for_an_empty_device_does_not_wait),
        cmocka_unit_test(who_lacks_the_hosts_memory_does_not_wait),
        cmocka_unit_test(a_restart_waits_for_a_full_device),
        cmocka_unit_test(who_waits_can_be_stopped),
        cmocka_unit_test(a_coordinator_lost_while_it_waits_is_not_counted),
        cmocka_unit_test(a_coordinator_lost_after_it_waited_is_counted),
        cmocka_unit_test(a_restart_waits_for_its_turn),
        cmocka_unit_test(who_waits_for_one_device_has_no_other),
        cmocka_unit_test(what_a_try_reserves_ends_with_it),
        cmocka_unit_test(a_stop_of_what_waits_saves_the_snapshot),
        cmocka_unit_test(who_does_not_wait_for_the_save_is_told_what_is_lost),
        cmocka_unit_test(a_disk_that_refuses_the_snapshot_is_told),
        cmocka_unit_test(a_coordinator_lost_while_it_saves_is_not_counted),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, device_setup, device_teardown);
}
