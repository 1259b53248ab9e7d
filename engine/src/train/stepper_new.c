/* Birth and end of a stepper: spec, plan, program, arena, weights. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "choose.h"
#include "pml/train/config.h"
#include "stepper_impl.h"

static pml_status open_device(pml_stepper *s, const pml_stepper_options *o, pml_error *err)
{
    const pml_device_options options = {.index = o->device_index,
                                        .threads = o->threads,
                                        .deterministic = o->config->deterministic,
                                        .cache = o->cache};
    unsigned dtypes;
    pml_status status = s->backend->dtypes_of(o->device_index, &dtypes, err);
    if (status == PML_OK && (s->backend->dtypes & ~dtypes) >> s->config.dtype & 1)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "this device does not compute in %s, which needs compute capability 8.0: "
                        "dtype=\"float16\" does what it is for",
                        pml_dtype_name(s->config.dtype));
    if (status == PML_OK && s->config.quant == PML_QUANT_FP8 && (dtypes >> PML_U8 & 1) == 0)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "quant=\"fp8\": this device does not multiply 8-bit numbers, which needs "
                        "compute capability 8.9: quant=\"nf4\" takes less memory still");
    if (status == PML_OK)
        status = s->backend->open(&options, &s->device, err);
    return status == PML_OK ? s->backend->queue_new(s->device, &s->queue, err) : status;
}

/* Choices that decide bits, taken from an earlier run; they must still fit. */
static pml_status repeat_plan(pml_stepper *s, const pml_stepper_options *o, size_t available,
                              pml_error *err)
{
    pml_status status =
        pml_plan_given(&s->spec, &s->config, &o->limits, s->backend, &o->choices, &s->plan, err);
    if (status == PML_OK && s->plan.total > available)
        return PML_FAIL(err, PML_NO_MEMORY,
                        "the plan of the earlier run needs %zu MiB and %zu MiB are available; "
                        "another plan gives other bits",
                        s->plan.total >> 20, available >> 20);
    if (status == PML_OK && !o->unpacked_as_given) /* decides no bits: as many as fit today */
        status = pml_plan_unpack(&s->spec, &s->config, &o->limits, s->backend,
                                 pml_plan_room(available), &s->plan, err);
    if (status != PML_OK)
        s->plan.total = 0;
    return status;
}

/* What may be planned with, our own context's memory included. With a claim others wait until
 * settle. */
static pml_status ask(pml_stepper *s, const pml_stepper_options *o, size_t *bytes, pml_error *err)
{
    pml_device_info info;
    pml_status status = o->claim != NULL ? o->claim->begin(o->claim->user, err) : PML_OK;
    if (status == PML_OK)
        status = s->backend->info(s->device, &info, err);
    if (status != PML_OK)
        return status;
    *bytes = info.memory_free + info.held;
    return o->claim != NULL ? o->claim->ask(o->claim->user, &info, bytes, err) : PML_OK;
}

/* What `planned` says of s->plan is what is reserved; where there is none, s->plan.total is what
 * one needs, 0 where something else failed. */
static pml_status settle(pml_stepper *s, const pml_stepper_options *o, pml_status planned,
                         pml_error *err)
{
    if (o->claim == NULL)
        return planned;
    if (planned == PML_OK)
        return o->claim->settle(o->claim->user, s->plan.total, err);
    o->claim->give_up(o->claim->user, s->plan.total, err);
    return planned;
}

static pml_status find_plan(pml_stepper *s, const pml_stepper_options *o, pml_error *err)
{
    size_t available = s->config.memory_limit, there = 0;
    pml_status status = PML_OK;
    if (available == 0 || o->claim != NULL)
        status = ask(s, o, &there, err);
    if (status != PML_OK)
        return status;
    available = available > 0 ? available : there;
    status = o->choices.head_chunk > 0 ? repeat_plan(s, o, available, err)
                                       : pml_plan_make(&s->spec, &s->config, &o->limits, s->backend,
                                                       pml_plan_room(available), &s->plan, err);
    s->plan.available = available;
    return status;
}

static pml_status make_plan(pml_stepper *s, const pml_stepper_options *o, pml_error *err)
{
    pml_status status = settle(s, o, find_plan(s, o, err), err);
    if (status != PML_OK)
        return status;
    pml_plan_settle(&s->plan.choices, &s->config);
    return pml_plan_build(&s->plan, &s->spec, &s->config, s->backend, &s->program, err);
}

static size_t logits_bytes(const pml_stepper *s)
{
    return (size_t)s->program->generate_rows * (size_t)s->spec.vocab * sizeof *s->logits;
}

/* Page-locked where that is something: a GPU reads and writes it without a stop on the way. */
static pml_status take_locked(pml_stepper *s, size_t bytes, void **memory, pml_error *err)
{
    if (strcmp(s->backend->name, "cpu") != 0)
        return s->backend->host_alloc(s->device, bytes, memory, err);
    *memory = calloc(1, bytes);
    return *memory != NULL ? PML_OK
                           : PML_FAIL(err, PML_NO_MEMORY, "no host memory for the stepper");
}

static void give_locked(pml_stepper *s, void *memory, size_t bytes)
{
    if (memory != NULL && strcmp(s->backend->name, "cpu") != 0)
        s->backend->host_free(s->device, &memory, bytes);
    else
        free(memory);
}

static size_t inputs_bytes(const pml_stepper *s)
{
    const size_t longs = (size_t)s->program->limits.tokens + 2;
    const size_t ints = s->staged_ints + s->staged_ints % 2; /* longs behind them are aligned */
    return longs * sizeof(int64_t) + ints * sizeof(int32_t);
}

/* What is told of a step, then the batches: places, seed and step, numbers. */
static pml_status take_inputs(pml_stepper *s, pml_error *err)
{
    void *memory = NULL;
    const size_t batch = inputs_bytes(s);
    pml_status status = take_locked(s, sizeof *s->told + PMLI_INPUTS * batch, &memory, err);
    if (status != PML_OK)
        return status;
    s->told = memory;
    for (int i = 0; i < PMLI_INPUTS; i++) {
        pmli_inputs *to = &s->inputs[i];
        to->places = (int64_t *)(void *)((char *)(s->told + 1) + (size_t)i * batch);
        to->rng = to->places + s->program->limits.tokens;
        to->ints = (int32_t *)(void *)(to->rng + 2);
    }
    s->staged = s->inputs[0].ints;
    return PML_OK;
}

/* All host memory that steps will use, but for what activations wait in. */
static pml_status take_host_memory(pml_stepper *s, pml_error *err)
{
    pml_program *p = s->program;
    const pml_batch_limits *l = &p->limits;
    size_t inputs = 2 * (size_t)l->tokens + (size_t)l->docs + 1 + 2 * (size_t)l->labels;
    size_t sampling = 3 * (size_t)p->generate_chunk + 5 * (size_t)p->generate_rows + 2;
    s->staged_ints = inputs > sampling ? inputs : sampling;
    s->reduced = s->comm != NULL && pml_comm_world(s->comm) > 1
                     ? calloc(PMLI_REDUCE_FLOATS, sizeof *s->reduced)
                     : calloc(1, sizeof *s->reduced);
    s->chosen = calloc(pmli_choose_scratch(s->spec.vocab), sizeof *s->chosen);
    s->said = calloc((size_t)l->generate_length + 1, sizeof *s->said);
    s->times = calloc((size_t)p->n_nodes, sizeof *s->times);
    s->trained = calloc((size_t)p->n_parameters, sizeof *s->trained);
    const bool binds = s->backend->ahead != NULL; /* what does not record its segments */
    const int32_t sampled =
        p->segments[PML_SEGMENT_GENERATE].end - p->segments[PML_SEGMENT_GENERATE].first;
    s->bound = binds ? calloc((size_t)sampled + 1, sizeof *s->bound) : NULL;
    if (s->reduced == NULL || s->chosen == NULL || s->said == NULL || s->times == NULL ||
        s->trained == NULL || (binds && s->bound == NULL))
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory for the stepper's buffers");
    for (int32_t i = 0; i < p->n_parameters; i++) {
        if (!p->parameters[i].trained)
            continue;
        s->trained[s->n_trained++] = i;
        s->trained_floats += (size_t)(p->parameters[i].rows * p->parameters[i].cols);
    }
    void *logits = NULL;
    pml_status status = take_locked(s, logits_bytes(s), &logits, err);
    s->logits = logits;
    return status == PML_OK ? take_inputs(s, err) : status;
}

/* As if it had never been taken. */
static void give_memory(pml_stepper *s)
{
    pml_program *p = s->program;
    if (p != NULL) {
        give_locked(s, s->logits, logits_bytes(s));
        give_locked(s, s->told, sizeof *s->told + PMLI_INPUTS * inputs_bytes(s));
        if (p->host != NULL)
            s->backend->host_free(s->device, &p->host, p->host_bytes);
        if (s->arena != NULL)
            s->backend->free(s->device, &s->arena, p->arena);
    }
    free(s->times);
    free(s->trained);
    free(s->bound);
    free(s->reduced);
    free(s->chosen);
    free(s->said);
    s->logits = s->reduced = NULL;
    s->told = NULL;
    s->times = NULL;
    s->bound = NULL;
    s->trained = s->chosen = s->said = NULL;
    s->n_trained = 0;
    s->trained_floats = 0;
}

/* What there was no memory for; REFUSED_NOTHING: there was, or something else failed. */
typedef enum refused { REFUSED_NOTHING = 0, REFUSED_ARENA, REFUSED_HOST } refused;

static pml_status take_memory(pml_stepper *s, const pml_stepper_options *o, refused *what,
                              pml_error *err)
{
    pml_program *p = s->program;
    pml_status status = s->backend->alloc(s->device, p->arena, &s->arena, err);
    *what = status == PML_NO_MEMORY ? REFUSED_ARENA : REFUSED_NOTHING;
    if (status == PML_OK && o->claim != NULL)
        status = o->claim->taken(o->claim->user, p->arena, err);
    if (status == PML_OK)
        status = take_host_memory(s, err);
    if (status != PML_OK || p->host_bytes == 0)
        return status;
    status = s->backend->host_alloc(s->device, p->host_bytes, &p->host, err);
    if (status == PML_OK)
        return status;
    *what = status == PML_NO_MEMORY ? REFUSED_HOST : REFUSED_NOTHING;
    return pml_error_prefix(err,
                            "%d layers' activations were to wait in host memory; a smaller batch "
                            "or shorter rows need less of it",
                            s->plan.choices.offload_layers);
}

/* What another process has taken since the plan was made shows in what is free now; where it does
 * not (memory in pieces, or kept by the driver), a sixteenth less is asked for. How much the host
 * would lock nobody says: none of it is asked for then. */
static pml_status plan_again(pml_stepper *s, const pml_stepper_options *o, refused what,
                             pml_error *err)
{
    const pml_plan first = s->plan;
    const size_t most = what == REFUSED_ARENA ? first.total - first.total / 16 : first.available;
    size_t available = 0;
    pml_program_destroy(&s->program);
    s->config.optimizer =
        o->config->optimizer; /* the first plan's choice of moments, too, is open */
    s->config.no_offload |= what == REFUSED_HOST;
    s->plan.total = 0;
    pml_status status = ask(s, o, &available, err);
    available = available < most ? available : most;
    if (status == PML_OK)
        status = pml_plan_make(&s->spec, &s->config, &o->limits, s->backend,
                               pml_plan_room(available), &s->plan, err);
    status = settle(s, o, status, err);
    if (status == PML_OK)
        pml_plan_settle(&s->plan.choices, &s->config);
    if (status == PML_OK)
        status = pml_plan_build(&s->plan, &s->spec, &s->config, s->backend, &s->program, err);
    s->plan.available = available;
    if (what == REFUSED_ARENA)
        snprintf(s->note, sizeof s->note,
                 "the device refused the memory that was planned (%zu MiB); the plan was made "
                 "again, for %zu MiB",
                 first.total >> 20, s->plan.total >> 20);
    else
        snprintf(s->note, sizeof s->note,
                 "the host refused the page-locked memory that activations were to wait in "
                 "(%zu MiB); the plan was made again, without it",
                 first.host >> 20);
    return status;
}

/* Said before it is so: memory that is free and nobody's others would plan with. */
static pml_status give_back(pml_stepper *s, const pml_stepper_options *o, pml_error *err)
{
    pml_status status =
        s->arena != NULL && o->claim != NULL ? o->claim->taken(o->claim->user, 0, err) : PML_OK;
    give_memory(s);
    return status;
}

/* Refused once, it is planned again. Not for what an earlier run or other workers have planned,
 * too: their bits, and their collectives, are of that plan. */
static pml_status take_planned(pml_stepper *s, const pml_stepper_options *o, pml_error *err)
{
    pml_error refusal = PML_ERROR_INIT;
    refused what;
    pml_status status = take_memory(s, o, &what, &refusal);
    bool shared = s->comm != NULL && pml_comm_world(s->comm) > 1;
    if (what != REFUSED_NOTHING && !shared && o->choices.head_chunk == 0) {
        status = give_back(s, o, err);
        if (status == PML_OK)
            status = plan_again(s, o, what, err);
        if (status != PML_OK)
            return pml_error_prefix(err, "%s; and %s", refusal.message,
                                    what == REFUSED_ARENA ? "nothing smaller will do"
                                                          : "nothing without it will do");
        refusal = (pml_error)PML_ERROR_INIT;
        status = take_memory(s, o, &what, &refusal);
    }
    if (status != PML_OK && s->arena == NULL && o->claim != NULL)
        o->claim->give_up(o->claim->user, 0, &refusal);
    if (status != PML_OK && err != NULL)
        *err = refusal;
    return status;
}

pml_status pml_stepper_new(const pml_stepper_options *o, pml_stepper **stepper, pml_error *err)
{
    *stepper = NULL;
    pml_status status = pml_train_config_check(o->config, err);
    if (status != PML_OK)
        return status;
    pml_stepper *s = calloc(1, sizeof *s);
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory for a stepper");
    s->config = *o->config;
    s->config.threads = o->threads;
    s->limits = o->limits;
    s->backend = o->backend;
    s->comm = o->comm;
    s->progress = o->progress;
    s->move = o->move;
    s->enough = o->enough;
    s->asked = o->asked;
    s->user = o->user;
    bool scaled = s->config.dtype == PML_F16;
    s->scale = (pml_loss_scale){.value = scaled ? 0 : 1, .dynamic = scaled};
    if (o->spec != NULL) {
        s->spec = *o->spec;
        s->spec.dtype = PML_F32; /* its weights come from elsewhere, as float32 */
    } else
        status = pml_model_spec_load(s->config.model, &s->spec, err);
    if (status == PML_OK) {
        status = open_device(s, o, err);
        if (status != PML_OK && o->claim != NULL)
            o->claim->give_up(o->claim->user, 0, err);
    }
    if (status == PML_OK)
        status = make_plan(s, o, err);
    if (status == PML_OK)
        status = take_planned(s, o, err);
    if (status == PML_OK)
        pmli_count_flops(s->program, s->arena, &s->cost);
    if (status == PML_OK) {
        pmli_ahead_begin(s);
        status = pmli_load(s, o->spec == NULL, err);
    }
    if (status != PML_OK) {
        pml_stepper_destroy(&s);
        return status;
    }
    *stepper = s;
    return PML_OK;
}

void pml_stepper_destroy(pml_stepper **stepper)
{
    if (stepper == NULL || *stepper == NULL)
        return;
    pml_stepper *s = *stepper;
    pml_error late = PML_ERROR_INIT; /* a device that is lost reads nothing any more */
    pmli_ahead_end(s);
    if (s->queue != NULL) /* an upload under way reads memory that ends here */
        (void)s->backend->sync(s->queue, &late);
    pmli_drop_recorded(s);
    give_memory(s);
    if (s->queue != NULL)
        s->backend->queue_destroy(&s->queue);
    if (s->device != NULL)
        s->backend->close(&s->device);
    pml_program_destroy(&s->program);
    free(s->angles);
    free(s);
    *stepper = NULL;
}
