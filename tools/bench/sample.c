/* What a sampled token costs, against the floor: reading every weight once.
 *
 *   bench_sample MODEL [THREADS [TOKENS]]
 *
 * The floor is measured by the op `sum` over as many bytes as a token reads (all linear layers and
 * the head; of the embedding one row), in turns with the tokens, so that a busy machine harms both
 * alike. By the wall clock, medians and the best of each: what the kernel counts as a process's
 * time is as old as the last tick of each processor that another thread of it runs on. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/train/stepper.h"
#include "pml_op/cpu.h"

#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "%s\n", err.message);                                                  \
            exit(EXIT_FAILURE);                                                                    \
        }                                                                                          \
    } while (0)

static pml_error err = PML_ERROR_INIT;

static pml_stepper *open_model(const char *folder, int threads, int32_t tokens)
{
    static pml_train_config config = {.method = PML_METHOD_LORA,
                                      .dtype = PML_F32,
                                      .lora_rank = 1,
                                      .lora_alpha = 1,
                                      .lora_targets = PML_TARGET_Q,
                                      .max_steps = 1,
                                      .beta1 = 0.9,
                                      .beta2 = 0.999,
                                      .epsilon = 1e-8,
                                      .batch_size = 1,
                                      .accumulation = 1,
                                      .max_length = 8};
    snprintf(config.model, sizeof config.model, "%s", folder);
    const pml_stepper_options options = {
        .config = &config,
        .backend = pml_backend_cpu(),
        .threads = threads,
        .limits = {.tokens = 8, .docs = 1, .labels = 1, .max_doc = 8, .generate_length = tokens}};
    pml_stepper *s = NULL;
    MUST(pml_stepper_new(&options, &s, &err));
    return s;
}

static int by_size(const void *left, const void *right)
{
    const double *a = left, *b = right;
    return *a < *b ? -1 : *a > *b;
}

static void print_line(const char *what, double token, double read, double bytes)
{
    printf("%s: a token %.2f ms (%.1f tok/s, %.1f GB/s), reading its weights %.2f ms (%.1f GB/s), "
           "share %.0f%%\n",
           what, token * 1e3, 1 / token, bytes / token / 1e9, read * 1e3, bytes / read / 1e9,
           100 * read / token);
}

/* Bytes that a token reads: of a folder in bfloat16 matrices are held as they are stored. */
static int64_t bytes_of(const pml_model_spec *s)
{
    int64_t table = (int64_t)s->vocab * s->hidden;
    return (pml_model_parameters(s) - (s->tied_head ? 0 : table)) * (s->dtype == PML_BF16 ? 2 : 4);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    int threads = argc > 2 ? atoi(argv[2]) : 0, tokens = argc > 3 ? atoi(argv[3]) : 32;
    if (argc < 2 || tokens < 2) {
        fprintf(stderr, "usage: bench_sample MODEL [THREADS [TOKENS]]\n");
        return EXIT_FAILURE;
    }
    pml_stepper *s = open_model(argv[1], threads, 2);
    const pml_model_spec *spec = pml_stepper_spec(s);
    int64_t floats = bytes_of(spec) / (int64_t)sizeof(float); /* that take as much */
    float *logits = malloc(2 * (size_t)spec->vocab * sizeof *logits);
    float *memory = malloc((size_t)floats * sizeof *memory);
    if (logits == NULL || memory == NULL)
        return EXIT_FAILURE;
    memset(memory, 1, (size_t)floats * sizeof *memory); /* zeros would share one page */

    const pml_backend *cpu = pml_backend_cpu();
    const pml_device_options options = {.threads = threads};
    pml_device *device = NULL;
    pml_queue *queue = NULL;
    MUST(cpu->open(&options, &device, &err));
    MUST(cpu->queue_new(device, &queue, &err));
    double total = 0, *times = calloc(2 * (size_t)tokens, sizeof *times);
    if (times == NULL)
        return EXIT_FAILURE;
    pml_op_args sum = {.sum = {.x = pml_matrix(memory, floats / 1024, 1024, PML_F32),
                               .total = pml_vector(&total, 1, PML_F64)}};
    for (int i = 0; i < tokens; i++) {
        const int32_t one = i % spec->vocab;
        double begin = pml_clock_monotonic();
        MUST(pml_stepper_logits(s, &one, 1, logits, &err));
        double middle = pml_clock_monotonic();
        MUST(pml_op_run(cpu, PML_OP_sum, queue, &sum, &err));
        times[i] = middle - begin;
        times[tokens + i] = pml_clock_monotonic() - middle;
    }
    pml_device_info info;
    MUST(cpu->info(device, &info, &err));
    qsort(times, (size_t)tokens, sizeof *times, by_size);
    qsort(times + tokens, (size_t)tokens, sizeof *times, by_size);
    double bytes = (double)floats * sizeof *memory;
    printf("%.0f MB of weights, %d threads; ", bytes / 1e6, info.threads);
    print_line("medians", times[tokens / 2], times[tokens + tokens / 2], bytes);
    print_line("best", times[0], times[tokens], bytes);
    free(times);
    cpu->queue_destroy(&queue);
    cpu->close(&device);
    pml_stepper_destroy(&s);
    free(memory);
    free(logits);
    return EXIT_SUCCESS;
}
