#include "pml/plan/rates.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/json/json.h"

typedef struct measured {
    pml_op op;
    double gflops, gbytes;
} measured;

/* A table: `other` for the ops it does not name. The half of a row that an op was not found to be
 * bound by is `other`'s. */
typedef struct table {
    const char *source;
    pml_rate other;
    const measured *rows;
    size_t n;
    double narrow, laid;
} table;

static const measured zen3[] = {
    {PML_OP_linear, 175, 40},       {PML_OP_linear_bwd, 165, 40}, {PML_OP_attention, 78, 40},
    {PML_OP_attention_bwd, 85, 40}, {PML_OP_head_loss, 144, 40},  {PML_OP_rmsnorm, 60, 80},
    {PML_OP_rmsnorm_bwd, 60, 75},   {PML_OP_swiglu, 60, 35},      {PML_OP_swiglu_bwd, 60, 39},
    {PML_OP_rope, 60, 120},         {PML_OP_embed, 60, 130},      {PML_OP_embed_bwd, 60, 85},
    {PML_OP_adamw, 60, 60},         {PML_OP_sumsq, 60, 28},       {PML_OP_fill, 60, 32},
    {PML_OP_nf4_dequantise, 60, 12}};

/* Products with their rank-16 parts, swiglu with those beside it, at the shapes of Llama-3.1-8B, as
 * they are in a step at the card's power limit; attention forward by cuDNN, backward by
 * attention_hopper.c with rope's turn, counted causally. */
static const measured h200[] = {{PML_OP_linear, 680e3, 3500},
                                {PML_OP_linear_bwd, 680e3, 3500},
                                {PML_OP_head_loss, 675e3, 3500},
                                {PML_OP_attention, 415e3, 3500},
                                {PML_OP_attention_bwd, 395e3, 3500},
                                {PML_OP_rmsnorm, 600e3, 3900},
                                {PML_OP_rmsnorm_bwd, 600e3, 3850},
                                {PML_OP_rope, 600e3, 3700},
                                {PML_OP_embed, 600e3, 3800},
                                {PML_OP_swiglu, 600e3, 3500},
                                {PML_OP_swiglu_bwd, 600e3, 3000},
                                {PML_OP_adamw, 600e3, 3700},
                                {PML_OP_sumsq, 600e3, 3700},
                                {PML_OP_fill, 600e3, 4200},
                                {PML_OP_copy, 600e3, 3900},
                                {PML_OP_offload, 600e3, 55},
                                {PML_OP_fetch, 600e3, 55}};

static const table tables[] = {
    {"AMD EPYC of Zen 3's class, 2 threads, AVX2, float32, 2026-11-21 "
     "(docs/performance/cpu-ops.md)",
     {60e9, 40e9, 5e-6},
     zen3,
     sizeof zen3 / sizeof *zen3,
     1,
     1.0e-9}, /* a further piece of 8M's and 135M's steps, whole (docs/performance/cpu.md) */
    {"NVIDIA H200, bfloat16, 2026-11-22 (docs/performance/gpu.md and gpu-seed.md)",
     {600e12, 3.5e12, 4e-6},
     h200,
     sizeof h200 / sizeof *h200,
     1.62,
     0}, /* 8B over FP8, whole steps: 0.302 s (docs/performance/gpu.md) */
};

static void built_in(const char *backend, pml_rates *rates)
{
    const table *t = &tables[strcmp(backend, "cpu") == 0 ? 0 : 1];
    for (int op = 0; op < PML_OP_COUNT; op++)
        rates->op[op] = t->other;
    rates->narrow = t->narrow;
    rates->laid = t->laid;
    for (size_t i = 0; i < t->n; i++) {
        rates->op[t->rows[i].op].flops = t->rows[i].gflops * 1e9;
        rates->op[t->rows[i].op].bytes = t->rows[i].gbytes * 1e9;
    }
    snprintf(rates->source, sizeof rates->source, "%s", t->source);
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
    if (status == PML_OK)
        snprintf(rates->source, sizeof rates->source, "%.255s", name);
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
    double wide = cost.flops - cost.narrow + cost.narrow / rates->narrow;
    double arithmetic = wide / rate->flops, memory = cost.bytes / rate->bytes;
    return rate->seconds + (arithmetic > memory ? arithmetic : memory) + cost.laid * rates->laid;
}
