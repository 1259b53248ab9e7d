#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "messages_table.h"

/* Jansson's own limit is 2,048 levels, which is more stack than a stranger should be able to use.
 */
static bool too_deep(const char *text, size_t size)
{
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (quoted && c == '\\')
            i++;
        else if (c == '"')
            quoted = !quoted;
        else if (!quoted && (c == '{' || c == '['))
            depth++;
        else if (!quoted && (c == '}' || c == ']'))
            depth--;
        if (depth > PML_MESSAGE_DEPTH)
            return true;
    }
    return false;
}

static pml_status parse_object(const char *text, size_t size, json_t **object, pml_error *err)
{
    *object = NULL;
    if (size > PML_MESSAGE_MAX)
        return PML_FAIL(err, PML_CORRUPT, "a message has at most %d bytes, this one has %zu",
                        PML_MESSAGE_MAX, size);
    if (too_deep(text, size))
        return PML_FAIL(err, PML_CORRUPT, "a message has at most %d levels of objects and lists",
                        PML_MESSAGE_DEPTH);
    json_error_t at;
    bool starved;
    json_t *value = pmli_json_read(text, size, &at, &starved);
    if (starved)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to read a message of %zu bytes", size);
    if (value == NULL)
        return PML_FAIL(err, PML_CORRUPT, "not JSON: %s (line %d, column %d)", at.text, at.line,
                        at.column);
    if (!json_is_object(value)) {
        json_decref(value);
        return PML_FAIL(err, PML_CORRUPT, "a message must be one JSON object");
    }
    *object = value;
    return PML_OK;
}

/* Takes body. */
static pml_status wrap(pml_message_type type, json_t *body, pml_message **message, pml_error *err)
{
    *message = malloc(sizeof **message);
    if (*message == NULL) {
        json_decref(body);
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a message");
    }
    **message = (pml_message){type, false, body};
    return PML_OK;
}

pml_status pml_message_parse(pml_channel channel, const char *text, size_t size,
                             pml_message **message, pml_error *err)
{
    *message = NULL;
    json_t *body;
    pml_status status = parse_object(text, size, &body, err);
    if (status != PML_OK)
        return status;
    const json_t *name = json_object_get(body, "type");
    pml_message_type type = PML_MESSAGE_COUNT;
    if (name == NULL)
        status = PML_FAIL(err, PML_INVALID, "type is missing");
    else if (!json_is_string(name))
        status = PML_FAIL(err, PML_INVALID, "type must be a string");
    else if ((type = pmli_type_find(channel, json_string_value(name))) == PML_MESSAGE_COUNT)
        status = PML_FAIL(err, PML_INVALID, "unknown type \"%.64s\"", json_string_value(name));
    else
        status = pmli_check(body, type, false, err);
    if (status != PML_OK) {
        json_decref(body);
        return status;
    }
    return wrap(type, body, message, err);
}

pml_status pml_message_parse_as(pml_message_type type, const char *text, size_t size,
                                pml_message **message, pml_error *err)
{
    *message = NULL;
    json_t *body;
    pml_status status = parse_object(text, size, &body, err);
    if (status != PML_OK)
        return status;
    status = pmli_check(body, type, true, err);
    if (status != PML_OK) {
        json_decref(body);
        return status;
    }
    return wrap(type, body, message, err);
}

void pml_message_find_id(const char *text, size_t size, char id[65])
{
    strcpy(id, "?");
    json_t *body;
    if (parse_object(text, size, &body, NULL) != PML_OK)
        return;
    const char *found = json_string_value(json_object_get(body, "id"));
    if (found != NULL && found[0] != '\0' && strlen(found) <= 64)
        strcpy(id, found);
    json_decref(body);
}

pml_message *pml_message_new(pml_message_type type)
{
    pml_message *message = malloc(sizeof *message);
    if (message == NULL)
        return NULL;
    pmli_memory_watch();
    *message = (pml_message){type, false, json_object()};
    if (message->body == NULL) {
        free(message);
        return NULL;
    }
    if (pmli_channel_typed(pmli_types[type].channel))
        pml_message_set_string(message, "type", pmli_types[type].name);
    return message;
}

pml_message *pml_message_copy(const pml_message *message)
{
    pml_message *copy = message == NULL ? NULL : malloc(sizeof *copy);
    if (copy == NULL)
        return NULL;
    pmli_memory_watch();
    *copy = (pml_message){message->type, message->failed, json_deep_copy(message->body)};
    copy->failed = copy->failed || pmli_memory_refused();
    if (copy->body == NULL) {
        free(copy);
        return NULL;
    }
    return copy;
}

void pml_message_destroy(pml_message **message)
{
    if (*message == NULL)
        return;
    json_decref((*message)->body);
    free(*message);
    *message = NULL;
}

pml_message_type pml_message_type_of(const pml_message *message)
{
    return message->type;
}

pml_status pml_message_print(const pml_message *message, char **text, size_t *size, pml_error *err)
{
    *text = NULL;
    *size = 0;
    if (message == NULL || message->failed)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a message");
    pml_channel channel = pmli_types[message->type].channel;
    /* A worker's events get their stamp from the coordinator: both forms may be printed. */
    bool bare = !pmli_channel_typed(channel) ||
                (channel == PML_CHANNEL_EVENT && json_object_get(message->body, "seq") == NULL);
    pml_status status = pmli_check(message->body, message->type, bare, err);
    if (status != PML_OK) {
        pml_error_prefix(err, "built a wrong message");
        return err == NULL ? PML_INTERNAL : (err->code = PML_INTERNAL);
    }
    pmli_memory_watch();
    *text = json_dumps(message->body, JSON_COMPACT);
    if (*text != NULL && pmli_memory_refused()) {
        free(*text);
        *text = NULL;
    }
    if (*text == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to print a message");
    *size = strlen(*text);
    if (*size > PML_MESSAGE_MAX) {
        status = PML_FAIL(err, PML_INVALID, "a message has at most %d bytes, this %s has %zu",
                          PML_MESSAGE_MAX, pmli_types[message->type].name, *size);
        free(*text);
        *text = NULL;
        *size = 0;
    }
    return status;
}
