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
#include "pml/net/connection.h"

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

/* The last line of each step is what the run's past has: the settings beside the rates, as the
 * fake writes them down. */
static void check_settings(harness *h, char (*settings)[80], int steps)
{
    char(*used)[80] = calloc((size_t)steps + 1, sizeof *used);
    char *text = harness_read(h, "used-0.txt"), *rest = text;
    for (char *line = strsep(&rest, "\n"); line != NULL && line[0] != '\0';
         line = strsep(&rest, "\n")) {
        int step, at;
        assert_int_equal(sscanf(line, "%d %*s %*s %*s %n", &step, &at), 1);
        assert_in_range(step, 1, steps);
        snprintf(used[step], sizeof *used, "%s", line + at);
    }
    for (int k = 1; k <= steps; k++)
        if (strcmp(used[k], settings[k]) != 0)
            fail_msg("step %d used %s, not %s", k, used[k], settings[k]);
    free(text);
    free(used);
}

/* What was set before the death is in force again at its step, in the steps made again too. */
static void settings_survive_at_their_steps(void **state)
{
    (void)state;
    enum { STEPS = 400 };
    static double rates[STEPS + 1];
    static char settings[STEPS + 1][80];
    setenv("FAKE_STEP_MS", "4", 1);
    harness *h = harness_new(2, STEPS, GOES_ON);
    assert_true(harness_start(h, NULL));
    for (int i = 1; i <= STEPS; i++)
        rates[i] = 0.0005;
    for (int i = 1; i <= STEPS; i++)
        snprintf(settings[i], sizeof *settings, "0 0 constant 0");
    for (int i = 0; i < 5; i++) {
        char fields[256], number[32];
        reach(h, 30 * (i + 1));
        double rate = 0.001 * (i + 2);
        snprintf(fields, sizeof fields,
                 "\"learning_rate\":%.17g,\"lora_dropout\":0.%d,"
                 "\"gradient_accumulation_steps\":%d,\"lr_scheduler_type\":\"%s\","
                 "\"warmup_steps\":%d",
                 rate, i + 1, i + 2, i % 2 == 0 ? "cosine" : "linear", i + 3);
        snprintf(number, sizeof number, "%lld", (long long)harness_command(h, "set", fields));
        const pml_message *m = harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
        for (int64_t k = pml_message_int(m, "step"); k <= STEPS; k++)
            rates[k] = rate;
        for (int64_t k = pml_message_int(m, "step"); k <= STEPS; k++)
            snprintf(settings[k], sizeof *settings, "%.17g %d %s %d", (i + 1) / 10.0, i + 2,
                     i % 2 == 0 ? "cosine" : "linear", i + 3);
        kill(harness_worker_pid(h, i % 2), SIGKILL);
        snprintf(number, sizeof number, "%d", i + 1);
        harness_event(h, 0, PML_EVENT_restart, "attempt", number, NULL);
        harness_wait_state(h, "running");
    }
    harness_wait_state(h, "finished");
    unsetenv("FAKE_STEP_MS");
    assert_int_equal(check_history(h, rates), STEPS);
    check_settings(h, settings, STEPS);
    harness_destroy(&h);
}

/* A resume's word on steps that are not finite holds in the workers' next lives too. */
static void skip_survives(void **state)
{
    (void)state;
    enum { STEPS = 300 };
    setenv("FAKE_STEP_MS", "4", 1);
    setenv("FAKE_NAN_STEP", "250", 1);
    harness *h = harness_new(2, STEPS, GOES_ON);
    assert_true(harness_start(h, NULL));
    reach(h, 10);
    int64_t number = harness_command(h, "resume", "\"nonfinite\":\"skip\"");
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)number);
    harness_event(h, 0, PML_EVENT_applied, "command", text, NULL);
    kill(harness_worker_pid(h, 1), SIGKILL);
    harness_event(h, 0, PML_EVENT_restart, "attempt", "1", NULL);
    harness_wait_state(h, "finished");
    unsetenv("FAKE_STEP_MS");
    unsetenv("FAKE_NAN_STEP");
    assert_int_equal(check_history(h, NULL), STEPS);
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

/* ---- hung, silent, and only slow ---- */

/* Who is late first among processes that wait for a busy processor says nothing: these run where
 * nothing else does, as `make chaos` sees to. */
static void on_a_quiet_machine(void)
{
    if (!harness_is_quiet())
        skip();
}

static void a_hung_worker_is_told_from_a_dead_one(void **state)
{
    (void)state;
    on_a_quiet_machine();
    enum { STEPS = 60 };
    unsigned long long want = undisturbed(STEPS);
    setenv("FAKE_HANG_STEP", "20", 1);
    harness *h = harness_new(2, STEPS, GOES_ON ",\"hang_timeout\":3");
    assert_true(harness_start(h, NULL));
    const pml_message *m = harness_event(h, 0, PML_EVENT_restart, "attempt", "1", NULL);
    assert_string_equal(text_of(m, "cause"), "hung");
    assert_int_equal(pml_message_int(m, "rank"), 1); /* not the one that waits for it */
    assert_non_null(strstr(text_of(m, "reason"), "while stepping"));
    harness_wait_state(h, "finished");
    unsetenv("FAKE_HANG_STEP");
    assert_int_equal(check_history(h, NULL), STEPS);
    assert_true(learnt(h, STEPS) == want);
    assert_int_equal(restarts(h), 1);
    harness_destroy(&h);
}

/* A process that is stopped beats no more: at its work, and while it stands. */
static void a_stopped_worker_is_silent(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, GOES_ON ",\"hang_timeout\":3");
    assert_true(harness_start(h, NULL));
    for (int i = 0; i < 2; i++) {
        if (i == 1) {
            harness_command(h, "pause", "");
            harness_wait_state(h, "paused");
        }
        pid_t pid = harness_worker_pid(h, 1);
        kill(pid, SIGSTOP);
        char attempt[16];
        snprintf(attempt, sizeof attempt, "%d", i + 1);
        const pml_message *m = harness_event(h, 0, PML_EVENT_restart, "attempt", attempt, NULL);
        assert_string_equal(text_of(m, "cause"), "silent");
        assert_int_equal(pml_message_int(m, "rank"), 1);
        assert_false(process_is_there(pid));
        harness_wait_state(h, i == 0 ? "running" : "paused");
    }
    harness_destroy(&h);
}

/* SIGSTOP of the coordinator, and of all of them as when a machine sleeps: longer than a worker may
 * be silent, and nobody is called so. */
static void absence_is_not_held_against_workers(void **state)
{
    (void)state;
    on_a_quiet_machine();
    harness *h = harness_new(2, 100000, GOES_ON ",\"hang_timeout\":4");
    setenv("FAKE_STEP_MS", "10", 1);
    assert_true(harness_start(h, NULL));
    reach(h, 5);
    pid_t all[] = {h->coordinator, harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    for (int n = 1; n <= 3; n += 2) {
        for (int i = 0; i < n; i++)
            kill(all[i], SIGSTOP);
        pml_clock_sleep(5);
        for (int i = n - 1; i >= 0; i--)
            kill(all[i], SIGCONT);
        pml_message *m = harness_ask(h, "status", "");
        int64_t step = pml_message_int(m, "step");
        pml_message_destroy(&m);
        reach(h, step + 50);
        assert_int_equal(restarts(h), 0);
        assert_int_equal(harness_worker_pid(h, 0), all[1]);
    }
    unsetenv("FAKE_STEP_MS");
    harness_destroy(&h);
}

/* A stop waits for a safe point, but not for ever. */
static void a_stop_does_not_wait_for_a_hung_worker(void **state)
{
    (void)state;
    for (int by_signal = 0; by_signal < 2; by_signal++) {
        setenv("FAKE_HANG_STEP", "20", 1);
        harness *h = harness_new(
            2, 100000, by_signal ? GOES_ON ",\"hang_timeout\":0" : GOES_ON ",\"hang_timeout\":3");
        assert_true(harness_start(h, NULL));
        reach(h, 19);
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
    pid_t foreign = stranger();
    harness *h = harness_new(2, 100000, GOES_ON);
    assert_true(harness_start(h, NULL));
    int descriptors = 0;
    for (int i = 0; i < 5; i++) {
        harness_wait_state(h, "running");
        if (i == 1) /* after the first restart; the door of a dead worker closes a moment later */
            descriptors = open_descriptors(h->coordinator);
        pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
        kill(pids[i % 2], SIGKILL);
        char attempt[16];
        snprintf(attempt, sizeof attempt, "%d", i + 1);
        harness_event(h, 0, PML_EVENT_restart, "attempt", attempt, NULL);
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

/* ---- the coordinator ---- */

static void kill_coordinator(harness *h)
{
    if (h->adopted > 0) {
        kill(h->adopted, SIGKILL);
        harness_wait_gone(h->adopted, 5);
    } else {
        kill(h->coordinator, SIGKILL);
        assert_int_equal(harness_wait(h), 256 + SIGKILL);
    }
}

static void resume_applied(harness *h)
{
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)harness_command(h, "resume", ""));
    harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
}

static void a_killed_coordinator_is_replaced(void **state)
{
    (void)state;
    enum { STEPS = 500, KILLS = 5 };
    setenv("FAKE_STEP_MS", "4", 1);
    unsigned long long want = undisturbed(STEPS);
    harness *h = harness_new(2, STEPS, GOES_ON);
    assert_true(harness_start(h, NULL));
    for (int i = 1; i <= KILLS; i++) {
        reach(h, 40 * i);
        if (i == 3) {
            harness_command(h, "pause", "");
            harness_wait_state(h, "paused");
        }
        pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
        kill_coordinator(h);
        harness_wait_gone(pids[0], 10);
        harness_wait_gone(pids[1], 10);
        harness_adopt(h);
        char attempt[16];
        snprintf(attempt, sizeof attempt, "%d", i);
        const pml_message *m = harness_event(h, 0, PML_EVENT_restart, "attempt", attempt, NULL);
        assert_string_equal(text_of(m, "cause"), "coordinator");
        assert_string_equal(text_of(m, "from"), "checkpoint");
        if (i == 3) { /* it stands where it stood, until somebody lets it go */
            harness_wait_state(h, "paused");
            resume_applied(h); /* one that only was accepted would be refused after the next kill */
        } /* that it runs shows when it comes to the next kill's step, or to its end */
    }
    harness_wait_state(h, "finished");
    unsetenv("FAKE_STEP_MS");
    assert_int_equal(check_history(h, NULL), STEPS);
    assert_true(learnt(h, STEPS) == want);
    harness_destroy(&h);
}

static void a_coordinator_killed_while_workers_load_is_replaced(void **state)
{
    (void)state;
    setenv("FAKE_LOAD_MS", "2000", 1);
    harness *h = harness_new(2, 50, GOES_ON);
    assert_true(harness_start(h, NULL));
    while (harness_worker_pid(h, 0) == 0)
        harness_receive_for(h, 0.01);
    harness_receive_for(h, 0.3);
    kill_coordinator(h);
    unsetenv("FAKE_LOAD_MS");
    harness_adopt(h);
    harness_wait_state(h, "finished");
    assert_int_equal(check_history(h, NULL), 50);
    harness_destroy(&h);
}

/* What was accepted and had no effect yet is refused by name, not forgotten. */
static void what_was_open_is_refused(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, GOES_ON);
    setenv("FAKE_LOAD_MS", "2000", 1);
    assert_true(harness_start(h, NULL));
    int64_t k = harness_command(h, "set", "\"learning_rate\":0.5");
    kill_coordinator(h);
    unsetenv("FAKE_LOAD_MS");
    if (pml_runtime_workers(h->folder, NULL) == PML_PEER) { /* killed before it had any */
        assert_true(harness_start(h, "--recover", NULL));
    } else {
        harness_adopt(h);
    }
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)k);
    const pml_message *m = harness_event(h, 0, PML_EVENT_refused, "command", number, NULL);
    assert_non_null(strstr(text_of(m, "reason"), "before it took effect"));
    harness_wait_state(h, "running");
    harness_destroy(&h);
}

/* What the new coordinator accepts while the old one's workers still save is its own. */
static void a_stop_while_old_workers_save_stops(void **state)
{
    (void)state;
    setenv("FAKE_SAVE_MS", "2000", 1);
    harness *h = harness_new(2, 100000, GOES_ON);
    assert_true(harness_start(h, NULL));
    reach(h, 5);
    kill_coordinator(h);
    harness_adopt(h);
    char number[32];
    assert_int_equal(pml_runtime_workers(h->folder, NULL), PML_OK);
    snprintf(number, sizeof number, "%lld", (long long)harness_command(h, "stop", ""));
    harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
    harness_wait_state(h, "stopped");
    unsetenv("FAKE_SAVE_MS");
    harness_destroy(&h);
}

/* Its child too, though nobody asked it to end. */
static void a_killed_coordinator_leaves_no_preparation(void **state)
{
    (void)state;
    harness *h = harness_new(1, 5, GOES_ON);
    h->prepare[0] = "sh";
    h->prepare[1] = "-c";
    h->prepare[2] = "echo $$ > $0/preparing; exec sleep 1000";
    assert_true(harness_start(h, NULL));
    pid_t pid = 0;
    while (pid == 0) {
        harness_receive_for(h, 0.02);
        char *text = harness_read(h, "preparing");
        pid = (pid_t)atoi(text);
        free(text);
    }
    assert_true(process_is_there(pid));
    kill_coordinator(h);
    harness_wait_gone(pid, 10);
    harness_destroy(&h);
}

static void never_is_never(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, "\"restart\":\"never\"");
    assert_true(harness_start(h, NULL));
    reach(h, 5);
    pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    kill_coordinator(h);
    harness_wait_gone(pids[0], 10);
    harness_wait_gone(pids[1], 10);
    harness_disconnect(h);
    assert_int_equal(pml_runtime_find(h->folder, h->runtime, sizeof h->runtime, NULL), PML_PEER);
    assert_false(harness_start(h, "--recover", NULL));
    assert_true(harness_start(h, "--resume", NULL));
    harness_wait_state(h, "running");
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_killed_worker_is_replaced),
        cmocka_unit_test(settings_survive_at_their_steps),
        cmocka_unit_test(skip_survives),
        cmocka_unit_test(it_gives_up_with_the_cause),
        cmocka_unit_test(delays_grow),
        cmocka_unit_test(an_error_is_not_tried_again),
        cmocka_unit_test(a_hung_worker_is_told_from_a_dead_one),
        cmocka_unit_test(a_stopped_worker_is_silent),
        cmocka_unit_test(absence_is_not_held_against_workers),
        cmocka_unit_test(a_stop_does_not_wait_for_a_hung_worker),
        cmocka_unit_test(restarts_leave_nothing_behind),
        cmocka_unit_test(a_killed_coordinator_is_replaced),
        cmocka_unit_test(a_coordinator_killed_while_workers_load_is_replaced),
        cmocka_unit_test(what_was_open_is_refused),
        cmocka_unit_test(a_stop_while_old_workers_save_stops),
        cmocka_unit_test(a_killed_coordinator_leaves_no_preparation),
        cmocka_unit_test(never_is_never),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
