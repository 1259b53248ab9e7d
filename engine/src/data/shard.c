#include "pml/data/shard.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/path.h"
#include "pml/model/safetensors.h"

enum { NO_LABEL = -100, CHECKED_AT_ONCE = 1 << 14 };

struct pml_shard {
    pml_safetensors *file;
    const pml_stored *ids, *labels;
    int64_t *offsets; /* [rows + 1] */
    int64_t rows, tokens;
};

/* A vector of n elements (n < 0: any length) of dtype. */
static pml_status vector_of(const pml_safetensors *file, const char *path, const char *name,
                            pml_dtype dtype, int64_t n, const pml_stored **out, pml_error *err)
{
    const pml_stored *t = pml_safetensors_find(file, name);
    if (t == NULL)
        return PML_FAIL(err, PML_CORRUPT, "%s: a token shard without %s", path, name);
    if (t->dtype != dtype || t->n_dims != 1 || (n >= 0 && t->shape[0] != n))
        return PML_FAIL(err, PML_CORRUPT, "%s: %s is not a vector of %s of the right length", path,
                        name, pml_dtype_name(dtype));
    *out = t;
    return PML_OK;
}

static pml_status find_tensors(pml_shard *shard, const char *path, pml_error *err)
{
    const pml_stored *offsets = NULL;
    const char *format = pml_safetensors_metadata(shard->file, "format");
    if (format == NULL || strcmp(format, "pml-shard-1") != 0)
        return PML_FAIL(err, PML_CORRUPT,
                        "%s is not a token shard of this version (format %.40s, not pml-shard-1)",
                        path, format != NULL ? format : "none");
    pml_status status = vector_of(shard->file, path, "input_ids", PML_I32, -1, &shard->ids, err);
    if (status == PML_OK)
        status = vector_of(shard->file, path, "labels", PML_I32, shard->ids->elements,
                           &shard->labels, err);
    if (status == PML_OK)
        status = vector_of(shard->file, path, "offsets", PML_I64, -1, &offsets, err);
    if (status != PML_OK)
        return status;
    if (offsets->elements < 1)
        return PML_FAIL(err, PML_CORRUPT, "%s: offsets is empty", path);
    shard->tokens = shard->ids->elements;
    shard->rows = offsets->elements - 1;
    shard->offsets = malloc(offsets->bytes);
    if (shard->offsets == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the %lld rows of %s",
                        (long long)shard->rows, path);
    return pml_stored_read(offsets, 0, offsets->bytes, shard->offsets, err);
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

/* The row of a token. */
static int64_t row_of(const pml_shard *shard, int64_t token)
{
    int64_t row = 0;
    while (shard->offsets[row + 1] <= token)
        row++;
    return row;
}

static pml_status check_token(const pml_shard *shard, int64_t token, int32_t id, int32_t label,
                              int32_t vocab, const char *path, pml_error *err)
{
    const bool known = id >= 0 && id < vocab;
    if (known && (label == NO_LABEL || (label >= 0 && label < vocab)))
        return PML_OK;
    const int64_t row = row_of(shard, token), position = token - shard->offsets[row];
    if (!known)
        return PML_FAIL(err, PML_INVALID,
                        "%s: row %lld has token id %d at position %lld, the model's vocabulary "
                        "has %d; the data was tokenised for another model",
                        path, (long long)row, (int)id, (long long)position, (int)vocab);
    return PML_FAIL(err, PML_INVALID,
                    "%s: row %lld has label %d at position %lld; a label is a token id below "
                    "%d, or -100 for none",
                    path, (long long)row, (int)label, (long long)position, (int)vocab);
}

static pml_status check_tokens(const pml_shard *shard, int32_t vocab, const char *path,
                               pml_error *err)
{
    int32_t *ids = malloc(2 * CHECKED_AT_ONCE * sizeof *ids);
    if (ids == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to check %s", path);
    const int32_t *labels = ids + CHECKED_AT_ONCE;
    pml_status status = PML_OK;
    for (int64_t at = 0; status == PML_OK && at < shard->tokens; at += CHECKED_AT_ONCE) {
        int64_t left = shard->tokens - at, n = left < CHECKED_AT_ONCE ? left : CHECKED_AT_ONCE;
        status = pml_shard_read(shard, at, n, ids, ids + CHECKED_AT_ONCE, err);
        for (int64_t i = 0; status == PML_OK && i < n; i++)
            status = check_token(shard, at + i, ids[i], labels[i], vocab, path, err);
    }
    free(ids);
    return status;
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
        status = pml_hash_file(path, false, hash, err);
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
    if (status == PML_OK)
        status = check_tokens(s, vocab, path, err);
    if (status != PML_OK) {
        pml_shard_close(&s);
        return status;
    }
    *shard = s;
    return PML_OK;
}

void pml_shard_close(pml_shard **shard)
{
    if (*shard == NULL)
        return;
    pml_safetensors_close(&(*shard)->file);
    free((*shard)->offsets);
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

int32_t pml_shard_length(const pml_shard *shard, int64_t row)
{
    return (int32_t)(shard->offsets[row + 1] - shard->offsets[row]);
}

int64_t pml_shard_offset(const pml_shard *shard, int64_t row)
{
    return shard->offsets[row];
}

pml_status pml_shard_read(const pml_shard *shard, int64_t first, int64_t n, int32_t *ids,
                          int32_t *labels, pml_error *err)
{
    const size_t skip = (size_t)first * sizeof *ids, bytes = (size_t)n * sizeof *ids;
    pml_status status = PML_OK;
    if (ids != NULL)
        status = pml_stored_read(shard->ids, skip, bytes, ids, err);
    if (status == PML_OK && labels != NULL)
        status = pml_stored_read(shard->labels, skip, bytes, labels, err);
    return status;
}
