/* The k-th allocation refused, for every k: each reader and writer of files answers PML_NO_MEMORY,
 * never that the file is damaged, and nothing stays allocated. */
#include "shard_file.h"

#include "no_memory.h"
#include "pml/base/hash.h"
#include "pml/data/sampler.h"
#include "pml/model/adapter.h"

static const pml_model_spec spec = {
    .hidden = 4, .layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 2, .intermediate = 6};
static const pml_adapter_config config = {.rank = 2, .alpha = 4, .targets = PML_TARGET_K};

static pml_status write_adapter(const char *path, pml_error *e)
{
    pml_safetensors_writer *w = NULL;
    char name[PML_ADAPTER_NAME_MAX];
    const float zeros[12] = {0};
    pml_status status = pml_safetensors_writer_new(path, 0600, &w, e);
    if (status == PML_OK)
        status = pml_safetensors_writer_metadata(w, "format", "pt", e);
    pml_adapter_tensor_name(name, sizeof name, 0, PML_TARGET_K, 'A');
    if (status == PML_OK)
        status = pml_safetensors_writer_add(w, name, PML_F32, (int64_t[]){2, 4}, 2, e);
    pml_adapter_tensor_name(name, sizeof name, 0, PML_TARGET_K, 'B');
    if (status == PML_OK)
        status = pml_safetensors_writer_add(w, name, PML_F32, (int64_t[]){2, 2}, 2, e);
    if (status == PML_OK)
        status = pml_safetensors_writer_write(w, zeros, sizeof zeros, e);
    if (status == PML_OK)
        status = pml_safetensors_writer_finish(w, e);
    pml_safetensors_writer_destroy(&w);
    return status;
}

static char root[64], adapter_config[128], adapter_model[128], rows[128];

static pml_status read_everything(pml_error *e)
{
    const pml_sampler_options options = {.batch_size = 2,
                                         .accumulation = 1,
                                         .world = 1,
                                         .max_length = 8,
                                         .packing = true,
                                         .shuffle = true};
    pml_model_spec model;
    pml_adapter_config adapter;
    pml_safetensors *tensors = NULL;
    pml_shard *shard = NULL;
    pml_sampler *sampler = NULL;
    uint8_t hash[PML_HASH_BYTES];
    pml_status status = pml_model_spec_load(root, &model, e);
    if (status == PML_OK)
        status = pml_adapter_open(root, &spec, &adapter, &tensors, e);
    if (status == PML_OK)
        status = pml_shard_open(rows, SHARD_VOCAB, &shard, e);
    if (status == PML_OK)
        status = pml_sampler_new(shard, &options, &sampler, e);
    if (status == PML_OK)
        status = pml_hash_file(rows, false, hash, e);
    pml_sampler_destroy(&sampler);
    pml_shard_close(&shard);
    pml_safetensors_close(&tensors);
    return status;
}

static pml_status write_and_read(pml_error *e)
{
    pml_status status = pml_adapter_config_write(adapter_config, &config, NULL, 0, e);
    if (status == PML_OK)
        status = write_adapter(adapter_model, e);
    return status == PML_OK ? read_everything(e) : status;
}

static void test_every_allocation(void **state)
{
    (void)state;
    const int32_t lengths[] = {3, 5, 2};
    pml_shard *shard = made_shard("rows", lengths, 3);
    pml_shard_close(&shard);
    snprintf(root, sizeof root, "%s", scratch_root);
    snprintf(rows, sizeof rows, "%s", scratch("rows"));
    snprintf(adapter_config, sizeof adapter_config, "%s", scratch("adapter_config.json"));
    snprintf(adapter_model, sizeof adapter_model, "%s", scratch("adapter_model.safetensors"));
    put_text(scratch("config.json"),
             "{\"model_type\":\"llama\",\"vocab_size\":9,\"hidden_size\":4,\"intermediate_size\":6,"
             "\"num_hidden_layers\":1,\"num_attention_heads\":2}");
    every_allocation(write_and_read, 100);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_allocation)};
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
