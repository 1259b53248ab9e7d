/* Reading and writing the fields of a message. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "messages_table.h"

static const json_t *get(const pml_message *message, const char *field)
{
    return message == NULL ? NULL : json_object_get(message->body, field);
}

bool pml_message_has(const pml_message *message, const char *field)
{
    return get(message, field) != NULL;
}

bool pml_message_is_empty(const pml_message *message)
{
    return message == NULL || json_object_size(message->body) == 0;
}

bool pml_message_bool(const pml_message *message, const char *field)
{
    return json_is_true(get(message, field));
}

int64_t pml_message_int(const pml_message *message, const char *field)
{
    return json_integer_value(get(message, field));
}

double pml_message_number(const pml_message *message, const char *field)
{
    const json_t *value = get(message, field);
    const char *word = json_string_value(value);
    if (word == NULL)
        return json_number_value(value);
    return strcmp(word, "NaN") == 0 ? (double)NAN : word[0] == '-' ? -HUGE_VAL : HUGE_VAL;
}

const char *pml_message_string(const pml_message *message, const char *field)
{
    const char *text = json_string_value(get(message, field));
    return text == NULL ? "" : text;
}

size_t pml_message_count(const pml_message *message, const char *field)
{
    return json_array_size(get(message, field));
}

int64_t pml_message_int_at(const pml_message *message, const char *field, size_t index)
{
    return json_integer_value(json_array_get(get(message, field), index));
}

const char *pml_message_string_at(const pml_message *message, const char *field, size_t index)
{
    const char *text = json_string_value(json_array_get(get(message, field), index));
    return text == NULL ? "" : text;
}

/* What the table says is in an object field; OBJECT itself has no type, a stamp stands for it. */
static pml_message_type part_type(const pml_message *message, const char *field, const json_t *part)
{
    const pmli_field *f = pmli_field_find(message->type, field);
    if (f == NULL)
        return PML_MESSAGE_COUNT;
    const char *name = NULL;
    switch (f->kind) {
    case PMLI_RECORD:
    case PMLI_RECORDS:
        return pmli_type_find(PML_CHANNEL_RECORD, f->extra);
    case PMLI_EVENT:
    case PMLI_EVENTS:
        name = json_string_value(json_object_get(part, "type"));
        return name == NULL ? PML_MESSAGE_COUNT : pmli_type_find(PML_CHANNEL_EVENT, name);
    case PMLI_ARGS:
        return pmli_type_find(PML_CHANNEL_REQUEST, pml_message_string(message, "verb"));
    default:
        return PML_RECORD_stamp;
    }
}

pml_message *pml_message_part(const pml_message *message, const char *field, size_t index)
{
    const json_t *value = get(message, field);
    if (json_is_array(value))
        value = json_array_get(value, index);
    if (!json_is_object(value))
        return NULL;
    pml_message_type type = part_type(message, field, value);
    pml_message *part = type == PML_MESSAGE_COUNT ? NULL : malloc(sizeof *part);
    if (part == NULL)
        return NULL;
    pmli_memory_watch();
    *part = (pml_message){type, false, json_deep_copy(value)};
    part->failed = pmli_memory_refused();
    if (part->body == NULL) {
        free(part);
        return NULL;
    }
    return part;
}

/* Takes value; NULL means that there was no memory for it. */
static void put(pml_message *message, const char *field, json_t *value)
{
    if (message == NULL)
        json_decref(value);
    else if (json_object_set_new(message->body, field, value) != 0 || pmli_memory_refused())
        message->failed = true;
}

void pml_message_set_bool(pml_message *message, const char *field, bool value)
{
    put(message, field, json_boolean(value));
}

void pml_message_set_int(pml_message *message, const char *field, int64_t value)
{
    put(message, field, json_integer(value));
}

void pml_message_set_number(pml_message *message, const char *field, double value)
{
    if (isnan(value))
        put(message, field, json_string("NaN"));
    else if (isinf(value))
        put(message, field, json_string(value > 0 ? "Infinity" : "-Infinity"));
    else
        put(message, field, json_real(value));
}

/* Bytes of the UTF-8 character at s, 0 if there is none. Stops at a NUL. */
static size_t character(const unsigned char *s)
{
    size_t n = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    unsigned low = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;
    unsigned high = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;
    if (n == 0 || s[0] > 0xF4 || (n > 1 && (s[1] < low || s[1] > high)))
        return 0;
    for (size_t i = 2; i < n; i++)
        if ((s[i] & 0xC0) != 0x80)
            return 0;
    return n;
}

/* Words that a buffer's end cut inside a character, or a file's name in another encoding, must not
 * keep the message from being sent: what is not UTF-8 becomes '?'. */
static json_t *text_of(const char *value)
{
    const unsigned char *at = (const unsigned char *)value;
    while (*at != '\0' && character(at) > 0)
        at += character(at);
    if (*at == '\0')
        return json_string(value);
    char *copy = strdup(value);
    if (copy == NULL)
        return NULL;
    for (unsigned char *c = (unsigned char *)copy; *c != '\0';) {
        size_t n = character(c);
        if (n == 0)
            *c = '?';
        c += n == 0 ? 1 : n;
    }
    json_t *text = json_string(copy);
    free(copy);
    return text;
}

void pml_message_set_string(pml_message *message, const char *field, const char *value)
{
    put(message, field, text_of(value));
}

void pml_message_set_empty(pml_message *message, const char *field)
{
    put(message, field, json_array());
}

void pml_message_remove(pml_message *message, const char *field)
{
    if (message != NULL)
        json_object_del(message->body, field);
}

void pml_message_remove_all(pml_message *message, const pml_message *other)
{
    const char *key;
    json_t *value;
    if (message == NULL || other == NULL)
        return;
    json_object_foreach(other->body, key, value) json_object_del(message->body, key);
}

void pml_message_set_ints(pml_message *message, const char *field, const int32_t *values, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n && list != NULL; i++) {
        if (json_array_append_new(list, json_integer(values[i])) != 0) {
            json_decref(list);
            list = NULL;
        }
    }
    put(message, field, list);
}

void pml_message_set_json(pml_message *message, const char *field, const char *text)
{
    bool starved;
    put(message, field, pmli_json_read(text, strlen(text), NULL, &starved));
}

/* The body of part, and part is gone. */
static json_t *take(pml_message *part)
{
    if (part == NULL)
        return NULL;
    json_t *body = part->failed ? NULL : json_incref(part->body);
    pml_message_destroy(&part);
    return body;
}

void pml_message_set_part(pml_message *message, const char *field, pml_message *part)
{
    put(message, field, take(part));
}

void pml_message_append(pml_message *message, const char *field, pml_message *part)
{
    json_t *body = take(part);
    if (message == NULL) {
        json_decref(body);
        return;
    }
    if (json_object_get(message->body, field) == NULL)
        put(message, field, json_array());
    if (json_array_append_new(json_object_get(message->body, field), body) != 0 ||
        pmli_memory_refused())
        message->failed = true;
}

void pml_message_set_args(pml_message *message, const char *field, const pml_message *request)
{
    json_t *args = request == NULL ? NULL : json_deep_copy(request->body);
    if (args != NULL) {
        json_object_del(args, "type");
        json_object_del(args, "id");
    }
    put(message, field, args);
}

void pml_message_stamp(pml_message *event, int64_t seq, double time, int64_t timeline)
{
    if (event == NULL)
        return;
    json_t *stamped = json_object();
    if (json_object_set_new(stamped, "seq", json_integer(seq)) != 0 ||
        json_object_set_new(stamped, "time", json_real(time)) != 0 ||
        json_object_set_new(stamped, "timeline", json_integer(timeline)) != 0)
        event->failed = true;
    if (pmli_memory_refused())
        event->failed = true;
    if (stamped == NULL)
        return;
    /* Not json_object_update_missing, which leaves out what it finds no memory for. */
    const char *key;
    json_t *value;
    json_object_foreach(event->body, key, value)
    {
        if (json_object_get(stamped, key) == NULL && json_object_set(stamped, key, value) != 0)
            event->failed = true;
    }
    json_decref(event->body);
    event->body = stamped;
}

void pml_message_differs(const pml_message *a, const char *field_a, const pml_message *b,
                         const char *field_b, char *text, size_t capacity)
{
    text[0] = '\0';
    json_t *left = (json_t *)get(a, field_a), *right = (json_t *)get(b, field_b);
    const char *key;
    json_t *value;
    json_object_foreach(left, key, value)
    {
        json_t *other = json_object_get(right, key);
        if (json_equal(value, other))
            continue;
        char *was = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
        char *is = other == NULL ? NULL : json_dumps(other, JSON_COMPACT | JSON_ENCODE_ANY);
        snprintf(text, capacity, "%s: %.200s, now %.200s", key, was == NULL ? "?" : was,
                 is == NULL ? "absent" : is);
        free(was);
        free(is);
        return;
    }
    json_object_foreach(right, key, value)
    {
        if (json_object_get(left, key) == NULL) {
            snprintf(text, capacity, "%s: absent, now there", key);
            return;
        }
    }
}
