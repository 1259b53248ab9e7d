/* What a sampled token costs, against the floor: reading every weight once.
 *
 *   bench_sample MODEL [THREADS [TOKENS]]
 *
 * One answer of TOKENS tokens to a prompt of one, greedy, as a run samples it: from one token to
 * the next, the choice and all keys before it included. (An answer that ends sooner is followed by
 * another one.)
 *
 * The floor is as many bytes as a token reads (all linear layers and the head; of the embedding one
 * row), read in turns with the tokens, so that a busy machine harms all alike, by the threads that
 * make the token: on a host whose cores are not alike, or share their paths to memory, others would
 * measure other cores. They are read in two ways, by the op `sum` and by one product of a matrix
 * and a row, which fetches ahead; the share is of the faster one. One way after each token, so that
 * between two readings of a byte as many others are read as between two uses of a weight: a large
 * cache helps both alike, or neither. By the wall clock, medians and
 * the best of each: what the kernel counts as a process's time is as old as the last tick of each
 * processor that another thread of it runs on. */
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

enum { TOKEN, SUM, PRODUCT, WAYS };

static pml_error err = PML_ERROR_INIT;
static pml_device *device; /* the stepper's own */

static pml_status open_and_keep(const pml_device_options *options, pml_device **out, pml_error *e)
{
    pml_status status = pml_backend_cpu()->open(options, out, e);
    device = *out;
    return status;
}

static pml_stepper *open_model(const pml_backend *cpu, const char *folder, int threads,
                               int32_t tokens)
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
        .backend = cpu,
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

/* Of each way's sorted times: where `part` of them lie below. */
static void print_line(const char *what, double *const times[WAYS], const int n[WAYS], double part,
                       double bytes)
{
    double at[WAYS];
    for (int way = 0; way < WAYS; way++)
        at[way] = times[way][(int)(n[way] * part)];
    const double token = at[TOKEN], sum = at[SUM], product = at[PRODUCT];
    printf("%s: a token %.2f ms (%.1f tok/s, %.1f GB/s); its weights read by sum %.2f ms (%.1f "
           "GB/s), by one product %.2f ms (%.1f GB/s); share %.0f%%\n",
           what, token * 1e3, 1 / token, bytes / token / 1e9, sum * 1e3, bytes / sum / 1e9,
           product * 1e3, bytes / product / 1e9, 100 * (sum < product ? sum : product) / token);
}

/* Bytes that a token reads: of a folder in bfloat16 matrices are held as they are stored. */
static int64_t bytes_of(const pml_model_spec *s)
{
    int64_t table = (int64_t)s->vocab * s->hidden;
    return (pml_model_parameters(s) - (s->tied_head ? 0 : table)) * (s->dtype == PML_BF16 ? 2 : 4);
}

/* One product that reads `bytes` in weights as the folder has them, and a sum over the same. */
static void reading_args(void *memory, double *total, int64_t bytes, pml_dtype dtype,
                         pml_op_args *sum, pml_op_args *product)
{
    enum { COLS = 1024 };
    static float x[COLS];
    const int64_t rows = bytes / COLS / (int64_t)pml_dtype_size(dtype);
    float *y = calloc((size_t)rows, sizeof *y);
    if (y == NULL)
        exit(EXIT_FAILURE);
    *sum = (pml_op_args){.sum = {.x = pml_matrix(memory, bytes / COLS / 4, COLS, PML_F32),
                                 .total = pml_vector(total, 1, PML_F64)}};
    *product = (pml_op_args){.linear = {.x = pml_matrix(x, 1, COLS, PML_F32),
                                        .w = pml_matrix(memory, rows, COLS, dtype),
                                        .y = pml_matrix(y, 1, rows, PML_F32),
                                        .parts = 1,
                                        .part_cols = {(int32_t)rows}}};
}

/* What goes on between two tokens. */
typedef struct bench {
    const pml_backend *cpu;
    pml_queue *queue;
    pml_op_args sum, product;
    double *const *times; /* of each way */
    int done, tokens;
    double since; /* when the last token was over, or 0 */
} bench;

/* Reads, in turns with the tokens. */
static bool on_token(void *user, int32_t row, int32_t token)
{
    (void)row, (void)token;
    bench *b = user;
    const double now = pml_clock_monotonic();
    if (b->since > 0) { /* the first of an answer is its prompt's, too */
        const int way = b->done % 2 == 0 ? SUM : PRODUCT;
        if (way == SUM)
            MUST(pml_op_run(b->cpu, PML_OP_sum, b->queue, &b->sum, &err));
        else
            MUST(pml_op_run(b->cpu, PML_OP_linear, b->queue, &b->product, &err));
        b->times[way][b->done / 2] = pml_clock_monotonic() - now;
        b->times[TOKEN][b->done++] = now - b->since;
    }
    b->since = pml_clock_monotonic();
    return b->done < b->tokens;
}

static void measure(pml_stepper *s, const pml_backend *cpu, int tokens, double *const times[WAYS])
{
    const pml_model_spec *spec = pml_stepper_spec(s);
    const int64_t bytes = bytes_of(spec);
    void *memory = NULL;
    double total = 0;
    bench b = {.cpu = cpu, .times = times, .tokens = tokens};
    int32_t prompt = 0, told, *answer = malloc((size_t)(tokens + 1) * sizeof *answer);
    if (answer == NULL)
        exit(EXIT_FAILURE);
    MUST(cpu->alloc(device, (size_t)bytes, &memory, &err)); /* in pages like the weights' */
    memset(memory, 1, (size_t)bytes);
    MUST(cpu->queue_new(device, &b.queue, &err));
    reading_args(memory, &total, bytes, spec->dtype == PML_BF16 ? PML_BF16 : PML_F32, &b.sum,
                 &b.product);
    for (; b.done < tokens; prompt++) { /* to the vocabulary's end */
        const pml_generate_options options = {.prompt = &prompt,
                                              .n_prompt = 1,
                                              .max_new_tokens = tokens + 1,
                                              .on_token = on_token,
                                              .user = &b};
        b.since = 0;
        MUST(pml_stepper_generate(s, &options, answer, &told, &err));
    }
    free(b.product.linear.y.data);
    cpu->queue_destroy(&b.queue);
    cpu->free(device, &memory, (size_t)bytes);
    free(answer);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    int threads = argc > 2 ? atoi(argv[2]) : 0, tokens = argc > 3 ? atoi(argv[3]) : 32;
    if (argc < 2 || tokens < 2) {
        fprintf(stderr, "usage: bench_sample MODEL [THREADS [TOKENS]]\n");
        return EXIT_FAILURE;
    }
    pml_backend cpu = *pml_backend_cpu();
    cpu.open = open_and_keep;
    pml_stepper *s = open_model(&cpu, argv[1], threads, tokens + 2);
    double *times[WAYS];
    const int n[WAYS] = {tokens, (tokens + 1) / 2, tokens / 2};
    for (int way = 0; way < WAYS; way++)
        if ((times[way] = calloc((size_t)tokens, sizeof **times)) == NULL)
            return EXIT_FAILURE;
    measure(s, &cpu, tokens, times);
    for (int way = 0; way < WAYS; way++)
        qsort(times[way], (size_t)n[way], sizeof **times, by_size);
    pml_device_info info;
    MUST(cpu.info(device, &info, &err));
    const double bytes = (double)bytes_of(pml_stepper_spec(s));
    printf("%.0f MB of weights, %d threads; ", bytes / 1e6, info.threads);
    print_line("medians", times, n, 0.5, bytes);
    print_line("best", times, n, 0, bytes);
    for (int way = 0; way < WAYS; way++)
        free(times[way]);
    pml_stepper_destroy(&s);
    return EXIT_SUCCESS;
}
