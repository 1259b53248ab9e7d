/* How many rows of logits there are at a time, among the search's choices. */
#include <string.h>

#include "build.h"
#include "search.h"

/* The largest chunk of the head: products of more rows are not faster, and its logits are the
 * largest thing there is for a moment. On an H200 2048 rows are 3 % of a small model's step better
 * than 256 or 512, 4096 no better; on CPUs 256, 512 and 1024 cannot be told apart. */
typedef struct pmli_chunk_limit {
    int32_t rows;
    size_t logits; /* bytes */
} pmli_chunk_limit;
static const pmli_chunk_limit cpu_chunk = {PMLI_CPU_CHUNK, (size_t)64 << 20};
static const pmli_chunk_limit gpu_chunk = {2048, (size_t)1 << 30};

int32_t pmli_widest_chunk(const pmli_search *s, const pml_batch_limits *limits)
{
    const pmli_chunk_limit *most = strcmp(s->backend->name, "cpu") == 0 ? &cpu_chunk : &gpu_chunk;
    size_t row = (size_t)s->spec->vocab * pml_dtype_size(s->config->dtype);
    int32_t chunk = PMLI_SMALLEST_CHUNK;
    while (chunk < most->rows && chunk < limits->labels && (size_t)chunk * 2 * row <= most->logits)
        chunk *= 2;
    return chunk;
}

pml_status pmli_chunk_matters(const pmli_search *s, const pml_batch_limits *limits,
                              const pml_plan *plan, bool *matters, pml_error *err)
{
    const pml_plan_choices *c = &plan->choices;
    const int32_t layers = s->spec->layers;
    pml_plan_choices cheaper[4];
    int n = 0;
    if (c->recompute_layers > 1) { /* a layer less made again, or all of them less deeply */
        cheaper[n] = *c;
        cheaper[n++].recompute_layers--;
    }
    if (c->recompute > PML_RECOMPUTE_NONE) {
        cheaper[n] = *c;
        cheaper[n].recompute--;
        cheaper[n].recompute_layers = cheaper[n].recompute == PML_RECOMPUTE_NONE ? 0 : layers;
        n++;
    }
    if (c->offload_layers > 0) {
        cheaper[n] = *c;
        cheaper[n++].offload_layers--;
    }
    if (pmli_may_unpack(s) && c->unpacked < layers * PMLI_LINEARS) {
        cheaper[n] = *c;
        cheaper[n++].unpacked++;
    }
    *matters = false;
    for (int i = 0; i < n && !*matters && c->head_chunk > PMLI_SMALLEST_CHUNK; i++) {
        pml_plan candidate;
        cheaper[i].head_chunk = PMLI_SMALLEST_CHUNK;
        int32_t span = pml_offload_span(&cheaper[i], layers);
        if (cheaper[i].offload_layers > span)
            cheaper[i].offload_layers = span;
        pml_status status = pmli_estimate(s, limits, &cheaper[i], &candidate, err);
        if (status != PML_OK)
            return status;
        *matters = pmli_plan_fits(s, &candidate);
    }
    return PML_OK;
}
