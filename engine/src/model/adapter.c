/* PEFT's adapter folder: adapter_config.json read and written, tensors checked against the model.
 */
#include "pml/model/adapter.h"

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
    "use_dora",          "lora_bias",         "fan_in_fan_out",          "layer_replication",
    "target_parameters", "megatron_config",   "trainable_token_indices", "use_qalora",
    "arrow_config",      "kasa_config",       "alora_invocation_tokens", "ensure_weight_tying",
    "use_bdlora",        "monteclora_config", "velora_config",
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

/* "layers.3.self_attn.q_proj", "model.layers.3…": one projection of one layer. */
static bool is_path(const char *name)
{
    size_t n = strlen(name);
    if (strstr(name, "layers.") == NULL)
        return false;
    for (int i = 0; i < PML_TARGET_COUNT; i++) {
        const char *module = pml_target_module((pml_target)(1U << i));
        size_t tail = strlen(module);
        if (n > tail && name[n - tail - 1] == '.' && strcmp(name + n - tail, module) == 0)
            return true;
    }
    return false;
}

/* A regular expression, or paths: which projections they mean, the tensors say. */
static pml_status read_targets(pml_json_at at, uint32_t *targets, pml_error *err)
{
    static const char supported[] = "\"all-linear\", a regular expression, or a list of q_proj, "
                                    "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
    const pml_json *value = pml_json_field(at.value, "target_modules");
    *targets = 0;
    if (value == NULL || pml_json_kind_of(value) == PML_JSON_NULL)
        return PML_FAIL(err, PML_INVALID, "%s: target_modules is missing", at.file);
    const char *one = pml_json_as_string(value);
    if (one != NULL) {
        *targets = strcmp(one, "all-linear") == 0 ? PML_TARGET_ALL_LINEAR : 0;
        return PML_OK;
    }
    bool paths = false;
    for (size_t i = 0; i < pml_json_length(value); i++) {
        const char *name = pml_json_as_string(pml_json_item(value, i));
        uint32_t bit = name == NULL ? 0 : target_of(name);
        if (bit == 0 && (name == NULL || !is_path(name)))
            return refuse(at, "target_modules", supported, err);
        paths = paths || bit == 0;
        *targets |= bit;
    }
    if (pml_json_length(value) == 0)
        return refuse(at, "target_modules", supported, err);
    if (paths || !is_off(pml_json_field(at.value, "exclude_modules")))
        *targets = 0;
    return PML_OK;
}

static pml_status read_layers(pml_json_at at, pml_adapter_config *config, pml_error *err)
{
    static const char supported[] = "null, a layer's number, or a list of them";
    const pml_json *value = pml_json_field(at.value, "layers_to_transform");
    if (value == NULL || is_off(value))
        return PML_OK;
    bool list = pml_json_kind_of(value) == PML_JSON_ARRAY;
    size_t n = list ? pml_json_length(value) : 1;
    for (size_t i = 0; i < n; i++) {
        int64_t layer;
        if (!pml_json_as_int(list ? pml_json_item(value, i) : value, &layer) || layer < 0 ||
            layer >= PML_ADAPTER_LAYERS)
            return refuse(at, "layers_to_transform", supported, err);
        config->layers[layer / 64] |= UINT64_C(1) << (layer % 64);
    }
    config->n_layers = (int32_t)n;
    return PML_OK;
}

/* A key is a regular expression at a path's end. Taken are those that say what they mean: letters,
 * digits, and dots, which may be escaped. */
static bool plain_key(const char *from, char *to, size_t capacity)
{
    size_t n = 0;
    for (from += *from == '^'; *from != '\0'; from++) {
        if (from[0] == '\\' && from[1] == '.')
            from++;
        if (strchr("\\*+?[](){}|^$", *from) != NULL || n + 1 >= capacity)
            return false;
        to[n++] = *from;
    }
    to[n] = '\0';
    return n > 0;
}

static pml_status read_pattern(pml_json_at at, const char *field, double low,
                               pml_adapter_pattern *patterns, int32_t *n, pml_error *err)
{
    static const char supported[] = "numbers by module names or the ends of their paths";
    const pml_json *value = pml_json_field(at.value, field), *item;
    void *cursor = NULL;
    const char *key;
    if (value == NULL || is_off(value))
        return PML_OK;
    if (pml_json_kind_of(value) != PML_JSON_OBJECT)
        return refuse(at, field, supported, err);
    while (pml_json_next(value, &cursor, &key, &item)) {
        pml_adapter_pattern *p = &patterns[*n];
        if (*n == PML_ADAPTER_PATTERNS || !pml_json_as_double(item, &p->value) ||
            !(p->value >= low && p->value <= 1e6) || !plain_key(key, p->key, sizeof p->key))
            return refuse(at, field, supported, err);
        (*n)++;
    }
    return PML_OK;
}

/* PEFT takes every module whose path ends with the entry. */
static uint32_t saved_of(const char *entry)
{
    static const char *const paths[PML_SAVED_COUNT] = {
        "model.embed_tokens",        "lm_head",           "model.norm",       ".input_layernorm",
        ".post_attention_layernorm", ".self_attn.q_norm", ".self_attn.k_norm"};
    uint32_t bits = 0;
    size_t n = strlen(entry);
    for (int i = 0; i < PML_SAVED_COUNT; i++) {
        size_t length = strlen(paths[i]);
        if (n > 0 && length >= n && strcmp(paths[i] + length - n, entry) == 0)
            bits |= 1U << i;
    }
    return bits;
}

static pml_status read_saved(pml_json_at at, uint32_t *saved, pml_error *err)
{
    const pml_json *value = pml_json_field(at.value, "modules_to_save");
    size_t n = value == NULL ? 0 : pml_json_length(value);
    for (size_t i = 0; i < n; i++) {
        const char *entry = pml_json_as_string(pml_json_item(value, i));
        uint32_t bits = entry == NULL ? 0 : saved_of(entry);
        if (bits == 0)
            return refuse(at, "modules_to_save",
                          "embed_tokens, lm_head, norm, input_layernorm, post_attention_layernorm, "
                          "q_norm, k_norm",
                          err);
        *saved |= bits;
    }
    return PML_OK;
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
    config->rslora = !is_off(pml_json_field(at.value, "use_rslora"));
    TRY(read_layers(at, config, err));
    TRY(read_pattern(at, "rank_pattern", 1, config->ranks, &config->n_ranks, err));
    TRY(read_pattern(at, "alpha_pattern", 0, config->alphas, &config->n_alphas, err));
    TRY(read_saved(at, &config->saved, err));
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

/* ---- tensors ---- */

/* The first entry whose key the module's path ends with, as PEFT's get_pattern_key. */
static double pattern_value(const pml_adapter_pattern *patterns, int32_t n, const char *path,
                            double otherwise)
{
    size_t length = strlen(path);
    for (int32_t i = 0; i < n; i++) {
        size_t tail = strlen(patterns[i].key);
        if (tail <= length && strcmp(path + length - tail, patterns[i].key) == 0 &&
            (tail == length || path[length - tail - 1] == '.'))
            return patterns[i].value;
    }
    return otherwise;
}

double pml_adapter_alpha(const pml_adapter_config *config, const char *path)
{
    return pattern_value(config->alphas, config->n_alphas, path, config->alpha);
}

pml_lora_module pml_adapter_module(const pml_adapter_config *config, const pml_safetensors *tensors,
                                   int32_t layer, pml_target target)
{
    char name[PML_ADAPTER_NAME_MAX];
    pml_adapter_tensor_name(name, sizeof name, layer, target, 'A');
    if (pml_safetensors_find(tensors, name) == NULL)
        return (pml_lora_module){0, 0};
    snprintf(name, sizeof name, "model.layers.%d.%s", (int)layer, pml_target_module(target));
    return (pml_lora_module){
        (int32_t)pattern_value(config->ranks, config->n_ranks, name, config->rank),
        pml_adapter_alpha(config, name)};
}

/* Whether the config alone says that this projection has an adapter. */
static bool promised(const pml_adapter_config *config, int32_t layer, pml_target target)
{
    return (config->targets & (uint32_t)target) != 0 &&
           (config->n_layers == 0 || (config->layers[layer / 64] >> (layer % 64) & 1));
}

static pml_status check_pair(const pml_adapter_config *config, const pml_model_spec *spec,
                             const pml_safetensors *file, int32_t layer, pml_target target,
                             size_t *found, pml_error *err)
{
    const pml_stored *tensor;
    char name[PML_ADAPTER_NAME_MAX];
    int64_t out, in;
    pml_lora_module module = pml_adapter_module(config, file, layer, target);
    pml_adapter_tensor_name(name, sizeof name, layer, target, 'A');
    if (module.rank == 0 && !promised(config, layer, target))
        return PML_OK;
    pml_target_shape(spec, target, &out, &in);
    TRY(pml_safetensors_need(file, name, module.rank, in, &tensor, err));
    pml_adapter_tensor_name(name, sizeof name, layer, target, 'B');
    TRY(pml_safetensors_need(file, name, out, module.rank, &tensor, err));
    *found += 2;
    return PML_OK;
}

static pml_status need_saved(const pml_safetensors *file, const char *name, int64_t rows,
                             int64_t cols, size_t *found, pml_error *err)
{
    const pml_stored *tensor;
    char full[PML_ADAPTER_NAME_MAX];
    snprintf(full, sizeof full, "base_model.model.%s.weight", name);
    (*found)++;
    return pml_safetensors_need(file, full, rows, cols, &tensor, err);
}

static pml_status check_saved(const pml_adapter_config *config, const pml_model_spec *spec,
                              const pml_safetensors *file, size_t *found, pml_error *err)
{
    static const struct {
        pml_saved which;
        const char *name;
    } norms[] = {{PML_SAVED_INPUT_NORM, "input_layernorm"},
                 {PML_SAVED_POST_NORM, "post_attention_layernorm"},
                 {PML_SAVED_Q_NORM, "self_attn.q_norm"},
                 {PML_SAVED_K_NORM, "self_attn.k_norm"}};
    char name[80];
    if (config->saved & PML_SAVED_EMBED)
        TRY(need_saved(file, "model.embed_tokens", spec->vocab, spec->hidden, found, err));
    if (config->saved & PML_SAVED_HEAD)
        TRY(need_saved(file, "lm_head", spec->vocab, spec->hidden, found, err));
    if (config->saved & PML_SAVED_NORM)
        TRY(need_saved(file, "model.norm", spec->hidden, 0, found, err));
    for (int i = 0; i < 4; i++)
        for (int32_t l = 0; (config->saved & (uint32_t)norms[i].which) && l < spec->layers; l++) {
            snprintf(name, sizeof name, "model.layers.%d.%s", (int)l, norms[i].name);
            TRY(need_saved(file, name, i < 2 ? spec->hidden : spec->head_dim, 0, found, err));
        }
    return PML_OK;
}

static pml_status check_tensors(const pml_adapter_config *config, const pml_model_spec *spec,
                                const pml_safetensors *file, const char *path, pml_error *err)
{
    size_t found = 0;
    for (int32_t layer = 0; layer < spec->layers; layer++)
        for (int i = 0; i < PML_TARGET_COUNT; i++)
            TRY(check_pair(config, spec, file, layer, (pml_target)(1U << i), &found, err));
    TRY(check_saved(config, spec, file, &found, err));
    size_t there = pml_safetensors_count(file);
    if (there != found || found == 0)
        return PML_FAIL(err, PML_INVALID,
                        "%s holds %zu tensors, its adapter_config.json promises %zu for %d "
                        "layers: it was made for another model or another configuration",
                        path, there, found, spec->layers);
    return PML_OK;
}

pml_status pml_adapter_open(const char *folder, const pml_model_spec *spec,
                            pml_adapter_config *config, pml_safetensors **tensors, pml_error *err)
{
    *tensors = NULL;
    TRY(pml_adapter_config_load(folder, config, err));
    if (!spec->qk_norm) /* "norm" means those too, where there are some */
        config->saved &= ~(uint32_t)(PML_SAVED_Q_NORM | PML_SAVED_K_NORM);
    char path[4096];
    TRY(pml_path_join(path, sizeof path, folder, "adapter_model.safetensors", err));
    TRY(pml_safetensors_open(path, tensors, err));
    pml_status status = check_tensors(config, spec, *tensors, path, err);
    if (status != PML_OK)
        pml_safetensors_close(tensors);
    return status;
}
