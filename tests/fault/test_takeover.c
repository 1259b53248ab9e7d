/* A coordinator dies: its workers save what they have, and start another. */
#include "history.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/net/connection.h"

/* ---- the coordinator ---- */

/* At its work, and while it stands. */
static void a_killed_coordinator_is_replaced(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    for (int i = 1; i <= 4; i++) {
        history_reach(h, 40 * i);
        if (i == 3) {
            harness_command(h, "pause", "");
            harness_wait_state(h, "paused");
        }
        pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
        harness_kill_coordinator(h);
        harness_wait_gone(pids[0], 10);
        harness_wait_gone(pids[1], 10);
        harness_adopt(h);
        const pml_message *m = history_restart(h, i);
        assert_string_equal(pml_message_string(m, "cause"), "coordinator");
        assert_string_equal(pml_message_string(m, "from"), "checkpoint");
        if (i == 3) { /* it stands where it stood, until somebody lets it go */
            harness_wait_state(h, "paused");
            /* One that only was accepted would be refused after the next kill. */
            history_applied(h, harness_command(h, "resume", ""));
        }
        harness_wait_state(h, "running");
    }
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* The last step is made, and the log does not know yet that the run is finished: somebody has to
 * write that down. */
static void a_coordinator_killed_at_the_end_is_replaced(void **state)
{
    (void)state;
    enum { STEPS = 20 };
    harness *h = harness_new(2, STEPS, GOES_ON);
    harness_mark(h, "held", true);
    assert_true(harness_start(h, NULL));
    history_reach(h, STEPS); /* it is finished when its checkpoint is written, which is held */
    harness_kill_coordinator(h);
    harness_mark(h, "held", false);
    harness_adopt(h);
    harness_wait_state(h, "finished");
    assert_int_equal(history_check(h), STEPS);
    assert_true(history_learnt(h, STEPS) == history_undisturbed(STEPS));
    harness_destroy(&h);
}

static void a_coordinator_killed_while_workers_load_is_replaced(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    harness_mark(h, "slow", true);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_progress, "what", "loading", NULL);
    harness_kill_coordinator(h);
    harness_mark(h, "slow", false);
    harness_adopt(h);
    history_reach(h, 50);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    harness_destroy(&h);
}

/* What rank 0 hands over of a run that has ended at `step`, and a resume: what nobody asked for,
 * and that the same checkpoint is there for a command. */
static void hand_over_and_resume(harness *h, int64_t step, int64_t command)
{
    char path[200], half[240], text[800];
    kill(h->coordinator, SIGTERM);
    harness_wait(h);
    harness_disconnect(h);
    int n = snprintf(text, sizeof text,
                     "{\"type\":\"report\",\"rank\":0,\"number\":1,\"event\":{\"type\":\"eval\","
                     "\"step\":%lld,\"loss\":1.5,\"labels\":1,\"seconds\":0.1}}\n"
                     "{\"type\":\"report\",\"rank\":0,\"number\":2,\"event\":{\"type\":"
                     "\"checkpoint\",\"step\":%lld,\"path\":\"checkpoints/step-%06lld\","
                     "\"bytes\":1,\"seconds\":0.1}}\n"
                     "{\"type\":\"report\",\"rank\":0,\"number\":3,\"event\":{\"type\":"
                     "\"checkpoint\",\"step\":%lld,\"path\":\"checkpoints/step-%06lld\","
                     "\"bytes\":1,\"seconds\":0,\"command\":%lld}}\n",
                     (long long)step, (long long)step, (long long)step, (long long)step,
                     (long long)step, (long long)command);
    snprintf(path, sizeof path, "%s/handover.jsonl", h->folder);
    snprintf(half, sizeof half, "%s.tmp-1-0", path); /* of a rank 0 that was killed meanwhile */
    assert_int_equal(pml_file_write(half, text, (size_t)n / 2, 0600, NULL), PML_OK);
    assert_int_equal(pml_file_write(path, text, (size_t)n, 0600, NULL), PML_OK);
    assert_true(harness_start(h, "--resume", NULL));
    harness_wait_state(h, "running");
    assert_false(pml_is_there(path) || pml_is_there(half));
}

/* Those of a command, or with 0 those that nobody asked for. */
static int events_at(harness *h, pml_message_type type, int64_t step, int64_t command)
{
    int n = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++)
        n += pml_message_type_of(h->events[i]) == type &&
             pml_message_int(h->events[i], "step") == step &&
             pml_message_int(h->events[i], "command") == command;
    return n;
}

/* A coordinator may die when a report is in its log and rank 0 has not heard of that yet: then it
 * is handed over, too, and is no news. */
static void what_was_logged_is_not_logged_again(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    int64_t command = harness_command(h, "set", "\"learning_rate\":0.5");
    history_applied(h, command);
    int64_t step = history_stop(h);
    int saved = events_at(h, PML_EVENT_checkpoint, step, 0);
    /* The evaluation is not in the log yet, and nothing for the command; the checkpoint is. */
    hand_over_and_resume(h, step, command);
    assert_int_equal(events_at(h, PML_EVENT_eval, step, 0), 1);
    assert_int_equal(events_at(h, PML_EVENT_checkpoint, step, 0), saved);
    assert_int_equal(events_at(h, PML_EVENT_checkpoint, step, command), 1);
    history_reach(h, step + 5);
    history_stop(h);
    hand_over_and_resume(h, step, command);
    assert_int_equal(events_at(h, PML_EVENT_eval, step, 0), 1);
    assert_int_equal(events_at(h, PML_EVENT_checkpoint, step, command), 1);
    history_stop(h);
    harness_destroy(&h);
}

/* What was accepted and had no effect yet is refused by name, not forgotten. */
static void what_was_open_is_refused(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    harness_mark(h, "slow", true);
    assert_true(harness_start(h, NULL));
    int64_t k = harness_command(h, "set", "\"learning_rate\":0.5");
    harness_kill_coordinator(h);
    harness_mark(h, "slow", false);
    if (pml_runtime_workers(h->folder, NULL) == PML_PEER) { /* killed before it had any */
        assert_true(harness_start(h, "--recover", NULL));
    } else {
        harness_adopt(h);
    }
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)k);
    const pml_message *m = harness_event(h, 0, PML_EVENT_refused, "command", number, NULL);
    assert_non_null(strstr(pml_message_string(m, "reason"), "before it took effect"));
    harness_wait_state(h, "running");
    harness_destroy(&h);
}

/* Applied by all, and logged by nobody: the coordinator had heard of it from rank 0 alone. Refused
 * now, it would be in the weights and not in the history. */
static void what_one_rank_told_of_is_handed_over(void **state)
{
    (void)state;
    setenv("FAKE_MUTE_TUNED", "1", 1);
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    int64_t k = harness_command(h, "set", "\"learning_rate\":0.5");
    harness_wait_mark(h, "hung");  /* rank 1 has applied it */
    harness_mark(h, "hung", true); /* once */
    history_reach(h, 60);
    harness_kill_coordinator(h);
    harness_adopt(h);
    history_applied(h, k);
    harness_wait_state(h, "running");
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    harness_destroy(&h);
    unsetenv("FAKE_MUTE_TUNED");
}

/* The log's last step is of a past that the run has gone back behind, and its first one since is
 * handed over: it is none of those. */
static void a_step_made_again_is_handed_over(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, "\"save_steps\":10," GOES_ON);
    setenv("FAKE_WAIT_STEP", "11", 1);
    assert_true(harness_start(h, NULL));
    history_reach(h, 20);
    history_stop(h);
    kill(h->coordinator, SIGTERM);
    harness_wait(h);
    harness_disconnect(h);
    harness_mark(h, "wait", true);
    assert_true(harness_start(h, "--resume", "step-000010", NULL));
    harness_wait_state(h, "running");
    harness_kill_coordinator(h);
    harness_mark(h, "wait", false);
    harness_adopt(h);
    history_restart(h, 1);
    assert_int_equal(events_at(h, PML_EVENT_step, 11, 0), 2);
    unsetenv("FAKE_WAIT_STEP");
    harness_destroy(&h);
}

/* What the new coordinator accepts while the old one's workers still save is its own. */
static void a_stop_while_old_workers_save_stops(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    harness_mark(h, "held", true); /* they save until it is taken away */
    harness_kill_coordinator(h);
    harness_adopt(h);
    char number[32];
    assert_int_equal(pml_runtime_workers(h->folder, NULL), PML_OK);
    snprintf(number, sizeof number, "%lld", (long long)harness_command(h, "stop", ""));
    harness_mark(h, "held", false);
    harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
    harness_wait_state(h, "stopped");
    harness_destroy(&h);
}

/* One that is stopped neither saves nor ends: it is killed as a silent one is, not after the time
 * that saving may take (twenty times as long). */
static void a_stopped_worker_does_not_hold_up_the_next_coordinator(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON ",\"hang_timeout\":3,\"save_steps\":5");
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_checkpoint, NULL, NULL, NULL);
    pid_t pid = harness_worker_pid(h, 0);
    kill(pid, SIGSTOP);
    harness_kill_coordinator(h);
    assert_true(harness_start(h, "--recover", NULL)); /* nobody is there to do it by itself */
    const pml_message *m = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    assert_non_null(strstr(pml_message_string(m, "message"), "were stopped for 3 s"));
    harness_wait_gone(pid, 5);
    history_restart(h, 1);
    harness_wait_state(h, "running");
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
    for (double end = pml_clock_monotonic() + harness_bound(20); pid == 0;) {
        assert_true(pml_clock_monotonic() < end);
        harness_receive_for(h, 0.02);
        char *text = harness_read(h, "preparing");
        pid = (pid_t)atoi(text);
        free(text);
    }
    assert_true(process_is_there(pid));
    harness_kill_coordinator(h);
    harness_wait_gone(pid, 10);
    harness_destroy(&h);
}

/* However long it would take, the run's own evaluation holds nobody's end up; it is made again,
 * once, before the next step: schedules and early stopping follow it. */
static void an_evaluation_is_broken_off_and_made_again(void **state)
{
    (void)state;
    harness *h =
        harness_new(2, FOR_EVER,
                    GOES_ON ",\"eval_strategy\":\"epoch\",\"eval_data\":\"data/eval.safetensors\"");
    assert_true(harness_start(h, NULL));
    history_reach(h, 1);
    harness_mark(h, "examined", true); /* from the next 100th step on */
    harness_wait_mark(h, "examining");
    pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    harness_kill_coordinator(h);
    harness_wait_gone(pids[0], 10);
    harness_wait_gone(pids[1], 10);
    harness_mark(h, "examined", false);
    harness_adopt(h);
    const pml_message *restart = history_restart(h, 1);
    assert_string_equal(pml_message_string(restart, "from"), "checkpoint");
    int64_t step = pml_message_int(restart, "step"), at = pml_message_int(restart, "seq");
    assert_int_equal(step % 100, 0);
    history_reach(h, (int)step + 5);
    int made = 0;
    for (int i = 0; i < h->n_events; i++) {
        const pml_message *m = h->events[i];
        if (pml_message_type_of(m) == PML_EVENT_eval && pml_message_int(m, "step") == step) {
            assert_true(pml_message_int(m, "seq") > at);
            made++;
        }
        if (pml_message_type_of(m) == PML_EVENT_step && pml_message_int(m, "step") == step + 1)
            assert_int_equal(made, 1);
    }
    assert_int_equal(made, 1);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

static void never_is_never(void **state)
{
    (void)state;
    harness *h = harness_new(2, FOR_EVER, "\"restart\":\"never\"");
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    harness_kill_coordinator(h);
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
        cmocka_unit_test(a_killed_coordinator_is_replaced),
        cmocka_unit_test(a_coordinator_killed_at_the_end_is_replaced),
        cmocka_unit_test(a_coordinator_killed_while_workers_load_is_replaced),
        cmocka_unit_test(what_was_logged_is_not_logged_again),
        cmocka_unit_test(what_was_open_is_refused),
        cmocka_unit_test(what_one_rank_told_of_is_handed_over),
        cmocka_unit_test(a_step_made_again_is_handed_over),
        cmocka_unit_test(a_stop_while_old_workers_save_stops),
        cmocka_unit_test(a_stopped_worker_does_not_hold_up_the_next_coordinator),
        cmocka_unit_test(a_killed_coordinator_leaves_no_preparation),
        cmocka_unit_test(an_evaluation_is_broken_off_and_made_again),
        cmocka_unit_test(never_is_never),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
