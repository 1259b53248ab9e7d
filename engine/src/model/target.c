/* The seven projections: names, places, shapes. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "pml/model/adapter.h"

static const struct {
    const char *module;
    const char *name;
} targets[PML_TARGET_COUNT] = {
    {"self_attn.q_proj", "q_proj"}, {"self_attn.k_proj", "k_proj"}, {"self_attn.v_proj", "v_proj"},
    {"self_attn.o_proj", "o_proj"}, {"mlp.gate_proj", "gate_proj"}, {"mlp.up_proj", "up_proj"},
    {"mlp.down_proj", "down_proj"},
};

/* Number of the one bit that is set, -1 for anything else. */
static int number(pml_target target)
{
    for (int i = 0; i < PML_TARGET_COUNT; i++)
        if ((uint32_t)target == 1U << i)
            return i;
    return -1;
}

const char *pml_target_name(pml_target target)
{
    int i = number(target);
    return i < 0 ? NULL : targets[i].name;
}

const char *pml_target_module(pml_target target)
{
    int i = number(target);
    return i < 0 ? NULL : targets[i].module;
}

uint32_t pml_target_from_name(const char *name)
{
    for (int i = 0; i < PML_TARGET_COUNT; i++)
        if (strcmp(targets[i].name, name) == 0)
            return 1U << i;
    return 0;
}

static const char *const saved_names[PML_SAVED_COUNT] = {
    "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm",
    "q_norm",       "k_norm"};

const char *pml_saved_name(pml_saved saved)
{
    for (int i = 0; i < PML_SAVED_COUNT; i++)
        if ((uint32_t)saved == 1U << i)
            return saved_names[i];
    return NULL;
}

uint32_t pml_saved_from_name(const char *name)
{
    for (int i = 0; i < PML_SAVED_COUNT; i++)
        if (strcmp(saved_names[i], name) == 0)
            return 1U << i;
    return 0;
}

double pml_lora_scale(double alpha, int32_t rank, bool rslora)
{
    return alpha / (rslora ? sqrt((double)rank) : (double)rank);
}

void pml_target_shape(const pml_model_spec *spec, pml_target target, int64_t *out, int64_t *in)
{
    int64_t hidden = spec->hidden, queries = (int64_t)spec->heads * spec->head_dim;
    int64_t keys = (int64_t)spec->kv_heads * spec->head_dim;
    *in = hidden;
    switch (target) {
    case PML_TARGET_Q:
        *out = queries;
        break;
    case PML_TARGET_K:
    case PML_TARGET_V:
        *out = keys;
        break;
    case PML_TARGET_O:
        *out = hidden;
        *in = queries;
        break;
    case PML_TARGET_DOWN:
        *out = hidden;
        *in = spec->intermediate;
        break;
    default: /* gate, up */
        *out = spec->intermediate;
        break;
    }
}

void pml_adapter_tensor_name(char *out, size_t capacity, int32_t layer, pml_target target,
                             char matrix)
{
    snprintf(out, capacity, "base_model.model.model.layers.%d.%s.lora_%c.weight", (int)layer,
             pml_target_module(target), matrix);
}
