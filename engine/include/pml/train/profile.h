/* Profile: where the time of one micro-batch and update goes, op by op, on the device's clock. */
#ifndef PML_TRAIN_PROFILE_H
#define PML_TRAIN_PROFILE_H

#include "pml/train/stepper.h"

typedef struct pml_profile_row {
    const char *label; /* static for the stepper's life */
    pml_op op;
    int32_t layer; /* -1: outside the layers */
    bool again;    /* recomputed */
    double seconds, flops, bytes;
} pml_profile_row;

/* Run the batch's forward and backward and an update's ops one by one, between marks. rows has room
 * for `capacity` of them, *n counts them; PML_INVALID when there are more. Gradients are cleared
 * afterwards and no parameter changes. Ops that a graph would run without a gap are launched one by
 * one here: for very small ones the time is that of the launch. */
pml_status pml_stepper_profile(pml_stepper *stepper, const pml_batch *batch, pml_profile_row *rows,
                               int capacity, int *n, pml_error *err);

#endif
