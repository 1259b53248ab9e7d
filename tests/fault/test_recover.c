/* What goes on by itself: a worker or the coordinator dies, hangs or falls silent. */
#include "harness.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"

#define GOES_ON "\"restart\":\"on-failure\",\"max_restarts\":100"

static const char *text_of(const pml_message *m, const char *field)
{
    return pml_message_string(m, field);
}

/* The restarts that the log has so far. */
static int restarts(harness *h)
{
    int n = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++)
        n += pml_message_type_of(h->events[i]) == PML_EVENT_restart;
    return n;
}

/* Steps of the current timeline are 1, 2, … without a gap, each with the learning rate of the last
 * set at or before it; `rates[k]` is that of step k. Returns the number of steps. */
static int64_t check_history(harness *h, const double *rates)
{
    int64_t step = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++) {
        const pml_message *m = h->events[i];
        if (pml_message_type_of(m) == PML_EVENT_restart)
            assert_true(pml_message_int(m, "step") <= step);
        if (pml_message_type_of(m) == PML_EVENT_restart)
            step = pml_message_int(m, "step");
        if (pml_message_type_of(m) != PML_EVENT_step)
            continue;
        if (pml_message_int(m, "step") != ++step)
            fail_msg("step %lld follows %lld", (long long)pml_message_int(m, "step"),
                     (long long)step - 1);
        if (rates != NULL && pml_message_number(m, "learning_rate") != rates[step])
            fail_msg("step %lld used %g, not %g", (long long)step,
                     pml_message_number(m, "learning_rate"), rates[step]);
    }
    return step;
}

/* The number that the fake learns, from its last checkpoint: equal numbers are equal histories. */
static unsigned long long learnt(const harness *h, int step)
{
    char name[64];
    snprintf(name, sizeof name, "checkpoints/step-%06d/state.json", step);
    char *text = harness_read(h, name), *at = strstr(text, "\"learnt\":");
    assert_non_null(at);
    unsigned long long number = strtoull(at + 9, NULL, 10);
    free(text);
    return number;
}

/* Wait until the run has made `step` in its current timeline. */
static void reach(harness *h, int64_t step)
{
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)step);
    harness_event(h, 0, PML_EVENT_step, "step", number, NULL);
}

static unsigned long long undisturbed(int steps)
{
    harness *h = harness_new(2, steps, NULL);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    unsigned long long number = learnt(h, steps);
    harness_destroy(&h);
    return number;
}

/* Each worker in turn, at its work, loading, and while it stands. */
static void a_killed_worker_is_replaced(void **state)
{
    (void)state;
    enum { STEPS = 300 };
    setenv("FAKE_STEP_MS", "4", 1);
    unsigned long long want = undisturbed(STEPS);
    harness *h = harness_new(2, STEPS, GOES_ON);
    assert_true(harness_start(h, NULL));
    reach(h, 20);
    for (int i = 0; i < 4; i++) {
        int before = restarts(h);
        pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
        if (i == 2) {
            harness_command(h, "pause", "");
            harness_wait_state(h, "paused");
        }
        kill(pids[i % 2], SIGKILL);
        char attempt[16];
        snprintf(attempt, sizeof attempt, "%d", before + 1);
        const pml_message *m = harness_event(h, 0, PML_EVENT_restart, "attempt", attempt, NULL);
        assert_string_equal(text_of(m, "cause"), "died");
        assert_string_equal(text_of(m, "from"), "snapshot");
        assert_int_equal(pml_message_int(m, "rank"), i % 2);
        assert_int_equal(pml_message_int(m, "timeline"), before + 1);
        assert_non_null(strstr(text_of(m, "reason"), "killed by signal 9"));
        harness_wait_state(h, i == 2 ? "paused" : "running");
        assert_false(process_is_there(pids[0]) || process_is_there(pids[1]));
        if (i == 2) {
            harness_command(h, "resume", "");
            harness_wait_state(h, "running");
        }
    }
    harness_wait_state(h, "finished");
    unsetenv("FAKE_STEP_MS");
    assert_int_equal(check_history(h, NULL), STEPS);
    assert_true(learnt(h, STEPS) == want);
    harness_destroy(&h);
}

/* What was set before the death is in force again at its step, in the steps made again too. */
static void settings_survive_at_their_steps(void **state)
{
    (void)state;
    enum { STEPS = 400 };
    static double rates[STEPS + 1];
    setenv("FAKE_STEP_MS", "4", 1);
    harness *h = harness_new(2, STEPS, GOES_ON);
    assert_true(harness_start(h, NULL));
    for (int i = 1; i <= STEPS; i++)
        rates[i] = 0.0005;
    for (int i = 0; i < 5; i++) {
        char fields[64], number[32];
        reach(h, 30 * (i + 1));
        double rate = 0.001 * (i + 2);
        snprintf(fields, sizeof fields, "\"learning_rate\":%.17g", rate);
        snprintf(number, sizeof number, "%lld", (long long)harness_command(h, "set", fields));
        const pml_message *m = harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
        for (int64_t k = pml_message_int(m, "step"); k <= STEPS; k++)
            rates[k] = rate;
        kill(harness_worker_pid(h, i % 2), SIGKILL);
        snprintf(number, sizeof number, "%d", i + 1);
        harness_event(h, 0, PML_EVENT_restart, "attempt", number, NULL);
        harness_wait_state(h, "running");
    }
    harness_wait_state(h, "finished");
    unsetenv("FAKE_STEP_MS");
    assert_int_equal(check_history(h, rates), STEPS);
    harness_destroy(&h);
}

static void it_gives_up_with_the_cause(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, "\"restart\":\"on-failure\",\"max_restarts\":2");
    assert_true(harness_start(h, NULL));
    for (int i = 0; i < 3; i++) {
        harness_wait_state(h, "running");
        kill(harness_worker_pid(h, 1), SIGKILL);
        if (i < 2) {
            char attempt[16];
            snprintf(attempt, sizeof attempt, "%d", i + 1);
            harness_event(h, 0, PML_EVENT_restart, "attempt", attempt, NULL);
        }
    }
    harness_wait_state(h, "failed");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(text_of(m, "reason"), "worker 1"));
    assert_non_null(strstr(text_of(m, "reason"), "killed by signal 9"));
    assert_non_null(strstr(text_of(m, "reason"), "2 times"));
    assert_int_equal(restarts(h), 2);
    harness_destroy(&h);
}

/* Killed again and again before it comes on: it waits longer each time. */
static void delays_grow(void **state)
{
    (void)state;
    setenv("FAKE_LOAD_MS", "60000", 1);
    harness *h = harness_new(1, 100, GOES_ON);
    assert_true(harness_start(h, NULL));
    double last = 0;
    for (int i = 1; i <= 3; i++) {
        pid_t pid = 0;
        while (pid == 0)
            pid = harness_worker_pid(h, 0);
        kill(pid, SIGKILL);
        char attempt[16];
        snprintf(attempt, sizeof attempt, "%d", i);
        const pml_message *m = harness_event(h, 0, PML_EVENT_restart, "attempt", attempt, NULL);
        assert_string_equal(text_of(m, "from"), "start");
        assert_true(pml_message_number(m, "delay") > last);
        last = pml_message_number(m, "delay");
        harness_wait_state(h, "starting");
        while (harness_worker_pid(h, 0) == pid)
            harness_receive_for(h, 0.01);
    }
    unsetenv("FAKE_LOAD_MS");
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    harness_destroy(&h);
}

/* What a worker says would come again. */
static void an_error_is_not_tried_again(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, GOES_ON);
    setenv("FAKE_FAIL_STEP", "9", 1);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "failed");
    unsetenv("FAKE_FAIL_STEP");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(text_of(m, "reason"), "made to fail at step 9"));
    assert_int_equal(restarts(h), 0);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_killed_worker_is_replaced),
        cmocka_unit_test(settings_survive_at_their_steps),
        cmocka_unit_test(it_gives_up_with_the_cause),
        cmocka_unit_test(delays_grow),
        cmocka_unit_test(an_error_is_not_tried_again),
    };
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
