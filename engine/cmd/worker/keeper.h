/* Keeper: rank 0's memory for snapshots.
 *
 * Two slots of the coordinator's memory, to go on from when a worker dies; where nobody would go
 * on, or there is no room for two, one buffer of this process. Checkpoints are written from the
 * same memory, while training goes on beside them.
 *
 * Where the job has memory that it uses only in a step, the second slot is there (its stage,
 * pml/train/slots.h). Then there is one snapshot to go on from, and the log must have its steps:
 * the one before it is gone. So it is taken when the log has them, a moment after the step.
 *
 * Into the slots a snapshot is taken when the last is a second old and 200 times as old as it took
 * to take: at most half a percent of the time goes into them, and little is to be made again. */
#ifndef PML_WORKER_KEEPER_H
#define PML_WORKER_KEEPER_H

#include "job.h"
#include "link.h"

typedef struct keeper keeper;

/* fd: the slots' memfd, -1: none; facts: of this job. Everything is borrowed. */
pml_status keeper_new(const job_kind *kind, job *j, const job_facts *facts, int fd,
                      worker_link *link, keeper **k, pml_error *err);
/* A keeper of one snapshot that was left behind: hold gives it, as of the state that it is asked
 * for, and nothing else is of use. payload is borrowed. */
pml_status keeper_of_left(const void *payload, keeper **k, pml_error *err);
void keeper_destroy(keeper **k);

/* Between two steps: take a snapshot to go on from if it is time; at_once: if there is none of this
 * state. */
pml_status keeper_keep(keeper *k, const pml_train_state *state, bool at_once, pml_error *err);

/* Whether there is no snapshot of this step yet, and is to be one: what is taken at once may have
 * to wait for the log, or for a checkpoint that is being written. */
bool keeper_lacks(const keeper *k, const pml_train_state *state);
/* Whether one that is lacking would count if it were taken now. Waits for nobody, and copies
 * nothing. */
bool keeper_can(const keeper *k);

/* Take a snapshot of state now, and leave it as it is until keeper_release, which another thread
 * may call. *whole and *memory, as job_kind.put fills them, are the keeper's. One at a time. */
pml_status keeper_hold(keeper *k, const pml_train_state *state, const pml_train_state **whole,
                       const void **memory, pml_error *err);
void keeper_release(keeper *k);

/* Memory for one snapshot that nobody reads, until the next keep or hold. Nothing may be held. */
pml_status keeper_room(keeper *k, void **memory, pml_error *err);

#endif
