#include "messages_table.h"

#include <string.h>

#define REQUIRED true
#define OPTIONAL false
#define NOBODY   PML_ROLE_NOBODY
#define CONTROL  PML_ROLE_CONTROL
#define VIEW     PML_ROLE_VIEW
#define WORKER   PML_ROLE_WORKER

/* Each MESSAGE closes the list of fields before it and opens its own. */
#define MESSAGE(name, channel, roles, sentence)                                                    \
    {                                                                                              \
        NULL, NULL, PMLI_BOOL, false, 0, 0, NULL, NULL                                             \
    }                                                                                              \
    }                                                                                              \
    ;                                                                                              \
    static const pmli_field fields_##channel##_##name[] = {
#define FIELD(message, name, kind, need, low, high, extra, sentence)                               \
    {#message, #name, PMLI_##kind, need, low, high, extra, sentence},
/* clang-format off */
static const pmli_field fields_none[] __attribute__((unused)) = {
#include "pml/json/messages.def"
    {NULL, NULL, PMLI_BOOL, false, 0, 0, NULL, NULL}
};
/* clang-format on */
#undef MESSAGE
#undef FIELD

const pmli_type pmli_types[PML_MESSAGE_COUNT] = {
#define MESSAGE(name, channel, roles, sentence)                                                    \
    {#name, PML_CHANNEL_##channel, roles, sentence, fields_##channel##_##name},
#define FIELD(message, name, kind, need, low, high, extra, sentence)
#include "pml/json/messages.def"
#undef MESSAGE
#undef FIELD
};

const char *const pmli_kind_names[PMLI_KIND_COUNT] = {
    [PMLI_BOOL] = "true or false",
    [PMLI_INT] = "an integer",
    [PMLI_NUMBER] = "a number",
    [PMLI_FLOAT] = "a number or one of the strings NaN, Infinity, -Infinity",
    [PMLI_STRING] = "a string",
    [PMLI_ENUM] = "a word",
    [PMLI_INTS] = "a list of integers",
    [PMLI_STRINGS] = "a list of strings",
    [PMLI_RECORD] = "an object",
    [PMLI_RECORDS] = "a list of objects",
    [PMLI_OBJECT] = "an object",
    [PMLI_EVENT] = "an event",
    [PMLI_EVENTS] = "a list of events",
    [PMLI_ARGS] = "an object",
};

const char *pml_message_name(pml_message_type type)
{
    return (unsigned)type < PML_MESSAGE_COUNT ? pmli_types[type].name : "?";
}

pml_channel pml_message_channel(pml_message_type type)
{
    return (unsigned)type < PML_MESSAGE_COUNT ? pmli_types[type].channel : PML_CHANNEL_COUNT;
}

unsigned pml_message_roles(pml_message_type type)
{
    return (unsigned)type < PML_MESSAGE_COUNT ? pmli_types[type].roles : PML_ROLE_NOBODY;
}

const char *pml_role_name(pml_role role)
{
    switch (role) {
    case PML_ROLE_NOBODY:
        return "nobody";
    case PML_ROLE_CONTROL:
        return "control";
    case PML_ROLE_VIEW:
        return "view";
    case PML_ROLE_WORKER:
        return "worker";
    }
    return "?";
}

pml_message_type pmli_type_find(pml_channel channel, const char *name)
{
    for (int i = 0; i < PML_MESSAGE_COUNT; i++)
        if (pmli_types[i].channel == channel && strcmp(pmli_types[i].name, name) == 0)
            return (pml_message_type)i;
    return PML_MESSAGE_COUNT;
}

bool pmli_channel_typed(pml_channel channel)
{
    return channel != PML_CHANNEL_FILE && channel != PML_CHANNEL_RECORD;
}

static const pmli_field *find_in(const pmli_field *fields, const char *name)
{
    for (const pmli_field *f = fields; f->name != NULL; f++)
        if (strcmp(f->name, name) == 0)
            return f;
    return NULL;
}

const pmli_field *pmli_field_find(pml_message_type type, const char *name)
{
    const pmli_type *t = &pmli_types[type];
    const pmli_field *f = find_in(t->fields, name);
    if (f == NULL && t->channel == PML_CHANNEL_EVENT)
        f = find_in(pmli_types[PML_RECORD_stamp].fields, name);
    if (f == NULL && (t->channel == PML_CHANNEL_REQUEST || t->channel == PML_CHANNEL_ANSWER))
        f = find_in(pmli_types[PML_RECORD_envelope].fields, name);
    return f;
}

bool pmli_word_in(const char *words, const char *word)
{
    size_t n = strlen(word);
    if (n == 0 || strchr(word, ' ') != NULL)
        return false;
    for (const char *at = strstr(words, word); at != NULL; at = strstr(at + 1, word))
        if ((at == words || at[-1] == ' ') && (at[n] == '\0' || at[n] == ' '))
            return true;
    return false;
}
