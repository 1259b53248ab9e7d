/* PEFT's adapter folder: adapter_config.json read and written, tensors checked against the model.
 */
#include "pml/model/adapter.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/path.h"
#include "pml/json/json.h"

#define TRY(call)                                                                                  \
    do {                                                                                           \
        pml_status try_status = (call);                                                            \
        if (try_status != PML_OK)                                                                  \
            return try_status;                                                                     \
    } while (0)

static pml_status refuse(pml_json_at at, const char *field, const char *supported, pml_error *err)
{
    char shown[160];
    return PML_FAIL(err, PML_UNSUPPORTED, "%s: %s = %s is not in this version; supported: %s",
                    at.file, field,
                    pml_json_show(pml_json_field(at.value, field), shown, sizeof shown), supported);
}

/* Fields of LoraConfig that change the mathematics when they are neither null, false nor empty. */
static const char *const must_be_off[] = {
    "use_rslora",          "use_dora",          "rank_pattern",      "alpha_pattern",
    "modules_to_save",     "lora_bias",         "fan_in_fan_out",    "layers_to_transform",
    "exclude_modules",     "layer_replication", "target_parameters", "trainable_token_indices",
    "megatron_config",     "use_qalora",        "arrow_config",      "alora_invocation_tokens",
    "ensure_weight_tying", "use_bdlora",        "kasa_config",       "monteclora_config",
    "velora_config",
};

static bool is_off(const pml_json *value)
{
    bool flag = true;
    void *cursor = NULL;
    const char *key;
    const pml_json *item;
    switch (value == NULL ? PML_JSON_NULL : pml_json_kind_of(value)) {
    case PML_JSON_NULL:
        return true;
    case PML_JSON_BOOL:
        return pml_json_as_bool(value, &flag) && !flag;
    case PML_JSON_ARRAY:
        return pml_json_length(value) == 0;
    case PML_JSON_OBJECT:
        return !pml_json_next(value, &cursor, &key, &item);
    default:
        return false;
    }
}

/* Some initialisations (PiSSA, OLoRA, LoftQ, CorDA) change the frozen weights too; a folder made
 * with one does not fit the model as it is on disk. */
static pml_status check_initialisation(pml_json_at at, pml_error *err)
{
    const char *how = pml_json_as_string(pml_json_field(at.value, "init_lora_weights"));
    if (how == NULL || strcmp(how, "gaussian") == 0 || strcmp(how, "eva") == 0 ||
        strcmp(how, "orthogonal") == 0)
        return PML_OK;
    return refuse(at, "init_lora_weights", "true, false, \"gaussian\", \"eva\", \"orthogonal\"",
                  err);
}

/* One entry of target_modules: "q_proj", or "self_attn.q_proj" which means the same. */
static uint32_t target_of(const char *name)
{
    uint32_t bit = pml_target_from_name(name);
    for (int i = 0; bit == 0 && i < PML_TARGET_COUNT; i++)
        if (strcmp(pml_target_module((pml_target)(1U << i)), name) == 0)
            bit = 1U << i;
    return bit;
}

/* A string is a regular expression over a module's whole path. Only those are taken that need no
 * engine to be understood: ".*" or ".*\." before one name or "(name|name|…)". 0 for any other. */
static uint32_t targets_of_pattern(const char *text)
{
    uint32_t targets = 0;
    if (strncmp(text, ".*", 2) != 0)
        return 0;
    text += strncmp(text, ".*\\.", 4) == 0 ? 4 : 2;
    size_t n = strlen(text);
    bool group = n > 1 && text[0] == '(' && text[n - 1] == ')';
    const char *end = text + n - group;
    for (text += group; text <= end;) {
        char name[16];
        size_t length = group ? strcspn(text, "|)") : n;
        if (length >= sizeof name)
            return 0;
        memcpy(name, text, length);
        name[length] = '\0';
        uint32_t bit = pml_target_from_name(name);
        if (bit == 0)
            return 0;
        targets |= bit;
        text += length + 1;
    }
    return targets;
}

static pml_status read_targets(pml_json_at at, uint32_t *targets, pml_error *err)
{
    static const char supported[] = "\"all-linear\", or a list of q_proj, k_proj, v_proj, o_proj, "
                                    "gate_proj, up_proj, down_proj";
    const pml_json *value = pml_json_field(at.value, "target_modules");
    *targets = 0;
    if (value == NULL || pml_json_kind_of(value) == PML_JSON_NULL)
        return PML_FAIL(err, PML_INVALID, "%s: target_modules is missing", at.file);
    const char *one = pml_json_as_string(value);
    if (one != NULL && strcmp(one, "all-linear") == 0)
        *targets = PML_TARGET_ALL_LINEAR;
    else if (one != NULL)
        *targets = targets_of_pattern(one);
    for (size_t i = 0; one == NULL && i < pml_json_length(value); i++) {
        const char *name = pml_json_as_string(pml_json_item(value, i));
        uint32_t bit = name == NULL ? 0 : target_of(name);
        if (bit == 0)
            return refuse(at, "target_modules", supported, err);
        *targets |= bit;
    }
    return *targets != 0 ? PML_OK : refuse(at, "target_modules", supported, err);
}

static pml_status read_config(pml_json_at at, pml_adapter_config *config, pml_error *err)
{
    char text[64];
    TRY(pml_json_get_string(at, "peft_type", PML_JSON_REQUIRED, text, sizeof text, err));
    if (strcmp(text, "LORA") != 0)
        return refuse(at, "peft_type", "LORA", err);
    strcpy(text, "CAUSAL_LM");
    TRY(pml_json_get_string(at, "task_type", PML_JSON_OPTIONAL, text, sizeof text, err));
    if (strcmp(text, "CAUSAL_LM") != 0)
        return refuse(at, "task_type", "CAUSAL_LM", err);
    strcpy(text, "none");
    TRY(pml_json_get_string(at, "bias", PML_JSON_OPTIONAL, text, sizeof text, err));
    if (strcmp(text, "none") != 0)
        return refuse(at, "bias", "none", err);
    for (size_t i = 0; i < sizeof must_be_off / sizeof *must_be_off; i++)
        if (!is_off(pml_json_field(at.value, must_be_off[i])))
            return refuse(at, must_be_off[i], "null, false or empty", err);
    TRY(check_initialisation(at, err));
    config->rank = 8; /* PEFT's defaults */
    config->alpha = 8;
    TRY(pml_json_get_i32(at, "r", PML_JSON_OPTIONAL, 1, 4096, &config->rank, err));
    TRY(pml_json_get_double(at, "lora_alpha", PML_JSON_OPTIONAL, 0, 1e6, &config->alpha, err));
    TRY(pml_json_get_double(at, "lora_dropout", PML_JSON_OPTIONAL, 0, 1, &config->dropout, err));
    /* Only a note for readers: one too long for us is none, not a reason to refuse the adapter. */
    const char *base = pml_json_as_string(pml_json_field(at.value, "base_model_name_or_path"));
    if (base == NULL || strlen(base) < sizeof config->base_name)
        TRY(pml_json_get_string(at, "base_model_name_or_path", PML_JSON_OPTIONAL, config->base_name,
                                sizeof config->base_name, err));
    return read_targets(at, &config->targets, err);
}

pml_status pml_adapter_config_parse(const char *text, size_t size, const char *name,
                                    pml_adapter_config *config, pml_error *err)
{
    memset(config, 0, sizeof *config);
    pml_json *document = NULL;
    TRY(pml_json_parse(text, size, name, &pml_json_file_limits, &document, err));
    pml_status status;
    if (pml_json_kind_of(document) != PML_JSON_OBJECT)
        status = PML_FAIL(err, PML_INVALID, "%s: must hold an object", name);
    else
        status = read_config(pml_json_root(document, name), config, err);
    pml_json_destroy(&document);
    return status;
}

pml_status pml_adapter_config_load(const char *folder, pml_adapter_config *config, pml_error *err)
{
    char path[4096];
    TRY(pml_path_join(path, sizeof path, folder, "adapter_config.json", err));
    char *text = NULL;
    size_t size;
    pml_status status = pml_file_read(path, pml_json_file_limits.bytes, true, &text, &size, err);
    if (status == PML_NOT_FOUND)
        return PML_FAIL(err, PML_NOT_FOUND,
                        "%s has no adapter_config.json: an adapter folder as PEFT's "
                        "save_pretrained() writes it is needed",
                        folder);
    if (status == PML_OK)
        status = pml_adapter_config_parse(text, size, path, config, err);
    free(text);
    return status;
}

pml_status pml_adapter_config_write(const char *path, const pml_adapter_config *config,
                                    pml_error *err)
{
    pml_json_writer *w = NULL;
    TRY(pml_json_writer_new(&w, err));
    pml_json_put_string(w, "peft_type", "LORA");
    pml_json_put_string(w, "task_type", "CAUSAL_LM");
    if (config->base_name[0] != '\0')
        pml_json_put_string(w, "base_model_name_or_path", config->base_name);
    else
        pml_json_put_null(w, "base_model_name_or_path");
    pml_json_put_bool(w, "inference_mode", true);
    pml_json_put_int(w, "r", config->rank);
    /* PEFT declares it an int; a fraction is kept as it is, and Python takes it. */
    if (config->alpha == floor(config->alpha))
        pml_json_put_int(w, "lora_alpha", (int64_t)config->alpha);
    else
        pml_json_put_double(w, "lora_alpha", config->alpha);
    pml_json_put_double(w, "lora_dropout", config->dropout);
    pml_json_begin_array(w, "target_modules");
    for (int i = 0; i < PML_TARGET_COUNT; i++)
        if ((config->targets & 1U << i) != 0)
            pml_json_put_string(w, NULL, pml_target_name((pml_target)(1U << i)));
    pml_json_end(w);
    pml_json_put_string(w, "bias", "none");
    pml_json_put_bool(w, "fan_in_fan_out", false);
    pml_json_put_bool(w, "init_lora_weights", true);
    pml_json_put_bool(w, "use_rslora", false);
    pml_json_put_bool(w, "use_dora", false);
    char *text = NULL;
    size_t size;
    pml_status status = pml_json_writer_finish(w, 2, &text, &size, err);
    if (status == PML_OK)
        status = pml_file_write(path, text, size, 0600, err);
    free(text);
    pml_json_writer_destroy(&w);
    return status;
}

static pml_status check_tensors(const pml_adapter_config *config, const pml_model_spec *spec,
                                const pml_safetensors *file, const char *path, pml_error *err)
{
    size_t wanted = 0;
    for (int32_t layer = 0; layer < spec->layers; layer++) {
        for (int i = 0; i < PML_TARGET_COUNT; i++) {
            pml_target target = (pml_target)(1U << i);
            if ((config->targets & (uint32_t)target) == 0)
                continue;
            int64_t out, in;
            pml_target_shape(spec, target, &out, &in);
            char name[PML_ADAPTER_NAME_MAX];
            const pml_stored *tensor;
            pml_adapter_tensor_name(name, sizeof name, layer, target, 'A');
            TRY(pml_safetensors_need(file, name, config->rank, in, &tensor, err));
            pml_adapter_tensor_name(name, sizeof name, layer, target, 'B');
            TRY(pml_safetensors_need(file, name, out, config->rank, &tensor, err));
            wanted += 2;
        }
    }
    size_t there = pml_safetensors_count(file);
    if (there != wanted)
        return PML_FAIL(err, PML_INVALID,
                        "%s holds %zu tensors, its adapter_config.json promises %zu for %d "
                        "layers: it was made for another model or another configuration",
                        path, there, wanted, spec->layers);
    return PML_OK;
}

pml_status pml_adapter_open(const char *folder, const pml_model_spec *spec,
                            pml_adapter_config *config, pml_safetensors **tensors, pml_error *err)
{
    *tensors = NULL;
    TRY(pml_adapter_config_load(folder, config, err));
    char path[4096];
    TRY(pml_path_join(path, sizeof path, folder, "adapter_model.safetensors", err));
    TRY(pml_safetensors_open(path, tensors, err));
    pml_status status = check_tensors(config, spec, *tensors, path, err);
    if (status != PML_OK)
        pml_safetensors_close(tensors);
    return status;
}
