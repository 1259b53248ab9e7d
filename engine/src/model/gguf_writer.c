#include "gguf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/model/gguf.h"

typedef struct declared {
    char *name;
    uint64_t bytes;
} declared;

struct pml_gguf_writer {
    pml_atomic_file *file;
    FILE *pairs, *records; /* growing in memory until the first data */
    char *pairs_text, *records_text;
    size_t pairs_size, records_size;
    char **keys;
    uint64_t n_pairs;
    declared *tensors;
    size_t n_tensors, current;
    uint64_t data, written; /* declared bytes with padding; of the current tensor */
    bool header_written;
};

uint64_t pml_gguf_row_bytes(pml_gguf_type type, uint64_t n)
{
    switch (type) {
    case PML_GGUF_F32:
        return n > UINT64_MAX / 4 ? 0 : n * 4;
    case PML_GGUF_F16:
    case PML_GGUF_BF16:
        return n > UINT64_MAX / 2 ? 0 : n * 2;
    case PML_GGUF_Q8_0:
        return n % PML_GGUF_Q8_BLOCK != 0 || n > UINT64_MAX / PML_GGUF_Q8_BYTES
                   ? 0
                   : n / PML_GGUF_Q8_BLOCK * PML_GGUF_Q8_BYTES;
    }
    return 0;
}

pml_status pml_gguf_writer_new(const char *path, unsigned mode, pml_gguf_writer **writer,
                               pml_error *err)
{
    *writer = NULL;
    pml_gguf_writer *w = calloc(1, sizeof *w);
    if (w == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to write %s", path);
    w->pairs = open_memstream(&w->pairs_text, &w->pairs_size);
    w->records = open_memstream(&w->records_text, &w->records_size);
    pml_status status = w->pairs == NULL || w->records == NULL
                            ? PML_FAIL(err, PML_NO_MEMORY, "no memory to write %s", path)
                            : pml_atomic_file_new(path, (mode_t)mode, &w->file, err);
    if (status != PML_OK) {
        pml_gguf_writer_destroy(&w);
        return status;
    }
    *writer = w;
    return PML_OK;
}

void pml_gguf_writer_destroy(pml_gguf_writer **writer)
{
    if (*writer == NULL)
        return;
    pml_gguf_writer *w = *writer;
    if (w->pairs != NULL)
        fclose(w->pairs);
    if (w->records != NULL)
        fclose(w->records);
    for (uint64_t i = 0; i < w->n_pairs; i++)
        free(w->keys[i]);
    for (size_t i = 0; i < w->n_tensors; i++)
        free(w->tensors[i].name);
    free(w->pairs_text);
    free(w->records_text);
    free(w->keys);
    free(w->tensors);
    pml_atomic_file_destroy(&w->file);
    free(w);
    *writer = NULL;
}

/* ---- numbers and strings, little-endian whatever the machine ---- */

static void put_bytes(FILE *out, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        fputc((int)(value >> (8 * i) & 0xFF), out);
}

static void put_string(FILE *out, const char *text)
{
    size_t n = strlen(text);
    put_bytes(out, n, 8);
    fwrite(text, 1, n, out);
}

static void put_float(FILE *out, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_bytes(out, bits, 4);
}

/* ---- pairs ---- */

static const struct kind_name {
    const char *name;
    pmli_gguf_kind kind;
    bool array;
} kind_names[] = {{"u32", PMLI_KIND_U32, false},      {"u64", PMLI_KIND_U64, false},
                  {"i32", PMLI_KIND_I32, false},      {"f32", PMLI_KIND_F32, false},
                  {"bool", PMLI_KIND_BOOL, false},    {"string", PMLI_KIND_STRING, false},
                  {"i32s", PMLI_KIND_I32, true},      {"f32s", PMLI_KIND_F32, true},
                  {"strings", PMLI_KIND_STRING, true}};

static const struct kind_name *kind_named(const char *name)
{
    for (size_t i = 0; name != NULL && i < sizeof kind_names / sizeof *kind_names; i++)
        if (strcmp(kind_names[i].name, name) == 0)
            return &kind_names[i];
    return NULL;
}

/* False when the value is of another kind or out of range. */
static bool put_value(FILE *out, pmli_gguf_kind kind, const pml_json *value)
{
    int64_t integer = 0;
    double real = 0;
    bool truth = false;
    switch (kind) {
    case PMLI_KIND_U32:
        if (!pml_json_as_int(value, &integer) || integer < 0 || integer > UINT32_MAX)
            return false;
        put_bytes(out, (uint64_t)integer, 4);
        return true;
    case PMLI_KIND_U64:
        if (!pml_json_as_int(value, &integer) || integer < 0)
            return false;
        put_bytes(out, (uint64_t)integer, 8);
        return true;
    case PMLI_KIND_I32:
        if (!pml_json_as_int(value, &integer) || integer < INT32_MIN || integer > INT32_MAX)
            return false;
        put_bytes(out, (uint64_t)integer, 4);
        return true;
    case PMLI_KIND_F32:
        if (!pml_json_as_double(value, &real))
            return false;
        put_float(out, (float)real);
        return true;
    case PMLI_KIND_BOOL:
        if (!pml_json_as_bool(value, &truth))
            return false;
        put_bytes(out, truth, 1);
        return true;
    case PMLI_KIND_STRING:
        if (pml_json_as_string(value) == NULL)
            return false;
        put_string(out, pml_json_as_string(value));
        return true;
    default:
        return false;
    }
}

static bool put_values(FILE *out, const struct kind_name *kind, const pml_json *value)
{
    if (!kind->array)
        return put_value(out, kind->kind, value);
    if (value == NULL || pml_json_kind_of(value) != PML_JSON_ARRAY)
        return false;
    size_t n = pml_json_length(value);
    put_bytes(out, kind->kind, 4);
    put_bytes(out, n, 8);
    for (size_t i = 0; i < n; i++)
        if (!put_value(out, kind->kind, pml_json_item(value, i)))
            return false;
    return true;
}

static pml_status remember_key(pml_gguf_writer *w, const char *key, pml_error *err)
{
    for (uint64_t i = 0; i < w->n_pairs; i++)
        if (strcmp(w->keys[i], key) == 0)
            return PML_FAIL(err, PML_INVALID, "the GGUF key '%s' is there twice", key);
    char **wider = reallocarray(w->keys, w->n_pairs + 1, sizeof *wider);
    if (wider == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the GGUF key '%s'", key);
    w->keys = wider;
    w->keys[w->n_pairs] = strdup(key);
    if (w->keys[w->n_pairs] == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the GGUF key '%s'", key);
    w->n_pairs++;
    return PML_OK;
}

/* Key and type of a pair whose value comes next. */
static pml_status begin_pair(pml_gguf_writer *w, const char *key, pmli_gguf_kind kind,
                             pml_error *err)
{
    if (w->header_written)
        return PML_FAIL(err, PML_INVALID, "pairs and tensors are declared before the first data");
    pml_status status = remember_key(w, key, err);
    if (status != PML_OK)
        return status;
    put_string(w->pairs, key);
    put_bytes(w->pairs, kind, 4);
    return PML_OK;
}

pml_status pml_gguf_writer_u32(pml_gguf_writer *w, const char *key, uint32_t value, pml_error *err)
{
    pml_status status = begin_pair(w, key, PMLI_KIND_U32, err);
    if (status == PML_OK)
        put_bytes(w->pairs, value, 4);
    return status;
}

pml_status pml_gguf_writer_f32(pml_gguf_writer *w, const char *key, float value, pml_error *err)
{
    pml_status status = begin_pair(w, key, PMLI_KIND_F32, err);
    if (status == PML_OK)
        put_float(w->pairs, value);
    return status;
}

pml_status pml_gguf_writer_string(pml_gguf_writer *w, const char *key, const char *value,
                                  pml_error *err)
{
    pml_status status = begin_pair(w, key, PMLI_KIND_STRING, err);
    if (status == PML_OK)
        put_string(w->pairs, value);
    return status;
}

pml_status pml_gguf_writer_pairs(pml_gguf_writer *w, const pml_json *pairs, pml_error *err)
{
    if (w->header_written)
        return PML_FAIL(err, PML_INVALID, "pairs and tensors are declared before the first data");
    if (pairs == NULL || pml_json_kind_of(pairs) != PML_JSON_ARRAY)
        return PML_FAIL(err, PML_INVALID, "GGUF pairs must be an array of objects");
    for (size_t i = 0; i < pml_json_length(pairs); i++) {
        const pml_json *pair = pml_json_item(pairs, i);
        const char *key = pml_json_as_string(pml_json_field(pair, "key"));
        const char *type = pml_json_as_string(pml_json_field(pair, "type"));
        const struct kind_name *kind = kind_named(type);
        if (key == NULL || *key == '\0')
            return PML_FAIL(err, PML_INVALID, "GGUF pair %zu has no key", i);
        if (kind == NULL)
            return PML_FAIL(err, PML_INVALID, "the GGUF key '%s' has no known type", key);
        pml_status status = begin_pair(w, key, kind->array ? PMLI_KIND_ARRAY : kind->kind, err);
        if (status != PML_OK)
            return status;
        if (!put_values(w->pairs, kind, pml_json_field(pair, "value")))
            return PML_FAIL(err, PML_INVALID, "the value of the GGUF key '%s' is not of type %s",
                            key, type);
    }
    return PML_OK;
}

/* ---- tensors ---- */

static uint64_t padded(uint64_t bytes)
{
    return (bytes + PML_GGUF_ALIGN - 1) / PML_GGUF_ALIGN * PML_GGUF_ALIGN;
}

/* Bytes of a tensor; 0 when it is none that can be written. */
static uint64_t tensor_bytes(pml_gguf_type type, const uint64_t *size, int n_dims)
{
    if (n_dims < 1 || n_dims > PML_GGUF_MAX_DIMS)
        return 0;
    uint64_t bytes = pml_gguf_row_bytes(type, size[0]);
    for (int i = 1; i < n_dims; i++)
        if (__builtin_mul_overflow(bytes, size[i], &bytes))
            return 0;
    return bytes > (uint64_t)INT64_MAX / 2 ? 0 : bytes;
}

pml_status pml_gguf_writer_add(pml_gguf_writer *w, const char *name, pml_gguf_type type,
                               const uint64_t *size, int n_dims, pml_error *err)
{
    uint64_t bytes = tensor_bytes(type, size, n_dims), end;
    if (w->header_written)
        return PML_FAIL(err, PML_INVALID, "pairs and tensors are declared before the first data");
    if (bytes == 0 || __builtin_add_overflow(w->data, padded(bytes), &end) || end > INT64_MAX)
        return PML_FAIL(err, PML_INVALID, "GGUF tensor '%s' has a shape that cannot be written",
                        name);
    if (*name == '\0' || strlen(name) > 63)
        return PML_FAIL(err, PML_INVALID, "'%s' is no name for a GGUF tensor: 1 to 63 bytes", name);
    for (size_t i = 0; i < w->n_tensors; i++)
        if (strcmp(w->tensors[i].name, name) == 0)
            return PML_FAIL(err, PML_INVALID, "the GGUF tensor '%s' is there twice", name);
    declared *wider = reallocarray(w->tensors, w->n_tensors + 1, sizeof *wider);
    if (wider == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for GGUF tensor '%s'", name);
    w->tensors = wider;
    w->tensors[w->n_tensors] = (declared){strdup(name), bytes};
    if (w->tensors[w->n_tensors].name == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for GGUF tensor '%s'", name);
    w->n_tensors++;
    put_string(w->records, name);
    put_bytes(w->records, (uint64_t)n_dims, 4);
    for (int i = 0; i < n_dims; i++)
        put_bytes(w->records, size[i], 8);
    put_bytes(w->records, type, 4);
    put_bytes(w->records, w->data, 8);
    w->data = end;
    return PML_OK;
}

/* ---- data ---- */

static pml_status pad(pml_gguf_writer *w, uint64_t from, pml_error *err)
{
    static const char zeros[PML_GGUF_ALIGN];
    return pml_atomic_file_write(w->file, zeros, (size_t)(padded(from) - from), err);
}

static pml_status write_header(pml_gguf_writer *w, pml_error *err)
{
    unsigned char head[PMLI_GGUF_HEADER] = {'G', 'G', 'U', 'F', PMLI_GGUF_VERSION};
    bool whole = fflush(w->pairs) == 0 && fflush(w->records) == 0 && !ferror(w->pairs) &&
                 !ferror(w->records);
    if (!whole)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a GGUF header");
    for (int i = 0; i < 8; i++) {
        head[8 + i] = (unsigned char)((uint64_t)w->n_tensors >> (8 * i));
        head[16 + i] = (unsigned char)(w->n_pairs >> (8 * i));
    }
    pml_status status = pml_atomic_file_write(w->file, head, sizeof head, err);
    if (status == PML_OK)
        status = pml_atomic_file_write(w->file, w->pairs_text, w->pairs_size, err);
    if (status == PML_OK)
        status = pml_atomic_file_write(w->file, w->records_text, w->records_size, err);
    if (status == PML_OK)
        status = pad(w, sizeof head + w->pairs_size + w->records_size, err);
    w->header_written = status == PML_OK;
    return status;
}

pml_status pml_gguf_writer_write(pml_gguf_writer *w, const void *data, size_t bytes, pml_error *err)
{
    pml_status status = w->header_written ? PML_OK : write_header(w, err);
    const char *from = data;
    while (status == PML_OK && bytes > 0) {
        if (w->current == w->n_tensors)
            return PML_FAIL(err, PML_INVALID, "more data than the GGUF tensors declared");
        uint64_t whole = w->tensors[w->current].bytes, left = whole - w->written;
        size_t n = bytes < left ? bytes : (size_t)left;
        status = pml_atomic_file_write(w->file, from, n, err);
        from += n;
        bytes -= n;
        w->written += n;
        if (status != PML_OK || w->written < whole)
            continue;
        status = pad(w, whole, err);
        w->current++;
        w->written = 0;
    }
    return status;
}

pml_status pml_gguf_writer_finish(pml_gguf_writer *w, pml_error *err)
{
    if (w->current != w->n_tensors)
        return PML_FAIL(err, PML_INVALID, "the data of GGUF tensor '%s' was not written whole",
                        w->tensors[w->current].name);
    pml_status status = w->header_written ? PML_OK : write_header(w, err);
    return status == PML_OK ? pml_atomic_file_commit(w->file, err) : status;
}
