/* The event log: events.jsonl, append-only, one event a line, seq = line number, a sum at the end
 * of each line (pml/json/sum.h).
 *
 *   file    │ on disk for sure │ written, not synced │
 *   memory                     │ the same lines, and those that wait for the disk │
 *
 * A disk that is full or fails does not end a run: lines that cannot be written wait in memory, in
 * order, and are tried again (eventlog_flush). What follows the last successful fsync is kept too,
 * because after a failed one nobody knows what of it is on disk: all of it is written again.
 * A line may be announced once it is in the file, and a durable one once it is synced; before that
 * it does not exist for anybody but us. */
#ifndef PML_COORDINATOR_EVENTLOG_H
#define PML_COORDINATOR_EVENTLOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/json/messages.h"

typedef struct eventlog eventlog;

/* Open or create `folder`/events.jsonl. `seen` gets every event that is there already, except
 * steps and progress, in order. *cut: bytes of a torn end that were removed.
 *
 * Torn is what a crash or a power cut can leave: a line without its end, and damaged lines behind
 * which at most one durable event follows, as the very last (whose fsync had not returned).
 * Any other damage is PML_CORRUPT and names the line; nothing is changed then. */
pml_status eventlog_open(const char *folder, void (*seen)(void *user, const pml_message *event),
                         void *user, eventlog **log, size_t *cut, pml_error *err);
void eventlog_close(eventlog **log);

int64_t eventlog_last(const eventlog *log);          /* seq of the last line announced, 0 = none */
int64_t eventlog_timeline(const eventlog *log);      /* of the last event, -1 = none             */
int64_t eventlog_step(const eventlog *log);          /* of the last step event, 0 = none         */
int64_t eventlog_step_timeline(const eventlog *log); /* which that event is of               */

/* Write what waits, and have all of it on disk. PML_IO as eventlog_flush. */
pml_status eventlog_sync(eventlog *log, pml_error *err);

/* Stamp the event and put its line behind the others, in memory. */
pml_status eventlog_append(eventlog *log, pml_message *event, int64_t timeline, bool durable,
                           pml_error *err);

/* Write what waits, and sync where a durable event is among it. PML_IO: the disk does not take it
 * now; nothing is lost, call again. */
pml_status eventlog_flush(eventlog *log, pml_error *err);

/* The next line that may be announced, without its newline; false: there is none. The text is the
 * log's, until the next call of any function here. */
bool eventlog_next(eventlog *log, const char **text, size_t *size);

/* Lines that may not be announced yet, and the bytes that are kept in memory for them. */
size_t eventlog_waiting(const eventlog *log, size_t *bytes);

/* Whether the file has been removed under us, so that nobody will read what is in it. */
bool eventlog_removed(const eventlog *log);
/* Whether the file still has its name; one that was moved away, or in whose place something else
 * was put (a copy, by who synchronises folders), gets it back. */
pml_status eventlog_keep(const eventlog *log, bool *put_back, pml_error *err);

/* Announced lines from seq `from` on, joined by commas, as many as fit into out. *next: the first
 * seq that is not in it (= from when from is past the end). */
pml_status eventlog_read(eventlog *log, int64_t from, char *out, size_t capacity, size_t *size,
                         int64_t *next, pml_error *err);

#endif
