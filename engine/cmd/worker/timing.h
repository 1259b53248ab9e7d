/* Timing: which steps are timed op by op, and telling of it.
 *
 *   step since the worker began   1  2  3  4  5 … 10 … 30 … 100 …
 *   timed                            ■  ■  ■  ■ … ■  23…30  93…100     at most 8 up to each mark
 *   told                                ▲         ▲     ▲       ▲
 *
 * So a program can be shown with its times soon, and later ones cost nearly nothing: on the CPU two
 * looks at the clock an op, on a GPU 8 steps without graphs out of ever more. No step is timed
 * while the backend still compiles what later ones will have: the next one is, and told of. */
#ifndef PML_WORKER_TIMING_H
#define PML_WORKER_TIMING_H

#include "job.h"
#include "link.h"

typedef struct timing {
    int64_t step, mark; /* steps since the worker began; the next one told of */
    int64_t steps, tokens;
    double seconds; /* of the timed ones */
    bool on;
    pml_peak peak; /* the best of all that was measured, 50 ms at each mark */
} timing;

/* Around each step, on rank 0. */
void timing_before(timing *t, const job_kind *kind, job *j, worker_link *link);
pml_status timing_after(timing *t, const job_kind *kind, job *j, worker_link *link, int64_t step,
                        int64_t tokens, double seconds, pml_error *err);

#endif
