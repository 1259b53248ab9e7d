/* The learning rate from step to step.
 *
 *   rate of update k (1-based) = peak * pml_schedule_factor(schedule, k - 1, max_steps) *
 * state.factor
 *
 * Most schedules are a function of the step. reduce_lr_on_plateau and greedy follow the loss of the
 * run's own evaluations (not those that a person asks for, so that asking changes nothing). */
#ifndef PML_TRAIN_SCHEDULE_H
#define PML_TRAIN_SCHEDULE_H

#include <stdbool.h>

#include "pml/base/error.h"
#include "pml/json/json.h"
#include "pml/json/messages.h"
#include "pml/plan/schedule.h"

/* "linear", "cosine", … ; PML_INVALID names the nearest. */
pml_status pml_schedule_from_name(const char *name, pml_schedule_type *type, pml_error *err);
const char *pml_schedule_name(pml_schedule_type type);

/* Keywords that the type does not have, that it needs, or that are out of range, by name. */
pml_status pml_schedule_check(const pml_schedule *schedule, pml_error *err);

/* Factor at 0-based optimizer step `step` of `total`, as transformers' lambdas. */
double pml_schedule_factor(const pml_schedule *schedule, int64_t step, int64_t total);

/* Whether they give the same rates. */
bool pml_schedule_same(const pml_schedule *a, const pml_schedule *b);

/* Whether evaluations drive it. */
bool pml_schedule_measures(const pml_schedule *schedule);

/* The state of a schedule before its first step. */
void pml_schedule_begin(const pml_schedule *schedule, pml_schedule_state *state);
/* After an evaluation: peak is the rate that state.factor multiplies. As
 * torch.optim.lr_scheduler.ReduceLROnPlateau, and GreedyLR (arXiv 2512.14527) in transformers. */
void pml_schedule_measured(const pml_schedule *schedule, pml_schedule_state *state, double peak,
                           double metric);

/* Keywords of a message's record `schedule` (NULL: none) replace all of the schedule's. */
void pml_schedule_set_keywords(pml_schedule *schedule, const pml_message *record);

/* As fields of the writer's open object, and back. */
void pml_schedule_write(pml_json_writer *w, const pml_schedule *s, const pml_schedule_state *state);
pml_status pml_schedule_read(pml_json_at at, pml_schedule *s, pml_schedule_state *state,
                             pml_error *err);

#endif
