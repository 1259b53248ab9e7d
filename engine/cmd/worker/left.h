/* Left: what a run's workers have left behind in memory, written as a checkpoint.
 *
 * For a run that ends while none of its workers can be there, because others have the memory of
 * its device. This needs the snapshot's slot, run.json and the model's config.json; no device, no
 * weights, no rows. */
#ifndef PML_WORKER_LEFT_H
#define PML_WORKER_LEFT_H

#include "job.h"
#include "link.h"

/* Write the snapshot in the slot that `start` names, as any other checkpoint is written, and report
 * that the run has stopped. slots: the memfd. A disk that does not take it is tried again for as
 * long as at the end of training, and is PML_IO then; nothing but log events has been told. */
pml_status left_save(const job_kind *kind, const pml_message *start, const pml_message *run,
                     worker_link *link, int slots, pml_error *err);

#endif
