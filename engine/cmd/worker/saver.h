/* Saver: the thread that writes checkpoints from a snapshot while training goes on. */
#ifndef PML_WORKER_SAVER_H
#define PML_WORKER_SAVER_H

#include "keeper.h"
#include "link.h"

typedef struct saver saver;

/* Seconds for which a disk that does not take a run's last checkpoint is tried again, once nobody
 * waits for anything else. */
enum { SAVER_PATIENCE = 8 };

/* folder: of the run; its checkpoints/ is made by the first save. Everything is borrowed. from:
 * what the run goes on from and is on disk already, in from_folder of checkpoints/; NULL: nothing
 * is. */
pml_status saver_new(const job_kind *kind, job *j, keeper *keeper, worker_link *link,
                     const char *folder, const pml_train_state *from, const char *from_folder,
                     saver **s, pml_error *err);
/* Waits for what is being written. */
void saver_destroy(saver **s);

/* Take a snapshot of the job at state and have it written as step-000412, or
 * step-000412-NAME; waits for the one before. A
 * `checkpoint` event says when it is on disk, a `log` event why it is not. A step that is there
 * already from this very run of the worker is only announced again. name may be "", command 0. */
pml_status saver_save(saver *s, const pml_train_state *state, const char *name, int64_t command,
                      pml_error *err);

/* Folder of the last checkpoint that is on disk, "" when there is none. Valid until the next save.
 */
const char *saver_last(saver *s);

/* Whether the checkpoint of that step is on its way to the disk. */
bool saver_is_writing(saver *s, int64_t step);

/* Wait until nothing is being written. PML_IO: the last one failed. */
pml_status saver_wait(saver *s, pml_error *err);

#endif
