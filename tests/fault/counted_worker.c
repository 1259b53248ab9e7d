/* The real worker, whose training thread's memory calls are counted (tests/shim/alloc.h) from the
 * beginning of step PML_COUNT_FROM to the end of PML_COUNT_TO, all that happens between these steps
 * included, and written to the file PML_COUNT. Where PML_COUNT_WAIT names a file, it goes on after
 * that until the file is there and snapshots have been taken: what is to happen in between has
 * happened then. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "alloc.h"
#include "pml_op/cpu.h"
#include "worker.h"

enum { SNAPSHOTS = 2 };

static int64_t step; /* the one that begins */
static int n_puts;   /* snapshots since it counts */

static int64_t number(const char *name)
{
    const char *text = getenv(name);
    return text == NULL ? 0 : atoll(text);
}

static bool is_over(void)
{
    const char *wait = getenv("PML_COUNT_WAIT");
    return step >= number("PML_COUNT_TO") &&
           (wait == NULL || (n_puts >= SNAPSHOTS && access(wait, F_OK) == 0));
}

/* The first call of a round: whatever belongs to the step before is over. */
static pml_share counted_share(job *j)
{
    static bool counts;
    if (step + 1 == number("PML_COUNT_FROM")) {
        alloc_begin();
        counts = true;
        n_puts = 0;
    } else if (counts && is_over()) {
        alloc_end();
        counts = false;
        if (alloc_write(getenv("PML_COUNT")) != 0)
            perror("PML_COUNT");
    }
    return job_train.share(j);
}

static pml_status counted_step(job *j, const pml_update *update, pml_step_result *result,
                               pml_error *err)
{
    step = update->step;
    return job_train.step(j, update, result, err);
}

static pml_status counted_put(job *j, const pml_train_state *state, pml_train_state *whole,
                              void *memory, pml_error *err)
{
    n_puts++;
    return job_train.put(j, state, whole, memory, err);
}

int main(int argc, char **argv)
{
    static job_kind counted;
    counted = job_train;
    counted.share = counted_share;
    counted.step = counted_step;
    counted.put = counted_put;
    if (pml_cpu_prepare_process(argc, argv) != PML_OK)
        fputs("pml-worker: OpenBLAS cannot be told which core this is; it may be slower\n", stderr);
    return worker_main(&counted);
}
