#include "pml/plan/config.h"

pml_lora_module pml_lora_of(const pml_train_config *config, int32_t layer, pml_target target)
{
    const pml_lora_module none = {0, 0};
    if (config->method != PML_METHOD_LORA || (config->lora_targets & (uint32_t)target) == 0)
        return none;
    if (config->n_lora_groups == 0)
        return (pml_lora_module){config->lora_rank, config->lora_alpha};
    for (int32_t i = 0; i < config->n_lora_groups; i++) {
        const pml_lora_group *group = &config->lora_groups[i];
        if ((group->targets & (uint32_t)target) != 0 &&
            (group->layers[layer / 64] >> (layer % 64) & 1))
            return (pml_lora_module){group->rank, group->alpha};
    }
    return none;
}
