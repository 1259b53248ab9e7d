/* Is this object a message of that type? Every answer names the field. */
#include "messages_table.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ITEM_STRING_MAX = 4096 };

static const char *kind_of(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "true or false";
    case JSON_NULL:
        return "null";
    }
    return "?";
}

static pml_status wrong_kind(const char *where, const pmli_field *f, const json_t *value,
                             pml_error *err)
{
    return PML_FAIL(err, PML_INVALID, "%s.%s must be %s, it is %s", where, f->name,
                    pmli_kind_names[f->kind], kind_of(value));
}

static pml_status check_range(const char *where, const pmli_field *f, double value, pml_error *err)
{
    if (value >= f->low && value <= f->high)
        return PML_OK;
    return PML_FAIL(err, PML_INVALID, "%s.%s must be between %.16g and %.16g, it is %.16g", where,
                    f->name, f->low, f->high, value);
}

static pml_status check_length(const char *where, const pmli_field *f, size_t n, const char *unit,
                               pml_error *err)
{
    if ((double)n >= f->low && (double)n <= f->high)
        return PML_OK;
    return PML_FAIL(err, PML_INVALID, "%s.%s must have %.16g to %.16g %s, it has %zu", where,
                    f->name, f->low, f->high, unit, n);
}

static pml_status check_number(const char *where, const pmli_field *f, const json_t *value,
                               pml_error *err)
{
    if (json_is_number(value))
        return check_range(where, f, json_number_value(value), err);
    if (f->kind == PMLI_FLOAT && json_is_string(value) &&
        pmli_word_in("NaN Infinity -Infinity", json_string_value(value)))
        return PML_OK;
    return wrong_kind(where, f, value, err);
}

static pml_status check_word(const char *where, const pmli_field *f, const char *word,
                             pml_error *err)
{
    if (f->extra[0] == '\0' || pmli_word_in(f->extra, word))
        return PML_OK;
    return PML_FAIL(err, PML_INVALID, "%s.%s must be one of %s, it is \"%.64s\"", where, f->name,
                    f->extra, word);
}

static pml_status check_string(const char *where, const pmli_field *f, const json_t *value,
                               pml_error *err)
{
    if (!json_is_string(value))
        return wrong_kind(where, f, value, err);
    if (f->kind == PMLI_ENUM)
        return check_word(where, f, json_string_value(value), err);
    return check_length(where, f, json_string_length(value), "bytes", err);
}

static pml_status check_list(const char *where, const pmli_field *f, const json_t *value,
                             pml_error *err)
{
    if (!json_is_array(value))
        return wrong_kind(where, f, value, err);
    pml_status status = check_length(where, f, json_array_size(value), "entries", err);
    if (status != PML_OK)
        return status;
    size_t i;
    json_t *item;
    json_array_foreach(value, i, item)
    {
        if (f->kind == PMLI_INTS) {
            if (!json_is_integer(item) || json_integer_value(item) < 0 ||
                json_integer_value(item) > INT32_MAX)
                return PML_FAIL(err, PML_INVALID, "%s.%s[%zu] must be an integer between 0 and %d",
                                where, f->name, i, INT32_MAX);
        } else if (!json_is_string(item) || json_string_length(item) > ITEM_STRING_MAX) {
            return PML_FAIL(err, PML_INVALID, "%s.%s[%zu] must be a string of at most %d bytes",
                            where, f->name, i, ITEM_STRING_MAX);
        } else {
            status = check_word(where, f, json_string_value(item), err);
            if (status != PML_OK)
                return status;
        }
    }
    return PML_OK;
}

static pml_status check_event(const char *where, const pmli_field *f, const json_t *value,
                              bool bare, pml_error *err)
{
    if (!json_is_object(value))
        return wrong_kind(where, f, value, err);
    const char *name = json_string_value(json_object_get(value, "type"));
    pml_message_type type =
        name == NULL ? PML_MESSAGE_COUNT : pmli_type_find(PML_CHANNEL_EVENT, name);
    if (type == PML_MESSAGE_COUNT)
        return PML_FAIL(err, PML_INVALID, "%s.%s.type must name an event, it is \"%.64s\"", where,
                        f->name, name == NULL ? "" : name);
    return pmli_check(value, type, bare, err);
}

static pml_status check_args(const char *where, const pmli_field *f, const json_t *parent,
                             const json_t *value, pml_error *err)
{
    if (!json_is_object(value))
        return wrong_kind(where, f, value, err);
    const char *verb = json_string_value(json_object_get(parent, "verb"));
    pml_message_type type =
        verb == NULL ? PML_MESSAGE_COUNT : pmli_type_find(PML_CHANNEL_REQUEST, verb);
    if (type == PML_MESSAGE_COUNT)
        return PML_FAIL(err, PML_INVALID, "%s.verb must name a request", where);
    return pmli_check(value, type, true, err);
}

static pml_status check_records(const char *where, const pmli_field *f, const json_t *value,
                                pml_error *err)
{
    bool events = f->kind == PMLI_EVENTS;
    if (!json_is_array(value))
        return wrong_kind(where, f, value, err);
    pml_status status = check_length(where, f, json_array_size(value), "entries", err);
    size_t i;
    json_t *item;
    json_array_foreach(value, i, item)
    {
        if (status == PML_OK && !json_is_object(item))
            status = PML_FAIL(err, PML_INVALID, "%s.%s[%zu] must be an object, it is %s", where,
                              f->name, i, kind_of(item));
        if (status == PML_OK)
            status =
                events ? check_event(where, f, item, false, err)
                       : pmli_check(item, pmli_type_find(PML_CHANNEL_RECORD, f->extra), true, err);
    }
    return status;
}

/* A record is named by the field it stands in, which is the name that a person gave it. */
static pml_status check_record(const char *where, const pmli_field *f, const json_t *value,
                               pml_error *err)
{
    if (!json_is_object(value))
        return wrong_kind(where, f, value, err);
    pml_status status = pmli_check(value, pmli_type_find(PML_CHANNEL_RECORD, f->extra), true, err);
    return status == PML_OK ? PML_OK : pml_error_prefix(err, "%s", f->name);
}

static pml_status check_value(const char *where, const pmli_field *f, const json_t *parent,
                              const json_t *value, pml_error *err)
{
    switch (f->kind) {
    case PMLI_BOOL:
        return json_is_boolean(value) ? PML_OK : wrong_kind(where, f, value, err);
    case PMLI_INT:
        return json_is_integer(value)
                   ? check_range(where, f, (double)json_integer_value(value), err)
                   : wrong_kind(where, f, value, err);
    case PMLI_NUMBER:
    case PMLI_FLOAT:
        return check_number(where, f, value, err);
    case PMLI_STRING:
    case PMLI_ENUM:
        return check_string(where, f, value, err);
    case PMLI_INTS:
    case PMLI_STRINGS:
        return check_list(where, f, value, err);
    case PMLI_RECORD:
        return check_record(where, f, value, err);
    case PMLI_RECORDS:
    case PMLI_EVENTS:
        return check_records(where, f, value, err);
    case PMLI_OBJECT:
        return json_is_object(value) ? PML_OK : wrong_kind(where, f, value, err);
    case PMLI_EVENT:
        return check_event(where, f, value, true, err);
    case PMLI_ARGS:
        return check_args(where, f, parent, value, err);
    case PMLI_KIND_COUNT:
        break;
    }
    return PML_FAIL(err, PML_INTERNAL, "%s.%s has no kind", where, f->name);
}

static pml_status check_fields(const json_t *object, const char *where, const pmli_field *fields,
                               pml_error *err)
{
    for (const pmli_field *f = fields; f->name != NULL; f++) {
        const json_t *value = json_object_get(object, f->name);
        if (value == NULL && f->required)
            return PML_FAIL(err, PML_INVALID, "%s.%s is missing", where, f->name);
        pml_status status = value == NULL ? PML_OK : check_value(where, f, object, value, err);
        if (status != PML_OK)
            return status;
    }
    return PML_OK;
}

/* "; it has a, b", as many as there is room for; "" where there are none. */
static const char *show_fields(const pmli_type *t, char *out, size_t capacity)
{
    static const char more[] = ", …";
    size_t used = 0;
    out[0] = '\0';
    for (const pmli_field *f = t->fields; f->name != NULL; f++) {
        const char *before = used > 0 ? ", " : "; it has ";
        if (used + strlen(before) + strlen(f->name) + sizeof more > capacity) {
            strcpy(out + used, more);
            break;
        }
        used += (size_t)snprintf(out + used, capacity - used, "%s%s", before, f->name);
    }
    return out;
}

pml_status pmli_check(const json_t *object, pml_message_type type, bool bare, pml_error *err)
{
    const pmli_type *t = &pmli_types[type];
    char names[512];
    bool stamped = t->channel == PML_CHANNEL_EVENT && !bare;
    bool enveloped =
        (t->channel == PML_CHANNEL_REQUEST || t->channel == PML_CHANNEL_ANSWER) && !bare;
    const pmli_field *common = stamped     ? pmli_types[PML_RECORD_stamp].fields
                               : enveloped ? pmli_types[PML_RECORD_envelope].fields
                                           : NULL;
    pml_status status = common == NULL ? PML_OK : check_fields(object, t->name, common, err);
    if (status == PML_OK)
        status = check_fields(object, t->name, t->fields, err);
    size_t known = 0;
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value)
    {
        bool typed = pmli_channel_typed(t->channel) && strcmp(key, "type") == 0;
        bool in = false;
        for (const pmli_field *f = t->fields; f->name != NULL; f++)
            in = in || strcmp(f->name, key) == 0;
        known += in;
        for (const pmli_field *f = common; f != NULL && f->name != NULL; f++)
            in = in || strcmp(f->name, key) == 0;
        if (status == PML_OK && !typed && !in)
            status = PML_FAIL(err, PML_INVALID, "%s has no field \"%.64s\"%s", t->name, key,
                              show_fields(t, names, sizeof names));
    }
    if (status == PML_OK && type == PML_REQUEST_set && known == 0)
        status = PML_FAIL(err, PML_INVALID, "set needs at least one setting");
    return status;
}
