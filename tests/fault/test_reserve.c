/* Device memory that a run has reserved, when its processes die: with real coordinators, and
 * workers whose device is made up. */
#include "device.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "patience.h"
#include "pml/base/clock.h"

/* From a death on until the next one stands in its place, at no moment is less reserved; and who
 * asks before the next one has it knows that it is not to be had. */
static void a_replaced_worker_finds_its_own(void **state)
{
    (void)state;
    size_t pending;
    harness *h = device_start(1, "1000", GOES_ON);
    history_reach(h, 20);
    assert_int_equal(device_reserved(device, &pending), 1000);
    assert_int_equal(pending, 0);
    for (int i = 0; i < 3; i++) {
        pid_t pid = harness_worker_pid(h, 0);
        harness_mark(h, "slow", true); /* the next one loads for as long as it is there */
        kill(pid, SIGKILL);
        for (double end = pml_clock_monotonic() + 240; process_is_there(pid) || pending != 1000;) {
            assert_int_equal(device_reserved(device, &pending), 1000);
            assert_true(pml_clock_monotonic() < end);
        }
        harness_mark(h, "slow", false);
        history_restart(h, i + 1);
        harness_wait_state(h, "running");
        assert_int_equal(device_reserved(device, &pending), 1000);
        assert_int_equal(pending, 0);
    }
    history_stop(h);
    device_wait(device, 0); /* though the coordinator stays */
    harness_destroy(&h);
}

static void a_worker_keeps_what_its_coordinator_held(void **state)
{
    (void)state;
    size_t pending;
    harness *h = device_start(1, "1000", NULL);
    history_reach(h, 5);
    pid_t pid = harness_worker_pid(h, 0);
    kill(pid, SIGSTOP); /* or it would save, and end */
    harness_disconnect(h);
    kill(h->coordinator, SIGKILL);
    harness_wait(h);
    assert_int_equal(device_reserved(device, &pending), 1000);
    kill(pid, SIGKILL);
    device_wait(device, 0);
    harness_destroy(&h);
}

/* They plan with half of it each, also when they are replaced and have half of it each already. */
static void workers_divide_a_device(void **state)
{
    (void)state;
    size_t pending;
    harness *h = device_start(2, "2000", GOES_ON);
    history_reach(h, 5);
    assert_int_equal(device_reserved(device, &pending), 4000);
    assert_int_equal(pending, 0);
    kill(harness_worker_pid(h, 1), SIGKILL);
    history_restart(h, 1);
    harness_wait_state(h, "running");
    assert_int_equal(device_reserved(device, &pending), 4000);
    assert_int_equal(pending, 0);
    history_stop(h);
    device_wait(device, 0);
    harness_destroy(&h);
}

static void workers_have_a_device_each(void **state)
{
    (void)state;
    size_t pending;
    setenv("FAKE_EACH", "1", 1);
    harness *h = device_start(3, "3000", NULL);
    history_reach(h, 5);
    for (int i = 7; i <= 9; i++) {
        char name[32];
        snprintf(name, sizeof name, "%d0-fake-device", i);
        assert_int_equal(device_reserved(name, &pending), 3000);
        assert_int_equal(pending, 0);
    }
    history_stop(h);
    harness_destroy(&h);
    unsetenv("FAKE_EACH");
}

static void expect_refusal(const char *mib, const char *begin, const char *end)
{
    char who[100];
    harness *h = device_start(1, mib, NULL);
    harness_wait_state(h, "failed");
    const char *reason = device_reason(h);
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
    pml_reservation *other = device_reserve(device, 3000);
    harness *h = device_start(1, "1000", NULL);
    history_reach(h, 5); /* beside it */
    assert_int_equal(device_reserved(device, &pending), 4000);
    assert_int_equal(pending, 3000);
    history_stop(h);
    harness_destroy(&h);

    /* There is room for its context, but not for its plan; and for neither. */
    expect_refusal("1001", "fake has 1.0 GiB left for this run ",
                   "its plan takes 1.0 GiB; a smaller");
    pml_reservation_destroy(&other);
    other = device_reserve(device, 3500);
    expect_refusal("1001", "fake has 0.5 GiB left for this run ", "and 580 are wanted");
    assert_int_equal(device_reserved(device, &pending),
                     3500); /* and of who was refused nothing stays */
    pml_reservation_destroy(&other);
    assert_int_equal(device_reserved(device, &pending), 0);
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

/* It trains, and its log says what is not so. */
static void without_a_reservation_it_trains(void **state)
{
    (void)state;
    char path[128];
    size_t pending;
    snprintf(path, sizeof path, "%s/%s", device_folder(), device);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(symlink("/nowhere", path), 0);
    harness *h = device_start(1, "1000", NULL);
    history_reach(h, 5);
    const pml_message *warning = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    const char *text = pml_message_string(warning, "message");
    if (strstr(text, "memory of fake is not reserved") == NULL ||
        strstr(text, "is a link, which is not followed here: remove it") == NULL)
        fail_msg("%s", text);
    history_stop(h);
    harness_destroy(&h);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(device_reserved(device, &pending), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_replaced_worker_finds_its_own),
        cmocka_unit_test(a_worker_keeps_what_its_coordinator_held),
        cmocka_unit_test(workers_divide_a_device),
        cmocka_unit_test(workers_have_a_device_each),
        cmocka_unit_test(another_run_is_told_who_has_it),
        cmocka_unit_test(patience_lasts_for_the_last_device),
        cmocka_unit_test(without_a_reservation_it_trains),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, device_setup, device_teardown);
}
