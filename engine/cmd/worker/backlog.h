/* Backlog: reports that are not known to be in the log yet.
 *
 * A report is on its way for a while: in our socket, in the coordinator's, in its hands. When the
 * coordinator dies, what was on its way is lost, although the steps it told of are in the weights.
 * So rank 0 keeps each report until the coordinator says that it was heard, and when there is no
 * coordinator any more the rest goes to handover.jsonl in the run folder, where the next one finds
 * it. All functions are thread-safe. */
#ifndef PML_WORKER_BACKLOG_H
#define PML_WORKER_BACKLOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"

typedef struct backlog backlog;

pml_status backlog_new(backlog **b, pml_error *err);
void backlog_destroy(backlog **b);

/* Keep a copy of a report's text. */
pml_status backlog_keep(backlog *b, int64_t number, const char *text, size_t size, pml_error *err);
/* Everything up to number is in the log. */
void backlog_heard(backlog *b, int64_t number);
/* Wait until number is heard, so long at most; whether it is. backlog_wake ends the wait. */
bool backlog_wait(backlog *b, int64_t number, double seconds);
void backlog_wake(backlog *b);

/* What is left, one line each, as `folder`/handover.jsonl: whole and on disk, or not there. */
pml_status backlog_write(backlog *b, const char *folder, pml_error *err);

#endif
