/* Pulse: what the training thread does and when it last came on, for the I/O thread to tell.
 *
 * A process whose heart beats may still hang: in a driver, in a file system, in a fault of ours. So
 * each phase has a time within which the training thread must come on (a micro-batch, a token, a
 * tensor loaded), from the run's hang_timeout:
 *
 *   stepping      hang_timeout, or 10 times the median micro-batch, whichever is more
 *   evaluating, sampling   4 times that: a batch or a prompt may be much longer
 *   loading, saving       20 times hang_timeout: disks and networks have pauses
 *   standing      no limit: it waits for people
 *
 * All functions are thread-safe. */
#ifndef PML_WORKER_PULSE_H
#define PML_WORKER_PULSE_H

#include <pthread.h>

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
    pthread_mutex_t mutex;
    phase phase;
    double at;           /* when it came on last */
    double hang_timeout; /* seconds, 0: no limits */
    double micros[PULSE_KEPT];
    int n; /* of micros, all that ever were */
    double longest;
} pulse;

void pulse_init(pulse *p);
void pulse_destroy(pulse *p);

void pulse_set_timeout(pulse *p, double hang_timeout);
/* Begin a phase; the phase before is returned, to go back to. */
phase pulse_enter(pulse *p, phase phase);
/* It came on. */
void pulse_tick(pulse *p);
/* A step took so long. */
void pulse_step(pulse *p, double seconds);
/* The whole process stood still for so long (stopped, or its machine suspended): that does not
 * count. */
void pulse_forgive(pulse *p, double seconds);

/* phase, idle, limit and longest of a beat. */
void pulse_tell(pulse *p, pml_message *beat);
/* Beyond its limit. */
bool pulse_hangs(pulse *p);

#endif
