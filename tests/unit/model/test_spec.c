#include "scratch.h"

#include <math.h>

#include "pml/model/spec.h"

static const char llama[] =
    "{\"model_type\":\"llama\",\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4";
static const char qwen2[] =
    "{\"model_type\":\"qwen2\",\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2";

static const char mistral[] =
    "{\"model_type\":\"mistral\",\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2";

/* The fields of `base`, then `more`. */
static pml_status parse(const char *base, const char *more, pml_model_spec *spec, pml_error *e)
{
    char text[2048];
    int n = snprintf(text, sizeof text, "%s%s%s}", base, more[0] != '\0' ? "," : "", more);
    return pml_model_spec_parse(text, (size_t)n, "config.json", spec, e);
}

static pml_model_spec accepted(const char *base, const char *more)
{
    pml_model_spec spec;
    EXPECT_OK(parse(base, more, &spec, e));
    return spec;
}

static void test_llama_defaults(void **state)
{
    (void)state;
    pml_model_spec s = accepted(llama, "");
    assert_string_equal(s.family, "llama");
    assert_int_equal(s.kv_heads, 4);
    assert_int_equal(s.head_dim, 16);
    assert_int_equal(s.max_positions, 2048);
    assert_true(s.rms_eps == 1e-6F);
    assert_false(s.tied_head || s.qkv_bias || s.o_bias || s.mlp_bias);
    assert_int_equal(s.rope.type, PML_ROPE_DEFAULT);
    assert_true(s.rope.theta == 10000.0);
    assert_int_equal(s.bos, 1);
    assert_int_equal(s.pad, -1);
    assert_int_equal(s.n_eos, 0); /* LlamaConfig's own 2 is not what generate() ends at */
    assert_int_equal(s.dtype, PML_F32);
    /* embeddings and head, per layer q k v o, three of the MLP, two norms; the last norm */
    assert_int_equal(pml_model_parameters(&s),
                     2 * 6400 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64);
}

static void test_qwen2_defaults(void **state)
{
    (void)state;
    pml_model_spec s = accepted(qwen2, "\"tie_word_embeddings\":true");
    assert_true(s.qkv_bias && !s.o_bias && !s.mlp_bias && s.tied_head);
    assert_int_equal(s.max_positions, 32768);
    assert_int_equal(s.n_eos, 0);
    assert_int_equal(s.bos, -1);
    assert_int_equal(pml_model_parameters(&s),
                     6400 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64 + 64 + 2 * 32) +
                         64);
    /* There transformers does not look at these. */
    s = accepted(qwen2, "\"attention_bias\":false,\"mlp_bias\":true");
    assert_true(s.qkv_bias && !s.o_bias && !s.mlp_bias);
    char base[sizeof qwen2]; /* without its last field; null means as many as heads */
    snprintf(base, sizeof base, "%.*s", (int)(strrchr(qwen2, ',') - qwen2), qwen2);
    s = accepted(base, "\"num_key_value_heads\":null");
    assert_int_equal(s.kv_heads, 4);
}

static void test_stated_fields(void **state)
{
    (void)state;
    pml_model_spec s =
        accepted(llama, "\"head_dim\":32,\"num_key_value_heads\":2,\"attention_bias\":true,"
                        "\"mlp_bias\":true,\"rms_norm_eps\":1e-5,\"eos_token_id\":[7,8,9],"
                        "\"bos_token_id\":null,\"pad_token_id\":-1,\"torch_dtype\":\"bfloat16\","
                        "\"max_position_embeddings\":77,\"pretraining_tp\":2,\"surprise\":{}");
    assert_int_equal(s.head_dim, 32);
    assert_int_equal(s.kv_heads, 2);
    assert_true(s.qkv_bias && s.o_bias && s.mlp_bias);
    assert_true(s.rms_eps == 1e-5F);
    assert_int_equal(s.n_eos, 3);
    assert_int_equal(s.eos[2], 9);
    assert_int_equal(s.bos, -1);
    assert_int_equal(s.dtype, PML_BF16);
    assert_int_equal(s.max_positions, 77);
    s = accepted(llama, "\"eos_token_id\":-1");
    assert_int_equal(s.n_eos, 0);
    s = accepted(llama, "\"eos_token_id\":[-1,7]");
    assert_true(s.n_eos == 1 && s.eos[0] == 7);
}

static void test_missing_fields_are_named(void **state)
{
    (void)state;
    static const char *const fields[] = {"model_type",        "vocab_size",
                                         "hidden_size",       "intermediate_size",
                                         "num_hidden_layers", "num_attention_heads"};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        char text[1024], key[64], words[64];
        pml_model_spec spec;
        snprintf(text, sizeof text, "%s}", llama);
        snprintf(key, sizeof key, "\"%s\"", fields[i]);
        char *at = strstr(text, key);
        assert_non_null(at);
        at[1] = 'X'; /* another field now */
        snprintf(words, sizeof words, "%s is missing", fields[i]);
        EXPECT_FAIL(PML_INVALID, words,
                    pml_model_spec_parse(text, strlen(text), "config.json", &spec, e));
    }
}

#define BITSANDBYTES(type, twice)                                                                  \
    "\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true,"            \
    "\"bnb_4bit_quant_type\":" type ",\"bnb_4bit_use_double_quant\":" twice "}"

static void test_nf4_as_bitsandbytes_says_it(void **state)
{
    (void)state;
    assert_true(accepted(llama, BITSANDBYTES("\"nf4\"", "true")).nf4);
    assert_true(accepted(llama,
                         "\"quantization_config\":{\"load_in_4bit\":true,"
                         "\"bnb_4bit_quant_type\":\"nf4\",\"bnb_4bit_use_double_quant\":true}")
                    .nf4);
    assert_false(accepted(llama, "\"quantization_config\":null").nf4);
}

static void test_other_mathematics_is_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *base, *more, *name, *value;
    } cases[] = {
        {llama, "\"hidden_act\":\"gelu\"", "hidden_act", "\"gelu\""},
        {llama, "\"attention_dropout\":0.1", "attention_dropout", "0.1"},
        {llama, "\"partial_rotary_factor\":0.5", "partial_rotary_factor", "0.5"},
        {llama, "\"quantization_config\":{\"bits\":4}", "quantization_config", "bits"},
        {llama, "\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4}",
         "quantization_config.quant_method", "\"gptq\""},
        {llama, "\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true}",
         "quantization_config.load_in_4bit", "supported: true"},
        {llama, BITSANDBYTES("\"fp4\"", "true"), "quantization_config.bnb_4bit_quant_type",
         "\"fp4\""},
        {llama, BITSANDBYTES("\"nf4\"", "false"), "quantization_config.bnb_4bit_use_double_quant",
         "false"},
        {llama, "\"head_dim\":15", "head_dim", "15"},
        {llama, "\"rope_scaling\":{\"type\":\"su\",\"factor\":2.0}", "rope_scaling.type", "\"su\""},
        {llama, "\"rope_scaling\":{\"rope_type\":\"longrope\",\"factor\":2.0}",
         "rope_scaling.rope_type", "\"longrope\""},
        {llama, "\"rope_parameters\":{\"rope_type\":\"default\",\"partial_rotary_factor\":0.5}",
         "rope_parameters.partial_rotary_factor", "0.5"},
        {qwen2, "\"rope_parameters\":{\"full_attention\":{\"rope_theta\":1e4}}",
         "rope_parameters.full_attention", "rope_theta"},
        {qwen2, "\"layer_types\":[\"full_attention\",\"chunked_attention\"]", "layer_types",
         "chunked_attention"},
        {llama, "\"torch_dtype\":\"float8_e4m3fn\"", "torch_dtype", "float8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_model_spec spec;
        EXPECT_FAIL(PML_UNSUPPORTED, cases[i].name, parse(cases[i].base, cases[i].more, &spec, e));
        EXPECT_FAIL(PML_UNSUPPORTED, cases[i].value, parse(cases[i].base, cases[i].more, &spec, e));
    }
    pml_model_spec spec;
    EXPECT_FAIL(PML_UNSUPPORTED, "llama, mistral, qwen2, qwen3",
                pml_model_spec_parse("{\"model_type\":\"gemma2\"}", 23, "c", &spec, e));
}

static void test_windows_not_in_force_are_ignored(void **state)
{
    (void)state;
    static const struct {
        const char *base, *more;
    } cases[] = {
        {qwen2, "\"use_sliding_window\":false,\"sliding_window\":16,\"max_window_layers\":0"},
        {qwen2, "\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":0"},
        {qwen2, "\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":2"},
        {qwen2,
         "\"use_sliding_window\":true,\"layer_types\":[\"full_attention\",\"full_attention\"]"},
        {llama, "\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":0"},
        {mistral, "\"sliding_window\":null"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_model_spec s = accepted(cases[i].base, cases[i].more);
        assert_true(pml_layer_window(&s, 0) == 0 && pml_layer_window(&s, 1) == 0);
    }
}

static void test_windows_in_force(void **state)
{
    (void)state;
    static const struct {
        const char *base, *more;
        int first, second;
    } cases[] = {
        {mistral, "", 4096, 4096},
        {mistral, "\"sliding_window\":7,\"use_sliding_window\":false", 7, 7},
        {mistral, "\"sliding_window\":7,\"layer_types\":null", 7, 7},
        {mistral,
         "\"sliding_window\":7,\"max_window_layers\":0,"
         "\"layer_types\":[\"full_attention\",\"sliding_attention\"]",
         0, 7},
        {qwen2, "\"use_sliding_window\":true,\"max_window_layers\":1", 0, 4096},
        {qwen2, "\"use_sliding_window\":true,\"max_window_layers\":0,\"sliding_window\":9", 9, 9},
        {qwen2,
         "\"use_sliding_window\":true,\"sliding_window\":9,\"max_window_layers\":2,"
         "\"layer_types\":[\"sliding_attention\",\"full_attention\"]",
         9, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_model_spec s = accepted(cases[i].base, cases[i].more);
        assert_int_equal(pml_layer_window(&s, 0), cases[i].first);
        assert_int_equal(pml_layer_window(&s, 1), cases[i].second);
    }
    pml_model_spec spec;
    EXPECT_FAIL(
        PML_INVALID, "there is no window",
        parse(qwen2, "\"layer_types\":[\"full_attention\",\"sliding_attention\"]", &spec, e));
    EXPECT_FAIL(PML_INVALID, "layer_types has 1",
                parse(qwen2, "\"layer_types\":[\"full_attention\"]", &spec, e));
    EXPECT_FAIL(PML_INVALID, "sliding_window", parse(mistral, "\"sliding_window\":0", &spec, e));
}

static void test_qwen3(void **state)
{
    (void)state;
    char base[sizeof qwen2];
    strcpy(base, qwen2);
    *strstr(base, "qwen2\"") = 'Q'; /* not a family */
    pml_model_spec spec;
    EXPECT_FAIL(PML_UNSUPPORTED, "Qwen2", parse(base, "", &spec, e));
    memcpy(strstr(base, "Qwen2"), "qwen3", 5);
    spec = accepted(base, "");
    assert_true(spec.qk_norm && !spec.qkv_bias && !spec.o_bias && !spec.mlp_bias);
    assert_int_equal(spec.head_dim, 128);
    assert_int_equal(pml_model_parameters(&spec),
                     2 * 6400 + 2 * (64 * 128 * (4 + 2 * 2 + 4) + 3 * 64 * 96 + 2 * 64 + 2 * 128) +
                         64);
    spec = accepted(base, "\"attention_bias\":true,\"mlp_bias\":true,\"head_dim\":24");
    assert_true(spec.qkv_bias && spec.o_bias && !spec.mlp_bias);
    assert_int_equal(spec.head_dim, 24);
}

static void test_rope_types(void **state)
{
    (void)state;
    pml_rope_spec r = accepted(llama, "\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}").rope;
    assert_true(r.type == PML_ROPE_LINEAR && r.factor == 2);
    r = accepted(llama, "\"rope_parameters\":{\"rope_type\":\"dynamic\",\"factor\":3.5}").rope;
    assert_true(r.type == PML_ROPE_DYNAMIC && r.factor == 3.5);
    r = accepted(llama, "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,"
                        "\"original_max_position_embeddings\":512}")
            .rope;
    assert_true(r.type == PML_ROPE_YARN && r.beta_fast == 32 && r.beta_slow == 1 && r.truncate);
    assert_int_equal(r.original_max_positions, 512);
    assert_true(fabs(r.attention_factor - (0.1 * log(4) + 1)) < 1e-15);
    r = accepted(llama, "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":null,\"truncate\":false,"
                        "\"original_max_position_embeddings\":512,\"mscale\":0.7,"
                        "\"mscale_all_dim\":1.3,\"beta_fast\":0,\"beta_slow\":2}")
            .rope;
    assert_true(r.factor == 4 && !r.truncate && r.beta_fast == 32 && r.beta_slow == 2);
    assert_true(fabs(r.attention_factor - (0.07 * log(4) + 1) / (0.13 * log(4) + 1)) < 1e-15);
    r = accepted(llama, "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,"
                        "\"attention_factor\":0.25,\"mscale\":0.7,\"mscale_all_dim\":1.3}")
            .rope;
    assert_true(r.attention_factor == 0.25 && r.original_max_positions == 2048);
    pml_model_spec spec;
    EXPECT_FAIL(PML_INVALID, "rope_scaling.factor is missing",
                parse(llama, "\"rope_scaling\":{\"type\":\"yarn\"}", &spec, e));
    EXPECT_FAIL(PML_INVALID, "rope_scaling.factor",
                parse(llama, "\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}", &spec, e));
}

static void test_wrong_values(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"\"num_key_value_heads\":3", "num_key_value_heads = 3"},
        {"\"num_key_value_heads\":0", "num_key_value_heads"},
        {"\"head_dim\":\"16\"", "head_dim"},
        {"\"rms_norm_eps\":\"small\"", "rms_norm_eps"},
        {"\"rope_theta\":-1", "rope_theta"},
        {"\"rope_scaling\":7", "rope_scaling"},
        {"\"rope_scaling\":{\"rope_type\":7}", "rope_scaling.rope_type"},
        {"\"tie_word_embeddings\":1", "tie_word_embeddings"},
        {"\"eos_token_id\":\"</s>\"", "eos_token_id"},
        {"\"eos_token_id\":[7,-2]", "eos_token_id"},
        {"\"eos_token_id\":[1,2,3,4,5,6,7,8,9]", "eos_token_id"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0}",
         "rope_scaling.high_freq_factor is missing"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":4.0,"
         "\"high_freq_factor\":1.0}",
         "high_freq_factor"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_model_spec spec;
        EXPECT_FAIL(PML_INVALID, cases[i][1], parse(llama, cases[i][0], &spec, e));
    }
    pml_model_spec spec;
    char odd[512];
    snprintf(odd, sizeof odd, "%s}", llama);
    memcpy(strstr(odd, "\"num_attention_heads\":4") + 22, "5", 1);
    EXPECT_FAIL(PML_INVALID, "hidden_size = 64 is not a multiple",
                pml_model_spec_parse(odd, strlen(odd), "c", &spec, e));
    EXPECT_FAIL(PML_INVALID, "object", pml_model_spec_parse("[]", 2, "c", &spec, e));
}

/* Both ways of stating rope give the same spec. */
static void test_rope_both_ways(void **state)
{
    (void)state;
    static const char *const same[] = {
        "\"rope_theta\":500000.0,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":32.0,"
        "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
        "\"original_max_position_embeddings\":8192}",
        "\"rope_theta\":500000.0,\"rope_scaling\":{\"type\":\"llama3\",\"factor\":32,"
        "\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":8192}",
        "\"rope_parameters\":{\"rope_type\":\"llama3\",\"rope_theta\":500000.0,\"factor\":32.0,"
        "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
        "\"original_max_position_embeddings\":8192}",
        "\"original_max_position_embeddings\":8192,\"rope_scaling\":null,\"rope_theta\":1,"
        "\"rope_parameters\":{\"rope_type\":\"llama3\",\"rope_theta\":5e5,\"factor\":32.0,"
        "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
        "\"original_max_position_embeddings\":11}",
        "\"max_position_embeddings\":8192,\"rope_parameters\":{\"rope_type\":\"llama3\","
        "\"rope_theta\":5e5,\"factor\":32.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0}",
    };
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        pml_rope_spec rope = accepted(llama, same[i]).rope;
        assert_int_equal(rope.type, PML_ROPE_LLAMA3);
        assert_true(rope.theta == 500000.0 && rope.factor == 32.0);
        assert_true(rope.low_freq_factor == 1.0 && rope.high_freq_factor == 4.0);
        assert_int_equal(rope.original_max_positions, 8192);
    }
    assert_true(accepted(qwen2, "\"rope_theta\":1000000.0,\"rope_scaling\":{}").rope.theta == 1e6);
    assert_true(accepted(qwen2, "\"rope_parameters\":{\"rope_theta\":1e6}").rope.theta == 1e6);
    assert_true(accepted(qwen2, "\"rope_scaling\":{\"rope_type\":\"default\"},"
                                "\"rope_theta\":7e4")
                    .rope.theta == 7e4);
}

/* What config.json says of a published model of each family, with fields that decide nothing, and
 * the number of parameters that its files have. */
static void test_published_models(void **state)
{
    (void)state;
    static const struct {
        const char *name, *config;
        int64_t parameters;
    } models[] = {
        {"Llama-2-7b",
         "{\"model_type\":\"llama\",\"hidden_size\":4096,\"intermediate_size\":11008,"
         "\"num_hidden_layers\":32,\"num_attention_heads\":32,\"num_key_value_heads\":32,"
         "\"vocab_size\":32000,\"rms_norm_eps\":1e-05,\"rope_scaling\":null,\"pretraining_tp\":1,"
         "\"tie_word_embeddings\":false,\"torch_dtype\":\"float16\",\"hidden_act\":\"silu\"}",
         6738415616},
        {"Llama-3.2-1B",
         "{\"model_type\":\"llama\",\"hidden_size\":2048,\"intermediate_size\":8192,\"head_dim\":"
         "64,"
         "\"num_hidden_layers\":16,\"num_attention_heads\":32,\"num_key_value_heads\":8,"
         "\"vocab_size\":128256,\"rms_norm_eps\":1e-05,\"rope_theta\":500000.0,\"rope_scaling\":"
         "{\"factor\":32.0,\"high_freq_factor\":4.0,\"low_freq_factor\":1.0,"
         "\"original_max_position_embeddings\":8192,\"rope_type\":\"llama3\"},"
         "\"max_position_embeddings\":131072,\"eos_token_id\":[128001,128008,128009],"
         "\"tie_word_embeddings\":true,\"attention_dropout\":0.0,\"mlp_bias\":false}",
         1235814400},
        {"SmolLM2-135M",
         "{\"model_type\":\"llama\",\"hidden_size\":576,\"intermediate_size\":1536,"
         "\"num_hidden_layers\":30,\"num_attention_heads\":9,\"num_key_value_heads\":3,"
         "\"vocab_size\":49152,\"is_llama_config\":true,\"rope_interleaved\":false,"
         "\"rope_theta\":100000,\"tie_word_embeddings\":true,\"transformers.js_config\":"
         "{\"kv_cache_dtype\":{\"fp16\":\"float16\"}},\"max_position_embeddings\":8192}",
         134515008},
        {"Mistral-7B-v0.1",
         "{\"model_type\":\"mistral\",\"hidden_size\":4096,\"intermediate_size\":14336,"
         "\"num_hidden_layers\":32,\"num_attention_heads\":32,\"num_key_value_heads\":8,"
         "\"vocab_size\":32000,\"sliding_window\":4096,\"tie_word_embeddings\":false,"
         "\"max_position_embeddings\":32768,\"rope_theta\":10000.0}",
         7241732096},
        {"Qwen2.5-0.5B",
         "{\"model_type\":\"qwen2\",\"hidden_size\":896,\"intermediate_size\":4864,"
         "\"num_hidden_layers\":24,\"num_attention_heads\":14,\"num_key_value_heads\":2,"
         "\"vocab_size\":151936,\"max_window_layers\":21,\"sliding_window\":32768,"
         "\"use_sliding_window\":false,\"use_mrope\":false,\"tie_word_embeddings\":true,"
         "\"rope_theta\":1000000.0,\"max_position_embeddings\":32768}",
         494032768},
        {"Qwen3-0.6B",
         "{\"model_type\":\"qwen3\",\"hidden_size\":1024,\"intermediate_size\":3072,"
         "\"head_dim\":128,\"num_hidden_layers\":28,\"num_attention_heads\":16,"
         "\"num_key_value_heads\":8,\"vocab_size\":151936,\"max_window_layers\":28,"
         "\"sliding_window\":null,\"use_sliding_window\":false,\"attention_bias\":false,"
         "\"tie_word_embeddings\":true,\"rope_theta\":1000000,\"max_position_embeddings\":40960}",
         596049920},
    };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        pml_model_spec spec;
        EXPECT_OK(pml_model_spec_parse(models[i].config, strlen(models[i].config), models[i].name,
                                       &spec, e));
        if (pml_model_parameters(&spec) != models[i].parameters)
            fail_msg("%s has %lld parameters, not %lld", models[i].name,
                     (long long)models[i].parameters, (long long)pml_model_parameters(&spec));
        assert_true((spec.window > 0) == (strcmp(models[i].name, "Mistral-7B-v0.1") == 0));
    }
}

static void test_folder(void **state)
{
    (void)state;
    pml_model_spec spec;
    char text[1024];
    EXPECT_FAIL(PML_NOT_FOUND, "config.json", pml_model_spec_load(scratch("none"), &spec, e));
    EXPECT_OK(pml_folder_make(scratch("model"), e));
    EXPECT_FAIL(PML_NOT_FOUND, "config.json", pml_model_spec_load(scratch("model"), &spec, e));
    snprintf(text, sizeof text, "%s,\"eos_token_id\":5}", llama);
    put_text(scratch("model/config.json"), text);
    EXPECT_OK(pml_model_spec_load(scratch("model"), &spec, e));
    assert_int_equal(spec.eos[0], 5);
    put_text(scratch("model/generation_config.json"), "{\"eos_token_id\":[11,12]}");
    EXPECT_OK(pml_model_spec_load(scratch("model"), &spec, e));
    assert_int_equal(spec.n_eos, 2);
    assert_int_equal(spec.eos[1], 12);
    put_text(scratch("model/generation_config.json"), "{\"eos_token_id\":null}");
    EXPECT_OK(pml_model_spec_load(scratch("model"), &spec, e));
    assert_int_equal(spec.n_eos, 0);
    put_text(scratch("model/generation_config.json"), "{\"temperature\":0.7}");
    EXPECT_OK(pml_model_spec_load(scratch("model"), &spec, e));
    assert_int_equal(spec.n_eos, 0);
    put_text(scratch("model/generation_config.json"), "{");
    EXPECT_FAIL(PML_INVALID, "generation_config.json",
                pml_model_spec_load(scratch("model"), &spec, e));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama_defaults),
        cmocka_unit_test(test_qwen2_defaults),
        cmocka_unit_test(test_stated_fields),
        cmocka_unit_test(test_missing_fields_are_named),
        cmocka_unit_test(test_nf4_as_bitsandbytes_says_it),
        cmocka_unit_test(test_other_mathematics_is_refused_by_name),
        cmocka_unit_test(test_windows_not_in_force_are_ignored),
        cmocka_unit_test(test_windows_in_force),
        cmocka_unit_test(test_qwen3),
        cmocka_unit_test(test_rope_types),
        cmocka_unit_test(test_wrong_values),
        cmocka_unit_test(test_rope_both_ways),
        cmocka_unit_test(test_published_models),
        cmocka_unit_test(test_folder),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
