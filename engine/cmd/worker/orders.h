/* Orders: what the coordinator has told this worker and its training thread has not taken yet.
 *
 *   I/O thread ──put, commit──► [ commands in their order ] ──next──► training thread
 *              ──put_again────► [ what of the log holds again, by step ] ──next_again──►
 *              ──enough───────► [ samples that shall end ]
 *
 * Thread-safe. */
#ifndef PML_WORKER_ORDERS_H
#define PML_WORKER_ORDERS_H

#include <stdbool.h>
#include <stdint.h>

#include "pml/json/messages.h"

/* A command's content, or one of the log to be applied again (number 0) at `step`. */
typedef struct order {
    int64_t number, step;
    int64_t answers; /* of a checkpoint of the log: the command that waits for it; of a set: it */
    pml_message_type verb; /* a request */
    pml_message *args;
    pml_message *keywords; /* lr_scheduler_kwargs of args, or NULL */
} order;

typedef struct orders orders;

pml_status orders_new(orders **o, pml_error *err);
void orders_destroy(orders **o);

/* Keep a command, or one of the log. Takes what it holds; false: no memory, and it is
 * still the caller's. */
bool orders_put(orders *o, const order *one);
bool orders_put_again(orders *o, const order *one);
/* Commands up to this one are everybody's. */
void orders_commit(orders *o, int64_t number);
/* Somebody has had enough of a row of a sample; row -1: of all. */
void orders_enough(orders *o, int64_t command, int64_t row);
/* No more will come: who waits for them is woken. */
void orders_end(orders *o);

/* Highest command that was committed. */
int64_t orders_committed(orders *o);
bool orders_is_enough(orders *o, int64_t command, int64_t row);
/* Whether a stop is among the commands that were committed and orders_next has not given yet. */
bool orders_stops(orders *o);
/* The next command with number <= limit; false when there is none. What it holds is the caller's.
 */
bool orders_next(orders *o, int64_t limit, order *one);
/* The next one of the log that is to be applied at or before update `step`. */
bool orders_next_again(orders *o, int64_t step, order *one);
/* A new set takes the place of those waiting to be applied again: its fields leave them. */
void orders_supersede(orders *o, const pml_message *args);
/* Wait until a command is committed that orders_next has not given yet, or no more will come. */
void orders_wait(orders *o);
/* The same, at most so long; the end does not end it. */
void orders_wait_for(orders *o, int seconds);

#endif
