#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/train/gguf.h"

#define TRY(call)                                                                                  \
    do {                                                                                           \
        pml_status try_status = (call);                                                            \
        if (try_status != PML_OK)                                                                  \
            return try_status;                                                                     \
    } while (0)

typedef struct writing {
    pml_merge *merge;
    const pml_model_spec *spec;
    const pml_gguf_options *options;
    pml_gguf_result *result;
    pml_gguf_writer *out;
    float *piece, *ordered;
    unsigned char *packed;
} writing;

/* ---- names ---- */

static const char *const plain_names[][2] = {{"model.embed_tokens.weight", "token_embd.weight"},
                                             {"model.norm.weight", "output_norm.weight"},
                                             {"lm_head.weight", "output.weight"}};
static const char *const layer_names[][2] = {
    {"input_layernorm", "attn_norm"},    {"post_attention_layernorm", "ffn_norm"},
    {"self_attn.q_proj", "attn_q"},      {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},      {"self_attn.o_proj", "attn_output"},
    {"self_attn.q_norm", "attn_q_norm"}, {"self_attn.k_norm", "attn_k_norm"},
    {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"}};

pml_status pml_gguf_name(const char *name, char *out, size_t capacity, pml_error *err)
{
    for (size_t i = 0; i < sizeof plain_names / sizeof *plain_names; i++)
        if (strcmp(name, plain_names[i][0]) == 0) {
            snprintf(out, capacity, "%s", plain_names[i][1]);
            return PML_OK;
        }
    int layer = 0, end = 0;
    const char *dot = strrchr(name, '.');
    if (sscanf(name, "model.layers.%d.%n", &layer, &end) == 1 && end > 0 && dot > name + end) {
        size_t n = (size_t)(dot - (name + end));
        for (size_t i = 0; i < sizeof layer_names / sizeof *layer_names; i++)
            if (strlen(layer_names[i][0]) == n && memcmp(layer_names[i][0], name + end, n) == 0) {
                snprintf(out, capacity, "blk.%d.%s%s", layer, layer_names[i][1], dot);
                return PML_OK;
            }
    }
    return PML_FAIL(err, PML_UNSUPPORTED, "GGUF has no name for the tensor '%s'", name);
}

/* Mistral is Llama to llama.cpp. */
static const char *architecture(const pml_model_spec *spec)
{
    static const char *const names[][2] = {
        {"llama", "llama"}, {"mistral", "llama"}, {"qwen2", "qwen2"}, {"qwen3", "qwen3"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(spec->family, names[i][0]) == 0)
            return names[i][1];
    return NULL;
}

static bool is_llama(const pml_model_spec *spec)
{
    const char *name = architecture(spec);
    return name != NULL && strcmp(name, "llama") == 0;
}

bool pml_gguf_reorders(const pml_model_spec *spec, const char *name)
{
    return is_llama(spec) && (strstr(name, ".self_attn.q_proj.") != NULL ||
                              strstr(name, ".self_attn.k_proj.") != NULL);
}

/* ---- what the architecture needs to be told ---- */

static pml_status put_u32(writing *w, const char *key, int32_t value, pml_error *err)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", architecture(w->spec), key);
    return pml_gguf_writer_u32(w->out, name, (uint32_t)value, err);
}

static pml_status put_f32(writing *w, const char *key, double value, pml_error *err)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", architecture(w->spec), key);
    return pml_gguf_writer_f32(w->out, name, (float)value, err);
}

static pml_status put_scaling(writing *w, const char *type, pml_error *err)
{
    char name[96];
    snprintf(name, sizeof name, "%s.rope.scaling.type", architecture(w->spec));
    TRY(pml_gguf_writer_string(w->out, name, type, err));
    return put_f32(w, "rope.scaling.factor", w->spec->rope.factor, err);
}

static void note(writing *w, const char *text)
{
    char *notes = w->result->notes;
    size_t n = strlen(notes);
    snprintf(notes + n, sizeof w->result->notes - n, "%s%s", n > 0 ? "; " : "", text);
}

/* llama.cpp multiplies by 1 + 0.1 ln(factor) itself, and always takes whole dimensions. */
static pml_status put_yarn(writing *w, pml_error *err)
{
    const pml_rope_spec *rope = &w->spec->rope;
    double own = 1 + 0.1 * log(rope->factor);
    if (!rope->truncate)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "rope_scaling.truncate = false: llama.cpp's yarn has no such setting");
    TRY(put_scaling(w, "yarn", err));
    TRY(put_u32(w, "rope.scaling.original_context_length", rope->original_max_positions, err));
    if (fabs(rope->attention_factor / own - 1) > 1e-6)
        TRY(put_f32(w, "rope.scaling.attn_factor", rope->attention_factor / own, err));
    if (rope->beta_fast != 32 || rope->beta_slow != 1)
        note(w, "beta_fast and beta_slow of this yarn are in the file, but a program may put "
                "llama.cpp's 32 and 1 in their place");
    if (rope->beta_fast != 32)
        TRY(put_f32(w, "rope.scaling.yarn_beta_fast", rope->beta_fast, err));
    if (rope->beta_slow != 1)
        TRY(put_f32(w, "rope.scaling.yarn_beta_slow", rope->beta_slow, err));
    return PML_OK;
}

static pml_status put_rope(writing *w, pml_error *err)
{
    const pml_model_spec *spec = w->spec;
    TRY(put_u32(w, "rope.dimension_count", spec->head_dim, err));
    TRY(put_f32(w, "rope.freq_base", spec->rope.theta, err));
    switch (spec->rope.type) {
    case PML_ROPE_DEFAULT:
    case PML_ROPE_LLAMA3: /* a tensor of factors, rope_freqs.weight */
        return PML_OK;
    case PML_ROPE_LINEAR:
        return put_scaling(w, "linear", err);
    case PML_ROPE_YARN:
        return put_yarn(w, err);
    case PML_ROPE_DYNAMIC:
        note(w, "llama.cpp has no dynamic rope: beyond max_position_embeddings it differs");
        return PML_OK;
    }
    return PML_FAIL(err, PML_UNSUPPORTED, "GGUF export has no rope type %d", (int)spec->rope.type);
}

static pml_status check_spec(const pml_model_spec *spec, pml_error *err)
{
    if (architecture(spec) == NULL)
        return PML_FAIL(err, PML_UNSUPPORTED, "GGUF export has no architecture for model_type %s",
                        spec->family);
    if (!is_llama(spec) && (spec->o_bias || spec->mlp_bias))
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "llama.cpp's %s has no bias in o_proj or the MLP, this model has",
                        architecture(spec));
    return PML_OK;
}

static pml_status put_architecture(writing *w, pml_error *err)
{
    const pml_model_spec *s = w->spec;
    static const struct {
        pml_gguf_type type;
        uint32_t number;
    } file_types[] = {
        {PML_GGUF_F32, 0}, {PML_GGUF_F16, 1}, {PML_GGUF_Q8_0, 7}, {PML_GGUF_BF16, 32}};
    TRY(pml_gguf_writer_string(w->out, "general.architecture", architecture(s), err));
    for (size_t i = 0; i < sizeof file_types / sizeof *file_types; i++)
        if (file_types[i].type == w->options->type)
            TRY(pml_gguf_writer_u32(w->out, "general.file_type", file_types[i].number, err));
    TRY(pml_gguf_writer_u32(w->out, "general.quantization_version", 2, err));
    const struct {
        const char *key;
        int32_t value;
    } numbers[] = {{"vocab_size", s->vocab},
                   {"context_length", s->max_positions},
                   {"embedding_length", s->hidden},
                   {"block_count", s->layers},
                   {"feed_forward_length", s->intermediate},
                   {"attention.head_count", s->heads},
                   {"attention.head_count_kv", s->kv_heads},
                   {"attention.key_length", s->head_dim},
                   {"attention.value_length", s->head_dim}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        TRY(put_u32(w, numbers[i].key, numbers[i].value, err));
    TRY(put_f32(w, "attention.layer_norm_rms_epsilon", s->rms_eps, err));
    for (int32_t layer = 0; layer < s->layers; layer++)
        if (pml_layer_window(s, layer) > 0) {
            note(w, "llama.cpp attends to all tokens of such a model: beyond the sliding window it "
                    "differs");
            TRY(put_u32(w, "attention.sliding_window", s->window, err));
            break;
        }
    return put_rope(w, err);
}

/* ---- tensors ---- */

static pml_gguf_type type_of(writing *w, const pml_merged *t)
{
    if (t->n_dims == 1)
        return PML_GGUF_F32;
    bool whole = pml_gguf_row_bytes(w->options->type, (uint64_t)t->cols) > 0;
    return whole ? w->options->type : PML_GGUF_F16;
}

static pml_status declare(writing *w, const pml_merged *t, pml_error *err)
{
    char name[96];
    pml_status status = pml_gguf_name(t->name, name, sizeof name, err);
    const uint64_t size[2] = {(uint64_t)t->cols, (uint64_t)t->rows};
    pml_gguf_type type = type_of(w, t);
    w->result->not_quantised += t->n_dims == 2 && type != w->options->type;
    w->result->tensors++;
    w->result->parameters += t->rows * t->cols;
    return status == PML_OK ? pml_gguf_writer_add(w->out, name, type, size, t->n_dims, err)
                            : status;
}

/* Per 32 elements: a float16 scale, and each divided by it and rounded. */
static pml_status pack_q8(writing *w, const float *from, size_t n, pml_error *err)
{
    size_t blocks = n / PML_GGUF_Q8_BLOCK;
    float *scales = malloc(blocks * sizeof *scales);
    uint16_t *halves = malloc(blocks * sizeof *halves);
    pml_status status = scales == NULL || halves == NULL
                            ? PML_FAIL(err, PML_NO_MEMORY, "no memory to quantise")
                            : PML_OK;
    for (size_t b = 0; status == PML_OK && b < blocks; b++) {
        float top = 0;
        for (int i = 0; i < PML_GGUF_Q8_BLOCK; i++)
            top = fmaxf(top, fabsf(from[b * PML_GGUF_Q8_BLOCK + (size_t)i]));
        scales[b] = top / 127.0F;
    }
    if (status == PML_OK)
        status = pml_merge_round(w->merge, scales, blocks, PML_F16, halves, err);
    for (size_t b = 0; status == PML_OK && b < blocks; b++) {
        unsigned char *to = w->packed + b * PML_GGUF_Q8_BYTES;
        float inverse = scales[b] > 0 ? 1.0F / scales[b] : 0;
        to[0] = (unsigned char)(halves[b] & 0xFF);
        to[1] = (unsigned char)(halves[b] >> 8);
        for (int i = 0; i < PML_GGUF_Q8_BLOCK; i++)
            to[2 + i] = (unsigned char)(signed char)roundf(from[b * PML_GGUF_Q8_BLOCK + (size_t)i] *
                                                           inverse);
    }
    free(scales);
    free(halves);
    return status;
}

static pml_status write_piece(writing *w, pml_gguf_type type, const float *from, size_t n,
                              pml_error *err)
{
    size_t bytes = (size_t)pml_gguf_row_bytes(type, n);
    pml_status status = PML_OK;
    const void *data = w->packed;
    if (type == PML_GGUF_F32)
        data = from;
    else if (type == PML_GGUF_Q8_0)
        status = pack_q8(w, from, n, err);
    else
        status = pml_merge_round(w->merge, from, n, type == PML_GGUF_F16 ? PML_F16 : PML_BF16,
                                 w->packed, err);
    w->result->bytes += bytes;
    return status == PML_OK ? pml_gguf_writer_write(w->out, data, bytes, err) : status;
}

/* Heads of hd rows: row 2i + j of each comes from its row i + j hd/2. */
static void reorder(const float *from, int64_t rows, int64_t width, int64_t hd, float *to)
{
    for (int64_t r = 0; r < rows; r++) {
        int64_t in = r % hd, source = r - in + in / 2 + in % 2 * (hd / 2);
        memcpy(to + r * width, from + source * width, (size_t)width * sizeof *to);
    }
}

static pml_status write_tensor(writing *w, size_t index, pml_error *err)
{
    const pml_merged *t = pml_merge_at(w->merge, index);
    bool reordered = pml_gguf_reorders(w->spec, t->name);
    int64_t hd = w->spec->head_dim, step = pml_merge_step(t);
    if (reordered && t->n_dims == 2)
        step -= step % hd; /* whole heads */
    if (step < 1)
        return PML_FAIL(err, PML_UNSUPPORTED, "a head of '%s' is more than can be held at once",
                        t->name);
    for (int64_t first = 0; first < t->rows; first += step) {
        int64_t rows = t->rows - first < step ? t->rows - first : step;
        const float *data = w->piece;
        if (w->options->enough != NULL && w->options->enough(w->options->asked))
            return PML_FAIL(err, PML_TIMEOUT, "nobody waits for the GGUF any more");
        TRY(pml_merge_rows(w->merge, index, first, rows, w->piece, err));
        if (reordered) {
            bool vector = t->n_dims == 1;
            reorder(w->piece, vector ? t->cols : rows, vector ? 1 : t->cols, hd, w->ordered);
            data = w->ordered;
        }
        TRY(write_piece(w, type_of(w, t), data, (size_t)(rows * t->cols), err));
    }
    return PML_OK;
}

/* What llama.cpp divides each frequency by. */
static pml_status write_rope_factors(writing *w, pml_error *err)
{
    int32_t half = w->spec->head_dim / 2;
    pml_model_spec plain = *w->spec;
    plain.rope.type = PML_ROPE_DEFAULT;
    pml_rope_frequencies(w->spec, 0, w->piece);
    pml_rope_frequencies(&plain, 0, w->ordered);
    for (int32_t i = 0; i < half; i++)
        w->ordered[i] /= w->piece[i];
    w->result->bytes += (uint64_t)half * sizeof(float);
    return pml_gguf_writer_write(w->out, w->ordered, (size_t)half * sizeof(float), err);
}

static pml_status write_file(writing *w, pml_error *err)
{
    bool factors = w->spec->rope.type == PML_ROPE_LLAMA3;
    const uint64_t half = (uint64_t)w->spec->head_dim / 2;
    TRY(put_architecture(w, err));
    TRY(pml_gguf_writer_pairs(w->out, w->options->pairs, err));
    if (factors) {
        TRY(pml_gguf_writer_add(w->out, "rope_freqs.weight", PML_GGUF_F32, &half, 1, err));
        w->result->tensors++;
    }
    for (size_t i = 0; i < pml_merge_count(w->merge); i++)
        TRY(declare(w, pml_merge_at(w->merge, i), err));
    if (factors)
        TRY(write_rope_factors(w, err));
    for (size_t i = 0; i < pml_merge_count(w->merge); i++)
        TRY(write_tensor(w, i, err));
    return pml_gguf_writer_finish(w->out, err);
}

pml_status pml_gguf_export(pml_merge *merge, const char *path, const pml_gguf_options *options,
                           pml_gguf_result *result, pml_error *err)
{
    *result = (pml_gguf_result){0};
    size_t floats = PML_MERGE_PIECE;
    for (size_t i = 0; i < pml_merge_count(merge); i++) {
        size_t cols = (size_t)pml_merge_at(merge, i)->cols;
        floats = cols > floats ? cols : floats;
    }
    writing w = {
        .merge = merge, .spec = pml_merge_spec(merge), .options = options, .result = result};
    w.piece = malloc(floats * sizeof *w.piece);
    w.ordered = malloc(floats * sizeof *w.ordered);
    w.packed = malloc(floats * sizeof(uint16_t));
    pml_status status = w.piece == NULL || w.ordered == NULL || w.packed == NULL
                            ? PML_FAIL(err, PML_NO_MEMORY, "no memory to write %s", path)
                            : check_spec(w.spec, err);
    if (status == PML_OK)
        status = pml_gguf_writer_new(path, 0600, &w.out, err);
    if (status == PML_OK)
        status = write_file(&w, err);
    pml_gguf_writer_destroy(&w.out);
    free(w.piece);
    free(w.ordered);
    free(w.packed);
    return status;
}
