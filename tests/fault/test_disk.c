/* Whole runs on disks that fail: the run goes on, says what is wrong, and loses nothing. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/net/launch.h"
#include "pml/train/checkpoint.h"
#include "watched.h"

static void set_faults(int64_t from, int64_t to, int code)
{
    disk->from = 0;
    disk->n = 0;
    disk->to = to;
    disk->code = code;
    disk->from = from;
}

static void mend(void)
{
    set_faults(0, 0, 0);
}

/* ---- checkpoints ---- */

/* The end of a checkpoint command: its event, or NULL and why in *words. */
static const pml_message *end_of_checkpoint(harness *h, int64_t number, const char **words)
{
    double deadline = pml_clock_monotonic() + harness_bound(20);
    *words = NULL;
    for (int i = 0; pml_clock_monotonic() < deadline;) {
        for (; i < h->n_events; i++) {
            const pml_message *m = h->events[i];
            if (pml_message_int(m, "command") != number)
                continue;
            if (pml_message_type_of(m) == PML_EVENT_checkpoint)
                return m;
            if (pml_message_type_of(m) == PML_EVENT_log) {
                *words = pml_message_string(m, "message");
                return NULL;
            }
        }
        harness_receive_for(h, 0.01);
    }
    fail_msg("checkpoint command %lld has no end", (long long)number);
    return NULL;
}

static void expect_whole(harness *h, const pml_message *checkpoint)
{
    char path[600];
    pml_error err = PML_ERROR_INIT;
    snprintf(path, sizeof path, "%s/%s", h->folder, pml_message_string(checkpoint, "path"));
    if (pml_checkpoint_verify(path, &err) != PML_OK)
        fail_msg("announced, and not whole: %s", err.message);
}

/* One checkpoint whose n-th operation fails; whether it has so many. */
static bool fail_one(harness *h, int64_t n, int code)
{
    const char *words;
    set_faults(n, n, code);
    int64_t number = harness_command(h, "checkpoint", "\"name\":\"again\"");
    const pml_message *m = end_of_checkpoint(h, number, &words);
    bool reached = disk->n >= n;
    /* Only what was to be removed was not, and that is told; making a folder that is there is no
     * loss. */
    if (m != NULL && reached && strncmp(disk->last, "mkdir", 5) != 0)
        harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    if (m == NULL && strstr(words, strerror(code)) == NULL)
        fail_msg("operation %lld (%s) is told as: %s", (long long)n, disk->last, words);
    if (m == NULL)
        assert_non_null(strstr(words, "the run goes on"));
    mend();
    number = harness_command(h, "checkpoint", "\"name\":\"again\"");
    m = end_of_checkpoint(h, number, &words);
    if (m == NULL)
        fail_msg("not made good after operation %lld: %s", (long long)n, words);
    expect_whole(h, m);
    return reached;
}

static void every_write_of_a_checkpoint(void **state)
{
    (void)state;
    /* In turns; each code at each write in train.disk, without processes. */
    static const int codes[2][2] = {{ENOSPC, ENOSPC}, {EROFS, EDQUOT}};
    for (int c = 0; c < 2; c++) {
        harness *h = harness_new(1, 1000000, NULL);
        watch("fake_worker", h);
        assert_true(harness_start(h, NULL));
        watch(NULL, h);
        harness_event(h, 0, PML_EVENT_step, "step", "2", NULL);
        int64_t n = 1;
        while (fail_one(h, n, codes[c][n % 2]))
            n++;
        assert_true(n > 20);
        harness_command(h, "stop", "");
        harness_wait_state(h, "stopped");
        harness_destroy(&h);
    }
}

/* The last checkpoint waits for room: the run is not finished before it is on disk. */
static void the_end_waits_for_room(void **state)
{
    (void)state;
    harness *h = harness_new(1, 30, NULL);
    watch("fake_worker", h);
    set_faults(1, INT64_MAX, ENOSPC);
    assert_true(harness_start(h, NULL));
    watch(NULL, h);
    const pml_message *m = harness_event(h, 0, PML_EVENT_log, "level", "error", NULL);
    assert_non_null(strstr(pml_message_string(m, "message"), strerror(ENOSPC)));
    harness_receive_for(h, 2.5);
    int complaints = 0;
    for (int i = 0; i < h->n_events; i++) {
        assert_int_not_equal(pml_message_type_of(h->events[i]), PML_EVENT_checkpoint);
        complaints += pml_message_type_of(h->events[i]) == PML_EVENT_log;
    }
    assert_int_equal(complaints, 1); /* not one for each attempt */
    mend();
    expect_whole(h, harness_event(h, 0, PML_EVENT_checkpoint, "step", "30", NULL));
    harness_wait_state(h, "finished");
    harness_destroy(&h);
}

/* Nobody waits for ever for a disk that stays full: it ends, and says what is lost. */
static void a_stop_does_not_wait_for_ever(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, NULL);
    watch("fake_worker", h);
    assert_true(harness_start(h, NULL));
    watch(NULL, h);
    harness_event(h, 0, PML_EVENT_step, "step", "3", NULL);
    set_faults(1, INT64_MAX, EROFS);
    double begin = pml_clock_monotonic();
    harness_command(h, "stop", "");
    harness_wait_state(h, "failed");
    assert_true(pml_clock_monotonic() - begin < harness_bound(15));
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(pml_message_string(m, "reason"), strerror(EROFS)));
    mend();
    harness_destroy(&h);
}

/* ---- the log ---- */

static pml_message *status_of(harness *h)
{
    pml_message *m = harness_ask(h, "status", "");
    assert_int_equal(pml_message_type_of(m), PML_ANSWER_welcome);
    return m;
}

static void wait_for_trouble(harness *h, int code)
{
    for (double end = pml_clock_monotonic() + harness_bound(20); pml_clock_monotonic() < end;) {
        pml_message *m = status_of(h);
        char words[1500];
        snprintf(words, sizeof words, "%s", pml_message_string(m, "trouble"));
        pml_message_destroy(&m);
        if (words[0] == '\0') {
            harness_receive_for(h, 0.05);
            continue;
        }
        assert_non_null(strstr(words, "events.jsonl"));
        assert_non_null(strstr(words, strerror(code)));
        assert_non_null(strstr(words, "make room"));
        return;
    }
    fail_msg("nobody says that the disk fails");
}

/* Lines of the log on disk, by their numbers. */
static int count_lines(const harness *h)
{
    char *text = harness_read(h, "events.jsonl");
    int lines = 0;
    for (char *at = text; (at = strstr(at, "{\"seq\":")) != NULL; at++) {
        if (at == text || at[-1] == '\n')
            assert_int_equal(strtoll(at + 7, NULL, 10), ++lines);
    }
    free(text);
    return lines;
}

/* The log on disk is what was received, line for line. Behind the run's end there may come one
 * more: the resume that a coordinator gives itself is refused then. */
static void expect_the_log_is_whole(harness *h)
{
    int lines = -1;
    double end = pml_clock_monotonic() + harness_bound(5);
    while (lines != h->n_events && pml_clock_monotonic() < end) {
        harness_catch_up(h);
        lines = count_lines(h);
    }
    assert_int_equal(lines, h->n_events);
}

static void a_full_disk_holds_events_back(void **state)
{
    (void)state;
    static const int codes[] = {ENOSPC, EIO, EDQUOT};
    harness *h = harness_new(1, 1000000, NULL);
    watch("pml-coordinator", h);
    assert_true(harness_start(h, NULL));
    watch(NULL, h);
    harness_event(h, 0, PML_EVENT_step, "step", "5", NULL);
    for (int c = 0; c < 3; c++) {
        set_faults(1, INT64_MAX, codes[c]);
        wait_for_trouble(h, codes[c]);
        harness_receive_for(h, 0.2);
        int64_t seen = h->last_seq;
        pml_message *m = status_of(h);
        int64_t step = pml_message_int(m, "step");
        assert_true(pml_message_int(m, "seq") == seen || c > 0);
        pml_message_destroy(&m);
        /* It is taken and carried out, and its events wait like all others. */
        pml_message *accepted = harness_ask(h, "set", "\"learning_rate\":0.25");
        int64_t number = pml_message_int(accepted, "command");
        assert_non_null(strstr(pml_message_string(accepted, "trouble"), strerror(codes[c])));
        pml_message_destroy(&accepted);
        double end = pml_clock_monotonic() + harness_bound(20);
        for (int64_t now = step; now <= step;) { /* the run goes on */
            assert_true(pml_clock_monotonic() < end);
            harness_receive_for(h, 0.5);
            m = status_of(h);
            now = pml_message_int(m, "step");
            pml_message_destroy(&m);
        }
        assert_int_equal(h->last_seq, seen); /* what is not in the log is not told */
        mend();
        char text[32];
        snprintf(text, sizeof text, "%lld", (long long)number);
        int at;
        harness_event(h, 0, PML_EVENT_applied, "command", text, &at);
        const pml_message *told = harness_event(h, at, PML_EVENT_log, "level", "warning", NULL);
        assert_non_null(strstr(pml_message_string(told, "message"), strerror(codes[c])));
        m = status_of(h);
        assert_string_equal(pml_message_string(m, "trouble"), "");
        pml_message_destroy(&m);
        accepted = harness_ask(h, "set", "\"learning_rate\":0.25");
        assert_string_equal(pml_message_string(accepted, "trouble"), "");
        pml_message_destroy(&accepted);
    }
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    expect_the_log_is_whole(h);
    harness_destroy(&h);
}

static void wait_until_it_stands(harness *h)
{
    double end = pml_clock_monotonic() + harness_bound(20);
    for (bool paused = false; !paused;) {
        pml_message *m = status_of(h);
        paused = strcmp(pml_message_string(m, "state"), "paused") == 0;
        pml_message_destroy(&m);
        assert_true(pml_clock_monotonic() < end);
        harness_receive_for(h, 0.01); /* who asks without a pause is refused as hurried, in time */
    }
}

/* Too much waits: the run stands, and goes on when there is room; commands are refused at last. */
static void what_waits_is_bounded(void **state)
{
    (void)state;
    setenv("PML_HELD_BYTES", "20000", 1);
    harness *h = harness_new(2, 1000000, NULL);
    watch("pml-coordinator", h);
    assert_true(harness_start(h, NULL));
    watch(NULL, h);
    unsetenv("PML_HELD_BYTES");
    harness_event(h, 0, PML_EVENT_step, "step", "5", NULL);
    set_faults(1, INT64_MAX, ENOSPC);
    wait_for_trouble(h, ENOSPC);
    wait_until_it_stands(h);
    bool refused = false;
    for (int i = 0; i < 1000 && !refused; i++) {
        pml_message *m = harness_ask(h, "set", "\"learning_rate\":0.5");
        refused = pml_message_type_of(m) == PML_ANSWER_error;
        if (refused) {
            assert_string_equal(pml_message_string(m, "code"), "io");
            assert_non_null(strstr(pml_message_string(m, "message"), strerror(ENOSPC)));
        }
        pml_message_destroy(&m);
    }
    assert_true(refused);
    mend();
    int at;
    harness_event(h, 0, PML_EVENT_state, "state", "paused", &at);
    harness_event(h, at, PML_EVENT_state, "state", "running", &at);
    harness_event(h, at, PML_EVENT_step, NULL, NULL, NULL);

    /* Who pauses a run that stands by itself wants it to stand. */
    set_faults(1, INT64_MAX, ENOSPC);
    wait_for_trouble(h, ENOSPC);
    wait_until_it_stands(h);
    int64_t number = harness_command(h, "pause", "");
    mend();
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)number);
    harness_event(h, at, PML_EVENT_applied, "command", text, &at);
    harness_receive_for(h, 1);
    harness_catch_up(h);
    for (; at < h->n_events; at++)
        assert_int_not_equal(pml_message_type_of(h->events[at]), PML_EVENT_step);
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    expect_the_log_is_whole(h);
    harness_destroy(&h);
}

/* A coordinator that gets no processor for a while finds more than twice the bound at once, at
 * which commands are refused: its own pause is not. Here each step is as much. */
static void a_run_stands_also_where_much_comes_at_once(void **state)
{
    (void)state;
    setenv("PML_HELD_BYTES", "100", 1);
    harness *h = harness_new(1, 1000000, NULL);
    watch("pml-coordinator", h);
    assert_true(harness_start(h, NULL));
    watch(NULL, h);
    unsetenv("PML_HELD_BYTES");
    harness_event(h, 0, PML_EVENT_step, "step", "5", NULL);
    set_faults(1, INT64_MAX, ENOSPC);
    wait_for_trouble(h, ENOSPC);
    wait_until_it_stands(h);
    mend();
    int at;
    harness_event(h, 0, PML_EVENT_state, "state", "paused", &at);
    harness_event(h, at, PML_EVENT_state, "state", "running", &at);
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    expect_the_log_is_whole(h);
    harness_destroy(&h);
}

/* ---- the start ---- */

/* Finished; or failed before its first step, by file and reason. */
static void wait_for_its_end(harness *h)
{
    for (double end = pml_clock_monotonic() + harness_bound(20);;) {
        pml_message *m = status_of(h);
        bool finished = strcmp(pml_message_string(m, "state"), "finished") == 0;
        bool failed = strcmp(pml_message_string(m, "state"), "failed") == 0;
        if (failed) {
            assert_int_equal(pml_message_int(m, "step"), 0);
            const char *reason = pml_message_string(m, "reason");
            bool named = strstr(reason, h->root) != NULL || strstr(reason, "file workers") != NULL;
            if (!named || strstr(reason, strerror(disk->code)) == NULL)
                fail_msg("%s is told as: %s", disk->last, reason);
        }
        pml_message_destroy(&m);
        if (finished || failed)
            return;
        if (pml_clock_monotonic() > end)
            fail_msg("no end after operation %s failed", disk->last);
        harness_receive_for(h, 0.01);
    }
}

/* Whatever fails while a coordinator starts: it says which file and why and leaves nobody behind,
 * or it runs; and then a healthy start succeeds. */
static void every_write_of_a_start(void **state)
{
    (void)state;
    /* Behind the first 32 it is the log of a run: some of them. */
    setenv("PML_RETRY_SECONDS", "0.05", 1);
    for (int64_t n = 1, last = 2; n <= last; n += n < 32 ? 1 : 9) {
        harness *h = harness_new(1, 10, NULL);
        watch("pml-coordinator", h);
        set_faults(n, n, n % 2 == 0 ? ENOSPC : EIO);
        bool started = harness_start(h, NULL);
        watch(NULL, h);
        if (started) {
            wait_for_its_end(h);
            kill(h->coordinator, SIGTERM);
            assert_int_equal(harness_wait(h), 0);
            harness_disconnect(h);
        } else {
            assert_non_null(strstr(h->error, strerror(disk->code)));
            if (strstr(h->error, h->root) == NULL && strstr(h->error, "lock") == NULL)
                fail_msg("%s is told as: %s", disk->last, h->error);
        }
        last = disk->n >= n ? n + 9 : n;
        mend();
        assert_true(harness_start(h, "--resume", NULL));
        harness_wait_state(h, "finished");
        char *run = harness_read(h, "run.json");
        assert_non_null(strstr(run, "\"identity\""));
        free(run);
        harness_destroy(&h);
        assert_true(n < 1000);
    }
    unsetenv("PML_RETRY_SECONDS");
}

/* A run that finished, whose coordinator is gone. */
static harness *one_that_ended(void)
{
    harness *h = harness_new(1, 10, NULL);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    harness_command(h, "stop", "");
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);
    return h;
}

/* Hashing takes longer than whoever starts the coordinator waits without a sign of life. */
static void a_slow_checkpoint_is_waited_for(void **state)
{
    (void)state;
    enum { READ_MS = 1800, PATIENCE_MS = 6000 };
    harness *h = one_that_ended();
    watch("pml-coordinator", h);
    disk->read_ms = READ_MS;
    char connection[512];
    pml_error err = PML_ERROR_INIT;
    const pml_launch launch = {.program = harness_coordinator(),
                               .run_folder = h->folder,
                               .resume = "",
                               .timeout_ms = PATIENCE_MS};
    double begin = pml_clock_monotonic();
    pml_status status = pml_launch_coordinator(&launch, connection, sizeof connection, &err);
    watch(NULL, h);
    disk->read_ms = 0;
    if (status != PML_OK)
        fail_msg("%s", err.message);
    assert_true(pml_clock_monotonic() - begin > PATIENCE_MS / 1e3);
    harness_adopt(h);
    harness_wait_state(h, "finished");
    harness_destroy(&h);
}

/* On a disk so slow that one read takes two seconds, a checkpoint of 32 of them is hashed. */
static void make_it_long(harness *h)
{
    enum { BYTES = 32 << 20 };
    char path[400], hex[PML_HASH_HEX];
    uint8_t hash[PML_HASH_BYTES];
    pml_error err = PML_ERROR_INIT;
    char *manifest = harness_read(h, "checkpoints/step-000010/MANIFEST");
    assert_true(strlen(manifest) > 0);
    snprintf(path, sizeof path, "%s/checkpoints/step-000010/long.safetensors", h->folder);
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, BYTES), 0);
    close(fd);
    if (pml_hash_file(path, false, hash, &err) != PML_OK)
        fail_msg("%s", err.message);
    pml_hash_hex(hash, sizeof hash, hex);
    char *longer = malloc(strlen(manifest) + 200);
    int n = sprintf(longer, "%s%s  long.safetensors\n", manifest, hex);
    snprintf(path, sizeof path, "%s/checkpoints/step-000010/MANIFEST", h->folder);
    assert_int_equal(pml_file_write(path, longer, (size_t)n, 0600, NULL), PML_OK);
    free(longer);
    free(manifest);
}

static void *launch_it(void *argument)
{
    char connection[512];
    static pml_error err = PML_ERROR_INIT;
    pml_status status = pml_launch_coordinator(argument, connection, sizeof connection, &err);
    return status == PML_OK ? NULL : err.message;
}

/* Who asks while it is hashed is told how far that is. */
static void who_asks_of_a_slow_checkpoint_is_told(void **state)
{
    (void)state;
    harness *h = one_that_ended();
    make_it_long(h);
    watch("pml-coordinator", h);
    disk->read_ms = 2000;
    pthread_t thread;
    pml_launch launch = {.program = harness_coordinator(),
                         .run_folder = h->folder,
                         .resume = "",
                         .timeout_ms = 120000};
    assert_int_equal(pthread_create(&thread, NULL, launch_it, &launch), 0);
    harness_adopt(h); /* the doors are open, and it says what it is */
    pml_message *answer = harness_ask(h, "set", "\"learning_rate\":0.5");
    disk->read_ms = 0;
    assert_string_equal(pml_message_string(answer, "code"), "busy");
    const char *words = "resuming: checking step-000010, ";
    assert_memory_equal(pml_message_string(answer, "message"), words, strlen(words));
    assert_non_null(strstr(pml_message_string(answer, "message"), " of 32 MiB"));
    pml_message_destroy(&answer);
    void *problem;
    pthread_join(thread, &problem);
    watch(NULL, h);
    if (problem != NULL)
        fail_msg("%s", (char *)problem);
    harness_wait_state(h, "finished");
    const pml_message *told = harness_event(h, 0, PML_EVENT_progress, NULL, NULL, NULL);
    while (strncmp(pml_message_string(told, "what"), "checking step-000010, ", 22) != 0) {
        int at = 0;
        while (h->events[at++] != told)
            continue;
        told = harness_event(h, at, PML_EVENT_progress, NULL, NULL, NULL);
    }
    harness_destroy(&h);
}

/* Steps go on, and how far the save is comes between them. */
static void a_slow_save_says_how_far_it_is(void **state)
{
    (void)state;
    setenv("FAKE_SAVE_MS", "4500", 1);
    harness *h = harness_new(1, 1000000, NULL);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "running");
    unsetenv("FAKE_SAVE_MS");
    harness_catch_up(h); /* what was told of loading */
    int begin = h->n_events, saved, at = begin;
    harness_command(h, "checkpoint", "");
    harness_event(h, begin, PML_EVENT_checkpoint, NULL, NULL, &saved);
    double last = 0;
    int told = 0;
    for (; at < saved; at++) {
        const pml_message *m = h->events[at];
        if (pml_message_type_of(m) != PML_EVENT_progress)
            continue;
        assert_memory_equal(pml_message_string(m, "what"), "saving step ", 12);
        assert_non_null(strstr(pml_message_string(m, "what"), " of 128 MiB"));
        assert_true(pml_message_number(m, "fraction") > last);
        last = pml_message_number(m, "fraction");
        told++;
    }
    assert_true(told >= 2 && last == 1); /* and nothing of it stands any more */
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_write_of_a_checkpoint),
        cmocka_unit_test(the_end_waits_for_room),
        cmocka_unit_test(a_stop_does_not_wait_for_ever),
        cmocka_unit_test(a_full_disk_holds_events_back),
        cmocka_unit_test(what_waits_is_bounded),
        cmocka_unit_test(a_run_stands_also_where_much_comes_at_once),
        cmocka_unit_test(every_write_of_a_start),
        cmocka_unit_test(a_slow_checkpoint_is_waited_for),
        cmocka_unit_test(who_asks_of_a_slow_checkpoint_is_told),
        cmocka_unit_test(a_slow_save_says_how_far_it_is),
    };
    if (argc < 4 || !harness_programs(argc, argv)) {
        fprintf(stderr, "usage: %s PML-COORDINATOR FAKE-WORKER LIBDISK\n", argv[0]);
        return 2;
    }
    watched_library(argv[3]);
    if (argc > 4)
        cmocka_set_test_filter(argv[4]);
    return cmocka_run_group_tests(tests, watched_begin, watched_end);
}
