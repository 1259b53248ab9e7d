/* What is left when processes are killed, and what comes back. */
#include "harness.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/json/sum.h"

static bool has_file(const harness *h, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", h->folder, name);
    return access(path, F_OK) == 0;
}

static void a_killed_worker_fails_the_run(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, NULL);
    harness_is_brief();
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "5", NULL);
    pid_t pids[2] = {harness_worker_pid(h, 0), harness_worker_pid(h, 1)};
    kill(pids[1], SIGKILL);
    harness_wait_state(h, "failed");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_int_equal(pml_message_int(m, "rank"), 1);
    assert_non_null(strstr(pml_message_string(m, "reason"), "killed by signal 9"));
    harness_wait_gone(pids[0], 3);
    assert_false(process_is_there(pids[1]));
    harness_disconnect(h);
    assert_int_equal(harness_wait(h), 0);
    harness_destroy(&h);
}

static void a_failing_worker_says_why(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, NULL);
    setenv("FAKE_FAIL_STEP", "9", 1);
    assert_true(harness_start(h, NULL));
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    unsetenv("FAKE_FAIL_STEP");
    assert_int_equal(pml_message_int(m, "rank"), 1);
    assert_string_equal(pml_message_string(m, "code"), "no memory");
    assert_non_null(strstr(pml_message_string(m, "reason"), "made to fail at step 9"));
    harness_destroy(&h);
}

/* SIGKILL at a moment of the run; workers save and are gone, and the next coordinator goes on. */
static void kill_coordinator_and_resume(int workers, double after, bool paused)
{
    harness *h = harness_new(workers, 100000, NULL);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "3", NULL);
    char number[32];
    snprintf(number, sizeof number, "%lld",
             (long long)harness_command(h, "set", "\"learning_rate\":0.125"));
    harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
    if (paused) {
        harness_command(h, "pause", "");
        harness_wait_state(h, "paused");
    }
    harness_receive_for(h, after);
    pid_t pids[HARNESS_WORKERS];
    for (int r = 0; r < workers; r++)
        pids[r] = harness_worker_pid(h, r);
    kill(h->coordinator, SIGKILL);
    assert_int_equal(harness_wait(h), 256 + SIGKILL);
    for (int r = 0; r < workers; r++)
        harness_wait_gone(pids[r], 5);
    harness_disconnect(h);
    pml_client *stale;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_client_open(h->connection_file, &stale, &err), PML_PEER);

    assert_false(harness_start(h, NULL)); /* it has a history */
    assert_int_equal(atoi(h->error), PML_BUSY);
    assert_true(harness_start(h, "--resume", NULL));
    int at;
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "timeline", "1", &at);
    assert_string_equal(pml_message_string(m, "state"), "starting");
    int64_t saved = strtoll(strrchr(pml_message_string(m, "checkpoint"), '-') + 1, NULL, 10);
    assert_true(saved >= 3);
    char next[32];
    snprintf(next, sizeof next, "%lld", (long long)saved + 1);
    m = harness_event(h, at, PML_EVENT_step, "step", next, NULL);
    assert_true(pml_message_number(m, "learning_rate") == 0.125);
    assert_int_equal(pml_message_int(m, "timeline"), 1);
    harness_destroy(&h);
}

static void a_killed_coordinator_loses_nothing(void **state)
{
    (void)state;
    kill_coordinator_and_resume(2, 0.05, false);
    kill_coordinator_and_resume(2, 0.011, false);
    kill_coordinator_and_resume(1, 0.03, false);
    kill_coordinator_and_resume(2, 0, true);
}

static void killed_while_loading_leaves_nobody(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100, NULL);
    setenv("FAKE_LOAD_MS", "60000", 1);
    assert_true(harness_start(h, NULL));
    pid_t pids[2];
    for (int r = 0; r < 2; r++)
        pids[r] = harness_wait_worker(h, r);
    kill(h->coordinator, SIGKILL);
    harness_wait(h);
    harness_wait_gone(pids[0], 3);
    harness_wait_gone(pids[1], 3);
    unsetenv("FAKE_LOAD_MS");
    harness_destroy(&h);
}

static void sigterm_stops_with_a_checkpoint(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, NULL);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "4", NULL);
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    char *log = harness_read(h, "events.jsonl");
    assert_non_null(strstr(log, "\"type\":\"checkpoint\""));
    assert_non_null(strstr(log, "\"state\":\"stopped\""));
    free(log);
    harness_destroy(&h);
}

static void append(const harness *h, const char *text)
{
    char path[160];
    snprintf(path, sizeof path, "%s/events.jsonl", h->folder);
    int fd = open(path, O_WRONLY | O_APPEND);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void a_torn_line_is_cut(void **state)
{
    (void)state;
    harness *h = harness_new(1, 20, NULL);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);
    int64_t last = h->last_seq;
    append(h, "{\"seq\":9999,\"time\":1.5,\"timel");
    assert_true(harness_start(h, "--resume", NULL));
    harness_catch_up(h);
    char *log = harness_read(h, "events.jsonl");
    assert_null(strstr(log, "\"seq\":9999"));
    free(log);
    const pml_message *m = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    assert_non_null(strstr(pml_message_string(m, "message"), "torn"));
    assert_true(pml_message_int(m, "seq") > last);
    /* At its last step it is finished at once, and serves. */
    harness_wait_state(h, "finished");
    harness_command(h, "sample",
                    "\"input_ids\":[1],\"max_new_tokens\":2,\"temperature\":0,\"seed\":1");
    harness_event(h, 0, PML_EVENT_sample, NULL, NULL, NULL);
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);

    /* Damage before what was synced is not ours to repair. */
    append(h, "not an event\n");
    append(h, "{\"seq\":1,\"time\":1,\"timeline\":0,\"type\":\"applied\",\"step\":1}\n");
    append(h, "anything\n");
    assert_false(harness_start(h, "--resume", NULL));
    assert_int_equal(atoi(h->error), PML_CORRUPT);
    assert_non_null(strstr(h->error, "events.jsonl, line "));
    harness_destroy(&h);
}

static void a_damaged_checkpoint_is_passed_over(void **state)
{
    (void)state;
    harness *h = harness_new(1, 20, "\"save_steps\":8");
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    kill(h->coordinator, SIGTERM);
    harness_wait(h);
    harness_disconnect(h);
    assert_true(has_file(h, "checkpoints/step-000008/MANIFEST"));
    assert_true(has_file(h, "checkpoints/step-000016/MANIFEST"));
    char path[200];
    snprintf(path, sizeof path, "%s/checkpoints/step-000020/state.json", h->folder);
    assert_int_equal(unlink(path), 0);
    snprintf(path, sizeof path, "%s/checkpoints/step-000016/state.json", h->folder);
    assert_int_equal(pml_file_write(path, "{\"step\":16,\"learning_rate\":9}", 29, 0600, NULL),
                     PML_OK);

    assert_false(harness_start(h, "--resume", "step-000016", NULL));
    assert_int_equal(atoi(h->error), PML_CORRUPT);
    assert_true(harness_start(h, "--resume", NULL));
    int at = 0;
    const char *const names[] = {"step-000020", "step-000016"};
    for (int i = 0; i < 2; i++) {
        const pml_message *m = harness_event(h, at, PML_EVENT_log, "level", "warning", &at);
        assert_non_null(strstr(pml_message_string(m, "message"), names[i]));
        at++;
    }
    const pml_message *m = harness_event(h, at, PML_EVENT_state, "state", "starting", NULL);
    assert_string_equal(pml_message_string(m, "checkpoint"), "checkpoints/step-000008");
    harness_wait_state(h,
                       "finished"); /* step-000020 is written again, in the damaged one's place */
    assert_true(has_file(h, "checkpoints/step-000020/state.json"));
    harness_destroy(&h);
}

/* Set at a step, gone back before it: in force again at that step when the run only recovers, not
 * when somebody named the checkpoint. */
static void settings_come_back_at_their_steps(void **state)
{
    (void)state;
    harness *h = harness_new(2, 60, "\"save_steps\":10");
    setenv("FAKE_WAIT_STEP", "30", 1); /* or the run might be over before it is told */
    harness_mark(h, "wait", true);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "12", NULL);
    char number[32];
    snprintf(number, sizeof number, "%lld",
             (long long)harness_command(h, "set", "\"learning_rate\":0.75"));
    harness_mark(h, "wait", false);
    int64_t k =
        pml_message_int(harness_event(h, 0, PML_EVENT_applied, "command", number, NULL), "step");
    assert_true(k > 12 && k < 50);
    harness_wait_state(h, "finished");
    kill(h->coordinator, SIGTERM);
    harness_wait(h);
    harness_disconnect(h);
    unsetenv("FAKE_WAIT_STEP");
    for (int step = 20; step <= 60; step += 10) {
        char name[64];
        snprintf(name, sizeof name, "checkpoints/step-%06d", step);
        assert_int_equal(pml_tree_remove(h->folder, name, NULL), PML_OK);
    }
    for (int named = 0; named < 2; named++) {
        assert_true(named ? harness_start(h, "--resume", "step-000010", NULL)
                          : harness_start(h, "--resume", NULL));
        harness_wait_state(h, "finished");
        harness_catch_up(h);
        for (int i = 0; i < h->n_events; i++) {
            const pml_message *m = h->events[i];
            if (pml_message_type_of(m) != PML_EVENT_step ||
                pml_message_int(m, "timeline") != 1 + named)
                continue;
            double want = pml_message_int(m, "step") >= k && !named ? 0.75 : 0.0005;
            if (pml_message_number(m, "learning_rate") != want)
                fail_msg("step %lld of timeline %d used %g", (long long)pml_message_int(m, "step"),
                         1 + named, pml_message_number(m, "learning_rate"));
        }
        kill(h->coordinator, SIGTERM);
        harness_wait(h);
        harness_disconnect(h);
    }
    harness_destroy(&h);
}

static void end_coordinator(harness *h)
{
    kill(h->coordinator, SIGTERM);
    harness_wait(h);
    harness_disconnect(h);
}

static void what_decides_bits_is_held(void **state)
{
    (void)state;
    harness *h = harness_new(1, 100000, NULL);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "3", NULL);
    end_coordinator(h);
    char *run = harness_read(h, "run.json");
    assert_non_null(strstr(run, "\"identity\":{\"threads\":1}"));
    free(run);
    setenv("FAKE_THREADS", "2", 1);
    assert_true(harness_start(h, "--resume", NULL));
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(pml_message_string(m, "reason"), "threads: 1, now 2"));
    end_coordinator(h);
    assert_true(harness_start(h, "--resume", "--accept-changes", NULL));
    harness_wait_state(h, "running");
    unsetenv("FAKE_THREADS");
    harness_destroy(&h);
}

/* Started again only to be asked: nothing is made that could differ, and what made the run stays
 * written. */
static void a_finished_run_keeps_its_identity(void **state)
{
    (void)state;
    harness *h = harness_new(1, 10, NULL);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    end_coordinator(h);
    char *before = harness_read(h, "run.json");
    setenv("FAKE_THREADS", "2", 1);
    assert_true(harness_start(h, "--resume", NULL));
    harness_wait_state(h, "finished");
    unsetenv("FAKE_THREADS");
    harness_command(h, "sample",
                    "\"input_ids\":[1],\"max_new_tokens\":2,\"temperature\":0,\"seed\":1");
    harness_event(h, 0, PML_EVENT_sample, NULL, NULL, NULL);
    char *after = harness_read(h, "run.json");
    assert_string_equal(before, after);
    free(before);
    free(after);
    harness_destroy(&h);
}

static void ten_thousand_events_come_quickly(void **state)
{
    (void)state;
    harness *h = harness_new(1, 10, NULL);
    char path[160], *text = malloc(10000 * 400);
    size_t n = 0;
    for (int i = 1; i <= 10000; i++) {
        char *line;
        int size =
            asprintf(&line,
                     "{\"seq\":%d,\"time\":1795240990.7682211,\"timeline\":0,\"type\":\"step\","
                     "\"step\":%d,\"loss\":2.25,\"learning_rate\":0.0005,\"grad_norm\":1.0,"
                     "\"tokens\":2048,\"labels\":2000,\"seconds\":0.0021170729996811133,"
                     "\"tokens_per_second\":9447.0053715731701,\"epoch\":0.04}",
                     i, i);
        size_t bytes = (size_t)size;
        assert_int_equal(pml_sum_add(&line, &bytes, NULL), PML_OK);
        memcpy(text + n, line, bytes);
        text[n + bytes] = '\n';
        n += bytes + 1;
        free(line);
    }
    snprintf(path, sizeof path, "%s/events.jsonl", h->folder);
    assert_int_equal(pml_file_write(path, text, n, 0600, NULL), PML_OK);
    free(text);
    assert_true(harness_start(h, "--resume", NULL));
    double begin = pml_clock_monotonic();
    int64_t from = 1, last = 1, got = 0;
    while (from <= last) {
        char fields[64];
        snprintf(fields, sizeof fields, "\"from\":%lld", (long long)from);
        pml_message *m = harness_ask(h, "replay", fields);
        assert_int_equal(pml_message_int(m, "from"), from);
        from = pml_message_int(m, "next");
        last = pml_message_int(m, "last");
        got += (int64_t)pml_message_count(m, "events");
        pml_message_destroy(&m);
    }
    double seconds = pml_clock_monotonic() - begin;
    assert_true(got >= 10000 && got == last);
    print_message("%lld events in %.3f s, parsed and checked\n", (long long)got, seconds);
    harness_destroy(&h);
}

static int64_t checkpoint_bytes(harness *h)
{
    char number[32];
    snprintf(number, sizeof number, "%lld",
             (long long)harness_command(h, "checkpoint", "\"name\":\"kept\""));
    const pml_message *m = harness_event(h, 0, PML_EVENT_checkpoint, "command", number, NULL);
    assert_true(has_file(h, pml_message_string(m, "path")));
    return pml_message_int(m, "bytes");
}

/* The same name again, with other settings and when somebody has removed what was there; with and
 * without a file system that can exchange two names. */
static void a_name_that_is_taken_is_replaced(void **state)
{
    (void)state;
    for (int exchange = 0; exchange < 2; exchange++) {
        harness *h = harness_new(1, 100000, NULL);
        setenv("PML_SAVE_EXCHANGE", exchange ? "1" : "0", 1);
        assert_true(harness_start(h, NULL));
        unsetenv("PML_SAVE_EXCHANGE");
        harness_event(h, 0, PML_EVENT_step, "step", "3", NULL);
        harness_command(h, "pause", "");
        harness_wait_state(h, "paused");
        int64_t bytes = checkpoint_bytes(h);
        assert_true(bytes > 0);
        harness_command(h, "set", "\"learning_rate\":0.125");
        assert_true(checkpoint_bytes(h) > 0);
        char path[300], name[200], parent[200];
        const pml_message *m = harness_event(h, 0, PML_EVENT_checkpoint, NULL, NULL, NULL);
        snprintf(path, sizeof path, "%s/state.json", pml_message_string(m, "path"));
        char *text = harness_read(h, path);
        assert_non_null(strstr(text, "\"learning_rate\":0.25")); /* the fake's schedule halves it */
        free(text);
        snprintf(parent, sizeof parent, "%s/checkpoints", h->folder);
        snprintf(name, sizeof name, "%s", strchr(pml_message_string(m, "path"), '/') + 1);
        snprintf(path, sizeof path, "checkpoints/.old-%s", name);
        assert_false(has_file(h, path));
        snprintf(path, sizeof path, "checkpoints/.new-%s", name);
        assert_false(has_file(h, path));

        assert_int_equal(pml_tree_remove(parent, name, NULL), PML_OK);
        assert_true(checkpoint_bytes(h) > 0);
        harness_destroy(&h);
    }
}

/* The shards are there: the program that made them need not be. */
static void a_resume_with_shards_prepares_nothing(void **state)
{
    (void)state;
    harness *h = harness_new(1, 5, NULL);
    h->prepare[0] = "/nowhere/python";
    char path[200];
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "failed");
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);
    snprintf(path, sizeof path, "%s/data", h->folder);
    assert_int_equal(pml_folder_make(path, NULL), PML_OK);
    strcat(path, "/train.safetensors");
    assert_int_equal(pml_file_write(path, "", 0, 0600, NULL), PML_OK);
    assert_true(harness_start(h, "--resume", NULL));
    harness_wait_state(h, "finished");
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_killed_worker_fails_the_run),
        cmocka_unit_test(a_failing_worker_says_why),
        cmocka_unit_test(a_killed_coordinator_loses_nothing),
        cmocka_unit_test(killed_while_loading_leaves_nobody),
        cmocka_unit_test(sigterm_stops_with_a_checkpoint),
        cmocka_unit_test(a_torn_line_is_cut),
        cmocka_unit_test(a_damaged_checkpoint_is_passed_over),
        cmocka_unit_test(settings_come_back_at_their_steps),
        cmocka_unit_test(what_decides_bits_is_held),
        cmocka_unit_test(a_finished_run_keeps_its_identity),
        cmocka_unit_test(ten_thousand_events_come_quickly),
        cmocka_unit_test(a_name_that_is_taken_is_replaced),
        cmocka_unit_test(a_resume_with_shards_prepares_nothing),
    };
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
