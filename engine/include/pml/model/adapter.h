/* Adapter: a PEFT LoRA folder, adapter_config.json and adapter_model.safetensors.
 *
 *   base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [r, in]
 *   base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [out, r]
 *
 * y = x W^T + (lora_alpha / r) (x A^T) B^T.  Hu et al., LoRA, 2021.
 *
 * and, with modules_to_save, parts of the model that are trained whole:
 *
 *   base_model.model.lm_head.weight                                  [vocab, hidden] */
#ifndef PML_MODEL_ADAPTER_H
#define PML_MODEL_ADAPTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/model/safetensors.h"
#include "pml/model/spec.h"

/* The seven projections of a layer that an adapter can sit on, as bits. */
typedef enum pml_target {
    PML_TARGET_Q = 1 << 0,
    PML_TARGET_K = 1 << 1,
    PML_TARGET_V = 1 << 2,
    PML_TARGET_O = 1 << 3,
    PML_TARGET_GATE = 1 << 4,
    PML_TARGET_UP = 1 << 5,
    PML_TARGET_DOWN = 1 << 6,
    PML_TARGET_ALL_LINEAR = 0x7f
} pml_target;

/* Parts of the model that an adapter may hold whole and train beside its matrices
 * (modules_to_save), as bits; the norms of all layers. In a model whose head is tied they are no
 * longer tied: each that is trained has a tensor of its own, as PEFT makes one. */
typedef enum pml_saved {
    PML_SAVED_EMBED = 1 << 0,      /* embed_tokens */
    PML_SAVED_HEAD = 1 << 1,       /* lm_head */
    PML_SAVED_NORM = 1 << 2,       /* norm, the last one */
    PML_SAVED_INPUT_NORM = 1 << 3, /* input_layernorm */
    PML_SAVED_POST_NORM = 1 << 4,  /* post_attention_layernorm */
    PML_SAVED_Q_NORM = 1 << 5,     /* q_norm, Qwen3's */
    PML_SAVED_K_NORM = 1 << 6
} pml_saved;

/* Whether a model whose head is tied has, with these trained whole, a head of its own. */
static inline bool pml_saved_unties(uint32_t saved)
{
    return (saved & (PML_SAVED_EMBED | PML_SAVED_HEAD)) != 0;
}

enum {
    PML_TARGET_COUNT = 7,
    PML_SAVED_COUNT = 7,
    PML_ADAPTER_NAME_MAX = 160,
    PML_ADAPTER_LAYERS = 1024,
    PML_ADAPTER_PATTERNS = 64
};

/* Of one projection in one layer; rank 0: it has none. */
typedef struct pml_lora_module {
    int32_t rank;
    double alpha;
} pml_lora_module;

/* An entry of rank_pattern or alpha_pattern. */
typedef struct pml_adapter_pattern {
    char key[120]; /* a module's name, or the end of its path: "q_proj", "layers.3.mlp.up_proj" */
    double value;
} pml_adapter_pattern;

typedef struct pml_adapter_config {
    int32_t rank;     /* r */
    double alpha;     /* lora_alpha */
    double dropout;   /* lora_dropout */
    bool rslora;      /* use_rslora: scale = alpha / sqrt(r) */
    uint32_t targets; /* pml_target bits; 0: a pattern or paths, and the tensors say which */
    uint32_t saved;   /* pml_saved bits */
    uint64_t layers[PML_ADAPTER_LAYERS / 64]; /* layers_to_transform as bits, if n_layers > 0 */
    int32_t n_layers;                         /* how many; 0: all */
    pml_adapter_pattern ranks[PML_ADAPTER_PATTERNS], alphas[PML_ADAPTER_PATTERNS];
    int32_t n_ranks, n_alphas;
    char base_name[512]; /* base_model_name_or_path, "" when unknown or longer */
} pml_adapter_config;

/* "q_proj", … for one bit; NULL for anything else. */
const char *pml_target_name(pml_target target);

/* "self_attn.q_proj", … : where it stands inside a layer. NULL for anything but one bit. */
const char *pml_target_module(pml_target target);

/* The bit of "q_proj", …; 0 when there is none. */
uint32_t pml_target_from_name(const char *name);

/* Shape of that projection's weight in this model: [out, in]. */
void pml_target_shape(const pml_model_spec *spec, pml_target target, int64_t *out, int64_t *in);

/* "embed_tokens", … for one bit, NULL for anything else; and its bit, 0 when there is none. */
const char *pml_saved_name(pml_saved saved);
uint32_t pml_saved_from_name(const char *name);

/* What multiplies the product of the two matrices. Kalajdzievski, "A rank stabilization scaling
 * factor for fine-tuning with LoRA", 2023. */
double pml_lora_scale(double alpha, int32_t rank, bool rslora);

/* The tensor's name in the file; matrix is 'A' or 'B'. Always fits into PML_ADAPTER_NAME_MAX. */
void pml_adapter_tensor_name(char *out, size_t capacity, int32_t layer, pml_target target,
                             char matrix);

/* Read folder/adapter_config.json. What would change the mathematics and is not supported
 * (use_dora, use_rslora, bias, rank_pattern, …) is PML_UNSUPPORTED by its name and value. */
pml_status pml_adapter_config_load(const char *folder, pml_adapter_config *config, pml_error *err);

/* The same from text; name is used in messages. */
pml_status pml_adapter_config_parse(const char *text, size_t size, const char *name,
                                    pml_adapter_config *config, pml_error *err);

/* Write `path` (…/adapter_config.json), atomically, so that PEFT loads the folder as it is.
 * modules [layers * PML_TARGET_COUNT] says what each projection has; NULL: all targets in all
 * layers (or those of config->layers) have rank and alpha. Where they differ, target_modules,
 * layers_to_transform, rank_pattern and alpha_pattern say so. */
pml_status pml_adapter_config_write(const char *path, const pml_adapter_config *config,
                                    const pml_lora_module *modules, int32_t layers, pml_error *err);

/* alpha of the module at that path ("model.layers.3.mlp.up_proj"), by alpha_pattern. */
double pml_adapter_alpha(const pml_adapter_config *config, const char *path);

/* What one projection has, by an adapter's config and the tensors beside it. */
pml_lora_module pml_adapter_module(const pml_adapter_config *config, const pml_safetensors *tensors,
                                   int32_t layer, pml_target target);

/* Read a folder whole: its config, and its tensors, of which each that the config promises is there
 * with the shape that spec asks for, and none is left over. The caller closes *tensors. */
pml_status pml_adapter_open(const char *folder, const pml_model_spec *spec,
                            pml_adapter_config *config, pml_safetensors **tensors, pml_error *err);

#endif
