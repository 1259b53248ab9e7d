/* What adapters cost over the frozen layers: the same step program with every adapter taken out of
 * it, in turn with itself.
 *
 *   | 5 steps whole | 5 without | 5 whole | 5 without | … | 5 whole |
 *
 * A pair is one part without adapters against the mean of the two whole ones beside it, so that
 * clocks that drift fall out. Borders keep their room, gradients stop where they stopped. */
#ifndef TOOLS_BENCH_STEP_FROZEN_H
#define TOOLS_BENCH_STEP_FROZEN_H

#include "pml/train/stepper.h"

/* Print what differs op by op (one profile over batch of each), and the medians of `pairs` (1 to
 * 50) of both, the difference, and what it is of the step without adapters and of its linear
 * layers. step does one training step; the stepper runs whole again afterwards. */
pml_status step_frozen_compare(pml_stepper *stepper, int pairs, const pml_batch *batch,
                               void (*step)(void *user), void *user, pml_error *err);

#endif
