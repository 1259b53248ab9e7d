/* Hands, cleaners and logouts take away under a run what it has in the file system: it puts that
 * back, says so, and no other run gets into its place. */
#include "history.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/net/launch.h"

static const double patience = 240;

static const char *in_folder(const harness *h, const char *name)
{
    static char paths[2][300];
    static int next;
    char *path = paths[next++ % 2];
    snprintf(path, sizeof paths[0], "%s/%s", h->folder, name);
    return path;
}

/* As somebody who comes now: whether the run's coordinator, with this process, can be reached. */
static bool is_reached(const harness *h, pid_t coordinator)
{
    char path[300];
    pml_connection found;
    bool there = pml_connection_find(h->folder, path, sizeof path, NULL) == PML_OK &&
                 pml_connection_read(path, &found, NULL) == PML_OK;
    if (there)
        pml_keypair_forget(&found.keys);
    return there && found.pid == (int)coordinator;
}

/* And does it answer there? */
static void reach(harness *h, pid_t coordinator)
{
    double end = pml_clock_monotonic() + patience;
    while (!is_reached(h, coordinator)) {
        assert_true(pml_clock_monotonic() < end);
        pml_clock_sleep(0.02);
    }
    harness_disconnect(h);
    assert_int_equal(
        pml_connection_find(h->folder, h->connection_file, sizeof h->connection_file, NULL),
        PML_OK);
    harness_connect(h);
}

/* Among the events from index `from` on. */
static void wait_for_log(harness *h, int from, const char *words)
{
    for (int at;; from = at + 1) {
        const pml_message *m = harness_event(h, from, PML_EVENT_log, NULL, NULL, &at);
        if (strstr(pml_message_string(m, "message"), words) != NULL)
            return;
    }
}

/* Before it is back nobody else can take its place, and afterwards nobody needs to. */
static void a_lock_comes_back(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    for (int copied = 0; copied < 2; copied++) {
        char file[300];
        char *text = harness_read(h, "lock");
        const pml_launch another = {
            .program = harness_coordinator(), .run_folder = h->folder, .resume = ""};
        assert_int_equal(unlink(in_folder(h, "lock")), 0);
        if (copied) /* as who restores a backup does */
            assert_int_equal(pml_file_write(in_folder(h, "lock"), text, strlen(text), 0600, NULL),
                             PML_OK);
        free(text);
        assert_int_equal(pml_launch_coordinator(&another, file, sizeof file, NULL), PML_BUSY);
        reach(h, h->coordinator);
    }
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    harness_destroy(&h);
}

/* The coordinator looks every second, and puts into a folder that goes what it misses there. */
static void remove_at_once(const harness *h, const char *folder)
{
    char gone[300];
    snprintf(gone, sizeof gone, "%s/gone", h->root);
    assert_int_equal(rename(folder, gone), 0);
    assert_int_equal(pml_tree_remove(h->root, "gone", NULL), PML_OK);
}

static void sockets_come_back(void **state)
{
    (void)state;
    static const char *const taken[] = {"", "/connection.json", "/ctl"};
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    for (int i = 0; i < 3; i++) {
        char path[300];
        snprintf(path, sizeof path, "%s%s", h->runtime, taken[i]);
        history_reach(h, 5 * i + 5);
        const int so_far = h->n_events;
        if (i == 0)
            remove_at_once(h, h->runtime);
        else
            assert_int_equal(unlink(path), 0);
        wait_for_log(h, so_far, "they are there again");
        assert_int_equal(access(path, F_OK), 0);
        reach(h, h->coordinator);
        kill(harness_worker_pid(h, 0), SIGKILL); /* the next one finds the new door */
        history_restart(h, i + 1);
        harness_wait_state(h, "running");
    }
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

static void the_log_comes_back(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    char *text = harness_read(h, "events.jsonl");
    struct stat ours, there;
    assert_int_equal(stat(in_folder(h, "events.jsonl"), &ours), 0);
    assert_int_equal(link(in_folder(h, "events.jsonl"), in_folder(h, "moved")), 0);
    /* At once in its place, for it may be put back at any moment. */
    assert_int_equal(pml_file_write(in_folder(h, "copy"), text, strlen(text), 0600, NULL), PML_OK);
    assert_int_equal(rename(in_folder(h, "copy"), in_folder(h, "events.jsonl")), 0);
    free(text);
    wait_for_log(h, 0, "the log is back");
    assert_int_equal(stat(in_folder(h, "events.jsonl"), &there), 0);
    assert_true(there.st_dev == ours.st_dev && there.st_ino == ours.st_ino);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    harness_destroy(&h);
}

static int count_errors(const harness *h)
{
    int n = 0;
    for (int i = 0; i < h->n_events; i++)
        n += pml_message_type_of(h->events[i]) == PML_EVENT_log &&
             strcmp(pml_message_string(h->events[i], "level"), "error") == 0;
    return n;
}

/* Two things that cannot be put back, as long as something is in their places: each is said once,
 * and not again at every look. */
static void what_stays_away_is_said_once(void **state)
{
    (void)state;
    static const char *const names[] = {"lock", "events.jsonl"};
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    for (int i = 0; i < 2; i++) {
        const char *away = in_folder(h, i == 0 ? "old" : "moved"), *there = in_folder(h, names[i]);
        assert_int_equal(mkdir(away, 0700), 0);
        assert_int_equal(renameat2(AT_FDCWD, there, AT_FDCWD, away, RENAME_EXCHANGE), 0);
    }
    wait_for_log(h, 0, "/lock");
    wait_for_log(h, 0, "cannot put the log back");
    harness_receive_for(h, 3.5); /* three looks */
    assert_int_equal(count_errors(h), 2);
    for (int i = 0; i < 2; i++)
        assert_int_equal(rmdir(in_folder(h, names[i])), 0);
    wait_for_log(h, 0, "the log is back");
    reach(h, h->coordinator);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    harness_destroy(&h);
}

static int names_in(const char *path)
{
    int n = 0;
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (struct dirent *e = readdir(dir); e != NULL; e = readdir(dir))
        n += e->d_name[0] != '.';
    closedir(dir);
    return n;
}

/* The folder is moved, and the next run of that name begun where it was. */
static void a_moved_run_goes_on(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    char before[96];
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    snprintf(before, sizeof before, "%s", h->folder);
    snprintf(h->folder, sizeof h->folder, "%s/run moved", h->root);
    assert_int_equal(rename(before, h->folder), 0);
    assert_int_equal(mkdir(before, 0700), 0);
    wait_for_log(h, 0, "run moved now");
    reach(h, h->coordinator);

    kill(harness_worker_pid(h, 0), SIGKILL);
    assert_string_equal(pml_message_string(history_restart(h, 1), "cause"), "died");
    harness_wait_state(h, "running");
    history_reach(h, 20);

    pid_t worker = harness_worker_pid(h, 0);
    kill(h->coordinator, SIGKILL);
    assert_int_equal(harness_wait(h), 256 + SIGKILL);
    harness_wait_gone(worker, 10);
    harness_adopt(h);
    assert_string_equal(pml_message_string(history_restart(h, 2), "cause"), "coordinator");
    harness_wait_state(h, "running");
    assert_int_equal(names_in(before), 0);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    assert_true(history_learnt(h, steps) == history_undisturbed(steps));
    harness_destroy(&h);
}

/* The folder is removed, and the next run of that name has it: nothing of the first one's comes
 * into it, and its sockets stay when the first one ends. */
static void a_removed_run_leaves_its_name(void **state)
{
    (void)state;
    harness *h = harness_new(1, FOR_EVER, GOES_ON);
    char *run = NULL, name[300];
    assert_true(harness_start(h, NULL));
    history_reach(h, 5);
    run = harness_read(h, "run.json");
    remove_at_once(h, h->folder);
    assert_int_equal(mkdir(h->folder, 0700), 0);
    assert_int_equal(pml_file_write(in_folder(h, "run.json"), run, strlen(run), 0600, NULL),
                     PML_OK);
    free(run);
    wait_for_log(h, 0, "has been removed");
    history_applied(h, harness_command(h, "checkpoint", ""));
    assert_int_equal(access(in_folder(h, "checkpoints"), F_OK), -1);

    const pml_launch next = {.program = harness_coordinator(), .run_folder = h->folder};
    assert_int_equal(pml_launch_coordinator(&next, name, sizeof name, NULL), PML_OK);
    kill(h->coordinator, SIGTERM);
    harness_wait(h);
    harness_disconnect(h);
    assert_int_equal(
        pml_connection_find(h->folder, h->connection_file, sizeof h->connection_file, NULL),
        PML_OK);
    harness_connect(h);
    pml_message *m = harness_ask(h, "status", "");
    h->adopted = (pid_t)pml_message_int(m, "pid");
    pml_message_destroy(&m);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_lock_comes_back),   cmocka_unit_test(sockets_come_back),
        cmocka_unit_test(the_log_comes_back),  cmocka_unit_test(what_stays_away_is_said_once),
        cmocka_unit_test(a_moved_run_goes_on), cmocka_unit_test(a_removed_run_leaves_its_name),
    };
    if (!harness_programs(argc, argv))
        return 2;
    if (argc > 3)
        cmocka_set_test_filter(argv[3]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
