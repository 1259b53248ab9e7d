#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/table.h"
#include "pml/json/json.h"
#include "pml/model/safetensors.h"

enum { DATA_ALIGNMENT = 64, HEADER_MAX = 100 * 1000 * 1000 };

typedef struct declared {
    char *name;
    pml_dtype dtype;
    int n_dims;
    int64_t shape[PML_STORED_MAX_DIMS];
    uint64_t begin, end;
} declared;

typedef struct pair {
    char *key, *value;
} pair;

struct pml_safetensors_writer {
    pml_atomic_file *file;
    declared *tensors;
    size_t n_tensors, tensors_capacity;
    pair *metadata;
    size_t n_metadata;
    uint64_t written; /* bytes of data so far */
    bool header_written;
};

pml_status pml_safetensors_writer_new(const char *path, unsigned mode,
                                      pml_safetensors_writer **writer, pml_error *err)
{
    pml_safetensors_writer *w = calloc(1, sizeof *w);
    if (w == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to write %s", path);
    pml_status status = pml_atomic_file_new(path, (mode_t)mode, &w->file, err);
    if (status != PML_OK) {
        pml_safetensors_writer_destroy(&w);
        return status;
    }
    *writer = w;
    return PML_OK;
}

void pml_safetensors_writer_destroy(pml_safetensors_writer **writer)
{
    pml_safetensors_writer *w = *writer;
    if (w == NULL)
        return;
    for (size_t i = 0; i < w->n_tensors; i++)
        free(w->tensors[i].name);
    for (size_t i = 0; i < w->n_metadata; i++) {
        free(w->metadata[i].key);
        free(w->metadata[i].value);
    }
    free(w->tensors);
    free(w->metadata);
    pml_atomic_file_destroy(&w->file);
    free(w);
    *writer = NULL;
}

static pml_status too_late(pml_error *err)
{
    return PML_FAIL(err, PML_INVALID, "tensors and metadata are declared before the first data");
}

pml_status pml_safetensors_writer_metadata(pml_safetensors_writer *writer, const char *key,
                                           const char *value, pml_error *err)
{
    if (writer->header_written)
        return too_late(err);
    pair *wider = reallocarray(writer->metadata, writer->n_metadata + 1, sizeof *writer->metadata);
    if (wider == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for metadata");
    writer->metadata = wider;
    pair *added = &wider[writer->n_metadata++];
    *added = (pair){strdup(key), strdup(value)};
    if (added->key == NULL || added->value == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for metadata");
    return PML_OK;
}

pml_status pml_safetensors_writer_add(pml_safetensors_writer *writer, const char *name,
                                      pml_dtype dtype, const int64_t *shape, int n_dims,
                                      pml_error *err)
{
    if (writer->header_written)
        return too_late(err);
    declared t = {.dtype = dtype, .n_dims = n_dims};
    uint64_t bytes = pml_dtype_size(dtype);
    if (bytes == 0 || n_dims < 0 || n_dims > PML_STORED_MAX_DIMS)
        return PML_FAIL(err, PML_INVALID, "tensor %s cannot be declared with %d dimensions of %s",
                        name, n_dims, pml_dtype_name(dtype));
    bool taken = strcmp(name, "__metadata__") == 0;
    for (size_t i = 0; i < writer->n_tensors && !taken; i++)
        taken = strcmp(writer->tensors[i].name, name) == 0;
    if (taken)
        return PML_FAIL(err, PML_INVALID, "the tensor name %s is taken", name);
    for (int i = 0; i < n_dims; i++) {
        t.shape[i] = shape[i];
        if (shape[i] < 0 || __builtin_mul_overflow(bytes, (uint64_t)shape[i], &bytes))
            return PML_FAIL(err, PML_INVALID, "tensor %s has an impossible shape", name);
    }
    if (writer->n_tensors > 0)
        t.begin = writer->tensors[writer->n_tensors - 1].end;
    if (__builtin_add_overflow(t.begin, bytes, &t.end) || t.end > INT64_MAX)
        return PML_FAIL(err, PML_INVALID, "tensor %s makes the file too large", name);

    declared *wider = pml_table_room(writer->tensors, &writer->tensors_capacity,
                                     writer->n_tensors + 1, sizeof *wider);
    if (wider == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to declare tensor %s", name);
    writer->tensors = wider;
    t.name = strdup(name);
    if (t.name == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to declare tensor %s", name);
    writer->tensors[writer->n_tensors++] = t;
    return PML_OK;
}

static void put_tensor(pml_json_writer *json, const declared *t)
{
    pml_json_begin_object(json, t->name);
    pml_json_put_string(json, "dtype", pml_dtype_name(t->dtype));
    pml_json_begin_array(json, "shape");
    for (int i = 0; i < t->n_dims; i++)
        pml_json_put_int(json, NULL, t->shape[i]);
    pml_json_end(json);
    pml_json_begin_array(json, "data_offsets");
    pml_json_put_int(json, NULL, (int64_t)t->begin);
    pml_json_put_int(json, NULL, (int64_t)t->end);
    pml_json_end(json);
    pml_json_end(json);
}

static pml_status print_header(const pml_safetensors_writer *writer, char **text, size_t *size,
                               pml_error *err)
{
    pml_json_writer *json = NULL;
    pml_status status = pml_json_writer_new(&json, err);
    if (status != PML_OK)
        return status;
    if (writer->n_metadata > 0) {
        pml_json_begin_object(json, "__metadata__");
        for (size_t i = 0; i < writer->n_metadata; i++)
            pml_json_put_string(json, writer->metadata[i].key, writer->metadata[i].value);
        pml_json_end(json);
    }
    for (size_t i = 0; i < writer->n_tensors; i++)
        put_tensor(json, &writer->tensors[i]);
    status = pml_json_writer_finish(json, 0, text, size, err);
    pml_json_writer_destroy(&json);
    return status;
}

static pml_status write_header(pml_safetensors_writer *writer, pml_error *err)
{
    char *text = NULL;
    size_t size = 0;
    pml_status status = print_header(writer, &text, &size, err);
    if (status != PML_OK)
        return status;

    size_t padding = (DATA_ALIGNMENT - (8 + size) % DATA_ALIGNMENT) % DATA_ALIGNMENT;
    unsigned char length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (unsigned char)((uint64_t)(size + padding) >> (8 * i));
    char spaces[DATA_ALIGNMENT];
    memset(spaces, ' ', sizeof spaces);

    if (size + padding > HEADER_MAX)
        status = PML_FAIL(err, PML_INVALID, "a header of %zu bytes is more than the format allows",
                          size);
    if (status == PML_OK)
        status = pml_atomic_file_write(writer->file, length, sizeof length, err);
    if (status == PML_OK)
        status = pml_atomic_file_write(writer->file, text, size, err);
    if (status == PML_OK)
        status = pml_atomic_file_write(writer->file, spaces, padding, err);
    writer->header_written = status == PML_OK;
    free(text);
    return status;
}

static uint64_t declared_bytes(const pml_safetensors_writer *writer)
{
    return writer->n_tensors > 0 ? writer->tensors[writer->n_tensors - 1].end : 0;
}

pml_status pml_safetensors_writer_write(pml_safetensors_writer *writer, const void *data,
                                        size_t bytes, pml_error *err)
{
    if (bytes > declared_bytes(writer) - writer->written)
        return PML_FAIL(err, PML_INVALID, "more data than the %llu bytes declared",
                        (unsigned long long)declared_bytes(writer));
    pml_status status = writer->header_written ? PML_OK : write_header(writer, err);
    if (status == PML_OK)
        status = pml_atomic_file_write(writer->file, data, bytes, err);
    if (status == PML_OK)
        writer->written += bytes;
    return status;
}

pml_status pml_safetensors_writer_flush(pml_safetensors_writer *writer, pml_error *err)
{
    return pml_atomic_file_flush(writer->file, err);
}

pml_status pml_safetensors_writer_finish(pml_safetensors_writer *writer, pml_error *err)
{
    if (writer->written != declared_bytes(writer))
        return PML_FAIL(err, PML_INVALID, "%llu bytes of data were declared, %llu written",
                        (unsigned long long)declared_bytes(writer),
                        (unsigned long long)writer->written);
    pml_status status = writer->header_written ? PML_OK : write_header(writer, err);
    if (status == PML_OK)
        status = pml_atomic_file_commit(writer->file, err);
    return status;
}
