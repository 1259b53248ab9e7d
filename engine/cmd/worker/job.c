/* The job of a real run: token shards through the stepper, snapshots to checkpoints. */
#include "job.h"

#include "claim.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/log.h"
#include "pml/data/shard.h"
#include "pml/model/spec.h"
#include "pml/train/run.h"
#include "pml/train/stepper.h"
#include "pml_op/cpu.h"

/* One set of rows, and how they are drawn. */
typedef struct source {
    pml_shard *shard;
    pml_sampler *sampler;
} source;

struct job {
    pml_train_config config;
    const pml_backend *backend;
    int device; /* which of its kind */
    pml_comm *comm;
    claim *memory; /* NULL: the device's is the host's */
    source train, eval;
    pml_stepper *stepper;
    pml_snapshot *frame; /* rank 0: what checkpoints are written through */
    void (*tick)(void *user);
    void (*move)(void *user);
    void *user;
    pml_cursor cursor;
    char identity[sizeof((pml_train_state *)0)->identity];
};

/* ---- data ---- */

/* All ranks map one file, so one of them reads it against its hash; no step is made before `go`,
 * for which all must be ready. */
static pml_status open_source(source *s, const char *path, int32_t vocab,
                              const pml_sampler_options *options, pml_error *err)
{
    pml_status status = options->rank == 0 ? pml_shard_verify(path, err) : PML_OK;
    if (status == PML_OK)
        status = pml_shard_open(path, vocab, &s->shard, err);
    return status == PML_OK ? pml_sampler_new(s->shard, options, &s->sampler, err) : status;
}

static void close_source(source *s)
{
    pml_sampler_destroy(&s->sampler);
    pml_shard_close(&s->shard);
}

static pml_status open_data(job *j, const job_setup *setup, int32_t vocab, pml_error *err)
{
    const pml_train_config *c = &j->config;
    pml_sampler_options options = {.batch_size = c->batch_size,
                                   .accumulation = c->accumulation,
                                   .world = setup->world,
                                   .rank = setup->rank,
                                   .max_length = c->max_length,
                                   .packing = c->packing,
                                   .shuffle = c->shuffle,
                                   .group_by_length = c->group_by_length,
                                   .seed = c->seed};
    pml_status status = open_source(&j->train, c->train_data, vocab, &options, err);
    if (status != PML_OK || c->eval_data[0] == '\0')
        return status;
    options.accumulation = 1;
    options.shuffle = options.group_by_length = false;
    status = open_source(&j->eval, c->eval_data, vocab, &options, err);
    if (status != PML_OK)
        pml_error_prefix(err, "eval_data");
    return status;
}

/* Room for every micro-batch of both sources, and for sampling. */
static pml_batch_limits limits_of(const job *j, int32_t generate_length)
{
    pml_batch_limits limits = {.generate_length = generate_length};
    const pml_sampler *samplers[] = {j->train.sampler, j->eval.sampler};
    for (int i = 0; i < 2; i++) {
        int32_t tokens, docs, labels, max_doc;
        if (samplers[i] == NULL)
            continue;
        pml_sampler_bounds(samplers[i], &tokens, &docs, &labels);
        max_doc = pml_sampler_max_doc(samplers[i]);
        limits.tokens = tokens > limits.tokens ? tokens : limits.tokens;
        limits.docs = docs > limits.docs ? docs : limits.docs;
        limits.labels = labels > limits.labels ? labels : limits.labels;
        limits.max_doc = max_doc > limits.max_doc ? max_doc : limits.max_doc;
    }
    return limits;
}

/* ---- the device ---- */

static int threads_of(const pml_train_config *c, int share)
{
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    int threads = c->threads > 0 ? c->threads : cores / share;
    return threads > 0 ? threads : 1;
}

static const char *device_of(const job_setup *setup)
{
    return pml_message_string_at(setup->run, "devices", (size_t)setup->rank);
}

/* Workers on this one's device: all of them for CPU workers of one machine. */
static int sharing(const job_setup *setup)
{
    int n = 0;
    for (size_t i = 0; i < pml_message_count(setup->run, "devices"); i++)
        n += strcmp(pml_message_string_at(setup->run, "devices", i), device_of(setup)) == 0;
    return n;
}

/* Where the Python side keeps its shards, too (pantheraml/data/cache.py); NULL: nowhere. */
static const char *cache_folder(char *path, size_t capacity)
{
    const char *own = getenv("PANTHERAML_CACHE"), *base = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    int n = -1;
    if (own != NULL && own[0] != '\0')
        n = snprintf(path, capacity, "%s/cuda", own);
    else if (base != NULL && base[0] != '\0')
        n = snprintf(path, capacity, "%s/pantheraml/cuda", base);
    else if (home != NULL && home[0] != '\0')
        n = snprintf(path, capacity, "%s/.cache/pantheraml/cuda", home);
    return n > 0 && (size_t)n < capacity ? path : NULL;
}

/* What a GPU's driver compiles, cuDNN's attention and code for what is newer than ours, it keeps in
 * our folder, too, unless the user has said where. It looks once, when it is started. */
static void keep_compiled(const char *device)
{
    char cache[PATH_MAX], folder[PATH_MAX];
    pml_error err = PML_ERROR_INIT;
    if (strcmp(device, "cpu") == 0 || getenv("CUDA_CACHE_PATH") != NULL ||
        cache_folder(cache, sizeof cache) == NULL ||
        snprintf(folder, sizeof folder, "%s/compiled", cache) >= (int)sizeof folder)
        return;
    pml_status status = pml_folder_make(folder, &err);
    if (status == PML_OK && setenv("CUDA_CACHE_PATH", folder, 1) != 0)
        status = PML_FAIL(&err, PML_NO_MEMORY, "no memory for CUDA_CACHE_PATH");
    if (status != PML_OK)
        pml_log(PML_LOG_WARNING, "compiled kernels are kept where the driver keeps them: %s",
                err.message);
}

/* Without a limit the workers of this machine divide what is free before the first of them takes
 * its arena; rank 0's figure counts, so that all make the same plan. */
static pml_status divide_memory(job *j, const job_setup *setup, pml_error *err)
{
    if (j->config.memory_limit > 0)
        return PML_OK;
    size_t total, free = 0;
    pml_status status = setup->rank == 0 ? pml_cpu_memory(&total, &free, err) : PML_OK;
    double bytes = (double)free;
    if (status == PML_OK)
        status = pml_comm_allreduce_f64(setup->comm, &bytes, 1, err);
    if (status == PML_OK)
        j->config.memory_limit = (size_t)(bytes / sharing(setup));
    return status;
}

/* A GPU's memory is reserved among all runs, and its workers divide what is left; the host's is not
 * (docs/decisions/0117): it is divided among this run's. */
static pml_status claim_memory(job *j, const job_setup *setup, job_facts *facts, pml_error *err)
{
    if (j->backend->identity_of == NULL)
        return divide_memory(j, setup, err);
    const claim_options options = {.backend = j->backend,
                                   .index = j->device,
                                   .device = device_of(setup),
                                   .run = setup->folder,
                                   .inherited = setup->reserved,
                                   .comm = setup->comm,
                                   .crowded = &facts->crowded,
                                   .keep = setup->keep,
                                   .tick = setup->tick,
                                   .user = setup->user};
    return claim_new(&options, &j->memory, err);
}

/* A run that goes on repeats its plan: recompute and chunks decide bits. */
static pml_status make_stepper(job *j, const job_setup *setup, const pml_batch_limits *limits,
                               pml_error *err)
{
    pml_message *identity = pml_message_part(setup->run, "identity", 0);
    char cache[PATH_MAX];
    pml_stepper_options options = {
        .config = &j->config,
        .backend = j->backend,
        .device_index = j->device,
        .threads = threads_of(&j->config, setup->share),
        .cache = cache_folder(cache, sizeof cache),
        .comm = setup->comm,
        .limits = *limits,
        .choices = {.recompute = (int32_t)pml_message_int(identity, "recompute"),
                    .recompute_layers = (int32_t)pml_message_int(identity, "recompute_layers"),
                    .head_chunk = (int32_t)pml_message_int(identity, "head_chunk"),
                    .pieces = (int32_t)pml_message_int(identity, "pieces"),
                    .moments_8bit = pml_message_bool(identity, "moments_8bit"),
                    .offload = (int32_t)pml_message_int(identity, "offload"),
                    .offload_layers = (int32_t)pml_message_int(identity, "offload_layers")},
        .progress = setup->progress,
        .move = setup->move,
        .user = setup->user,
        .claim = j->memory != NULL ? claim_of_stepper(j->memory) : NULL,
    };
    pml_message_destroy(&identity);
    pml_status status = pml_stepper_new(&options, &j->stepper, err);
    if (status == PML_OK)
        pml_plan_settle(&pml_stepper_plan(j->stepper)->choices, &j->config);
    if (status == PML_OK)
        status = pml_stepper_identity(j->stepper, j->identity, sizeof j->identity, err);
    return status;
}

/* ---- opening ---- */

static void state_from_config(const job *j, pml_train_state *state)
{
    const pml_train_config *c = &j->config;
    *state = (pml_train_state){.learning_rate = c->learning_rate,
                               .weight_decay = c->weight_decay,
                               .max_grad_norm = c->max_grad_norm,
                               .lora_dropout = c->lora_dropout,
                               .eval_steps = c->eval_steps,
                               .save_steps = c->save_steps,
                               .accumulation = c->accumulation,
                               .schedule = c->schedule,
                               .best_step = -1};
    pml_schedule_begin(&state->schedule, &state->schedule_state);
}

static pml_status train_tune(job *j, const pml_train_state *s, pml_error *err)
{
    pml_status status = pml_stepper_set_dropout(j->stepper, s->lora_dropout, err);
    return status == PML_OK
               ? pml_sampler_set_accumulation(j->train.sampler, (int32_t)s->accumulation, err)
               : status;
}

/* Two of them beside everything else, or one and the stage, within a quarter of what is free; else
 * recovery goes back to the last checkpoint. */
static pml_status room_for_snapshots(const job *j, job_facts *facts, pml_error *err)
{
    size_t total, free, staged;
    pml_status status = pml_cpu_memory(&total, &free, err);
    facts->payload_bytes = pml_snapshot_bytes(j->stepper);
    facts->stage = pml_stepper_stage(j->stepper, &staged);
    if (status == PML_OK && facts->stage != NULL && staged < facts->payload_bytes)
        status = PML_FAIL(err, PML_INTERNAL, "the plan has %zu bytes for a snapshot of %zu", staged,
                          facts->payload_bytes);
    facts->slots =
        j->config.restarts && facts->payload_bytes <= free / (facts->stage != NULL ? 4 : 8);
    return status;
}

/* By way of `memory`, or where there is none yet of a buffer that is gone before the slots come. */
static pml_status load_checkpoint(job *j, const char *folder, void *memory, pml_train_state *state,
                                  pml_error *err)
{
    static const pml_train_state nothing;
    pml_snapshot *snapshot = NULL;
    pml_status status = memory != NULL ? pml_snapshot_frame(j->stepper, &j->config, &snapshot, err)
                                       : pml_snapshot_new(j->stepper, &j->config, &snapshot, err);
    if (status == PML_OK && memory != NULL)
        pml_snapshot_view(snapshot, &nothing, memory);
    if (status == PML_OK)
        status = pml_checkpoint_load_watched(folder, j->move, j->user, snapshot, err);
    if (status == PML_OK)
        status = pml_snapshot_restore(snapshot, j->stepper, err);
    if (status == PML_OK && state != NULL)
        *state = *pml_snapshot_state(snapshot);
    pml_snapshot_destroy(&snapshot);
    return status;
}

static pml_status restore(job *j, const job_setup *setup, pml_train_state *state, pml_error *err)
{
    pml_status status = PML_OK;
    if (setup->kept != NULL) {
        status =
            pml_snapshot_get(j->stepper, setup->kept, setup->payload, setup->payload_bytes, err);
        *state = *setup->kept;
    } else if (setup->checkpoint[0] != '\0') {
        status = load_checkpoint(j, setup->checkpoint, NULL, state, err);
    }
    if (status == PML_OK)
        status = train_tune(j, state, err);
    if (status == PML_OK && setup->rank == 0)
        status = pml_snapshot_frame(j->stepper, &j->config, &j->frame, err);
    j->cursor = state->cursor;
    memcpy(state->identity, j->identity, sizeof state->identity);
    return status;
}

static pml_status open_all(job *j, const job_setup *setup, job_facts *facts, pml_error *err)
{
    pml_model_spec spec;
    pml_status status = pml_train_config_from_run(setup->run, setup->folder, &j->config, err);
    if (status == PML_OK)
        status = pml_model_spec_load(j->config.model, &spec, err);
    if (status == PML_OK)
        status = open_data(j, setup, spec.vocab, err);
    if (status != PML_OK)
        return status;
    pml_train_config_complete(&j->config, pml_message_number(setup->run, "num_train_epochs"),
                              pml_sampler_steps_per_epoch(j->train.sampler));
    pml_batch_limits limits = limits_of(j, (int32_t)pml_message_int(setup->run, "generate_length"));
    status = pml_train_config_check(&j->config, err);
    keep_compiled(device_of(setup));
    if (status == PML_OK)
        status = pml_backend_named(device_of(setup), false, &j->backend, &j->device, err);
    if (status == PML_OK)
        status = claim_memory(j, setup, facts, err);
    if (status == PML_OK)
        status = make_stepper(j, setup, &limits, err);
    if (status != PML_OK)
        return status;
    state_from_config(j, &facts->state);
    facts->max_steps = j->config.max_steps;
    facts->has_eval = j->eval.sampler != NULL;
    facts->policy = (job_policy){.eval_epochs = j->config.eval_epochs,
                                 .save_epochs = j->config.save_epochs,
                                 .save_best = j->config.save_best,
                                 .load_best = j->config.load_best,
                                 .early_patience = j->config.early_patience,
                                 .early_threshold = j->config.early_threshold};
    facts->plan = *pml_stepper_plan(j->stepper);
    facts->positions = spec.max_positions;
    facts->max_length = j->config.max_length;
    facts->available = facts->plan.available;
    pml_device_info info;
    status = pml_stepper_device(j->stepper, &info, err);
    if (status != PML_OK)
        return status;
    snprintf(facts->note, sizeof facts->note, "%s", pml_stepper_note(j->stepper));
    if (j->memory != NULL)
        snprintf(facts->unreserved, sizeof facts->unreserved, "%s", claim_trouble(j->memory));
    memcpy(facts->lacks, info.lacks, sizeof facts->lacks);
    memcpy(facts->device, info.name, sizeof facts->device);
    memcpy(facts->bus, info.bus, sizeof facts->bus);
    if (j->backend->identity_of != NULL) {
        pml_device_identity identity;
        status = j->backend->identity_of(j->device, &identity, err);
        if (status != PML_OK)
            return status;
        memcpy(facts->uuid, identity.uuid, sizeof facts->uuid);
    }
    status = room_for_snapshots(j, facts, err);
    return status == PML_OK ? restore(j, setup, &facts->state, err) : status;
}

static void train_close(job **out)
{
    job *j = *out;
    *out = NULL;
    pml_snapshot_destroy(&j->frame);
    pml_stepper_destroy(&j->stepper);
    claim_destroy(&j->memory); /* when the device's memory is free */
    close_source(&j->eval);
    close_source(&j->train);
    free(j);
}

static pml_status train_open(const job_setup *setup, job **out, job_facts *facts, pml_error *err)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the job");
    (*out)->comm = setup->comm;
    (*out)->tick = setup->tick;
    (*out)->move = setup->move;
    (*out)->user = setup->user;
    return open_all(*out, setup, facts, err);
}

/* ---- what was left behind ---- */

/* The plan is the one that it was taken with, which its own identity says. */
static bool had_moments_8bit(const pml_train_state *kept)
{
    pml_message *holder = pml_message_new(PML_REPORT_ready);
    pml_message_set_json(holder, "identity", kept->identity);
    pml_message *identity = pml_message_part(holder, "identity", 0);
    bool narrow = pml_message_bool(identity, "moments_8bit");
    pml_message_destroy(&identity);
    pml_message_destroy(&holder);
    return narrow;
}

static pml_status train_open_left(const job_setup *setup, job **out, pml_error *err)
{
    job *j = *out = calloc(1, sizeof *j);
    if (j == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the job");
    pml_status status = pml_train_config_from_run(setup->run, setup->folder, &j->config, err);
    if (status == PML_OK)
        status = pml_backend_named(device_of(setup), true, &j->backend, &j->device, err);
    if (status == PML_OK)
        status = pml_snapshot_frame_left(&j->config, had_moments_8bit(setup->kept), j->backend,
                                         &j->frame, err);
    if (status != PML_OK)
        return status;
    size_t bytes = pml_snapshot_frame_bytes(j->frame);
    return bytes == setup->payload_bytes
               ? PML_OK
               : PML_FAIL(err, PML_INVALID,
                          "the snapshot in memory has %zu bytes, and this model and adapter %zu: "
                          "was one of their files changed?",
                          setup->payload_bytes, bytes);
}

/* ---- steps ---- */

static pml_share train_share(job *j)
{
    return pml_sampler_share(j->train.sampler, j->cursor);
}

static double train_epoch(const job *j)
{
    double rows = (double)pml_sampler_rows(j->train.sampler);
    double seen = (double)j->cursor.micro * j->config.batch_size / rows;
    return (double)j->cursor.epoch + (seen < 1 ? seen : 1);
}

static double train_factor(const job *j, const pml_train_state *s)
{
    return pml_schedule_factor(&s->schedule, s->step, j->config.max_steps) *
           s->schedule_state.factor;
}

static pml_status train_step(job *j, const pml_update *update, pml_step_result *result,
                             pml_error *err)
{
    int32_t n = pml_sampler_micros(j->train.sampler, j->cursor);
    pml_status status = PML_OK;
    for (int32_t i = 0; i < n && status == PML_OK; i++) {
        pml_batch batch;
        status = pml_sampler_batch(j->train.sampler, j->cursor, i, &batch, err);
        if (status == PML_OK && i == 0)
            status = pml_stepper_calibrate(j->stepper, &batch, err);
        if (status == PML_OK)
            status = pml_stepper_micro(j->stepper, &batch, err);
        j->tick(j->user);
    }
    if (status == PML_OK)
        status = pml_stepper_update(j->stepper, update, result, err);
    if (status == PML_OK)
        j->cursor = pml_sampler_next(j->train.sampler, j->cursor);
    return status;
}

static pml_status train_evaluate(job *j, bool (*goes_on)(void *user), void *user, double *loss_sum,
                                 double *labels, pml_error *err)
{
    pml_status status = PML_OK;
    for (pml_cursor at = {0, 0}; at.epoch == 0 && status == PML_OK && goes_on(user);
         at = pml_sampler_next(j->eval.sampler, at)) {
        pml_batch batch;
        status = pml_sampler_batch(j->eval.sampler, at, 0, &batch, err);
        if (status == PML_OK && batch.n_tokens > 0)
            status = pml_stepper_evaluate(j->stepper, &batch, loss_sum, err);
        if (status == PML_OK)
            *labels += batch.n_labels;
        j->tick(j->user);
    }
    return status;
}

static pml_status train_sample(job *j, const pml_generate_options *options, pml_error *err)
{
    size_t rows = (size_t)options->n_prompts, each = (size_t)options->max_new_tokens;
    int32_t *out = calloc(rows * (each + 1), sizeof *out); /* tokens of each, then their number */
    if (out == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for %zu new tokens", rows * each);
    pml_status status = pml_stepper_generate(j->stepper, options, out, out + rows * each, err);
    free(out);
    return status;
}

/* ---- where the time goes ---- */

static bool train_is_compiling(const job *j)
{
    return pml_stepper_is_compiling(j->stepper);
}

static void train_timing(job *j, bool on)
{
    pml_stepper_timing(j->stepper, on);
}

static const pml_op_time *train_times(const job *j, int32_t *n_nodes)
{
    return pml_stepper_times(j->stepper, n_nodes);
}

static pml_status train_peak(job *j, double seconds, pml_peak *peak, pml_error *err)
{
    return pml_stepper_peak(j->stepper, seconds, peak, err);
}

static void train_lacks(job *j, char lacks[PML_LACKS])
{
    pml_stepper_lacks(j->stepper, lacks);
}

/* ---- checkpoints ---- */

static pml_status train_put(job *j, const pml_train_state *state, pml_train_state *whole,
                            void *memory, pml_error *err)
{
    pml_status status = pml_snapshot_put(j->stepper, state, whole, memory, err);
    whole->cursor = j->cursor;
    memcpy(whole->identity, j->identity, sizeof whole->identity);
    return status;
}

static pml_status train_go_back(job *j, const char *folder, void *memory, pml_error *err)
{
    return load_checkpoint(j, folder, memory, NULL, err);
}

static pml_status train_write(job *j, const pml_train_state *whole, const void *memory,
                              const char *folder, pml_watch *watch, size_t *bytes, pml_error *err)
{
    pml_snapshot_view(j->frame, whole, (void *)(uintptr_t)memory); /* only read */
    pml_snapshot_watch(j->frame, watch);
    pml_status status = pml_checkpoint_write(j->frame, folder, bytes, err);
    pml_snapshot_watch(j->frame, NULL);
    return status;
}

static pml_status train_prune(job *j, const char *parent, int64_t best, pml_error *err)
{
    return pml_checkpoint_prune(parent, j->config.save_total_limit, best, err);
}

const job_kind job_train = {
    .open = train_open,
    .open_left = train_open_left,
    .close = train_close,
    .share = train_share,
    .epoch = train_epoch,
    .factor = train_factor,
    .tune = train_tune,
    .step = train_step,
    .evaluate = train_evaluate,
    .sample = train_sample,
    .is_compiling = train_is_compiling,
    .timing = train_timing,
    .times = train_times,
    .peak = train_peak,
    .lacks = train_lacks,
    .put = train_put,
    .go_back = train_go_back,
    .write = train_write,
    .prune = train_prune,
};
