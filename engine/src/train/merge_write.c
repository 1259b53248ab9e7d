/* A merged model as safetensors, in as many files as its size asks for. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/path.h"
#include "pml/json/json.h"
#include "pml/model/convert.h"
#include "pml/train/merge.h"

typedef struct writing {
    pml_merge *merge;
    const pml_merge_options *options;
    pml_merge_result *result;
    const char *folder;
    int *shard_of; /* by tensor; 0, 1, … */
    float *piece;
    void *rounded;
    uint64_t total;
} writing;

static pml_dtype dtype_of(const writing *w, const pml_merged *t)
{
    if (w->options->dtype != PML_DTYPE_COUNT)
        return w->options->dtype;
    return t->dtype == PML_F64 ? PML_F32 : t->dtype; /* a merge is float32, no more */
}

static uint64_t bytes_of(const writing *w, const pml_merged *t)
{
    return (uint64_t)(t->rows * t->cols) * pml_dtype_size(dtype_of(w, t));
}

/* In order of name, as many as fit into each file. */
static void deal(writing *w)
{
    uint64_t filled = 0;
    int shard = 0;
    for (size_t i = 0; i < pml_merge_count(w->merge); i++) {
        const pml_merged *t = pml_merge_at(w->merge, i);
        uint64_t bytes = bytes_of(w, t);
        if (filled > 0 && filled + bytes > w->options->shard_bytes) {
            shard++;
            filled = 0;
        }
        filled += bytes;
        w->total += bytes;
        w->shard_of[i] = shard;
        w->result->parameters += t->rows * t->cols;
    }
    w->result->files = shard + 1;
    w->result->tied_head = pml_merge_spec(w->merge)->tied_head;
}

static void name_file(const writing *w, int shard, char name[64])
{
    if (w->result->files == 1)
        snprintf(name, 64, "model.safetensors");
    else
        snprintf(name, 64, "model-%05d-of-%05d.safetensors", shard + 1, w->result->files);
}

/* How far rounding has moved what training changed. */
static void measure_rounding(writing *w, pml_dtype dtype, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, (const char *)w->rounded + 2 * i, sizeof bits);
        float stored = dtype == PML_BF16 ? pml_bf16_to_f32(bits) : pml_f16_to_f32(bits);
        double moved = fabs((double)stored - w->piece[i]);
        w->result->rounding = moved > w->result->rounding ? moved : w->result->rounding;
    }
}

static pml_status write_tensor(writing *w, size_t index, pml_safetensors_writer *out,
                               pml_error *err)
{
    const pml_merged *t = pml_merge_at(w->merge, index);
    pml_dtype dtype = dtype_of(w, t);
    pml_status status = PML_OK;
    for (int64_t first = 0; status == PML_OK && first < t->rows;) {
        int64_t left = t->rows - first, step = pml_merge_step(t), rows = left < step ? left : step;
        size_t n = (size_t)(rows * t->cols);
        const void *data = w->piece;
        if (w->options->enough != NULL && w->options->enough(w->options->asked))
            return PML_FAIL(err, PML_TIMEOUT, "nobody waits for the merged weights any more");
        status = pml_merge_rows(w->merge, index, first, rows, w->piece, err);
        if (status == PML_OK && dtype != PML_F32) {
            status = pml_merge_round(w->merge, w->piece, n, dtype, w->rounded, err);
            data = w->rounded;
            if (t->changed && status == PML_OK)
                measure_rounding(w, dtype, n);
        }
        if (status == PML_OK)
            status = pml_safetensors_writer_write(out, data, n * pml_dtype_size(dtype), err);
        first += rows;
        w->result->bytes += n * pml_dtype_size(dtype);
    }
    return status;
}

static pml_status write_shard(writing *w, int shard, pml_error *err)
{
    char path[PML_PATH_MAX], name[64];
    pml_safetensors_writer *out = NULL;
    name_file(w, shard, name);
    pml_status status = pml_path_join(path, sizeof path, w->folder, name, err);
    if (status == PML_OK)
        status = pml_safetensors_writer_new(path, 0600, &out, err);
    if (status == PML_OK)
        status = pml_safetensors_writer_metadata(out, "format", "pt", err);
    for (size_t i = 0; status == PML_OK && i < pml_merge_count(w->merge); i++) {
        const pml_merged *t = pml_merge_at(w->merge, i);
        const int64_t shape[2] = {t->n_dims == 2 ? t->rows : t->cols, t->cols};
        if (w->shard_of[i] == shard)
            status =
                pml_safetensors_writer_add(out, t->name, dtype_of(w, t), shape, t->n_dims, err);
    }
    for (size_t i = 0; status == PML_OK && i < pml_merge_count(w->merge); i++)
        if (w->shard_of[i] == shard)
            status = write_tensor(w, i, out, err);
    if (status == PML_OK)
        status = pml_safetensors_writer_finish(out, err);
    pml_safetensors_writer_destroy(&out);
    return status;
}

static pml_status write_index(const writing *w, pml_error *err)
{
    char path[PML_PATH_MAX], name[64];
    char *text = NULL;
    size_t size;
    pml_json_writer *json = NULL;
    pml_status status =
        pml_path_join(path, sizeof path, w->folder, "model.safetensors.index.json", err);
    if (status == PML_OK)
        status = pml_json_writer_new(&json, err);
    if (status != PML_OK)
        return status;
    pml_json_begin_object(json, "metadata");
    pml_json_put_int(json, "total_size", (int64_t)w->total);
    pml_json_put_int(json, "total_parameters", w->result->parameters);
    pml_json_end(json);
    pml_json_begin_object(json, "weight_map");
    for (size_t i = 0; i < pml_merge_count(w->merge); i++) {
        name_file(w, w->shard_of[i], name);
        pml_json_put_string(json, pml_merge_at(w->merge, i)->name, name);
    }
    pml_json_end(json);
    status = pml_json_writer_finish(json, 2, &text, &size, err);
    if (status == PML_OK)
        status = pml_file_write(path, text, size, 0600, err);
    free(text);
    pml_json_writer_destroy(&json);
    return status;
}

static size_t widest_piece(const pml_merge *m)
{
    size_t floats = PML_MERGE_PIECE;
    for (size_t i = 0; i < pml_merge_count(m); i++) {
        const pml_merged *t = pml_merge_at(m, i);
        floats = (size_t)t->cols > floats ? (size_t)t->cols : floats;
    }
    return floats;
}

pml_status pml_merge_write(pml_merge *merge, const char *folder, const pml_merge_options *options,
                           pml_merge_result *result, pml_error *err)
{
    *result = (pml_merge_result){0};
    size_t count = pml_merge_count(merge), floats = widest_piece(merge);
    writing w = {.merge = merge, .options = options, .result = result, .folder = folder};
    w.shard_of = calloc(count > 0 ? count : 1, sizeof *w.shard_of);
    w.piece = malloc(floats * sizeof *w.piece);
    w.rounded = malloc(floats * sizeof(uint16_t));
    pml_status status = PML_OK;
    if (w.shard_of == NULL || w.piece == NULL || w.rounded == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory to merge %zu tensors", count);
    else
        deal(&w);
    for (int shard = 0; status == PML_OK && shard < result->files; shard++)
        status = write_shard(&w, shard, err);
    if (status == PML_OK && result->files > 1)
        status = write_index(&w, err);
    free(w.shard_of);
    free(w.piece);
    free(w.rounded);
    return status;
}
