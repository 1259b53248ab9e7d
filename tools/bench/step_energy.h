/* What a step's ops cost in joules: each kind of op of the step program by itself in a loop, on the
 * operands that it has in the midst of a step, between readings of NVML's count of energy.
 *
 *   whole steps | op by op: … norm, [gate_up, gate_up, … 0.7 s …], swiglu, [down, down, …], …
 *
 * At a card's power limit a step takes its energy over that power, so that an op's joules, more
 * than its milliseconds, are what it costs. A loop finds a clock of its own, though, which is
 * printed: one of memory-bound ops is higher than a step's. */
#ifndef TOOLS_BENCH_STEP_ENERGY_H
#define TOOLS_BENCH_STEP_ENERGY_H

#include "pml/train/stepper.h"

/* Print a line for whole steps, for the idle card, for every label of the program (that of one node
 * in the middle of its layers, `seconds` measured after a third of it to settle) and for a copy.
 * step does one training step. Gradients are cleared afterwards and no parameter changes.
 * PML_NOT_FOUND without NVML, PML_UNSUPPORTED where it does not count energy. */
pml_status step_energy_print(pml_stepper *stepper, const char *bus, double seconds,
                             const pml_batch *batch, void (*step)(void *user), void *user,
                             pml_error *err);

#endif
