/* Training configuration: run.json as resolved by the Python side, in plain fields.
 * Names and meanings are Hugging Face's TrainingArguments and PEFT's LoraConfig.
 *
 * It stands here and not in pml/train/ because the plan reads it too, and plan may not look up at
 * train. What training does with it (schedule, check) is in pml/train/config.h. */
#ifndef PML_PLAN_CONFIG_H
#define PML_PLAN_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/base/view.h"
#include "pml/model/adapter.h"
#include "pml/plan/schedule.h"

typedef enum pml_method { PML_METHOD_LORA = 0, PML_METHOD_FULL } pml_method;
typedef enum pml_quant { PML_QUANT_NONE = 0, PML_QUANT_NF4, PML_QUANT_FP8 } pml_quant;
typedef enum pml_optimizer {
    PML_OPTIMIZER_ADAMW = 0,
    PML_OPTIMIZER_SGD,
    PML_OPTIMIZER_ADAMW_8BIT, /* moments of tensors of 4096 elements and more in 8 bits */
    PML_OPTIMIZER_ADAMW_AUTO  /* of the two AdamW's the one that the plan chooses */
} pml_optimizer;

enum { PML_PATH_MAX = 4096, PML_LORA_GROUPS = 64 };

/* Projections that share rank and alpha. */
typedef struct pml_lora_group {
    int32_t rank;
    double alpha;
    uint32_t targets;                         /* pml_target bits */
    uint64_t layers[PML_ADAPTER_LAYERS / 64]; /* bits */
} pml_lora_group;

typedef struct pml_train_config {
    char name[128];
    char model[PML_PATH_MAX];      /* model folder */
    char model_id[PML_PATH_MAX];   /* as the user gave it: a folder, or a name on the hub */
    char train_data[PML_PATH_MAX]; /* token shard */
    char eval_data[PML_PATH_MAX];  /* "" = none */
    char lora_init[PML_PATH_MAX];  /* PEFT adapter folder to start from, "" = fresh */

    pml_method method;
    pml_dtype dtype; /* of weights and activations; F32 on the CPU */
    pml_quant quant; /* of the frozen linear layers' weights; needs PML_METHOD_LORA */
    int32_t lora_rank;
    double lora_alpha; /* scale = alpha / rank */
    double lora_dropout;
    bool lora_rslora;      /* scale = alpha / sqrt(rank) */
    uint32_t lora_targets; /* pml_target bits: all that any layer has */
    uint32_t lora_saved;   /* pml_saved bits: trained whole beside the adapter */
    pml_lora_group lora_groups[PML_LORA_GROUPS];
    int32_t n_lora_groups; /* 0: lora_targets in every layer, with lora_rank and lora_alpha */

    int64_t max_steps; /* > 0; epochs have been turned into steps */
    double learning_rate;
    pml_schedule schedule;
    double warmup_ratio; /* of max_steps, where the schedule has no warmup_steps */
    pml_optimizer optimizer;
    double weight_decay, beta1, beta2, epsilon; /* betas and epsilon: of AdamW */
    double momentum, dampening;                 /* of SGD; no buffer without momentum */
    bool nesterov;
    double max_grad_norm; /* <= 0: no clipping */
    int32_t batch_size, accumulation, max_length;
    bool packing, shuffle, group_by_length, deterministic;
    uint64_t seed;
    int64_t eval_steps, save_steps; /* 0 = only at the end / on command */
    bool eval_epochs, save_epochs;  /* at each epoch's end too */
    bool save_best;                 /* where an evaluation is the best so far */
    bool load_best;                 /* the run ends with the weights of the best evaluation */
    int64_t early_patience;   /* evaluations without a better one that end the run, 0 = none */
    double early_threshold;   /* what counts as better for that */
    int32_t save_total_limit; /* 0 = keep all */
    size_t memory_limit;      /* bytes a device, 0 = what is free */
    bool no_offload;          /* activations wait nowhere but on the device */
    int32_t workers;          /* of this run, whose gradients are summed; 0 and 1: alone */
    bool restarts;            /* snapshots are kept in shared memory for a restart */
    int32_t threads;          /* per CPU worker, 0 = cores / CPU workers on this machine */
} pml_train_config;

/* What a projection has: of the first group that it is in, or of all; rank 0: nothing. */
pml_lora_module pml_lora_of(const pml_train_config *config, int32_t layer, pml_target target);

#endif
