/* The worker's logic over a job: loading, the loop over steps, safe points, the end. */
#ifndef PML_WORKER_H
#define PML_WORKER_H

#include "job.h"

/* Descriptors that the coordinator leaves us (start_one in its workers.c): the lease, what
 * collectives and snapshots share, and a lock that only has to be open: it tells that we are there.
 */
enum { LEASE_FD = 3, COMM_FD, SLOTS_FD, LOCK_FD, RESERVED_FD };

/* The whole life of a worker process: reads the start message from the lease, joins the
 * collectives, opens the job and drives it until the run's end. Returns the exit status: 0 when the
 * run stopped or finished in order. */
int worker_main(const job_kind *kind);

#endif
