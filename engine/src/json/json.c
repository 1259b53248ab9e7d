#include "pml/json/json.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "pml/base/file.h"

/* A pml_json is Jansson's json_t under a name that needs no jansson.h outside this folder. */
static const json_t *inner(const pml_json *value)
{
    return (const json_t *)(const void *)value;
}

static const pml_json *outer(const json_t *value)
{
    return (const pml_json *)(const void *)value;
}

/* Jansson does not always say that memory ran out: it may call the text invalid instead, and a
 * whole file would be taken for a damaged one. So its allocator is ours, which remembers a refusal.
 * Set before main, since Jansson has one allocator for all threads. */
static _Thread_local bool memory_refused;

/* While a text is read, what was refused once stays refused: the parser gives up at its next value.
 * Its lexer does not. Jansson 2.14 (lex_save) drops a byte that its buffer has no room for and goes
 * on; it then writes beyond what it has for a string, or aborts at the end of a number
 * (lex_unget_unsave). So that buffer grows in memory that was taken before: it asks for powers of
 * two, 4 times the text in sum at most. */
static _Thread_local struct {
    char *memory; /* NULL: nothing is being read */
    size_t used, size;
} spare;

static void *take_spare(size_t size)
{
    bool buffer = size >= 16 && (size & (size - 1)) == 0;
    if (!buffer || spare.size - spare.used < size)
        return NULL;
    void *memory = spare.memory + spare.used; /* multiples of 16 behind each other */
    spare.used += size;
    return memory;
}

static void *remembering_malloc(size_t size)
{
    void *memory = spare.memory != NULL && memory_refused ? NULL : malloc(size);
    if (memory != NULL)
        return memory;
    memory_refused = true;
    return spare.memory == NULL ? NULL : take_spare(size);
}

static void free_unless_spare(void *memory)
{
    char *at = memory;
    if (spare.memory == NULL || at < spare.memory || at >= spare.memory + spare.size)
        free(memory);
}

void pmli_memory_watch(void)
{
    memory_refused = false;
}

bool pmli_memory_refused(void)
{
    return memory_refused;
}

json_t *pmli_json_read(const char *text, size_t size, json_error_t *why, bool *starved)
{
    memory_refused = false;
    spare.used = 0;
    spare.memory = __builtin_mul_overflow(size, 4, &spare.size) ||
                           __builtin_add_overflow(spare.size, 1024, &spare.size)
                       ? NULL
                       : malloc(spare.size);
    *starved = spare.memory == NULL;
    if (*starved)
        return NULL;
    json_t *value = json_loadb(text, size, JSON_REJECT_DUPLICATES, why);
    *starved = memory_refused;
    if (memory_refused && value != NULL) { /* a part of it may be missing */
        json_decref(value);
        value = NULL;
    }
    free(spare.memory);
    spare.memory = NULL;
    return value;
}

__attribute__((constructor)) static void set_allocator(void)
{
    json_set_alloc_funcs(remembering_malloc, free_unless_spare);
}

const pml_json_limits pml_json_file_limits = {(size_t)16 << 20, 16};

/* Brackets outside strings. Done before parsing, so that a text of nothing but brackets is refused
 * at the cost of reading it. */
static bool too_deep(const char *text, size_t size, int limit)
{
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (quoted) {
            if (c == '\\')
                i++;
            else if (c == '"')
                quoted = false;
        } else if (c == '"') {
            quoted = true;
        } else if (c == '{' || c == '[') {
            if (++depth > limit)
                return true;
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return false;
}

pml_status pml_json_parse(const char *text, size_t size, const char *name,
                          const pml_json_limits *limits, pml_json **document, pml_error *err)
{
    if (size > limits->bytes)
        return PML_FAIL(err, PML_INVALID, "%s: %zu bytes of JSON, more than the %zu allowed", name,
                        size, limits->bytes);
    if (too_deep(text, size, limits->depth))
        return PML_FAIL(err, PML_INVALID, "%s: JSON nested deeper than %d levels", name,
                        limits->depth);
    json_error_t why;
    bool starved;
    json_t *value = pmli_json_read(text, size, &why, &starved);
    if (starved)
        return PML_FAIL(err, PML_NO_MEMORY, "%s: no memory to read it", name);
    if (value == NULL)
        return PML_FAIL(err, PML_INVALID, "%s: not valid JSON in line %d, column %d: %s", name,
                        why.line, why.column, why.text);
    *document = (pml_json *)(void *)value;
    return PML_OK;
}

pml_status pml_json_load(const char *path, const pml_json_limits *limits, pml_json **document,
                         pml_error *err)
{
    char *text;
    size_t size;
    pml_status status = pml_file_read(path, limits->bytes, true, &text, &size, err);
    if (status != PML_OK)
        return status;
    status = pml_json_parse(text, size, path, limits, document, err);
    free(text);
    return status;
}

void pml_json_destroy(pml_json **document)
{
    json_decref((json_t *)(void *)*document);
    *document = NULL;
}

/* ---- values ---- */

pml_json_kind pml_json_kind_of(const pml_json *value)
{
    switch (value == NULL ? JSON_NULL : json_typeof(inner(value))) {
    case JSON_TRUE:
    case JSON_FALSE:
        return PML_JSON_BOOL;
    case JSON_INTEGER:
        return PML_JSON_INT;
    case JSON_REAL:
        return PML_JSON_REAL;
    case JSON_STRING:
        return PML_JSON_STRING;
    case JSON_ARRAY:
        return PML_JSON_ARRAY;
    case JSON_OBJECT:
        return PML_JSON_OBJECT;
    default:
        return PML_JSON_NULL;
    }
}

const char *pml_json_kind_name(pml_json_kind kind)
{
    static const char *const names[] = {"null",     "true or false", "an integer", "a number",
                                        "a string", "an array",      "an object"};
    return (unsigned)kind < sizeof names / sizeof names[0] ? names[kind] : "?";
}

const pml_json *pml_json_field(const pml_json *object, const char *field)
{
    return outer(json_object_get(inner(object), field));
}

bool pml_json_next(const pml_json *object, void **cursor, const char **key, const pml_json **value)
{
    /* Jansson asks for a mutable object, but only walks its list. */
    json_t *walked = (json_t *)(uintptr_t)object;
    *cursor = *cursor == NULL ? json_object_iter(walked) : json_object_iter_next(walked, *cursor);
    if (*cursor == NULL)
        return false;
    *key = json_object_iter_key(*cursor);
    *value = outer(json_object_iter_value(*cursor));
    return true;
}

size_t pml_json_length(const pml_json *array)
{
    return json_array_size(inner(array));
}

const pml_json *pml_json_item(const pml_json *array, size_t index)
{
    return outer(json_array_get(inner(array), index));
}

bool pml_json_as_int(const pml_json *value, int64_t *out)
{
    if (json_is_integer(inner(value))) {
        *out = json_integer_value(inner(value));
        return true;
    }
    if (!json_is_real(inner(value)))
        return false;
    double real = json_real_value(inner(value));
    /* 2^63 itself does not fit; -2^63 does. */
    if (!(real >= -0x1p63 && real < 0x1p63) || real != floor(real))
        return false;
    *out = (int64_t)real;
    return true;
}

bool pml_json_as_double(const pml_json *value, double *out)
{
    if (json_is_number(inner(value))) {
        *out = json_number_value(inner(value));
        return true;
    }
    const char *text = json_string_value(inner(value));
    if (text == NULL)
        return false;
    if (strcmp(text, "NaN") == 0)
        *out = NAN;
    else if (strcmp(text, "Infinity") == 0)
        *out = INFINITY;
    else if (strcmp(text, "-Infinity") == 0)
        *out = -INFINITY;
    else
        return false;
    return true;
}

bool pml_json_as_bool(const pml_json *value, bool *out)
{
    if (!json_is_boolean(inner(value)))
        return false;
    *out = json_is_true(inner(value));
    return true;
}

const char *pml_json_as_string(const pml_json *value)
{
    return json_string_value(inner(value));
}

const char *pml_json_show(const pml_json *value, char *out, size_t capacity)
{
    char *text = NULL;
    if (value != NULL)
        text = json_dumps(inner(value), JSON_COMPACT | JSON_ENCODE_ANY);
    snprintf(out, capacity, "%s", text != NULL ? text : "null");
    free(text);
    return out;
}
