/* The event log: events.jsonl, append-only, one event a line, seq = line number.
 *
 * In memory it keeps one file offset a line, so a replay of any length costs reading it. After a
 * crash a torn last line is cut; any other damage is an error that names the line. */
#ifndef PML_COORDINATOR_EVENTLOG_H
#define PML_COORDINATOR_EVENTLOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/json/messages.h"

typedef struct eventlog eventlog;

/* Open or create `folder`/events.jsonl. `seen` gets every event that is there already, except
 * steps and progress, in order. *cut: bytes of a torn line that were removed. */
pml_status eventlog_open(const char *folder, void (*seen)(void *user, const pml_message *event),
                         void *user, eventlog **log, size_t *cut, pml_error *err);
void eventlog_close(eventlog **log);

int64_t eventlog_last(const eventlog *log);     /* seq of the last event, 0 = none */
int64_t eventlog_timeline(const eventlog *log); /* of the last event, -1 = none    */

/* Stamp the event and write its line; durable: on disk before this returns. *text (malloc'ed, the
 * caller's) is the line without its newline, as it is to be published. After a failure the file is
 * as it was. */
pml_status eventlog_append(eventlog *log, pml_message *event, int64_t timeline, bool durable,
                           char **text, size_t *size, pml_error *err);

/* Lines from seq `from` on, joined by commas, as many as fit into out. *next: the first seq that is
 * not in it (= from when from is past the end). */
pml_status eventlog_read(eventlog *log, int64_t from, char *out, size_t capacity, size_t *size,
                         int64_t *next, pml_error *err);

#endif
