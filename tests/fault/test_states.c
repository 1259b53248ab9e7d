/* Every state with every command: the run does what the table says, and so does its document. */
#include "states.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../unit/document.h"
#include "harness.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"

#define GOES_ON  "\"restart\":\"on-failure\",\"max_restarts\":100"
#define HAS_EVAL ",\"eval_data\":\"data/eval.safetensors\""
#define SAMPLE   "\"input_ids\":[1],\"max_new_tokens\":2,\"temperature\":0,\"seed\":1"
#define FOR_EVER 100000

static const char *fields_of(pml_message_type verb)
{
    return verb == PML_REQUEST_set      ? "\"weight_decay\":0.5"
           : verb == PML_REQUEST_sample ? SAMPLE
                                        : "";
}

static bool in_state(harness *h, const char *state)
{
    pml_message *m = harness_ask(h, "status", "");
    bool is = strcmp(pml_message_string(m, "state"), state) == 0;
    pml_message_destroy(&m);
    return is;
}

/* How the command ended; waits for it. */
static bool was_applied(harness *h, int64_t command)
{
    for (int i = 0;; i++) {
        for (; i < h->n_events; i++) {
            const pml_message *m = h->events[i];
            pml_message_type type = pml_message_type_of(m);
            if ((type == PML_EVENT_applied || type == PML_EVENT_refused) &&
                pml_message_int(m, "command") == command)
                return type == PML_EVENT_applied;
        }
        i--;
        harness_receive_for(h, 0.02);
    }
}

/* Ask one cell. Accepted commands of it are remembered in *command. */
static void ask_cell(harness *h, situation in, pml_message_type verb, int64_t *command)
{
    const char *name = pml_message_name(verb);
    action want = states_action(in, verb);
    if (in != IN_ENDING && !in_state(h, states_name(in)))
        fail_msg("%s: the run is not %s", name, states_name(in));
    if (in != IN_ENDING)
        harness_catch_up(h);
    int events = h->n_events;
    pml_message *m = harness_ask(h, name, fields_of(verb));
    bool accepted = pml_message_type_of(m) == PML_ANSWER_accepted;
    *command = 0;
    if (accepted != (want != ACT_REFUSE))
        fail_msg("%s in %s: %s", name, states_name(in),
                 accepted ? "accepted" : pml_message_string(m, "message"));
    if (accepted) {
        *command = pml_message_int(m, "command");
    } else {
        assert_string_equal(pml_message_string(m, "code"), "busy");
        assert_true(strlen(pml_message_string(m, "message")) > 10);
    }
    pml_message_destroy(&m);
    if (want == ACT_APPLY) {
        assert_true(was_applied(h, *command));
    } else if (want == ACT_REFUSE && in != IN_ENDING) { /* it left no trace */
        harness_catch_up(h);
        for (int i = events; i < h->n_events; i++)
            assert_true(pml_message_type_of(h->events[i]) != PML_EVENT_command);
    }
}

/* What takes its time, and a stop came meanwhile. */
static bool was_broken_off(harness *h, int64_t command)
{
    for (int i = 0; i < h->n_events; i++) {
        const pml_message *m = h->events[i];
        if (pml_message_type_of(m) == PML_EVENT_refused &&
            pml_message_int(m, "command") == command &&
            strstr(pml_message_string(m, "reason"), "broken off") != NULL)
            return strcmp(pml_message_string(m, "verb"), "evaluate") == 0 ||
                   strcmp(pml_message_string(m, "verb"), "sample") == 0;
    }
    return false;
}

/* All cells of a row, stop last: it leaves the state. */
static void ask_row(harness *h, situation in, int64_t commands[VERBS])
{
    for (int v = 0; v < VERBS; v++)
        if (states_verbs[v] != PML_REQUEST_stop)
            ask_cell(h, in, states_verbs[v], &commands[v]);
}

static void ask_stop(harness *h, situation in)
{
    int64_t command;
    ask_cell(h, in, PML_REQUEST_stop, &command);
}

static void what_is_queued_waits(void **state)
{
    (void)state;
    int64_t commands[VERBS];
    for (int again = 0; again < 2; again++) {
        harness *h = harness_new(2, FOR_EVER, GOES_ON HAS_EVAL);
        if (!again)
            harness_mark(h, "slow", true);
        assert_true(harness_start(h, NULL));
        if (again) {
            harness_event(h, 0, PML_EVENT_step, "step", "3", NULL);
            harness_mark(h, "slow", true);
            kill(harness_worker_pid(h, 0), SIGKILL);
            harness_wait_state(h, "starting");
        }
        situation in = again ? IN_AGAIN : IN_NEW;
        ask_row(h, in, commands);
        ask_stop(h, in);
        harness_mark(h, "slow", false);
        harness_event(h, 0, PML_EVENT_state, "state", "stopped", NULL);
        for (int v = 0; v < VERBS; v++) /* what was asked before the stop was carried out, or not */
            if (states_verbs[v] != PML_REQUEST_stop && !was_broken_off(h, commands[v]))
                assert_true(was_applied(h, commands[v]) == (again == 1));
        harness_destroy(&h);
    }
}

static void what_is_applied_is_applied(void **state)
{
    (void)state;
    int64_t commands[VERBS];
    for (int paused = 0; paused < 2; paused++) {
        harness *h = harness_new(2, FOR_EVER, GOES_ON HAS_EVAL);
        assert_true(harness_start(h, NULL));
        for (int v = 0; v < VERBS; v++) {
            if (states_verbs[v] == PML_REQUEST_stop)
                continue;
            harness_wait_state(h, "running");
            if (paused) {
                harness_command(h, "pause", "");
                harness_wait_state(h, "paused");
            }
            ask_cell(h, paused ? IN_PAUSED : IN_RUNNING, states_verbs[v], &commands[v]);
            harness_command(h, "resume", "");
        }
        harness_wait_state(h, "running");
        if (paused) {
            harness_command(h, "pause", "");
            harness_wait_state(h, "paused");
        }
        ask_stop(h, paused ? IN_PAUSED : IN_RUNNING);
        harness_wait_state(h, "stopped");
        harness_destroy(&h);
    }
}

static void a_finished_run_serves_then_refuses(void **state)
{
    (void)state;
    int64_t commands[VERBS];
    setenv("PML_GRACE_SECONDS", "30", 1);
    harness *h = harness_new(2, 5, GOES_ON HAS_EVAL);
    setenv("PML_GRACE_SECONDS", "30", 1); /* harness_new has set its own */
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    ask_row(h, IN_SERVING, commands);
    pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    ask_stop(h, IN_SERVING);
    harness_wait_gone(pids[0], 10);
    harness_wait_gone(pids[1], 10);
    while (harness_worker_pid(h, 0) != 0 || harness_worker_pid(h, 1) != 0)
        harness_receive_for(h, 0.02);
    ask_row(h, IN_DONE, commands);
    ask_stop(h, IN_DONE);
    harness_destroy(&h);
}

static void what_is_over_refuses(void **state)
{
    (void)state;
    int64_t commands[VERBS];
    for (int failed = 0; failed < 2; failed++) {
        harness *h = harness_new(1, FOR_EVER, GOES_ON HAS_EVAL);
        setenv("PML_GRACE_SECONDS", "30", 1);
        if (failed)
            setenv("FAKE_FAIL_STEP", "3", 1);
        assert_true(harness_start(h, NULL));
        if (!failed)
            harness_command(h, "stop", "");
        harness_wait_state(h, failed ? "failed" : "stopped");
        unsetenv("FAKE_FAIL_STEP");
        ask_row(h, failed ? IN_FAILED : IN_STOPPED, commands);
        ask_stop(h, failed ? IN_FAILED : IN_STOPPED);
        harness_destroy(&h);
    }
}

/* A signal is heard some time after it was sent. */
static void wait_until_it_is_ending(harness *h)
{
    double end = pml_clock_monotonic() + harness_bound(20);
    for (bool ending = false; !ending; harness_receive_for(h, 0.02)) {
        assert_true(pml_clock_monotonic() < end);
        pml_message *m = harness_ask(h, "pause", "");
        assert_int_equal(pml_message_type_of(m), PML_ANSWER_error);
        ending = strcmp(pml_message_string(m, "message"), "the run is ending") == 0;
        pml_message_destroy(&m);
    }
}

static void what_is_ending_refuses(void **state)
{
    (void)state;
    int64_t commands[VERBS];
    harness *h = harness_new(1, 5, GOES_ON HAS_EVAL);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    harness_mark(h, "held", true);
    assert_true(was_applied(h, harness_command(h, "checkpoint", "\"name\":\"slow\"")));
    kill(h->coordinator, SIGTERM);
    wait_until_it_is_ending(h); /* the checkpoint holds up its end */
    ask_row(h, IN_ENDING, commands);
    ask_stop(h, IN_ENDING);
    harness_destroy(&h);
}

/* ---- the document ---- */

static const char path[] = SOURCE_DIR "/docs/states.md";

static void document_is_current(void **state)
{
    (void)state;
    document_check(path, states_document());
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--write") == 0)
        return document_write(path, states_document());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(document_is_current),
        cmocka_unit_test(what_is_queued_waits),
        cmocka_unit_test(what_is_applied_is_applied),
        cmocka_unit_test(a_finished_run_serves_then_refuses),
        cmocka_unit_test(what_is_over_refuses),
        cmocka_unit_test(what_is_ending_refuses),
    };
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
