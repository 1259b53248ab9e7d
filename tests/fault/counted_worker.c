/* The real worker, whose training thread's memory calls are counted (tests/shim/alloc.h) from the
 * beginning of step PML_COUNT_FROM to the end of PML_COUNT_TO, all that happens between these steps
 * included, and written to the file PML_COUNT. A run that PML_COUNT_WAIT names waits before the
 * last of them until the file of that name is there: what is to happen in between has happened
 * then. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "alloc.h"
#include "pml/base/clock.h"
#include "pml_op/cpu.h"
#include "worker.h"

static int64_t step; /* the one that begins */

static int64_t number(const char *name)
{
    const char *text = getenv(name);
    return text == NULL ? 0 : atoll(text);
}

static void wait_for(const char *path)
{
    while (path != NULL && access(path, F_OK) != 0)
        pml_clock_sleep(0.001);
}

/* The first call of a round: whatever belongs to the step before is over. */
static pml_share counted_share(job *j)
{
    if (step + 1 == number("PML_COUNT_FROM"))
        alloc_begin();
    if (step + 1 == number("PML_COUNT_TO"))
        wait_for(getenv("PML_COUNT_WAIT"));
    if (step == number("PML_COUNT_TO")) {
        alloc_end();
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

int main(int argc, char **argv)
{
    static job_kind counted;
    counted = job_train;
    counted.share = counted_share;
    counted.step = counted_step;
    if (pml_cpu_prepare_process(argc, argv) != PML_OK)
        fputs("pml-worker: OpenBLAS cannot be told which core this is; it may be slower\n", stderr);
    return worker_main(&counted);
}
