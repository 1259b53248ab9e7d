/* Export: merged weights, GGUF, and the comparison of what was written with what was trained. */
#include "native.h"

#include <limits.h>
#include <string.h>

#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "pml/json/messages.h"
#include "pml/model/mark.h"
#include "pml/train/compare.h"
#include "pml/train/gguf.h"
#include "pml/train/merge.h"
#include "pml/train/run.h"

enum { THREADS_OF_AN_EXPORT = 0 }; /* all cores that the process may use */

/* run.json's text as a configuration; the data that it names is not looked at. */
static pml_status read_run(const char *text, Py_ssize_t size, pml_train_config *config,
                           pml_error *err)
{
    pml_message *run = NULL;
    pml_status status = pml_message_parse_as(PML_FILE_run, text, (size_t)size, &run, err);
    if (status == PML_OK)
        status = pml_train_config_from_run(run, "/", config, err);
    pml_message_destroy(&run);
    return status;
}

/* Holds the run folder that a checkpoint is in, two levels above it: what a link in either led to
 * would not be what was trained. */
static pml_status hold_run(const char *checkpoint, pml_hold **hold, pml_error *err)
{
    char parent[PATH_MAX], run[PATH_MAX];
    pml_status status = pml_path_folder(parent, sizeof parent, checkpoint, err);
    if (status == PML_OK)
        status = pml_path_folder(run, sizeof run, parent, err);
    return status == PML_OK ? pml_hold_new(run, hold, err) : status;
}

static pml_status dtype_named(const char *name, pml_dtype *dtype, pml_error *err)
{
    static const struct {
        const char *name;
        pml_dtype dtype;
    } names[] = {{"auto", PML_DTYPE_COUNT},
                 {"float32", PML_F32},
                 {"bfloat16", PML_BF16},
                 {"float16", PML_F16}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i].name, name) == 0) {
            *dtype = names[i].dtype;
            return PML_OK;
        }
    return PML_FAIL(err, PML_INVALID, "dtype must be auto, float32, bfloat16 or float16, it is %s",
                    name);
}

PyDoc_STRVAR(merge_doc, "merge(run, checkpoint, folder, dtype, shard_bytes)\n--\n\n"
                        "Write the merged model's safetensors into an existing folder. run: the\n"
                        "text of run.json. Returns bytes, parameters, files, rounding,\n"
                        "tied_head.");

static PyObject *export_merge(PyObject *module, PyObject *args)
{
    const char *run, *checkpoint, *folder, *dtype;
    Py_ssize_t size;
    unsigned long long shard_bytes;
    if (!PyArg_ParseTuple(args, "s#sssK:merge", &run, &size, &checkpoint, &folder, &dtype,
                          &shard_bytes))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_train_config config;
    pml_merge *merge = NULL;
    pml_hold *hold = NULL;
    pml_merge_options options = {.shard_bytes = shard_bytes};
    pml_merge_result result;
    PyThreadState *gil = PyEval_SaveThread();
    options.enough = pmli_interrupted;
    options.asked = &gil;
    pml_status status = read_run(run, size, &config, &err);
    if (status == PML_OK)
        status = dtype_named(dtype, &options.dtype, &err);
    if (status == PML_OK)
        status = hold_run(checkpoint, &hold, &err);
    if (status == PML_OK)
        status = pml_merge_open(&config, checkpoint, THREADS_OF_AN_EXPORT, &merge, &err);
    if (status == PML_OK)
        status = pml_merge_write(merge, folder, &options, &result, &err);
    pml_merge_close(&merge);
    pml_hold_destroy(&hold);
    PyEval_RestoreThread(gil);
    if (PyErr_Occurred() != NULL)
        return NULL; /* of a signal's handler */
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return Py_BuildValue("{sK sL si sd sN}", "bytes", (unsigned long long)result.bytes,
                         "parameters", (long long)result.parameters, "files", result.files,
                         "rounding", result.rounding, "tied_head",
                         PyBool_FromLong(result.tied_head));
}

static pml_status type_named(const char *name, pml_gguf_type *type, pml_error *err)
{
    static const struct {
        const char *name;
        pml_gguf_type type;
    } names[] = {{"f32", PML_GGUF_F32},
                 {"f16", PML_GGUF_F16},
                 {"bf16", PML_GGUF_BF16},
                 {"q8_0", PML_GGUF_Q8_0}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i].name, name) == 0) {
            *type = names[i].type;
            return PML_OK;
        }
    return PML_FAIL(err, PML_INVALID, "a GGUF's type must be f32, f16, bf16 or q8_0, it is %s",
                    name);
}

PyDoc_STRVAR(gguf_doc, "gguf(run, checkpoint, path, type, pairs)\n--\n\n"
                       "Write the merged model as GGUF. pairs: JSON, an array of objects {key,\n"
                       "type, value}. Returns bytes, parameters, tensors, not_quantised, notes.");

static PyObject *export_gguf(PyObject *module, PyObject *args)
{
    static const pml_json_limits limits = {(size_t)512 << 20, 4};
    const char *run, *checkpoint, *path, *type, *pairs;
    Py_ssize_t size, pairs_size;
    if (!PyArg_ParseTuple(args, "s#ssss#:gguf", &run, &size, &checkpoint, &path, &type, &pairs,
                          &pairs_size))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_train_config config;
    pml_merge *merge = NULL;
    pml_hold *hold = NULL;
    pml_json *document = NULL;
    pml_gguf_options options = {0};
    pml_gguf_result result;
    PyThreadState *gil = PyEval_SaveThread();
    options.enough = pmli_interrupted;
    options.asked = &gil;
    pml_status status = read_run(run, size, &config, &err);
    if (status == PML_OK)
        status = type_named(type, &options.type, &err);
    if (status == PML_OK)
        status = pml_json_parse(pairs, (size_t)pairs_size, "GGUF pairs", &limits, &document, &err);
    if (status == PML_OK)
        status = hold_run(checkpoint, &hold, &err);
    if (status == PML_OK)
        status = pml_merge_open(&config, checkpoint, THREADS_OF_AN_EXPORT, &merge, &err);
    options.pairs = document;
    if (status == PML_OK)
        status = pml_gguf_export(merge, path, &options, &result, &err);
    pml_merge_close(&merge);
    pml_hold_destroy(&hold);
    pml_json_destroy(&document);
    PyEval_RestoreThread(gil);
    if (PyErr_Occurred() != NULL)
        return NULL; /* of a signal's handler */
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return Py_BuildValue("{sK sL si si ss}", "bytes", (unsigned long long)result.bytes,
                         "parameters", (long long)result.parameters, "tensors", result.tensors,
                         "not_quantised", result.not_quantised, "notes", result.notes);
}

PyDoc_STRVAR(compare_doc, "compare_export(run, checkpoint, format, path)\n--\n\n"
                          "Load what was trained and what was exported, and compare their logits.\n"
                          "format: peft, merged or gguf. Returns tokens, difference, same_top.");

static PyObject *export_compare(PyObject *module, PyObject *args)
{
    static const char *const formats[] = {"peft", "merged", "gguf"};
    const char *run, *checkpoint, *format, *path;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "s#sss:compare_export", &run, &size, &checkpoint, &format, &path))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_train_config config;
    pml_comparison result;
    pml_hold *hold = NULL;
    int kind = 0;
    while (kind < 3 && strcmp(formats[kind], format) != 0)
        kind++;
    pml_compare_options options = {.threads = THREADS_OF_AN_EXPORT, .enough = pmli_interrupted};
    PyThreadState *gil = PyEval_SaveThread();
    options.asked = &gil;
    pml_status status = kind < 3 ? read_run(run, size, &config, &err)
                                 : PML_FAIL(&err, PML_INVALID, "there is no format %s", format);
    if (status == PML_OK)
        status = hold_run(checkpoint, &hold, &err);
    if (status == PML_OK)
        status = pml_compare_export(&config, checkpoint, (pml_exported)kind, path, &options,
                                    &result, &err);
    pml_hold_destroy(&hold);
    PyEval_RestoreThread(gil);
    if (PyErr_Occurred() != NULL)
        return NULL; /* of a signal's handler */
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return Py_BuildValue("{si sd si}", "tokens", (int)result.tokens, "difference",
                         result.difference, "same_top", (int)result.same_top);
}

PyDoc_STRVAR(model_mark_doc,
             "model_mark(folder, /)\n--\n\n"
             "By what a run knows a model folder again: a hash that a copy has, too.");

static PyObject *model_mark(PyObject *module, PyObject *argument)
{
    PyObject *folder = NULL;
    if (!PyUnicode_FSConverter(argument, &folder))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    char mark[PML_MARK_HEX];
    const char *path = PyBytes_AsString(folder);
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = pml_model_mark(path, mark, &err);
    PyEval_RestoreThread(gil);
    Py_DECREF(folder);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return PyUnicode_FromString(mark);
}

PyMethodDef pmli_export_methods[] = {{"merge", export_merge, METH_VARARGS, merge_doc},
                                     {"gguf", export_gguf, METH_VARARGS, gguf_doc},
                                     {"compare_export", export_compare, METH_VARARGS, compare_doc},
                                     {"model_mark", model_mark, METH_O, model_mark_doc},
                                     {NULL, NULL, 0, NULL}};
