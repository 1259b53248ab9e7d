/* config.json → pml_model_spec. Defaults are those of transformers' configuration classes. */
#include "pml/model/spec.h"

#include <stdlib.h>
#include <string.h>

#include "fields.h"
#include "pml/base/file.h"
#include "pml/base/path.h"
#include "pml/model/safetensors.h"

/* Bounds that keep every product of sizes far inside int64, well past any model there is. */
enum {
    MAX_VOCAB = 1 << 24,
    MAX_HIDDEN = 1 << 20,
    MAX_INTERMEDIATE = 1 << 22,
    MAX_HEADS = 1 << 12,
    MAX_HEAD_DIM = 256 /* what attention's tiles are built for */
};

typedef enum windows { NO_WINDOWS = 0, WINDOW_EVERYWHERE, WINDOW_BY_LAYER } windows;

/* What a family has of its own: fields and transformers' defaults, no code. */
typedef struct family {
    const char *name;
    bool qkv_bias;       /* always there, whatever attention_bias says */
    bool attention_bias; /* the field of that name is read: q, k, v and o */
    bool mlp_bias;       /* likewise */
    bool qk_norm;
    windows windows;
    int32_t positions;      /* max_position_embeddings when config.json does not say */
    int32_t head_dim;       /* likewise, 0 = hidden_size / num_attention_heads */
    int32_t bos;            /* likewise, -1 = none */
    bool kv_heads_required; /* transformers' default fits no model but one */
} family;

static const family families[] = {
    {.name = "llama", .attention_bias = true, .mlp_bias = true, .positions = 2048, .bos = 1},
    {.name = "mistral",
     .windows = WINDOW_EVERYWHERE,
     .positions = 131072,
     .bos = 1,
     .kv_heads_required = true},
    {.name = "qwen2",
     .qkv_bias = true,
     .windows = WINDOW_BY_LAYER,
     .positions = 32768,
     .bos = -1,
     .kv_heads_required = true},
    {.name = "qwen3",
     .attention_bias = true,
     .qk_norm = true,
     .windows = WINDOW_BY_LAYER,
     .positions = 32768,
     .head_dim = 128,
     .bos = -1,
     .kv_heads_required = true},
};

static const family *family_named(const char *name)
{
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (strcmp(families[i].name, name) == 0)
            return &families[i];
    return NULL;
}

static pml_status read_sizes(pml_json_at at, const family *family, pml_model_spec *s,
                             pml_error *err)
{
    TRY(pml_json_get_i32(at, "vocab_size", PML_JSON_REQUIRED, 1, MAX_VOCAB, &s->vocab, err));
    TRY(pml_json_get_i32(at, "hidden_size", PML_JSON_REQUIRED, 1, MAX_HIDDEN, &s->hidden, err));
    TRY(pml_json_get_i32(at, "intermediate_size", PML_JSON_REQUIRED, 1, MAX_INTERMEDIATE,
                         &s->intermediate, err));
    TRY(pml_json_get_i32(at, "num_hidden_layers", PML_JSON_REQUIRED, 1, PML_LAYERS_MAX, &s->layers,
                         err));
    TRY(pml_json_get_i32(at, "num_attention_heads", PML_JSON_REQUIRED, 1, MAX_HEADS, &s->heads,
                         err));
    s->kv_heads = s->heads; /* what null means in every family */
    const pml_json *kv_heads = pml_json_field(at.value, "num_key_value_heads");
    TRY(pml_json_get_i32(at, "num_key_value_heads",
                         family->kv_heads_required && kv_heads == NULL ? PML_JSON_REQUIRED
                                                                       : PML_JSON_OPTIONAL,
                         1, MAX_HEADS, &s->kv_heads, err));
    if (s->heads % s->kv_heads != 0)
        return PML_FAIL(err, PML_INVALID,
                        "%s: num_attention_heads = %d is not a multiple of num_key_value_heads = "
                        "%d",
                        at.file, s->heads, s->kv_heads);
    s->head_dim = family->head_dim;
    if (s->head_dim == 0 && !pml_json_has(at, "head_dim")) {
        if (s->hidden % s->heads != 0)
            return PML_FAIL(err, PML_INVALID,
                            "%s: hidden_size = %d is not a multiple of num_attention_heads = %d, "
                            "and there is no head_dim",
                            at.file, s->hidden, s->heads);
        s->head_dim = s->hidden / s->heads;
    }
    TRY(pml_json_get_i32(at, "head_dim", PML_JSON_OPTIONAL, 1, MAX_HIDDEN, &s->head_dim, err));
    if (s->head_dim % 2 != 0 || s->head_dim > MAX_HEAD_DIM)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "%s: head_dim = %d is not in this version; supported: even, at most %d",
                        at.file, s->head_dim, MAX_HEAD_DIM);
    s->max_positions = family->positions;
    return pml_json_get_i32(at, "max_position_embeddings", PML_JSON_OPTIONAL, 1, PMLI_POSITIONS_MAX,
                            &s->max_positions, err);
}

static pml_status read_biases(pml_json_at at, const family *family, pml_model_spec *s,
                              pml_error *err)
{
    s->qkv_bias = family->qkv_bias;
    s->qk_norm = family->qk_norm;
    if (family->attention_bias) {
        TRY(pml_json_get_bool(at, "attention_bias", PML_JSON_OPTIONAL, &s->qkv_bias, err));
        s->o_bias = s->qkv_bias;
    }
    if (family->mlp_bias)
        TRY(pml_json_get_bool(at, "mlp_bias", PML_JSON_OPTIONAL, &s->mlp_bias, err));
    TRY(pml_json_get_bool(at, "tie_word_embeddings", PML_JSON_OPTIONAL, &s->tied_head, err));
    double eps = 1e-6;
    TRY(pml_json_get_double(at, "rms_norm_eps", PML_JSON_OPTIONAL, 0, 1, &eps, err));
    s->rms_eps = (float)eps;
    return PML_OK;
}

/* Whether layer l slides: said by layer_types where it is there, else by max_window_layers. */
static pml_status read_layer_types(pml_json_at at, pml_model_spec *s, pml_error *err)
{
    int32_t first = 28; /* Qwen2Config's and Qwen3Config's max_window_layers */
    TRY(pml_json_get_i32(at, "max_window_layers", PML_JSON_OPTIONAL, 0, INT32_MAX, &first, err));
    const pml_json *types = NULL;
    TRY(pml_json_get_array(at, "layer_types", PML_JSON_OPTIONAL, &types, err));
    if (types != NULL && pml_json_length(types) != (size_t)s->layers)
        return PML_FAIL(err, PML_INVALID,
                        "%s: layer_types has %zu entries, num_hidden_layers is %d", at.file,
                        pml_json_length(types), s->layers);
    for (int32_t l = 0; l < s->layers; l++) {
        bool slides = s->window > 0 && l >= first;
        if (types != NULL) {
            const char *type = pml_json_as_string(pml_json_item(types, (size_t)l));
            slides = type != NULL && strcmp(type, "sliding_attention") == 0;
            if (type == NULL || (!slides && strcmp(type, "full_attention") != 0))
                return pmli_refuse(at, "layer_types", types, "full_attention, sliding_attention",
                                   err);
        }
        if (slides && s->window == 0)
            return PML_FAIL(err, PML_INVALID,
                            "%s: layer_types has sliding_attention, but there is no window: "
                            "use_sliding_window is false or sliding_window is null",
                            at.file);
        if (slides)
            s->sliding[l / 8] |= (uint8_t)(1U << l % 8);
    }
    return PML_OK;
}

/* Weights that are stored in fewer bits: NF4 as bitsandbytes writes it, its scales quantised too,
 * and nothing else. Folders of 2023 do not say quant_method. */
static pml_status read_quantisation(pml_json_at at, pml_model_spec *s, pml_error *err)
{
    static const char field[] = "quantization_config", method[] = "quant_method",
                      four[] = "load_in_4bit", type[] = "bnb_4bit_quant_type",
                      twice[] = "bnb_4bit_use_double_quant";
    const pml_json *inside = pml_json_field(at.value, field);
    const pml_json_at in = {inside, at.file, field};
    const char *text;
    bool yes = false;
    if (pmli_is_off(inside))
        return PML_OK;
    if (!pml_json_has(in, method) && !pml_json_has(in, four))
        return pmli_refuse(at, field, inside, "bitsandbytes' nf4", err);
    text = pml_json_as_string(pml_json_field(inside, method));
    if (pml_json_has(in, method) && (text == NULL || strcmp(text, "bitsandbytes") != 0))
        return pmli_refuse(in, method, pml_json_field(inside, method), "\"bitsandbytes\"", err);
    if (!pml_json_as_bool(pml_json_field(inside, four), &yes) || !yes)
        return pmli_refuse(in, four, pml_json_field(inside, four), "true", err);
    text = pml_json_as_string(pml_json_field(inside, type));
    if (text == NULL || strcmp(text, "nf4") != 0)
        return pmli_refuse(in, type, pml_json_field(inside, type), "\"nf4\"", err);
    if (!pml_json_as_bool(pml_json_field(inside, twice), &yes) || !yes)
        return pmli_refuse(in, twice, pml_json_field(inside, twice),
                           "true, or the original model with quant=\"nf4\"", err);
    s->nf4 = true;
    return PML_OK;
}

/* Llama has no windows. Mistral's is in force in every layer, unless it is null or layer_types says
 * otherwise, which AutoModel takes for a Ministral; whatever else the file says of windows has no
 * effect there, as in transformers. */
static pml_status read_windows(pml_json_at at, const family *family, pml_model_spec *s,
                               pml_error *err)
{
    if (family->windows == NO_WINDOWS)
        return PML_OK;
    bool use = family->windows == WINDOW_EVERYWHERE;
    if (!use)
        TRY(pml_json_get_bool(at, "use_sliding_window", PML_JSON_OPTIONAL, &use, err));
    const pml_json *window = pml_json_field(at.value, "sliding_window");
    bool none = window != NULL && pml_json_kind_of(window) == PML_JSON_NULL;
    if (use && !none) {
        s->window = 4096; /* MistralConfig's, Qwen2Config's and Qwen3Config's */
        TRY(pml_json_get_i32(at, "sliding_window", PML_JSON_OPTIONAL, 1, INT32_MAX, &s->window,
                             err));
    }
    if (family->windows == WINDOW_BY_LAYER || pml_json_has(at, "layer_types"))
        return read_layer_types(at, s, err);
    if (s->window > 0)
        memset(s->sliding, 0xFF, sizeof s->sliding);
    return PML_OK;
}

int32_t pml_layer_window(const pml_model_spec *spec, int32_t layer)
{
    return spec->sliding[layer / 8] >> layer % 8 & 1 ? spec->window : 0;
}

/* pretraining_tp is not among them: it tells how a product was once split over devices, and
 * transformers ignores it. */
static pml_status refuse_other_mathematics(pml_json_at at, pml_error *err)
{
    char act[32] = "silu";
    TRY(pml_json_get_string(at, "hidden_act", PML_JSON_OPTIONAL, act, sizeof act, err));
    if (strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0) /* two names of one function */
        return pmli_refuse(at, "hidden_act", pml_json_field(at.value, "hidden_act"), "silu", err);
    return pmli_need_off(at, "attention_dropout", err);
}

static pml_status read_dtype(pml_json_at at, pml_model_spec *s, pml_error *err)
{
    const char *field = pml_json_has(at, "dtype") ? "dtype" : "torch_dtype";
    char name[32] = "float32";
    TRY(pml_json_get_string(at, field, PML_JSON_OPTIONAL, name, sizeof name, err));
    if (strcmp(name, "float32") == 0 || strcmp(name, "auto") == 0)
        s->dtype = PML_F32;
    else if (strcmp(name, "bfloat16") == 0)
        s->dtype = PML_BF16;
    else if (strcmp(name, "float16") == 0)
        s->dtype = PML_F16;
    else
        return pmli_refuse(at, field, pml_json_field(at.value, field), "float32, bfloat16, float16",
                           err);
    return PML_OK;
}

/* A token id, or none: absent takes the family's default, null and negative mean none. */
static pml_status read_token(pml_json_at at, const char *field, int32_t *id, pml_error *err)
{
    const pml_json *value = pml_json_field(at.value, field);
    if (value == NULL)
        return PML_OK;
    int64_t number;
    if (pml_json_kind_of(value) == PML_JSON_NULL) {
        *id = -1;
        return PML_OK;
    }
    if (pml_json_kind_of(value) == PML_JSON_ARRAY && pml_json_length(value) > 0)
        value = pml_json_item(value, 0);
    if (!pml_json_as_int(value, &number) || number > INT32_MAX)
        return PML_FAIL(err, PML_INVALID, "%s: %s must be a token id", at.file, field);
    *id = number < 0 ? -1 : (int32_t)number;
    return PML_OK;
}

static pml_status read_ends(pml_json_at at, pml_model_spec *s, pml_error *err)
{
    const pml_json *value = pml_json_field(at.value, "eos_token_id");
    if (value == NULL)
        return PML_OK;
    bool many = pml_json_kind_of(value) == PML_JSON_ARRAY;
    size_t n = many ? pml_json_length(value) : pml_json_kind_of(value) != PML_JSON_NULL;
    s->n_eos = 0;
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        bool whole = pml_json_as_int(many ? pml_json_item(value, i) : value, &id);
        if (whole && id == -1) /* written for "none": no token is that one */
            continue;
        if (!whole || id < 0 || id > INT32_MAX ||
            (size_t)s->n_eos == sizeof s->eos / sizeof *s->eos)
            return PML_FAIL(err, PML_INVALID,
                            "%s: eos_token_id must be a token id or a list of at most %zu", at.file,
                            sizeof s->eos / sizeof *s->eos);
        s->eos[s->n_eos++] = (int32_t)id;
    }
    return PML_OK;
}

static pml_status read_spec(pml_json_at at, pml_model_spec *s, pml_error *err)
{
    char type[64];
    TRY(pml_json_get_string(at, "model_type", PML_JSON_REQUIRED, type, sizeof type, err));
    const family *family = family_named(type);
    if (family == NULL)
        return pmli_refuse(at, "model_type", pml_json_field(at.value, "model_type"),
                           "llama, mistral, qwen2, qwen3", err);
    strcpy(s->family, family->name);
    TRY(read_sizes(at, family, s, err));
    TRY(pmli_read_rope(at, s, err));
    TRY(read_biases(at, family, s, err));
    TRY(refuse_other_mathematics(at, err));
    TRY(read_quantisation(at, s, err));
    TRY(read_windows(at, family, s, err));
    TRY(read_dtype(at, s, err));
    s->bos = family->bos;
    s->pad = -1;
    TRY(read_token(at, "bos_token_id", &s->bos, err));
    TRY(read_token(at, "pad_token_id", &s->pad, err));
    return read_ends(at, s, err);
}

pml_status pml_model_spec_parse(const char *text, size_t length, const char *name,
                                pml_model_spec *spec, pml_error *err)
{
    memset(spec, 0, sizeof *spec);
    pml_json *document = NULL;
    TRY(pml_json_parse(text, length, name, &pml_json_file_limits, &document, err));
    pml_status status;
    if (pml_json_kind_of(document) != PML_JSON_OBJECT)
        status = PML_FAIL(err, PML_INVALID, "%s: must hold an object", name);
    else
        status = read_spec(pml_json_root(document, name), spec, err);
    pml_json_destroy(&document);
    return status;
}

/* Where generate() of transformers ends: at what generation_config.json says, and where that file
 * is there and names no token, nowhere; without the file, at what config.json itself names (a
 * default that its class would fill in is not taken). */
static pml_status read_generation_config(const char *folder, pml_model_spec *spec, pml_error *err)
{
    char path[4096];
    TRY(pml_path_join(path, sizeof path, folder, "generation_config.json", err));
    pml_json *document = NULL;
    pml_status status = pml_json_load(path, &pml_json_file_limits, &document, err);
    if (status == PML_NOT_FOUND)
        return PML_OK;
    if (status != PML_OK)
        return status;
    spec->n_eos = 0;
    status = read_ends(pml_json_root(document, path), spec, err);
    pml_json_destroy(&document);
    return status;
}

/* The files know better than config.json in what their matrices are stored. A folder that cannot be
 * opened keeps config.json's word: it may have been fetched for a plan, without its weights, and
 * what is wrong with it is said when they are loaded. */
static pml_status ask_files(const char *folder, pml_model_spec *spec, pml_error *err)
{
    pml_safetensors *file = NULL;
    pml_error ignored = PML_ERROR_INIT;
    pml_status status = pml_safetensors_open_folder(folder, &file, &ignored);
    if (status == PML_NO_MEMORY)
        return PML_FAIL(err, status, "%s", ignored.message);
    if (status != PML_OK)
        return PML_OK;
    bool narrow = false, wide = false;
    for (size_t i = 0; i < pml_safetensors_count(file); i++) {
        const pml_stored *stored = pml_safetensors_at(file, i);
        bool matrix = stored->n_dims == 2;
        narrow = narrow || (matrix && stored->dtype == PML_BF16);
        wide = wide || (matrix && (stored->dtype == PML_F32 || stored->dtype == PML_F16));
    }
    pml_safetensors_close(&file);
    if (narrow && !wide)
        spec->dtype = PML_BF16;
    else if (wide && spec->dtype == PML_BF16)
        spec->dtype = PML_F32;
    return PML_OK;
}

pml_status pml_model_spec_load(const char *folder, pml_model_spec *spec, pml_error *err)
{
    char path[4096];
    TRY(pml_path_join(path, sizeof path, folder, "config.json", err));
    char *text = NULL;
    size_t size;
    pml_status status = pml_file_read(path, pml_json_file_limits.bytes, true, &text, &size, err);
    if (status == PML_NOT_FOUND)
        return PML_FAIL(err, PML_NOT_FOUND,
                        "%s has no config.json: a model folder as Hugging Face's "
                        "save_pretrained() writes it is needed",
                        folder);
    if (status == PML_OK)
        status = pml_model_spec_parse(text, size, path, spec, err);
    free(text);
    if (status == PML_OK)
        status = read_generation_config(folder, spec, err);
    return status == PML_OK ? ask_files(folder, spec, err) : status;
}

int64_t pml_model_parameters(const pml_model_spec *s)
{
    int64_t hidden = s->hidden, queries = (int64_t)s->heads * s->head_dim;
    int64_t keys = (int64_t)s->kv_heads * s->head_dim, inner = s->intermediate;
    int64_t layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner;
    layer += 2 * hidden; /* two norms */
    layer += s->qk_norm ? 2 * s->head_dim : 0;
    layer += s->qkv_bias ? queries + 2 * keys : 0;
    layer += s->o_bias ? hidden : 0;
    layer += s->mlp_bias ? 2 * inner + hidden : 0;
    int64_t tables = (s->tied_head ? 1 : 2) * (int64_t)s->vocab * hidden;
    return tables + s->layers * layer + hidden;
}
