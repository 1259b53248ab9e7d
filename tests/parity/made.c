#include "made.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/philox.h"
#include "session.h"

enum { HIDDEN = 64, INSIDE = 128, HEADS = 4, KV_HEADS = 2, LAYERS = 2, VOCAB = 67, IN_A_LAYER = 9 };
enum { WIDEST = 128 }; /* of heads */

typedef struct shape {
    const char *name;
    int64_t rows, cols; /* cols 0: a norm's weight */
} shape;

static const shape outside[] = {{"model.embed_tokens.weight", VOCAB, HIDDEN},
                                {"model.norm.weight", HIDDEN, 0},
                                {"lm_head.weight", VOCAB, HIDDEN}};
enum { OUTSIDE = sizeof outside / sizeof *outside, ALL = OUTSIDE + LAYERS * IN_A_LAYER };

static shape shape_of(int i, int head_dim, char name[96])
{
    const int64_t q = (int64_t)HEADS * head_dim, kv = (int64_t)KV_HEADS * head_dim;
    const shape inside[IN_A_LAYER] = {
        {"input_layernorm", HIDDEN, 0},    {"self_attn.q_proj", q, HIDDEN},
        {"self_attn.k_proj", kv, HIDDEN},  {"self_attn.v_proj", kv, HIDDEN},
        {"self_attn.o_proj", HIDDEN, q},   {"post_attention_layernorm", HIDDEN, 0},
        {"mlp.gate_proj", INSIDE, HIDDEN}, {"mlp.up_proj", INSIDE, HIDDEN},
        {"mlp.down_proj", HIDDEN, INSIDE}};
    shape s = i < OUTSIDE ? outside[i] : inside[(i - OUTSIDE) % IN_A_LAYER];
    if (i < OUTSIDE)
        snprintf(name, 96, "%s", s.name);
    else
        snprintf(name, 96, "model.layers.%d.%s.weight", (i - OUTSIDE) / IN_A_LAYER, s.name);
    return s;
}

/* Norms are 1; all else is even in +-0.25, of the seed that is the tensor's number. */
static void draw(int tensor, const shape *s, float *to)
{
    int64_t n = s->rows * (s->cols > 0 ? s->cols : 1);
    for (int64_t i = 0; i < n; i++) {
        const pml_philox words = pml_philox_at((uint64_t)tensor, 0, 0, (uint64_t)i);
        to[i] = s->cols == 0 ? 1 : (pml_uniform(words.word[0]) - 0.5F) * 0.5F;
    }
}

void make_model_in_units(const char *folder, int head_dim)
{
    char path[PML_PATH_MAX], name[96], text[512];
    if (head_dim > WIDEST)
        abort();
    int length = snprintf(
        text, sizeof text,
        "{\"model_type\": \"llama\", \"hidden_size\": %d, \"intermediate_size\": %d, "
        "\"num_hidden_layers\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, "
        "\"head_dim\": %d, \"vocab_size\": %d, \"max_position_embeddings\": 64, \"rms_norm_eps\": "
        "1e-6, "
        "\"rope_theta\": 5000.0, \"hidden_act\": \"silu\", \"tie_word_embeddings\": false, "
        "\"bos_token_id\": 1, \"eos_token_id\": 2}",
        HIDDEN, INSIDE, LAYERS, HEADS, KV_HEADS, head_dim, VOCAB);
    snprintf(path, sizeof path, "%s/config.json", folder);
    MUST(pml_file_write(path, text, (size_t)length, 0600, err));
    pml_safetensors_writer *w = NULL;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    MUST(pml_safetensors_writer_new(path, 0600, &w, err));
    for (int i = 0; i < ALL; i++) {
        const shape s = shape_of(i, head_dim, name);
        const int64_t dims[] = {s.rows, s.cols};
        MUST(pml_safetensors_writer_add(w, name, PML_F32, dims, s.cols > 0 ? 2 : 1, err));
    }
    static float values[HEADS * WIDEST * HIDDEN]; /* the largest */
    for (int i = 0; i < ALL; i++) {
        const shape s = shape_of(i, head_dim, name);
        size_t n = (size_t)(s.rows * (s.cols > 0 ? s.cols : 1));
        draw(i, &s, values);
        MUST(pml_safetensors_writer_write(w, values, n * sizeof *values, err));
    }
    MUST(pml_safetensors_writer_finish(w, err));
    pml_safetensors_writer_destroy(&w);
}
