#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "pml/json/json.h"

enum { WRITER_DEPTH_MAX = 16 };

/* open[0] is the root and owns everything; open[depth] is where the next value goes. */
struct pml_json_writer {
    json_t *open[WRITER_DEPTH_MAX];
    int depth;
    pml_status failure;
    char failed_key[64];
};

pml_status pml_json_writer_new(pml_json_writer **writer, pml_error *err)
{
    pml_json_writer *w = calloc(1, sizeof *w);
    if (w != NULL)
        w->open[0] = json_object();
    if (w == NULL || w->open[0] == NULL) {
        free(w);
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to write JSON");
    }
    *writer = w;
    return PML_OK;
}

void pml_json_writer_destroy(pml_json_writer **writer)
{
    if (*writer != NULL)
        json_decref((*writer)->open[0]);
    free(*writer);
    *writer = NULL;
}

static void fail(pml_json_writer *writer, pml_status code, const char *key)
{
    if (writer->failure != PML_OK)
        return;
    writer->failure = code;
    strncpy(writer->failed_key, key != NULL ? key : "(array item)", sizeof writer->failed_key - 1);
}

/* Takes value over, NULL included. Returns it while it lives in the tree. */
static json_t *put(pml_json_writer *writer, const char *key, json_t *value)
{
    if (value == NULL) {
        fail(writer, PML_NO_MEMORY, key);
        return NULL;
    }
    if (writer->failure != PML_OK) {
        json_decref(value);
        return NULL;
    }
    json_t *place = writer->open[writer->depth];
    if (json_is_object(place) != (key != NULL)) {
        json_decref(value);
        fail(writer, PML_INTERNAL, key);
        return NULL;
    }
    int refused =
        key != NULL ? json_object_set_new(place, key, value) : json_array_append_new(place, value);
    if (refused) {
        fail(writer, PML_NO_MEMORY, key);
        return NULL;
    }
    return value;
}

void pml_json_put_null(pml_json_writer *writer, const char *key)
{
    put(writer, key, json_null());
}

void pml_json_put_bool(pml_json_writer *writer, const char *key, bool value)
{
    put(writer, key, json_boolean(value));
}

void pml_json_put_int(pml_json_writer *writer, const char *key, int64_t value)
{
    put(writer, key, json_integer(value));
}

void pml_json_put_double(pml_json_writer *writer, const char *key, double value)
{
    if (isnan(value))
        put(writer, key, json_string("NaN"));
    else if (isinf(value))
        put(writer, key, json_string(value > 0 ? "Infinity" : "-Infinity"));
    else
        put(writer, key, json_real(value));
}

void pml_json_put_string(pml_json_writer *writer, const char *key, const char *value)
{
    pmli_memory_watch();
    json_t *text = json_string(value);
    if (text == NULL && value != NULL) { /* Jansson says NULL for both */
        fail(writer, pmli_memory_refused() ? PML_NO_MEMORY : PML_INVALID, key);
        return;
    }
    put(writer, key, text);
}

static void begin(pml_json_writer *writer, const char *key, json_t *value)
{
    if (writer->depth + 1 == WRITER_DEPTH_MAX) {
        json_decref(value);
        fail(writer, PML_INTERNAL, key);
        return;
    }
    json_t *placed = put(writer, key, value);
    if (placed != NULL)
        writer->open[++writer->depth] = placed;
}

void pml_json_begin_object(pml_json_writer *writer, const char *key)
{
    begin(writer, key, json_object());
}

void pml_json_begin_array(pml_json_writer *writer, const char *key)
{
    begin(writer, key, json_array());
}

void pml_json_end(pml_json_writer *writer)
{
    /* After a failure begin may not have opened; the tree is void then anyway. */
    if (writer->failure != PML_OK)
        return;
    if (writer->depth > 0)
        writer->depth--;
    else
        fail(writer, PML_INTERNAL, "(end)");
}

pml_status pml_json_writer_finish(pml_json_writer *writer, int indent, char **text, size_t *size,
                                  pml_error *err)
{
    if (writer->failure == PML_INVALID)
        return PML_FAIL(err, PML_INVALID, "%s is not valid UTF-8", writer->failed_key);
    if (writer->failure != PML_OK)
        return PML_FAIL(err, writer->failure, "JSON field %s cannot be written: %s",
                        writer->failed_key, pml_status_name(writer->failure));
    /* Without more, Jansson prints doubles with 17 digits. */
    size_t flags = indent > 0 ? JSON_INDENT((size_t)indent) : JSON_COMPACT;
    pmli_memory_watch();
    char *printed = json_dumps(writer->open[0], flags);
    if (pmli_memory_refused()) { /* also where there is a text: a piece of it may be missing */
        free(printed);
        printed = NULL;
    }
    size_t n = printed != NULL ? strlen(printed) : 0;
    if (printed != NULL && indent > 0) {
        char *wider = realloc(printed, n + 2);
        if (wider == NULL)
            free(printed);
        else
            memcpy(wider + n++, "\n", 2);
        printed = wider;
    }
    if (printed == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to print JSON");
    *text = printed;
    *size = n;
    return PML_OK;
}
