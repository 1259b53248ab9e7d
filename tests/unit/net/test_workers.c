/* Which workers are there, and that nobody else is killed for one. */
#include "pml/net/connection.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"

static char folder[] = "/tmp/pml-workers-XXXXXX";
static const char *our_program; /* the workers here are forked, and run what we do */

static int make_folder(void **state)
{
    (void)state;
    return mkdtemp(folder) == NULL;
}

static int remove_folder(void **state)
{
    (void)state;
    return pml_tree_remove("/tmp", folder + 5, NULL) != PML_OK;
}

/* A process that does nothing; with a lock it is the worker of that rank. */
static pid_t begin(int lock, int rank)
{
    int ready[2];
    char byte;
    assert_int_equal(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) {
        if (lock >= 0 && pml_runtime_worker_sign(lock, rank, NULL) != PML_OK)
            _exit(1);
        if (write(ready[1], "", 1) == 1)
            for (;;)
                pause();
        _exit(1);
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(ready[1]);
    return pid;
}

/* A signal that was sent would have ended it by then. */
static bool lives(pid_t pid)
{
    pml_clock_sleep(0.05);
    return waitpid(pid, NULL, WNOHANG) == 0;
}

static void those_that_hold_a_lock_are_there(void **state)
{
    (void)state;
    int locks[2], second;
    pid_t pids[2];
    assert_int_equal(pml_runtime_workers(folder, NULL), PML_NOT_FOUND);
    for (int r = 0; r < 2; r++) {
        assert_int_equal(pml_runtime_worker_lock(folder, r, &locks[r], NULL), PML_OK);
        pids[r] = begin(locks[r], r);
    }
    assert_int_equal(pml_runtime_worker_lock(folder, 1, &second, NULL), PML_BUSY);
    /* The lock is the process's, not ours who took it. */
    close(locks[0]);
    close(locks[1]);
    assert_int_equal(pml_runtime_workers(folder, NULL), PML_OK);
    kill(pids[0], SIGKILL);
    waitpid(pids[0], NULL, 0);
    assert_int_equal(pml_runtime_workers(folder, NULL), PML_OK);

    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_OK);
    int status;
    assert_int_equal(waitpid(pids[1], &status, 0), pids[1]);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    assert_int_equal(pml_runtime_workers(folder, NULL), PML_PEER);
}

/* Without a descriptor for it nobody can be looked at: that is no word on whether they are there,
 * and nobody is said to have been killed. */
static void want_is_not_taken_for_their_end(void **state)
{
    (void)state;
    struct rlimit limit, few;
    int lock, status;
    assert_int_equal(pml_runtime_worker_lock(folder, 0, &lock, NULL), PML_OK);
    pid_t pid = begin(lock, 0);
    close(lock);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    few = limit;
    const int first = dup(0); /* the first number that is free */
    close(first);
    for (int more = 0; more < 3; more++) { /* the file, the process and its list want one each */
        pml_error err = PML_ERROR_INIT;
        few.rlim_cur = (rlim_t)first + (rlim_t)more;
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
        pml_status there = pml_runtime_workers(folder, NULL);
        pml_status killed = pml_runtime_workers_kill(folder, our_program, &err);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
        assert_int_equal(there, more == 0 ? PML_IO : PML_OK);
        assert_int_equal(killed, PML_IO);
        assert_non_null(strstr(err.message, strerror(EMFILE)));
        assert_true(lives(pid));
    }
    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_OK);
    assert_int_equal(waitpid(pid, &status, 0), pid);
}

/* The file names a process that holds no lock (its number was given to somebody else), or beside a
 * lock that its holder has not signed yet: nobody is signalled. */
static void a_recycled_number_is_not_touched(void **state)
{
    (void)state;
    int lock;
    pid_t stranger = begin(-1, 0);
    char line[32], path[64];
    snprintf(line, sizeof line, "%15d\n", (int)stranger);
    snprintf(path, sizeof path, "%s/workers", folder);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(line, file);
    fclose(file);
    assert_int_equal(pml_runtime_workers(folder, NULL), PML_PEER);
    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_OK);

    /* A worker that has its lock and has not signed: what its predecessor signed is gone. */
    assert_int_equal(pml_runtime_worker_lock(folder, 0, &lock, NULL), PML_OK);
    assert_int_equal(pml_runtime_workers(folder, NULL), PML_OK);
    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_OK);
    assert_true(lives(stranger));
    close(lock);
    kill(stranger, SIGKILL);
    waitpid(stranger, NULL, 0);
}

static void forge(int lock, pid_t pid)
{
    char line[32];
    int n = snprintf(line, sizeof line, "%15d\n", (int)pid);
    assert_int_equal(pwrite(lock, line, (size_t)n, 0), n);
}

/* Somebody in whose folder we are holds the lock, and signs for a process of ours. */
static void a_forged_signature_kills_nobody(void **state)
{
    (void)state;
    int lock, status;
    pid_t stranger = begin(-1, 0); /* before the file is open: it has it not */
    assert_int_equal(pml_runtime_worker_lock(folder, 0, &lock, NULL), PML_OK);
    forge(lock, stranger);
    assert_int_equal(pml_runtime_workers(folder, NULL), PML_OK);
    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_OK);
    assert_true(lives(stranger));
    forge(lock, getpid()); /* we have the file, as whoever asks has */
    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_OK);
    /* Of one that has the file, and runs something else. */
    pid_t worker = begin(lock, 0);
    assert_int_equal(pml_runtime_workers_kill(folder, "/usr/bin/pml-worker", NULL), PML_OK);
    assert_true(lives(worker));
    /* Of one that has it under another name. */
    char path[64], other[64];
    snprintf(path, sizeof path, "%s/workers", folder);
    snprintf(other, sizeof other, "%s/other", folder);
    assert_int_equal(link(path, other), 0);
    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_DENIED);
    assert_true(lives(worker));
    assert_int_equal(unlink(other), 0);
    /* None of that: it is a worker. */
    assert_int_equal(pml_runtime_workers_kill(folder, our_program, NULL), PML_OK);
    assert_int_equal(waitpid(worker, &status, 0), worker);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    close(lock);
    kill(stranger, SIGKILL);
    waitpid(stranger, NULL, 0);
}

int main(int argc, char **argv)
{
    (void)argc;
    our_program = argv[0];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(those_that_hold_a_lock_are_there),
        cmocka_unit_test(want_is_not_taken_for_their_end),
        cmocka_unit_test(a_recycled_number_is_not_touched),
        cmocka_unit_test(a_forged_signature_kills_nobody),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
