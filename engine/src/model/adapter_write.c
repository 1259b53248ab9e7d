/* adapter_config.json as PEFT reads it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/json/json.h"
#include "pml/model/adapter.h"

/* What to write, and where it comes from. */
typedef struct plan {
    const pml_adapter_config *config;
    const pml_lora_module *modules; /* [layers * PML_TARGET_COUNT] */
    int32_t layers;
} plan;

static pml_lora_module at(const plan *p, int32_t layer, int target)
{
    return p->modules[layer * PML_TARGET_COUNT + target];
}

static bool targeted(const plan *p, int target)
{
    return (p->config->targets >> target & 1) != 0;
}

/* Whether a layer has all of the targets, or none of them. */
static bool all_or_none(const plan *p, int32_t layer)
{
    int with = 0, all = 0;
    for (int t = 0; t < PML_TARGET_COUNT; t++) {
        all += targeted(p, t);
        with += at(p, layer, t).rank > 0;
    }
    return with == 0 || with == all;
}

static bool has_any(const plan *p, int32_t layer)
{
    bool any = false;
    for (int t = 0; t < PML_TARGET_COUNT; t++)
        any = any || at(p, layer, t).rank > 0;
    return any;
}

/* Names, with the layers that have them where not all do; or each projection by its path. */
static void put_targets(pml_json_writer *w, const plan *p)
{
    bool regular = true, everywhere = true;
    for (int32_t l = 0; l < p->layers; l++) {
        regular = regular && all_or_none(p, l);
        everywhere = everywhere && has_any(p, l);
    }
    pml_json_begin_array(w, "target_modules");
    for (int t = 0; regular && t < PML_TARGET_COUNT; t++)
        if (targeted(p, t))
            pml_json_put_string(w, NULL, pml_target_name((pml_target)(1U << t)));
    for (int32_t l = 0; !regular && l < p->layers; l++)
        for (int t = 0; t < PML_TARGET_COUNT; t++) {
            char path[96];
            snprintf(path, sizeof path, "model.layers.%d.%s", (int)l,
                     pml_target_module((pml_target)(1U << t)));
            if (at(p, l, t).rank > 0)
                pml_json_put_string(w, NULL, path);
        }
    pml_json_end(w);
    if (!regular || everywhere)
        return;
    pml_json_begin_array(w, "layers_to_transform");
    for (int32_t l = 0; l < p->layers; l++)
        if (has_any(p, l))
            pml_json_put_int(w, NULL, l);
    pml_json_end(w);
}

static double value_of(pml_lora_module module, bool rank)
{
    return rank ? (double)module.rank : module.alpha;
}

/* PEFT declares ints; a fraction is kept as it is, and Python takes it. */
static void put_number(pml_json_writer *w, const char *key, double value)
{
    if (value == floor(value))
        pml_json_put_int(w, key, (int64_t)value);
    else
        pml_json_put_double(w, key, value);
}

/* By a target's name where all its layers have the same, else by path. */
static void put_pattern(pml_json_writer *w, const plan *p, const char *field, bool rank)
{
    double usual = rank ? (double)p->config->rank : p->config->alpha;
    pml_json_begin_object(w, field);
    for (int t = 0; t < PML_TARGET_COUNT; t++) {
        double first = NAN;
        bool same = true;
        for (int32_t l = 0; l < p->layers; l++) {
            if (at(p, l, t).rank == 0)
                continue;
            double value = value_of(at(p, l, t), rank);
            same = same && (isnan(first) || value == first);
            first = value;
        }
        if (same && !isnan(first) && first != usual)
            put_number(w, pml_target_name((pml_target)(1U << t)), first);
        for (int32_t l = 0; !same && l < p->layers; l++) {
            char path[96];
            snprintf(path, sizeof path, "model.layers.%d.%s", (int)l,
                     pml_target_module((pml_target)(1U << t)));
            if (at(p, l, t).rank > 0 && value_of(at(p, l, t), rank) != usual)
                put_number(w, path, value_of(at(p, l, t), rank));
        }
    }
    pml_json_end(w);
}

static void put_all(pml_json_writer *w, const plan *p)
{
    const pml_adapter_config *config = p->config;
    pml_json_put_string(w, "peft_type", "LORA");
    pml_json_put_string(w, "task_type", "CAUSAL_LM");
    if (config->base_name[0] != '\0')
        pml_json_put_string(w, "base_model_name_or_path", config->base_name);
    else
        pml_json_put_null(w, "base_model_name_or_path");
    pml_json_put_bool(w, "inference_mode", true);
    pml_json_put_int(w, "r", config->rank);
    put_number(w, "lora_alpha", config->alpha);
    pml_json_put_double(w, "lora_dropout", config->dropout);
    put_targets(w, p);
    put_pattern(w, p, "rank_pattern", true);
    put_pattern(w, p, "alpha_pattern", false);
    if (config->saved == 0)
        pml_json_put_null(w, "modules_to_save");
    else
        pml_json_begin_array(w, "modules_to_save");
    for (int i = 0; i < PML_SAVED_COUNT; i++)
        if (config->saved >> i & 1) /* "norm" alone would mean every norm there is */
            pml_json_put_string(w, NULL,
                                i == 2 ? "model.norm" : pml_saved_name((pml_saved)(1U << i)));
    if (config->saved != 0)
        pml_json_end(w);
    pml_json_put_string(w, "bias", "none");
    pml_json_put_bool(w, "fan_in_fan_out", false);
    pml_json_put_bool(w, "init_lora_weights", true);
    pml_json_put_bool(w, "use_rslora", config->rslora);
    pml_json_put_bool(w, "use_dora", false);
}

/* The modules of a config that is the same in all its layers. */
static pml_lora_module *uniform(const pml_adapter_config *config, int32_t *layers)
{
    *layers = config->n_layers == 0 ? 1 : PML_ADAPTER_LAYERS;
    pml_lora_module *modules = calloc((size_t)*layers * PML_TARGET_COUNT, sizeof *modules);
    for (int32_t i = 0; modules != NULL && i < *layers * PML_TARGET_COUNT; i++) {
        int32_t l = i / PML_TARGET_COUNT;
        bool here = config->n_layers == 0 || (config->layers[l / 64] >> (l % 64) & 1);
        if (here && (config->targets >> (i % PML_TARGET_COUNT) & 1))
            modules[i] = (pml_lora_module){config->rank, config->alpha};
    }
    return modules;
}

pml_status pml_adapter_config_write(const char *path, const pml_adapter_config *config,
                                    const pml_lora_module *modules, int32_t layers, pml_error *err)
{
    pml_lora_module *made = modules == NULL ? uniform(config, &layers) : NULL;
    const plan p = {config, modules != NULL ? modules : made, layers};
    pml_json_writer *w = NULL;
    char *text = NULL;
    size_t size;
    pml_status status = p.modules != NULL
                            ? pml_json_writer_new(&w, err)
                            : PML_FAIL(err, PML_NO_MEMORY, "no host memory for %s", path);
    if (status == PML_OK) {
        put_all(w, &p);
        status = pml_json_writer_finish(w, 2, &text, &size, err);
    }
    if (status == PML_OK)
        status = pml_file_write(path, text, size, 0600, err);
    free(text);
    free(made);
    pml_json_writer_destroy(&w);
    return status;
}
