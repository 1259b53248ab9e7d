/* Adapter: a PEFT LoRA folder, adapter_config.json and adapter_model.safetensors.
 *
 *   base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [r, in]
 *   base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [out, r]
 *
 * y = x W^T + (lora_alpha / r) (x A^T) B^T.  Hu et al., LoRA, 2021. */
#ifndef PML_MODEL_ADAPTER_H
#define PML_MODEL_ADAPTER_H

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

enum { PML_TARGET_COUNT = 7, PML_ADAPTER_NAME_MAX = 160 };

typedef struct pml_adapter_config {
    int32_t rank;        /* r */
    double alpha;        /* lora_alpha */
    double dropout;      /* lora_dropout */
    uint32_t targets;    /* pml_target bits */
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

/* The tensor's name in the file; matrix is 'A' or 'B'. Always fits into PML_ADAPTER_NAME_MAX. */
void pml_adapter_tensor_name(char *out, size_t capacity, int32_t layer, pml_target target,
                             char matrix);

/* Read folder/adapter_config.json. What would change the mathematics and is not supported
 * (use_dora, use_rslora, bias, rank_pattern, …) is PML_UNSUPPORTED by its name and value. */
pml_status pml_adapter_config_load(const char *folder, pml_adapter_config *config, pml_error *err);

/* The same from text; name is used in messages. */
pml_status pml_adapter_config_parse(const char *text, size_t size, const char *name,
                                    pml_adapter_config *config, pml_error *err);

/* Write `path` (…/adapter_config.json), atomically, so that PEFT loads the folder as it is. */
pml_status pml_adapter_config_write(const char *path, const pml_adapter_config *config,
                                    pml_error *err);

/* Read a folder whole: its config, and its tensors, of which each that the config promises is there
 * with the shape that spec asks for, and none is left over. The caller closes *tensors. */
pml_status pml_adapter_open(const char *folder, const pml_model_spec *spec,
                            pml_adapter_config *config, pml_safetensors **tensors, pml_error *err);

#endif
