/* Messages: what crosses a process boundary, checked against one table
 * (engine/src/json/messages.def, printed for people in docs/messages.md).
 *
 * A pml_message is one JSON object of a known type. Parsing validates: size, depth, type, every
 * field's presence, type and range; whatever is wrong is named. Building is sticky: a field that
 * cannot be set (no memory) is remembered, and pml_message_print says so; a NULL message is
 * accepted everywhere and fails at the print. Printing validates again, so that nothing invalid is
 * sent. */
#ifndef PML_JSON_MESSAGES_H
#define PML_JSON_MESSAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    PML_MESSAGE_MAX = 65536, /* bytes of any message                                */
    PML_EVENT_MAX = PML_MESSAGE_MAX - 1024, /* bytes of an event, so that a replay can carry it */
    PML_REQUEST_MAX = PML_EVENT_MAX - 1024, /* bytes of a request, so that an event can carry it */
    /* Of the log at most so many bytes, and the rest of a line, are not synced … */
    PML_LOG_UNSYNCED = 256 << 10,
    /* … and so much of its end can a power cut have torn, with what a disk adds. */
    PML_LOG_TORN_MAX = PML_LOG_UNSYNCED + PML_MESSAGE_MAX,
    PML_MESSAGE_DEPTH = 16 /* objects and arrays inside each other                 */
};

typedef enum pml_channel {
    PML_CHANNEL_REQUEST = 0,
    PML_CHANNEL_ANSWER,
    PML_CHANNEL_EVENT,
    PML_CHANNEL_SIGNAL,
    PML_CHANNEL_ORDER,
    PML_CHANNEL_REPORT,
    PML_CHANNEL_LINE,
    PML_CHANNEL_FILE,
    PML_CHANNEL_RECORD,
    PML_CHANNEL_COUNT
} pml_channel;

/* What a key may be used for, as bits. */
typedef enum pml_role {
    PML_ROLE_NOBODY = 0,
    PML_ROLE_CONTROL = 1 << 0,
    PML_ROLE_VIEW = 1 << 1,
    PML_ROLE_WORKER = 1 << 2
} pml_role;

/* PML_REQUEST_hello, PML_EVENT_step, PML_FILE_run, … : one for each MESSAGE of the table. */
typedef enum pml_message_type {
#define MESSAGE(name, channel, roles, sentence) PML_##channel##_##name,
#define FIELD(message, name, kind, need, low, high, extra, sentence)
#include "pml/json/messages.def"
#undef MESSAGE
#undef FIELD
    PML_MESSAGE_COUNT
} pml_message_type;

/* What messages.def says of a type. */
const char *pml_message_name(pml_message_type type); /* "step" */
pml_channel pml_message_channel(pml_message_type type);
unsigned pml_message_roles(pml_message_type type); /* pml_role bits that may send it */
const char *pml_role_name(pml_role role);          /* "control" */

typedef struct pml_message pml_message;

/* A message of `channel` by its `type` field. text need not end in NUL. Too long, not UTF-8, not
 * one JSON object, a key twice, too deep: PML_CORRUPT. Unknown type; field missing, unknown, of the
 * wrong type or out of range: PML_INVALID, naming it. */
pml_status pml_message_parse(pml_channel channel, const char *text, size_t size,
                             pml_message **message, pml_error *err);

/* A message of a type that the place decides (FILE, LINE, RECORD): no `type` field. */
pml_status pml_message_parse_as(pml_message_type type, const char *text, size_t size,
                                pml_message **message, pml_error *err);

/* The `id` of a request that may be damaged otherwise, so that an error can be addressed; "?" where
 * there is none. id: 65 bytes. */
void pml_message_find_id(const char *text, size_t size, char id[65]);

/* NULL without memory. */
pml_message *pml_message_new(pml_message_type type);
pml_message *pml_message_copy(const pml_message *message);
void pml_message_destroy(pml_message **message);

/* Which kind of message it is. */
pml_message_type pml_message_type_of(const pml_message *message);

/* Compact JSON with `type` (where the channel has one) before the other fields, NUL-terminated,
 * malloc'ed; the caller frees. PML_INTERNAL names the field when the message does not fit the
 * table. */
pml_status pml_message_print(const pml_message *message, char **text, size_t *size, pml_error *err);

/* Readers. A field that is absent reads as 0, false, "" or no entries. Strings live as long as the
 * message. */
bool pml_message_has(const pml_message *message, const char *field);
bool pml_message_is_empty(const pml_message *message); /* no fields, or NULL */
bool pml_message_bool(const pml_message *message, const char *field);
int64_t pml_message_int(const pml_message *message, const char *field);
double pml_message_number(const pml_message *message, const char *field); /* FLOAT: NaN, ±Inf too */
const char *pml_message_string(const pml_message *message, const char *field);
size_t pml_message_count(const pml_message *message, const char *field); /* entries of a list */
int64_t pml_message_int_at(const pml_message *message, const char *field, size_t index);
const char *pml_message_string_at(const pml_message *message, const char *field, size_t index);
/* A copy of an object field (index 0) or of an entry of a list of objects, typed where the table
 * says so (RECORD, RECORDS, EVENT, EVENTS, ARGS); NULL when absent. The caller destroys it. */
pml_message *pml_message_part(const pml_message *message, const char *field, size_t index);

/* Writers; an earlier value is replaced. */
void pml_message_set_bool(pml_message *message, const char *field, bool value);
void pml_message_set_int(pml_message *message, const char *field, int64_t value);
void pml_message_set_number(pml_message *message, const char *field, double value);
void pml_message_set_string(pml_message *message, const char *field, const char *value);
void pml_message_set_ints(pml_message *message, const char *field, const int32_t *values, size_t n);
void pml_message_set_json(pml_message *message, const char *field, const char *text); /* OBJECT */
/* The content of part becomes the field, or one more entry of the list. Takes part, and destroys it
 * in every case. */
void pml_message_set_part(pml_message *message, const char *field, pml_message *part);
void pml_message_append(pml_message *message, const char *field, pml_message *part);
void pml_message_remove(pml_message *message, const char *field);
/* Every field that other, another message, has. */
void pml_message_remove_all(pml_message *message, const pml_message *other);
/* An empty list, so that a required list without entries is there. */
void pml_message_set_empty(pml_message *message, const char *field);

/* The request's fields without type and id, as the `args` of another message. */
void pml_message_set_args(pml_message *message, const char *field, const pml_message *request);

/* Put seq, time and timeline before an event's fields. */
void pml_message_stamp(pml_message *event, int64_t seq, double time, int64_t timeline);

/* First difference between two free objects, as "threads: 2, now 4"; "" when they are equal. */
void pml_message_differs(const pml_message *a, const char *field_a, const pml_message *b,
                         const char *field_b, char *text, size_t capacity);

/* The whole table in Markdown: docs/messages.md. malloc'ed; NULL without memory. */
char *pml_message_document(void);

#ifdef __cplusplus
}
#endif
#endif
