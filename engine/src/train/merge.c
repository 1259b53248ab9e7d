#include "pml/train/merge.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/path.h"
#include "pml/model/adapter.h"
#include "pml/model/convert.h"
#include "pml/model/nf4.h"
#include "pml_op/backend.h"

/* One tensor and where it comes from. */
typedef struct source {
    pml_merged merged;
    const pml_stored *original;
    const pml_stored *replacement; /* NULL: none */
    const pml_stored *a, *b;       /* NULL: no adapter */
    float scale;
    pml_nf4_stored nf4; /* codes NULL: not quantised */
} source;

struct pml_merge {
    pml_model_spec spec;
    pml_adapter_config adapter;
    pml_safetensors *model, *trained;
    source *sources;
    size_t n_sources;
    pml_device *device;
    pml_queue *queue;
    float *piece;      /* the product's rows */
    float *transposed; /* A^T of tensor `transposed_of` */
    size_t transposed_of, transposed_floats;
    float *opened; /* rows of a quantised weight, and the group's elements before them */
    size_t opened_floats;
    float *stored; /* what is read of a file, as it is there */
    size_t stored_floats;
    size_t used; /* tensors of the checkpoint that have found their place */
};

static const char peft_prefix[] = "base_model.model.";
static const char head_name[] = "lm_head.weight", table_name[] = "model.embed_tokens.weight";

/* ---- what comes from where ---- */

static const pml_stored *trained_named(const pml_merge *m, const char *prefix, const char *name,
                                       const char *suffix)
{
    char text[256];
    int n = snprintf(text, sizeof text, "%s%s%s", prefix, name, suffix);
    return n > 0 && (size_t)n < sizeof text ? pml_safetensors_find(m->trained, text) : NULL;
}

/* "model.layers.0.self_attn.q_proj.weight" has its adapter under "….q_proj.lora_A.weight". */
static void find_adapter(const pml_merge *m, source *s)
{
    static const char tail[] = ".weight";
    char module[224];
    size_t n = strlen(s->merged.name), cut = n - (sizeof tail - 1);
    if (n < sizeof tail || n >= sizeof module || strcmp(s->merged.name + cut, tail) != 0)
        return;
    memcpy(module, s->merged.name, cut);
    module[cut] = '\0';
    s->a = trained_named(m, peft_prefix, module, ".lora_A.weight");
    s->b = trained_named(m, peft_prefix, module, ".lora_B.weight");
    if (s->a != NULL && s->a->n_dims == 2 && s->a->shape[0] > 0)
        s->scale = (float)pml_lora_scale(pml_adapter_alpha(&m->adapter, module),
                                         (int32_t)s->a->shape[0], m->adapter.rslora);
}

static pml_status check_adapter(const source *s, pml_error *err)
{
    bool both = s->a != NULL && s->b != NULL;
    if (both && s->merged.n_dims == 2 && s->a->n_dims == 2 && s->b->n_dims == 2 &&
        s->a->shape[0] == s->b->shape[1] && s->a->shape[1] == s->merged.cols &&
        s->b->shape[0] == s->merged.rows && s->a->dtype == PML_F32 && s->b->dtype == PML_F32)
        return PML_OK;
    return PML_FAIL(err, PML_INVALID, "the adapter of '%s' does not fit its weight [%lld,%lld]",
                    s->merged.name, (long long)s->merged.rows, (long long)s->merged.cols);
}

static pml_status check_replacement(const source *s, pml_error *err)
{
    const pml_stored *r = s->replacement;
    int64_t elements = s->merged.rows * s->merged.cols;
    if (r->elements == elements && r->n_dims == s->merged.n_dims && r->dtype == PML_F32)
        return PML_OK;
    return PML_FAIL(err, PML_INVALID, "%s: '%s' does not have the shape that the model has",
                    r->path, r->name);
}

static pml_status describe_original(const pml_merge *m, source *s, pml_error *err)
{
    const pml_stored *original = s->original;
    pml_merged *merged = &s->merged;
    merged->dtype = original->dtype;
    merged->n_dims = original->n_dims;
    if (original->n_dims < 1 || original->n_dims > 2)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s: '%s' has %d dimensions", original->path,
                        original->name, original->n_dims);
    if (original->elements == 0)
        return PML_FAIL(err, PML_INVALID, "%s: '%s' is empty; take it out of the model's folder",
                        original->path, original->name);
    merged->rows = original->n_dims == 2 ? original->shape[0] : 1;
    merged->cols = original->n_dims == 2 ? original->shape[1] : original->elements;
    if (!pml_nf4_is_stored(m->model, original->name))
        return PML_OK;
    pml_status status = pml_nf4_original(m->model, original->name, &merged->rows, &merged->cols,
                                         &merged->dtype, err);
    return status == PML_OK
               ? pml_nf4_find(m->model, original->name, merged->rows, merged->cols, &s->nf4, err)
               : status;
}

/* What becomes the tensor of this name; `original` has the same one but for a head that was tied.
 */
static pml_status describe(pml_merge *m, const char *name, const pml_stored *original, source *s,
                           pml_error *err)
{
    *s = (source){.original = original, .merged.name = name};
    pml_status status = describe_original(m, s, err);
    if (status != PML_OK)
        return status;
    find_adapter(m, s);
    s->replacement = trained_named(m, "", name, "");
    if (s->replacement == NULL)
        s->replacement = trained_named(m, peft_prefix, name, "");
    s->merged.changed = s->a != NULL || s->b != NULL || s->replacement != NULL;
    m->used += (size_t)(s->a != NULL) + (s->b != NULL) + (s->replacement != NULL);
    if (s->a != NULL || s->b != NULL)
        status = check_adapter(s, err);
    if (status == PML_OK && s->replacement != NULL)
        status = check_replacement(s, err);
    return status;
}

/* Whether a tensor holds nothing of its own; `tied`: the head is the embedding in this folder. */
static bool repeats(const pml_merge *m, const char *name, bool tied)
{
    static const char angles[] = "rotary_emb.inv_freq";
    size_t n = strlen(name), tail = sizeof angles - 1;
    return (n >= tail && strcmp(name + n - tail, angles) == 0) ||
           (tied && strcmp(name, head_name) == 0) || pml_nf4_is_part(m->model, name);
}

static pml_status list_sources(pml_merge *m, pml_error *err)
{
    size_t count = pml_safetensors_count(m->model);
    bool tied = m->spec.tied_head;
    m->sources = calloc(count + 1, sizeof *m->sources);
    if (m->sources == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to merge %zu tensors", count);
    pml_status status = PML_OK;
    if (tied && pml_saved_unties(m->adapter.saved)) { /* in order of name it comes first */
        const pml_stored *table = pml_safetensors_find(m->model, table_name);
        if (table == NULL)
            return PML_FAIL(err, PML_CORRUPT, "the model's folder has no '%s'", table_name);
        m->spec.tied_head = false;
        status = describe(m, head_name, table, &m->sources[m->n_sources++], err);
    }
    for (size_t i = 0; status == PML_OK && i < count; i++) {
        const pml_stored *original = pml_safetensors_at(m->model, i);
        if (!repeats(m, original->name, tied))
            status = describe(m, original->name, original, &m->sources[m->n_sources++], err);
    }
    if (status == PML_OK && m->used != pml_safetensors_count(m->trained))
        return PML_FAIL(err, PML_INVALID,
                        "the checkpoint has %zu tensors, and only %zu of them have a place in the "
                        "model",
                        pml_safetensors_count(m->trained), m->used);
    return status;
}

/* ---- birth and end ---- */

static pml_status open_trained(pml_merge *m, const pml_train_config *config, const char *checkpoint,
                               pml_error *err)
{
    bool lora = config->method == PML_METHOD_LORA;
    char path[PML_PATH_MAX];
    pml_status status =
        pml_path_join(path, sizeof path, checkpoint,
                      lora ? "adapter_model.safetensors" : "model.safetensors", err);
    if (status == PML_OK)
        status = pml_safetensors_open(path, &m->trained, err);
    if (status == PML_OK && lora)
        status = pml_adapter_config_load(checkpoint, &m->adapter, err);
    return status;
}

static pml_status open_device(pml_merge *m, int threads, pml_error *err)
{
    const pml_backend *cpu = pml_backend_cpu();
    const pml_device_options options = {.threads = threads};
    pml_status status = cpu->open(&options, &m->device, err);
    return status == PML_OK ? cpu->queue_new(m->device, &m->queue, err) : status;
}

pml_status pml_merge_open(const pml_train_config *config, const char *checkpoint, int threads,
                          pml_merge **merge, pml_error *err)
{
    *merge = NULL;
    pml_merge *m = calloc(1, sizeof *m);
    if (m == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to merge");
    m->transposed_of = SIZE_MAX;
    pml_status status = pml_model_spec_load(config->model, &m->spec, err);
    if (status == PML_OK)
        status = pml_safetensors_open_folder(config->model, &m->model, err);
    if (status == PML_OK)
        status = open_trained(m, config, checkpoint, err);
    if (status == PML_OK)
        status = list_sources(m, err);
    if (status == PML_OK)
        status = open_device(m, threads, err);
    if (status != PML_OK) {
        pml_merge_close(&m);
        return status;
    }
    *merge = m;
    return PML_OK;
}

void pml_merge_close(pml_merge **merge)
{
    if (*merge == NULL)
        return;
    pml_merge *m = *merge;
    if (m->queue != NULL)
        pml_backend_cpu()->queue_destroy(&m->queue);
    if (m->device != NULL)
        pml_backend_cpu()->close(&m->device);
    pml_safetensors_close(&m->trained);
    pml_safetensors_close(&m->model);
    free(m->sources);
    free(m->piece);
    free(m->transposed);
    free(m->opened);
    free(m->stored);
    free(m);
    *merge = NULL;
}

size_t pml_merge_count(const pml_merge *m)
{
    return m->n_sources;
}

const pml_merged *pml_merge_at(const pml_merge *m, size_t index)
{
    return &m->sources[index].merged;
}

const pml_model_spec *pml_merge_spec(const pml_merge *m)
{
    return &m->spec;
}

int64_t pml_merge_step(const pml_merged *t)
{
    return t->cols >= PML_MERGE_PIECE ? 1 : PML_MERGE_PIECE / t->cols;
}

/* ---- rows ---- */

static bool grow(float **buffer, size_t *have, size_t floats)
{
    if (floats <= *have)
        return true;
    float *wider = realloc(*buffer, floats * sizeof *wider);
    if (wider == NULL)
        return false;
    *buffer = wider;
    *have = floats;
    return true;
}

/* Bytes of a file's tensor from `skip` on, until the next are read. */
static pml_status read_stored(pml_merge *m, const pml_stored *from, size_t skip, size_t bytes,
                              pml_error *err)
{
    if (!grow(&m->stored, &m->stored_floats, bytes / sizeof *m->stored + 1))
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to read '%s'", from->name);
    return pml_stored_read(from, skip, bytes, m->stored, err);
}

/* A^T [cols, r], kept while the same tensor's rows are asked for. */
static pml_status transpose(pml_merge *m, size_t index, pml_error *err)
{
    const source *s = &m->sources[index];
    if (m->transposed_of == index)
        return PML_OK;
    int64_t rank = s->a->shape[0], cols = s->a->shape[1];
    if (!grow(&m->transposed, &m->transposed_floats, (size_t)(rank * cols)))
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the adapter of '%s'", s->merged.name);
    pml_status status = read_stored(m, s->a, 0, (size_t)(rank * cols) * sizeof(float), err);
    if (status != PML_OK)
        return status;
    for (int64_t r = 0; r < rank; r++)
        for (int64_t c = 0; c < cols; c++)
            m->transposed[c * rank + r] = m->stored[r * cols + c];
    m->transposed_of = index;
    return PML_OK;
}

/* out += scale B A, for these rows. */
static pml_status add_product(pml_merge *m, size_t index, int64_t first, int64_t rows, float *out,
                              pml_error *err)
{
    const source *s = &m->sources[index];
    int64_t rank = s->a->shape[0], cols = s->merged.cols;
    int64_t most = pml_merge_step(&s->merged);
    pml_status status = transpose(m, index, err);
    if (status != PML_OK)
        return status;
    if (m->piece == NULL || most * cols > PML_MERGE_PIECE) {
        free(m->piece);
        size_t floats = (size_t)(most * cols > PML_MERGE_PIECE ? most * cols : PML_MERGE_PIECE);
        m->piece = malloc(floats * sizeof *m->piece);
        if (m->piece == NULL)
            return PML_FAIL(err, PML_NO_MEMORY, "no memory to merge '%s'", s->merged.name);
    }
    status = read_stored(m, s->b, (size_t)(first * rank) * sizeof(float),
                         (size_t)(rows * rank) * sizeof(float), err);
    if (status != PML_OK)
        return status;
    pml_op_args args = {.linear = {.x = pml_matrix(m->stored, rows, rank, PML_F32),
                                   .w = pml_matrix(m->transposed, cols, rank, PML_F32),
                                   .y = pml_matrix(m->piece, rows, cols, PML_F32),
                                   .parts = 1,
                                   .part_cols = {(int32_t)cols}}};
    status = pml_op_run(pml_backend_cpu(), PML_OP_linear, m->queue, &args, err);
    for (int64_t i = 0; status == PML_OK && i < rows * cols; i++)
        out[i] += s->scale * m->piece[i];
    return status;
}

/* Its parts for n elements from `from` on, a group's first; into `stored`:
 *
 *   nested | codes | absmax */
static pml_status read_quantised(pml_merge *m, const pml_nf4_stored *q, int64_t from, int64_t n,
                                 pml_nf4_dequantise_args *a, pml_error *err)
{
    const size_t nested = (size_t)pml_nf4_nested(n) * sizeof(float),
                 codes = (size_t)pml_nf4_codes(n), absmax = (size_t)pml_nf4_blocks(n);
    if (!grow(&m->stored, &m->stored_floats, (nested + codes + absmax) / sizeof *m->stored + 1))
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to read '%s'", q->codes->name);
    char *at = (char *)m->stored;
    pml_status status = pml_stored_read(
        q->nested, (size_t)(from / (PML_NF4_BLOCK * PML_NF4_NESTED)) * sizeof(float), nested, at,
        err);
    if (status == PML_OK)
        status = pml_stored_read(q->codes, (size_t)(from / 2), codes, at + nested, err);
    if (status == PML_OK)
        status = pml_stored_read(q->absmax, (size_t)(from / PML_NF4_BLOCK), absmax,
                                 at + nested + codes, err);
    a->nested = pml_vector(at, pml_nf4_nested(n), PML_F32);
    a->codes = pml_vector(at + nested, (int64_t)codes, PML_U8);
    a->absmax = pml_vector(at + nested + codes, (int64_t)absmax, PML_U8);
    return status;
}

/* Elements [begin, end) of a quantised weight. Scales are shared by groups of blocks, so it is
 * opened from the group's start on:
 *
 *      | group             | group …
 *              begin ####### end           opened, of which the first `lead` are thrown away
 *      |-lead-| */
static pml_status open_quantised(pml_merge *m, const source *s, int64_t begin, int64_t end,
                                 float *out, pml_error *err)
{
    const int64_t group = PML_NF4_BLOCK * PML_NF4_NESTED;
    int64_t lead = begin % group, from = begin - lead, n = end - from;
    if (!grow(&m->opened, &m->opened_floats, (size_t)n))
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to merge '%s'", s->merged.name);
    float offset = s->nf4.offset;
    pml_op_args args = {.nf4_dequantise = {.offset = pml_vector(&offset, 1, PML_F32),
                                           .y = pml_matrix(m->opened, 1, n, PML_F32),
                                           .parts = 1,
                                           .part_rows = {1}}};
    pml_status status = read_quantised(m, &s->nf4, from, n, &args.nf4_dequantise, err);
    if (status == PML_OK)
        status = pml_op_run(pml_backend_cpu(), PML_OP_nf4_dequantise, m->queue, &args, err);
    if (status == PML_OK)
        memcpy(out, m->opened + lead, (size_t)(end - begin) * sizeof *out);
    return status;
}

pml_status pml_merge_rows(pml_merge *m, size_t index, int64_t first, int64_t rows, float *out,
                          pml_error *err)
{
    const source *s = &m->sources[index];
    const pml_stored *from = s->replacement != NULL ? s->replacement : s->original;
    if (first < 0 || rows < 1 || rows > pml_merge_step(&s->merged) || first > s->merged.rows - rows)
        return PML_FAIL(err, PML_INTERNAL, "rows %lld to %lld of '%s' cannot be merged at once",
                        (long long)first, (long long)(first + rows), s->merged.name);
    int64_t cols = s->merged.cols;
    const size_t width = pml_dtype_size(from->dtype), n = (size_t)(rows * cols);
    pml_status status;
    if (s->nf4.codes != NULL && s->replacement == NULL) {
        status = open_quantised(m, s, first * cols, (first + rows) * cols, out, err);
    } else {
        status = read_stored(m, from, (size_t)(first * cols) * width, n * width, err);
        if (status == PML_OK)
            status = pml_convert_to_f32(m->stored, from->dtype, n, out, err);
    }
    if (status != PML_OK)
        return pml_error_prefix(err, "%s: '%s'", from->path, from->name);
    return s->a != NULL ? add_product(m, index, first, rows, out, err) : PML_OK;
}

pml_status pml_merge_round(pml_merge *m, const float *from, size_t n, pml_dtype dtype, void *to,
                           pml_error *err)
{
    pml_op_args args = {.copy = {.x = pml_vector((void *)(uintptr_t)from, (int64_t)n, PML_F32),
                                 .y = pml_vector(to, (int64_t)n, dtype)}};
    return pml_op_run(pml_backend_cpu(), PML_OP_copy, m->queue, &args, err);
}
