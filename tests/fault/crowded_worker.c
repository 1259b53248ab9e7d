/* The real worker, which finds its device's memory with others while the run folder has a file
 * `crowded`. On a CPU nobody else would have it. */
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

#include "pml_op/cpu.h"
#include "worker.h"

static pml_status crowded_open(const job_setup *setup, job **j, job_facts *facts, pml_error *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/crowded", setup->folder);
    facts->crowded = access(path, F_OK) == 0;
    return facts->crowded ? PML_FAIL(err, PML_NO_MEMORY, "others have it")
                          : job_train.open(setup, j, facts, err);
}

int main(int argc, char **argv)
{
    static job_kind crowded;
    crowded = job_train;
    crowded.open = crowded_open;
    if (pml_cpu_prepare_process(argc, argv) != PML_OK)
        fputs("pml-worker: OpenBLAS cannot be told which core this is; it may be slower\n", stderr);
    return worker_main(&crowded);
}
