/* What reading a GPU's gauges beside training costs: the same steps with a thread that reads and
 * without one, in turn.
 *
 *   | 50 steps without | 50 with | 50 without | 50 with | … | 50 without |
 *
 * A pair is one part with readings against the mean of the two without beside it, so that clocks
 * that drift fall out. */
#ifndef TOOLS_BENCH_STEP_GAUGES_H
#define TOOLS_BENCH_STEP_GAUGES_H

#include "pml/base/error.h"

/* Print the median of `pairs` (at least 6) differences in percent, its 95 % interval by the order
 * of the differences (no distribution assumed), readings a second, what one reading costs a step's
 * thread by that, and what it is at one reading a second. pause: seconds between two readings, 0:
 * none. step does one training step. PML_NOT_FOUND without NVML. */
pml_status step_gauges_compare(const char *bus, double pause, int pairs, void (*step)(void *user),
                               void *user, pml_error *err);

#endif
