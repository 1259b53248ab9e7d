/* Pulse: what the training thread does and for how long it has not come on, for the I/O thread to
 * tell.
 *
 * A process whose heart beats may still hang: in a driver, in a file system, in a fault of ours. So
 * each phase has a time within which the training thread must come on (an op of the step, a
 * collective that it came to or left, a token, a tensor loaded), from the run's hang_timeout:
 *
 *   stepping      hang_timeout, or 10 times the median micro-batch, whichever is more
 *   evaluating, sampling   4 times that: a batch or a prompt may be much longer
 *   loading, saving       20 times hang_timeout: disks and networks have pauses
 *   standing      no limit: it waits for people
 *
 * The training thread only counts. The I/O thread looks at the count several times a second and
 * adds up how long it has stood: an interval counts as LOOK_MOST seconds at most, so what the whole
 * process slept through (stopped, suspended with its machine, starved) is not held against it.
 *
 * All functions are thread-safe. */
#ifndef PML_WORKER_PULSE_H
#define PML_WORKER_PULSE_H

#include <pthread.h>
#include <stdatomic.h>

#include "pml/dist/comm.h"
#include "pml/json/messages.h"

typedef enum phase {
    PHASE_LOADING = 0,
    PHASE_STEPPING,
    PHASE_EVALUATING,
    PHASE_SAMPLING,
    PHASE_SAVING,
    PHASE_STANDING
} phase;

enum { PULSE_KEPT = 33 };

typedef struct pulse {
    _Atomic uint64_t moves; /* grows whenever the training thread comes on */
    pthread_mutex_t mutex;
    phase phase;
    const pml_comm *comm; /* borrowed; NULL: none, or gone */
    double hang_timeout;  /* seconds, 0: no limits */
    double micro_at;      /* when the last micro-batch ended */
    double micros[PULSE_KEPT];
    int n; /* of micros, all that ever were */
    double longest;

    /* as of the last look */
    uint64_t seen;
    double looked_at, idle;
    int waits_for; /* a rank, -1: nobody */
} pulse;

void pulse_init(pulse *p);
void pulse_destroy(pulse *p);

void pulse_set_timeout(pulse *p, double hang_timeout);
/* The collectives that it takes part in; NULL before they go. */
void pulse_set_comm(pulse *p, const pml_comm *comm);

/* ---- of the training thread ---- */

/* Begin a phase; the phase before is returned, to go back to. */
phase pulse_enter(pulse *p, phase phase);
/* It came on. Costs nothing: for every op. */
void pulse_move(pulse *p);
/* The same, and a micro-batch is done. */
void pulse_tick(pulse *p);
/* A step took so long. */
void pulse_step(pulse *p, double seconds);

/* ---- of the I/O thread ---- */

/* At least three times a second. True: it is beyond its limit, and was not at the look before. */
bool pulse_look(pulse *p);
/* phase, idle, limit, longest and waits_for of a beat. */
void pulse_tell(pulse *p, pml_message *beat);
/* Beyond its limit, and not because another worker is. */
bool pulse_hangs(pulse *p);

#endif
