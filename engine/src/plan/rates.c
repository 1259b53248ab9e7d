#include "pml/plan/rates.h"

#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/json/json.h"

/* Zen 3 class, 2 threads, AVX2, at the shapes of docs/performance/cpu-ops.md. */
static const pml_rate on_cpu = {60e9, 40e9, 5e-6};
static const struct {
    pml_op op;
    double gflops, gbytes;
} measured[] = {
    {PML_OP_linear, 172, 40},       {PML_OP_linear_bwd, 162, 40}, {PML_OP_attention, 78, 40},
    {PML_OP_attention_bwd, 85, 40}, {PML_OP_head_loss, 137, 40},  {PML_OP_rmsnorm, 60, 80},
    {PML_OP_rmsnorm_bwd, 60, 75},   {PML_OP_swiglu, 60, 35},      {PML_OP_swiglu_bwd, 60, 39},
    {PML_OP_rope, 60, 120},         {PML_OP_embed, 60, 130},      {PML_OP_embed_bwd, 60, 85},
    {PML_OP_adamw, 60, 60},         {PML_OP_sumsq, 60, 28},       {PML_OP_nf4_dequantise, 60, 12}};

/* H200, bf16, as docs/performance has it op by op: 700 TFLOP/s, 4.2 TB/s. */
static const pml_rate on_gpu = {600e12, 3.5e12, 4e-6};

static void built_in(const char *backend, pml_rates *rates)
{
    bool cpu = strcmp(backend, "cpu") == 0;
    for (int op = 0; op < PML_OP_COUNT; op++)
        rates->op[op] = cpu ? on_cpu : on_gpu;
    for (size_t i = 0; cpu && i < sizeof measured / sizeof *measured; i++) {
        rates->op[measured[i].op].flops = measured[i].gflops * 1e9;
        rates->op[measured[i].op].bytes = measured[i].gbytes * 1e9;
    }
}

static pml_status read_rate(pml_json_at at, pml_rate *rate, pml_error *err)
{
    double gflops = rate->flops * 1e-9, gbytes = rate->bytes * 1e-9, micro = rate->seconds * 1e6;
    const pml_json_need need = PML_JSON_OPTIONAL;
    pml_status status = pml_json_get_double(at, "gflops", need, 1e-3, 1e9, &gflops, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "gbytes", need, 1e-3, 1e9, &gbytes, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "microseconds", need, 0, 1e9, &micro, err);
    *rate = (pml_rate){gflops * 1e9, gbytes * 1e9, micro * 1e-6};
    return status;
}

pml_status pml_rates_parse(const char *text, size_t size, const char *name, pml_rates *rates,
                           pml_error *err)
{
    pml_json *document = NULL;
    pml_status status = pml_json_parse(text, size, name, &pml_json_file_limits, &document, err);
    if (status != PML_OK)
        return status;
    if (pml_json_kind_of(document) != PML_JSON_OBJECT)
        status = PML_FAIL(err, PML_INVALID, "%s: must hold an object", name);
    for (int op = 0; status == PML_OK && op < PML_OP_COUNT; op++) {
        const char *what = pml_op_describe((pml_op)op)->name;
        const pml_json *inside = NULL;
        status = pml_json_get_object(pml_json_root(document, name), what, PML_JSON_OPTIONAL,
                                     &inside, err);
        if (status == PML_OK && inside != NULL)
            status = read_rate((pml_json_at){inside, name, what}, &rates->op[op], err);
    }
    pml_json_destroy(&document);
    return status;
}

pml_status pml_rates_get(const char *backend, pml_rates *rates, pml_error *err)
{
    built_in(backend, rates);
    const char *path = getenv("PANTHERAML_RATES");
    if (path == NULL || path[0] == '\0')
        return PML_OK;
    char *text = NULL;
    size_t size;
    pml_status status = pml_file_read(path, pml_json_file_limits.bytes, true, &text, &size, err);
    if (status == PML_OK)
        status = pml_rates_parse(text, size, path, rates, err);
    free(text);
    return status == PML_OK ? status : pml_error_prefix(err, "PANTHERAML_RATES");
}

double pml_rates_seconds(const pml_rates *rates, pml_op op, pml_cost cost)
{
    const pml_rate *rate = &rates->op[op];
    double arithmetic = cost.flops / rate->flops, memory = cost.bytes / rate->bytes;
    return rate->seconds + (arithmetic > memory ? arithmetic : memory);
}
