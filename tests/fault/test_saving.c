/* A worker dies before what follows on its last step is done, its evaluation or its checkpoint, or
 * what somebody has asked for: the next one does it. */
#include "history.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"

#define SAMPLE "\"input_ids\":[1],\"max_new_tokens\":1,\"temperature\":0,\"seed\":1"

static bool is_saved(const harness *h, const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/checkpoints/%s/MANIFEST", h->folder, name);
    return access(path, F_OK) == 0;
}

/* Of the run's checkpoints in the log, those of that step. */
static int times_saved(harness *h, int64_t step)
{
    int n = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++)
        n += pml_message_type_of(h->events[i]) == PML_EVENT_checkpoint &&
             pml_message_int(h->events[i], "step") == step;
    return n;
}

/* Dead while rank 0 writes a checkpoint, and back again. */
static void die_in_writing(harness *h, int rank)
{
    harness_wait_mark(h, "holding");
    kill(harness_worker_pid(h, rank), SIGKILL);
    const pml_message *m = history_restart(h, 1);
    assert_string_equal(pml_message_string(m, "from"), "snapshot");
    harness_mark(h, "held", false);
}

/* Nobody is left, and nobody starts another coordinator. */
static void kill_all(harness *h)
{
    pid_t worker = harness_wait_worker(h, 0);
    kill(h->coordinator, SIGSTOP); /* or it would have the worker replaced */
    kill(worker, SIGKILL);
    kill(h->coordinator, SIGKILL);
    harness_wait(h);
    harness_disconnect(h);
}

/* All are killed while a checkpoint that was asked for is written; the command. */
static int64_t die_owing(harness *h)
{
    harness_mark(h, "held", true);
    int64_t k = harness_command(h, "checkpoint", "\"name\":\"wanted\"");
    history_applied(h, k);
    harness_wait_mark(h, "holding");
    kill_all(h);
    harness_mark(h, "held", false);
    return k;
}

/* Wait for the checkpoint that this command asked for; its event, borrowed. */
static const pml_message *wait_for_checkpoint(harness *h, int64_t command)
{
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)command);
    return harness_event(h, 0, PML_EVENT_checkpoint, "command", number, NULL);
}

/* The one that has the whole training in it. */
static void the_last_checkpoint_is_written(void **state)
{
    (void)state;
    for (int workers = 1; workers <= 2; workers++) {
        harness *h = harness_new(workers, 20, GOES_ON);
        harness_mark(h, "held", true);
        assert_true(harness_start(h, NULL));
        die_in_writing(h, workers - 1);
        harness_wait_state(h, "finished");
        assert_true(is_saved(h, "step-000020"));
        assert_int_equal(times_saved(h, 20), 1);
        assert_true(history_learnt(h, 20) == history_undisturbed(20));
        assert_int_equal(history_check(h), 20);
        harness_destroy(&h);
    }
}

/* Neither is one that is on disk written again. */
static void a_periodic_one_is_written_once(void **state)
{
    (void)state;
    for (int held = 0; held < 2; held++) {
        harness *h = harness_new(1, FOR_EVER, GOES_ON ",\"save_steps\":20");
        setenv("FAKE_WAIT_STEP", "21", 1);
        harness_mark(h, "wait", true);
        if (held)
            harness_mark(h, "held", true);
        assert_true(harness_start(h, NULL));
        if (held) {
            die_in_writing(h, 0);
        } else {
            harness_event(h, 0, PML_EVENT_checkpoint, "step", "20", NULL);
            kill(harness_worker_pid(h, 0), SIGKILL);
            const pml_message *m = history_restart(h, 1);
            assert_string_equal(pml_message_string(m, "from"), "snapshot");
            assert_int_equal(pml_message_int(m, "step"), 20);
        }
        harness_mark(h, "wait", false);
        unsetenv("FAKE_WAIT_STEP");
        harness_event(h, 0, PML_EVENT_checkpoint, "step", "40", NULL);
        assert_true(is_saved(h, "step-000020"));
        assert_int_equal(times_saved(h, 20), 1);
        int64_t steps = history_stop(h);
        assert_int_equal(history_check(h), steps);
        harness_destroy(&h);
    }
}

/* Who asked for it waits for the event with the command's number. */
static void one_that_was_asked_for_is_written(void **state)
{
    (void)state;
    for (int workers = 1; workers <= 2; workers++) {
        harness *h = harness_new(workers, FOR_EVER, GOES_ON);
        char name[64];
        assert_true(harness_start(h, NULL));
        history_reach(h, 5);
        harness_mark(h, "held", true);
        int64_t k = harness_command(h, "checkpoint", "\"name\":\"wanted\"");
        int64_t step = pml_message_int(history_applied(h, k), "step") - 1;
        die_in_writing(h, workers - 1);
        const pml_message *m = wait_for_checkpoint(h, k);
        assert_string_equal(pml_message_string(m, "name"), "wanted");
        assert_true(pml_message_int(m, "step") >= step);
        snprintf(name, sizeof name, "step-%06lld-wanted", (long long)pml_message_int(m, "step"));
        assert_true(is_saved(h, name));
        int64_t steps = history_stop(h);
        assert_int_equal(history_check(h), steps);
        assert_true(history_learnt(h, steps) == history_undisturbed(steps));
        harness_destroy(&h);
    }
}

/* Likewise where everybody dies, and only the log knows of it. */
static void one_that_was_asked_for_outlives_all(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 10);
    wait_for_checkpoint(h, harness_command(h, "checkpoint", "")); /* what is gone on from */
    int64_t k = die_owing(h);
    assert_true(harness_start(h, "--resume", NULL));
    assert_string_equal(pml_message_string(wait_for_checkpoint(h, k), "name"), "wanted");
    harness_destroy(&h);
}

/* Also where no step comes any more in which it could be heard of. */
static void one_that_was_asked_for_at_the_end_is_written(void **state)
{
    (void)state;
    harness *h = harness_new(1, 20, GOES_ON);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    int64_t k = die_owing(h);
    assert_true(harness_start(h, "--resume", NULL));
    wait_for_checkpoint(h, k);
    assert_true(is_saved(h, "step-000020-wanted"));
    harness_destroy(&h);
}

/* Nor is one lost that waits for its step to come again while another is asked for. */
static void two_that_were_asked_for_are_written(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 3);
    wait_for_checkpoint(h, harness_command(h, "checkpoint", ""));
    history_reach(h, 60);
    int64_t first = die_owing(h);
    harness_mark(h, "slow", true); /* it loads: the second one holds from its first step on */
    assert_true(harness_start(h, "--resume", NULL));
    int64_t second = harness_command(h, "checkpoint", "\"name\":\"second\"");
    harness_mark(h, "slow", false);
    int64_t begun = pml_message_int(wait_for_checkpoint(h, second), "step");
    kill(harness_worker_pid(h, 0), SIGKILL); /* the next one hears of the first from the log */
    history_restart(h, 1);
    assert_true(pml_message_int(wait_for_checkpoint(h, first), "step") > begun);
    harness_destroy(&h);
}

/* What waits for a later step holds up no pause. */
static void a_pause_is_heard_before_it(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 3);
    wait_for_checkpoint(h, harness_command(h, "checkpoint", ""));
    history_reach(h, 60);
    int64_t owed = die_owing(h);
    harness_mark(h, "slow", true);
    assert_true(harness_start(h, "--resume", NULL));
    int64_t pause = harness_command(h, "pause", "");
    harness_mark(h, "slow", false);
    int64_t step = pml_message_int(history_applied(h, pause), "step") - 1;
    int at;
    harness_event(h, 0, PML_EVENT_state, "state", "paused", &at);
    kill(harness_worker_pid(h, 0), SIGKILL);
    history_restart(h, 1);
    const pml_message *m = harness_event(h, at + 1, PML_EVENT_state, "state", "paused", NULL);
    assert_int_equal(pml_message_int(m, "step"), step);
    harness_command(h, "resume", "");
    wait_for_checkpoint(h, owed);
    harness_destroy(&h);
}

/* What somebody has gone back from stays left, also where what was gone back to is lost. */
static void an_abandoned_one_is_not_gone_on_from(void **state)
{
    (void)state;
    harness *h = harness_new(1, 40, GOES_ON ",\"save_steps\":20");
    char path[300];
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    kill_all(h);
    harness_mark(h, "slow", true);
    assert_true(harness_start(h, "--resume", "step-000020", NULL));
    kill_all(h);
    snprintf(path, sizeof path, "%s/checkpoints/step-000020/state.json", h->folder);
    assert_int_equal(pml_file_write(path, "damaged", 7, 0600, NULL), PML_OK);
    for (const char *timeline = "2"; timeline != NULL; timeline = timeline[0] == '2' ? "3" : NULL) {
        assert_true(harness_start(h, "--resume", NULL));
        const pml_message *m = harness_event(h, 0, PML_EVENT_state, "timeline", timeline, NULL);
        assert_int_equal(pml_message_int(m, "step"), 0);
        assert_false(pml_message_has(m, "checkpoint"));
        kill_all(h);
    }
    harness_destroy(&h);
}

/* Who goes back has no use for it: that is said to whoever waits. */
static void who_goes_back_gives_it_up(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    char number[32];
    assert_true(harness_start(h, NULL));
    history_reach(h, 3);
    const pml_message *m = wait_for_checkpoint(h, harness_command(h, "checkpoint", ""));
    char *back = strdup(strchr(pml_message_string(m, "path"), '/') + 1);
    int64_t k = die_owing(h);
    assert_true(harness_start(h, "--resume", back, NULL));
    free(back);
    snprintf(number, sizeof number, "%lld", (long long)k);
    m = harness_event(h, 0, PML_EVENT_log, "command", number, NULL);
    assert_string_equal(pml_message_string(m, "level"), "error");
    harness_destroy(&h);
}

/* A damaged one of that step, which the log has, stands in nobody's place. */
static void what_was_passed_over_is_written_again(void **state)
{
    (void)state;
    harness *h = harness_new(1, 40, GOES_ON ",\"save_steps\":20");
    char path[300];
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    int before = times_saved(h, 40);
    kill_all(h);
    snprintf(path, sizeof path, "%s/checkpoints/step-000040/state.json", h->folder);
    assert_int_equal(pml_file_write(path, "damaged", 7, 0600, NULL), PML_OK);
    harness_mark(h, "held", true);
    assert_true(harness_start(h, "--resume", NULL));
    die_in_writing(h, 0);
    harness_wait_state(h, "finished");
    assert_true(times_saved(h, 40) > before);
    assert_true(history_learnt(h, 40) == history_undisturbed(40));
    harness_destroy(&h);
}

/* The best one, which the run may have to end with, also where it has gone further meanwhile and
 * stands. */
static void the_best_one_is_written(void **state)
{
    (void)state;
    harness *h =
        harness_new(2, FOR_EVER, GOES_ON ",\"eval_data\":\"rows\",\"save_strategy\":\"best\"");
    setenv("FAKE_EVAL_STEPS", "20", 1); /* all measure the same: the first is the best */
    harness_mark(h, "held", true);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_EVAL_STEPS");
    history_reach(h, 25);
    harness_command(h, "pause", "");
    harness_wait_state(h, "paused");
    die_in_writing(h, 0);
    assert_int_equal(pml_message_int(history_restart(h, 1), "step"), 20);
    harness_event(h, 0, PML_EVENT_checkpoint, "step", "20", NULL);
    assert_true(is_saved(h, "step-000020"));
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* What is measured at the end of the training. */
static void the_last_evaluation_is_made(void **state)
{
    (void)state;
    harness *h = harness_new(1, 20, GOES_ON ",\"eval_data\":\"rows\",\"save_steps\":20");
    setenv("FAKE_WAIT_STEP", "20", 1);
    harness_mark(h, "wait", true);
    assert_true(harness_start(h, NULL));
    history_reach(h, 19);
    harness_mark(h, "examined", true);
    harness_mark(h, "wait", false);
    unsetenv("FAKE_WAIT_STEP");
    harness_wait_mark(h, "examining");
    kill(harness_worker_pid(h, 0), SIGKILL);
    history_restart(h, 1);
    harness_mark(h, "examined", false);
    harness_wait_state(h, "finished");
    harness_event(h, 0, PML_EVENT_eval, "step", "20", NULL);
    assert_true(is_saved(h, "step-000020"));
    harness_destroy(&h);
}

/* It stands at a step that was not finite, and what is due after that step comes when it goes on,
 * also by another worker. */
static void what_a_stand_has_put_off_comes(void **state)
{
    (void)state;
    for (int killed = 0; killed < 2; killed++) {
        /* The fake's two workers have no stage, so their snapshot does not wait for the log. */
        harness *h =
            harness_new(1 + killed, 40, GOES_ON ",\"eval_data\":\"rows\",\"save_steps\":20");
        setenv("FAKE_NAN_STEP", "20", 1);
        setenv("FAKE_EVAL_STEPS", "20", 1);
        assert_true(harness_start(h, NULL));
        harness_wait_state(h, "paused");
        int at = h->n_events;
        if (killed) {
            harness_wait_mark(h, "owing"); /* the snapshot of what stands is being taken, */
            history_applied(h, harness_command(h, "sample", SAMPLE)); /* and is, before commands */
            kill(harness_worker_pid(h, 0), SIGKILL);
            assert_int_equal(pml_message_int(history_restart(h, 1), "step"), 20);
            harness_wait_state(h, "paused");
            const pml_message *m = harness_event(h, at, PML_EVENT_state, "state", "paused", NULL);
            assert_non_null(strstr(pml_message_string(m, "reason"), "step 20 is not finite"));
        }
        harness_command(h, "resume", "\"nonfinite\":\"skip\"");
        harness_wait_state(h, "finished");
        unsetenv("FAKE_NAN_STEP");
        unsetenv("FAKE_EVAL_STEPS");
        harness_event(h, at, PML_EVENT_eval, "step", "20", NULL);
        harness_event(h, at, PML_EVENT_eval, "step", "40", NULL);
        assert_int_equal(times_saved(h, 20), 1);
        harness_destroy(&h);
    }
}

/* While nothing is logged no snapshot of one worker counts. One for which the log was too slow is
 * tried again while the run stands, and has what is owed. */
static void a_stand_is_kept_once_the_log_has_it(void **state)
{
    (void)state;
    harness *h = harness_new(1, 40, GOES_ON ",\"eval_data\":\"rows\"");
    char owing[256];
    snprintf(owing, sizeof owing, "%s/owing", h->folder);
    setenv("FAKE_NAN_STEP", "20", 1);
    setenv("FAKE_EVAL_STEPS", "20", 1);
    setenv("FAKE_WAIT_STEP", "20", 1);
    harness_mark(h, "wait", true);
    assert_true(harness_start(h, NULL));
    history_reach(h, 19);
    kill(h->coordinator, SIGSTOP);
    harness_mark(h, "wait", false);
    double end = pml_clock_monotonic() + 200;
    while (unlink(owing) != 0 && pml_clock_monotonic() < end) /* the first try */
        pml_clock_sleep(0.01);
    pml_clock_sleep(2.5); /* it waits for 2 s */
    kill(h->coordinator, SIGCONT);
    harness_wait_state(h, "paused");
    /* The second; none comes where the worker was so late that the first has been in time. */
    end = pml_clock_monotonic() + 10;
    while (unlink(owing) != 0 && pml_clock_monotonic() < end)
        harness_receive_for(h, 0.05);
    history_applied(h, harness_command(h, "sample", SAMPLE)); /* so it is over */
    kill(harness_worker_pid(h, 0), SIGKILL);
    int at = h->n_events;
    assert_int_equal(pml_message_int(history_restart(h, 1), "step"), 20);
    harness_wait_state(h, "paused");
    harness_command(h, "resume", "");
    harness_wait_state(h, "finished");
    unsetenv("FAKE_NAN_STEP");
    unsetenv("FAKE_EVAL_STEPS");
    unsetenv("FAKE_WAIT_STEP");
    harness_event(h, at, PML_EVENT_eval, "step", "20", NULL);
    assert_int_equal(history_check(h), 40);
    harness_destroy(&h);
}

/* It comes to that step again and stands there by itself; one resume ends it, not one for each. */
static void a_stand_that_comes_again_is_one(void **state)
{
    (void)state;
    harness *h = harness_new(1, 40, GOES_ON);
    setenv("FAKE_NAN_STEP", "20", 1);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "paused");
    kill_all(h);
    assert_true(harness_start(h, "--resume", "--recover", NULL));
    harness_wait_state(h, "paused");
    harness_command(h, "resume", "");
    harness_wait_state(h, "finished");
    unsetenv("FAKE_NAN_STEP");
    assert_int_equal(history_check(h), 40);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_last_checkpoint_is_written),
        cmocka_unit_test(a_periodic_one_is_written_once),
        cmocka_unit_test(one_that_was_asked_for_is_written),
        cmocka_unit_test(one_that_was_asked_for_outlives_all),
        cmocka_unit_test(one_that_was_asked_for_at_the_end_is_written),
        cmocka_unit_test(two_that_were_asked_for_are_written),
        cmocka_unit_test(a_pause_is_heard_before_it),
        cmocka_unit_test(an_abandoned_one_is_not_gone_on_from),
        cmocka_unit_test(who_goes_back_gives_it_up),
        cmocka_unit_test(what_was_passed_over_is_written_again),
        cmocka_unit_test(the_best_one_is_written),
        cmocka_unit_test(the_last_evaluation_is_made),
        cmocka_unit_test(what_a_stand_has_put_off_comes),
        cmocka_unit_test(a_stand_is_kept_once_the_log_has_it),
        cmocka_unit_test(a_stand_that_comes_again_is_one),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
