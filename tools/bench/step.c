/* Speed of whole training steps in one process, without workers, sockets or data preparation.
 *
 *   bench_step [full|lora] [steps] [threads] [memory limit, MiB]
 *
 * A random Llama of 8 M parameters (8 layers, hidden 256, intermediate 704, 8 heads, 4 of keys and
 * values, vocabulary 4096), 8 rows of 256 tokens a step, float32. The best peer on the reference
 * machine, 2 threads: 3,955 tokens/s full, 4,996 LoRA with r = 16 on all linear layers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/philox.h"
#include "pml/model/safetensors.h"
#include "pml/train/stepper.h"
#include "pml_op/cpu.h"

enum { VOCAB = 4096, HIDDEN = 256, INTER = 704, LAYERS = 8, KV = 128, ROWS = 8, LENGTH = 256 };
enum { TOKENS = ROWS * LENGTH, LABELS = ROWS * (LENGTH - 1), MAX_TENSORS = 2 + 9 * LAYERS };

static const char config_json[] =
    "{\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"], \"vocab_size\": 4096,"
    "\"hidden_size\": 256, \"intermediate_size\": 704, \"num_hidden_layers\": 8,"
    "\"num_attention_heads\": 8, \"num_key_value_heads\": 4, \"max_position_embeddings\": 512,"
    "\"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\","
    "\"tie_word_embeddings\": true, \"eos_token_id\": 2, \"dtype\": \"float32\"}";

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error must = PML_ERROR_INIT, *err = &must;                                             \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "bench_step: %s\n", must.message);                                     \
            exit(EXIT_FAILURE);                                                                    \
        }                                                                                          \
    } while (0)

typedef struct shape {
    char name[96];
    int64_t dims[2];
    int n_dims;
} shape;

static int list_tensors(shape *list)
{
    static const struct {
        const char *name;
        int64_t rows, cols; /* cols 0: a vector */
    } in_layer[] = {{"input_layernorm", HIDDEN, 0},       {"post_attention_layernorm", HIDDEN, 0},
                    {"self_attn.q_proj", HIDDEN, HIDDEN}, {"self_attn.k_proj", KV, HIDDEN},
                    {"self_attn.v_proj", KV, HIDDEN},     {"self_attn.o_proj", HIDDEN, HIDDEN},
                    {"mlp.gate_proj", INTER, HIDDEN},     {"mlp.up_proj", INTER, HIDDEN},
                    {"mlp.down_proj", HIDDEN, INTER}};
    int n = 0;
    list[n++] = (shape){"model.embed_tokens.weight", {VOCAB, HIDDEN}, 2};
    list[n++] = (shape){"model.norm.weight", {HIDDEN, 0}, 1};
    for (int l = 0; l < LAYERS; l++)
        for (size_t i = 0; i < sizeof in_layer / sizeof *in_layer; i++, n++) {
            snprintf(list[n].name, sizeof list[n].name, "model.layers.%d.%s.weight", l,
                     in_layer[i].name);
            list[n].dims[0] = in_layer[i].rows;
            list[n].dims[1] = in_layer[i].cols;
            list[n].n_dims = in_layer[i].cols > 0 ? 2 : 1;
        }
    return n;
}

/* config.json and model.safetensors with random weights of a usual size. */
static void write_model(const char *folder)
{
    char path[256];
    shape list[MAX_TENSORS];
    int n = list_tensors(list);
    pml_safetensors_writer *w;
    snprintf(path, sizeof path, "%s/config.json", folder);
    MUST(pml_file_write(path, config_json, sizeof config_json - 1, 0600, err));
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    MUST(pml_safetensors_writer_new(path, 0600, &w, err));
    for (int i = 0; i < n; i++)
        MUST(pml_safetensors_writer_add(w, list[i].name, PML_F32, list[i].dims, list[i].n_dims,
                                        err));
    for (int i = 0; i < n; i++) {
        size_t floats =
            (size_t)list[i].dims[0] * (size_t)(list[i].n_dims == 2 ? list[i].dims[1] : 1);
        float *values = malloc(floats * sizeof *values);
        if (values == NULL)
            abort();
        for (size_t e = 0; e < floats; e++) {
            pml_philox random = pml_philox_at(1, (uint64_t)i, PML_PURPOSE_SAMPLE, e);
            values[e] = list[i].n_dims == 1 ? 1.0F : 0.07F * (pml_uniform(random.word[0]) - 0.5F);
        }
        MUST(pml_safetensors_writer_write(w, values, floats * sizeof *values, err));
        free(values);
    }
    MUST(pml_safetensors_writer_finish(w, err));
    pml_safetensors_writer_destroy(&w);
}

/* Rows of random ids, every token but each row's last with a label. */
static pml_batch make_batch(void)
{
    static int32_t ids[TOKENS], positions[TOKENS], bounds[ROWS + 1], rows[LABELS], labels[LABELS];
    int32_t n = 0;
    for (int32_t t = 0; t < TOKENS; t++) {
        ids[t] = (int32_t)(pml_philox_at(2, 0, PML_PURPOSE_SAMPLE, (uint64_t)t).word[0] % VOCAB);
        positions[t] = t % LENGTH;
    }
    for (int32_t t = 0; t < TOKENS; t++)
        if (positions[t] < LENGTH - 1) {
            rows[n] = t;
            labels[n++] = ids[t + 1];
        }
    for (int32_t r = 0; r <= ROWS; r++)
        bounds[r] = r * LENGTH;
    return (pml_batch){.n_tokens = TOKENS,
                       .n_docs = ROWS,
                       .n_labels = n,
                       .max_doc = LENGTH,
                       .ids = ids,
                       .positions = positions,
                       .cu_seqlens = bounds,
                       .label_rows = rows,
                       .labels = labels};
}

static void measure(const char *folder, pml_method method, int steps, int threads, size_t limit)
{
    pml_train_config config = {.method = method,
                               .dtype = PML_F32,
                               .lora_rank = 16,
                               .lora_alpha = 16,
                               .lora_targets = PML_TARGET_ALL_LINEAR,
                               .max_steps = 1000,
                               .learning_rate = 1e-4,
                               .beta1 = 0.9,
                               .beta2 = 0.999,
                               .epsilon = 1e-8,
                               .max_grad_norm = 1,
                               .batch_size = ROWS,
                               .accumulation = 1,
                               .max_length = LENGTH,
                               .memory_limit = limit};
    snprintf(config.model, sizeof config.model, "%s", folder);
    pml_batch batch = make_batch();
    const pml_stepper_options options = {.config = &config,
                                         .backend = pml_backend_cpu(),
                                         .threads = threads,
                                         .limits = {TOKENS, ROWS, LABELS, LENGTH, 0}};
    pml_stepper *stepper;
    MUST(pml_stepper_new(&options, &stepper, err));
    double best = INFINITY, begin = pml_clock_monotonic(), first = 0;
    pml_step_result result;
    for (int step = 0; step <= steps; step++) { /* the first one warms up */
        double start = pml_clock_monotonic();
        pml_update update = {step + 1, config.learning_rate, 0, config.max_grad_norm, LABELS};
        MUST(pml_stepper_micro(stepper, &batch, err));
        MUST(pml_stepper_update(stepper, &update, &result, err));
        double seconds = pml_clock_monotonic() - start;
        if (step == 0)
            first = pml_clock_monotonic() - begin;
        else
            best = seconds < best ? seconds : best;
    }
    double mean = (pml_clock_monotonic() - begin - first) / steps;
    const pml_plan *plan = pml_stepper_plan(stepper);
    printf(
        "%s: %.0f tokens/s (best step %.0f), loss %.4f, arena %.0f + %.0f MiB, recompute %d, head "
        "chunk %d, %.1f GFLOP/s\n",
        method == PML_METHOD_FULL ? "full" : "lora", TOKENS / mean, TOKENS / best, result.loss,
        (double)plan->arena / (1 << 20), (double)plan->by_cause[PML_CAUSE_RUNTIME] / (1 << 20),
        plan->choices.recompute_layers, plan->choices.head_chunk, plan->flops / mean * 1e-9);
    pml_stepper_destroy(&stepper);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    const char *which = argc > 1 ? argv[1] : "";
    int steps = argc > 2 ? atoi(argv[2]) : 5, threads = argc > 3 ? atoi(argv[3]) : 2;
    size_t limit = argc > 4 ? (size_t)atoi(argv[4]) << 20 : 0;
    char folder[] = "/tmp/pml-bench-XXXXXX";
    if (steps < 1 || mkdtemp(folder) == NULL) {
        fprintf(stderr, "usage: bench_step [full|lora] [steps] [threads] [memory limit, MiB]\n");
        return EXIT_FAILURE;
    }
    write_model(folder);
    if (strcmp(which, "lora") != 0)
        measure(folder, PML_METHOD_FULL, steps, threads, limit);
    if (strcmp(which, "full") != 0)
        measure(folder, PML_METHOD_LORA, steps, threads, limit);
    MUST(pml_tree_remove("/tmp", folder + strlen("/tmp/"), err));
    return EXIT_SUCCESS;
}
