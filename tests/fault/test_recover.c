/* A worker dies: the run goes on by itself, exactly, or says why not. */
#include "history.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"

/* Each worker in turn, at its work and while it stands. */
static void a_killed_worker_is_replaced(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 20);
    for (int i = 0; i < 4; i++) {
        pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
        if (i == 2) {
            harness_command(h, "pause", "");
            harness_wait_state(h, "paused");
        }
        kill(pids[i % 2], SIGKILL);
        const pml_message *m = history_restart(h, i + 1);
        assert_string_equal(pml_message_string(m, "cause"), "died");
        assert_string_equal(pml_message_string(m, "from"), "snapshot");
        assert_int_equal(pml_message_int(m, "rank"), i % 2);
        assert_int_equal(pml_message_int(m, "timeline"), i + 1);
        assert_non_null(strstr(pml_message_string(m, "reason"), "killed by signal 9"));
        harness_wait_state(h, i == 2 ? "paused" : "running");
        assert_false(process_is_there(pids[0]) || process_is_there(pids[1]));
        if (i == 2) {
            harness_command(h, "resume", "");
            harness_wait_state(h, "running");
        }
    }
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    assert_int_equal(history_restarts(h), 4);
    harness_destroy(&h);
}

/* What is in force from a step on, as the fake writes it down. */
typedef struct setting {
    int64_t from;
    char line[160];
} setting;

/* The last line of each step is what the run's past has. */
static void check_settings(harness *h, const setting *settings, int n, int64_t steps)
{
    char(*used)[160] = calloc((size_t)steps + 1, sizeof *used);
    char *text = harness_read(h, "used-0.txt"), *rest = text;
    for (char *line = strsep(&rest, "\n"); line != NULL && line[0] != '\0';
         line = strsep(&rest, "\n")) {
        int step, at;
        assert_int_equal(sscanf(line, "%d %n", &step, &at), 1);
        if (step <= steps)
            snprintf(used[step], sizeof *used, "%s", line + at);
    }
    for (int64_t k = 1; k <= steps; k++) {
        int i = n - 1;
        while (settings[i].from > k)
            i--;
        if (strcmp(used[k], settings[i].line) != 0)
            fail_msg("step %lld used %s, not %s", (long long)k, used[k], settings[i].line);
    }
    free(text);
    free(used);
}

/* What was set before the death is in force again at its step, in the steps made again too. */
static void settings_survive_at_their_steps(void **state)
{
    (void)state;
    enum { SETS = 5 };
    setting settings[SETS + 1] = {{1, "0.00050000000000000001 0 0 0 0 constant 0"}};
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    for (int i = 0; i < SETS; i++) {
        const char *schedule = i % 2 == 0 ? "cosine" : "linear";
        char fields[256];
        double rate = 0.001 * (i + 2);
        history_reach(h, 30 * (i + 1));
        snprintf(fields, sizeof fields,
                 "\"learning_rate\":%.17g,\"lora_dropout\":0.%d,"
                 "\"gradient_accumulation_steps\":%d,\"lr_scheduler_type\":\"%s\","
                 "\"warmup_steps\":%d",
                 rate, i + 1, i + 2, schedule, i + 3);
        const pml_message *m = history_applied(h, harness_command(h, "set", fields));
        settings[i + 1].from = pml_message_int(m, "step");
        snprintf(settings[i + 1].line, sizeof settings->line, "%.17g 0 0 %.17g %d %s %d", rate,
                 (i + 1) / 10.0, i + 2, schedule, i + 3);
        kill(harness_worker_pid(h, i % 2), SIGKILL);
        history_restart(h, i + 1);
        harness_wait_state(h, "running");
    }
    int64_t last = settings[SETS].from;
    char step[32];
    int at;
    const pml_message *m = harness_event(h, 0, PML_EVENT_restart, "attempt", "5", &at);
    if (pml_message_int(m, "step") > last) /* the kill came late */
        last = pml_message_int(m, "step");
    snprintf(step, sizeof step, "%lld", (long long)last + 10);
    harness_event(h, at, PML_EVENT_step, "step", step, NULL); /* made in the last life */
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    check_settings(h, settings, SETS + 1, steps);
    harness_destroy(&h);
}

/* The last step that rank 0 has made. */
static int64_t last_used(const harness *h)
{
    long long step = 0;
    char *text = harness_read(h, "used-0.txt"), *rest = text;
    for (char *line = strsep(&rest, "\n"); line != NULL && line[0] != '\0';
         line = strsep(&rest, "\n"))
        assert_int_equal(sscanf(line, "%lld", &step), 1);
    free(text);
    return step;
}

/* The log knows a setting only from rank 0, and it is in the snapshot that the run goes on from:
 * set again, it would be in force from one step on, and by the log from another one. */
static void what_a_snapshot_has_is_not_set_again(void **state)
{
    (void)state;
    setenv("FAKE_MUTE_TUNED", "1", 1);
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    int64_t k = harness_command(h, "set", "\"learning_rate\":0.5");
    harness_wait_mark(h, "kept"); /* is being taken; it is whole when the next step is made */
    history_reach(h, last_used(h) + 1);
    kill(harness_worker_pid(h, 1), SIGKILL);
    const pml_message *m = history_restart(h, 1);
    assert_string_equal(pml_message_string(m, "from"), "snapshot");
    const int64_t from = pml_message_int(m, "step");
    const int64_t at = pml_message_int(history_applied(h, k), "step");
    assert_true(at <= from);
    harness_wait_state(h, "running");
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    const setting settings[] = {{1, "0.00050000000000000001 0 0 0 0 constant 0"},
                                {at, "0.5 0 0 0 0 constant 0"}};
    check_settings(h, settings, 2, steps);
    harness_destroy(&h);
    unsetenv("FAKE_MUTE_TUNED");
}

/* A resume's word on steps that are not finite holds in the workers' next lives too. */
static void skip_survives(void **state)
{
    (void)state;
    setenv("FAKE_NAN_STEP", "400", 1);
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 10);
    history_applied(h, harness_command(h, "resume", "\"nonfinite\":\"skip\""));
    kill(harness_worker_pid(h, 1), SIGKILL);
    history_restart(h, 1);
    history_reach(h, 410); /* it would stand at 400 */
    unsetenv("FAKE_NAN_STEP");
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    harness_destroy(&h);
}

static void it_gives_up_with_the_cause(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, "\"restart\":\"on-failure\",\"max_restarts\":2");
    assert_true(harness_start(h, NULL));
    for (int i = 0; i < 3; i++) {
        harness_wait_state(h, "running");
        kill(harness_worker_pid(h, 1), SIGKILL);
        if (i < 2)
            history_restart(h, i + 1);
    }
    harness_wait_state(h, "failed");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(pml_message_string(m, "reason"), "worker 1"));
    assert_non_null(strstr(pml_message_string(m, "reason"), "killed by signal 9"));
    assert_non_null(strstr(pml_message_string(m, "reason"), "2 times"));
    assert_int_equal(history_restarts(h), 2);
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
        pid_t pid;
        while ((pid = harness_worker_pid(h, 0)) == 0) /* who asks without a pause is refused */
            harness_receive_for(h, 0.01);
        kill(pid, SIGKILL);
        const pml_message *m = history_restart(h, i);
        assert_string_equal(pml_message_string(m, "from"), "start");
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

/* What a worker says would come again: also where the other one, which only saw it leave, has been
 * heard for long, and where its report does not arrive before its end, or never. */
static void an_error_is_not_tried_again(void **state)
{
    (void)state;
    static const struct {
        const char *late_ms, *mute;
    } ways[] = {{"0", "0"}, {"1500", "0"}, {"0", "1"}, {"1500", "1"}};
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        harness *h = harness_new(2, FOR_EVER, "\"restart\":\"on-failure\",\"max_restarts\":1");
        setenv("FAKE_FAIL_STEP", "9", 1);
        setenv("FAKE_LATE_MS", ways[i].late_ms, 1);
        setenv("FAKE_MUTE", ways[i].mute, 1);
        assert_true(harness_start(h, NULL));
        harness_wait_state(h, "failed");
        unsetenv("FAKE_FAIL_STEP");
        unsetenv("FAKE_LATE_MS");
        unsetenv("FAKE_MUTE");
        const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
        const char *reason = pml_message_string(m, "reason");
        if (strstr(reason, "made to fail at step 9") == NULL)
            fail_msg("after %s ms, mute %s: %s", ways[i].late_ms, ways[i].mute, reason);
        assert_int_equal(history_restarts(h), 0);
        harness_destroy(&h);
    }
}

/* The same where it is stopped (as one that gets no processor is) before it has said its word, for
 * longer than a worker that is there has to speak: eleven seconds, so only where time is no matter
 * (tools/chaos/hang.py). */
static void a_word_after_a_silence_counts(void **state)
{
    (void)state;
    if (!harness_is_quiet())
        skip();
    harness *h = harness_new(2, FOR_EVER,
                             "\"restart\":\"on-failure\",\"max_restarts\":1,\"hang_timeout\":120");
    setenv("FAKE_FAIL_STEP", "9", 1);
    setenv("FAKE_LATE_MS", "3000", 1);
    assert_true(harness_start(h, NULL));
    while (harness_worker_pid(h, 0) != 0) /* it has left: the other one is about to say why */
        harness_receive_for(h, 0.05);
    pid_t pid = harness_worker_pid(h, 1);
    assert_true(pid > 0);
    assert_int_equal(kill(pid, SIGSTOP), 0);
    harness_receive_for(h, 11);
    assert_int_equal(history_restarts(h), 0);
    assert_int_equal(kill(pid, SIGCONT), 0);
    harness_wait_state(h, "failed");
    unsetenv("FAKE_FAIL_STEP");
    unsetenv("FAKE_LATE_MS");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(pml_message_string(m, "reason"), "made to fail at step 9"));
    assert_int_equal(history_restarts(h), 0);
    harness_destroy(&h);
}

/* ---- nothing is left, and nobody else is touched ---- */

static int open_descriptors(pid_t pid)
{
    char path[64];
    int n = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *dir = opendir(path);
    for (struct dirent *e = dir == NULL ? NULL : readdir(dir); e != NULL; e = readdir(dir))
        n += e->d_name[0] != '.';
    if (dir != NULL)
        closedir(dir);
    return n;
}

/* A stranger that is called as our workers are. */
static pid_t stranger(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        execl("/bin/sleep", "pml-worker", "1000", (char *)NULL);
        _exit(127);
    }
    return pid;
}

static void restarts_leave_nothing_behind(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON); /* reaps what a test before has left */
    pid_t foreign = stranger();
    assert_true(harness_start(h, NULL));
    int descriptors = 0;
    for (int i = 0; i < 5; i++) {
        harness_wait_state(h, "running");
        if (i == 1) /* after the first restart; the door of a dead worker closes a moment later */
            descriptors = open_descriptors(h->coordinator);
        pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
        kill(pids[i % 2], SIGKILL);
        history_restart(h, i + 1);
        assert_false(process_is_there(pids[0]) || process_is_there(pids[1]));
    }
    harness_wait_state(h, "running");
    for (double end = pml_clock_monotonic() + harness_bound(10);
         open_descriptors(h->coordinator) > descriptors + 2;) {
        if (pml_clock_monotonic() > end)
            fail_msg("%d descriptors, after the first restart it had %d",
                     open_descriptors(h->coordinator), descriptors);
        pml_clock_sleep(0.05);
    }
    harness_destroy(&h);
    assert_true(process_is_there(foreign));
    kill(foreign, SIGKILL);
    waitpid(foreign, NULL, 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_killed_worker_is_replaced),
        cmocka_unit_test(settings_survive_at_their_steps),
        cmocka_unit_test(what_a_snapshot_has_is_not_set_again),
        cmocka_unit_test(skip_survives),
        cmocka_unit_test(it_gives_up_with_the_cause),
        cmocka_unit_test(delays_grow),
        cmocka_unit_test(an_error_is_not_tried_again),
        cmocka_unit_test(a_word_after_a_silence_counts),
        cmocka_unit_test(restarts_leave_nothing_behind),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
