/* Link: the worker's I/O thread. It hears orders and acknowledges them, beats every second and
 * watches the lease, however busy the training thread is. */
#ifndef PML_WORKER_LINK_H
#define PML_WORKER_LINK_H

#include <stdbool.h>
#include <stdint.h>

#include "gpu.h"
#include "orders.h"
#include "pml/json/messages.h"
#include "pulse.h"

typedef struct worker_link worker_link;

/* start: the coordinator's first datagram; lease: its descriptor; both borrowed. Sends `joined`.
 * Until the coordinator says go, the end of the lease ends the process; after it, a training thread
 * that hangs does. */
pml_status link_new(const pml_message *start, int lease, worker_link **link, pml_error *err);
/* Gives what was sent a second to leave. */
void link_destroy(worker_link **link);

/* Queue a report; takes the message. A report that cannot be sent is written to the log. */
void link_report(worker_link *link, pml_message *report);
/* The same for an event. */
void link_event(worker_link *link, pml_message *event);
/* Say over the lease, at once and without waiting, why the worker ends. It is reported, too; but no
 * socket or thread of either side can hold this back until after our end. Borrowed. */
void link_last_word(worker_link *link, pml_message *report);
/* The same without an allocation here: `write` makes the report of a copy of the facts, on another
 * thread. At most OUTBOX_FACTS bytes (outbox.h). */
typedef pml_message *(*link_writer)(const void *facts);
void link_post(worker_link *link, link_writer write, const void *facts, size_t bytes);
pml_message *link_wrap(pml_message *event); /* a report of that event; takes it */
/* Wait until all that was queued before has been sent. */
void link_drain(worker_link *link);

/* What beats say. Thread-safe. */
void link_set_step(worker_link *link, int64_t step);
pulse *link_pulse(worker_link *link);
/* Whose readings beats tell of; borrowed, NULL before it goes. */
void link_set_gpu(worker_link *link, gpu_watch *gpu);

/* Rank 0: wait until all that was reported is in the log and on disk there; where the coordinator
 * is gone, hand it over. False: neither. What is made to last must not tell of steps that the log
 * does not have. */
bool link_flush(worker_link *link);
/* Rank 0: wait, so long at most, until all that was reported is in the log, on disk or not; whether
 * it is. */
bool link_logged(worker_link *link, double seconds);
/* Rank 0: what the coordinator has not heard, for the next one. */
pml_status link_hand_over(worker_link *link, pml_error *err);

/* Wait for go. PML_PEER: the coordinator is gone. */
pml_status link_wait_go(worker_link *link, pml_error *err);

/* What it has been told to do. The training thread takes it, and gives the messages of an order
 * back by link_discard. Borrowed. */
orders *link_orders(worker_link *link);
void link_discard(worker_link *link, order *o);

bool link_lost(worker_link *link);     /* the lease has ended */
bool link_orphaned(worker_link *link); /* without a word: the coordinator died */
/* Start another coordinator in its place. */
void link_take_over(worker_link *link);

#endif
