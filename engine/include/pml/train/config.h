/* The training configuration at work: whether the fields agree, and what only the data decides. */
#ifndef PML_TRAIN_CONFIG_H
#define PML_TRAIN_CONFIG_H

#include "pml/base/error.h"
#include "pml/plan/config.h"
#include "pml/train/schedule.h"

/* Ranges and combinations; the first offence by its field's name. */
pml_status pml_train_config_check(const pml_train_config *config, pml_error *err);

/* What needs the data: max_steps, where it is 0, from `epochs` passes of so many steps (rounded up,
 * at least one, as Hugging Face's Trainer counts); warmup_steps from warmup_ratio. */
void pml_train_config_complete(pml_train_config *config, double epochs, int64_t steps_per_epoch);

#endif
