/* How fast the CUDA backend's first ops are, through the op table, replayed from a graph.
 *
 * Each line rotates among operand sets that together exceed the chip's cache, so that device memory
 * is what is measured; inputs are random numbers. Host clock around some replays and one wait; the
 * median of fifteen, and how far they lie apart. See docs/performance/gpu-seed.md. */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pml_op/backend.h"

enum { SETS = 8, OPS_A_GRAPH = 16, TIMES = 15, SMALL_OPS = 1000 };

static const pml_backend *gpu;
static pml_device *device;
static pml_queue *queue;
static unsigned char *arena;
static size_t arena_size, used;

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error err_ = PML_ERROR_INIT, *err = &err_;                                             \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "%s: %s\n", #call, err->message);                                      \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static pml_view take(int64_t rows, int64_t cols, int64_t border, pml_dtype dtype)
{
    pml_view v = {arena + used, rows, cols, cols + border, dtype};
    used += ((size_t)rows * (size_t)v.ld * pml_dtype_size(dtype) + 255) / 256 * 256;
    if (used > arena_size) {
        fprintf(stderr, "the arena of %zu MiB is too small\n", arena_size >> 20);
        exit(1);
    }
    return v;
}

static void run(pml_op op, pml_op_args *args)
{
    MUST(pml_op_run(gpu, op, queue, args, err));
}

/* 64 Mi random bf16 numbers, then copied over whatever is drawn: each view begins elsewhere in
 * them. */
static pml_view noise;

static void make_noise(void)
{
    noise = take(1, (int64_t)1 << 26, 0, PML_BF16);
    uint16_t *host = malloc((size_t)noise.cols * 2);
    if (host == NULL)
        exit(1);
    uint64_t z = 1;
    for (int64_t i = 0; i < noise.cols; i++) {
        z = z * 6364136223846793005U + 1442695040888963407U;
        float x = (float)(int64_t)(z >> 40) * 0x1p-23F - 1; /* [-1, 1) */
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        host[i] = (uint16_t)(bits >> 16);
    }
    MUST(gpu->upload(queue, noise.data, host, (size_t)noise.cols * 2, err));
    MUST(gpu->sync(queue, err));
    free(host);
}

/* Including the border, which may hold operands too. */
static pml_view drawn(int64_t rows, int64_t cols, int64_t border, pml_dtype dtype)
{
    static int64_t turn;
    pml_view v = take(rows, cols, border, dtype);
    int64_t count = rows * v.ld;
    for (int64_t at = 0; at < count;) {
        int64_t from = turn++ * 4099 * 64 % (noise.cols / 2), n = count - at;
        if (n > noise.cols / 2)
            n = noise.cols / 2;
        pml_op_args copy = {
            .copy = {pml_vector((uint16_t *)noise.data + from, n, PML_BF16),
                     pml_vector((char *)v.data + (size_t)at * pml_dtype_size(dtype), n, dtype)}};
        run(PML_OP_copy, &copy);
        at += n;
    }
    return v;
}

static pml_view workspace(pml_op op, pml_op_args *args)
{
    size_t bytes = gpu->workspace(device, op, args);
    return bytes > 0 ? take(1, (int64_t)bytes, 0, PML_U8) : (pml_view){0};
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct timing {
    double median, low, high; /* seconds an op */
} timing;

static timing time_graph(pml_op op, pml_op_args *sets, int ops)
{
    pml_graph *graph = NULL;
    size_t bytes = 0;
    double took[TIMES];
    for (int i = 0; i < SETS; i++)
        run(op, &sets[i]);
    MUST(gpu->graph_begin(queue, err));
    for (int i = 0; i < ops; i++)
        run(op, &sets[i % SETS]);
    MUST(gpu->graph_end(queue, SIZE_MAX, &graph, &bytes, err));
    MUST(gpu->graph_launch(queue, graph, err));
    MUST(gpu->sync(queue, err));
    double begin = seconds();
    MUST(gpu->graph_launch(queue, graph, err));
    MUST(gpu->sync(queue, err));
    int replays = 1 + (int)(0.05 / (seconds() - begin)); /* 50 ms at a time */
    for (int t = 0; t < TIMES; t++) {
        begin = seconds();
        for (int r = 0; r < replays; r++)
            MUST(gpu->graph_launch(queue, graph, err));
        MUST(gpu->sync(queue, err));
        took[t] = (seconds() - begin) / replays / ops;
    }
    gpu->graph_destroy(&graph);
    qsort(took, TIMES, sizeof *took, by_value);
    return (timing){took[TIMES / 2], took[0], took[TIMES - 1]};
}

static void line(const char *name, timing t, double amount, const char *unit)
{
    printf("%-50s %9.2f us  %8.1f %-8s (%.1f to %.1f)\n", name, t.median * 1e6, amount / t.median,
           unit, amount / t.high, amount / t.low);
    fflush(stdout);
}

enum { TOKENS = 8192, HIDDEN = 4096, VOCABULARY = 128256, RANK = 16, BORDER = 64 };

static void bench_moves(void)
{
    pml_op_args sets[SETS];
    size_t mark = used;
    double once = (double)TOKENS * HIDDEN * 2;
    for (int i = 0; i < SETS; i++)
        sets[i].copy =
            (pml_copy_args){drawn(TOKENS, HIDDEN, 0, PML_BF16), take(TOKENS, HIDDEN, 0, PML_BF16)};
    line("copy [8192,4096] bf16", time_graph(PML_OP_copy, sets, OPS_A_GRAPH), 2e-9 * once, "GB/s");
    for (int i = 0; i < SETS; i++)
        sets[i].fill = (pml_fill_args){sets[i].copy.y, 0};
    line("fill [8192,4096] bf16", time_graph(PML_OP_fill, sets, OPS_A_GRAPH), 1e-9 * once, "GB/s");
    used = mark;

    pml_view table = drawn(VOCABULARY, HIDDEN, 0, PML_BF16);
    for (int i = 0; i < SETS; i++) {
        int32_t ids[TOKENS];
        for (int t = 0; t < TOKENS; t++)
            ids[t] = (int32_t)(((int64_t)(t + i * TOKENS) * 40503) % VOCABULARY);
        sets[i].embed =
            (pml_embed_args){take(1, TOKENS, 0, PML_I32), table, take(TOKENS, HIDDEN, 0, PML_BF16)};
        MUST(gpu->upload(queue, sets[i].embed.ids.data, ids, sizeof ids, err));
        MUST(gpu->sync(queue, err));
    }
    line("embed 8192 of [128256,4096] bf16", time_graph(PML_OP_embed, sets, OPS_A_GRAPH),
         2e-9 * once, "GB/s");
    used = mark;
}

static void bench_norm(const char *name, int64_t rows, int64_t cols, pml_dtype dtype, bool residual)
{
    pml_op_args sets[SETS];
    size_t mark = used;
    for (int i = 0; i < SETS; i++) {
        sets[i].rmsnorm = (pml_rmsnorm_args){.x = drawn(rows, cols, 0, dtype),
                                             .weight = drawn(1, cols, 0, dtype),
                                             .y = take(rows, cols, 0, dtype),
                                             .rstd = take(1, rows, 0, PML_F32),
                                             .eps = 1e-5F};
        if (residual) {
            sets[i].rmsnorm.add = drawn(rows, cols, 0, dtype);
            sets[i].rmsnorm.sum = take(rows, cols, 0, dtype);
        }
    }
    double bytes = (double)(rows * cols) * (double)pml_dtype_size(dtype) * (residual ? 4 : 2);
    line(name, time_graph(PML_OP_rmsnorm, sets, OPS_A_GRAPH), bytes * 1e-9, "GB/s");
    used = mark;
}

typedef enum adapter { NO_ADAPTER, APART, IN_BORDERS } adapter;

static void bench_linear(const char *name, pml_dtype dtype, adapter lora)
{
    pml_op_args sets[SETS];
    size_t mark = used;
    int64_t border = lora == IN_BORDERS ? BORDER : 0;
    for (int i = 0; i < SETS; i++) {
        pml_linear_args *a = &sets[i].linear;
        *a = (pml_linear_args){.x = drawn(TOKENS, HIDDEN, border, dtype),
                               .w = drawn(HIDDEN, HIDDEN, border, dtype),
                               .y = take(TOKENS, HIDDEN, 0, dtype),
                               .parts = 1,
                               .part_cols = {HIDDEN}};
        if (lora != NO_ADAPTER) {
            a->lora_parts = 1;
            a->rank = RANK;
            a->lora_scale[0] = 1;
            a->a = drawn(RANK, HIDDEN, 0, dtype);
            a->b = lora == APART ? drawn(HIDDEN, RANK, 0, dtype)
                                 : pml_view_columns(a->w, HIDDEN, RANK);
            a->u =
                lora == APART ? take(TOKENS, RANK, 0, dtype) : pml_view_columns(a->x, HIDDEN, RANK);
        }
        a->ws = i == 0 ? workspace(PML_OP_linear, &sets[0]) : sets[0].linear.ws;
    }
    line(name, time_graph(PML_OP_linear, sets, OPS_A_GRAPH), 2e-12 * TOKENS * HIDDEN * HIDDEN,
         "TFLOP/s");
    used = mark;
}

/* What an op costs besides its work: one row of eight numbers. */
static void bench_overhead(void)
{
    pml_op_args sets[SETS];
    size_t mark = used;
    for (int i = 0; i < SETS; i++)
        sets[i].rmsnorm = (pml_rmsnorm_args){.x = drawn(1, 8, 0, PML_BF16),
                                             .weight = drawn(1, 8, 0, PML_BF16),
                                             .y = take(1, 8, 0, PML_BF16),
                                             .rstd = take(1, 1, 0, PML_F32),
                                             .eps = 1e-5F};
    timing t = time_graph(PML_OP_rmsnorm, sets, SMALL_OPS);
    printf("%-50s %9.2f us\n", "smallest op, in a graph of 1000", t.median * 1e6);
    double begin = seconds();
    for (int i = 0; i < SMALL_OPS; i++)
        run(PML_OP_rmsnorm, &sets[i % SETS]);
    double host = seconds() - begin;
    MUST(gpu->sync(queue, err));
    printf("%-50s %9.2f us (%.2f of host)\n", "smallest op, eager",
           (seconds() - begin) / SMALL_OPS * 1e6, host / SMALL_OPS * 1e6);
    used = mark;
}

int main(void)
{
    pml_device_options options = {0};
    pml_device_info info;
    void *base = NULL;
    double begin = seconds();
    unsigned dtypes;
    MUST(pml_backend_cuda(&gpu, err));
    MUST(gpu->dtypes_of(options.index, &dtypes, err));
    if ((dtypes >> PML_BF16 & 1) == 0) {
        puts("bench_gpu_seed skipped: this GPU has no bfloat16");
        return 0;
    }
    MUST(gpu->open(&options, &device, err));
    MUST(gpu->queue_new(device, &queue, err));
    double opened = seconds() - begin;
    MUST(gpu->info(device, &info, err));
    arena_size = (size_t)6 << 30;
    MUST(gpu->alloc(device, arena_size, &base, err));
    arena = base;
    printf("%s, kernels %s, %s; opened in %.0f ms\n", info.name, info.instructions, info.libraries,
           opened * 1e3);
    make_noise();

    bench_moves();
    bench_norm("rmsnorm [8192,4096] bf16", TOKENS, HIDDEN, PML_BF16, false);
    bench_norm("rmsnorm [8192,4096] bf16 + residual", TOKENS, HIDDEN, PML_BF16, true);
    bench_norm("rmsnorm [8192,4096] f32 + residual", TOKENS, HIDDEN, PML_F32, true);
    bench_norm("rmsnorm [16384,2048] bf16 + residual", 16384, 2048, PML_BF16, true);
    bench_norm("rmsnorm [16384,896] bf16 + residual", 16384, 896, PML_BF16, true);
    bench_norm("rmsnorm [262144,128] bf16", 262144, 128, PML_BF16, false);
    bench_linear("linear 8192 x 4096 x 4096 bf16", PML_BF16, NO_ADAPTER);
    bench_linear("linear 8192 x 4096 x 4096 bf16, LoRA 16 apart", PML_BF16, APART);
    bench_linear("linear 8192 x 4096 x 4096 bf16, LoRA 16 in borders", PML_BF16, IN_BORDERS);
    bench_linear("linear 8192 x 4096 x 4096 f32", PML_F32, NO_ADAPTER);
    bench_overhead();

    gpu->free(device, &base, arena_size);
    gpu->queue_destroy(&queue);
    gpu->close(&device);
    return 0;
}
