/* JSON for files: config.json, adapter_config.json, the header of a safetensors file, MANIFEST.
 *
 * Reading: parse once, then take fields out by name, type and range. A message says where it
 * happened ("config.json: rope_scaling.factor must be a number ≥ 1, it is \"x\""), so a place in a
 * document is handed around with its name:
 *
 *   pml_json *doc;
 *   pml_json_parse(text, n, "config.json", &pml_json_file_limits, &doc, err);
 *   pml_json_at at = pml_json_root(doc, "config.json");
 *   pml_json_get_int(at, "hidden_size", PML_JSON_REQUIRED, 1, INT32_MAX, &hidden, err);
 *
 * Values live as long as their document. A field that is null counts as absent. An absent optional
 * field leaves *out as it was, so defaults are set before the call.
 *
 * Writing: a writer that remembers its first failure, so only the end needs checking. */
#ifndef PML_JSON_JSON_H
#define PML_JSON_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"

typedef struct pml_json pml_json; /* one value; a parsed document is its root */

typedef enum pml_json_kind {
    PML_JSON_NULL = 0,
    PML_JSON_BOOL,
    PML_JSON_INT,
    PML_JSON_REAL,
    PML_JSON_STRING,
    PML_JSON_ARRAY,
    PML_JSON_OBJECT
} pml_json_kind;

typedef struct pml_json_limits {
    size_t bytes; /* of text */
    int depth;    /* nested objects and arrays */
} pml_json_limits;

/* 16 MiB, 16 levels. */
extern const pml_json_limits pml_json_file_limits;

/* Parse one object or array; nothing may follow it. Duplicate keys, NUL characters, invalid UTF-8
 * and integers beyond int64 are refused. PML_INVALID with name, line and column. */
pml_status pml_json_parse(const char *text, size_t size, const char *name,
                          const pml_json_limits *limits, pml_json **document, pml_error *err);

/* The same from a file (symbolic links are followed); name in messages is the path. */
pml_status pml_json_load(const char *path, const pml_json_limits *limits, pml_json **document,
                         pml_error *err);

/* Only for a document, never for a value inside one. */
void pml_json_destroy(pml_json **document);

/* ---- places and fields ---- */

typedef struct pml_json_at {
    const pml_json *value; /* an object */
    const char *file;      /* what to call the document */
    const char *path;      /* where in it, "" = the root; e.g. "rope_scaling" */
} pml_json_at;

typedef enum pml_json_need { PML_JSON_OPTIONAL = 0, PML_JSON_REQUIRED } pml_json_need;

/* The document itself as a place to read from; file is what errors call it, the caller's. */
pml_json_at pml_json_root(const pml_json *document, const char *file);

bool pml_json_has(pml_json_at at, const char *field); /* there and not null */

/* lo <= value <= hi. A number with a fraction of zero (2.0) counts as an integer. */
pml_status pml_json_get_int(pml_json_at at, const char *field, pml_json_need need, int64_t lo,
                            int64_t hi, int64_t *out, pml_error *err);
pml_status pml_json_get_i32(pml_json_at at, const char *field, pml_json_need need, int32_t lo,
                            int32_t hi, int32_t *out, pml_error *err);

/* A number, or one of the strings "NaN", "Infinity", "-Infinity" where the range has room for it:
 * infinite bounds admit the infinities, and both infinite admit NaN. */
pml_status pml_json_get_double(pml_json_at at, const char *field, pml_json_need need, double lo,
                               double hi, double *out, pml_error *err);
pml_status pml_json_get_bool(pml_json_at at, const char *field, pml_json_need need, bool *out,
                             pml_error *err);

/* Copied into out with its NUL; PML_INVALID when longer than capacity - 1. */
pml_status pml_json_get_string(pml_json_at at, const char *field, pml_json_need need, char *out,
                               size_t capacity, pml_error *err);

/* *out borrows from the document; NULL when absent and optional. */
pml_status pml_json_get_object(pml_json_at at, const char *field, pml_json_need need,
                               const pml_json **out, pml_error *err);
pml_status pml_json_get_array(pml_json_at at, const char *field, pml_json_need need,
                              const pml_json **out, pml_error *err);

/* ---- values ---- */

/* What a value is; NULL is PML_JSON_NULL. */
pml_json_kind pml_json_kind_of(const pml_json *value);
const char *pml_json_kind_name(pml_json_kind kind); /* "a number", "an object", … */

/* A field of an object, NULL when absent. */
const pml_json *pml_json_field(const pml_json *object, const char *field);

/* Each field of an object, in the file's order: start with *cursor = NULL; false at the end. */
bool pml_json_next(const pml_json *object, void **cursor, const char **key, const pml_json **value);

/* Of an array: how many there are (0 for anything else), and one of them. */
size_t pml_json_length(const pml_json *array);
const pml_json *pml_json_item(const pml_json *array, size_t index);

/* False, and *out untouched, when the value is of another kind. */
bool pml_json_as_int(const pml_json *value, int64_t *out);
bool pml_json_as_double(const pml_json *value, double *out);
bool pml_json_as_bool(const pml_json *value, bool *out);
const char *pml_json_as_string(const pml_json *value); /* NULL when it is none */

/* value as compact text for a message, cut at capacity: "[1, 2]", "\"yarn\"". Returns out. */
const char *pml_json_show(const pml_json *value, char *out, size_t capacity);

/* ---- writing ---- */

typedef struct pml_json_writer pml_json_writer;

/* Begins with an open object. */
pml_status pml_json_writer_new(pml_json_writer **writer, pml_error *err);
void pml_json_writer_destroy(pml_json_writer **writer);

/* key: the field's name inside an object, NULL inside an array. Order is kept. */
void pml_json_put_null(pml_json_writer *writer, const char *key);
void pml_json_put_bool(pml_json_writer *writer, const char *key, bool value);
void pml_json_put_int(pml_json_writer *writer, const char *key, int64_t value);
void pml_json_put_double(pml_json_writer *writer, const char *key, double value);
void pml_json_put_string(pml_json_writer *writer, const char *key, const char *value);
void pml_json_begin_object(pml_json_writer *writer, const char *key);
void pml_json_begin_array(pml_json_writer *writer, const char *key);
void pml_json_end(pml_json_writer *writer); /* closes the innermost open object or array */

/* Close what is open and print: indent 0 is one line, else so many spaces a level and a newline at
 * the end. Doubles are printed with 17 digits, so that they read back bit for bit; non-finite ones
 * are strings. *text is malloc'ed, the caller's. Answers the first failure of any put:
 * PML_NO_MEMORY, or PML_INVALID for a string that is not UTF-8. */
pml_status pml_json_writer_finish(pml_json_writer *writer, int indent, char **text, size_t *size,
                                  pml_error *err);

#endif
