/* Speed of each CPU op at the shapes of one micro-step of a small Llama (8 layers, hidden 256,
 * intermediate 704, 8 heads, 4 key heads, vocabulary 4096; 2048 tokens in rows of 256), and what a
 * step made of them allows.
 *
 *   bench_ops [threads]        default 2
 *
 * With one thread its own processor time is taken, so that other work on the machine counts little.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pml_op/backend.h"
#include "pml_op/cpu.h"

enum {
    LAYERS = 8,
    HIDDEN = 256,
    INNER = 704,
    HEADS = 8,
    KV_HEADS = 4,
    DIM = HIDDEN / HEADS,
    QKV = (HEADS + 2 * KV_HEADS) * DIM,
    VOCAB = 4096,
    TOKENS = 2048,
    ROW = 256,
    DOCUMENTS = TOKENS / ROW,
    RANK = 16,
    CHUNK = 512,
    PARAMETERS = LAYERS * (QKV * HIDDEN + HIDDEN * HIDDEN + 3 * INNER * HIDDEN) + 2 * VOCAB * HIDDEN
};

static pml_device *device;
static pml_queue *queue;
static double full_seconds, lora_seconds;

static void must(pml_status status, const pml_error *err)
{
    if (status == PML_OK)
        return;
    fprintf(stderr, "%s\n", err->message);
    exit(1);
}

static clockid_t clock_used = CLOCK_MONOTONIC;

static double now(void)
{
    struct timespec t;
    clock_gettime(clock_used, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *room(size_t bytes)
{
    void *base = NULL;
    pml_error err = PML_ERROR_INIT;
    must(pml_backend_cpu()->alloc(device, bytes, &base, &err), &err);
    return base;
}

static pml_view floats(int64_t rows, int64_t cols)
{
    pml_view v = pml_matrix(room((size_t)(rows * cols) * sizeof(float)), rows, cols, PML_F32);
    for (int64_t i = 0; i < rows * cols; i++)
        ((float *)v.data)[i] = (float)(rand() % 2000 - 1000) * 1e-4F;
    return v;
}

static pml_view ints(int64_t n, int32_t step, int32_t modulo)
{
    pml_view v = pml_matrix(room((size_t)n * sizeof(int32_t)), 1, n, PML_I32);
    for (int64_t i = 0; i < n; i++)
        ((int32_t *)v.data)[i] = (int32_t)(i * step % modulo);
    return v;
}

/* Time one op: best of many, since everything that disturbs a measurement makes it longer. `full`
 * and `lora` say how often it occurs in a micro-step with its update. */
static void measure(const char *what, pml_op op, pml_op_args args, double flops, double bytes,
                    int full, int lora)
{
    const pml_backend *cpu = pml_backend_cpu();
    const pml_op_info *info = pml_op_describe(op);
    pml_error err = PML_ERROR_INIT;
    size_t ws = cpu->workspace(NULL, op, &args);
    void *scratch = ws > 0 ? room(ws) : NULL;
    if (ws > 0)
        pml_op_views(&args)[info->n_views - 1] = pml_vector(scratch, (int64_t)ws, PML_U8);
    double best = 1e9, end = now() + 0.6;
    for (int i = 0; i < 5 || now() < end; i++) {
        double start = now();
        must(pml_op_run(cpu, op, queue, &args, &err), &err);
        double seconds = now() - start;
        best = seconds < best ? seconds : best;
    }
    printf("%-28s %9.3f ms", what, best * 1e3);
    if (flops > 0)
        printf(" %8.1f GFLOP/s", flops / best * 1e-9);
    else
        printf(" %8.1f GB/s   ", bytes / best * 1e-9);
    printf("  x%-3d %8.2f ms   x%-3d %8.2f ms\n", full, best * full * 1e3, lora, best * lora * 1e3);
    full_seconds += best * full;
    lora_seconds += best * lora;
    cpu->free(device, &scratch, ws);
}

static void bench_linear(const char *name, int parts, int n0, int n1, int n2, int64_t k)
{
    int64_t n = n0 + n1 + n2;
    double product = 2.0 * TOKENS * (double)n * (double)k;
    double low_rank = 2.0 * TOKENS * RANK * (double)(n + parts * k);
    char what[64];
    pml_op_args f = {.linear = {.x = floats(TOKENS, k),
                                .w = floats(n, k),
                                .y = floats(TOKENS, n),
                                .parts = parts,
                                .part_cols = {n0, n1, n2}}};
    snprintf(what, sizeof what, "linear %s", name);
    measure(what, PML_OP_linear, f, product, 0, LAYERS, 0);
    pml_op_args b = {.linear_bwd = {.dy = floats(TOKENS, n),
                                    .x = f.linear.x,
                                    .w = f.linear.w,
                                    .dx = floats(TOKENS, k),
                                    .dw = floats(n, k),
                                    .parts = parts,
                                    .part_cols = {n0, n1, n2}}};
    snprintf(what, sizeof what, "linear_bwd %s", name);
    measure(what, PML_OP_linear_bwd, b, 2 * product, 0, LAYERS, 0);

    f.linear.a = floats((int64_t)parts * RANK, k);
    f.linear.b = floats(n, RANK);
    f.linear.u = floats(TOKENS, (int64_t)parts * RANK);
    f.linear.lora_parts = (1U << parts) - 1;
    f.linear.rank = RANK;
    for (int i = 0; i < PML_LINEAR_MAX_PARTS; i++)
        f.linear.lora_scale[i] = 1;
    snprintf(what, sizeof what, "linear+lora %s", name);
    measure(what, PML_OP_linear, f, product + low_rank, 0, 0, LAYERS);
    b.linear_bwd.dw = (pml_view){0};
    b.linear_bwd.a = f.linear.a;
    b.linear_bwd.b = f.linear.b;
    b.linear_bwd.u = f.linear.u;
    b.linear_bwd.da = floats((int64_t)parts * RANK, k);
    b.linear_bwd.db = floats(n, RANK);
    b.linear_bwd.lora_parts = f.linear.lora_parts;
    b.linear_bwd.rank = RANK;
    memcpy(b.linear_bwd.lora_scale, f.linear.lora_scale, sizeof f.linear.lora_scale);
    snprintf(what, sizeof what, "linear_bwd+lora %s", name);
    measure(what, PML_OP_linear_bwd, b, product + 2 * low_rank, 0, 0, LAYERS);
}

static void bench_attention(void)
{
    /* Half of each document's square; two products forward, five backward. */
    double pairs = (double)DOCUMENTS * ROW * (ROW + 1) / 2, flops = 2.0 * pairs * HEADS * DIM;
    pml_view qkv = floats(TOKENS, QKV), dqkv = floats(TOKENS, QKV),
             cu = ints(DOCUMENTS + 1, ROW, TOKENS + 1), pos = ints(TOKENS, 1, ROW),
             table = floats(ROW, DIM);
    pml_op_args f = {
        .attention = {.q = pml_view_columns(qkv, 0, HIDDEN),
                      .k = pml_view_columns(qkv, HIDDEN, KV_HEADS * DIM),
                      .v = pml_view_columns(qkv, HIDDEN + KV_HEADS * DIM, KV_HEADS * DIM),
                      .cu_q = cu,
                      .cu_k = cu,
                      .o = floats(TOKENS, HIDDEN),
                      .lse = floats(HEADS, TOKENS),
                      .heads = HEADS,
                      .kv_heads = KV_HEADS,
                      .head_dim = DIM,
                      .max_q = ROW,
                      .scale = 0.17F}};
    measure("attention", PML_OP_attention, f, 2 * flops, 0, LAYERS, LAYERS);
    pml_op_args b = {
        .attention_bwd = {.dout = floats(TOKENS, HIDDEN),
                          .q = f.attention.q,
                          .k = f.attention.k,
                          .v = f.attention.v,
                          .o = f.attention.o,
                          .lse = f.attention.lse,
                          .cu_q = cu,
                          .cu_k = cu,
                          .pos = pos,
                          .table = table,
                          .dq = pml_view_columns(dqkv, 0, HIDDEN),
                          .dk = pml_view_columns(dqkv, HIDDEN, KV_HEADS * DIM),
                          .dv = pml_view_columns(dqkv, HIDDEN + KV_HEADS * DIM, KV_HEADS * DIM),
                          .heads = HEADS,
                          .kv_heads = KV_HEADS,
                          .head_dim = DIM,
                          .max_q = ROW,
                          .scale = 0.17F}};
    measure("attention_bwd", PML_OP_attention_bwd, b, 5 * flops, 0, LAYERS, LAYERS);
    pml_op_args r = {.rope = {.x = pml_view_columns(qkv, 0, HIDDEN + KV_HEADS * DIM),
                              .pos = pos,
                              .table = table,
                              .heads = HEADS + KV_HEADS,
                              .head_dim = DIM}};
    measure("rope", PML_OP_rope, r, 0, 2.0 * TOKENS * (HIDDEN + KV_HEADS * DIM) * 4, LAYERS,
            LAYERS);
}

static void bench_rows(void)
{
    double activation = 4.0 * TOKENS * HIDDEN;
    pml_op_args n = {.rmsnorm = {.x = floats(TOKENS, HIDDEN),
                                 .add = floats(TOKENS, HIDDEN),
                                 .weight = floats(1, HIDDEN),
                                 .sum = floats(TOKENS, HIDDEN),
                                 .y = floats(TOKENS, HIDDEN),
                                 .rstd = floats(1, TOKENS),
                                 .eps = 1e-5F}};
    measure("rmsnorm", PML_OP_rmsnorm, n, 0, 4 * activation, 2 * LAYERS + 1, 2 * LAYERS + 1);
    pml_op_args nb = {.rmsnorm_bwd = {.dy = floats(TOKENS, HIDDEN),
                                      .x = n.rmsnorm.sum,
                                      .weight = n.rmsnorm.weight,
                                      .rstd = n.rmsnorm.rstd,
                                      .dres = floats(TOKENS, HIDDEN),
                                      .dx = floats(TOKENS, HIDDEN),
                                      .dweight = floats(1, HIDDEN)}};
    measure("rmsnorm_bwd", PML_OP_rmsnorm_bwd, nb, 0, 4 * activation, 2 * LAYERS + 1,
            2 * LAYERS + 1);
    pml_op_args s = {.swiglu = {.gate_up = floats(TOKENS, 2 * INNER), .h = floats(TOKENS, INNER)}};
    measure("swiglu", PML_OP_swiglu, s, 0, 12.0 * TOKENS * INNER, LAYERS, LAYERS);
    pml_op_args sb = {.swiglu_bwd = {.dh = s.swiglu.h,
                                     .gate_up = s.swiglu.gate_up,
                                     .dgate_up = floats(TOKENS, 2 * INNER)}};
    measure("swiglu_bwd", PML_OP_swiglu_bwd, sb, 0, 20.0 * TOKENS * INNER, LAYERS, LAYERS);
    pml_op_args e = {.embed = {.ids = ints(TOKENS, 37, VOCAB),
                               .table = floats(VOCAB, HIDDEN),
                               .y = floats(TOKENS, HIDDEN)}};
    measure("embed", PML_OP_embed, e, 0, 2 * activation, 1, 1);
    pml_op_args eb = {
        .embed_bwd = {.ids = e.embed.ids, .dy = e.embed.y, .dtable = floats(VOCAB, HIDDEN)}};
    measure("embed_bwd", PML_OP_embed_bwd, eb, 0, 3 * activation, 1, 0);
}

static void bench_head(void)
{
    double product = 2.0 * TOKENS * VOCAB * HIDDEN;
    pml_op_args h = {.head_loss = {.x = floats(TOKENS, HIDDEN),
                                   .w = floats(VOCAB, HIDDEN),
                                   .rows = ints(TOKENS, 1, TOKENS),
                                   .labels = ints(TOKENS, 91, VOCAB),
                                   .loss = floats(1, TOKENS),
                                   .chunk = CHUNK}};
    measure("head_loss, evaluation", PML_OP_head_loss, h, product, 0, 0, 0);
    h.head_loss.dx = floats(TOKENS, HIDDEN);
    measure("head_loss, frozen", PML_OP_head_loss, h, 2 * product, 0, 0, 1);
    h.head_loss.dw = floats(VOCAB, HIDDEN);
    measure("head_loss, trained", PML_OP_head_loss, h, 3 * product, 0, 1, 0);
}

static void bench_update(void)
{
    pml_op_args a = {.adamw = {.p = floats(1, PARAMETERS),
                               .g = floats(1, PARAMETERS),
                               .m = floats(1, PARAMETERS),
                               .v = floats(1, PARAMETERS),
                               .hyper = floats(1, PML_HYPER_COUNT)}};
    float *hyper = a.adamw.hyper.data, *v = a.adamw.v.data;
    memset(hyper, 0, PML_HYPER_COUNT * sizeof *hyper);
    hyper[PML_HYPER_BIAS1] = hyper[PML_HYPER_BIAS2] = 1;
    hyper[PML_HYPER_EPS] = 1e-8F;
    for (int i = 0; i < PARAMETERS; i++)
        v[i] = v[i] * v[i];
    measure("adamw", PML_OP_adamw, a, 0, 28.0 * PARAMETERS, 1, 0);
    pml_op_args s = {.sumsq = {.x = a.adamw.g, .total = floats(1, 2)}};
    s.sumsq.total.dtype = PML_F64;
    s.sumsq.total.cols = s.sumsq.total.ld = 1;
    measure("sumsq", PML_OP_sumsq, s, 0, 4.0 * PARAMETERS, 1, 0);
    pml_op_args z = {.fill = {.y = a.adamw.g}};
    measure("fill", PML_OP_fill, z, 0, 4.0 * PARAMETERS, 1, 0);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    const pml_backend *cpu = pml_backend_cpu();
    pml_device_options options = {.threads = argc > 1 ? atoi(argv[1]) : 2};
    if (options.threads == 1)
        clock_used = CLOCK_THREAD_CPUTIME_ID;
    pml_device_info info;
    pml_error err = PML_ERROR_INIT;
    must(cpu->open(&options, &device, &err), &err);
    must(cpu->queue_new(device, &queue, &err), &err);
    must(cpu->info(device, &info, &err), &err);
    printf("%s, %d threads, %s, %s\n\n%-28s %12s %16s  %16s   %16s\n", info.name, info.threads,
           info.instructions, info.libraries, "op", "once", "", "full step", "LoRA step");
    bench_linear("qkv", 3, HIDDEN, KV_HEADS * DIM, KV_HEADS * DIM, HIDDEN);
    bench_linear("o", 1, HIDDEN, 0, 0, HIDDEN);
    bench_linear("gate,up", 2, INNER, INNER, 0, HIDDEN);
    bench_linear("down", 1, HIDDEN, 0, 0, INNER);
    bench_attention();
    bench_rows();
    bench_head();
    bench_update();
    printf("\nsum of ops: full %.1f ms = %.0f tok/s, LoRA %.1f ms = %.0f tok/s\n",
           full_seconds * 1e3, TOKENS / full_seconds, lora_seconds * 1e3, TOKENS / lora_seconds);
    cpu->queue_destroy(&queue);
    cpu->close(&device);
    return 0;
}
