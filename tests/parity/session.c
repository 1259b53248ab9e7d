#include "session.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/json/json.h"

const char *session_device = "cpu";
pml_dtype session_dtype = PML_F32;
bool session_beside;
const pml_backend *session_backend;

void session_option(const char *option)
{
    if (strcmp(option, "--bf16") == 0)
        session_dtype = PML_BF16;
    else if (strcmp(option, "--fp16") == 0)
        session_dtype = PML_F16;
    else if (strcmp(option, "--beside") == 0)
        session_beside = true;
    else
        session_device = option + 2;
}

bool session_is_skipped(void)
{
    const pml_backend *backend;
    int device;
    unsigned dtypes = 0;
    pml_error err = PML_ERROR_INIT;
    pml_status status = pml_backend_named(session_device, false, &backend, &device, &err);
    if (status == PML_OK)
        status = backend->dtypes_of(device, &dtypes, &err);
    if (status == PML_NOT_FOUND)
        printf("skipped: %s\n", err.message);
    else if (status != PML_OK)
        give_up(__FILE__, __LINE__, &err);
    else if ((dtypes >> session_dtype & 1) == 0)
        printf("skipped: %s has no %s\n", session_device, pml_dtype_name(session_dtype));
    else
        return false;
    return true;
}

bool session_has(pml_dtype dtype)
{
    const pml_backend *backend;
    int device;
    unsigned dtypes;
    MUST(pml_backend_named(session_device, false, &backend, &device, err));
    MUST(backend->dtypes_of(device, &dtypes, err));
    return dtypes >> dtype & 1;
}

static int passed, failed;

void check(bool good, const char *format, ...)
{
    *(good ? &passed : &failed) += 1;
    if (good)
        return;
    va_list args;
    va_start(args, format);
    fputs("FAILED: ", stdout);
    vprintf(format, args);
    putchar('\n');
    va_end(args);
}

int summary(void)
{
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

void give_up(const char *file, int line, const pml_error *err)
{
    printf("%s:%d: %s: %s (%s:%d)\n", file, line, pml_status_name(err->code), err->message,
           err->file, err->line);
    exit(EXIT_FAILURE);
}

static void join(char *out, const char *fixtures, const char *name, const char *rest)
{
    snprintf(out, PML_PATH_MAX, "%s/%s/%s", fixtures, name, rest);
}

static void read_targets(pml_json_at at, pml_train_config *config)
{
    const pml_json *targets;
    MUST(pml_json_get_array(at, "lora_targets", PML_JSON_REQUIRED, &targets, err));
    for (size_t i = 0; i < pml_json_length(targets); i++)
        config->lora_targets |= pml_target_from_name(pml_json_as_string(pml_json_item(targets, i)));
}

/* Groups of one projection each, as the adapter's folder has them. */
static void read_groups(pml_train_config *config)
{
    pml_model_spec spec;
    pml_adapter_config adapter;
    pml_safetensors *file;
    MUST(pml_model_spec_load(config->model, &spec, err));
    MUST(pml_adapter_open(config->lora_init, &spec, &adapter, &file, err));
    config->lora_rslora = adapter.rslora;
    config->lora_saved = adapter.saved;
    config->lora_targets = 0;
    for (int32_t i = 0; i < spec.layers * PML_TARGET_COUNT; i++) {
        int32_t layer = i / PML_TARGET_COUNT;
        pml_target target = (pml_target)(1U << (i % PML_TARGET_COUNT));
        pml_lora_module module = pml_adapter_module(&adapter, file, layer, target);
        if (module.rank == 0)
            continue;
        pml_lora_group *group = &config->lora_groups[config->n_lora_groups++];
        *group = (pml_lora_group){module.rank, module.alpha, (uint32_t)target, {0}};
        group->layers[0] = UINT64_C(1) << layer;
        config->lora_targets |= (uint32_t)target;
    }
    pml_safetensors_close(&file);
}

/* The same words that run.json has. */
static void read_optimizer(pml_json_at at, pml_train_config *c)
{
    char text[400] = "adamw";
    const pml_json *words = NULL;
    MUST(pml_json_get_string(at, "optim", PML_JSON_OPTIONAL, text, sizeof text, err));
    if (strcmp(text, "sgd") == 0)
        c->optimizer = PML_OPTIMIZER_SGD;
    if (strcmp(text, "adamw_8bit") == 0)
        c->optimizer = PML_OPTIMIZER_ADAMW_8BIT;
    MUST(pml_json_get_object(at, "optim_args", PML_JSON_OPTIONAL, &words, err));
    if (words != NULL) {
        pml_json_at in = {words, at.file, "optim_args"};
        MUST(pml_json_get_double(in, "momentum", PML_JSON_OPTIONAL, 0, 1, &c->momentum, err));
        MUST(pml_json_get_double(in, "dampening", PML_JSON_OPTIONAL, 0, 1, &c->dampening, err));
        MUST(pml_json_get_bool(in, "nesterov", PML_JSON_OPTIONAL, &c->nesterov, err));
    }
    MUST(pml_json_get_object(at, "lr_scheduler_kwargs", PML_JSON_OPTIONAL, &words, err));
    if (words == NULL || !pml_json_has(at, "lr_scheduler_kwargs"))
        return;
    pml_message *record;
    pml_json_show(words, text, sizeof text);
    MUST(pml_message_parse_as(PML_RECORD_schedule, text, strlen(text), &record, err));
    pml_schedule_set_keywords(&c->schedule, record);
    pml_message_destroy(&record);
}

pml_quant quant_named(const char *name)
{
    return strcmp(name, "nf4") == 0   ? PML_QUANT_NF4
           : strcmp(name, "fp8") == 0 ? PML_QUANT_FP8
                                      : PML_QUANT_NONE;
}

void load_case(const char *fixtures, const char *name, pml_train_config *config)
{
    char path[PML_PATH_MAX], text[64];
    join(path, fixtures, name, "case.json");
    pml_json *document;
    MUST(pml_json_load(path, &pml_json_file_limits, &document, err));
    pml_json_at at = pml_json_root(document, path);
    *config = (pml_train_config){.dtype = PML_F32,
                                 .beta1 = 0.9,
                                 .beta2 = 0.999,
                                 .epsilon = 1e-8,
                                 .deterministic = true,
                                 .seed = 42};
    const pml_json_need need = PML_JSON_REQUIRED;
    pml_train_config *c = config;
    MUST(pml_json_get_string(at, "method", need, text, sizeof text, err));
    c->method = strcmp(text, "full") == 0 ? PML_METHOD_FULL : PML_METHOD_LORA;
    strcpy(text, "none");
    MUST(pml_json_get_string(at, "quant", PML_JSON_OPTIONAL, text, sizeof text, err));
    c->quant = quant_named(text);
    MUST(pml_json_get_string(at, "lr_scheduler_type", need, text, sizeof text, err));
    MUST(pml_schedule_from_name(text, &c->schedule.type, err));
    MUST(pml_json_get_int(at, "max_steps", need, 1, 10000, &c->max_steps, err));
    MUST(pml_json_get_int(at, "warmup_steps", need, 0, 1000, &c->schedule.warmup_steps, err));
    MUST(pml_json_get_i32(at, "max_length", need, 2, 8192, &c->max_length, err));
    MUST(pml_json_get_i32(at, "per_device_train_batch_size", need, 1, 64, &c->batch_size, err));
    MUST(pml_json_get_i32(at, "gradient_accumulation_steps", need, 1, 64, &c->accumulation, err));
    MUST(pml_json_get_double(at, "weight_decay", need, 0, 10, &c->weight_decay, err));
    MUST(pml_json_get_double(at, "max_grad_norm", need, 0, 10, &c->max_grad_norm, err));
    MUST(pml_json_get_double(at, "learning_rate", need, 0, 10, &c->learning_rate, err));
    c->schedule.learning_rate = c->learning_rate;
    if (c->method == PML_METHOD_LORA) {
        MUST(pml_json_get_i32(at, "lora_r", need, 1, 64, &c->lora_rank, err));
        MUST(pml_json_get_double(at, "lora_alpha", need, 0, 1000, &c->lora_alpha, err));
        read_targets(at, config);
        join(c->lora_init, fixtures, name, "adapter");
    }
    join(c->model, fixtures, name, "model");
    join(c->train_data, fixtures, name, "rows.safetensors");
    read_optimizer(at, c);
    if (pml_json_has(at, "lora_mixed"))
        read_groups(c);
    pml_json_destroy(&document);
}

void session_open(const session_options *o, session *s)
{
    const pml_train_config *config = o->config;
    *s = (session){.config = *config};
    s->config.dtype = session_dtype;
    const pml_backend *backend;
    int device;
    MUST(pml_backend_named(session_device, false, &backend, &device, err));
    if (session_backend != NULL)
        backend = session_backend;
    if (session_beside) {
        static pml_backend beside;
        beside = *backend;
        beside.adapters_beside = true;
        backend = &beside;
    }
    pml_model_spec spec;
    MUST(pml_model_spec_load(config->model, &spec, err));
    MUST(pml_shard_open(config->train_data, spec.vocab, &s->shard, err));
    const pml_sampler_options sampling = {
        .batch_size = config->batch_size,
        .accumulation = config->accumulation,
        .world = o->comm != NULL ? pml_comm_world(o->comm) : 1,
        .rank = o->comm != NULL ? pml_comm_rank(o->comm) : 0,
        .max_length = config->max_length,
        .packing = config->packing,
        .shuffle = config->shuffle,
        .seed = config->seed,
    };
    MUST(pml_sampler_new(s->shard, &sampling, &s->sampler, err));
    pml_stepper_options options = {.config = &s->config,
                                   .backend = backend,
                                   .device_index = device,
                                   .threads = o->threads > 0 ? o->threads : 2,
                                   .comm = o->comm,
                                   .choices = {.recompute = o->recompute,
                                               .recompute_layers = o->recompute_layers,
                                               .head_chunk = o->head_chunk,
                                               .pieces = o->pieces > 0 ? o->pieces : 1,
                                               .unpacked = o->unpacked,
                                               .offload = o->offload,
                                               .offload_layers = o->offload_layers},
                                   .unpacked_as_given = o->unpacked_as_given};
    pml_sampler_bounds(s->sampler, &options.limits.tokens, &options.limits.docs,
                       &options.limits.labels);
    options.limits.max_doc = pml_sampler_max_doc(s->sampler);
    options.limits.generate_length = 40;
    if (o->limits != NULL)
        options.limits = *o->limits;
    MUST(pml_stepper_new(&options, &s->stepper, err));
}

void session_close(session *s)
{
    pml_stepper_destroy(&s->stepper);
    pml_sampler_destroy(&s->sampler);
    pml_shard_close(&s->shard);
}

int64_t session_micros(session *s, pml_comm *comm)
{
    pml_header header = {.labels = pml_sampler_share(s->sampler, s->cursor).labels,
                         .step = s->step};
    if (comm != NULL)
        MUST(pml_comm_header(comm, &header, err));
    int32_t micros = pml_sampler_micros(s->sampler, s->cursor);
    for (int32_t i = 0; i < micros; i++) {
        pml_batch batch;
        MUST(pml_sampler_batch(s->sampler, s->cursor, i, &batch, err));
        if (i == 0)
            MUST(pml_stepper_calibrate(s->stepper, &batch, err));
        MUST(pml_stepper_micro(s->stepper, &batch, err));
    }
    return header.labels;
}

pml_step_result session_step(session *s, pml_comm *comm)
{
    const pml_train_config *c = &s->config;
    int64_t labels = session_micros(s, comm);
    double factor = pml_schedule_factor(&c->schedule, s->step, c->max_steps);
    pml_update update = {.step = s->step + 1,
                         .learning_rate = c->learning_rate * factor,
                         .weight_decay = c->weight_decay,
                         .max_grad_norm = c->max_grad_norm,
                         .labels = labels};
    pml_step_result result;
    MUST(pml_stepper_update(s->stepper, &update, &result, err));
    s->cursor = pml_sampler_next(s->sampler, s->cursor);
    s->step++;
    return result;
}

float *session_read(session *s, pml_state state)
{
    float *values = malloc(pml_stepper_state_floats(s->stepper) * sizeof *values);
    if (values == NULL)
        abort();
    MUST(pml_stepper_read(s->stepper, state, values, err));
    return values;
}

double relative_distance(const float *a, const float *b, size_t n)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - b[i];
        difference += d * d;
        norm += (double)b[i] * b[i];
    }
    return difference == 0 ? 0 : sqrt(difference) / sqrt(norm);
}
