/* run.json as a training configuration. */
#ifndef PML_TRAIN_RUN_H
#define PML_TRAIN_RUN_H

#include "pml/json/messages.h"
#include "pml/train/config.h"

/* Read run.json of the run folder: its checksum where it has one (one who edits the file by hand
 * takes it away), then every field against the table. *run is the caller's. PML_NOT_FOUND,
 * PML_CORRUPT and PML_INVALID name the file. */
pml_status pml_run_read(const char *folder, pml_message **run, pml_error *err);

/* Fill config from a message of type `run` (PML_FILE_run). Relative data paths are taken below
 * `folder`, the run folder. max_steps stays 0 where run.json leaves it to num_train_epochs, which
 * needs the data to be turned into steps (pml_train_config_complete); pml_train_config_check comes
 * after. */
pml_status pml_train_config_from_run(const pml_message *run, const char *folder,
                                     pml_train_config *config, pml_error *err);

/* What happens when a process of the run dies; where run.json does not say: on-failure, 3, 30 s. */
#define PML_RUN_HANG_TIMEOUT 30.0
bool pml_run_restarts(const pml_message *run);
int64_t pml_run_max_restarts(const pml_message *run);
/* Seconds; 0: nothing counts as a hang. */
double pml_run_hang_timeout(const pml_message *run);

/* Takes out of `older`, the args of a command, what `newer` says instead. A schedule without
 * keywords has none, so it takes the place of the older keywords too. */
void pml_run_supersede(pml_message *older, const pml_message *newer);

#endif
