/* Outbox: reports on their way to the thread that prints and sends them.
 *
 *   training thread ──facts──┐
 *   checkpoint thread ─report┼──► [ letter | letter | … ] ──► the outbox's thread: make, number,
 *   …                ─report─┘      a ring, taken at birth     keep, send, destroy
 *
 * A step allocates nothing (pml/train/stepper.h), and neither does telling of it: what is told is a
 * few numbers and perhaps a line of text, copied into a letter; the message is made of them on the
 * other side. Letters are sent in the order in which they were put in. Thread-safe. */
#ifndef PML_WORKER_OUTBOX_H
#define PML_WORKER_OUTBOX_H

#include <stdbool.h>
#include <stddef.h>

#include "pml/json/messages.h"

typedef struct outbox outbox;

/* Makes a report of the facts that outbox_put was given; NULL or a failed one without memory. */
typedef pml_message *(*outbox_writer)(const void *facts);

/* Sends a report and takes it, on the outbox's thread. number: where to put the number that it got,
 * or NULL. */
typedef void (*outbox_sender)(void *user, pml_message *report, int64_t *number);

enum { OUTBOX_FACTS = 1088 }; /* an error's message and some numbers */

pml_status outbox_new(outbox_sender send, void *user, outbox **o, pml_error *err);
/* Everything that was put in is sent first. */
void outbox_destroy(outbox **o);

/* `bytes` of facts, at most OUTBOX_FACTS. Waits where the ring is full. */
void outbox_put(outbox *o, outbox_writer write, const void *facts, size_t bytes);
/* A report that is there already; takes it. */
void outbox_send(outbox *o, pml_message *report);
/* A message that nobody needs any more: destroyed when its turn comes. May be NULL. */
void outbox_discard(outbox *o, pml_message *message);

/* Send a report, take it, and wait until it has gone with all before it; its number, 0 where it has
 * none. */
int64_t outbox_flush(outbox *o, pml_message *report);
/* Wait until all that was put in before has gone. */
void outbox_drain(outbox *o);

#endif
