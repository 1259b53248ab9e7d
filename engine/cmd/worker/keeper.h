/* Keeper: snapshots into the coordinator's memory, to go on from when a worker dies.
 *
 * One is taken when the last is a second old and 200 times as old as it took to take: at most half
 * a percent of the time goes into them, and little is to be made again. */
#ifndef PML_WORKER_KEEPER_H
#define PML_WORKER_KEEPER_H

#include "job.h"

typedef struct keeper keeper;

/* fd: the slots' memfd; bytes: of a snapshot of this job. Everything is borrowed. */
pml_status keeper_new(const job_kind *kind, job *j, int fd, size_t bytes, keeper **k,
                      pml_error *err);
void keeper_destroy(keeper **k);

/* Between two steps: take a snapshot if it is time; at_once: if there is none of this state. */
pml_status keeper_keep(keeper *k, const pml_train_state *state, bool at_once, pml_error *err);

#endif
