/* The search: of all programs that fit into the memory there is, the one that costs least. */
#include <stdio.h>
#include <string.h>

#include "build.h"

typedef struct pmli_search {
    const pml_model_spec *spec;
    const pml_train_config *config;
    const pml_backend *backend;
    size_t available; /* bytes, 0: no limit */
} pmli_search;

/* What libraries, thread stacks and the program itself take beside the arena (measured: 9 MiB for a
 * bare stepper). Held back here, since a plan is made before anything can be measured; the stepper
 * puts the measured value in its place. */
static const size_t runtime_reserve = (size_t)32 << 20;

/* On a GPU: the context (527 MiB on an H200 with driver 580), cuBLASLt, kernels and recorded
 * graphs. */
static const size_t gpu_reserve = (size_t)640 << 20;

/* Where the device's memory is the host's, the snapshot that checkpoints are written from counts
 * too: values and both moments, float32. */
static size_t runtime_bytes(const pmli_search *s, int64_t trainable)
{
    bool on_host = strcmp(s->backend->name, "cpu") == 0;
    return on_host ? runtime_reserve + 3 * sizeof(float) * (size_t)trainable : gpu_reserve;
}

static const char *const cause_names[PML_CAUSE_COUNT] = {
    "weights",     "adapters",  "gradients",     "optimizer",
    "activations", "workspace", "communication", "runtime"};

const char *pml_cause_name(pml_cause cause)
{
    return (unsigned)cause < PML_CAUSE_COUNT ? cause_names[cause] : "?";
}

enum {
    SMALLEST_CHUNK = 8,
    LARGEST_CHUNK = 1024, /* a product of more rows is not faster */
    SHORTEST_LENGTH = 32,
    BALANCE = 20 /* floating-point operations in the time of one byte; only orders candidates */
};
static const size_t largest_logits = (size_t)256 << 20;

static pml_program_options options_for(const pmli_search *s, const pml_batch_limits *limits,
                                       int32_t recompute, int32_t chunk)
{
    return (pml_program_options){.spec = s->spec,
                                 .config = s->config,
                                 .limits = *limits,
                                 .backend = s->backend,
                                 .recompute_layers = recompute,
                                 .head_chunk = chunk};
}

static pml_cost micro_cost(const pml_program *p)
{
    pml_counts counts = pml_program_capacity(p, PML_SEGMENT_MICRO);
    pml_cost sum = {0, 0};
    for (int32_t n = p->segments[PML_SEGMENT_MICRO].first; n < p->segments[PML_SEGMENT_MICRO].end;
         n++) {
        pml_op_args args;
        pml_program_bind(p, &p->nodes[n], (void *)(uintptr_t)PMLI_ALIGN, &counts, &args);
        pml_cost cost = pml_node_cost(p->nodes[n].op, &args);
        sum.flops += cost.flops;
        sum.bytes += cost.bytes;
    }
    return sum;
}

/* Build one candidate and keep its numbers. */
static pml_status try_plan(const pmli_search *s, const pml_batch_limits *limits, int32_t recompute,
                           int32_t chunk, pml_plan *plan, pml_error *err)
{
    pml_program_options options = options_for(s, limits, recompute, chunk);
    pml_program *p = NULL;
    pml_status status = pml_program_build(&options, &p, err);
    if (status != PML_OK)
        return status;
    memset(plan, 0, sizeof *plan);
    memcpy(plan->by_cause, p->by_cause, sizeof plan->by_cause);
    plan->arena = p->arena;
    plan->recompute_layers = recompute;
    plan->head_chunk = chunk;
    plan->limits = *limits;
    pml_cost cost = micro_cost(p);
    plan->flops = cost.flops;
    plan->bytes = cost.bytes;
    plan->parameters = pml_model_parameters(s->spec);
    for (int32_t i = 0; i < p->n_parameters; i++)
        if (p->parameters[i].trained)
            plan->trainable += p->parameters[i].rows * p->parameters[i].cols;
    plan->by_cause[PML_CAUSE_RUNTIME] = runtime_bytes(s, plan->trainable);
    plan->total = p->arena + plan->by_cause[PML_CAUSE_RUNTIME];
    pml_program_destroy(&p);
    return PML_OK;
}

static bool fits(const pmli_search *s, const pml_plan *plan)
{
    return s->available == 0 || plan->total <= s->available;
}

static double price(const pml_plan *plan)
{
    return plan->flops + BALANCE * plan->bytes;
}

/* Chunks double from the smallest; more rows than there are labels gain nothing. */
static int32_t widest_chunk(const pmli_search *s, const pml_batch_limits *limits)
{
    int32_t chunk = SMALLEST_CHUNK;
    while (chunk < LARGEST_CHUNK && chunk < limits->labels &&
           (size_t)chunk * 2 * (size_t)s->spec->vocab * pml_dtype_size(s->config->dtype) <=
               largest_logits)
        chunk *= 2;
    return chunk;
}

/* Fewest recomputed layers with which this chunk fits: memory falls as layers rise. *found = false
 * when even all of them do not do. */
static pml_status fewest_layers(const pmli_search *s, const pml_batch_limits *limits, int32_t chunk,
                                pml_plan *plan, bool *found, pml_error *err)
{
    int32_t low = 0, high = s->spec->layers;
    pml_status status = try_plan(s, limits, low, chunk, plan, err);
    if (status != PML_OK || (*found = fits(s, plan)))
        return status;
    status = try_plan(s, limits, high, chunk, plan, err);
    if (status != PML_OK || !(*found = fits(s, plan)))
        return status;
    while (high - low > 1) { /* low does not fit, high does; plan is high's */
        int32_t middle = low + (high - low) / 2;
        pml_plan candidate;
        status = try_plan(s, limits, middle, chunk, &candidate, err);
        if (status != PML_OK)
            return status;
        if (fits(s, &candidate)) {
            high = middle;
            *plan = candidate;
        } else {
            low = middle;
        }
    }
    return PML_OK;
}

static pml_status smallest(const pmli_search *s, const pml_batch_limits *limits, pml_plan *plan,
                           pml_error *err)
{
    return try_plan(s, limits, s->spec->layers, SMALLEST_CHUNK, plan, err);
}

static int32_t scaled(int32_t value, int64_t part, int64_t whole)
{
    int64_t result = ((int64_t)value * part + whole - 1) / whole;
    return result < 1 ? 1 : (int32_t)result;
}

/* Limits with `rows` of the configured rows a micro-batch, cut at `length` tokens. */
static pml_batch_limits reduced(const pmli_search *s, const pml_batch_limits *limits, int32_t rows,
                                int32_t length)
{
    int32_t all_rows = s->config->batch_size, all_length = s->config->max_length;
    pml_batch_limits r = *limits;
    r.docs = scaled(limits->docs, rows, all_rows);
    r.tokens = scaled(scaled(limits->tokens, rows, all_rows), length, all_length);
    r.labels = scaled(scaled(limits->labels, rows, all_rows), length, all_length);
    r.max_doc = limits->max_doc < length ? limits->max_doc : length;
    r.tokens = r.tokens < r.max_doc ? r.max_doc : r.tokens;
    r.generate_length = limits->generate_length < length ? limits->generate_length : length;
    return r;
}

/* The largest value in [low, high] for which the smallest plan fits; 0 when none does. */
static int32_t largest_that_fits(const pmli_search *s, const pml_batch_limits *limits, bool length,
                                 int32_t low, int32_t high)
{
    int32_t best = 0;
    while (low <= high) {
        int32_t middle = low + (high - low) / 2;
        pml_batch_limits r = length ? reduced(s, limits, 1, middle)
                                    : reduced(s, limits, middle, s->config->max_length);
        pml_plan plan;
        if (smallest(s, &r, &plan, NULL) == PML_OK && fits(s, &plan)) {
            best = middle;
            low = middle + 1;
        } else {
            high = middle - 1;
        }
    }
    return best;
}

static double mib(size_t bytes)
{
    return (double)bytes / (1 << 20);
}

static pml_status does_not_fit(const pmli_search *s, const pml_batch_limits *limits, pml_error *err)
{
    pml_plan least;
    pml_status status = smallest(s, limits, &least, err);
    if (status != PML_OK)
        return status;
    char advice[256];
    int32_t rows = largest_that_fits(s, limits, false, 1, s->config->batch_size - 1);
    int32_t length =
        rows > 0 ? 0 : largest_that_fits(s, limits, true, SHORTEST_LENGTH, s->config->max_length);
    if (rows > 0)
        snprintf(advice, sizeof advice, "per_device_train_batch_size=%d fits", rows);
    else if (length > 0)
        snprintf(advice, sizeof advice, "per_device_train_batch_size=1 with max_length=%d fits",
                 length);
    else if (s->config->method == PML_METHOD_FULL)
        snprintf(advice, sizeof advice,
                 "no batch does; method=\"lora\" needs less, or take a smaller model");
    else
        snprintf(advice, sizeof advice, "no batch does; take a smaller model");
    return PML_FAIL(err, PML_NO_MEMORY,
                    "the smallest plan needs %.0f MiB (%.0f MiB of it weights) and %.0f MiB are "
                    "available: %s",
                    mib(least.total), mib(least.by_cause[PML_CAUSE_WEIGHTS]), mib(s->available),
                    advice);
}

pml_status pml_plan_make(const pml_model_spec *spec, const pml_train_config *config,
                         const pml_batch_limits *limits, const pml_backend *backend,
                         size_t available, pml_plan *plan, pml_error *err)
{
    const pmli_search search = {spec, config, backend, available};
    bool any = false;
    for (int32_t chunk = widest_chunk(&search, limits); chunk >= SMALLEST_CHUNK; chunk /= 2) {
        pml_plan candidate;
        bool found;
        pml_status status = fewest_layers(&search, limits, chunk, &candidate, &found, err);
        if (status != PML_OK)
            return status;
        if (found && (!any || price(&candidate) < price(plan))) {
            *plan = candidate;
            any = true;
        }
        if (found && candidate.recompute_layers == 0)
            break; /* smaller chunks only cost */
    }
    return any ? PML_OK : does_not_fit(&search, limits, err);
}

pml_status pml_plan_given(const pml_model_spec *spec, const pml_train_config *config,
                          const pml_batch_limits *limits, const pml_backend *backend,
                          int32_t recompute_layers, int32_t head_chunk, pml_plan *plan,
                          pml_error *err)
{
    const pmli_search search = {spec, config, backend, 0};
    return try_plan(&search, limits, recompute_layers, head_chunk, plan, err);
}

pml_status pml_plan_build(const pml_plan *plan, const pml_model_spec *spec,
                          const pml_train_config *config, const pml_backend *backend,
                          pml_program **program, pml_error *err)
{
    const pmli_search search = {spec, config, backend, 0};
    pml_program_options options =
        options_for(&search, &plan->limits, plan->recompute_layers, plan->head_chunk);
    return pml_program_build(&options, program, err);
}
