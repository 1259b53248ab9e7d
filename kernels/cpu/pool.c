#include "pool.h"

#include <assert.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Some 50 to 100 microseconds: longer than the serial stretch between two ops of a step, shorter
 * than anything a person or another process would notice. */
enum { SPINS = 2000 };

/* A thread's share of a job, of which the others may take some, too: items [next, end), both in one
 * word, so that who takes one knows that it is still of the job whose end it looked at. And how
 * many items the thread has done, of all jobs (modulo 2^32): its own line, since a word that all
 * count down passes from core to core at the end of every job, when the caller waits. */
typedef struct share {
    _Alignas(64) _Atomic uint64_t range; /* next << 32 | end */
    _Alignas(64) _Atomic uint32_t done;
} share;

struct pmli_pool {
    int threads;
    pthread_t *handles; /* threads - 1 of them started */
    int started;
    unsigned char *scratch; /* threads blocks of PMLI_SCRATCH_BYTES */
    unsigned char *common;  /* PMLI_COMMON_BYTES */

    /* The job. The caller writes it before the shares and those before `job`; nothing of it changes
     * while an item is not done. */
    _Alignas(64) pmli_task *task;
    void *arg;
    share *shares; /* one a thread */
    uint32_t goal; /* items of all jobs (modulo 2^32) */

    /* What is to be fetched, seen no earlier than the next job; a helper that reads half of a new
     * pair fetches what nobody needs. */
    _Alignas(64) _Atomic uintptr_t ahead;
    _Atomic size_t ahead_bytes;

    _Alignas(64) _Atomic uint32_t job; /* futex: number of the current job */
    _Atomic uint32_t sleepers;
    _Atomic bool stop;
    _Alignas(64) _Atomic uint32_t caller_sleeps; /* futex: 1 while the caller waits asleep */
};

typedef struct helper {
    pmli_pool *pool;
    int index;
} helper;

static void futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
    syscall(SYS_futex, (void *)word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, (void *)word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* The next item of a share, or -1. */
static int64_t take(share *from)
{
    uint64_t range = atomic_load_explicit(&from->range, memory_order_relaxed);
    while (range >> 32 < (uint32_t)range)
        if (atomic_compare_exchange_weak_explicit(&from->range, &range, range + (1ULL << 32),
                                                  memory_order_acquire, memory_order_relaxed))
            return (int64_t)(range >> 32);
    return -1;
}

/* n more items are done. The caller announces its sleep, then looks at `done` once more (both
 * sequentially consistent, as here), so one of the two sees the other. */
static void tell_done(pmli_pool *pool, int index, uint32_t n)
{
    _Atomic uint32_t *done = &pool->shares[index].done; /* written by this thread alone */
    atomic_store(done, atomic_load_explicit(done, memory_order_relaxed) + n);
    if (atomic_load(&pool->caller_sleeps) != 0 && atomic_exchange(&pool->caller_sleeps, 0) != 0)
        futex_wake(&pool->caller_sleeps);
}

/* Whatever there is to do. A helper that comes late, or was held up, may be at the job after the
 * one that it was woken for: an item and its job belong together, whoever takes it. What is done is
 * told before the next share is looked at, which takes a while where another core has it. */
static void work(pmli_pool *pool, int index)
{
    void *scratch = pool->scratch + (size_t)index * PMLI_SCRATCH_BYTES;
    for (int i = 0; i < pool->threads; i++) {
        share *from = &pool->shares[(index + i) % pool->threads];
        uint32_t done = 0;
        for (int64_t item; (item = take(from)) >= 0; done++)
            pool->task(pool->arg, item, scratch);
        if (done > 0)
            tell_done(pool, index, done);
    }
}

/* How far a helper has come with what is to be fetched. */
typedef struct fetched {
    uintptr_t of, at, end; /* `of`: where all of it begins */
} fetched;

/* A page or so of it, into the second-level cache; whether there was something left. */
static bool fetch_some(pmli_pool *pool, int index, fetched *f)
{
    enum { LINE = 64, AT_A_TIME = 16 };
    const uintptr_t of = atomic_load_explicit(&pool->ahead, memory_order_relaxed);
    if (of != f->of) {
        const size_t bytes = atomic_load_explicit(&pool->ahead_bytes, memory_order_relaxed);
        const size_t part = bytes / (size_t)pool->threads;
        *f = (fetched){of, of + part * (size_t)index, of + part * (size_t)(index + 1)};
    }
    for (int i = 0; i < AT_A_TIME && f->at < f->end; i++, f->at += LINE)
        __builtin_prefetch((const void *)f->at, 0, 2);
    return f->at < f->end;
}

/* Wait until the job's number differs from `seen`. */
static uint32_t wait_job(pmli_pool *pool, uint32_t seen, int index, fetched *f)
{
    uint32_t job;
    for (int i = 0; i < SPINS; i++) {
        job = atomic_load_explicit(&pool->job, memory_order_acquire);
        if (job != seen)
            return job;
        if (!fetch_some(pool, index, f))
            relax();
    }
    /* Announce the sleep before looking once more: the caller raises `job`, then looks for sleepers
     * (both sequentially consistent), so one of the two sees the other. */
    atomic_fetch_add(&pool->sleepers, 1);
    while ((job = atomic_load(&pool->job)) == seen)
        futex_wait(&pool->job, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
    return job;
}

static void *helper_main(void *argument)
{
    helper self = *(helper *)argument;
    free(argument);
    pmli_pool *pool = self.pool;
    fetched f = {0};
    for (uint32_t job = 0;;) {
        job = wait_job(pool, job, self.index, &f);
        if (atomic_load_explicit(&pool->stop, memory_order_relaxed))
            return NULL;
        __builtin_prefetch(&pool->task); /* comes while the share does */
        work(pool, self.index);
    }
}

static bool all_done(const pmli_pool *pool)
{
    uint32_t done = 0;
    for (int i = 0; i < pool->threads; i++)
        done += atomic_load(&pool->shares[i].done);
    return done == pool->goal;
}

/* Until every item is done: not until every helper has come, which may be waiting for a core. */
static void wait_done(pmli_pool *pool)
{
    for (int i = 0; i < SPINS; i++) {
        if (all_done(pool))
            return;
        relax();
    }
    for (;;) {
        atomic_store(&pool->caller_sleeps, 1);
        if (all_done(pool))
            break;
        futex_wait(&pool->caller_sleeps, 1);
    }
    atomic_store(&pool->caller_sleeps, 0);
}

static void raise_job(pmli_pool *pool)
{
    atomic_fetch_add(&pool->job, 1);
    if (atomic_load(&pool->sleepers) != 0)
        futex_wake(&pool->job);
}

void pmli_pool_run_here(pmli_pool *pool, int64_t items, pmli_task *task, void *arg)
{
    for (int64_t i = 0; i < items; i++)
        task(arg, i, pool->scratch);
}

void pmli_pool_run(pmli_pool *pool, int64_t items, pmli_task *task, void *arg)
{
    if (items <= 0)
        return;
    assert(items <= UINT32_MAX);
    if (pool->threads == 1 || items == 1) {
        pmli_pool_run_here(pool, items, task, arg);
        return;
    }
    pool->task = task;
    pool->arg = arg;
    pool->goal += (uint32_t)items;
    for (int i = 0; i < pool->threads; i++) {
        uint64_t next = (uint64_t)(items * i / pool->threads);
        uint64_t end = (uint64_t)(items * (i + 1) / pool->threads);
        atomic_store_explicit(&pool->shares[i].range, next << 32 | end, memory_order_release);
    }
    raise_job(pool);
    work(pool, 0);
    wait_done(pool);
}

void pmli_pool_ahead(pmli_pool *pool, const void *data, size_t bytes)
{
    atomic_store_explicit(&pool->ahead_bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&pool->ahead, (uintptr_t)data, memory_order_relaxed);
}

/* Where threads take every core they may, each helper gets one of its own: what preempts it for a
 * moment then does not send it to another's, where two would share one until the scheduler notices.
 * The caller's thread is not the pool's to place; the core that is left is the first. Fewer threads
 * than cores are the scheduler's: two runs side by side would else choose the same ones, and which
 * of a virtual machine's cores share one of its host's changes by the second
 * (docs/performance/cpu.md). So are PLACE_LEAST - 1 threads and the user's wish ($OMP_PROC_BIND as
 * OpenMP has it). */
static bool may_place(int threads, cpu_set_t *cores)
{
    enum { PLACE_LEAST = 4 };
    const char *wish = getenv("OMP_PROC_BIND");
    return threads >= PLACE_LEAST && (wish == NULL || strcasecmp(wish, "false") != 0) &&
           sched_getaffinity(0, sizeof *cores, cores) == 0 && CPU_COUNT(cores) == threads;
}

/* The kernel may say no: the thread then runs where the scheduler puts it. */
static void place(pthread_t thread, const cpu_set_t *cores, int index)
{
    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, cores) || index-- > 0)
            continue;
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(core, &own);
        (void)pthread_setaffinity_np(thread, sizeof own, &own);
        return;
    }
}

static pml_status start_helpers(pmli_pool *pool, pml_error *err)
{
    /* Signals belong to the program's own threads. */
    sigset_t all, before;
    cpu_set_t cores;
    const bool placed = may_place(pool->threads, &cores);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pml_status status = PML_OK;
    for (int i = 1; i < pool->threads && status == PML_OK; i++) {
        helper *self = malloc(sizeof *self);
        if (self == NULL) {
            status = PML_FAIL(err, PML_NO_MEMORY, "no memory for a thread's start record");
            break;
        }
        *self = (helper){pool, i};
        int code = pthread_create(&pool->handles[pool->started], NULL, helper_main, self);
        if (code != 0) {
            free(self);
            status = PML_FAIL(err, PML_NO_MEMORY, "cannot start thread %d of %d: %s", i + 1,
                              pool->threads, strerror(code));
        } else {
            if (placed)
                place(pool->handles[pool->started], &cores, i);
            pool->started++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

pml_status pmli_pool_new(int threads, pmli_pool **out, pml_error *err)
{
    *out = NULL;
    pmli_pool *pool = aligned_alloc(64, (sizeof *pool + 63) / 64 * 64);
    if (pool == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the thread pool");
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->handles = calloc((size_t)threads, sizeof *pool->handles);
    pool->scratch = aligned_alloc(64, (size_t)threads * PMLI_SCRATCH_BYTES);
    pool->common = aligned_alloc(64, PMLI_COMMON_BYTES);
    pool->shares = aligned_alloc(64, (size_t)threads * sizeof *pool->shares);
    pml_status status = PML_OK;
    if (pool->handles == NULL || pool->scratch == NULL || pool->common == NULL ||
        pool->shares == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory for %d threads' scratch", threads);
    if (status == PML_OK) { /* no share has anything yet when the first helper looks */
        for (int i = 0; i < threads; i++) {
            atomic_init(&pool->shares[i].range, 0);
            atomic_init(&pool->shares[i].done, 0);
        }
        status = start_helpers(pool, err);
    }
    if (status == PML_OK) /* all of it now: how much an op touches differs with its shapes */
        memset(pool->common, 0, PMLI_COMMON_BYTES);
    if (status != PML_OK)
        pmli_pool_destroy(&pool);
    *out = pool;
    return status;
}

void pmli_pool_destroy(pmli_pool **out)
{
    pmli_pool *pool = *out;
    if (pool == NULL)
        return;
    *out = NULL;
    atomic_store(&pool->stop, true);
    raise_job(pool);
    for (int i = 0; i < pool->started; i++)
        pthread_join(pool->handles[i], NULL);
    free(pool->handles);
    free(pool->shares);
    free(pool->common);
    free(pool->scratch);
    free(pool);
}

void *pmli_pool_common(pmli_pool *pool)
{
    return pool->common;
}

int pmli_pool_threads(const pmli_pool *pool)
{
    return pool->threads;
}
