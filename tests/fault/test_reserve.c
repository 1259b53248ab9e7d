/* Device memory that a run has reserved, when its processes die: with real coordinators, and
 * workers whose device has 4,000 MiB and is otherwise made up (fake_worker.c). */
#include "history.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "patience.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/net/reserve.h"

#define MIB ((size_t)1 << 20)

static char folder[] = "/tmp/pml-reserve-XXXXXX";
static const char device[] = "fake-device"; /* as fake_worker.c has it */

static int make_folder(void **state)
{
    (void)state;
    return mkdtemp(folder) == NULL || setenv("FAKE_DEVICES", folder, 1) != 0;
}

static int remove_folder(void **state)
{
    (void)state;
    unsetenv("FAKE_DEVICES");
    return pml_tree_remove("/tmp", folder + 5, NULL) != PML_OK;
}

static harness *start_workers(int workers, const char *mib, const char *extra)
{
    setenv("FAKE_RESERVE_MIB", mib, 1);
    harness *h = harness_new(workers, FOR_EVER, extra);
    if (!harness_start(h, NULL))
        fail_msg("%s", h->error);
    return h;
}

static harness *start(const char *mib, const char *extra)
{
    return start_workers(1, mib, extra);
}

/* What is reserved of a device, in MiB; *pending likewise. */
static size_t reserved_of(const char *name, size_t *pending)
{
    size_t n;
    pml_reserved sum;
    pml_error err = PML_ERROR_INIT;
    if (pml_reservation_look(folder, name, NULL, 0, &n, &sum, &err) != PML_OK)
        fail_msg("%s", err.message);
    *pending = sum.pending / MIB;
    return sum.others / MIB;
}

static size_t reserved(size_t *pending)
{
    return reserved_of(device, pending);
}

static void wait_until(const char *name, size_t mib)
{
    size_t pending;
    for (double end = pml_clock_monotonic() + 240; reserved_of(name, &pending) != mib;) {
        if (pml_clock_monotonic() > end)
            fail_msg("%zu MiB are still reserved", reserved_of(name, &pending));
        pml_clock_sleep(0.002);
    }
}

static void wait_until_free(void)
{
    wait_until(device, 0);
}

/* From a death on until the next one stands in its place, at no moment is less reserved; and who
 * asks before the next one has it knows that it is not to be had. */
static void a_replaced_worker_finds_its_own(void **state)
{
    (void)state;
    size_t pending;
    harness *h = start("1000", GOES_ON);
    history_reach(h, 20);
    assert_int_equal(reserved(&pending), 1000);
    assert_int_equal(pending, 0);
    for (int i = 0; i < 3; i++) {
        pid_t pid = harness_worker_pid(h, 0);
        harness_mark(h, "slow", true); /* the next one loads for as long as it is there */
        kill(pid, SIGKILL);
        for (double end = pml_clock_monotonic() + 240; process_is_there(pid) || pending != 1000;) {
            assert_int_equal(reserved(&pending), 1000);
            assert_true(pml_clock_monotonic() < end);
        }
        harness_mark(h, "slow", false);
        history_restart(h, i + 1);
        harness_wait_state(h, "running");
        assert_int_equal(reserved(&pending), 1000);
        assert_int_equal(pending, 0);
    }
    history_stop(h);
    wait_until_free(); /* though the coordinator stays */
    harness_destroy(&h);
}

static void a_worker_keeps_what_its_coordinator_held(void **state)
{
    (void)state;
    size_t pending;
    harness *h = start("1000", NULL);
    history_reach(h, 5);
    pid_t pid = harness_worker_pid(h, 0);
    kill(pid, SIGSTOP); /* or it would save, and end */
    harness_disconnect(h);
    kill(h->coordinator, SIGKILL);
    harness_wait(h);
    assert_int_equal(reserved(&pending), 1000);
    kill(pid, SIGKILL);
    wait_until_free();
    harness_destroy(&h);
}

/* They plan with half of it each, also when they are replaced and have half of it each already. */
static void workers_divide_a_device(void **state)
{
    (void)state;
    size_t pending;
    harness *h = start_workers(2, "2000", GOES_ON);
    history_reach(h, 5);
    assert_int_equal(reserved(&pending), 4000);
    assert_int_equal(pending, 0);
    kill(harness_worker_pid(h, 1), SIGKILL);
    history_restart(h, 1);
    harness_wait_state(h, "running");
    assert_int_equal(reserved(&pending), 4000);
    assert_int_equal(pending, 0);
    history_stop(h);
    wait_until_free();
    harness_destroy(&h);
}

static void workers_have_a_device_each(void **state)
{
    (void)state;
    size_t pending;
    setenv("FAKE_EACH", "1", 1);
    harness *h = start_workers(3, "3000", NULL);
    history_reach(h, 5);
    for (int i = 7; i <= 9; i++) {
        char name[32];
        snprintf(name, sizeof name, "%d0-fake-device", i);
        assert_int_equal(reserved_of(name, &pending), 3000);
        assert_int_equal(pending, 0);
    }
    history_stop(h);
    harness_destroy(&h);
    unsetenv("FAKE_EACH");
}

static const char *reason_of(harness *h)
{
    return pml_message_string(harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL),
                              "reason");
}

/* As another run has it: this process, with so many MiB. */
static pml_reservation *reserve_of(const char *name, size_t mib)
{
    pml_error err = PML_ERROR_INIT;
    pml_reservation *r = NULL;
    const pml_reservation_options options = {.folder = folder,
                                             .device = name,
                                             .run = "/runs/other",
                                             .total = 4000 * MIB,
                                             .inherited = -1};
    if (pml_reservation_new(&options, &r, &err) != PML_OK ||
        pml_reservation_turn(r, 240, NULL, NULL, &err) != PML_OK ||
        pml_reservation_resize(r, mib * MIB, &err) != PML_OK)
        fail_msg("%s", err.message);
    pml_reservation_turn_end(r);
    return r;
}

static pml_reservation *reserve(size_t mib)
{
    return reserve_of(device, mib);
}

static void expect_refusal(const char *mib, const char *begin, const char *end)
{
    char who[100];
    harness *h = start(mib, NULL);
    harness_wait_state(h, "failed");
    const char *reason = reason_of(h);
    snprintf(who, sizeof who, "(the run other (process %d) has reserved ", (int)getpid());
    if (strstr(reason, begin) == NULL || strstr(reason, who) == NULL ||
        strstr(reason, end) == NULL ||
        strstr(reason, "wait until that ends, or take another device") == NULL)
        fail_msg("%s", reason);
    harness_destroy(&h);
}

static void another_run_is_told_who_has_it(void **state)
{
    (void)state;
    size_t pending;
    pml_reservation *other = reserve(3000);
    harness *h = start("1000", NULL);
    history_reach(h, 5); /* beside it */
    assert_int_equal(reserved(&pending), 4000);
    assert_int_equal(pending, 3000);
    history_stop(h);
    harness_destroy(&h);

    /* There is room for its context, but not for its plan; and for neither. */
    expect_refusal("1001", "fake has 1.0 GiB left for this run ",
                   "its plan takes 1.0 GiB; a smaller");
    pml_reservation_destroy(&other);
    other = reserve(3500);
    expect_refusal("1001", "fake has 0.5 GiB left for this run ", "and 580 are wanted");
    assert_int_equal(reserved(&pending), 3500); /* and of who was refused nothing stays */
    pml_reservation_destroy(&other);
    assert_int_equal(reserved(&pending), 0);
}

/* ---- a run that goes on by itself waits for what others have ---- */

/* Another one has 3,000 MiB where this one had 2,000: they were nobody's between its coordinator's
 * death, which its workers follow, and the start of the next ones. */
static harness *start_crowded_of(int workers, const char *name, pml_reservation **other)
{
    harness *h = start_workers(workers, "2000", "\"restart\":\"on-failure\",\"max_restarts\":1");
    history_reach(h, 20);
    harness_mark(h, "slow", true);
    harness_disconnect(h);
    kill(h->coordinator, SIGKILL);
    harness_wait(h);
    wait_until(name, 0);
    *other = reserve_of(name, 3000);
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

    /* It is tried again and again, and each time refused; nothing is held by who waits. */
    for (pid_t last = 0, n = 0; n < 3;) {
        pid_t pid = harness_worker_pid(h, 0);
        n += pid != 0 && pid != last;
        last = pid != 0 ? pid : last;
        harness_receive_for(h, 0.02);
    }
    wait_until(device, 3000);
    pml_reservation_destroy(&other);
    harness_wait_state(h, "running");
    assert_int_equal(reserved(&pending), 2000);
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
    harness *h = start("2000", "\"restart\":\"on-failure\",\"max_restarts\":1");
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
    const char *reason = reason_of(h);
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
    snprintf(answers, sizeof answers, "%s-nvml", folder);
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
    kill(h->adopted, SIGKILL);
    harness_wait_gone(h->adopted, 5);
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

/* A stop that finds a worker gone and its memory with others: nobody can save what was made, and
 * the reason says how much that is. */
static void who_stops_what_waits_is_told_what_is_lost(void **state)
{
    (void)state;
    char words[200];
    setenv("FAKE_PATIENCE", "0.05", 1);
    harness *h = start("1000", "\"restart\":\"on-failure\",\"save_steps\":1000000");
    history_reach(h, 20);
    pml_reservation *other = reserve(3000);
    assert_int_equal(pml_reservation_turn(other, 240, NULL, NULL, NULL), PML_OK);
    kill(harness_worker_pid(h, 0), SIGKILL);
    wait_for_waiting(h, 1);
    unsetenv("FAKE_PATIENCE");
    history_applied(h, harness_command(h, "stop", ""));
    harness_wait_state(h, "stopped");
    int64_t made = 0;
    for (int i = 0; i < h->n_events; i++)
        if (pml_message_type_of(h->events[i]) == PML_EVENT_step)
            made = pml_message_int(h->events[i], "step");
    assert_true(made >= 20);
    snprintf(words, sizeof words,
             "%lld steps since the beginning, there is no checkpoint, are lost: waiting for",
             (long long)made);
    const char *reason = pml_message_string(
        harness_event(h, 0, PML_EVENT_state, "state", "stopped", NULL), "reason");
    if (strstr(reason, words) == NULL)
        fail_msg("%s (%lld steps)", reason, (long long)made);
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
    wait_until("90-fake-device", 0);
    wait_until("80-fake-device", 3000);
    pml_reservation_destroy(&other);
    harness_wait_state(h, "running");
    assert_int_equal(reserved_of("90-fake-device", &pending), 2000);
    assert_int_equal(reserved_of("80-fake-device", &pending), 2000);
    assert_int_equal(history_restarts(h), 1);
    history_stop(h);
    harness_destroy(&h);
    unsetenv("FAKE_EACH");
}

/* Who waits for a device loses patience after the one who has it and waits for a later one; and
 * eight devices leave the last one time for somebody who plans. */
static void patience_lasts_for_the_last_device(void **state)
{
    (void)state;
    for (int devices = 1; devices <= 16; devices++) {
        assert_true(patience_with(60, 0, devices) == 60);
        for (int held = 1; held < devices; held++) {
            double less = patience_with(60, held - 1, devices) - patience_with(60, held, devices);
            assert_true(less > 49.9 / devices);
            assert_true(patience_with(60, held, devices) > 10);
        }
    }
    assert_true(patience_with(60, 7, 8) > 16);
}

/* And for who has the turn to plan: what it has itself stays reserved meanwhile. */
static void a_restart_waits_for_its_turn(void **state)
{
    (void)state;
    size_t pending;
    char who[160];
    setenv("FAKE_PATIENCE", "0.05", 1);
    harness *h = start("1000", "\"restart\":\"on-failure\",\"max_restarts\":1");
    history_reach(h, 20);
    pml_reservation *other = reserve(3000);
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
    assert_int_equal(reserved(&pending), 4000);
    pml_reservation_turn_end(other);
    harness_wait_state(h, "running");
    unsetenv("FAKE_PATIENCE");
    assert_int_equal(reserved(&pending), 4000);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    pml_reservation_destroy(&other);
    harness_destroy(&h);
}

/* It trains, and its log says what is not so. */
static void without_a_reservation_it_trains(void **state)
{
    (void)state;
    char path[128];
    size_t pending;
    snprintf(path, sizeof path, "%s/%s", folder, device);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(symlink("/nowhere", path), 0);
    harness *h = start("1000", NULL);
    history_reach(h, 5);
    const pml_message *warning = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    const char *text = pml_message_string(warning, "message");
    if (strstr(text, "memory of fake is not reserved") == NULL ||
        strstr(text, "is a link, which is not followed here: remove it") == NULL)
        fail_msg("%s", text);
    history_stop(h);
    harness_destroy(&h);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(reserved(&pending), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_replaced_worker_finds_its_own),
        cmocka_unit_test(a_worker_keeps_what_its_coordinator_held),
        cmocka_unit_test(workers_divide_a_device),
        cmocka_unit_test(workers_have_a_device_each),
        cmocka_unit_test(another_run_is_told_who_has_it),
        cmocka_unit_test(a_restart_waits_for_memory),
        cmocka_unit_test(who_is_too_large_for_an_empty_device_does_not_wait),
        cmocka_unit_test(who_lacks_the_hosts_memory_does_not_wait),
        cmocka_unit_test(a_restart_waits_for_a_full_device),
        cmocka_unit_test(a_coordinator_lost_while_it_waits_is_not_counted),
        cmocka_unit_test(who_waits_can_be_stopped),
        cmocka_unit_test(who_stops_what_waits_is_told_what_is_lost),
        cmocka_unit_test(who_waits_for_one_device_has_no_other),
        cmocka_unit_test(patience_lasts_for_the_last_device),
        cmocka_unit_test(a_restart_waits_for_its_turn),
        cmocka_unit_test(without_a_reservation_it_trains),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
