/* Training steps of a model folder in one process, without workers and data: tokens per second,
 * memory planned and used, and with --profile the device time of every kind of op.
 *
 *   bench_gpu_step MODEL [--device cuda] [--rows 4] [--length 2048] [--steps 10] [--full]
 *                        [--limit MiB] [--float32 | --float16] [--profile] [--rank 16]
 *                        [--nf4 | --fp8]
 *                        [--deterministic] [--dropout 0.1] [--adamw-8bit]
 *                        [--cache FOLDER]   (of timed choices; not given: none)
 *                        [--sample 128 [--prompts 1]]   (and so many tokens generated)
 *                        [--gauges PAIRS]   (what reading NVML beside the steps costs)
 *                        [--frozen PAIRS]   (what adapters cost over the frozen layers)
 *                        [--energy SECONDS]   (joules of every op, in a loop of so long)
 *                        [--choices RECOMPUTE,LAYERS,CHUNK,PIECES]   (in place of the planner's)
 *
 * All tokens of full rows are counted; every token but each row's last has a label. Prints one JSON
 * line, after the profile. tools/bench/gpu.py runs it beside its peers. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "pml/base/clock.h"
#include "pml/base/philox.h"
#include "pml/train/profile.h"
#include "pml_op/cpu.h"
#include "step_energy.h"
#include "step_frozen.h"
#include "step_gauges.h"

enum { MOST_ROWS = 1 << 14, WARM_UP = 3 };

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error must = PML_ERROR_INIT, *err = &must;                                             \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "bench_gpu_step: %s (%s:%d)\n", must.message, must.file, must.line);   \
            exit(EXIT_FAILURE);                                                                    \
        }                                                                                          \
    } while (0)

typedef struct bench {
    const char *model, *device, *cache;
    int32_t rows, length, rank, sample, prompts;
    int steps, gauges, frozen;
    int64_t done; /* steps so far */
    bool full, float32, float16, profile, deterministic, adamw_8bit;
    pml_quant quant;
    size_t limit;
    double dropout, energy;
    pml_plan_choices choices;
    pml_train_config config;
    pml_stepper *stepper;
} bench;

static void *must_alloc(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (memory == NULL) {
        fputs("bench_gpu_step: no memory\n", stderr);
        exit(EXIT_FAILURE);
    }
    return memory;
}

static pml_batch make_batch(const bench *b, int32_t vocab, uint64_t seed)
{
    int32_t tokens = b->rows * b->length, n = 0;
    int32_t *ids = must_alloc((size_t)tokens * 4 + (size_t)b->rows + 1, sizeof *ids);
    int32_t *positions = ids + tokens, *rows = positions + tokens, *labels = rows + tokens;
    int32_t *bounds = labels + tokens;
    int64_t *places = must_alloc((size_t)tokens, sizeof *places);
    for (int32_t t = 0; t < tokens; t++) {
        ids[t] = (int32_t)(pml_philox_at(seed, 0, PML_PURPOSE_SAMPLE, (uint64_t)t).word[0] %
                           (uint32_t)vocab);
        positions[t] = t % b->length;
        places[t] = t;
    }
    for (int32_t t = 0; t < tokens; t++)
        if (positions[t] < b->length - 1) {
            rows[n] = t;
            labels[n++] = ids[t + 1];
        }
    for (int32_t r = 0; r <= b->rows; r++)
        bounds[r] = r * b->length;
    return (pml_batch){.n_tokens = tokens,
                       .n_docs = b->rows,
                       .n_labels = n,
                       .max_doc = b->length,
                       .ids = ids,
                       .places = places,
                       .positions = positions,
                       .cu_seqlens = bounds,
                       .label_rows = rows,
                       .labels = labels};
}

static size_t free_memory(const pml_backend *backend, pml_device *device)
{
    pml_device_info info;
    MUST(backend->info(device, &info, err));
    return info.memory_free;
}

/* ---- the profile: rows of one label together ---- */

typedef struct line {
    const char *label;
    const char *op;
    int count;
    double seconds, flops, bytes;
} line;

static int by_seconds(const void *a, const void *b)
{
    double x = ((const line *)a)->seconds, y = ((const line *)b)->seconds;
    return (x < y) - (x > y);
}

static void print_profile(const bench *b, const pml_batch *batch)
{
    static pml_profile_row rows[MOST_ROWS];
    static line lines[256];
    int n = 0, kinds = 0;
    double total = 0;
    pml_peak peak;
    for (int times = 0; times < 2; times++) /* the second is warm */
        MUST(pml_stepper_profile(b->stepper, batch, rows, MOST_ROWS, &n, err));
    for (int i = 0; i < n; i++) {
        int k = 0;
        while (k < kinds && strcmp(lines[k].label, rows[i].label) != 0)
            k++;
        if (k == 256)
            continue;
        if (k == kinds)
            lines[kinds++] =
                (line){.label = rows[i].label, .op = pml_op_describe(rows[i].op)->name};
        lines[k].count++;
        lines[k].seconds += rows[i].seconds;
        lines[k].flops += rows[i].flops;
        lines[k].bytes += rows[i].bytes;
        total += rows[i].seconds;
    }
    qsort(lines, (size_t)kinds, sizeof *lines, by_seconds);
    MUST(pml_stepper_peak(b->stepper, 0.5, &peak, err));
    printf("%-24s %-14s %5s %9s %6s %9s %8s %8s\n", "label", "op", "count", "ms", "share",
           "TFLOP/s", "GB/s", "of copy");
    for (int k = 0; k < kinds; k++)
        printf("%-24s %-14s %5d %9.3f %5.1f%% %9.1f %8.0f %7.1f%%\n", lines[k].label, lines[k].op,
               lines[k].count, lines[k].seconds * 1e3, 100 * lines[k].seconds / total,
               lines[k].flops / lines[k].seconds * 1e-12, lines[k].bytes / lines[k].seconds * 1e-9,
               100 * lines[k].bytes / lines[k].seconds / peak.copy_bytes);
    printf("%-24s %-14s %5d %9.3f; copy %.0f GB/s of %lld MiB, product %.0f TFLOP/s of %d\n", "all",
           "", n, total * 1e3, peak.copy_bytes * 1e-9, (long long)(peak.copy_size >> 20),
           peak.gemm_flops * 1e-12, peak.gemm_size);
}

/* ---- steps ---- */

static double step(bench *b, const pml_batch *batch, int64_t number, pml_step_result *result)
{
    double begin = pml_clock_monotonic();
    pml_update update = {number, b->config.learning_rate, 0, b->config.max_grad_norm,
                         batch->n_labels};
    MUST(pml_stepper_calibrate(b->stepper, batch, err));
    MUST(pml_stepper_micro(b->stepper, batch, err));
    MUST(pml_stepper_update(b->stepper, &update, result, err));
    return pml_clock_monotonic() - begin;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct next_step {
    bench *bench;
    const pml_batch *batches;
    int64_t number;
} next_step;

static void one_more(void *user)
{
    next_step *next = user;
    pml_step_result result;
    step(next->bench, &next->batches[next->number % 2], next->number, &result);
    next->number++;
}

/* At the pace of a worker, and without a pause between readings, where it can be seen. */
static void measure_gauges(bench *b, pml_device *device, const pml_backend *backend,
                           const pml_batch *batches)
{
    pml_device_info info;
    MUST(backend->info(device, &info, err));
    next_step next = {b, batches, b->done + 1};
    MUST(step_gauges_compare(info.bus, 1, b->gauges, one_more, &next, err));
    MUST(step_gauges_compare(info.bus, 0, b->gauges, one_more, &next, err));
}

/* Seconds for one token of each prompt, greedily, after prompts of PROMPT tokens: the difference of
 * two lengths, so that the prompts' own time is not in it. Best of three. */
enum { PROMPT = 32 };

static double sampled(bench *b, int32_t vocab)
{
    const int32_t few = b->sample / 4 + 1, all = b->sample;
    int32_t *prompt = must_alloc((size_t)b->prompts * PROMPT, sizeof *prompt),
            *lengths = must_alloc((size_t)b->prompts, sizeof *lengths),
            *made = must_alloc((size_t)b->prompts, sizeof *made),
            *out = must_alloc((size_t)b->prompts * (size_t)all, sizeof *out);
    double best = 1e9;
    for (int32_t i = 0; i < b->prompts * PROMPT; i++)
        prompt[i] = (int32_t)(pml_philox_at(7, 0, PML_PURPOSE_SAMPLE, (uint64_t)i).word[0] %
                              (uint32_t)vocab);
    for (int32_t i = 0; i < b->prompts; i++)
        lengths[i] = PROMPT;
    for (int times = 0; times < 3; times++) {
        double took[2];
        int32_t tokens[2] = {few, all};
        for (int i = 0; i < 2; i++) {
            const pml_generate_options o = {.prompt = prompt,
                                            .n_prompt = b->prompts * PROMPT,
                                            .lengths = lengths,
                                            .n_prompts = b->prompts,
                                            .max_new_tokens = tokens[i]};
            double begin = pml_clock_monotonic();
            MUST(pml_stepper_generate(b->stepper, &o, out, made, err));
            took[i] = pml_clock_monotonic() - begin;
            tokens[i] = made[0];
        }
        double each = (took[1] - took[0]) / (tokens[1] - tokens[0]);
        best = tokens[1] > tokens[0] && each < best ? each : best;
    }
    free(prompt);
    free(lengths);
    free(made);
    free(out);
    return best;
}

/* When weights began and ended to come in: their first parameter and the last that is told. */
typedef struct loading {
    double begin, end;
} loading;

static void note_progress(void *user, const char *what, double fraction)
{
    loading *l = user;
    if (strcmp(what, "loading the model") != 0)
        return;
    l->end = pml_clock_monotonic();
    if (fraction == 0)
        l->begin = l->end;
}

static void measure(bench *b)
{
    const pml_backend *backend;
    int index;
    pml_device *device = NULL;
    const pml_device_options open = {.index = 0};
    double begin = pml_clock_monotonic();
    MUST(pml_backend_named(b->device, false, &backend, &index, err));
    MUST(backend->open(&open, &device, err));
    double opened = pml_clock_monotonic() - begin;
    loading weights = {begin, begin};
    size_t before = free_memory(backend, device);
    int32_t tokens = b->rows * b->length;
    const pml_stepper_options options = {
        .config = &b->config,
        .backend = backend,
        .device_index = index,
        .threads = 0,
        .cache = b->cache,
        .progress = note_progress,
        .user = &weights,
        .choices = b->choices,
        .limits = {tokens, b->rows, tokens - b->rows, b->length,
                   b->sample > 0 ? b->prompts * (PROMPT + b->sample) : 0}};
    MUST(pml_stepper_new(&options, &b->stepper, err));
    double loaded = pml_clock_monotonic() - begin;
    const pml_plan *plan = pml_stepper_plan(b->stepper);
    int32_t vocab = pml_stepper_spec(b->stepper)->vocab;
    pml_batch batches[2] = {make_batch(b, vocab, 1), make_batch(b, vocab, 2)};
    pml_step_result result;
    double *seconds = must_alloc((size_t)b->steps, sizeof *seconds), first = 0, first_loss = 0,
           compiled = 0, all = 0;
    for (int more = WARM_UP; more > 0;) { /* steps that count have all that is compiled aside */
        bool compiles = pml_stepper_is_compiling(b->stepper);
        step(b, &batches[b->done % 2], b->done + 1, &result);
        if (++b->done == 1) {
            first = pml_clock_monotonic() - begin;
            first_loss = result.loss;
        }
        if (compiles)
            compiled = pml_clock_monotonic() - begin;
        else
            more--;
    }
    for (int i = 0; i < b->steps; i++, b->done++) {
        seconds[i] = step(b, &batches[b->done % 2], b->done + 1, &result);
        all += seconds[i];
    }
    size_t used = before - free_memory(backend, device);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage); /* pages of mapped files count in it */
    qsort(seconds, (size_t)b->steps, sizeof *seconds, by_value);
    double median = seconds[b->steps / 2];
    if (b->profile)
        print_profile(b, &batches[0]);
    if (b->gauges > 0)
        measure_gauges(b, device, backend, batches);
    if (b->frozen > 0) {
        next_step next = {b, batches, b->done + 1};
        MUST(step_frozen_compare(b->stepper, b->frozen, &batches[0], one_more, &next, err));
    }
    if (b->energy > 0) {
        pml_device_info info;
        next_step next = {b, batches, b->done + 1};
        MUST(backend->info(device, &info, err));
        MUST(step_energy_print(b->stepper, info.bus, b->energy, &batches[0], one_more, &next, err));
    }
    double token = b->sample > 0 ? sampled(b, vocab) : 0;
    printf("{\"token\": %.6f, \"tokens_per_second\": %.0f, \"mean\": %.0f, \"seconds\": %.5f, "
           "\"loss\": %.4f, \"first_loss\": %.9g, "
           "\"planned\": %zu, \"used\": %zu, \"recompute\": \"%s\", \"recompute_layers\": %d, "
           "\"pieces\": %d, \"head_chunk\": %d, \"unpacked\": %d, \"priced\": %.5f, "
           "\"offload_layers\": %d, "
           "\"offload\": \"%s\", \"host\": %zu, \"link\": %.4f, \"waited\": %.4f, "
           "\"open\": %.3f, \"weights\": [%.3f, %.3f], \"load\": %.3f, "
           "\"first_step\": %.2f, \"compiled\": %.2f, \"tflops\": %.1f, \"host_peak\": %zu}\n",
           token, tokens / median, tokens * b->steps / all, median, result.loss, first_loss,
           plan->arena, used, pml_recompute_name((pml_recompute)plan->choices.recompute),
           plan->choices.recompute_layers, plan->choices.pieces, plan->choices.head_chunk,
           plan->choices.unpacked, plan->seconds, plan->choices.offload_layers,
           pml_recompute_name((pml_recompute)plan->choices.offload), plan->host, plan->link,
           plan->waited, opened, weights.begin - begin, weights.end - begin, loaded, first,
           compiled, plan->flops / median * 1e-12, (size_t)usage.ru_maxrss << 10);
    for (int i = 0; i < 2; i++) {
        free((void *)(uintptr_t)batches[i].ids);
        free((void *)(uintptr_t)batches[i].places);
    }
    free(seconds);
    pml_stepper_destroy(&b->stepper);
    backend->close(&device);
}

static void read_options(int argc, char **argv, bench *b)
{
    static const struct option known[] = {{"device", required_argument, NULL, 'd'},
                                          {"rows", required_argument, NULL, 'r'},
                                          {"length", required_argument, NULL, 'l'},
                                          {"steps", required_argument, NULL, 's'},
                                          {"limit", required_argument, NULL, 'm'},
                                          {"full", no_argument, NULL, 'f'},
                                          {"float16", no_argument, NULL, 'h'},
                                          {"float32", no_argument, NULL, 'x'},
                                          {"profile", no_argument, NULL, 'p'},
                                          {"nf4", no_argument, NULL, 'n'},
                                          {"deterministic", no_argument, NULL, 't'},
                                          {"rank", required_argument, NULL, 'k'},
                                          {"cache", required_argument, NULL, 'c'},
                                          {"dropout", required_argument, NULL, 'o'},
                                          {"adamw-8bit", no_argument, NULL, '8'},
                                          {"gauges", required_argument, NULL, 'g'},
                                          {"frozen", required_argument, NULL, 'z'},
                                          {"choices", required_argument, NULL, 'w'},
                                          {"fp8", no_argument, NULL, 'q'},
                                          {"sample", required_argument, NULL, 'S'},
                                          {"prompts", required_argument, NULL, 'P'},
                                          {"energy", required_argument, NULL, 'e'},
                                          {NULL, 0, NULL, 0}};
    *b =
        (bench){.prompts = 1, .device = "cuda", .rows = 4, .length = 2048, .steps = 10, .rank = 16};
    for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (c) {
        case 'd':
            b->device = optarg;
            break;
        case 'r':
            b->rows = atoi(optarg);
            break;
        case 'l':
            b->length = atoi(optarg);
            break;
        case 's':
            b->steps = atoi(optarg);
            break;
        case 'k':
            b->rank = atoi(optarg);
            break;
        case 'm':
            b->limit = (size_t)atol(optarg) << 20;
            break;
        case 'S':
            b->sample = atoi(optarg);
            break;
        case 'P':
            b->prompts = atoi(optarg);
            break;
        case 'o':
            b->dropout = atof(optarg);
            break;
        case 'e':
            b->energy = atof(optarg);
            break;
        case 'c':
            b->cache = optarg;
            break;
        case 'z':
            b->frozen = atoi(optarg);
            break;
        case 'g':
            b->gauges = atoi(optarg);
            break;
        case '8':
            b->adamw_8bit = true;
            break;
        case 'w':
            if (sscanf(optarg, "%d,%d,%d,%d", &b->choices.recompute, &b->choices.recompute_layers,
                       &b->choices.head_chunk, &b->choices.pieces) != 4)
                exit(EXIT_FAILURE);
            break;
        case 'f':
            b->full = true;
            break;
        case 'x':
            b->float32 = true;
            break;
        case 'h':
            b->float16 = true;
            break;
        case 'n':
            b->quant = PML_QUANT_NF4;
            break;
        case 'q':
            b->quant = PML_QUANT_FP8;
            break;
        case 't':
            b->deterministic = true;
            break;
        case 'p':
            b->profile = true;
            break;
        default:
            exit(EXIT_FAILURE);
        }
    }
    b->model = optind < argc ? argv[optind] : NULL;
}

int main(int argc, char **argv)
{
    static bench b;
    pml_cpu_prepare_process(argc, argv);
    read_options(argc, argv, &b);
    if (b.model == NULL || b.rows < 1 || b.length < 2 || b.steps < 1 || b.prompts < 1 ||
        b.sample < 0) {
        fputs("usage: bench_gpu_step MODEL [--rows 4] [--length 2048] [--steps 10] …\n", stderr);
        return EXIT_FAILURE;
    }
    b.config = (pml_train_config){.method = b.full ? PML_METHOD_FULL : PML_METHOD_LORA,
                                  .dtype = b.float32   ? PML_F32
                                           : b.float16 ? PML_F16
                                                       : PML_BF16,
                                  .quant = b.quant,
                                  .deterministic = b.deterministic,
                                  .optimizer =
                                      b.adamw_8bit ? PML_OPTIMIZER_ADAMW_8BIT : PML_OPTIMIZER_ADAMW,
                                  .lora_rank = b.rank,
                                  .lora_alpha = b.rank,
                                  .lora_dropout = b.dropout,
                                  .lora_targets = PML_TARGET_ALL_LINEAR,
                                  .max_steps = 1000000,
                                  .learning_rate = 1e-4,
                                  .beta1 = 0.9,
                                  .beta2 = 0.999,
                                  .epsilon = 1e-8,
                                  .max_grad_norm = 1,
                                  .batch_size = b.rows,
                                  .accumulation = 1,
                                  .max_length = b.length,
                                  .memory_limit = b.limit};
    snprintf(b.config.model, sizeof b.config.model, "%s", b.model);
    measure(&b);
    return EXIT_SUCCESS;
}
