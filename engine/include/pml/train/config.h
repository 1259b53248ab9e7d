/* The training configuration at work: the learning-rate schedule, and whether the fields agree. */
#ifndef PML_TRAIN_CONFIG_H
#define PML_TRAIN_CONFIG_H

#include "pml/base/error.h"
#include "pml/plan/config.h"

/* Learning-rate factor at 0-based optimizer step `step`, as transformers.get_scheduler. */
double pml_schedule_factor(pml_schedule schedule, int64_t step, int64_t warmup, int64_t total);

/* "linear", "cosine", … ; PML_INVALID names the nearest. */
pml_status pml_schedule_from_name(const char *name, pml_schedule *schedule, pml_error *err);
const char *pml_schedule_name(pml_schedule schedule);

/* Ranges and combinations; the first offence by its field's name. */
pml_status pml_train_config_check(const pml_train_config *config, pml_error *err);

#endif
