/* The worker's logic over a job: loading, the loop over steps, safe points, the end. */
#ifndef PML_WORKER_H
#define PML_WORKER_H

#include "job.h"

/* The whole life of a worker process: reads the start message from the lease (descriptor 3), joins
 * the collectives (descriptor 4), opens the job and drives it until the run's end. Returns the exit
 * status: 0 when the run stopped or finished in order. */
int worker_main(const job_kind *kind);

#endif
