/* Launching: detached, with closed descriptors, and with the reason when it does not start. */
#include "harness.h"

#include <dirent.h>
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

static const char *program;

static pml_status launch(harness *h, const char *resume, pml_error *err)
{
    const pml_launch l = {.program = program, .run_folder = h->folder, .resume = resume};
    return pml_launch_coordinator(&l, h->connection_file, sizeof h->connection_file, err);
}

static pid_t coordinator_pid(harness *h)
{
    pml_message *m = harness_ask(h, "status", "");
    pid_t pid = (pid_t)pml_message_int(m, "pid");
    pml_message_destroy(&m);
    return pid;
}

static void wait_gone(pid_t pid)
{
    for (int i = 0; i < 20000 && process_is_there(pid); i++)
        pml_clock_sleep(0.01);
    assert_false(process_is_there(pid));
}

/* Fields 4 (parent) and 6 (session) of /proc/PID/stat. */
static void parent_and_session(pid_t pid, int *parent, int *session)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    assert_int_equal(sscanf(strrchr(text, ')') + 1, " %*c %d %*d %d", parent, session), 2);
}

static bool holds(pid_t pid, const char *target)
{
    char folder[64], link[512];
    snprintf(folder, sizeof folder, "/proc/%d/fd", (int)pid);
    DIR *dir = opendir(folder);
    bool found = false;
    for (struct dirent *e = dir == NULL ? NULL : readdir(dir); e != NULL; e = readdir(dir)) {
        ssize_t n = readlinkat(dirfd(dir), e->d_name, link, sizeof link - 1);
        link[n > 0 ? n : 0] = '\0';
        found = found || strcmp(link, target) == 0;
    }
    closedir(dir);
    return found;
}

static void a_launched_coordinator_is_on_its_own(void **state)
{
    (void)state;
    harness *h = harness_new(2, 100000, NULL);
    harness_is_brief();
    pml_error err = PML_ERROR_INIT;
    char marker[200];
    snprintf(marker, sizeof marker, "%s/inherited", h->root);
    int fd = open(marker, O_CREAT | O_RDWR, 0600); /* not close-on-exec, as in many a kernel */
    if (launch(h, NULL, &err) != PML_OK)
        fail_msg("%s", err.message);
    harness_connect(h);
    pid_t pid = coordinator_pid(h);
    int parent, session;
    parent_and_session(pid, &parent, &session);
    assert_int_not_equal(parent, getpid());
    assert_int_not_equal(session, getsid(0));
    harness_event(h, 0, PML_EVENT_step, "step", "3", NULL);
    assert_true(holds(getpid(), marker));
    assert_false(holds(pid, marker));
    assert_false(holds(harness_worker_pid(h, 1), marker));
    assert_true(holds(pid, "/dev/null"));
    close(fd);

    /* A second one says that there is one, and where. */
    memset(h->connection_file, 0, sizeof h->connection_file);
    assert_int_equal(launch(h, NULL, &err), PML_BUSY);
    harness_disconnect(h);
    harness_connect(h);
    assert_int_equal(coordinator_pid(h), pid);
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    harness_disconnect(h);
    wait_gone(pid);

    assert_int_equal(launch(h, "", &err), PML_OK); /* resume */
    harness_connect(h);
    harness_event(h, 0, PML_EVENT_state, "timeline", "1", NULL);
    harness_wait_state(h, "running");
    pid = coordinator_pid(h);
    kill(pid, SIGTERM);
    wait_gone(pid);
    harness_destroy(&h);
}

static void a_failed_start_says_why(void **state)
{
    (void)state;
    pml_error err = PML_ERROR_INIT;
    harness *h = harness_new(1, 5, "\"seed\":-1.5"); /* twice */
    assert_int_equal(launch(h, NULL, &err), PML_CORRUPT);
    assert_non_null(strstr(err.message, "run.json"));
    assert_int_equal(launch(h, "step-000001", &err), PML_CORRUPT);
    const char *good = program;
    program = "/nowhere/pml-coordinator";
    assert_int_equal(launch(h, NULL, &err), PML_NOT_FOUND);
    program = "/bin/true"; /* ends without a word */
    assert_int_equal(launch(h, NULL, &err), PML_PEER);
    assert_non_null(strstr(err.message, "log/coordinator.log"));
    program = "/etc/passwd"; /* cannot be executed */
    assert_int_not_equal(launch(h, NULL, &err), PML_OK);
    program = good;
    assert_int_equal(pml_tree_remove(h->folder, "run.json", NULL), PML_OK);
    assert_int_equal(launch(h, NULL, &err), PML_NOT_FOUND);
    harness_destroy(&h);
}

/* A folder from somebody else may have a link where the log goes. */
static void a_linked_log_is_not_written(void **state)
{
    (void)state;
    static const char *const names[] = {"log", "log/coordinator.log"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        pml_error err = PML_ERROR_INIT;
        harness *h = harness_new(1, 5, NULL);
        char elsewhere[200], path[200];
        snprintf(elsewhere, sizeof elsewhere, "%s/elsewhere", h->root);
        snprintf(path, sizeof path, "%s/log", h->folder);
        assert_int_equal(mkdir(elsewhere, 0700), 0);
        if (i > 0)
            assert_int_equal(mkdir(path, 0700), 0);
        snprintf(path, sizeof path, "%s/%s", h->folder, names[i]);
        assert_int_equal(symlink(elsewhere, path), 0);
        assert_int_equal(launch(h, NULL, &err), PML_DENIED);
        assert_non_null(strstr(err.message, "is a link"));
        assert_non_null(strstr(err.message, names[i]));
        assert_int_equal(rmdir(elsewhere), 0); /* it is empty */
        harness_destroy(&h);
    }
}

/* A service manager that does not work costs an attempt, not the run. */
static void a_broken_scope_is_passed_over(void **state)
{
    (void)state;
    harness *h = harness_new(1, 100000, NULL);
    char path[200];
    snprintf(path, sizeof path, "%s/systemd", h->root);
    assert_int_equal(mkdir(path, 0700), 0);
    strcat(path, "/private");
    assert_int_equal(pml_file_write(path, "", 0, 0600, NULL), PML_OK);
    pml_error err = PML_ERROR_INIT;
    setenv("PML_SCOPE", "1", 1); /* also where this user does not linger */
    pml_status status = launch(h, NULL, &err);
    unsetenv("PML_SCOPE");
    if (status != PML_OK)
        fail_msg("%s", err.message);
    harness_connect(h);
    pid_t pid = coordinator_pid(h);
    kill(pid, SIGTERM);
    wait_gone(pid);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_launched_coordinator_is_on_its_own),
        cmocka_unit_test(a_failed_start_says_why),
        cmocka_unit_test(a_linked_log_is_not_written),
        cmocka_unit_test(a_broken_scope_is_passed_over),
    };
    if (!harness_programs(argc, argv))
        return 2;
    program = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
