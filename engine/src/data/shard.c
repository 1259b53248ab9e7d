#include "pml/data/shard.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/path.h"
#include "pml/model/safetensors.h"

enum { NO_LABEL = -100 };

struct pml_shard {
    pml_safetensors *file;
    const int32_t *ids, *labels;
    const int64_t *offsets;
    int64_t rows, tokens;
};

/* A vector of n elements (n < 0: any length) of dtype, aligned so that it can be read in place. */
static pml_status vector_of(const pml_safetensors *file, const char *path, const char *name,
                            pml_dtype dtype, int64_t n, const pml_stored **out, pml_error *err)
{
    const pml_stored *t = pml_safetensors_find(file, name);
    if (t == NULL)
        return PML_FAIL(err, PML_CORRUPT, "%s: a token shard without %s", path, name);
    if (t->dtype != dtype || t->n_dims != 1 || (n >= 0 && t->shape[0] != n))
        return PML_FAIL(err, PML_CORRUPT, "%s: %s is not a vector of %s of the right length", path,
                        name, pml_dtype_name(dtype));
    if ((uintptr_t)t->data % pml_dtype_size(dtype) != 0)
        return PML_FAIL(err, PML_CORRUPT, "%s: %s is not aligned", path, name);
    *out = t;
    return PML_OK;
}

static pml_status find_tensors(pml_shard *shard, const char *path, pml_error *err)
{
    const pml_stored *ids, *labels, *offsets;
    const char *format = pml_safetensors_metadata(shard->file, "format");
    if (format == NULL || strcmp(format, "pml-shard-1") != 0)
        return PML_FAIL(err, PML_CORRUPT,
                        "%s is not a token shard of this version (format %.40s, not pml-shard-1)",
                        path, format != NULL ? format : "none");
    pml_status status = vector_of(shard->file, path, "input_ids", PML_I32, -1, &ids, err);
    if (status == PML_OK)
        status = vector_of(shard->file, path, "labels", PML_I32, ids->elements, &labels, err);
    if (status == PML_OK)
        status = vector_of(shard->file, path, "offsets", PML_I64, -1, &offsets, err);
    if (status != PML_OK)
        return status;
    if (offsets->elements < 1)
        return PML_FAIL(err, PML_CORRUPT, "%s: offsets is empty", path);
    shard->ids = ids->data;
    shard->labels = labels->data;
    shard->offsets = offsets->data;
    shard->tokens = ids->elements;
    shard->rows = offsets->elements - 1;
    return PML_OK;
}

static pml_status check_offsets(const pml_shard *shard, const char *path, pml_error *err)
{
    const int64_t *at = shard->offsets;
    if (shard->rows == 0)
        return PML_FAIL(err, PML_INVALID, "%s: the data is empty, there is no row to learn from",
                        path);
    if (at[0] != 0 || at[shard->rows] != shard->tokens)
        return PML_FAIL(err, PML_CORRUPT, "%s: offsets do not span the tokens", path);
    for (int64_t row = 0; row < shard->rows; row++) {
        if (at[row + 1] == at[row])
            return PML_FAIL(err, PML_INVALID, "%s: row %lld has no tokens", path, (long long)row);
        if (at[row + 1] < at[row] || at[row + 1] > shard->tokens ||
            at[row + 1] - at[row] > INT32_MAX)
            return PML_FAIL(err, PML_CORRUPT, "%s: row %lld ends at token %lld of %lld", path,
                            (long long)row, (long long)at[row + 1], (long long)shard->tokens);
    }
    return PML_OK;
}

static pml_status check_row(const pml_shard *shard, int64_t row, int32_t vocab, const char *path,
                            pml_error *err)
{
    const int32_t *ids, *labels;
    int32_t n = pml_shard_row(shard, row, &ids, &labels);
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= vocab)
            return PML_FAIL(err, PML_INVALID,
                            "%s: row %lld has token id %d at position %d, the model's vocabulary "
                            "has %d; the data was tokenised for another model",
                            path, (long long)row, (int)ids[i], (int)i, (int)vocab);
        if (labels[i] != NO_LABEL && (labels[i] < 0 || labels[i] >= vocab))
            return PML_FAIL(err, PML_INVALID,
                            "%s: row %lld has label %d at position %d; a label is a token id below "
                            "%d, or -100 for none",
                            path, (long long)row, (int)labels[i], (int)i, (int)vocab);
    }
    return PML_OK;
}

pml_status pml_shard_verify(const char *path, pml_error *err)
{
    static const char again[] = "remove the shard, and it is made again from the data";
    char sum_path[4096], hex[PML_HASH_HEX];
    uint8_t hash[PML_HASH_BYTES];
    char *line = NULL;
    size_t size;
    int n = snprintf(sum_path, sizeof sum_path, "%s.b2sum", path);
    if (n < 0 || (size_t)n >= sizeof sum_path)
        return PML_FAIL(err, PML_INVALID, "the path %s is too long", path);
    pml_status status = pml_file_read(sum_path, 8192, false, &line, &size, err);
    if (status == PML_NOT_FOUND)
        return PML_FAIL(err, PML_CORRUPT, "%s is missing: %s", sum_path, again);
    if (status == PML_OK)
        status = pml_hash_file(path, hash, err);
    if (status == PML_OK) {
        pml_hash_hex(hash, sizeof hash, hex);
        if (size < PML_HASH_HEX - 1 || strncmp(line, hex, PML_HASH_HEX - 1) != 0)
            status =
                PML_FAIL(err, PML_CORRUPT, "%s is not what was written (%s does not match): %s",
                         path, pml_path_name(sum_path), again);
    }
    free(line);
    return status;
}

pml_status pml_shard_open(const char *path, int32_t vocab, pml_shard **shard, pml_error *err)
{
    pml_shard *s = calloc(1, sizeof *s);
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to open %s", path);
    pml_status status = pml_safetensors_open(path, &s->file, err);
    if (status == PML_OK)
        status = find_tensors(s, path, err);
    if (status == PML_OK)
        status = check_offsets(s, path, err);
    for (int64_t row = 0; status == PML_OK && row < s->rows; row++)
        status = check_row(s, row, vocab, path, err);
    if (status != PML_OK) {
        pml_shard_close(&s);
        return status;
    }
    *shard = s;
    return PML_OK;
}

void pml_shard_close(pml_shard **shard)
{
    if (*shard != NULL)
        pml_safetensors_close(&(*shard)->file);
    free(*shard);
    *shard = NULL;
}

int64_t pml_shard_rows(const pml_shard *shard)
{
    return shard->rows;
}

int64_t pml_shard_tokens(const pml_shard *shard)
{
    return shard->tokens;
}

int32_t pml_shard_row(const pml_shard *shard, int64_t row, const int32_t **ids,
                      const int32_t **labels)
{
    int64_t first = shard->offsets[row];
    *ids = shard->ids + first;
    *labels = shard->labels + first;
    return (int32_t)(shard->offsets[row + 1] - first);
}

int64_t pml_shard_offset(const pml_shard *shard, int64_t row)
{
    return shard->offsets[row];
}
