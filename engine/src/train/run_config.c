#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/path.h"
#include "pml/json/sum.h"
#include "pml/train/run.h"

/* The table bounds names and paths below the arrays' sizes. */
static void copy(char *out, size_t capacity, const pml_message *run, const char *field)
{
    snprintf(out, capacity, "%s", pml_message_string(run, field));
}

static pml_status data_path(char *out, const pml_message *run, const char *field,
                            const char *folder, pml_error *err)
{
    const char *path = pml_message_string(run, field);
    out[0] = '\0';
    if (path[0] == '\0')
        return PML_OK;
    if (!pml_path_is_below(path))
        return PML_FAIL(err, PML_INVALID, "%s must lie in the run folder, it is \"%s\"", field,
                        path);
    return pml_path_join(out, PML_PATH_MAX, folder, path, err);
}

static pml_status targets(const pml_message *run, const char *field, uint32_t *bits, pml_error *err)
{
    *bits = 0;
    for (size_t i = 0; i < pml_message_count(run, field); i++) {
        const char *name = pml_message_string_at(run, field, i);
        uint32_t bit = pml_target_from_name(name);
        if (bit == 0)
            return PML_FAIL(err, PML_INVALID, "%s: there is no linear layer %s", field, name);
        *bits |= bit;
    }
    return PML_OK;
}

static pml_status group(const pml_message *record, pml_lora_group *g, pml_error *err)
{
    g->rank = (int32_t)pml_message_int(record, "r");
    g->alpha = pml_message_number(record, "lora_alpha");
    for (size_t i = 0; i < pml_message_count(record, "layers"); i++) {
        int64_t layer = pml_message_int_at(record, "layers", i);
        if (layer >= PML_ADAPTER_LAYERS)
            return PML_FAIL(err, PML_INVALID, "lora_groups: layer %lld is beyond %d",
                            (long long)layer, PML_ADAPTER_LAYERS);
        g->layers[layer / 64] |= UINT64_C(1) << (layer % 64);
    }
    return targets(record, "target_modules", &g->targets, err);
}

static pml_status lora(const pml_message *run, pml_train_config *c, pml_error *err)
{
    c->lora_rslora = pml_message_bool(run, "lora_use_rslora");
    for (size_t i = 0; i < pml_message_count(run, "lora_modules_to_save"); i++)
        c->lora_saved |= pml_saved_from_name(pml_message_string_at(run, "lora_modules_to_save", i));
    c->n_lora_groups = (int32_t)pml_message_count(run, "lora_groups");
    pml_status status = targets(run, "lora_targets", &c->lora_targets, err);
    for (int32_t i = 0; status == PML_OK && i < c->n_lora_groups; i++) {
        pml_message *record = pml_message_part(run, "lora_groups", (size_t)i);
        status = record != NULL ? group(record, &c->lora_groups[i], err)
                                : PML_FAIL(err, PML_NO_MEMORY, "no memory for lora_groups");
        pml_message_destroy(&record);
    }
    return status;
}

static bool is(const pml_message *run, const char *field, const char *word)
{
    return strcmp(pml_message_string(run, field), word) == 0;
}

static void optimizer(const pml_message *run, pml_train_config *c)
{
    bool sgd = is(run, "optim", "sgd"); /* absent: adamw */
    c->optimizer = sgd                              ? PML_OPTIMIZER_SGD
                   : is(run, "optim", "adamw_8bit") ? PML_OPTIMIZER_ADAMW_8BIT
                   : is(run, "optim", "adamw_auto") ? PML_OPTIMIZER_ADAMW_AUTO
                                                    : PML_OPTIMIZER_ADAMW;
    pml_message *args = pml_message_part(run, "optim_args", 0);
    if (args == NULL)
        return;
    c->momentum = pml_message_number(args, "momentum");
    c->dampening = pml_message_number(args, "dampening");
    c->nesterov = pml_message_bool(args, "nesterov");
    pml_message_destroy(&args);
}

static void evaluation(const pml_message *run, pml_train_config *c)
{
    c->eval_epochs = is(run, "eval_strategy", "epoch");
    c->save_epochs = is(run, "save_strategy", "epoch");
    c->load_best = pml_message_bool(run, "load_best_model_at_end");
    c->save_best = c->load_best || is(run, "save_strategy", "best");
    c->early_patience = pml_message_int(run, "early_stopping_patience");
    c->early_threshold = pml_message_number(run, "early_stopping_threshold");
}

static pml_status schedule(const pml_message *run, pml_train_config *c, pml_error *err)
{
    pml_message *keywords = pml_message_part(run, "lr_scheduler_kwargs", 0);
    c->schedule.warmup_steps = pml_message_int(run, "warmup_steps");
    c->schedule.learning_rate = c->learning_rate;
    pml_schedule_set_keywords(&c->schedule, keywords);
    pml_message_destroy(&keywords);
    return pml_schedule_from_name(pml_message_string(run, "lr_scheduler_type"), &c->schedule.type,
                                  err);
}

pml_status pml_train_config_from_run(const pml_message *run, const char *folder,
                                     pml_train_config *c, pml_error *err)
{
    memset(c, 0, sizeof *c);
    copy(c->name, sizeof c->name, run, "name");
    copy(c->model, sizeof c->model, run, "model");
    copy(c->model_id, sizeof c->model_id, run, "model_id");
    copy(c->lora_init, sizeof c->lora_init, run, "lora_init");
    bool full = strcmp(pml_message_string(run, "method"), "full") == 0;
    c->method = full ? PML_METHOD_FULL : PML_METHOD_LORA;
    c->dtype = is(run, "dtype", "bfloat16")  ? PML_BF16
               : is(run, "dtype", "float16") ? PML_F16
                                             : PML_F32;
    c->quant = is(run, "quant", "nf4")   ? PML_QUANT_NF4
               : is(run, "quant", "fp8") ? PML_QUANT_FP8
                                         : PML_QUANT_NONE;
    c->lora_rank = (int32_t)pml_message_int(run, "lora_r");
    c->lora_alpha = pml_message_number(run, "lora_alpha");
    c->lora_dropout = pml_message_number(run, "lora_dropout");
    c->max_steps = pml_message_int(run, "max_steps");
    c->learning_rate = pml_message_number(run, "learning_rate");
    c->warmup_ratio = pml_message_number(run, "warmup_ratio");
    c->weight_decay = pml_message_number(run, "weight_decay");
    c->beta1 = pml_message_number(run, "adam_beta1");
    c->beta2 = pml_message_number(run, "adam_beta2");
    c->epsilon = pml_message_number(run, "adam_epsilon");
    c->max_grad_norm = pml_message_number(run, "max_grad_norm");
    c->batch_size = (int32_t)pml_message_int(run, "per_device_train_batch_size");
    c->accumulation = (int32_t)pml_message_int(run, "gradient_accumulation_steps");
    c->max_length = (int32_t)pml_message_int(run, "max_length");
    c->packing = pml_message_bool(run, "packing");
    c->shuffle = pml_message_bool(run, "shuffle");
    c->deterministic = pml_message_bool(run, "deterministic");
    c->seed = (uint64_t)pml_message_int(run, "seed");
    c->eval_steps = pml_message_int(run, "eval_steps");
    c->save_steps = pml_message_int(run, "save_steps");
    c->save_total_limit = (int32_t)pml_message_int(run, "save_total_limit");
    c->memory_limit = (size_t)pml_message_int(run, "memory_limit");
    c->threads = (int32_t)pml_message_int(run, "threads");
    c->workers = (int32_t)pml_message_count(run, "devices");
    c->restarts = pml_run_restarts(run);
    optimizer(run, c);
    evaluation(run, c);
    c->group_by_length = pml_message_bool(run, "group_by_length");
    pml_status status = schedule(run, c, err);
    if (status == PML_OK)
        status = lora(run, c, err);
    if (status == PML_OK)
        status = data_path(c->train_data, run, "train_data", folder, err);
    if (status == PML_OK)
        status = data_path(c->eval_data, run, "eval_data", folder, err);
    return status;
}

pml_status pml_run_read(const char *folder, pml_message **run, pml_error *err)
{
    char path[PATH_MAX], *text = NULL;
    size_t size;
    pml_status status = pml_path_join(path, sizeof path, folder, "run.json", err);
    if (status == PML_OK)
        status = pml_file_read(path, PML_MESSAGE_MAX, false, &text, &size, err);
    if (status != PML_OK)
        return status; /* which names the file */
    status = pml_sum_check(text, size, err);
    if (status == PML_OK || status == PML_NOT_FOUND)
        status = pml_message_parse_as(PML_FILE_run, text, size, run, err);
    free(text);
    return status == PML_OK ? PML_OK : pml_error_prefix(err, "%s", path);
}

bool pml_run_restarts(const pml_message *run)
{
    return strcmp(pml_message_string(run, "restart"), "never") != 0;
}

int64_t pml_run_max_restarts(const pml_message *run)
{
    return pml_message_has(run, "max_restarts") ? pml_message_int(run, "max_restarts") : 3;
}

double pml_run_hang_timeout(const pml_message *run)
{
    return pml_message_has(run, "hang_timeout") ? pml_message_number(run, "hang_timeout")
                                                : PML_RUN_HANG_TIMEOUT;
}

void pml_run_supersede(pml_message *older, const pml_message *newer)
{
    pml_message_remove_all(older, newer);
    if (pml_message_has(newer, "lr_scheduler_type"))
        pml_message_remove(older, "lr_scheduler_kwargs");
}
