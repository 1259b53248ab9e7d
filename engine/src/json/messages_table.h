/* The message table as data, shared by the files of messages_*.c. */
#ifndef PML_JSON_MESSAGES_TABLE_H
#define PML_JSON_MESSAGES_TABLE_H

#include <jansson.h>

#include "pml/json/messages.h"

typedef enum pmli_kind {
    PMLI_BOOL,
    PMLI_INT,
    PMLI_NUMBER,
    PMLI_FLOAT,
    PMLI_STRING,
    PMLI_ENUM,
    PMLI_INTS,
    PMLI_STRINGS,
    PMLI_RECORD,
    PMLI_RECORDS,
    PMLI_OBJECT,
    PMLI_EVENT,
    PMLI_EVENTS,
    PMLI_ARGS,
    PMLI_KIND_COUNT
} pmli_kind;

typedef struct pmli_field {
    const char *message; /* the one it stands under, NULL at the end of a message's fields */
    const char *name;
    pmli_kind kind;
    bool required;
    double low, high;
    const char *extra;
    const char *sentence;
} pmli_field;

typedef struct pmli_type {
    const char *name;
    pml_channel channel;
    unsigned roles;
    const char *sentence;
    const pmli_field *fields;
} pmli_type;

extern const pmli_type pmli_types[PML_MESSAGE_COUNT];
extern const char *const pmli_kind_names[PMLI_KIND_COUNT];

struct pml_message {
    pml_message_type type;
    bool failed;  /* a field could not be set for want of memory */
    json_t *body; /* the object, with `type` in it where the channel has one */
};

/* PML_MESSAGE_COUNT when there is none of that name. */
pml_message_type pmli_type_find(pml_channel channel, const char *name);

/* The field of a type by name, those of its stamp or envelope included; NULL when there is none. */
const pmli_field *pmli_field_find(pml_message_type type, const char *name);

/* Whether messages of this channel carry `type`. */
bool pmli_channel_typed(pml_channel channel);

/* Whether word is one of the words of a list that blanks separate. */
bool pmli_word_in(const char *words, const char *word);

/* The whole check of an object against its type; bare: without stamp or envelope. */
pml_status pmli_check(const json_t *object, pml_message_type type, bool bare, pml_error *err);

#endif
