/* From files to the arena: the model's weights, the adapter's start, the rope table. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/philox.h"
#include "pml/model/adapter.h"
#include "pml/model/convert.h"
#include "pml/model/nf4.h"
#include "pml/model/safetensors.h"
#include "stepper_impl.h"

enum { PIECE_FLOATS = 1 << 20 }; /* converted and uploaded at a time */

static char *place(const pml_stepper *s, const pml_parameter *p)
{
    const pml_tensor *t = &s->program->tensors[p->tensor];
    return (char *)pml_program_data(s->program, p->tensor, s->arena) +
           (size_t)(p->row * pml_tensor_pitch(t) + p->col) * pml_dtype_size(t->dtype);
}

/* Host memory in which numbers are converted, and compared: `piece` floats at a time as the file
 * has them (F64 at the widest), as float32, and in the dtype of their place. */
typedef struct buffers {
    char *stored;
    float *piece, *rounded;
} buffers;

/* As they are, where the file has the dtype that the arena has: rows of `row` elements from the
 * file to rows `pitch` elements apart. Under way when it returns, until `uploaded`. */
static pml_status upload_as_is(pml_stepper *s, char *to, int64_t pitch, const pml_stored *stored,
                               int64_t row, int64_t rows, pml_error *err)
{
    const size_t width = pml_dtype_size(stored->dtype);
    const pml_file_at from = pml_stored_at(stored, 0);
    return s->backend->upload_file(s->queue, to, (size_t)pitch * width, &from, (size_t)row * width,
                                   (size_t)rows, err);
}

/* A file's bytes may still be on their way to the device. */
static pml_status close_read(pml_stepper *s, pml_safetensors **file, pml_status status,
                             pml_error *err)
{
    pml_error late = PML_ERROR_INIT;
    pml_status waited = s->backend->sync(s->queue, status == PML_OK ? err : &late);
    pml_safetensors_close(file);
    return status == PML_OK ? waited : status;
}

static pml_status convert_piece(const buffers *b, const pml_stored *stored, size_t first, size_t n,
                                pml_dtype dtype, const void **made, pml_error *err)
{
    const size_t width = pml_dtype_size(stored->dtype);
    pml_status status = pml_stored_read(stored, first * width, n * width, b->stored, err);
    if (status == PML_OK)
        status = pml_convert_to_f32(b->stored, stored->dtype, n, b->piece, err);
    if (status == PML_OK && dtype != PML_F32)
        status = pml_convert_from_f32(b->piece, n, b->rounded, dtype, err);
    *made = dtype == PML_F32 ? b->piece : b->rounded;
    return status;
}

/* Elements [first, first + left) of a file's tensor, on the device when what comes next on the
 * queue looks for them. */
static pml_status upload_range(pml_stepper *s, char *to, pml_dtype dtype, const pml_stored *stored,
                               size_t first, size_t left, const buffers *b, pml_error *err)
{
    size_t width = pml_dtype_size(stored->dtype), wanted = pml_dtype_size(dtype);
    if (stored->dtype == dtype) {
        const pml_file_at from = pml_stored_at(stored, first * width);
        pml_status status =
            s->backend->upload_file(s->queue, to, left * width, &from, left * width, 1, err);
        return status == PML_OK ? s->backend->uploaded(s->queue, err) : status;
    }
    if (dtype == PML_BF16 &&
        s->config.dtype == PML_F32) /* what the spec found out, changed since */
        return PML_FAIL(err, PML_INVALID, "%s: tensor '%s' is %s in a model of BF16", stored->path,
                        stored->name, stored->dtype_name);
    if (width == 0)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s: tensor '%s' has dtype %s, not in this version",
                        stored->path, stored->name, stored->dtype_name);
    while (left > 0) {
        size_t n = left < PIECE_FLOATS ? left : PIECE_FLOATS;
        const void *made;
        pml_status status = convert_piece(b, stored, first, n, dtype, &made, err);
        if (status == PML_OK)
            status = s->backend->upload(s->queue, to, made, n * wanted, err);
        if (status == PML_OK)
            status = s->backend->sync(s->queue, err);
        if (status != PML_OK)
            return pml_error_prefix(err, "%s: '%s'", stored->path, stored->name);
        first += n;
        to += n * wanted;
        left -= n;
    }
    return PML_OK;
}

static pml_status upload_stored(pml_stepper *s, char *to, pml_dtype dtype, const pml_stored *stored,
                                const buffers *b, pml_error *err)
{
    return upload_range(s, to, dtype, stored, 0, (size_t)stored->elements, b, err);
}

/* The roomiest transient tensor: nothing lives there while weights are loaded. */
static char *stage_of(const pml_stepper *s, size_t *bytes)
{
    const pml_program *p = s->program;
    int32_t widest = -1;
    *bytes = 0;
    for (int32_t i = 0; i < p->n_tensors; i++) {
        const pml_tensor *t = &p->tensors[i];
        size_t size = (size_t)t->rows * (size_t)t->cols * pml_dtype_size(t->dtype);
        if (t->persistent || t->first < 0 || size <= *bytes)
            continue;
        *bytes = size;
        widest = i;
    }
    return widest < 0 ? NULL : pml_program_data(p, widest, s->arena);
}

/* What the device makes of a file's numbers itself, they are sent as they are. */
static bool device_reads(const pml_stepper *s, const pml_stored *stored)
{
    return stored->dtype < PML_DTYPE_COUNT && (s->backend->dtypes >> stored->dtype & 1) != 0;
}

/* To rows that are longer than the file's, and of another dtype. Through the stage, from which the
 * device spreads and converts them. */
static pml_status upload_rows(pml_stepper *s, const pml_parameter *p, const pml_stored *stored,
                              const buffers *b, pml_error *err)
{
    enum { MOST = 64 << 20 };
    const pml_tensor *t = &s->program->tensors[p->tensor];
    const pml_dtype dtype = device_reads(s, stored) ? stored->dtype : t->dtype;
    size_t room, row = (size_t)p->cols * pml_dtype_size(dtype);
    char *stage = stage_of(s, &room);
    room = room < MOST ? room : MOST;
    if (room < row)
        return PML_FAIL(err, PML_INTERNAL, "no room to load a row of '%s'", p->name);
    int64_t most = (int64_t)(room / row), pitch = pml_tensor_pitch(t);
    pml_status status = PML_OK;
    for (int64_t first = 0; status == PML_OK && first < p->rows; first += most) {
        int64_t rows = p->rows - first < most ? p->rows - first : most;
        char *to = place(s, p) + (size_t)(first * pitch) * pml_dtype_size(t->dtype);
        status = upload_range(s, stage, dtype, stored, (size_t)(first * p->cols),
                              (size_t)(rows * p->cols), b, err);
        pml_op_args args = {.copy = {pml_matrix(stage, rows, p->cols, dtype),
                                     {to, rows, p->cols, pitch, t->dtype}}};
        if (status == PML_OK)
            status = pml_op_run(s->backend, PML_OP_copy, s->queue, &args, err);
    }
    return status;
}

/* Rows may be longer in the arena than in the file: they end in zeros where a rank is not the
 * greatest of its stack, and weights may have a border. */
static pml_status upload_parameter(pml_stepper *s, const pml_parameter *p, const pml_stored *stored,
                                   const buffers *b, pml_error *err)
{
    const pml_tensor *t = &s->program->tensors[p->tensor];
    const int64_t rows = p->rank == 1 ? 1 : p->rows, pitch = pml_tensor_pitch(t);
    if (stored->dtype == t->dtype)
        return upload_as_is(s, place(s, p), pitch, stored, p->cols, rows, err);
    return p->rank == 1 || (p->cols == pitch && !device_reads(s, stored))
               ? upload_stored(s, place(s, p), t->dtype, stored, b, err)
               : upload_rows(s, p, stored, b, err);
}

/* Codes and scales: in the arena for good, or in the place to load where numbers are kept. */
typedef struct nf4_views {
    pml_view part[PML_NF4_TENSORS];
} nf4_views;

static nf4_views nf4_of(const pml_stepper *s, const pml_parameter *p)
{
    nf4_views v;
    size_t at[PML_NF4_TENSORS];
    int64_t n = p->rows * p->cols;
    const int64_t lengths[] = {pml_nf4_codes(n), pml_nf4_blocks(n), pml_nf4_nested(n), 1};
    pml_nf4_stage(n, at);
    for (int k = 0; k < PML_NF4_TENSORS; k++) {
        char *data =
            p->nf4_parts[k] < 0
                ? (char *)pml_program_data(s->program, s->program->loading, s->arena) + at[k]
                : pml_program_data(s->program, p->nf4_parts[k], s->arena);
        v.part[k] = pml_vector(data, lengths[k], k < PML_NF4_SCALES ? PML_U8 : PML_F32);
    }
    return v;
}

/* Of a weight whose numbers are kept: what its codes say, to its place. */
static pml_status unpack(pml_stepper *s, const pml_parameter *p, const nf4_views *v, pml_error *err)
{
    const pml_tensor *t = &s->program->tensors[p->tensor];
    pml_op_args args = {
        .nf4_dequantise = {v->part[PML_NF4_CODES],
                           v->part[PML_NF4_ABSMAX],
                           v->part[PML_NF4_SCALES],
                           v->part[PML_NF4_OFFSET],
                           {place(s, p), p->rows, p->cols, pml_tensor_pitch(t), t->dtype},
                           .parts = 1,
                           .part_rows = {(int32_t)p->rows}}};
    return pml_op_run(s->backend, PML_OP_nf4_dequantise, s->queue, &args, err);
}

/* Quantised already: its bytes as they are. */
static pml_status upload_nf4(pml_stepper *s, const pml_parameter *p, const pml_safetensors *file,
                             pml_error *err)
{
    pml_nf4_stored stored;
    pml_status status = pml_nf4_find(file, p->name, p->rows, p->cols, &stored, err);
    if (status != PML_OK)
        return status;
    const pml_stored *const parts[] = {stored.codes, stored.absmax, stored.nested};
    const nf4_views views = nf4_of(s, p);
    for (int k = 0; status == PML_OK && k < PML_NF4_OFFSET; k++) {
        const pml_file_at from = pml_stored_at(parts[k], 0);
        status = s->backend->upload_file(s->queue, views.part[k].data, parts[k]->bytes, &from,
                                         parts[k]->bytes, 1, err);
    }
    if (status == PML_OK)
        status = s->backend->upload(s->queue, views.part[PML_NF4_OFFSET].data, &stored.offset,
                                    sizeof stored.offset, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err); /* `stored` ends here */
    return status == PML_OK && p->tensor >= 0 ? unpack(s, p, &views, err) : status;
}

/* The op's results: x is its first operand either way, its workspace the last. */
static void nf4_results(const nf4_views *views, pml_nf4_quantise_args *a)
{
    a->codes = views->part[PML_NF4_CODES];
    a->absmax = views->part[PML_NF4_ABSMAX];
    a->nested = views->part[PML_NF4_SCALES];
    a->offset = views->part[PML_NF4_OFFSET];
    a->grid = PML_NF4_GRID;
}

static void fp8_results(const pml_stepper *s, const pml_parameter *p, pml_fp8_quantise_args *a)
{
    int64_t pitch = pml_tensor_pitch(&s->program->tensors[p->tensor]);
    a->codes = (pml_view){place(s, p), p->rows, p->cols, pitch, PML_U8};
    a->scale = pml_vector(pml_program_data(s->program, p->fp8_scale, s->arena), p->rows, PML_F32);
}

/* Codes that were just made, also turned round where that is kept. */
static pml_status turn(pml_stepper *s, const pml_parameter *p, const pml_view *codes,
                       pml_error *err)
{
    if (p->fp8_turned < 0)
        return PML_OK;
    const pml_tensor *t = &s->program->tensors[p->fp8_turned];
    char *at = pml_program_data(s->program, p->fp8_turned, s->arena);
    pml_op_args args = {
        .fp8_turn = {*codes, {at + p->row, p->cols, p->rows, pml_tensor_pitch(t), PML_U8}}};
    return pml_op_run(s->backend, PML_OP_fp8_turn, s->queue, &args, err);
}

/* Into the place that the plan keeps for it, and from there into its tensors, or through NF4's four
 * to the numbers that they stand for: no memory beyond the plan. As it is in the file where the
 * backend takes that, else as float32, which is the same number. */
static pml_status quantise(pml_stepper *s, const pml_parameter *p, const pml_stored *stored,
                           const buffers *b, pml_error *err)
{
    char *at = pml_program_data(s->program, s->program->loading, s->arena);
    bool as_is = device_reads(s, stored);
    pml_dtype dtype = as_is ? stored->dtype : PML_F32;
    pml_op op = p->nf4 ? PML_OP_nf4_quantise : PML_OP_fp8_quantise;
    nf4_views views = {0};
    pml_op_args args = {0};
    pml_op_views(&args)[0] = pml_matrix(at, p->rows, p->cols, dtype);
    if (p->nf4) {
        views = nf4_of(s, p);
        nf4_results(&views, &args.nf4_quantise);
    } else {
        fp8_results(s, p, &args.fp8_quantise);
    }
    size_t ws = s->backend->workspace(s->device, op, &args);
    char *end = at + s->program->tensors[s->program->loading].cols;
    if (ws > 0)
        pml_op_views(&args)[pml_op_describe(op)->n_views - 1] =
            pml_vector(end - ws, (int64_t)ws, PML_U8);
    pml_status status = upload_stored(s, at, dtype, stored, b, err);
    if (status == PML_OK)
        status = pml_op_run(s->backend, op, s->queue, &args, err);
    if (status == PML_OK && p->nf4 && p->tensor >= 0)
        status = unpack(s, p, &views, err);
    if (status == PML_OK && p->fp8)
        status = turn(s, p, &args.fp8_quantise.codes, err);
    return status;
}

static pml_status load_one(pml_stepper *s, const pml_parameter *p, const pml_safetensors *file,
                           const buffers *b, pml_error *err)
{
    const pml_stored *stored;
    if (p->nf4 && s->spec.nf4)
        return upload_nf4(s, p, file, err);
    if (pml_nf4_is_stored(file, p->name))
        return PML_FAIL(
            err, PML_INVALID, "'%s' is quantised in the model's folder: give %s", p->name,
            s->config.method == PML_METHOD_FULL ? "a folder with all its bits" : "quant=\"nf4\"");
    pml_status status = p->rank == 1
                            ? pml_safetensors_need(file, p->name, p->cols, 0, &stored, err)
                            : pml_safetensors_need(file, p->name, p->rows, p->cols, &stored, err);
    if (status != PML_OK)
        return status;
    return p->nf4 || p->fp8 ? quantise(s, p, stored, b, err)
                            : upload_parameter(s, p, stored, b, err);
}

/* What an adapter holds whole begins as it is in the model. */
static pml_status load_sources(pml_stepper *s, const pml_safetensors *file, const buffers *b,
                               pml_error *err)
{
    pml_status status = PML_OK;
    for (int32_t i = 0; status == PML_OK && i < s->program->n_parameters; i++) {
        const pml_parameter *p = &s->program->parameters[i];
        const pml_stored *stored;
        if (p->source[0] == '\0')
            continue;
        status = p->rank == 1
                     ? pml_safetensors_need(file, p->source, p->cols, 0, &stored, err)
                     : pml_safetensors_need(file, p->source, p->rows, p->cols, &stored, err);
        if (status == PML_OK)
            status = upload_parameter(s, p, stored, b, err);
    }
    return status;
}

/* All parameters of one kind from one file. */
static pml_status load_parameters(pml_stepper *s, const pml_safetensors *file, bool adapter,
                                  const buffers *b, pml_error *err)
{
    const pml_program *program = s->program;
    for (int32_t i = 0; i < program->n_parameters; i++) {
        const pml_parameter *p = &program->parameters[i];
        if (p->adapter != adapter)
            continue;
        pml_status status = pmli_go_on(s, err);
        if (status == PML_OK)
            status = load_one(s, p, file, b, err);
        if (status != PML_OK)
            return status;
        if (s->progress != NULL && i % 16 == 0)
            s->progress(s->user, adapter ? "loading the adapter" : "loading the model",
                        (double)i / program->n_parameters);
    }
    return PML_OK;
}

/* Tensors that some exporters write and that hold nothing of their own. */
static bool redundant(const pml_stepper *s, const char *name)
{
    static const char inv_freq[] = "rotary_emb.inv_freq";
    size_t n = strlen(name), tail = sizeof inv_freq - 1;
    if (n >= tail && strcmp(name + n - tail, inv_freq) == 0)
        return true;
    return s->spec.tied_head && strcmp(name, "lm_head.weight") == 0;
}

static pml_status refuse_extra(const pml_stepper *s, const pml_safetensors *file, pml_error *err)
{
    for (size_t i = 0; i < pml_safetensors_count(file); i++) {
        const pml_stored *stored = pml_safetensors_at(file, i);
        bool known = redundant(s, stored->name) || pml_nf4_is_part(file, stored->name);
        for (int32_t p = 0; !known && p < s->program->n_parameters; p++)
            known = strcmp(s->program->parameters[p].name, stored->name) == 0 ||
                    strcmp(s->program->parameters[p].source, stored->name) == 0;
        if (!known)
            return PML_FAIL(
                err, PML_UNSUPPORTED,
                "%s: tensor '%s' has no place in a %s model as config.json describes it",
                stored->path, stored->name, s->spec.family);
    }
    return PML_OK;
}

static pml_status same_bytes(const buffers *b, const pml_stored *x, const pml_stored *y, bool *same,
                             pml_error *err)
{
    static const size_t most = PIECE_FLOATS * sizeof(float);
    *same = x->bytes == y->bytes;
    for (size_t at = 0; *same && at < x->bytes; at += most) {
        size_t n = x->bytes - at < most ? x->bytes - at : most;
        pml_status status = pml_stored_read(x, at, n, b->stored, err);
        if (status == PML_OK)
            status = pml_stored_read(y, at, n, b->stored + most, err);
        if (status != PML_OK)
            return status;
        *same = memcmp(b->stored, b->stored + most, n) == 0;
    }
    return PML_OK;
}

static pml_status same_numbers(const buffers *b, const pml_stored *x, const pml_stored *y,
                               bool *same, pml_error *err)
{
    const size_t count = (size_t)x->elements;
    *same = x->elements == y->elements;
    for (size_t at = 0; *same && at < count; at += PIECE_FLOATS) {
        size_t n = count - at < PIECE_FLOATS ? count - at : PIECE_FLOATS;
        const void *made;
        pml_status status = convert_piece(b, x, at, n, PML_F32, &made, err);
        if (status != PML_OK)
            return pml_error_prefix(err, "%s: '%s'", x->path, x->name);
        memcpy(b->rounded, made, n * sizeof(float));
        status = convert_piece(b, y, at, n, PML_F32, &made, err);
        if (status != PML_OK)
            return pml_error_prefix(err, "%s: '%s'", y->path, y->name);
        *same = memcmp(b->rounded, made, n * sizeof(float)) == 0;
    }
    return PML_OK;
}

/* A tied head that the folder has beside the table is the table, though perhaps in another dtype,
 * or config.json is wrong: then transformers does not tie them, and who has the folder knows which
 * of the two is meant. */
static pml_status check_tied(const pml_stepper *s, const pml_safetensors *file, const buffers *b,
                             pml_error *err)
{
    const pml_stored *head = pml_safetensors_find(file, "lm_head.weight");
    const pml_stored *table = pml_safetensors_find(file, "model.embed_tokens.weight");
    if (!s->spec.tied_head || head == NULL || table == NULL)
        return PML_OK;
    bool same;
    pml_status status = head->dtype == table->dtype ? same_bytes(b, head, table, &same, err)
                                                    : same_numbers(b, head, table, &same, err);
    if (status != PML_OK || same)
        return status;
    return PML_FAIL(err, PML_INVALID,
                    "%s: lm_head.weight is not model.embed_tokens.weight, but config.json has "
                    "tie_word_embeddings = true; set it to false there to train this head, or take "
                    "the tensor out of the file",
                    head->path);
}

static pml_status load_model(pml_stepper *s, const buffers *b, pml_error *err)
{
    pml_safetensors *file = NULL;
    pml_status status = pml_safetensors_open_folder(s->config.model, &file, err);
    if (status == PML_OK)
        status = refuse_extra(s, file, err);
    if (status == PML_OK)
        status = check_tied(s, file, b, err);
    if (status == PML_OK)
        status = load_parameters(s, file, false, b, err);
    if (status == PML_OK)
        status = load_sources(s, file, b, err);
    return close_read(s, &file, status, err);
}

/* The folder must be the adapter that the configuration speaks of. */
static pml_status check_adapter(const pml_stepper *s, const pml_adapter_config *a,
                                const pml_safetensors *file, pml_error *err)
{
    const char *folder = s->config.lora_init;
    for (int32_t l = 0; l < s->spec.layers; l++)
        for (int i = 0; i < PML_TARGET_COUNT; i++) {
            pml_target target = (pml_target)(1U << i);
            pml_lora_module theirs = pml_adapter_module(a, file, l, target);
            pml_lora_module ours = pml_lora_of(&s->config, l, target);
            if ((theirs.rank == 0) != (ours.rank == 0))
                return PML_FAIL(err, PML_INVALID,
                                "%s has other target_modules than the run asks for (layer %d, %s)",
                                folder, l, pml_target_name(target));
            if (theirs.rank != ours.rank)
                return PML_FAIL(err, PML_INVALID,
                                "%s has r = %d, the run asks for %d (layer %d, %s)", folder,
                                theirs.rank, ours.rank, l, pml_target_name(target));
            if (ours.rank > 0 && theirs.alpha != ours.alpha)
                return PML_FAIL(err, PML_INVALID,
                                "%s has lora_alpha = %g, the run asks for %g (layer %d, %s)",
                                folder, theirs.alpha, ours.alpha, l, pml_target_name(target));
        }
    if (a->rslora != s->config.lora_rslora || a->saved != s->config.lora_saved)
        return PML_FAIL(err, PML_INVALID,
                        "%s has another use_rslora or modules_to_save than the run asks for",
                        folder);
    return PML_OK;
}

static pml_status load_adapter(pml_stepper *s, const buffers *b, pml_error *err)
{
    pml_adapter_config config;
    pml_safetensors *file = NULL;
    pml_status status = pml_adapter_open(s->config.lora_init, &s->spec, &config, &file, err);
    if (status == PML_OK)
        status = check_adapter(s, &config, file, err);
    if (status == PML_OK)
        status = load_parameters(s, file, true, b, err);
    return close_read(s, &file, status, err);
}

/* A as torch's Linear starts: kaiming_uniform with a = sqrt(5), which is U(-1/sqrt(in),
 * 1/sqrt(in)). B stays zero, so that the adapter begins as no change (Hu et al., LoRA, 2021,
 * section 4.1). */
static pml_status make_adapter(pml_stepper *s, float *piece, pml_error *err)
{
    for (int32_t i = 0; i < s->program->n_parameters; i++) {
        const pml_parameter *p = &s->program->parameters[i];
        if (!p->adapter || strstr(p->name, ".lora_A.") == NULL)
            continue;
        float bound = (float)(1.0 / sqrt((double)p->cols));
        int64_t count = p->rows * p->cols;
        for (int64_t done = 0; done < count;) {
            int64_t n = count - done < PIECE_FLOATS ? count - done : PIECE_FLOATS;
            pml_philox random = {{0}};
            for (int64_t e = 0; e < n; e++) {
                uint64_t index = (uint64_t)(p->at + done + e);
                if (e == 0 || index % 4 == 0) /* the words of the last four are used up */
                    random = pml_philox_at(s->config.seed, 0, PML_PURPOSE_LORA_INIT, index / 4);
                piece[e] = bound * (2.0F * pml_uniform(random.word[index % 4]) - 1.0F);
            }
            pml_status status =
                s->backend->upload(s->queue, place(s, p) + (size_t)done * sizeof *piece, piece,
                                   (size_t)n * sizeof *piece, err);
            if (status == PML_OK)
                status = s->backend->sync(s->queue, err);
            if (status != PML_OK)
                return status;
            done += n;
        }
    }
    return PML_OK;
}

/* What stands for zero among codes that have a sign (pmli_dynamic_map). */
enum { SIGNED_ZERO = 127 };

/* Gaps of the flat buffers and the moments begin at zero; and stay there, also after a restore,
 * which writes a block's largest magnitude but no codes of its gaps. */
static pml_status clear_flat(pml_stepper *s, pml_error *err)
{
    const pml_program *p = s->program;
    const int32_t buffers[] = {p->values,          p->exp_avg,       p->exp_avg_sq,
                               p->exp_avg_largest, p->exp_avg_codes, p->exp_avg_sq_largest,
                               p->exp_avg_sq_codes};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        if (buffers[i] < 0)
            continue;
        const pml_tensor *t = &p->tensors[buffers[i]];
        pml_op_args args = {0};
        args.fill.y = pml_vector(pml_program_data(p, buffers[i], s->arena), t->cols, t->dtype);
        args.fill.value = buffers[i] == p->exp_avg_codes ? SIGNED_ZERO : 0;
        pml_status status = pml_op_run(s->backend, PML_OP_fill, s->queue, &args, err);
        if (status != PML_OK)
            return status;
    }
    const pml_counts none = {0};
    return pmli_run_segment(s, PML_SEGMENT_CLEAR, &none, err);
}

pml_status pmli_round_values(pml_stepper *s, pml_error *err)
{
    const pml_program *p = s->program;
    if (p->rounded < 0)
        return PML_OK;
    pml_op_args args = {0};
    args.copy.x = pml_vector(pml_program_data(p, p->values, s->arena), p->trained_floats, PML_F32);
    args.copy.y = pml_vector(pml_program_data(p, p->rounded, s->arena), p->trained_floats,
                             p->tensors[p->rounded].dtype);
    return pml_op_run(s->backend, PML_OP_copy, s->queue, &args, err);
}

pml_status pmli_load(pml_stepper *s, bool weights, pml_error *err)
{
    enum { WIDEST = sizeof(double) };
    char *memory = malloc(PIECE_FLOATS * (WIDEST + 2 * sizeof(float)));
    if (memory == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory to load the model");
    float *piece = (float *)(memory + PIECE_FLOATS * WIDEST);
    const buffers b = {memory, piece, piece + PIECE_FLOATS};
    pml_status status = clear_flat(s, err);
    if (status == PML_OK)
        status = pmli_set_scale(s, err);
    if (status == PML_OK)
        status = pmli_rope_fit(s, s->spec.max_positions, err);
    if (status == PML_OK && weights)
        status = load_model(s, &b, err);
    if (status == PML_OK && s->config.method == PML_METHOD_LORA)
        status = s->config.lora_init[0] != '\0' ? load_adapter(s, &b, err)
                                                : make_adapter(s, b.piece, err);
    if (status == PML_OK)
        status = pmli_round_values(s, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    free(memory);
    return status;
}
