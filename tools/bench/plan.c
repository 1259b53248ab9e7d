/* How long planning takes, and what it chooses: shapes of known models, no weights and no device.
 *
 *   bench_plan [DEVICE]     cuda (its object beside the program or in PML_CUDA_BACKEND) or cpu
 *
 * A line each: the choices to standard output, so that two versions can be compared by diff; the
 * seconds to standard error. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/plan/plan.h"
#include "pml_op/cpu.h"

typedef struct shape {
    const char *name;
    int32_t vocab, hidden, layers, heads, kv_heads, intermediate;
    bool tied, biased;
} shape;

static const shape shapes[] = {
    {"Llama-3.1-8B", 128256, 4096, 32, 32, 8, 14336, false, false},
    {"Llama-3.2-1B", 128256, 2048, 16, 32, 8, 8192, true, false},
    {"Qwen2.5-0.5B", 151936, 896, 24, 14, 2, 4864, true, true},
    {"Llama-3.1-70B", 128256, 8192, 80, 64, 8, 28672, false, false},
};

typedef struct job {
    int shape;
    pml_quant quant;
    pml_method method;
    pml_optimizer optimizer;
    int32_t rows, length;
    size_t mib; /* 0: no limit */
    int32_t sampled;
} job;

static const job jobs[] = {
    {0, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 8704, 0},
    {0, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 16384, 0},
    {0, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 0, 0},
    {0, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 143360, 256},
    {0, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 16, 2048, 24576, 256},
    {0, PML_QUANT_NONE, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 24576, 0},
    {0, PML_QUANT_NONE, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 20480, 64},
    {0, PML_QUANT_NONE, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 1, 65536, 40960, 0},
    {0, PML_QUANT_FP8, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 16384, 0},
    {1, PML_QUANT_NONE, PML_METHOD_FULL, PML_OPTIMIZER_ADAMW, 4, 2048, 24576, 0},
    {1, PML_QUANT_NONE, PML_METHOD_FULL, PML_OPTIMIZER_ADAMW_AUTO, 8, 2048, 10240, 0},
    {1, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 8, 2048, 3072, 0},
    {2, PML_QUANT_NONE, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 8, 1024, 4096, 0},
    {2, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW_AUTO, 32, 1024, 4096, 0},
    {3, PML_QUANT_NF4, PML_METHOD_LORA, PML_OPTIMIZER_ADAMW, 4, 2048, 49152, 0},
};

static pml_model_spec spec_of(const shape *s)
{
    pml_model_spec spec = {.vocab = s->vocab,
                           .hidden = s->hidden,
                           .layers = s->layers,
                           .heads = s->heads,
                           .kv_heads = s->kv_heads,
                           .head_dim = s->hidden / s->heads,
                           .intermediate = s->intermediate,
                           .max_positions = 131072,
                           .tied_head = s->tied,
                           .qkv_bias = s->biased,
                           .rms_eps = 1e-5F,
                           .dtype = PML_BF16};
    spec.rope.theta = 500000;
    snprintf(spec.family, sizeof spec.family, "%s", s->biased ? "qwen2" : "llama");
    return spec;
}

static void plan_one(const pml_backend *backend, const job *j)
{
    const pml_model_spec spec = spec_of(&shapes[j->shape]);
    const pml_train_config config = {.method = j->method,
                                     .dtype = backend->dtypes >> PML_BF16 & 1 ? PML_BF16 : PML_F32,
                                     .quant = j->quant,
                                     .lora_rank = 16,
                                     .lora_alpha = 32,
                                     .lora_targets = PML_TARGET_ALL_LINEAR,
                                     .optimizer = j->optimizer,
                                     .batch_size = j->rows,
                                     .max_length = j->length};
    const int32_t tokens = j->rows * j->length;
    const pml_batch_limits limits = {tokens, j->rows, tokens - j->rows, j->length, j->sampled};
    pml_plan plan;
    pml_error err = PML_ERROR_INIT;
    double begin = pml_clock_monotonic();
    pml_status status =
        pml_plan_make(&spec, &config, &limits, backend, pml_plan_room(j->mib << 20), &plan, &err);
    double took = pml_clock_monotonic() - begin;
    printf("%s quant %d method %d optimizer %d, %d x %d, %zu MiB: ", shapes[j->shape].name,
           (int)j->quant, (int)j->method, (int)j->optimizer, j->rows, j->length, j->mib);
    if (status != PML_OK)
        printf("%s\n", err.message);
    else
        printf("recompute %d of %d, head %d, pieces %d, 8 bits %d, unpacked %d, offload %d of %d, "
               "%zu bytes, %zu of the host, %.9f s\n",
               plan.choices.recompute, plan.choices.recompute_layers, plan.choices.head_chunk,
               plan.choices.pieces, plan.choices.moments_8bit, plan.choices.unpacked,
               plan.choices.offload, plan.choices.offload_layers, plan.total, plan.host,
               plan.seconds);
    fflush(stdout);
    fprintf(stderr, "planned in %.3f s\n", took);
}

int main(int argc, char **argv)
{
    const pml_backend *backend;
    int index;
    pml_error err = PML_ERROR_INIT;
    pml_cpu_prepare_process(argc, argv);
    if (pml_backend_named(argc > 1 ? argv[1] : "cuda", true, &backend, &index, &err) != PML_OK) {
        fprintf(stderr, "bench_plan: %s\n", err.message);
        return EXIT_FAILURE;
    }
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++)
        plan_one(backend, &jobs[i]);
    return EXIT_SUCCESS;
}
