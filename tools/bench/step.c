/* Speed of whole training steps in one process, without workers, sockets or data preparation.
 *
 *   bench_step [full|lora|both] [8M|135M] [steps] [threads] [memory limit, MiB, 0: none]
 *              [float32|bfloat16] [timed|ops]
 *
 * Random Llamas: one of 8 M parameters, 8 rows of 256 tokens a step, and one of SmolLM2-135M's
 * shape, 2 rows; float32 arithmetic, from a folder of float32 or bfloat16, LoRA with r = 16 on all
 * linear layers. Beside the clock's time stands the processor's, which a busy machine harms less,
 * and below it what part of the fastest product on the same threads a step has. With `timed` every
 * other step is one whose ops are timed, as `pantheraml profile` has it, and what that costs is
 * printed; with `ops` a table of where a step's time goes follows, ops of one name together. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/philox.h"
#include "pml/model/convert.h"
#include "pml/model/safetensors.h"
#include "pml/train/profile.h"
#include "pml/train/stepper.h"
#include "pml_op/cpu.h"

enum { LENGTH = 256, MOST_ROWS = 8, MOST_TOKENS = MOST_ROWS * LENGTH, MAX_TENSORS = 2 + 9 * 30 };
enum { MOST_STEPS = 1000, MOST_NODES = 4096, MOST_LINES = 256, PROFILES = 9 };

typedef struct model {
    const char *name;
    int vocab, hidden, inner, layers, heads, kv_heads;
    int rows; /* of a step */
} model;

static const model models[] = {{"8M", 4096, 256, 704, 8, 8, 4, 8},
                               {"135M", 49152, 576, 1536, 30, 9, 3, 2}};

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

static int list_tensors(const model *m, shape *list)
{
    const int hidden = m->hidden, kv = m->hidden / m->heads * m->kv_heads;
    const struct {
        const char *name;
        int64_t rows, cols; /* cols 0: a vector */
    } in_layer[] = {{"input_layernorm", hidden, 0},       {"post_attention_layernorm", hidden, 0},
                    {"self_attn.q_proj", hidden, hidden}, {"self_attn.k_proj", kv, hidden},
                    {"self_attn.v_proj", kv, hidden},     {"self_attn.o_proj", hidden, hidden},
                    {"mlp.gate_proj", m->inner, hidden},  {"mlp.up_proj", m->inner, hidden},
                    {"mlp.down_proj", hidden, m->inner}};
    int n = 0;
    list[n++] = (shape){"model.embed_tokens.weight", {m->vocab, hidden}, 2};
    list[n++] = (shape){"model.norm.weight", {hidden, 0}, 1};
    for (int l = 0; l < m->layers; l++)
        for (size_t i = 0; i < sizeof in_layer / sizeof *in_layer; i++, n++) {
            snprintf(list[n].name, sizeof list[n].name, "model.layers.%d.%s.weight", l,
                     in_layer[i].name);
            list[n].dims[0] = in_layer[i].rows;
            list[n].dims[1] = in_layer[i].cols;
            list[n].n_dims = in_layer[i].cols > 0 ? 2 : 1;
        }
    return n;
}

static void write_config(const model *m, bool narrow, const char *folder)
{
    char path[256], text[640];
    int n = snprintf(
        text, sizeof text,
        "{\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"], "
        "\"vocab_size\": %d, \"hidden_size\": %d, \"intermediate_size\": %d, "
        "\"num_hidden_layers\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, "
        "\"max_position_embeddings\": 512, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, "
        "\"hidden_act\": \"silu\", \"tie_word_embeddings\": true, \"eos_token_id\": 2, "
        "\"dtype\": \"%s\"}",
        m->vocab, m->hidden, m->inner, m->layers, m->heads, m->kv_heads,
        narrow ? "bfloat16" : "float32");
    snprintf(path, sizeof path, "%s/config.json", folder);
    MUST(pml_file_write(path, text, (size_t)n, 0600, err));
}

/* config.json and model.safetensors with random weights of a usual size. */
static void write_model(const model *m, bool narrow, const char *folder)
{
    char path[256];
    shape list[MAX_TENSORS];
    int n = list_tensors(m, list);
    pml_safetensors_writer *w;
    write_config(m, narrow, folder);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    MUST(pml_safetensors_writer_new(path, 0600, &w, err));
    for (int i = 0; i < n; i++)
        MUST(pml_safetensors_writer_add(w, list[i].name, narrow ? PML_BF16 : PML_F32, list[i].dims,
                                        list[i].n_dims, err));
    for (int i = 0; i < n; i++) {
        size_t floats =
            (size_t)list[i].dims[0] * (size_t)(list[i].n_dims == 2 ? list[i].dims[1] : 1);
        float *values = malloc(floats * sizeof *values);
        uint16_t *halves = malloc(floats * sizeof *halves);
        if (values == NULL || halves == NULL)
            abort();
        for (size_t e = 0; e < floats; e++) {
            pml_philox random = pml_philox_at(1, (uint64_t)i, PML_PURPOSE_SAMPLE, e);
            values[e] = list[i].n_dims == 1 ? 1.0F : 0.07F * (pml_uniform(random.word[0]) - 0.5F);
        }
        MUST(pml_convert_from_f32(values, floats, halves, PML_BF16, err));
        MUST(narrow ? pml_safetensors_writer_write(w, halves, floats * sizeof *halves, err)
                    : pml_safetensors_writer_write(w, values, floats * sizeof *values, err));
        free(halves);
        free(values);
    }
    MUST(pml_safetensors_writer_finish(w, err));
    pml_safetensors_writer_destroy(&w);
}

/* Rows of random ids, every token but each row's last with a label. */
static pml_batch make_batch(const model *m)
{
    static int32_t ids[MOST_TOKENS], positions[MOST_TOKENS], bounds[MOST_ROWS + 1];
    static int32_t rows[MOST_TOKENS], labels[MOST_TOKENS];
    int32_t n = 0, tokens = m->rows * LENGTH;
    for (int32_t t = 0; t < tokens; t++) {
        pml_philox random = pml_philox_at(2, 0, PML_PURPOSE_SAMPLE, (uint64_t)t);
        ids[t] = (int32_t)(random.word[0] % (uint32_t)m->vocab);
        positions[t] = t % LENGTH;
    }
    for (int32_t t = 0; t < tokens; t++)
        if (positions[t] < LENGTH - 1) {
            rows[n] = t;
            labels[n++] = ids[t + 1];
        }
    for (int32_t r = 0; r <= m->rows; r++)
        bounds[r] = r * LENGTH;
    return (pml_batch){.n_tokens = tokens,
                       .n_docs = m->rows,
                       .n_labels = n,
                       .max_doc = LENGTH,
                       .ids = ids,
                       .positions = positions,
                       .cu_seqlens = bounds,
                       .label_rows = rows,
                       .labels = labels};
}

static double processor_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int shorter(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, shorter);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

/* ---- where the time goes: nodes of one name together ---- */

typedef struct line {
    const char *label, *op;
    int count;
    double flops, bytes;
    double seconds[PROFILES];
} line;

static line *line_of(line *lines, int *kinds, const pml_profile_row *row)
{
    const char *op = pml_op_describe(row->op)->name;
    int k = 0;
    while (k < *kinds && (strcmp(lines[k].label, row->label) != 0 || lines[k].op != op))
        k++;
    if (k == *kinds)
        lines[(*kinds)++] = (line){.label = row->label, .op = op};
    return &lines[k];
}

/* Medians of PROFILES passes, each of which times every op once. */
static void print_ops(pml_stepper *stepper, const pml_batch *batch)
{
    static pml_profile_row rows[MOST_NODES];
    static line lines[MOST_LINES];
    int n = 0, kinds = 0;
    double whole[PROFILES] = {0};
    for (int pass = 0; pass < PROFILES; pass++) {
        MUST(pml_stepper_profile(stepper, batch, rows, MOST_NODES, &n, err));
        for (int i = 0; i < n && kinds < MOST_LINES; i++) {
            line *at = line_of(lines, &kinds, &rows[i]);
            at->seconds[pass] += rows[i].seconds;
            whole[pass] += rows[i].seconds;
            at->flops = pass == 0 ? at->flops + rows[i].flops : at->flops;
            at->bytes = pass == 0 ? at->bytes + rows[i].bytes : at->bytes;
            at->count += pass == 0;
        }
    }
    double total = median(whole, PROFILES);
    printf("%-24s %-14s %5s %9s %7s %9s %8s\n", "label", "op", "count", "ms", "share", "GFLOP/s",
           "GB/s");
    for (int k = 0; k < kinds; k++) {
        double seconds = median(lines[k].seconds, PROFILES);
        printf("%-24s %-14s %5d %9.3f %6.1f%% %9.0f %8.1f\n", lines[k].label, lines[k].op,
               lines[k].count, seconds * 1e3, 100 * seconds / total,
               lines[k].flops / seconds * 1e-9, lines[k].bytes / seconds * 1e-9);
    }
    printf("%-24s %-14s %5d %9.3f\n", "all", "", n, total * 1e3);
}

/* Of the fastest product of two square matrices on the same threads, measured beside the steps. */
static void print_share(pml_stepper *stepper, double flops)
{
    pml_peak peak;
    MUST(pml_stepper_peak(stepper, 1, &peak, err));
    if (peak.gemm_size > 0)
        printf("a product of %d x %d: %.1f GFLOP/s, of which a step has %.0f%%\n", peak.gemm_size,
               peak.gemm_size, peak.gemm_flops * 1e-9, 100 * flops / peak.gemm_flops);
}

static void measure(const model *m, const char *folder, pml_method method, int steps, int threads,
                    size_t limit, const char *wish)
{
    const bool timed = strcmp(wish, "timed") == 0;
    const int32_t tokens = m->rows * LENGTH, n_labels = tokens - m->rows;
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
                               .batch_size = m->rows,
                               .accumulation = 1,
                               .max_length = LENGTH,
                               .memory_limit = limit};
    snprintf(config.model, sizeof config.model, "%s", folder);
    pml_batch batch = make_batch(m);
    const pml_stepper_options options = {.config = &config,
                                         .backend = pml_backend_cpu(),
                                         .threads = threads,
                                         .limits = {tokens, m->rows, n_labels, LENGTH, 0}};
    pml_stepper *stepper;
    MUST(pml_stepper_new(&options, &stepper, err));
    double least = INFINITY, took[MOST_STEPS], work[2][MOST_STEPS];
    int n_work[2] = {0};
    pml_step_result result;
    for (int step = 0; step <= steps; step++) { /* the first one warms up */
        if (timed)
            pml_stepper_timing(stepper, step % 2);
        double start = pml_clock_monotonic(), worked = processor_seconds();
        pml_update update = {step + 1, config.learning_rate, 0, config.max_grad_norm, n_labels};
        MUST(pml_stepper_micro(stepper, &batch, err));
        MUST(pml_stepper_update(stepper, &update, &result, err));
        double seconds = pml_clock_monotonic() - start;
        if (step > 0)
            took[step - 1] = seconds;
        worked = processor_seconds() - worked;
        if (step > 0)
            work[timed && step % 2][n_work[timed && step % 2]++] = worked;
        least = step > 0 && worked < least ? worked : least;
    }
    double middle = median(took, steps);
    const pml_plan *plan = pml_stepper_plan(stepper);
    printf("%s %s: %.0f tokens/s, the median step (best %.0f, %.0f of processor time), loss %.4f, "
           "arena %.0f + "
           "%.0f MiB, recompute %d, head chunk %d, %.1f GFLOP/s\n",
           m->name, method == PML_METHOD_FULL ? "full" : "lora", tokens / middle, tokens / took[0],
           tokens * threads / least, result.loss, (double)plan->arena / (1 << 20),
           (double)plan->by_cause[PML_CAUSE_RUNTIME] / (1 << 20), plan->choices.recompute_layers,
           plan->choices.head_chunk, plan->flops / middle * 1e-9);
    print_share(stepper, plan->flops / middle);
    for (int i = 0; timed && i < 2; i++) {
        double usual = median(work[i], n_work[i]) / threads;
        printf("%s steps: median %.3f ms of processor time a thread, least %.3f\n",
               i ? "timed" : "plain", usual * 1e3, work[i][0] / threads * 1e3);
    }
    if (strcmp(wish, "ops") == 0)
        print_ops(stepper, &batch);
    pml_stepper_destroy(&stepper);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    const char *which = argc > 1 ? argv[1] : "both";
    const model *m = argc > 2 && strcmp(argv[2], models[1].name) == 0 ? &models[1] : &models[0];
    int steps = argc > 3 ? atoi(argv[3]) : 5, threads = argc > 4 ? atoi(argv[4]) : 2;
    size_t limit = argc > 5 ? (size_t)atoi(argv[5]) << 20 : 0;
    bool narrow = argc > 6 && strcmp(argv[6], "bfloat16") == 0;
    const char *wish = argc > 7 ? argv[7] : "";
    char folder[] = "/tmp/pml-bench-XXXXXX";
    if (steps < 1 || steps > MOST_STEPS || threads < 1 || mkdtemp(folder) == NULL) {
        fprintf(stderr,
                "usage: bench_step [full|lora|both] [8M|135M] [steps] [threads] [limit, MiB] "
                "[float32|bfloat16] [timed|ops]\n");
        return EXIT_FAILURE;
    }
    write_model(m, narrow, folder);
    if (strcmp(which, "lora") != 0)
        measure(m, folder, PML_METHOD_FULL, steps, threads, limit, wish);
    if (strcmp(which, "full") != 0)
        measure(m, folder, PML_METHOD_LORA, steps, threads, limit, wish);
    MUST(pml_tree_remove("/tmp", folder + strlen("/tmp/"), err));
    return EXIT_SUCCESS;
}
