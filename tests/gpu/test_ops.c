/* The CUDA backend's ops against the CPU reference, from one arena, eager and as a recorded graph.
 *
 *   arena:  | workspace, shared | case 0: x | w | y … | case 1: … |      one backend->alloc
 *
 * The whole arena starts as NaN; inputs are drawn into it. All ops run, the arena comes back and
 *   - every result is held against the reference on the same inputs in float32;
 *   - every byte that no op may write (inputs, borders, gaps) must be as it was;
 *   - the same ops replayed from a graph must leave the same bits, twice.
 *
 * Deterministic kernels, unless the program is called with --fast: then sums may come in any order,
 * and a replay need not leave the same bits.
 *
 *   --only TEXT   the cases that have this in their names
 *   --without TEXT  not those; up to eight times
 *   --part I/N    of these the I-th, the I+N-th…, for programs side by side; I counts from 0
 *   --eager       ops one by one only, no graphs
 *   --sparse      as --eager, and only inputs are in the arena: what else an op reads was never
 * written, which compute-sanitizer's initcheck tells (tests/gpu/sanitize)
 *   --starve      with --sparse: the first case lacks its first input, and initcheck must tell
 *
 * Prints a line a case and "N passed, N failed, N skipped": what a GPU has no numbers for, by name;
 * exit status 77 and "skipped" without a GPU. */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"

enum { SKIPPED = 77 };

typedef struct session {
    const pml_backend *gpu, *cpu;
    pml_device *device, *cpu_device;
    pml_queue *queue, *cpu_queue;
    gpu_cases cases;
    size_t size;                           /* of the arena */
    unsigned char *arena;                  /* on the device */
    unsigned char *start, *eager, *replay; /* its images on the host */
    int passed, failed, skipped;
    bool fast, eagerly, sparse, starve;
    gpu_choice choice;
} session;

static void stop(const char *what, const pml_error *err)
{
    fprintf(stderr, "%s: %s (%s:%d)\n", what, err->message, err->file, err->line);
    exit(1);
}

/* What cannot fail for a reason that a test is about. */
#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error err_ = PML_ERROR_INIT, *err = &err_;                                             \
        if ((call) != PML_OK)                                                                      \
            stop(#call, err);                                                                      \
    } while (0)

static void *must_alloc(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    if (memory == NULL) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return memory;
}

static bool report(session *s, bool good, const char *name, const char *words)
{
    printf("%s  %-58s %s\n", good ? "ok  " : "FAIL", name, words);
    good ? s->passed++ : s->failed++;
    return good;
}

/* splitmix64 */
static uint64_t random_bits(void)
{
    static uint64_t state = 20261121;
    uint64_t z = state += 0x9E3779B97F4A7C15U;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
    z = (z ^ z >> 27) * 0x94D049BB133111EBU;
    return z ^ z >> 31;
}

/* About normal: twelve uniform numbers less their mean. */
static float random_normal(void)
{
    float sum = -6;
    for (int i = 0; i < 12; i += 3) {
        uint64_t bits = random_bits();
        sum += (float)(bits & 0x1fffff) * 0x1p-21F + (float)(bits >> 21 & 0x1fffff) * 0x1p-21F +
               (float)(bits >> 42 & 0x1fffff) * 0x1p-21F;
    }
    return sum;
}

/* The place of a device address in a host image of the arena. */
static pml_view in_image(const session *s, pml_view v, unsigned char *image)
{
    v.data = image + ((unsigned char *)v.data - s->arena);
    return v;
}

static bool is_float(pml_dtype dtype)
{
    return dtype == PML_F32 || dtype == PML_BF16 || dtype == PML_F16;
}

static void cpu_copy(const session *s, pml_view from, pml_view to)
{
    pml_op_args args = {.copy = {from, to}};
    MUST(pml_op_run(s->cpu, PML_OP_copy, s->cpu_queue, &args, err));
}

static void draw_indices(const gpu_case *c, pml_view v)
{
    int32_t *out = v.data;
    for (int64_t i = 0; i < v.cols; i++)
        out[i] = c->distinct ? (int32_t)(i * 31 % c->indices)
                             : (int32_t)(random_bits() % (uint64_t)c->indices);
    for (int64_t i = 2; c->distinct && i < v.cols; i += 5)
        out[i] = -1;
}

static void draw_bytes(const gpu_case *c, pml_view v)
{
    for (int64_t r = 0; r < v.rows; r++)
        for (int64_t i = 0; i < v.cols; i++) {
            uint8_t byte = (uint8_t)random_bits();
            bool none = c->e4m3 && (byte & 0x7f) == 0x7f;
            ((uint8_t *)v.data)[r * v.ld + i] = none ? 0 : byte;
        }
}

static void put_given(const void *given, pml_view v)
{
    size_t row = (size_t)v.cols * pml_dtype_size(v.dtype);
    for (size_t r = 0; r < (size_t)v.rows; r++)
        memcpy((char *)v.data + r * (size_t)v.ld * pml_dtype_size(v.dtype),
               (const char *)given + r * row, row);
}

/* Random numbers in the operand's dtype, or those that the case brings. */
static void draw(const session *s, const gpu_case *c, int operand, pml_view v)
{
    bool positive = operand == c->positive;
    if (c->given[operand] != NULL) {
        put_given(c->given[operand], v);
        return;
    }
    if (v.dtype == PML_I32) {
        draw_indices(c, v);
        return;
    }
    if (v.dtype == PML_U8) {
        draw_bytes(c, v);
        return;
    }
    if (v.dtype == PML_F64) {
        *(double *)v.data = positive ? 1e4 : random_normal();
        return;
    }
    pml_view numbers =
        pml_matrix(must_alloc((size_t)(v.rows * v.cols) * sizeof(float)), v.rows, v.cols, PML_F32);
    for (int64_t i = 0; i < v.rows * v.cols; i++)
        ((float *)numbers.data)[i] = positive ? fabsf(random_normal()) : random_normal();
    cpu_copy(s, numbers, v);
    free(numbers.data);
}

/* The same call for the CPU: operands of their own, floats as F32 (exact for the narrower ones). */
static void twin_of(const session *s, const gpu_case *c, pml_op_args *twin)
{
    const pml_op_info *info = pml_op_describe(c->op);
    *twin = c->args;
    pml_view *views = pml_op_views(twin);
    for (int i = 0; i < info->n_views; i++) {
        pml_view v = views[i];
        if (v.data == NULL || toupper(info->signature[i]) == 'W')
            continue;
        pml_dtype dtype = is_float(v.dtype) ? PML_F32 : v.dtype;
        views[i] = pml_matrix(must_alloc((size_t)(v.rows * v.cols) * pml_dtype_size(dtype)), v.rows,
                              v.cols, dtype);
        cpu_copy(s, in_image(s, v, s->start), views[i]);
    }
    for (int i = 0; i < info->n_views; i++) {
        if (toupper(info->signature[i]) != 'W')
            continue;
        size_t bytes = s->cpu->workspace(NULL, c->op, twin);
        views[i] = (pml_view){0};
        if (bytes > 0)
            views[i] = pml_vector(must_alloc(bytes), (int64_t)bytes, PML_U8);
    }
}

static void free_views(pml_op op, pml_op_args *args)
{
    for (int i = 0; i < pml_op_describe(op)->n_views; i++)
        free(pml_op_views(args)[i].data);
}

/* A backward's output and weights are those of its forward: a query that sees one key has no
 * gradient of its own only if they are. */
static void settle_attention(const session *s, const gpu_case *c)
{
    pml_op_args twin;
    twin_of(s, c, &twin);
    const pml_attention_bwd_args *b = &twin.attention_bwd;
    pml_op_args forward = {.attention = {.q = b->q,
                                         .k = b->k,
                                         .v = b->v,
                                         .cu_q = b->cu_q,
                                         .cu_k = b->cu_k,
                                         .o = b->o,
                                         .lse = b->lse,
                                         .heads = b->heads,
                                         .kv_heads = b->kv_heads,
                                         .head_dim = b->head_dim,
                                         .window = b->window,
                                         .max_q = b->max_q,
                                         .scale = b->scale}};
    size_t bytes = s->cpu->workspace(NULL, PML_OP_attention, &forward);
    if (bytes > 0)
        forward.attention.ws = pml_vector(must_alloc(bytes), (int64_t)bytes, PML_U8);
    MUST(pml_op_run(s->cpu, PML_OP_attention, s->cpu_queue, &forward, err));
    cpu_copy(s, b->o, in_image(s, c->args.attention_bwd.o, s->start));
    cpu_copy(s, b->lse, in_image(s, c->args.attention_bwd.lse, s->start));
    free(forward.attention.ws.data);
    free_views(c->op, &twin);
}

static void draw_start(session *s)
{
    memset(s->start, 0xFF, s->size); /* NaN in every floating dtype */
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case *c = &s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        for (int i = 0; i < info->n_views; i++) {
            pml_view v = pml_op_views(&c->args)[i];
            char letter = (char)toupper(info->signature[i]);
            if (v.data != NULL && (letter == 'I' || letter == 'U'))
                draw(s, c, i, in_image(s, v, s->start));
        }
        if (c->op == PML_OP_attention_bwd)
            settle_attention(s, c);
    }
}

static void run_all(session *s)
{
    for (int n = 0; n < s->cases.count; n++) {
        pml_error err = PML_ERROR_INIT;
        gpu_case *c = &s->cases.at[n];
        if (pml_op_run(s->gpu, c->op, s->queue, &c->args, &err) != PML_OK)
            stop(c->name, &err);
    }
}

static void come_back(session *s, unsigned char *image)
{
    MUST(s->gpu->download(s->queue, image, s->arena, s->size, err));
    MUST(s->gpu->sync(s->queue, err));
}

/* Every operand that an op reads, or every one that it writes, into the arena from an image of it
 * on the device or back: by our own kernel, which compute-sanitizer sees, and not in 400,000 copies
 * of a row. */
static void move_operands(session *s, const char *letters, unsigned char *image, bool in)
{
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case *c = &s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        for (int i = 0; i < info->n_views; i++) {
            pml_view v = pml_op_views(&c->args)[i], there = in_image(s, v, image);
            pml_op_args args = {.copy = {in ? there : v, in ? v : there}};
            bool starved = s->starve && in && n == 0 && i == 0;
            if (v.data != NULL && !starved && strchr(letters, toupper(info->signature[i])) != NULL)
                MUST(pml_op_run(s->gpu, PML_OP_copy, s->queue, &args, err));
        }
    }
}

/* Which operand an address of initcheck's belongs to. */
static void print_places(const session *s)
{
    printf("%p  workspace, %zu bytes\n", (void *)s->arena, s->cases.workspace);
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case c = s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c.op);
        for (int i = 0; i < info->n_views; i++) {
            const pml_view *v = &pml_op_views(&c.args)[i];
            if (v->data != NULL)
                printf("%p  %s of %s %s: [%lld,%lld], ld %lld\n", v->data, info->operands[i],
                       info->name, c.name, (long long)v->rows, (long long)v->cols,
                       (long long)v->ld);
        }
    }
}

static void run_sparse(session *s)
{
    void *image = NULL;
    print_places(s);
    MUST(s->gpu->alloc(s->device, s->size, &image, err));
    MUST(s->gpu->upload(s->queue, image, s->start, s->size, err));
    move_operands(s, "IU", image, true);
    run_all(s);
    move_operands(s, "OU", image, false);
    MUST(s->gpu->download(s->queue, s->eager, image, s->size, err));
    MUST(s->gpu->sync(s->queue, err));
    s->gpu->free(s->device, &image, s->size);
}

static void run_eager(session *s)
{
    MUST(s->gpu->upload(s->queue, s->arena, s->start, s->size, err));
    run_all(s);
    come_back(s, s->eager);
}

static void run_recorded(session *s)
{
    pml_graph *graph = NULL;

    MUST(s->gpu->graph_begin(s->queue, err));
    run_all(s);
    MUST(s->gpu->graph_end(s->queue, &graph, err));
    for (int times = 1; times <= 2; times++) {
        char words[80];
        MUST(s->gpu->upload(s->queue, s->arena, s->start, s->size, err));
        MUST(s->gpu->graph_launch(s->queue, graph, err));
        come_back(s, s->replay);
        size_t ws = s->cases.workspace;
        bool same = s->fast || memcmp(s->eager + ws, s->replay + ws, s->size - ws) == 0;
        snprintf(words, sizeof words, "%d ops in one graph, replay %d", s->cases.count, times);
        report(s, same, "replay leaves the bits of eager ops", words);
    }
    s->gpu->graph_destroy(&graph);
}

/* Row `row` of v from column `first` on as it was before the op. */
static void put_back(session *s, pml_view v, int64_t row, int64_t first)
{
    size_t size = pml_dtype_size(v.dtype), at = (size_t)(row * v.ld + first) * size;
    memcpy((char *)in_image(s, v, s->replay).data + at, (char *)in_image(s, v, s->start).data + at,
           (size_t)(v.cols - first) * size);
}

/* Only what an op may write has changed: everything else is put back, then nothing may differ. */
static void expect_rest_untouched(session *s)
{
    memcpy(s->replay, s->eager, s->size);
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case *c = &s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        for (int i = 0; i < info->n_views; i++) {
            pml_view v = pml_op_views(&c->args)[i], reach = cases_reach(c, i);
            char letter = (char)toupper(info->signature[i]);
            if (v.data == NULL || letter == 'W')
                continue;
            for (int64_t row = 0; row < reach.rows; row++)
                put_back(s, reach, row, letter == 'I' && row < v.rows ? v.cols : 0);
        }
    }
    size_t ws = s->cases.workspace;
    report(s, memcmp(s->start + ws, s->replay + ws, s->size - ws) == 0,
           "nothing outside the outputs is written", "inputs, borders, gaps");
}

/* |got - want| / |want|, and where all that is wanted is zero the root mean square of what came in
 * the case's unit. NaN when either holds one. Both F32 without borders. */
static double distance(pml_view got, pml_view want, double unit)
{
    double difference = 0, reference = 0;
    const float *g = got.data, *w = want.data;
    for (int64_t i = 0; i < want.rows * want.cols; i++) {
        difference += ((double)g[i] - w[i]) * ((double)g[i] - w[i]);
        reference += (double)w[i] * w[i];
    }
    if (reference == 0)
        reference = unit * unit * (double)(want.rows * want.cols);
    return difference == 0 ? 0 : sqrt(difference / reference);
}

/* Bits in the operand's own dtype; rows are compared apart, borders are somebody else's. */
static bool same_bits(const session *s, pml_view got, pml_view want)
{
    size_t size = pml_dtype_size(got.dtype), row = (size_t)got.cols * size;
    pml_view rounded =
        pml_matrix(must_alloc(row * (size_t)got.rows), got.rows, got.cols, got.dtype);
    bool same = true;
    cpu_copy(s, want, rounded);
    for (size_t r = 0; r < (size_t)got.rows; r++)
        same = same && memcmp((char *)got.data + r * (size_t)got.ld * size,
                              (char *)rounded.data + r * row, row) == 0;
    free(rounded.data);
    return same;
}

static bool judge_output(const session *s, const gpu_case *c, pml_view got, pml_view want,
                         double *worst)
{
    if (c->tolerance == 0)
        return same_bits(s, got, want);
    if (got.dtype == PML_F64) {
        double error = fabs(*(double *)got.data - *(double *)want.data);
        *worst = fmax(*worst, error / fabs(*(double *)want.data));
        return *worst <= c->tolerance;
    }
    pml_view wide = pml_matrix(must_alloc((size_t)(got.rows * got.cols) * sizeof(float)), got.rows,
                               got.cols, PML_F32);
    cpu_copy(s, got, wide);
    double error = distance(wide, want, c->unit);
    free(wide.data);
    *worst = fmax(*worst, error);
    return error <= c->tolerance; /* false for NaN */
}

static void judge(session *s, const gpu_case *c)
{
    const pml_op_info *info = pml_op_describe(c->op);
    pml_op_args twin, ours = c->args;
    char words[200] = "same bits";
    double worst = 0;
    bool good = true;
    twin_of(s, c, &twin);
    MUST(pml_op_run(s->cpu, c->op, s->cpu_queue, &twin, err));
    for (int i = 0; i < info->n_views; i++) {
        char letter = (char)toupper(info->signature[i]);
        pml_view got = pml_op_views(&ours)[i], want = pml_op_views(&twin)[i];
        if (got.data == NULL || letter == 'I' || letter == 'W')
            continue;
        if (good && !judge_output(s, c, in_image(s, got, s->eager), want, &worst)) {
            good = false;
            snprintf(words, sizeof words, "operand '%s' is off, ", info->operands[i]);
        }
    }
    if (c->tolerance > 0)
        snprintf(words + (good ? 0 : strlen(words)), sizeof words - 100, "%.1e of %.0e", worst,
                 c->tolerance);
    else if (!good)
        snprintf(words + strlen(words), sizeof words - 100, "must be the same bits");
    report(s, good, c->name, words);
    free_views(c->op, &twin);
}

static void expect_refusal(session *s, const char *name, pml_status want, pml_status got,
                           const pml_error *err, const char *words)
{
    report(s, got == want && strstr(err->message, words) != NULL, name, err->message);
}

/* What an op refuses, and that a recording which went wrong leaves a queue that works. */
static void refusals(session *s)
{
    pml_error err = PML_ERROR_INIT;
    pml_graph *graph = NULL;
    pml_op_args args = {.rmsnorm = {.x = shaped(2, 64, 0, PML_BF16),
                                    .weight = shaped(1, 63, 0, PML_BF16),
                                    .y = shaped(2, 64, 0, PML_BF16),
                                    .rstd = shaped(1, 2, 0, PML_F32)}};
    args.rmsnorm.x.data = args.rmsnorm.weight.data = args.rmsnorm.y.data = s->arena;
    args.rmsnorm.rstd.data = s->arena;
    pml_status got = pml_op_run(s->gpu, PML_OP_rmsnorm, s->queue, &args, &err);
    expect_refusal(s, "a wrong shape is refused by name", PML_INVALID, got, &err, "'weight'");

    got = pml_op_run(s->gpu, PML_OP_allreduce, s->queue, &args, &err);
    expect_refusal(s, "an op that is not there is refused by name", PML_UNSUPPORTED, got, &err,
                   "allreduce");

    MUST(s->gpu->graph_begin(s->queue, err));
    got = s->gpu->upload(s->queue, s->arena, s->start, 1, &err);
    expect_refusal(s, "an upload is not recorded", PML_BUSY, got, &err, "recorded");
    got = pml_op_run(s->gpu, PML_OP_rmsnorm, s->queue, &args, &err);
    expect_refusal(s, "an op that fails while recording says so", PML_INVALID, got, &err,
                   "'weight'");
    MUST(s->gpu->graph_end(s->queue, &graph, err));
    s->gpu->graph_destroy(&graph);
    got = s->gpu->graph_end(s->queue, &graph, &err);
    expect_refusal(s, "an end without a beginning", PML_INVALID, got, &err, "nothing");

    void *block = NULL;
    got = s->gpu->alloc(s->device, (size_t)1 << 60, &block, &err);
    expect_refusal(s, "more memory than there is", PML_NO_MEMORY, got, &err, "bytes on");
    MUST(s->gpu->sync(s->queue, err));
}

/* Beside other ops, and in a recording of them. */
static void copies(session *s)
{
    for (int way = 0; way < 3; way++) {
        char name[64], words[64];
        int64_t bad = copies_wrong(s->gpu, s->device, s->queue, way);
        snprintf(name, sizeof name, "to the host and back, %s %d",
                 way == 0 ? "op by op" : "graph, replay", way);
        snprintf(words, sizeof words, "%lld elements wrong", (long long)bad);
        report(s, bad == 0, name, words);
    }
}

/* A second device handle and queue beside the first: nothing is global that should not be. */
static void second_device(session *s)
{
    pml_device_options options = {0};
    pml_device *device = NULL;
    pml_queue *queue = NULL;
    MUST(s->gpu->open(&options, &device, err));
    MUST(s->gpu->queue_new(device, &queue, err));
    s->gpu->queue_destroy(&queue);
    s->gpu->close(&device);
    pml_error err = PML_ERROR_INIT;
    report(s, s->gpu->sync(s->queue, &err) == PML_OK && device == NULL && queue == NULL,
           "a second handle comes and goes", "");
}

/* What this GPU cannot do of a case; NULL: nothing. */
static const char *lacking(const gpu_case *c, const pml_device_info *info)
{
    enum { FIRST_WITH_BF16 = 80, FIRST_WITH_E4M3 = 89 };
    const pml_view *views = pml_op_views((pml_op_args *)(uintptr_t)&c->args);
    bool bf16 = false;
    for (int i = 0; i < pml_op_describe(c->op)->n_views; i++)
        bf16 = bf16 || (views[i].rows > 0 && views[i].dtype == PML_BF16);
    if (bf16 && info->capability < FIRST_WITH_BF16)
        return "bfloat16 begins with compute capability 8.0";
    if ((c->e4m3 || c->op == PML_OP_fp8_quantise) && info->capability < FIRST_WITH_E4M3)
        return "E4M3 begins with compute capability 8.9";
    return NULL;
}

/* Each by its name, and why. */
static void skip_lacking(session *s, const pml_device_info *info)
{
    int kept = 0;
    for (int n = 0; n < s->cases.count; n++) {
        const char *why = lacking(&s->cases.at[n], info);
        if (why != NULL) {
            printf("skip  %-58s %s, this GPU has %d.%d\n", s->cases.at[n].name, why,
                   info->capability / 10, info->capability % 10);
            s->skipped++;
        } else {
            s->cases.at[kept++] = s->cases.at[n];
        }
    }
    s->cases.count = kept;
}

static void set_up(session *s)
{
    pml_device_options options = {0};
    pml_device_info info;
    s->cpu = pml_backend_cpu();
    MUST(s->cpu->open(&options, &s->cpu_device, err));
    MUST(s->cpu->queue_new(s->cpu_device, &s->cpu_queue, err));
    options.deterministic = !s->fast;
    MUST(s->gpu->open(&options, &s->device, err));
    MUST(s->gpu->queue_new(s->device, &s->queue, err));
    MUST(s->gpu->info(s->device, &info, err));
    printf("%s, kernels %s, %s, %zu of %zu MiB free\n", info.name, info.instructions,
           info.libraries, info.memory_free >> 20, info.memory_total >> 20);

    cases_of_forward(&s->cases);
    cases_of_training(&s->cases);
    cases_of_mlp(&s->cases);
    cases_of_fp8(&s->cases);
    cases_keep(&s->cases, &s->choice);
    skip_lacking(s, &info);
    if (s->cases.count == 0) {
        fprintf(stderr, "no case is named so\n");
        exit(1);
    }
    cases_place(&s->cases, s->gpu);
    s->size = s->cases.workspace + s->cases.operands;
    void *base = NULL;
    MUST(s->gpu->alloc(s->device, s->size, &base, err));
    s->arena = base;
    cases_rebase(&s->cases, s->arena);
    s->start = must_alloc(s->size);
    s->eager = must_alloc(s->size);
    s->replay = must_alloc(s->size);
    printf("%d op calls in an arena of %.1f MiB, %.1f of them shared workspace\n\n", s->cases.count,
           (double)s->size / 0x1p20, (double)s->cases.workspace / 0x1p20);
}

static void tear_down(session *s)
{
    void *base = s->arena;
    s->gpu->free(s->device, &base, s->size);
    s->gpu->queue_destroy(&s->queue);
    s->gpu->close(&s->device);
    s->cpu->queue_destroy(&s->cpu_queue);
    s->cpu->close(&s->cpu_device);
    free(s->start);
    free(s->eager);
    free(s->replay);
}

static void read_options(session *s, int argc, char **argv)
{
    bool good = true;
    int without = 0;
    for (int i = 1; i < argc && good; i++) {
        bool more = i + 1 < argc;
        if (strcmp(argv[i], "--fast") == 0)
            s->fast = true;
        else if (strcmp(argv[i], "--eager") == 0)
            s->eagerly = true;
        else if (strcmp(argv[i], "--sparse") == 0)
            s->sparse = true;
        else if (strcmp(argv[i], "--starve") == 0)
            s->starve = true;
        else if (strcmp(argv[i], "--only") == 0 && more)
            s->choice.only = argv[++i];
        else if (strcmp(argv[i], "--without") == 0 && more && without < 8)
            s->choice.without[without++] = argv[++i];
        else if (strcmp(argv[i], "--part") == 0 && more)
            good = sscanf(argv[++i], "%d/%d", &s->choice.part, &s->choice.parts) == 2 &&
                   s->choice.part >= 0 && s->choice.part < s->choice.parts;
        else
            good = false;
    }
    if (!good) {
        fprintf(stderr,
                "usage: %s [--fast] [--only TEXT] [--without TEXT]… "
                "[--part I/N] [--eager | --sparse [--starve]]\n",
                argv[0]);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    static session s;
    read_options(&s, argc, argv);
    pml_error err = PML_ERROR_INIT;
    pml_status status = pml_backend_cuda(&s.gpu, &err);
    if (status == PML_NOT_FOUND) {
        printf("gpu.ops skipped: %s\n", err.message);
        return SKIPPED;
    }
    if (status != PML_OK)
        stop("the CUDA backend", &err);
    set_up(&s);
    draw_start(&s);
    s.sparse ? run_sparse(&s) : run_eager(&s);
    if (!s.sparse && !s.eagerly)
        run_recorded(&s);
    if (!s.sparse)
        expect_rest_untouched(&s);
    for (int n = 0; n < s.cases.count; n++)
        judge(&s, &s.cases.at[n]);
    if (s.choice.only == NULL && s.choice.part == 0) {
        refusals(&s);
        second_device(&s);
    }
    if (s.choice.part == 0)
        copies(&s);
    tear_down(&s);
    printf("\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped);
    return s.failed == 0 ? 0 : 1;
}
