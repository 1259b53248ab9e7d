/* What the engine can say without a run: plans, programs, model folders, the machine. */
#include "native.h"

#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>

#include "pml/base/hash.h"
#include "pml/data/packing.h"
#include "pml/json/messages.h"
#include "pml/model/adapter.h"
#include "pml/model/nf4.h"
#include "pml/model/safetensors.h"
#include "pml/plan/plan.h"
#include "pml/plan/program.h"
#include "pml/train/run.h"
#include "pml_op/gauges.h"

/* ---- plans ---- */

/* What plan and program share. */
typedef struct job {
    pml_model_spec spec;
    pml_train_config config;
    pml_batch_limits limits;
    pml_plan plan;
    const pml_backend *backend; /* of the run's first device */
} job;

static pml_status make_plan(const char *text, size_t size, size_t available, job *job,
                            pml_error *err)
{
    pml_message *run = NULL;
    pml_status status = pml_message_parse_as(PML_FILE_run, text, size, &run, err);
    if (status == PML_OK)
        status = pml_train_config_from_run(run, "", &job->config, err);
    if (status == PML_OK)
        status = pml_model_spec_load(job->config.model, &job->spec, err);
    int index;
    if (status == PML_OK)
        status = pml_backend_named(pml_message_string_at(run, "devices", 0), true, &job->backend,
                                   &index, err);
    if (status == PML_OK)
        status = pml_plan_make(&job->spec, &job->config, &job->limits, job->backend,
                               pml_plan_room(available), &job->plan, err);
    pml_message_destroy(&run);
    return status;
}

PyDoc_STRVAR(check_run_doc,
             "check_run(config, /)\n--\n\n"
             "Read run.json's text as a worker will, and raise what is wrong with it by name.");

static PyObject *check_run(PyObject *module, PyObject *argument)
{
    Py_ssize_t size = 0;
    const char *text = PyUnicode_AsUTF8AndSize(argument, &size);
    if (text == NULL)
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_message *run = NULL;
    pml_train_config config;
    pml_status status = pml_message_parse_as(PML_FILE_run, text, (size_t)size, &run, &err);
    if (status == PML_OK)
        status = pml_train_config_from_run(run, "", &config, &err);
    if (status == PML_OK) {
        pml_train_config_complete(&config, 1, 1); /* how many steps, only the data knows */
        status = pml_train_config_check(&config, &err);
    }
    pml_message_destroy(&run);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    Py_RETURN_NONE;
}

/* Arguments that plan and program have in common; false with an exception. */
static bool parse_job(PyObject *args, PyObject *kwargs, const char *format, char **names,
                      const char **text, Py_ssize_t *size, job *job, Py_ssize_t *available)
{
    pml_batch_limits *limits = &job->limits;
    pml_plan_choices *choices = &job->plan.choices; /* asked for where the format says so */
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, text, size, &limits->tokens,
                                     &limits->docs, &limits->labels, &limits->max_doc,
                                     &limits->generate_length, available, &choices->recompute,
                                     &choices->recompute_layers, &choices->head_chunk,
                                     &choices->pieces, &choices->moments_8bit, &choices->unpacked,
                                     &choices->offload, &choices->offload_layers))
        return false;
    if (*available < 0) {
        PyErr_SetString(PyExc_ValueError, "available must not be negative");
        return false;
    }
    return true;
}

PyDoc_STRVAR(plan_doc,
             "plan(config, limits, available=0)\n--\n\n"
             "Plan a run's memory: config is run.json's text, limits (tokens, docs, labels,\n"
             "max_doc, generate_length) of a micro-batch, available bytes (0: no limit).\n"
             "Returns the fields of a plan event, and flops and bytes of a full micro-batch.");

static PyObject *plan_to_dict(const pml_plan *plan)
{
    PyObject *causes = PyDict_New();
    if (causes == NULL)
        return NULL;
    for (int cause = 0; cause < PML_CAUSE_COUNT; cause++) {
        PyObject *bytes = PyLong_FromSize_t(plan->by_cause[cause]);
        int failed = bytes == NULL ||
                     PyDict_SetItemString(causes, pml_cause_name((pml_cause)cause), bytes) < 0;
        Py_XDECREF(bytes);
        if (failed) {
            Py_DECREF(causes);
            return NULL;
        }
    }
    return Py_BuildValue(
        "{sN sn sn ss si si si sO si ss si sn sL sL sd sd sd sd sd}", "by_cause", causes, "total",
        (Py_ssize_t)plan->total, "arena", (Py_ssize_t)plan->arena, "recompute",
        pml_recompute_name((pml_recompute)plan->choices.recompute), "recompute_layers",
        (int)plan->choices.recompute_layers, "head_chunk", (int)plan->choices.head_chunk, "pieces",
        (int)plan->choices.pieces, "moments_8bit", plan->choices.moments_8bit ? Py_True : Py_False,
        "unpacked", (int)plan->choices.unpacked, "offload",
        pml_recompute_name((pml_recompute)plan->choices.offload), "offload_layers",
        (int)plan->choices.offload_layers, "host", (Py_ssize_t)plan->host, "parameters",
        (long long)plan->parameters, "trainable", (long long)plan->trainable, "flops", plan->flops,
        "bytes", plan->bytes, "seconds", plan->seconds, "link", plan->link, "waited", plan->waited);
}

static PyObject *engine_plan(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config", "limits", "available", NULL};
    const char *text;
    Py_ssize_t size;
    Py_ssize_t available = 0;
    job job = {0};
    if (!parse_job(args, kwargs, "s#(iiiii)|n:plan", names, &text, &size, &job, &available))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = make_plan(text, (size_t)size, (size_t)available, &job, &err);
    PyEval_RestoreThread(gil);
    return status == PML_OK ? plan_to_dict(&job.plan) : pmli_raise(pmli_state_of(module), &err);
}

PyDoc_STRVAR(
    program_doc,
    "program(config, limits, available=0, choices=(0, 0, 0, 0, 0, 0, 0, 0))\n--\n\n"
    "The step program of plan(config, limits, available) as a JSON document; with choices\n"
    "(recompute, recompute_layers, head_chunk, pieces, moments_8bit, unpacked,\n"
    "offload, offload_layers) that of an earlier plan, whose limits these are.");

static pml_status given_or_made(const char *text, size_t size, size_t available, job *job,
                                pml_error *err)
{
    const pml_plan given = job->plan;
    pml_status status = make_plan(text, size, given.choices.pieces > 0 ? 0 : available, job, err);
    if (status == PML_OK && given.choices.pieces > 0) {
        job->plan = given;
        job->plan.limits = job->limits;
    }
    return status;
}

static PyObject *engine_program(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config", "limits", "available", "choices", NULL};
    const char *text;
    Py_ssize_t size;
    Py_ssize_t available = 0;
    job job = {0};
    if (!parse_job(args, kwargs, "s#(iiiii)|n(iiiiiiii):program", names, &text, &size, &job,
                   &available))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    char *printed = NULL;
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = given_or_made(text, (size_t)size, (size_t)available, &job, &err);
    if (status == PML_OK)
        status =
            pml_plan_print_program(&job.spec, &job.config, &job.plan, job.backend, &printed, &err);
    PyEval_RestoreThread(gil);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    PyObject *result = PyUnicode_FromString(printed);
    free(printed);
    return result;
}

/* ---- model folders ---- */

static bool is_weight(pml_dtype dtype)
{
    return dtype == PML_F32 || dtype == PML_BF16 || dtype == PML_F16 || dtype == PML_F64;
}

/* Every tensor that training would read is in the folder, with its shape: asked of the program
 * itself, built for the smallest batch, so that there is one list of names. */
static pml_status check_tensors(const pml_model_spec *spec, const char *folder, pml_error *err)
{
    pml_train_config config = {.method = PML_METHOD_FULL,
                               .dtype = PML_F32,
                               .max_steps = 1,
                               .batch_size = 1,
                               .accumulation = 1,
                               .max_length = 2};
    pml_program_options options = {.spec = spec,
                                   .config = &config,
                                   .limits = {.tokens = 2, .docs = 1, .labels = 1, .max_doc = 2},
                                   .backend = pml_backend_cpu(),
                                   .choices = {.head_chunk = 1, .pieces = 1}};
    pml_program *program = NULL;
    pml_safetensors *file = NULL;
    pml_status status = pml_safetensors_open_folder(folder, &file, err);
    if (status == PML_OK)
        status = pml_program_build(&options, &program, err);
    for (int32_t i = 0; status == PML_OK && i < program->n_parameters; i++) {
        const pml_parameter *p = &program->parameters[i];
        const pml_stored *stored = NULL;
        if (p->adapter)
            continue;
        if (spec->nf4 && pml_nf4_is_expected(p->name)) {
            pml_nf4_stored parts;
            status = pml_nf4_find(file, p->name, p->rows, p->cols, &parts, err);
            continue;
        }
        status = p->rank == 1 ? pml_safetensors_need(file, p->name, p->cols, 0, &stored, err)
                              : pml_safetensors_need(file, p->name, p->rows, p->cols, &stored, err);
        if (status == PML_OK && !is_weight(stored->dtype))
            status = PML_FAIL(err, PML_UNSUPPORTED,
                              "%s: %s has dtype %s; float32, bfloat16 and "
                              "float16 weights are read",
                              stored->path, stored->name, stored->dtype_name);
    }
    pml_program_destroy(&program);
    pml_safetensors_close(&file);
    return status;
}

PyDoc_STRVAR(read_adapter_doc,
             "read_adapter(folder, model, /)\n--\n\n"
             "Read a PEFT adapter's folder for the model of another: r, lora_alpha, lora_dropout,\n"
             "use_rslora, modules_to_save, and modules: (layer, projection, rank, alpha) of each.");

static PyObject *saved_names(uint32_t saved)
{
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < PML_SAVED_COUNT; i++) {
        if (!(saved >> i & 1))
            continue;
        PyObject *name = PyUnicode_FromString(pml_saved_name((pml_saved)(1U << i)));
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *adapted_modules(const pml_adapter_config *config, const pml_safetensors *file,
                                 int32_t layers)
{
    PyObject *list = PyList_New(0);
    for (int32_t i = 0; list != NULL && i < layers * PML_TARGET_COUNT; i++) {
        pml_target target = (pml_target)(1U << (i % PML_TARGET_COUNT));
        pml_lora_module module = pml_adapter_module(config, file, i / PML_TARGET_COUNT, target);
        if (module.rank == 0)
            continue;
        PyObject *entry = Py_BuildValue("(isid)", (int)(i / PML_TARGET_COUNT),
                                        pml_target_name(target), (int)module.rank, module.alpha);
        if (entry == NULL || PyList_Append(list, entry) < 0)
            Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

static PyObject *read_adapter(PyObject *module, PyObject *args)
{
    PyObject *folder = NULL, *model = NULL;
    if (!PyArg_ParseTuple(args, "O&O&:read_adapter", PyUnicode_FSConverter, &folder,
                          PyUnicode_FSConverter, &model)) {
        Py_XDECREF(folder);
        return NULL;
    }
    pml_error err = PML_ERROR_INIT;
    pml_model_spec spec;
    pml_adapter_config config;
    pml_safetensors *file = NULL;
    PyObject *modules = NULL, *saved = NULL, *result = NULL;
    pml_status status = pml_model_spec_load(PyBytes_AsString(model), &spec, &err);
    if (status == PML_OK)
        status = pml_adapter_open(PyBytes_AsString(folder), &spec, &config, &file, &err);
    Py_DECREF(folder);
    Py_DECREF(model);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    modules = adapted_modules(&config, file, spec.layers);
    saved = saved_names(config.saved);
    if (modules != NULL && saved != NULL)
        result = Py_BuildValue("{si sd sd sO sO sO}", "r", (int)config.rank, "lora_alpha",
                               config.alpha, "lora_dropout", config.dropout, "use_rslora",
                               config.rslora ? Py_True : Py_False, "modules_to_save", saved,
                               "modules", modules);
    Py_XDECREF(modules);
    Py_XDECREF(saved);
    pml_safetensors_close(&file);
    return result;
}

PyDoc_STRVAR(check_model_doc,
             "check_model(folder, /)\n--\n\n"
             "Read a model folder's config.json and the headers of its safetensors, and raise\n"
             "what is wrong with them. Returns what the model is.");

static PyObject *check_model(PyObject *module, PyObject *argument)
{
    PyObject *folder = NULL;
    if (!PyUnicode_FSConverter(argument, &folder))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_model_spec spec;
    const char *path = PyBytes_AsString(folder);
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = pml_model_spec_load(path, &spec, &err);
    if (status == PML_OK)
        status = check_tensors(&spec, path, &err);
    PyEval_RestoreThread(gil);
    Py_DECREF(folder);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return Py_BuildValue(
        "{ss si si si si si si si si sL sO sO}", "family", spec.family, "vocab", (int)spec.vocab,
        "hidden", (int)spec.hidden, "layers", (int)spec.layers, "heads", (int)spec.heads,
        "kv_heads", (int)spec.kv_heads, "head_dim", (int)spec.head_dim, "intermediate",
        (int)spec.intermediate, "max_positions", (int)spec.max_positions, "parameters",
        (long long)pml_model_parameters(&spec), "nf4", spec.nf4 ? Py_True : Py_False, "qk_norm",
        spec.qk_norm ? Py_True : Py_False);
}

PyDoc_STRVAR(packed_doc,
             "packed(lengths, capacity, /)\n--\n\n"
             "How many rows of `capacity` tokens the sampler packs rows into; lengths is "
             "a buffer of int32, each 1 to capacity.");

static pml_status count_bins(const int32_t *lengths, int64_t n, int capacity, int64_t *bins,
                             pml_error *err)
{
    if (capacity < 1)
        return PML_FAIL(err, PML_INVALID, "capacity is %d, it must be at least 1", capacity);
    for (int64_t row = 0; row < n; row++)
        if (lengths[row] < 1 || lengths[row] > capacity)
            return PML_FAIL(err, PML_INVALID, "row %lld has %d tokens, not 1 to %d", (long long)row,
                            (int)lengths[row], capacity);
    int64_t *bin_of_row = calloc(n > 0 ? (size_t)n : 1, sizeof *bin_of_row);
    if (bin_of_row == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for %lld rows", (long long)n);
    pml_status status = pml_pack(lengths, n, capacity, bin_of_row, bins, err);
    free(bin_of_row);
    return status;
}

static PyObject *packed(PyObject *module, PyObject *args)
{
    Py_buffer lengths;
    int capacity;
    if (!PyArg_ParseTuple(args, "y*i", &lengths, &capacity))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    int64_t bins = 0;
    pml_status status = PML_OK;
    PyThreadState *gil = PyEval_SaveThread();
    if ((uintptr_t)lengths.buf % sizeof(int32_t) != 0 || lengths.len % sizeof(int32_t) != 0)
        status = PML_FAIL(&err, PML_INVALID, "lengths is no array of int32");
    if (status == PML_OK)
        status = count_bins(lengths.buf, lengths.len / (Py_ssize_t)sizeof(int32_t), capacity, &bins,
                            &err);
    PyEval_RestoreThread(gil);
    PyBuffer_Release(&lengths);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return PyLong_FromLongLong(bins);
}

/* ---- the machine ---- */

PyDoc_STRVAR(device_info_doc, "device_info(device='cpu', /)\n--\n\n"
                              "What a device is: name, libraries, instructions, memory in bytes, "
                              "threads, what it lacks, its PCI address and uuid, a GPU's "
                              "compute capability (90 is 9.0; else 0).");

static PyObject *device_info(PyObject *module, PyObject *args)
{
    const char *name = "cpu";
    if (!PyArg_ParseTuple(args, "|s:device_info", &name))
        return NULL;
    const pml_backend *backend;
    pml_device_options options = {0};
    pml_device_info info = {0};
    pml_device_identity identity = {0};
    pml_device *device = NULL;
    pml_error err = PML_ERROR_INIT;
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = pml_backend_named(name, false, &backend, &options.index, &err);
    if (status == PML_OK && backend->identity_of != NULL)
        status = backend->identity_of(options.index, &identity, &err);
    if (status == PML_OK)
        status = backend->open(&options, &device, &err);
    if (status == PML_OK)
        status = backend->info(device, &info, &err);
    if (device != NULL)
        backend->close(&device);
    PyEval_RestoreThread(gil);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return Py_BuildValue("{ss ss ss sn sn si ss ss ss si}", "name", info.name, "libraries",
                         info.libraries, "instructions", info.instructions, "memory_total",
                         (Py_ssize_t)info.memory_total, "memory_free", (Py_ssize_t)info.memory_free,
                         "threads", info.threads, "lacks", info.lacks, "bus", info.bus, "uuid",
                         identity.uuid, "capability", info.capability);
}

PyDoc_STRVAR(gauges_doc,
             "gauges(bus, uuid, /)\n--\n\n"
             "What NVML says of the GPU at a PCI address, and of the memory of its part "
             "with this uuid where it is divided (MIG): numbers by name; of what it "
             "does not say, why, as text. Raises without NVML.");

static PyObject *gauges(PyObject *module, PyObject *args)
{
    const char *bus, *uuid;
    pml_gauges *found = NULL;
    pml_reading reading;
    pml_error err = PML_ERROR_INIT;
    if (!PyArg_ParseTuple(args, "ss:gauges", &bus, &uuid))
        return NULL;
    PyThreadState *gil = PyEval_SaveThread();
    pml_status status = pml_gauges_new(bus, uuid, &found, &err);
    if (status == PML_OK)
        pml_gauges_read(found, &reading);
    pml_gauges_destroy(&found);
    PyEval_RestoreThread(gil);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    PyObject *dict = PyDict_New();
    for (int i = 0; dict != NULL && i < PML_GAUGE_COUNT; i++) {
        PyObject *value = reading.missing[i] == NULL ? PyFloat_FromDouble(reading.value[i])
                                                     : PyUnicode_FromString(reading.missing[i]);
        if (value == NULL || PyDict_SetItemString(dict, pml_gauge_name((pml_gauge)i), value) != 0)
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

PyDoc_STRVAR(gpus_doc, "gpus()\n--\n\nHow many GPUs runs can use; raises what is missing.");

static PyObject *gpus(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    const pml_backend *backend;
    pml_error err = PML_ERROR_INIT;
    int count = 0;
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = pml_backend_cuda(&backend, &err);
    if (status == PML_OK)
        status = backend->devices(&count, &err);
    PyEval_RestoreThread(gil);
    return status == PML_OK ? PyLong_FromLong(count) : pmli_raise(pmli_state_of(module), &err);
}

bool pmli_gpu_index(PyObject *module, PyObject *argument, int *index)
{
    int beyond = 0;
    long given = PyLong_AsLongAndOverflow(argument, &beyond);
    if (PyErr_Occurred() != NULL)
        return false;
    if (beyond == 0 && given >= 0 && given <= INT_MAX) {
        *index = (int)given;
        return true;
    }
    pml_error err = PML_ERROR_INIT;
    PML_FAIL(&err, PML_INVALID, "no GPU has such a number: they are counted from 0");
    pmli_raise(pmli_state_of(module), &err);
    return false;
}

PyDoc_STRVAR(gpu_dtypes_doc,
             "gpu_dtypes(index, /)\n--\n\nWhat a GPU computes in, by names as of run.json; "
             "raises what is missing.");

static PyObject *gpu_dtypes(PyObject *module, PyObject *argument)
{
    static const struct {
        pml_dtype dtype;
        const char *name;
    } names[] = {
        {PML_F32, "float32"}, {PML_BF16, "bfloat16"}, {PML_F16, "float16"}, {PML_U8, "float8"}};
    const pml_backend *backend;
    pml_error err = PML_ERROR_INIT;
    unsigned dtypes = 0;
    int index;
    if (!pmli_gpu_index(module, argument, &index))
        return NULL;
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = pml_backend_cuda(&backend, &err);
    if (status == PML_OK)
        status = backend->dtypes_of(index, &dtypes, &err);
    PyEval_RestoreThread(gil);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < sizeof names / sizeof *names; i++) {
        if ((dtypes >> names[i].dtype & 1) == 0)
            continue;
        PyObject *name = PyUnicode_FromString(names[i].name);
        if (name == NULL || PyList_Append(list, name) != 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

PyDoc_STRVAR(
    gpu_libraries_doc,
    "gpu_libraries()\n--\n\nThe libraries that a GPU's driver does not bring: a path, or what "
    "to install, as (found, text). Needs no driver.");

static PyObject *gpu_libraries(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    const pml_backend *backend;
    pml_error err = PML_ERROR_INIT;
    char path[PATH_MAX];
    pml_status status = pml_backend_cuda_to_plan(&backend, &err);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    PyObject *list = PyList_New(0);
    for (int which = 0; list != NULL; which++) {
        PyThreadState *gil = PyEval_SaveThread();
        status = backend->library(which, path, sizeof path, &err);
        PyEval_RestoreThread(gil);
        if (status == PML_INVALID)
            return list;
        if (status != PML_OK && status != PML_NOT_FOUND)
            break;
        bool found = status == PML_OK;
        PyObject *pair = Py_BuildValue("(ON)", found ? Py_True : Py_False,
                                       found ? PyUnicode_DecodeFSDefault(path) : pmli_words(&err));
        if (pair == NULL || PyList_Append(list, pair) != 0)
            Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    Py_XDECREF(list);
    return PyErr_Occurred() != NULL ? NULL : pmli_raise(pmli_state_of(module), &err);
}

PyDoc_STRVAR(hash_file_doc, "hash_file(path, /)\n--\n\nBLAKE2b-256 of a file, in hex.");

static PyObject *hash_file(PyObject *module, PyObject *argument)
{
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(argument, &path))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    uint8_t hash[PML_HASH_BYTES];
    char hex[PML_HASH_HEX];
    const char *name = PyBytes_AsString(path);
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = pml_hash_file(name, true, hash, &err);
    PyEval_RestoreThread(gil);
    Py_DECREF(path);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    pml_hash_hex(hash, sizeof hash, hex);
    return PyUnicode_FromString(hex);
}

PyMethodDef pmli_engine_methods[] = {
    {"plan", (PyCFunction)(void (*)(void))engine_plan, METH_VARARGS | METH_KEYWORDS, plan_doc},
    {"program", (PyCFunction)(void (*)(void))engine_program, METH_VARARGS | METH_KEYWORDS,
     program_doc},
    {"check_run", check_run, METH_O, check_run_doc},
    {"read_adapter", read_adapter, METH_VARARGS, read_adapter_doc},
    {"check_model", check_model, METH_O, check_model_doc},
    {"gpus", gpus, METH_NOARGS, gpus_doc},
    {"gpu_dtypes", gpu_dtypes, METH_O, gpu_dtypes_doc},
    {"gpu_libraries", gpu_libraries, METH_NOARGS, gpu_libraries_doc},
    {"packed", packed, METH_VARARGS, packed_doc},
    {"device_info", device_info, METH_VARARGS, device_info_doc},
    {"gauges", gauges, METH_VARARGS, gauges_doc},
    {"hash_file", hash_file, METH_O, hash_file_doc},
    {NULL, NULL, 0, NULL},
};
