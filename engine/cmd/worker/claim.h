/* Claim: a worker's part of its GPU's memory, reserved among all runs of this user
 * (pml/net/reserve.h).
 *
 *   claim_new     what a context takes is reserved, before there is one
 *   begin, ask    our turn: what is left of the device, for the plan
 *   settle        what the plan takes is reserved; the turn is over
 *   taken         the arena is there
 *
 * With several workers their turns come at once, in the order of the devices' names, so that two
 * runs never wait for each other; and all of them plan with the least that one has. Those that
 * share a device divide what is left of it.
 *
 * Where nothing can be reserved (no such locks, somebody's link in the file's place) the claim says
 * why, and asks the device alone. */
#ifndef PML_WORKER_CLAIM_H
#define PML_WORKER_CLAIM_H

#include "pml/dist/comm.h"
#include "pml/train/stepper.h"

typedef struct claim claim;

typedef struct claim_options {
    const pml_backend *backend; /* with identity_of */
    int index;                  /* which of its devices */
    const char *device;         /* as users call it */
    const char *run;            /* run folder */
    const char *devices; /* folder of device files; NULL: the one that all runs of a user have */
    int inherited;       /* descriptor of a reservation to go on with, taken over; -1 */
    pml_comm *comm;      /* borrowed */
    double patience;     /* seconds that one other run's turn is waited for; 0: as many as nobody
                            plans who is not stopped */
    bool *crowded;       /* set where an error is that others have the device; lives as the claim */
    /* Told of the reservation's descriptor, to have it held beyond our end; not of one that was
     * inherited and can be gone on with. May be NULL. */
    void (*keep)(void *user, int descriptor);
    void (*tick)(void *user); /* while it waits */
    void *user;
} claim_options;

/* PML_NO_MEMORY, PML_BUSY: who has the device, and what to do. Of who is refused, here or by the
 * stepper's claim, no more stays reserved than it had inherited: a run that waited with a part of
 * what it needs could wait for one that waits for that part. */
pml_status claim_new(const claim_options *options, claim **c, pml_error *err);
void claim_destroy(claim **c);

/* Why nothing, or nobody's name, is with the reservation; "": all is well. */
const char *claim_trouble(const claim *c);
/* For a stepper, as long as the claim lives. */
const pml_memory_claim *claim_of_stepper(claim *c);

#endif
