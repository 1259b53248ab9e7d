/* pml-worker: one device's share of a run. Started by the coordinator; takes no arguments. */
#include <stdio.h>

#include "pml_op/cpu.h"
#include "worker.h"

int main(int argc, char **argv)
{
    if (pml_cpu_prepare_process(argc, argv) != PML_OK)
        fputs("pml-worker: OpenBLAS cannot be told which core this is; it may be slower\n", stderr);
    return worker_main(&job_train);
}
