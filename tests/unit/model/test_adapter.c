#include "scratch.h"

#include "pml/model/adapter.h"

static const pml_model_spec spec = {.vocab = 50,
                                    .hidden = 8,
                                    .layers = 2,
                                    .heads = 4,
                                    .kv_heads = 2,
                                    .head_dim = 3,
                                    .intermediate = 10};

/* A config that is accepted, with `more` fields at the end. */
static pml_status parse(const char *targets, const char *more, pml_adapter_config *config,
                        pml_error *e)
{
    char text[1024];
    int n = snprintf(text, sizeof text,
                     "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":%s%s%s}",
                     targets, more[0] != '\0' ? "," : "", more);
    return pml_adapter_config_parse(text, (size_t)n, "adapter_config.json", config, e);
}

static void test_targets(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint32_t targets; /* 0: refused */
    } cases[] = {
        {"[\"q_proj\",\"v_proj\"]", PML_TARGET_Q | PML_TARGET_V},
        {"[\"self_attn.k_proj\",\"mlp.down_proj\"]", PML_TARGET_K | PML_TARGET_DOWN},
        {"\"all-linear\"", PML_TARGET_ALL_LINEAR},
        {"[\"lm_head\"]", 0},
        {"[7]", 0},
        {"[]", 0},
        {"7", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_adapter_config config;
        if (cases[i].targets == 0) {
            EXPECT_FAIL(PML_UNSUPPORTED, "target_modules", parse(cases[i].text, "", &config, e));
        } else {
            EXPECT_OK(parse(cases[i].text, "", &config, e));
            assert_int_equal(config.targets, cases[i].targets);
        }
    }
    pml_adapter_config config;
    EXPECT_FAIL(PML_INVALID, "target_modules is missing", parse("null", "", &config, e));
    /* What a pattern or a path means, the tensors beside it say. */
    static const char *const open_ended[] = {"\".*(q|v)_proj\"",
                                             "[\"q_proj\",\"model.layers.0.self_attn.v_proj\"]",
                                             "[\"layers.1.mlp.up_proj\"]"};
    for (size_t i = 0; i < sizeof open_ended / sizeof *open_ended; i++) {
        EXPECT_OK(parse(open_ended[i], "", &config, e));
        assert_int_equal(config.targets, 0);
    }
}

static void test_variants_are_refused_by_name(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"use_dora", "true"},
        {"bias", "\"all\""},
        {"rank_pattern", "{\"(q|k)_proj\":8}"},
        {"rank_pattern", "{\"q_proj\":0}"},
        {"alpha_pattern", "{\"q_proj\":\"8\"}"},
        {"alpha_pattern", "[1]"},
        {"modules_to_save", "[\"lm_head\",\"q_proj\"]"},
        {"modules_to_save", "[\"layers.0.input_layernorm\"]"},
        {"layers_to_transform", "[0,-1]"},
        {"layers_to_transform", "\"0\""},
        {"fan_in_fan_out", "true"},
        {"lora_bias", "true"},
        {"target_parameters", "[\"x\"]"},
        {"trainable_token_indices", "[1]"},
        {"velora_config", "{\"a\":1}"},
        {"init_lora_weights", "\"pissa\""},
        {"init_lora_weights", "\"olora\""},
        {"task_type", "\"SEQ_CLS\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_adapter_config config;
        char field[128], words[128];
        snprintf(field, sizeof field, "\"%s\":%s", cases[i][0], cases[i][1]);
        snprintf(words, sizeof words, "%s = %s", cases[i][0], cases[i][1]);
        EXPECT_FAIL(PML_UNSUPPORTED, words, parse("[\"q_proj\"]", field, &config, e));
    }
}

static void test_silent_fields_are_accepted(void **state)
{
    (void)state;
    pml_adapter_config config;
    EXPECT_OK(parse("[\"q_proj\"]",
                    "\"use_dora\":false,\"rank_pattern\":{},\"modules_to_save\":null,"
                    "\"bias\":\"none\",\"init_lora_weights\":\"gaussian\",\"loftq_config\":{},"
                    "\"qalora_group_size\":16,\"megatron_core\":\"megatron.core\","
                    "\"task_type\":\"CAUSAL_LM\",\"lora_dropout\":0.05,"
                    "\"base_model_name_or_path\":\"org/model\",\"inference_mode\":true",
                    &config, e));
    assert_int_equal(config.rank, 4);
    assert_true(config.alpha == 8 && config.dropout == 0.05);
    assert_string_equal(config.base_name, "org/model");
    /* A path longer than there is room for is not known; anything but a text is still refused. */
    char longer[700];
    snprintf(longer, sizeof longer, "\"base_model_name_or_path\":\"%0512d\"", 0);
    EXPECT_OK(parse("[\"q_proj\"]", longer, &config, e));
    assert_string_equal(config.base_name, "");
    EXPECT_FAIL(PML_INVALID, "base_model_name_or_path",
                parse("[\"q_proj\"]", "\"base_model_name_or_path\":7", &config, e));
    EXPECT_OK(parse("[\"q_proj\"]", "\"init_lora_weights\":false", &config, e));
    EXPECT_FAIL(PML_INVALID, "lora_dropout",
                parse("[\"q_proj\"]", "\"lora_dropout\":1.5", &config, e));
    EXPECT_FAIL(PML_UNSUPPORTED, "peft_type",
                pml_adapter_config_parse("{\"peft_type\":\"IA3\"}", 19, "c", &config, e));
    EXPECT_FAIL(PML_INVALID, "object", pml_adapter_config_parse("[]", 2, "c", &config, e));
}

static void test_targets_describe_themselves(void **state)
{
    (void)state;
    int64_t out = 0, in = 0;
    char name[PML_ADAPTER_NAME_MAX];
    for (int i = 0; i < PML_TARGET_COUNT; i++)
        assert_int_equal(pml_target_from_name(pml_target_name((pml_target)(1U << i))), 1U << i);
    assert_null(pml_target_name(PML_TARGET_ALL_LINEAR));
    assert_null(pml_target_module((pml_target)0));
    assert_int_equal(pml_target_from_name("lm_head"), 0);
    static const int64_t shapes[PML_TARGET_COUNT][2] = {{12, 8}, {6, 8},  {6, 8}, {8, 12},
                                                        {10, 8}, {10, 8}, {8, 10}};
    for (int i = 0; i < PML_TARGET_COUNT; i++) {
        pml_target_shape(&spec, (pml_target)(1U << i), &out, &in);
        assert_int_equal(out, shapes[i][0]);
        assert_int_equal(in, shapes[i][1]);
    }
    pml_adapter_tensor_name(name, sizeof name, 3, PML_TARGET_DOWN, 'B');
    assert_string_equal(name, "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight");
}

/* ---- folders ---- */

/* An adapter on q and down as `config` says, for `layers` layers; `extra` is one more tensor. */
static void write_adapter(const char *folder, const pml_adapter_config *config, int32_t layers,
                          const char *extra)
{
    char path[512];
    pml_safetensors_writer *writer = NULL;
    size_t total = 0;
    EXPECT_OK(pml_folder_make(folder, e));
    EXPECT_OK(pml_path_join(path, sizeof path, folder, "adapter_config.json", e));
    EXPECT_OK(pml_adapter_config_write(path, config, NULL, 0, e));
    EXPECT_OK(pml_path_join(path, sizeof path, folder, "adapter_model.safetensors", e));
    EXPECT_OK(pml_safetensors_writer_new(path, 0600, &writer, e));
    EXPECT_OK(pml_safetensors_writer_metadata(writer, "format", "pt", e));
    for (int32_t layer = 0; layer < layers; layer++)
        for (int i = 0; i < PML_TARGET_COUNT; i++) {
            pml_target target = (pml_target)(1U << i);
            if (!(config->targets & (uint32_t)target))
                continue;
            char name[PML_ADAPTER_NAME_MAX];
            int64_t out, in;
            pml_target_shape(&spec, target, &out, &in);
            int64_t a[] = {config->rank, in}, b[] = {out, config->rank};
            pml_adapter_tensor_name(name, sizeof name, layer, target, 'A');
            EXPECT_OK(pml_safetensors_writer_add(writer, name, PML_F32, a, 2, e));
            pml_adapter_tensor_name(name, sizeof name, layer, target, 'B');
            EXPECT_OK(pml_safetensors_writer_add(writer, name, PML_F32, b, 2, e));
            total += (size_t)(config->rank * (in + out)) * sizeof(float);
        }
    if (extra != NULL) {
        EXPECT_OK(pml_safetensors_writer_add(writer, extra, PML_F32, (int64_t[]){1}, 1, e));
        total += sizeof(float);
    }
    void *zeros = calloc(1, total);
    assert_non_null(zeros);
    EXPECT_OK(pml_safetensors_writer_write(writer, zeros, total, e));
    EXPECT_OK(pml_safetensors_writer_finish(writer, e));
    pml_safetensors_writer_destroy(&writer);
    free(zeros);
}

static const pml_adapter_config written = {.rank = 4,
                                           .alpha = 16,
                                           .dropout = 0.25,
                                           .targets = PML_TARGET_Q | PML_TARGET_DOWN,
                                           .base_name = "org/base"};

static void test_folder_round_trip(void **state)
{
    (void)state;
    pml_adapter_config config;
    pml_safetensors *file = NULL;
    const pml_stored *tensor;
    write_adapter(scratch("good"), &written, 2, NULL);
    EXPECT_OK(pml_adapter_open(scratch("good"), &spec, &config, &file, e));
    assert_int_equal(config.rank, 4);
    assert_true(config.alpha == 16 && config.dropout == 0.25);
    assert_int_equal(config.targets, written.targets);
    assert_string_equal(config.base_name, "org/base");
    assert_int_equal(pml_safetensors_count(file), 8);
    EXPECT_OK(pml_safetensors_need(
        file, "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight", 4, 10, &tensor, e));
    pml_safetensors_close(&file);

    /* PEFT declares an int: 16, not 16.0; a fraction stays one. */
    char *text = NULL;
    size_t size;
    EXPECT_OK(pml_file_read(scratch("good/adapter_config.json"), 10000, false, &text, &size, e));
    assert_non_null(strstr(text, "\"lora_alpha\": 16,"));
    free(text);
    pml_adapter_config half = written;
    half.alpha = 0.5;
    EXPECT_OK(pml_adapter_config_write(scratch("good/adapter_config.json"), &half, NULL, 0, e));
    EXPECT_OK(pml_adapter_config_load(scratch("good"), &config, e));
    assert_true(config.alpha == 0.5);
}

static void test_folder_and_model_must_agree(void **state)
{
    (void)state;
    pml_adapter_config config, other = written;
    pml_safetensors *file = NULL;
    EXPECT_FAIL(PML_NOT_FOUND, "adapter_config.json",
                pml_adapter_open(scratch("none"), &spec, &config, &file, e));
    write_adapter(scratch("one"), &written, 1, NULL);
    EXPECT_FAIL(PML_NOT_FOUND, "layers.1.self_attn.q_proj.lora_A",
                pml_adapter_open(scratch("one"), &spec, &config, &file, e));
    assert_null(file);
    write_adapter(scratch("three"), &written, 3, NULL);
    EXPECT_FAIL(PML_INVALID, "layers",
                pml_adapter_open(scratch("three"), &spec, &config, &file, e));
    write_adapter(scratch("extra"), &written, 2, "base_model.model.lm_head.lora_A.weight");
    EXPECT_FAIL(PML_INVALID, "tensors",
                pml_adapter_open(scratch("extra"), &spec, &config, &file, e));
    other.rank = 5;
    write_adapter(scratch("rank"), &written, 2, NULL);
    EXPECT_OK(pml_adapter_config_write(scratch("rank/adapter_config.json"), &other, NULL, 0, e));
    EXPECT_FAIL(PML_INVALID, "shape", pml_adapter_open(scratch("rank"), &spec, &config, &file, e));
    assert_null(file);
}

/* Rank and alpha by layer and projection, modules held whole: written, read, and by what name. */
static void test_mixed_round_trip(void **state)
{
    (void)state;
    static const pml_lora_module mixed[2 * PML_TARGET_COUNT] = {
        [0] = {4, 16}, [1] = {2, 16}, [6] = {4, 8}, [7] = {4, 16}, [8] = {2, 16}, [13] = {4, 16}};
    pml_adapter_config config = written;
    config.targets |= PML_TARGET_K;
    config.rslora = true;
    config.saved = PML_SAVED_HEAD | PML_SAVED_NORM | PML_SAVED_INPUT_NORM;
    EXPECT_OK(pml_folder_make(scratch("mixed"), e));
    EXPECT_OK(pml_adapter_config_write(scratch("mixed/adapter_config.json"), &config, mixed, 2, e));
    pml_adapter_config back;
    EXPECT_OK(pml_adapter_config_load(scratch("mixed"), &back, e));
    assert_true(back.rslora && back.saved == config.saved && back.targets == config.targets);
    assert_int_equal(back.n_layers, 0);
    assert_int_equal(back.n_ranks, 1);
    assert_string_equal(back.ranks[0].key, "k_proj");
    assert_int_equal(back.n_alphas, 1);
    assert_string_equal(back.alphas[0].key, "model.layers.0.mlp.down_proj");
    assert_true(back.alphas[0].value == 8);

    /* One projection fewer: paths. All of a layer fewer: its number. */
    pml_lora_module fewer[2 * PML_TARGET_COUNT];
    memcpy(fewer, mixed, sizeof mixed);
    fewer[8].rank = 0;
    EXPECT_OK(pml_adapter_config_write(scratch("mixed/adapter_config.json"), &config, fewer, 2, e));
    EXPECT_OK(pml_adapter_config_load(scratch("mixed"), &back, e));
    assert_int_equal(back.targets, 0);
    fewer[7].rank = fewer[13].rank = 0;
    EXPECT_OK(pml_adapter_config_write(scratch("mixed/adapter_config.json"), &config, fewer, 2, e));
    EXPECT_OK(pml_adapter_config_load(scratch("mixed"), &back, e));
    assert_true(back.targets == config.targets && back.n_layers == 1 && back.layers[0] == 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_targets),
        cmocka_unit_test(test_variants_are_refused_by_name),
        cmocka_unit_test(test_silent_fields_are_accepted),
        cmocka_unit_test(test_targets_describe_themselves),
        cmocka_unit_test(test_folder_round_trip),
        cmocka_unit_test(test_mixed_round_trip),
        cmocka_unit_test(test_folder_and_model_must_agree),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
