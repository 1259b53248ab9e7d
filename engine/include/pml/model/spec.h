/* Model spec: what config.json says, as plain numbers. The one description of an architecture;
 * the step program is built from it for every backend, training and sampling alike. */
#ifndef PML_MODEL_SPEC_H
#define PML_MODEL_SPEC_H

#include <stdbool.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/base/view.h"

/* More than any model there is. */
enum { PML_LAYERS_MAX = 4096 };

typedef enum pml_rope_type {
    PML_ROPE_DEFAULT = 0,
    PML_ROPE_LINEAR,
    PML_ROPE_DYNAMIC,
    PML_ROPE_LLAMA3,
    PML_ROPE_YARN
} pml_rope_type;

typedef struct pml_rope_spec {
    pml_rope_type type;
    double theta;
    double factor;                            /* all but default */
    double low_freq_factor, high_freq_factor; /* llama3 */
    double beta_fast, beta_slow;    /* yarn: turns over the original length at which … */
    bool truncate;                  /* yarn: … the blend's ends are whole dimensions */
    double attention_factor;        /* yarn: cos and sin are multiplied by it */
    int32_t original_max_positions; /* llama3, yarn */
} pml_rope_spec;

typedef struct pml_model_spec {
    char family[24]; /* "llama", "mistral", "qwen2", "qwen3": config.json's model_type */
    int32_t vocab, hidden, layers, heads, kv_heads, head_dim, intermediate;
    int32_t max_positions;
    bool qkv_bias, o_bias, mlp_bias; /* Qwen2: qkv; Llama: attention_bias, mlp_bias */
    bool qk_norm;   /* Qwen3: queries and keys are normalised head by head before the rotation */
    bool tied_head; /* lm_head shares the embedding table */
    float rms_eps;
    pml_rope_spec rope;
    int32_t window;                      /* keys a query of a sliding layer sees, itself included */
    uint8_t sliding[PML_LAYERS_MAX / 8]; /* bit l: layer l slides */
    int32_t bos, pad;                    /* -1: none */
    int32_t eos[8], n_eos;               /* generation ends at any of them */
    bool nf4;        /* the folder's linear layers are bitsandbytes' NF4 (pml/model/nf4.h) */
    pml_dtype dtype; /* that the folder's matrices are stored in: config.json's word where only that
                        file is there; F32 where any of them has more than it says */
} pml_model_spec;

/* Read folder/config.json (and generation_config.json's eos ids when there). A missing field is
 * PML_INVALID by its name; a field that changes the mathematics and is not supported is
 * PML_UNSUPPORTED by its name and value; unknown fields that change nothing are ignored. */
pml_status pml_model_spec_load(const char *folder, pml_model_spec *spec, pml_error *err);

/* Same, from config.json's text (length bytes; name is used in messages). */
pml_status pml_model_spec_parse(const char *text, size_t length, const char *name,
                                pml_model_spec *spec, pml_error *err);

/* Keys a query of that layer sees, itself included; 0: all before it. */
int32_t pml_layer_window(const pml_model_spec *spec, int32_t layer);

/* The head_dim / 2 frequencies of the rotation, scaled as rope says; length: see pml_rope_table. */
void pml_rope_frequencies(const pml_model_spec *spec, int32_t length, float *out);

/* cos|sin table for positions 0..positions-1: out [positions, head_dim] float32, cos in the first
 * half of each row, sin in the second. As transformers computes it (inv_freq in float32).
 * length: tokens that dynamic rope stretches for, no effect up to max_positions or on others. */
void pml_rope_table(const pml_model_spec *spec, int32_t positions, int32_t length, float *out);

/* Parameters of the whole model (embeddings counted once when tied). */
int64_t pml_model_parameters(const pml_model_spec *spec);

#endif
