/* Commands: one order, one step on every worker, one effect an id. */
#include "harness.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/clock.h"

static const char *text_of(const pml_message *m, const char *field)
{
    return pml_message_string(m, field);
}

static void a_run_from_start_to_finish(void **state)
{
    (void)state;
    harness *h = harness_new(2, 30, "\"eval_data\":\"data/eval.safetensors\"");
    harness_is_brief();
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    pml_message *m = harness_ask(h, "status", "");
    assert_int_equal(pml_message_int(m, "step"), 30);
    assert_int_equal(pml_message_int(m, "max_steps"), 30);
    assert_int_equal(pml_message_count(m, "workers"), 2);
    assert_string_equal(text_of(m, "role"), "control");
    pml_message_destroy(&m);

    /* A finished run still answers. */
    char number[32];
    int64_t k = harness_command(h, "sample",
                                "\"input_ids\":[100],\"max_new_tokens\":70,\"temperature\":0,"
                                "\"seed\":1");
    snprintf(number, sizeof number, "%lld", (long long)k);
    int applied, tokens = 0;
    harness_event(h, 0, PML_EVENT_applied, "command", number, &applied);
    for (int i = 0; i < applied; i++)
        if (pml_message_type_of(h->events[i]) == PML_EVENT_sample)
            for (size_t t = 0; t < pml_message_count(h->events[i], "token_ids"); t++)
                assert_int_equal(pml_message_int_at(h->events[i], "token_ids", t), 100 + tokens++);
    assert_int_equal(tokens, 70);
    k = harness_command(h, "sample",
                        "\"input_ids\":[1],\"max_new_tokens\":2000,\"temperature\":0,\"seed\":1");
    snprintf(number, sizeof number, "%lld", (long long)k);
    const pml_message *refused = harness_event(h, 0, PML_EVENT_refused, "command", number, NULL);
    assert_non_null(strstr(text_of(refused, "reason"), "2001 tokens"));
    k = harness_command(h, "evaluate", "");
    snprintf(number, sizeof number, "%lld", (long long)k);
    const pml_message *eval = harness_event(h, 0, PML_EVENT_eval, "command", number, NULL);
    assert_true(pml_message_number(eval, "loss") == 3.0); /* (3 + 6) / (1 + 2) */
    assert_int_equal(pml_message_int(eval, "labels"), 3);
    m = harness_ask(h, "pause", "");
    assert_int_equal(pml_message_type_of(m), PML_ANSWER_error);
    assert_string_equal(text_of(m, "code"), "busy");
    pml_message_destroy(&m);

    /* stop lets the workers go, and the run is finished still. */
    pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    harness_command(h, "stop", "");
    for (int i = 0; i < 20000 && (process_is_there(pids[0]) || process_is_there(pids[1])); i++)
        harness_receive_for(h, 0.01);
    assert_false(process_is_there(pids[0]) || process_is_there(pids[1]));
    harness_wait_state(h, "finished");
    harness_disconnect(h);
    assert_int_equal(harness_wait(h), 0); /* the grace time is over */
    assert_int_not_equal(access(h->connection_file, F_OK), 0);
    harness_destroy(&h);
}

/* Steps are 1, 2, …, none is taken back, and the log has no gap. */
static void check_log(const harness *h, int steps)
{
    char *text = harness_read(h, "events.jsonl"), *rest = text;
    int64_t seq = 0, step = 0;
    for (char *line = strsep(&rest, "\n"); line != NULL && *line; line = strsep(&rest, "\n")) {
        pml_message *m;
        pml_error err = PML_ERROR_INIT;
        if (pml_message_parse(PML_CHANNEL_EVENT, line, strlen(line), &m, &err) != PML_OK)
            fail_msg("%s: %s", err.message, line);
        assert_int_equal(pml_message_int(m, "seq"), ++seq);
        if (pml_message_type_of(m) == PML_EVENT_step)
            assert_int_equal(pml_message_int(m, "step"), ++step);
        /* A state that stands before a step that was told would take the step back. */
        if (pml_message_type_of(m) == PML_EVENT_state)
            assert_true(pml_message_int(m, "step") >= step);
        if (pml_message_type_of(m) == PML_EVENT_log && strcmp(text_of(m, "level"), "error") == 0)
            fail_msg("%s", text_of(m, "message"));
        pml_message_destroy(&m);
    }
    assert_int_equal(step, steps);
    free(text);
}

/* What the two ranks used, step for step. */
static void check_used(const harness *h, int steps)
{
    char *a = harness_read(h, "used-0.txt"), *b = harness_read(h, "used-1.txt");
    int lines = 0;
    for (const char *p = a; *p; p++)
        lines += *p == '\n';
    assert_int_equal(lines, steps);
    assert_string_equal(a, b);
    free(a);
    free(b);
}

static void one_hundred_random_commands(void **state)
{
    (void)state;
    enum { COMMANDS = 100 };
    harness *h = harness_new(2, 100000, "\"eval_data\":\"data/eval.safetensors\"");
    setenv("FAKE_STEP_MS", "1", 1);
    assert_true(harness_start(h, NULL));
    unsigned random = 12345;
    double rates[COMMANDS + 1] = {0};
    int64_t numbers[COMMANDS];
    for (int i = 0; i < COMMANDS; i++) {
        char fields[200] = "";
        const char *verb = NULL;
        random = random * 1664525 + 1013904223;
        unsigned choice = (random >> 16) % 10;
        if (choice < 5) {
            rates[i] = 1e-6 * (double)(1 + (random >> 8) % 1000);
            snprintf(fields, sizeof fields, "\"learning_rate\":%.17g", rates[i]);
            verb = "set";
        } else {
            static const char *const verbs[] = {"pause", "resume", "resume", "evaluate",
                                                "checkpoint"};
            verb = verbs[choice - 5];
            if (strcmp(verb, "checkpoint") == 0)
                snprintf(fields, sizeof fields, "\"name\":\"c%d\"", i);
        }
        numbers[i] = harness_command(h, verb, fields);
        harness_receive_for(h, (random >> 20) % 3 * 0.004);
    }
    harness_command(h, "resume", "");
    for (int i = 0; i < COMMANDS; i++) {
        char number[32];
        snprintf(number, sizeof number, "%lld", (long long)numbers[i]);
        assert_int_equal(numbers[i], i + 1);
        const pml_message *m = harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
        assert_int_equal(pml_message_count(m, "workers"), 2);
    }
    int64_t stop = harness_command(h, "stop", "");
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)stop);
    int64_t end =
        pml_message_int(harness_event(h, 0, PML_EVENT_applied, "command", number, NULL), "step");
    harness_wait_state(h, "stopped");

    /* The learning rate of every step is the one of the last set in force, on both ranks. */
    check_used(h, (int)end - 1);
    check_log(h, (int)end - 1);
    char *used = harness_read(h, "used-0.txt"), *rest = used;
    double rate = 0.0005; /* 0.001 * the fake schedule's 0.5 */
    for (int64_t step = 1; step < end; step++) {
        for (int i = 0; i < h->n_events; i++) {
            const pml_message *m = h->events[i];
            if (pml_message_type_of(m) == PML_EVENT_applied && pml_message_int(m, "step") == step &&
                strcmp(text_of(m, "verb"), "set") == 0)
                rate = rates[pml_message_int(m, "command") - 1];
        }
        char *line = strsep(&rest, "\n");
        double was = strtod(strchr(line, ' '), NULL);
        if (fabs(was - rate) > 1e-15)
            fail_msg("step %lld used %g, not %g", (long long)step, was, rate);
    }
    free(used);
    unsetenv("FAKE_STEP_MS");
    harness_destroy(&h);
}

static void a_repeated_id_has_one_effect(void **state)
{
    (void)state;
    harness *h = harness_new(1, 100000, NULL);
    assert_true(harness_start(h, NULL));
    pml_message *a = harness_ask_as(h, "same", "set", "\"learning_rate\":0.5");
    pml_message *b = harness_ask_as(h, "same", "set", "\"learning_rate\":0.5");
    assert_int_equal(pml_message_type_of(b), PML_ANSWER_accepted);
    assert_int_equal(pml_message_int(a, "command"), pml_message_int(b, "command"));
    pml_message_destroy(&a);
    pml_message_destroy(&b);
    b = harness_ask_as(h, "same", "set", "\"learning_rate\":0.25");
    assert_int_equal(pml_message_type_of(b), PML_ANSWER_error);
    assert_string_equal(text_of(b, "code"), "invalid");
    pml_message_destroy(&b);
    assert_int_equal(harness_command(h, "pause", ""), 2);
    harness_wait_state(h, "paused");

    /* Also after another coordinator has taken over. */
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);
    assert_true(harness_start(h, "--resume", NULL));
    b = harness_ask_as(h, "same", "set", "\"learning_rate\":0.5");
    assert_int_equal(pml_message_int(b, "command"), 1);
    pml_message_destroy(&b);
    harness_wait_state(h, "running");
    assert_int_equal(harness_command(h, "pause", ""), 4);
    harness_destroy(&h);
}

static void not_a_number_pauses(void **state)
{
    (void)state;
    harness *h = harness_new(2, 50, NULL);
    setenv("FAKE_NAN_STEP", "7", 1);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "paused");
    unsetenv("FAKE_NAN_STEP");
    pml_message *m = harness_ask(h, "status", "");
    assert_int_equal(pml_message_int(m, "step"), 7);
    assert_non_null(strstr(text_of(m, "reason"), "not finite"));
    assert_null(strstr(text_of(m, "reason"), "float16")); /* is not what this run is in */
    pml_message_destroy(&m);
    const pml_message *step = harness_event(h, 0, PML_EVENT_step, "step", "7", NULL);
    assert_true(isnan(pml_message_number(step, "loss")));
    assert_true(pml_message_bool(step, "skipped"));
    harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    harness_command(h, "resume", "");
    harness_wait_state(h, "finished");
    harness_destroy(&h);
}

static int count_states(const harness *h, const char *state)
{
    int n = 0;
    for (int i = 0; i < h->n_events; i++)
        n += pml_message_type_of(h->events[i]) == PML_EVENT_state &&
             strcmp(text_of(h->events[i], "state"), state) == 0;
    return n;
}

/* A run that goes on and stands again at once has run, though one worker may stand again before
 * the other has said that it goes on. */
static void who_stands_again_at_once_has_run(void **state)
{
    (void)state;
    enum { TURNS = 60 };
    harness *h = harness_new(2, 1000, NULL);
    setenv("FAKE_STEP_MS", "0", 1);
    setenv("FAKE_NAN_FROM", "1", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    unsetenv("FAKE_NAN_FROM");
    for (int i = 0, at = -1; i < TURNS; i++) {
        harness_event(h, at + 1, PML_EVENT_log, "level", "warning", &at); /* it stands */
        harness_command(h, i < TURNS - 1 ? "resume" : "stop", "");
    }
    harness_event(h, 0, PML_EVENT_state, "state", "stopped", NULL);
    assert_int_equal(count_states(h, "running"), TURNS);
    assert_int_equal(count_states(h, "paused"), TURNS);
    harness_destroy(&h);
}

/* A loss that float16 could not hold stands too, and says what would. */
static void float16_ends(void **state)
{
    (void)state;
    harness *h = harness_new(1, 8, NULL);
    setenv("FAKE_NAN_STEP", "7", 1);
    setenv("FAKE_SCALE", "1024", 1);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "paused");
    unsetenv("FAKE_NAN_STEP");
    unsetenv("FAKE_SCALE");
    pml_message *m = harness_ask(h, "status", "");
    assert_int_equal(pml_message_int(m, "step"), 7);
    assert_non_null(strstr(text_of(m, "reason"), "dtype=\"float32\""));
    pml_message_destroy(&m);
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    harness_destroy(&h);
}

/* A gradient that float16 could not hold is told, and is no reason to stand still. */
static void an_overflow_goes_on(void **state)
{
    (void)state;
    harness *h = harness_new(2, 8, NULL);
    static const struct {
        const char *step;
        double scale;
        bool skipped;
    } told[] = {{"2", 1024, false}, {"3", 1024, true}, {"5", 256, true}, {"6", 128, false}};
    int index = 0;
    setenv("FAKE_SCALE", "1024", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_SCALE");
    harness_wait_state(h, "finished");
    for (size_t i = 0; i < sizeof told / sizeof *told; i++) {
        const pml_message *step = harness_event(h, 0, PML_EVENT_step, "step", told[i].step, NULL);
        assert_true(pml_message_number(step, "loss_scale") == told[i].scale);
        assert_int_equal(pml_message_bool(step, "skipped"), told[i].skipped);
    }
    const pml_message *log = harness_event(h, 0, PML_EVENT_log, "level", "info", &index);
    assert_non_null(strstr(text_of(log, "message"), "float16: step 1 has a loss scale of 1024"));
    for (int step = 3; step <= 5; step++) {
        char words[64];
        snprintf(words, sizeof words, "step %d was too large for float16", step);
        log = harness_event(h, index + 1, PML_EVENT_log, "level", "warning", &index);
        assert_non_null(strstr(text_of(log, "message"), words));
    }
    harness_destroy(&h);
}

/* What is asked for behind a stop gets its end too. */
static void nothing_is_left_open(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, NULL);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "2", NULL);
    for (int i = 0; i < 5; i++) {
        char text[200];
        const char *verb = i == 0 ? "stop" : "checkpoint";
        int n = snprintf(text, sizeof text, "{\"type\":\"%s\",\"id\":\"behind-%d\"}", verb, i);
        assert_int_equal(pml_client_send(h->client, text, (size_t)n, NULL), PML_OK);
    }
    harness_wait_state(h, "stopped");
    harness_receive_for(h, 0.3); /* less than the grace time */
    int open = 0, accepted = 0;
    for (int i = 0; i < h->n_events; i++) {
        pml_message_type type = pml_message_type_of(h->events[i]);
        accepted += type == PML_EVENT_command;
        open +=
            (type == PML_EVENT_command) - (type == PML_EVENT_applied) - (type == PML_EVENT_refused);
    }
    assert_true(accepted >= 1);
    assert_int_equal(open, 0);
    harness_destroy(&h);
}

/* However long it would take: one that was asked for is refused. */
static void a_stop_breaks_an_evaluation_off(void **state)
{
    (void)state;
    harness *h = harness_new(2, 50, "\"eval_data\":\"data/eval.safetensors\"");
    harness_mark(h, "examined", true); /* what training has to beat, before the first step */
    assert_true(harness_start(h, NULL));
    harness_wait_mark(h, "examining");
    char number[32];
    int64_t asked = harness_command(h, "evaluate", ""), stop = harness_command(h, "stop", "");
    snprintf(number, sizeof number, "%lld", (long long)asked);
    const pml_message *m = harness_event(h, 0, PML_EVENT_refused, "command", number, NULL);
    assert_non_null(strstr(text_of(m, "reason"), "stopped while it evaluated"));
    snprintf(number, sizeof number, "%lld", (long long)stop);
    m = harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
    assert_int_equal(pml_message_int(m, "step"), 1);
    harness_wait_state(h, "stopped");
    harness_destroy(&h);
}

/* A run whose last evaluation was broken off is stopped and not finished; it is made when the run
 * goes on. */
static void a_last_evaluation_is_made_again(void **state)
{
    (void)state;
    harness *h = harness_new(2, 20, "\"eval_data\":\"data/eval.safetensors\"");
    setenv("FAKE_WAIT_STEP", "20", 1);
    harness_mark(h, "wait", true);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "19", NULL);
    harness_mark(h, "examined", true);
    harness_mark(h, "wait", false);
    harness_wait_mark(h, "examining");
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    harness_disconnect(h);
    assert_int_equal(kill(h->coordinator, SIGTERM), 0);
    assert_int_equal(harness_wait(h), 0);
    harness_mark(h, "examined", false);
    assert_true(harness_start(h, "--resume", NULL));
    harness_event(h, 0, PML_EVENT_eval, "step", "20", NULL);
    harness_wait_state(h, "finished");
    check_log(h, 20);
    harness_destroy(&h);
}

static void stopping_before_it_began(void **state)
{
    (void)state;
    harness *h = harness_new(2, 50, NULL);
    setenv("FAKE_LOAD_MS", "60000", 1);
    assert_true(harness_start(h, NULL));
    harness_receive_for(h, 0.2);
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped"); /* long before they have loaded */
    unsetenv("FAKE_LOAD_MS");
    harness_destroy(&h);
}

static void prepare_comes_first(void **state)
{
    (void)state;
    harness *h = harness_new(1, 5, NULL);
    h->prepare[0] = "sh";
    h->prepare[1] = "-c";
    h->prepare[2] = "echo '{\"type\":\"progress\",\"what\":\"tokenising\","
                    "\"fraction\":1}'; echo nonsense; echo $0 > $0/was-here";
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    harness_event(h, 0, PML_EVENT_progress, "what", "tokenising", NULL);
    char *was = harness_read(h, "was-here");
    assert_int_equal(strncmp(was, h->folder, strlen(h->folder)), 0);
    free(was);
    harness_destroy(&h);

    h = harness_new(1, 5, NULL);
    h->prepare[0] = "sh";
    h->prepare[1] = "-c";
    h->prepare[2] = "echo '{\"type\":\"error\",\"code\":\"not found\","
                    "\"message\":\"train.jsonl, line 7: empty\"}'; exit 1";
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "failed");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_string_equal(text_of(m, "reason"), "train.jsonl, line 7: empty");
    assert_string_equal(text_of(m, "code"), "not found");
    harness_destroy(&h);

    h = harness_new(1, 5, NULL);
    h->prepare[0] = "/nowhere/python";
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "failed");
    m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(text_of(m, "reason"), "/nowhere/python"));
    harness_destroy(&h);
}

static void bad_starts_say_why(void **state)
{
    (void)state;
    harness *h = harness_new(1, 100000, NULL);
    assert_true(harness_start(h, NULL));
    harness second = *h;
    assert_false(harness_start(&second, NULL));
    assert_int_equal(atoi(second.error), PML_BUSY);
    harness_destroy(&h);

    h = harness_new(1, 5, "\"lora_dropout\":7");
    assert_false(harness_start(h, NULL)); /* twice in one object: damaged */
    assert_int_equal(atoi(h->error), PML_CORRUPT);
    harness_destroy(&h);

    h = harness_new(1, 5, NULL);
    assert_false(harness_start(h, "--resume", "step-000007", NULL));
    assert_int_equal(atoi(h->error), PML_NOT_FOUND);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_run_from_start_to_finish),
        cmocka_unit_test(one_hundred_random_commands),
        cmocka_unit_test(a_repeated_id_has_one_effect),
        cmocka_unit_test(not_a_number_pauses),
        cmocka_unit_test(who_stands_again_at_once_has_run),
        cmocka_unit_test(float16_ends),
        cmocka_unit_test(an_overflow_goes_on),
        cmocka_unit_test(nothing_is_left_open),
        cmocka_unit_test(a_stop_breaks_an_evaluation_off),
        cmocka_unit_test(a_last_evaluation_is_made_again),
        cmocka_unit_test(stopping_before_it_began),
        cmocka_unit_test(prepare_comes_first),
        cmocka_unit_test(bad_starts_say_why),
    };
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
