/* Profile: where the time of steps goes, op by op, on the device's clock.
 *
 *   pml_stepper_timing(s, true);   micro() … update()   pml_stepper_times(s, &n)
 *
 * While timing is on, ops run one by one between marks of the queue: on the CPU two looks at the
 * clock an op, on a GPU events, and no graphs; for very small ops there the time is that of the
 * launch. What is computed is the same, bit for bit. */
#ifndef PML_TRAIN_PROFILE_H
#define PML_TRAIN_PROFILE_H

#include "pml/plan/program.h"
#include "pml/train/stepper.h"

/* What one node of the step program took, added up over its calls. */
typedef struct pml_op_time {
    int64_t calls;
    double seconds, flops, bytes; /* operations and bytes of the batches it ran for */
} pml_op_time;

/* On: from zero. Off: the times stay readable. */
void pml_stepper_timing(pml_stepper *stepper, bool on);
/* One for each node of the program, in its order; the stepper's. */
const pml_op_time *pml_stepper_times(const pml_stepper *stepper, int32_t *n_nodes);

/* What the device can do at best, to hold ops against. Sizes are part of the answer: a copy that
 * fits into a cache is faster than one that does not. */
typedef struct pml_peak {
    double gemm_flops; /* a second, of the linear op, [n,n] x [n,n] in the activations' dtype */
    int32_t gemm_size; /* n; 0: not measured, there was no room */
    double copy_bytes; /* a second, read and written, of the copy op */
    int64_t copy_size; /* bytes read and written by one */
} pml_peak;

/* Measure them for about `seconds`, between two steps, in the arena's place for activations, which
 * hold nothing then. Allocates nothing. */
pml_status pml_stepper_peak(pml_stepper *stepper, double seconds, pml_peak *peak, pml_error *err);

typedef struct pml_profile_row {
    const char *label; /* static for the stepper's life */
    pml_op op;
    int32_t layer; /* -1: outside the layers */
    bool again;    /* recomputed */
    double seconds, flops, bytes;
} pml_profile_row;

/* Time the batch's forward and backward and an update's ops. rows has room for `capacity` of them,
 * *n counts them; PML_INVALID when there are more. Gradients are cleared afterwards and no
 * parameter changes. */
pml_status pml_stepper_profile(pml_stepper *stepper, const pml_batch *batch, pml_profile_row *rows,
                               int capacity, int *n, pml_error *err);

#endif
