/* Collectives over shared memory, with real processes. */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "pml/base/clock.h"
#include "pml/dist/comm.h"

typedef int (*rank_main)(pml_comm *comm, int rank, int world);

static pid_t start(int fd, int rank, int world, rank_main run)
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    pml_error err = PML_ERROR_INIT;
    pml_comm *comm;
    if (pml_comm_shared(fd, rank, world, &comm, &err) != PML_OK) {
        fprintf(stderr, "rank %d: %s\n", rank, err.message);
        _exit(100);
    }
    int code = run(comm, rank, world);
    pml_comm_destroy(&comm);
    _exit(code);
}

/* 0 … 255 as exited, 256 + signal when killed. */
static int wait_code(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

static void run_all(int world, rank_main run)
{
    int fd;
    pid_t pids[8];
    assert_int_equal(pml_comm_shared_create(world, &fd, NULL), PML_OK);
    for (int r = 0; r < world; r++)
        pids[r] = start(fd, r, world, run);
    for (int r = 0; r < world; r++)
        assert_int_equal(wait_code(pids[r]), 0);
    close(fd);
}

/* Values whose float sum depends on the order: the oracle adds in rank order too. */
static float value_at(int rank, size_t i)
{
    double x = (double)((i * 2654435761U + (unsigned)rank * 40503U) % 1000003U) * 1e-3;
    return (float)(rank % 2 == 0 ? x * 1e4 : -x);
}

/* Three chunks and a bit, so that the sets take turns; several rounds. */
static int sums_in_order(pml_comm *comm, int rank, int world)
{
    size_t n = (3u << 18) + 17;
    float *values = malloc(n * sizeof *values);
    int wrong = 0;
    for (int round = 0; round < 3 && values != NULL; round++) {
        for (size_t i = 0; i < n; i++)
            values[i] = value_at(rank, i + (size_t)round);
        if (pml_comm_allreduce_f32(comm, values, n, NULL) != PML_OK)
            return 1;
        for (size_t i = 0; i < n; i++) {
            float want = value_at(0, i + (size_t)round);
            for (int r = 1; r < world; r++)
                want += value_at(r, i + (size_t)round);
            wrong |= memcmp(&want, &values[i], sizeof want) != 0;
        }
    }
    free(values);
    double few[3] = {1.0 / (rank + 3), rank, 1e300 * (rank == 1)};
    if (pml_comm_allreduce_f64(comm, few, 3, NULL) != PML_OK)
        return 1;
    double want = 1.0 / 3;
    for (int r = 1; r < world; r++)
        want += 1.0 / (r + 3);
    wrong |= few[0] != want || few[1] != world * (world - 1) / 2.0 || few[2] != 1e300;
    return wrong ? 2 : 0;
}

static void sums_are_exact_in_rank_order(void **state)
{
    (void)state;
    run_all(2, sums_in_order);
    run_all(4, sums_in_order);
    run_all(3, sums_in_order);
}

static int headers(pml_comm *comm, int rank, int world)
{
    for (int64_t step = 1; step <= 200; step++) {
        pml_header h = {.labels = rank + step,
                        .tokens = 2,
                        .committed = rank == 1 ? step : 0,
                        .step = step,
                        .flags = 1 << rank,
                        .seconds = rank};
        if (pml_comm_header(comm, &h, NULL) != PML_OK)
            return 1;
        if (h.labels != world * step + world * (world - 1) / 2 || h.tokens != 2 * world ||
            h.committed != step || h.flags != (1 << world) - 1 || h.seconds != world - 1.0)
            return 2;
    }
    return 0;
}

static void headers_combine(void **state)
{
    (void)state;
    run_all(2, headers);
    run_all(4, headers);
    pml_comm *comm;
    assert_int_equal(pml_comm_self(&comm, NULL), PML_OK);
    pml_header h = {.labels = 7, .step = 3};
    assert_int_equal(pml_comm_header(comm, &h, NULL), PML_OK);
    assert_int_equal(h.labels, 7);
    assert_int_equal(pml_comm_world(comm), 1);
    pml_comm_destroy(&comm);
    assert_null(comm);
}

static int disagree(pml_comm *comm, int rank, int world)
{
    (void)world;
    pml_header h = {.step = rank};
    return pml_comm_header(comm, &h, NULL) == PML_INTERNAL ? 0 : 1;
}

static void steps_must_agree(void **state)
{
    (void)state;
    run_all(2, disagree);
}

static void *come(void *comm)
{
    return pml_comm_barrier(comm, NULL) == PML_OK ? comm : NULL;
}

/* Another thread sees who waits, for whom, and that it came on. */
static void it_says_for_whom_it_waits(void **state)
{
    (void)state;
    int fd;
    pml_comm *ranks[3];
    pthread_t threads[2];
    assert_int_equal(pml_comm_shared_create(3, &fd, NULL), PML_OK);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(pml_comm_shared(fd, r, 3, &ranks[r], NULL), PML_OK);
        assert_int_equal(pml_comm_where(ranks[r]).waits_for, -1);
    }
    uint64_t before = pml_comm_where(ranks[0]).moves;
    assert_int_equal(pthread_create(&threads[0], NULL, come, ranks[0]), 0);
    while (pml_comm_where(ranks[0]).waits_for != 1) /* the first of two that have not come */
        sched_yield();
    assert_true(pml_comm_where(ranks[0]).moves > before);
    assert_int_equal(pthread_create(&threads[1], NULL, come, ranks[1]), 0);
    while (pml_comm_where(ranks[0]).waits_for != 2 || pml_comm_where(ranks[1]).waits_for != 2)
        sched_yield();
    assert_int_equal(pml_comm_where(ranks[2]).waits_for, -1); /* it holds them up */
    before = pml_comm_where(ranks[0]).moves;
    assert_int_equal(pml_comm_barrier(ranks[2], NULL), PML_OK);
    for (int i = 0; i < 2; i++) {
        void *result;
        pthread_join(threads[i], &result);
        assert_non_null(result);
    }
    assert_true(pml_comm_where(ranks[0]).moves > before); /* leaving is coming on */
    for (int r = 0; r < 3; r++) {
        assert_int_equal(pml_comm_where(ranks[r]).waits_for, -1);
        pml_comm_destroy(&ranks[r]);
    }
    close(fd);
}

static int there[2] = {-1, -1}; /* a byte of each rank that has come so far */

/* Rank 0 waits for ranks that never come; 3 means PML_PEER. */
static int wait_for_nobody(pml_comm *comm, int rank, int world)
{
    (void)world;
    if (there[1] >= 0 && write(there[1], "", 1) != 1)
        return 4;
    if (rank != 0)
        for (;;)
            pause();
    pml_error err = PML_ERROR_INIT;
    if (pml_comm_barrier(comm, &err) != PML_PEER)
        return 1;
    return pml_comm_barrier(comm, &err) == PML_PEER ? 3 : 2; /* for good */
}

/* All have joined: who is killed before that is one who may still come. And rank 0 has had the time
 * to fall asleep. */
static void start_waiting(int fd, int world, pid_t *pids)
{
    char byte;
    assert_int_equal(pipe(there), 0);
    for (int r = 0; r < world; r++)
        pids[r] = start(fd, r, world, wait_for_nobody);
    for (int r = 0; r < world; r++)
        assert_int_equal(read(there[0], &byte, 1), 1);
    for (int i = 0; i < 2; i++) {
        close(there[i]);
        there[i] = -1;
    }
    pml_clock_sleep(0.3);
}

static void abort_wakes_waiters(void **state)
{
    (void)state;
    int fd;
    pid_t pids[2];
    assert_int_equal(pml_comm_shared_create(2, &fd, NULL), PML_OK);
    start_waiting(fd, 2, pids);
    assert_int_equal(pml_comm_shared_abort(fd, NULL), PML_OK);
    assert_int_equal(wait_code(pids[0]), 3); /* else it waits for ever */
    kill(pids[1], SIGKILL);
    assert_int_equal(wait_code(pids[1]), 256 + SIGKILL);
    close(fd);
}

static void a_killed_peer_is_noticed(void **state)
{
    (void)state;
    int fd;
    pid_t pids[3];
    assert_int_equal(pml_comm_shared_create(3, &fd, NULL), PML_OK);
    start_waiting(fd, 3, pids);
    kill(pids[1], SIGKILL); /* and stays a zombie: nobody reaps it before the waiter has noticed */
    assert_int_equal(wait_code(pids[0]), 3); /* else it waits for ever */
    kill(pids[2], SIGKILL);
    assert_int_equal(wait_code(pids[1]), 256 + SIGKILL);
    assert_int_equal(wait_code(pids[2]), 256 + SIGKILL);
    close(fd);
}

static int leave(pml_comm *comm, int rank, int world)
{
    return rank == 1 ? 0 : wait_for_nobody(comm, rank, world);
}

static void a_peer_that_left_is_noticed(void **state)
{
    (void)state;
    int fd;
    assert_int_equal(pml_comm_shared_create(2, &fd, NULL), PML_OK);
    pid_t a = start(fd, 0, 2, leave), b = start(fd, 1, 2, leave);
    assert_int_equal(wait_code(b), 0);
    assert_int_equal(wait_code(a), 3);
    close(fd);
}

static void wrong_memory_is_refused(void **state)
{
    (void)state;
    int fd;
    pml_comm *comm, *again;
    assert_int_equal(pml_comm_shared_create(0, &fd, NULL), PML_INVALID);
    assert_int_equal(pml_comm_shared_create(2, &fd, NULL), PML_OK);
    assert_int_equal(pml_comm_shared(fd, 2, 2, &comm, NULL), PML_INVALID);
    assert_int_equal(pml_comm_shared(fd, 0, 3, &comm, NULL), PML_INVALID);
    assert_int_equal(pml_comm_shared(0, 0, 2, &comm, NULL), PML_INVALID);
    assert_int_equal(pml_comm_shared(fd, 0, 2, &comm, NULL), PML_OK);
    assert_int_equal(pml_comm_shared(fd, 0, 2, &again, NULL), PML_BUSY);
    pml_comm_destroy(&comm);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_are_exact_in_rank_order),
        cmocka_unit_test(headers_combine),
        cmocka_unit_test(steps_must_agree),
        cmocka_unit_test(it_says_for_whom_it_waits),
        cmocka_unit_test(abort_wakes_waiters),
        cmocka_unit_test(a_killed_peer_is_noticed),
        cmocka_unit_test(a_peer_that_left_is_noticed),
        cmocka_unit_test(wrong_memory_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
