/* The thread pool: every item once, every job whole before the next, threads that sleep wake up,
 * and stand where they may. */
#include "kernels/fixture.h"

#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../../kernels/cpu/pool.h"

enum { ITEMS = 5000 };

typedef struct job {
    _Atomic int done[ITEMS];
    _Atomic int64_t total;
    _Atomic int bad; /* counted, not asserted: a helper thread cannot leave a test */
    int64_t items;
} job;

static void count_item(void *arg, int64_t item, void *scratch)
{
    job *j = arg;
    if (item < 0 || item >= j->items || (uintptr_t)scratch % 64 != 0) {
        atomic_fetch_add(&j->bad, 1);
        return;
    }
    atomic_fetch_add(&j->done[item], 1);
    atomic_fetch_add(&j->total, item);
    /* Scratch is this thread's alone as long as the item runs. */
    memset(scratch, (int)item, PMLI_SCRATCH_BYTES / 1024);
    for (int i = 0; i < PMLI_SCRATCH_BYTES / 1024; i++)
        if (((unsigned char *)scratch)[i] != (unsigned char)item)
            atomic_fetch_add(&j->bad, 1);
}

static void check_pool(int threads)
{
    static job j;
    pml_error err = PML_ERROR_INIT;
    pmli_pool *pool = NULL;
    assert_int_equal(pmli_pool_new(threads, &pool, &err), PML_OK);
    assert_int_equal(pmli_pool_threads(pool), threads);
    const int64_t counts[] = {0, 1, 2, 3, 7, 100, ITEMS};
    for (int round = 0; round < 60; round++) {
        j.items = counts[round % 7];
        atomic_store(&j.total, 0);
        memset((void *)j.done, 0, sizeof j.done);
        pmli_pool_run(pool, j.items, count_item, &j);
        assert_int_equal(atomic_load(&j.bad), 0);
        assert_int_equal(atomic_load(&j.total), j.items * (j.items - 1) / 2);
        for (int64_t i = 0; i < j.items; i++)
            assert_int_equal(atomic_load(&j.done[i]), 1);
        if (round % 20 == 19)
            usleep(3000); /* long enough for every helper to fall asleep */
    }
    pmli_pool_destroy(&pool);
    assert_null(pool);
    pmli_pool_destroy(&pool);
}

static void test_pools(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 9; threads += 2)
        check_pool(threads);
    pmli_pool *idle = NULL; /* destroyed without having worked */
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pmli_pool_new(4, &idle, &err), PML_OK);
    pmli_pool_destroy(&idle);
}

/* Short jobs in quick succession, of more threads than cores, so that helpers come late to many: an
 * item runs once, with its own job's argument, while that job is still waited for. */
typedef struct brief {
    int64_t number; /* of the job; -1 when it is over */
    _Atomic int64_t sum;
    _Atomic int bad;
    int64_t items;
} brief;

static void brief_item(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    brief *b = arg;
    if (b->number < 0 || item >= b->items)
        atomic_fetch_add(&b->bad, 1);
    atomic_fetch_add(&b->sum, item + 1);
}

static void test_late_helpers(void **state)
{
    (void)state;
    static brief jobs[3];
    pml_error err = PML_ERROR_INIT;
    pmli_pool *pool = NULL;
    assert_int_equal(pmli_pool_new(7, &pool, &err), PML_OK);
    for (int64_t n = 0; n < 4000; n++) {
        brief *b = &jobs[n % 3];
        assert_int_equal(atomic_load(&b->bad), 0); /* nobody has come since it was over */
        *b = (brief){.number = n, .items = 2 + n * 13 % 40};
        pmli_pool_run(pool, b->items, brief_item, b);
        assert_int_equal(atomic_load(&b->sum), b->items * (b->items + 1) / 2);
        assert_int_equal(atomic_load(&b->bad), 0);
        b->number = -1;
    }
    pmli_pool_destroy(&pool);
    for (int i = 0; i < 3; i++)
        assert_int_equal(atomic_load(&jobs[i].bad), 0);
}

/* What each thread may run on; every thread takes one item, as none ends before all have begun. */
typedef struct places {
    _Atomic int begun;
    int threads;
    cpu_set_t may[64];
    pid_t who[64];
} places;

static void look_round(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    places *p = arg;
    sched_getaffinity(0, sizeof p->may[item], &p->may[item]);
    p->who[item] = gettid();
    atomic_fetch_add(&p->begun, 1);
    while (atomic_load(&p->begun) < p->threads)
        sched_yield();
}

/* Where the pool takes all cores each helper has one that no other has, and the caller is left as
 * it was; fewer threads, or with OMP_PROC_BIND=false, are not touched. */
static void check_places(int threads, bool placed)
{
    static places p;
    pml_error err = PML_ERROR_INIT;
    pmli_pool *pool = NULL;
    cpu_set_t own, taken;
    p.threads = threads;
    atomic_store(&p.begun, 0);
    sched_getaffinity(0, sizeof own, &own);
    assert_int_equal(pmli_pool_new(threads, &pool, &err), PML_OK);
    pmli_pool_run(pool, threads, look_round, &p);
    pmli_pool_destroy(&pool);
    CPU_ZERO(&taken);
    for (int i = 0; i < threads; i++) {
        bool moved = placed && p.who[i] != gettid();
        assert_int_equal(CPU_COUNT(&p.may[i]), moved ? 1 : CPU_COUNT(&own));
        if (!moved)
            continue;
        for (int core = 0; core < CPU_SETSIZE; core++)
            assert_false(CPU_ISSET(core, &p.may[i]) && CPU_ISSET(core, &taken));
        CPU_OR(&taken, &taken, &p.may[i]);
    }
}

static void test_places(void **state)
{
    (void)state;
    cpu_set_t own;
    assert_int_equal(sched_getaffinity(0, sizeof own, &own), 0);
    int cores = CPU_COUNT(&own) < 64 ? CPU_COUNT(&own) : 64;
    unsetenv("OMP_PROC_BIND");
    check_places(cores, cores >= 4 && cores == CPU_COUNT(&own));
    check_places(2, false);
    setenv("OMP_PROC_BIND", "false", 1);
    check_places(cores, false);
    unsetenv("OMP_PROC_BIND");
}

/* What is to be fetched may end, and be unmapped, at any time: no job notices. */
static void test_ahead(void **state)
{
    (void)state;
    enum { BYTES = 1 << 22 };
    static job j = {.items = 100};
    pml_error err = PML_ERROR_INIT;
    pmli_pool *pool = NULL;
    assert_int_equal(pmli_pool_new(3, &pool, &err), PML_OK);
    for (int round = 0; round < 30; round++) {
        void *there = mmap(NULL, BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_true(there != MAP_FAILED);
        pmli_pool_ahead(pool, there, round % 2 ? BYTES : 65);
        atomic_store(&j.total, 0);
        pmli_pool_run(pool, j.items, count_item, &j);
        assert_int_equal(munmap(there, BYTES), 0);
        pmli_pool_run(pool, j.items, count_item, &j);
        assert_int_equal(atomic_load(&j.bad), 0);
        assert_int_equal(atomic_load(&j.total), j.items * (j.items - 1));
    }
    pmli_pool_destroy(&pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_pools),
                                       cmocka_unit_test(test_late_helpers),
                                       cmocka_unit_test(test_ahead), cmocka_unit_test(test_places)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
