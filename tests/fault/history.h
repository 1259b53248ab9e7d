/* What the log of a run says of its past, and what the fake worker has learnt from it. */
#ifndef PML_TESTS_FAULT_HISTORY_H
#define PML_TESTS_FAULT_HISTORY_H

#include "harness.h"

/* Steps of a run that a test ends: however slow the test is, it is not over before. */
enum { FOR_EVER = 1000000 };

#define GOES_ON "\"restart\":\"on-failure\",\"max_restarts\":100"

/* The restarts that the log has so far. */
int history_restarts(harness *h);
/* The n-th of them; waits for it. Borrowed. */
const pml_message *history_restart(harness *h, int n);
/* Wait until a command has had its effect; its event, borrowed. */
const pml_message *history_applied(harness *h, int64_t command);

/* Steps of the current timeline are 1, 2, … without a gap. Returns how many. */
int64_t history_check(harness *h);

/* The number that the fake learns, from its checkpoint of this step: equal numbers are equal
 * histories. */
unsigned long long history_learnt(const harness *h, int64_t step);
/* The same of a run that is let alone. */
unsigned long long history_undisturbed(int64_t steps);
/* Stop the run; the step of its last checkpoint. */
int64_t history_stop(harness *h);

/* Wait until the run has made `step`, in whichever timeline. */
void history_reach(harness *h, int64_t step);

#endif
