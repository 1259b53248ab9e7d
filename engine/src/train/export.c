/* A snapshot's tensors in the formats that PEFT and transformers load. */
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/path.h"
#include "pml/json/json.h"
#include "pml/model/adapter.h"
#include "pml/model/safetensors.h"
#include "snapshot.h"

enum { LARGEST_SMALL_FILE = 256 << 20 }; /* a tokenizer.json of a large vocabulary is some 20 MiB */

/* Copied beside a full model when the folder it came from has them. */
static const char *const companions[] = {"generation_config.json",
                                         "tokenizer.json",
                                         "tokenizer_config.json",
                                         "tokenizer.model",
                                         "special_tokens_map.json",
                                         "added_tokens.json",
                                         "vocab.json",
                                         "merges.txt",
                                         "chat_template.jinja",
                                         "chat_template.json"};

static pml_status write_values(const pml_snapshot *s, const char *path, pml_error *err)
{
    pml_safetensors_writer *w = NULL;
    pml_status status = pml_safetensors_writer_new(path, 0600, &w, err);
    if (status == PML_OK)
        status = pml_safetensors_writer_metadata(w, "format", "pt", err);
    for (int i = 0; status == PML_OK && i < s->n_entries; i++)
        status = pml_safetensors_writer_add(w, s->entries[i].name, PML_F32, s->entries[i].shape,
                                            s->entries[i].n_dims, err);
    if (status == PML_OK)
        status = pmli_write_buffer(s, 0, w, err);
    if (status == PML_OK)
        status = pml_safetensors_writer_finish(w, err);
    pml_safetensors_writer_destroy(&w);
    return status;
}

static void put_value(pml_json_writer *w, const char *key, const pml_json *value);

static void put_object(pml_json_writer *w, const char *key, const pml_json *value)
{
    void *cursor = NULL;
    const char *field;
    const pml_json *item;
    pml_json_begin_object(w, key);
    while (pml_json_next(value, &cursor, &field, &item))
        put_value(w, field, item);
    pml_json_end(w);
}

static void put_array(pml_json_writer *w, const char *key, const pml_json *value)
{
    pml_json_begin_array(w, key);
    for (size_t i = 0; i < pml_json_length(value); i++)
        put_value(w, NULL, pml_json_item(value, i));
    pml_json_end(w);
}

/* Any value as it was read; depth is bounded by the reader's limits. */
static void put_value(pml_json_writer *w, const char *key, const pml_json *value)
{
    int64_t integer = 0;
    double real = 0;
    bool truth = false;
    switch (pml_json_kind_of(value)) {
    case PML_JSON_NULL:
        pml_json_put_null(w, key);
        break;
    case PML_JSON_BOOL:
        pml_json_as_bool(value, &truth);
        pml_json_put_bool(w, key, truth);
        break;
    case PML_JSON_INT:
        pml_json_as_int(value, &integer);
        pml_json_put_int(w, key, integer);
        break;
    case PML_JSON_REAL:
        pml_json_as_double(value, &real);
        pml_json_put_double(w, key, real);
        break;
    case PML_JSON_STRING:
        pml_json_put_string(w, key, pml_json_as_string(value));
        break;
    case PML_JSON_ARRAY:
        put_array(w, key, value);
        break;
    case PML_JSON_OBJECT:
        put_object(w, key, value);
        break;
    }
}

/* The model's own config.json, except that the weights beside it are float32 now: left at bfloat16,
 * transformers would round them while loading. */
static pml_status write_model_config(const char *from, const char *to, pml_error *err)
{
    pml_json *document = NULL;
    pml_json_writer *w = NULL;
    char *text = NULL;
    size_t size;
    pml_status status = pml_json_load(from, &pml_json_file_limits, &document, err);
    if (status == PML_OK)
        status = pml_json_writer_new(&w, err);
    if (status != PML_OK)
        goto cleanup;
    void *cursor = NULL;
    const char *field;
    const pml_json *value;
    while (pml_json_next(document, &cursor, &field, &value))
        if (strcmp(field, "dtype") != 0 && strcmp(field, "torch_dtype") != 0)
            put_value(w, field, value);
    /* Both spellings: transformers reads torch_dtype before version 5 and dtype since. */
    pml_json_put_string(w, "dtype", "float32");
    pml_json_put_string(w, "torch_dtype", "float32");
    status = pml_json_writer_finish(w, 2, &text, &size, err);
    if (status == PML_OK)
        status = pml_file_write(to, text, size, 0600, err);
cleanup:
    free(text);
    pml_json_writer_destroy(&w);
    pml_json_destroy(&document);
    return status;
}

static pml_status copy_if_there(const char *from_folder, const char *to_folder, const char *name,
                                pml_error *err)
{
    char from[PML_PATH_MAX], to[PML_PATH_MAX];
    char *data = NULL;
    size_t size;
    pml_status status = pml_path_join(from, sizeof from, from_folder, name, err);
    if (status == PML_OK)
        status = pml_path_join(to, sizeof to, to_folder, name, err);
    if (status != PML_OK)
        return status;
    pml_error missing = PML_ERROR_INIT; /* no fault, so the caller's err stays as it is */
    status = pml_file_read(from, LARGEST_SMALL_FILE, true, &data, &size, &missing);
    if (status == PML_NOT_FOUND)
        return PML_OK;
    if (status != PML_OK && err != NULL)
        *err = missing;
    if (status == PML_OK)
        status = pml_file_write(to, data, size, 0600, err);
    free(data);
    return status;
}

static pml_status write_adapter_config(const pml_snapshot *s, const char *folder, pml_error *err)
{
    const pml_train_config *c = &s->config;
    pml_adapter_config config = {.rank = c->lora_rank,
                                 .alpha = c->lora_alpha,
                                 .dropout = s->state.lora_dropout,
                                 .rslora = c->lora_rslora,
                                 .targets = c->lora_targets,
                                 .saved = c->lora_saved};
    /* The name on the hub says more to others than where this machine keeps it. */
    const char *name = c->model_id[0] != '\0' ? c->model_id : c->model;
    if (strlen(name) < sizeof config.base_name)
        strcpy(config.base_name, name);
    char path[PML_PATH_MAX];
    int32_t layers = c->n_lora_groups > 0 ? s->layers : 0;
    pml_lora_module *modules = calloc((size_t)layers * PML_TARGET_COUNT + 1, sizeof *modules);
    if (modules == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory for an adapter's configuration");
    for (int32_t i = 0; i < layers * PML_TARGET_COUNT; i++)
        modules[i] =
            pml_lora_of(c, i / PML_TARGET_COUNT, (pml_target)(1U << (i % PML_TARGET_COUNT)));
    pml_status status = pml_path_join(path, sizeof path, folder, "adapter_config.json", err);
    if (status == PML_OK)
        status = pml_adapter_config_write(path, &config, layers > 0 ? modules : NULL, layers, err);
    free(modules);
    return status;
}

pml_status pmli_write_tensors(const pml_snapshot *s, const char *folder, pml_error *err)
{
    char path[PML_PATH_MAX], config[PML_PATH_MAX];
    pml_status status = pml_path_join(path, sizeof path, folder, pmli_tensor_file(s), err);
    if (status == PML_OK)
        status = write_values(s, path, err);
    if (status != PML_OK)
        return status;
    if (s->config.method == PML_METHOD_LORA)
        return write_adapter_config(s, folder, err);
    status = pml_path_join(config, sizeof config, s->config.model, "config.json", err);
    if (status == PML_OK)
        status = pml_path_join(path, sizeof path, folder, "config.json", err);
    if (status == PML_OK)
        status = write_model_config(config, path, err);
    for (size_t i = 0; status == PML_OK && i < sizeof companions / sizeof *companions; i++)
        status = copy_if_there(s->config.model, folder, companions[i], err);
    return status;
}
