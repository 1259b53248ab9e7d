/* What a run would go on from cannot be read just now: that is no damage, and nothing older takes
 * its place. A run that goes on by itself tries again; who resumes one is told why not. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "history.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "watched.h"

static const int codes[] = {EIO, EMFILE, ENOMEM};
#define SAVES ",\"save_steps\":20"

/* Reads of paths that have `of` in them fail from now on: the next n, or all (-1). */
static void refuse_reads(const char *of, int64_t n, int code)
{
    disk->read_from = 0;
    snprintf(disk->read_of, sizeof disk->read_of, "%s", of);
    disk->reads = 0;
    disk->read_code = code;
    disk->read_to = n < 0 ? INT64_MAX : n;
    disk->read_from = 1;
}

static void mend(void)
{
    disk->read_from = 0;
}

/* A run of one worker that has saved twice at least, with the shim in its coordinators. */
static harness *begin_run(const char *retry_seconds)
{
    setenv("PML_RETRY_SECONDS", retry_seconds, 1);
    harness *h = harness_new(1, FOR_EVER, GOES_ON SAVES);
    watch("pml-coordinator", h);
    assert_true(harness_start(h, NULL));
    watch(NULL, h);
    unsetenv("PML_RETRY_SECONDS");
    history_reach(h, 45);
    return h;
}

/* The last event of the log that is a checkpoint, before index `end`. */
static const pml_message *newest_before(const harness *h, int end)
{
    for (int i = end - 1; i >= 0; i--)
        if (pml_message_type_of(h->events[i]) == PML_EVENT_checkpoint)
            return h->events[i];
    fail_msg("there is no checkpoint");
    return NULL;
}

/* Waits for a state whose reason begins so, and says this cause and the checkpoint. */
static void expect_waiting(harness *h, int from, int code)
{
    static const char words[] = "waiting to read what the run goes on from: ";
    for (int at = from;; at++) {
        const pml_message *m = harness_event(h, at, PML_EVENT_state, "state", "starting", &at);
        const char *reason = pml_message_string(m, "reason");
        if (strncmp(reason, words, sizeof words - 1) != 0)
            continue;
        if (strstr(reason, strerror(code)) == NULL || strstr(reason, "step-") == NULL)
            fail_msg("%s is told as: %s", disk->last, reason);
        return;
    }
}

/* The n-th restart goes on from the newest checkpoint that was announced before it. */
static void expect_newest(harness *h, int n)
{
    const pml_message *m = history_restart(h, n);
    int at = 0;
    while (h->events[at] != m)
        at++;
    assert_string_equal(pml_message_string(m, "from"), "checkpoint");
    assert_int_equal(pml_message_int(m, "step"), pml_message_int(newest_before(h, at), "step"));
    assert_true(pml_message_int(m, "step") >= 45);
}

static void nothing_was_passed_over(harness *h)
{
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++) {
        const char *text = pml_message_string(h->events[i], "message");
        if (pml_message_type_of(h->events[i]) == PML_EVENT_log &&
            (strstr(text, "is not used") != NULL || strstr(text, "begins again") != NULL))
            fail_msg("%s", text);
    }
}

/* Wherever in it, and for whichever reason. */
static void what_cannot_be_read_is_read_again(void **state)
{
    (void)state;
    harness *h = begin_run("0.01");
    for (int i = 0; i < 6; i++) {
        int code = codes[i % 3], before = h->n_events;
        /* The first one is for what viewers are told, how large it is. */
        refuse_reads(i < 3 ? "/step-" : "/MANIFEST", 2 + i, code);
        harness_kill_coordinator(h);
        harness_adopt(h);
        expect_newest(h, i + 1);
        expect_waiting(h, before, code);
        assert_true(disk->reads > 2 + i);
        harness_wait_state(h, "running");
    }
    nothing_was_passed_over(h);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* The next coordinator cannot even read what the run is, or its log; or not what its workers have
 * left. */
static void a_takeover_that_cannot_read_is_tried_again(void **state)
{
    (void)state;
    static const char *const files[] = {"/run.json", "/handover.jsonl", "/events.jsonl"};
    harness *h = begin_run("0.01");
    for (int i = 0; i < 3; i++) {
        refuse_reads(files[i], 2, codes[(i + 1) % 3]);
        harness_kill_coordinator(h);
        harness_adopt(h);
        expect_newest(h, i + 1);
        assert_true(disk->reads > 2);
        harness_wait_state(h, "running");
    }
    nothing_was_passed_over(h);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* Waits until the shim has made all those fail that it was told to, and one more was made. */
static void expect_tries(int64_t n)
{
    while (disk->reads <= n)
        pml_clock_sleep(0.01);
}

static void expect_saving(harness *h)
{
    pml_message *m = harness_ask(h, "status", "");
    assert_string_equal(pml_message_string(m, "reason"),
                        "the workers of the coordinator before are saving what they have");
    pml_message_destroy(&m);
    assert_int_equal(history_restarts(h), 0);
}

/* That the workers of the coordinator before are there cannot be found out just now, at its
 * beginning or later: they are waited for all the same. */
static void who_cannot_be_seen_has_not_ended(void **state)
{
    (void)state;
    harness *h = begin_run("0.01");
    harness_mark(h, "held", true); /* they save until it is taken away */
    refuse_reads("/workers", 3, EMFILE);
    harness_kill_coordinator(h);
    setenv("PML_RETRY_SECONDS", "0.01", 1);
    watch_again("pml-coordinator");
    assert_true(harness_start(h, "--recover", NULL)); /* the only worker saves */
    watch(NULL, h);
    unsetenv("PML_RETRY_SECONDS");
    expect_tries(4);
    expect_saving(h);
    refuse_reads("/workers", 3, ENOMEM);
    expect_tries(4); /* what was found out then has been told */
    expect_saving(h);
    harness_mark(h, "held", false);
    expect_newest(h, 1);
    harness_wait_state(h, "running");
    nothing_was_passed_over(h);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* The names of the checkpoints and the bytes of run.json, as one text. */
static char *what_is_there(const harness *h)
{
    char command[400], *text = harness_read(h, "run.json");
    size_t n = strlen(text);
    snprintf(command, sizeof command, "ls -A %s/checkpoints", h->folder);
    FILE *list = popen(command, "r");
    char *all = realloc(text, n + (64 << 10));
    assert_non_null(list);
    assert_non_null(all);
    n += fread(all + n, 1, (64 << 10) - 1, list);
    all[n] = '\0';
    assert_int_equal(pclose(list), 0);
    return all;
}

/* It never can: the run fails with the cause and has changed nothing; a person is refused at once,
 * and may go back by name, or on once it can be read. */
static void what_can_never_be_read_is_told(void **state)
{
    (void)state;
    harness *h = begin_run("0.01");
    refuse_reads("/step-", -1, EIO);
    harness_kill_coordinator(h);
    harness_adopt(h);
    harness_wait_state(h, "failed");
    pml_message *m = harness_ask(h, "status", "");
    const char *reason = pml_message_string(m, "reason");
    if (strstr(reason, "tried 10 times: checkpoint step-") != reason ||
        strstr(reason, strerror(EIO)) == NULL || strstr(reason, "no older one") == NULL ||
        strstr(reason, "pantheraml doctor") == NULL)
        fail_msg("%s", reason);
    pml_message_destroy(&m);
    assert_int_equal(history_restarts(h), 0);
    nothing_was_passed_over(h);
    const pml_message *newest = newest_before(h, h->n_events);
    const char *path = pml_message_string(newest, "path"), *name = strrchr(path, '/');
    int64_t step;
    kill(h->adopted, SIGTERM);
    harness_wait_gone(h->adopted, 10);
    harness_disconnect(h);
    h->adopted = 0;

    char *before = what_is_there(h), *log = harness_read(h, "events.jsonl");
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        refuse_reads(name, -1, codes[i]);
        watch_again("pml-coordinator");
        assert_false(harness_start(h, "--resume", NULL));
        watch(NULL, h);
        if (strstr(h->error, strerror(codes[i])) == NULL || strstr(h->error, name + 1) == NULL ||
            strstr(h->error, "no older one") == NULL)
            fail_msg("%s", h->error);
        char *after = what_is_there(h), *longer = harness_read(h, "events.jsonl");
        assert_string_equal(after, before);
        assert_string_equal(longer, log);
        free(after);
        free(longer);
    }
    free(before);
    free(log);

    mend();
    watch_again("pml-coordinator");
    assert_true(harness_start(h, "--resume", NULL));
    watch(NULL, h);
    harness_event(h, 0, PML_EVENT_state, "checkpoint", path, NULL);
    harness_wait_state(h, "running");
    step = history_stop(h);
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);

    /* By its name an older one is taken, whatever becomes of the newest. */
    refuse_reads(strrchr(pml_message_string(newest_before(h, h->n_events), "path"), '/'), -1, EIO);
    watch_again("pml-coordinator");
    assert_true(harness_start(h, "--resume", "step-000020", NULL));
    watch(NULL, h);
    harness_event(h, 0, PML_EVENT_state, "checkpoint", "checkpoints/step-000020", NULL);
    history_reach(h, step + 1);
    harness_destroy(&h);
}

/* Who waits to read can be stopped. */
static void who_waits_to_read_can_be_stopped(void **state)
{
    (void)state;
    harness *h = begin_run("100");
    int before = h->n_events;
    refuse_reads("/step-", -1, EIO);
    harness_kill_coordinator(h);
    harness_adopt(h);
    expect_waiting(h, before, EIO);
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    pml_message *m = harness_ask(h, "status", "");
    assert_non_null(strstr(pml_message_string(m, "reason"), "stopped by force"));
    assert_non_null(strstr(pml_message_string(m, "reason"), strerror(EIO)));
    pml_message_destroy(&m);
    harness_destroy(&h);
}

/* What is really damaged or gone is passed over, and so is what no run has put there. */
typedef enum spoiling { DAMAGED, GONE, A_FILE, A_LINK, A_SOCKET, SPOILINGS } spoiling;

static void spoil(const harness *h, spoiling how)
{
    char folder[300], path[400], other[300];
    snprintf(folder, sizeof folder, "%s/checkpoints/step-000060", h->folder);
    snprintf(other, sizeof other, "%s/checkpoints/step-000020", h->folder);
    snprintf(path, sizeof path, "%s/%s", folder, how == DAMAGED ? "state.json" : "MANIFEST");
    if (how == DAMAGED)
        assert_int_equal(pml_file_write(path, "{}", 2, 0600, NULL), PML_OK);
    if (how == A_SOCKET) {
        assert_int_equal(unlink(path), 0);
        assert_int_equal(mknod(path, S_IFSOCK | 0600, 0), 0);
    }
    if (how == DAMAGED || how == A_SOCKET)
        return;
    assert_int_equal(pml_tree_remove(h->folder, "checkpoints/step-000060", NULL), PML_OK);
    if (how == A_FILE)
        assert_int_equal(pml_file_write(folder, "", 0, 0600, NULL), PML_OK);
    if (how == A_LINK)
        assert_int_equal(symlink(other, folder), 0);
}

static void what_is_unfit_is_passed_over(void **state)
{
    (void)state;
    for (spoiling how = DAMAGED; how < SPOILINGS; how++) {
        harness *h = harness_new(1, 60, "\"save_steps\":20");
        assert_true(harness_start(h, NULL));
        harness_wait_state(h, "finished");
        kill(h->coordinator, SIGTERM);
        assert_int_equal(harness_wait(h), 0);
        harness_disconnect(h);
        spoil(h, how);
        assert_true(harness_start(h, "--resume", NULL));
        const pml_message *m = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
        static const char words[] = "checkpoint step-000060 is not used, the one before it is: ";
        assert_memory_equal(pml_message_string(m, "message"), words, sizeof words - 1);
        harness_event(h, 0, PML_EVENT_state, "checkpoint", "checkpoints/step-000040", NULL);
        harness_destroy(&h);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_cannot_be_read_is_read_again),
        cmocka_unit_test(a_takeover_that_cannot_read_is_tried_again),
        cmocka_unit_test(who_cannot_be_seen_has_not_ended),
        cmocka_unit_test(what_can_never_be_read_is_told),
        cmocka_unit_test(who_waits_to_read_can_be_stopped),
        cmocka_unit_test(what_is_unfit_is_passed_over),
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
