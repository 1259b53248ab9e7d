/* Thread pool of a CPU device.
 *
 * A job is `items` independent pieces of work. A thread first takes its own share of them, the same
 * stretch in every job, so that rows which one op left in its cache are there for the next op; then
 * it helps the others. Which thread computes a piece is so a matter of timing, what the piece
 * computes is not: callers cut work into pieces by shapes (and thread count) alone, and every piece
 * writes memory of its own.
 * Between jobs threads spin for a few microseconds, then sleep on a futex. */
#ifndef PMLI_CPU_POOL_H
#define PMLI_CPU_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"

typedef struct pmli_pool pmli_pool;

/* item in [0, items); scratch: PMLI_SCRATCH_BYTES of the running thread's own, 64-byte aligned,
 * content undefined. */
typedef void pmli_task(void *arg, int64_t item, void *scratch);

enum { PMLI_SCRATCH_BYTES = 1 << 20, PMLI_COMMON_BYTES = 4 << 20 };

/* threads >= 1, the caller of pmli_pool_run being one of them. */
pml_status pmli_pool_new(int threads, pmli_pool **pool, pml_error *err);
void pmli_pool_destroy(pmli_pool **pool);
int pmli_pool_threads(const pmli_pool *pool);

/* PMLI_COMMON_BYTES for what all threads of one op share, 64-byte aligned, content undefined. */
void *pmli_pool_common(pmli_pool *pool);

/* Run every item, return when all are done. One caller at a time; not from within a task. */
void pmli_pool_run(pmli_pool *pool, int64_t items, pmli_task *task, void *arg);

/* The same on the calling thread alone: for what is done before another thread has come. */
void pmli_pool_run_here(pmli_pool *pool, int64_t items, pmli_task *task, void *arg);

/* What jobs to come will read, in as many equal parts as there are threads: from the next job on a
 * helper that waits fetches its own into its cache, as far as it comes. An address is no more than
 * a hint, and may be unmapped any time. */
void pmli_pool_ahead(pmli_pool *pool, const void *data, size_t bytes);

#endif
