/* Ranges and combinations of a training configuration, first offence by its name. */
#include <math.h>
#include <stddef.h>

#include "pml/train/config.h"

typedef struct range_of_double {
    const char *name;
    size_t offset;
    double low, high; /* low <= value, value < high */
} range_of_double;

typedef struct range_of_int {
    const char *name;
    size_t offset;
    int64_t low;
    bool wide; /* int64_t, else int32_t */
} range_of_int;

#define DOUBLE(field, name, low, high)                                                             \
    {                                                                                              \
        name, offsetof(pml_train_config, field), low, high                                         \
    }
static const range_of_double doubles[] = {
    DOUBLE(learning_rate, "learning_rate", 0, INFINITY),
    DOUBLE(weight_decay, "weight_decay", 0, INFINITY),
    DOUBLE(beta1, "adam_beta1", 0, 1),
    DOUBLE(beta2, "adam_beta2", 0, 1),
    DOUBLE(epsilon, "adam_epsilon", 0, INFINITY),
    DOUBLE(lora_dropout, "lora_dropout", 0, 1),
    DOUBLE(momentum, "optim_args: momentum", 0, 1),
    DOUBLE(dampening, "optim_args: dampening", 0, 1),
    DOUBLE(early_threshold, "early_stopping_threshold", 0, INFINITY),
    DOUBLE(warmup_ratio, "warmup_ratio", 0, 1),
    DOUBLE(max_grad_norm, "max_grad_norm", -INFINITY, INFINITY),
};

#define INT32(field, name, low)                                                                    \
    {                                                                                              \
        name, offsetof(pml_train_config, field), low, false                                        \
    }
#define INT64(field, name, low)                                                                    \
    {                                                                                              \
        name, offsetof(pml_train_config, field), low, true                                         \
    }
static const range_of_int ints[] = {
    INT64(max_steps, "max_steps", 1),
    INT64(schedule.warmup_steps, "warmup_steps", 0),
    INT64(eval_steps, "eval_steps", 0),
    INT64(save_steps, "save_steps", 0),
    INT64(early_patience, "early_stopping_patience", 0),
    INT32(batch_size, "per_device_train_batch_size", 1),
    INT32(accumulation, "gradient_accumulation_steps", 1),
    INT32(max_length, "max_length", 2),
    INT32(save_total_limit, "save_total_limit", 0),
    INT32(threads, "threads", 0),
};

static pml_status check_lora(const pml_train_config *config, pml_error *err)
{
    if (config->lora_rank < 1 || config->lora_rank > 4096)
        return PML_FAIL(err, PML_INVALID, "lora r must be between 1 and 4096, it is %d",
                        config->lora_rank);
    if (!isfinite(config->lora_alpha) || config->lora_alpha <= 0)
        return PML_FAIL(err, PML_INVALID, "lora_alpha must be positive, it is %g",
                        config->lora_alpha);
    if (config->lora_targets == 0 || (config->lora_targets & ~(uint32_t)PML_TARGET_ALL_LINEAR) != 0)
        return PML_FAIL(err, PML_INVALID,
                        "lora target_modules must name at least one of q_proj, k_proj, v_proj, "
                        "o_proj, gate_proj, up_proj, down_proj");
    for (int32_t i = 0; i < config->n_lora_groups; i++) {
        const pml_lora_group *g = &config->lora_groups[i];
        if (g->rank < 1 || g->rank > 4096 || !isfinite(g->alpha) || g->alpha <= 0 ||
            g->targets == 0 || (g->targets & ~config->lora_targets) != 0)
            return PML_FAIL(err, PML_INVALID,
                            "lora_groups[%d]: r, lora_alpha or target_modules is out of range",
                            (int)i);
    }
    return PML_OK;
}

/* What follows evaluations needs some. */
static pml_status check_evaluation(const pml_train_config *c, pml_error *err)
{
    bool evaluates = c->eval_data[0] != '\0' && (c->eval_epochs || c->eval_steps > 0);
    const char *what = pml_schedule_measures(&c->schedule) ? pml_schedule_name(c->schedule.type)
                       : c->early_patience > 0             ? "early_stopping_patience"
                       : c->load_best                      ? "load_best_model_at_end"
                       : c->save_best                      ? "save_strategy=\"best\""
                                                           : NULL;
    if (what != NULL && !evaluates)
        return PML_FAIL(err, PML_INVALID,
                        "%s follows evaluations: give eval_data, and eval_steps or "
                        "eval_strategy=\"epoch\"",
                        what);
    if (c->group_by_length && (c->packing || !c->shuffle))
        return PML_FAIL(err, PML_INVALID, "group_by_length needs packing=False and shuffle=True");
    return PML_OK;
}

pml_status pml_train_config_check(const pml_train_config *config, pml_error *err)
{
    const char *base = (const char *)config;
    for (size_t i = 0; i < sizeof doubles / sizeof *doubles; i++) {
        double value = *(const double *)(const void *)(base + doubles[i].offset);
        if (!(value >= doubles[i].low && value < doubles[i].high) || !isfinite(value))
            return PML_FAIL(err, PML_INVALID, "%s is out of range: %g", doubles[i].name, value);
    }
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) {
        const void *field = base + ints[i].offset;
        int64_t value = ints[i].wide ? *(const int64_t *)field : *(const int32_t *)field;
        if (value < ints[i].low)
            return PML_FAIL(err, PML_INVALID, "%s must be at least %lld, it is %lld", ints[i].name,
                            (long long)ints[i].low, (long long)value);
    }
    pml_status status = pml_schedule_check(&config->schedule, err);
    if (status != PML_OK)
        return status;
    status = check_evaluation(config, err);
    if (status != PML_OK)
        return status;
    if (config->nesterov && (config->momentum <= 0 || config->dampening != 0))
        return PML_FAIL(err, PML_INVALID,
                        "optim_args: nesterov needs momentum above 0 and no dampening");
    if (config->model[0] == '\0')
        return PML_FAIL(err, PML_INVALID, "model is empty: give a model folder");
    if (config->dtype != PML_F32 && config->dtype != PML_BF16 && config->dtype != PML_F16)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "dtype %s is not in this version, only float32, bfloat16 and float16",
                        pml_dtype_name(config->dtype));
    if (config->quant != PML_QUANT_NONE && config->method != PML_METHOD_LORA)
        return PML_FAIL(err, PML_INVALID,
                        "quant=\"%s\" needs method=\"lora\": weights of %d bits stay as they are",
                        config->quant == PML_QUANT_NF4 ? "nf4" : "fp8",
                        config->quant == PML_QUANT_NF4 ? 4 : 8);
    if (config->method == PML_METHOD_LORA)
        return check_lora(config, err);
    if (config->method != PML_METHOD_FULL)
        return PML_FAIL(err, PML_INVALID, "method %d is not known", (int)config->method);
    if (config->lora_init[0] != '\0')
        return PML_FAIL(err, PML_INVALID, "lora_init needs method=\"lora\"");
    return PML_OK;
}

void pml_train_config_complete(pml_train_config *config, double epochs, int64_t steps_per_epoch)
{
    double steps = ceil(epochs * (double)steps_per_epoch);
    if (config->max_steps == 0)
        config->max_steps = steps < 1 ? 1 : steps > 1e15 ? (int64_t)1e15 : (int64_t)steps;
    if (config->schedule.warmup_steps == 0)
        config->schedule.warmup_steps =
            (int64_t)ceil((double)config->max_steps * config->warmup_ratio);
}
