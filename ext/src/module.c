/* The module: its state, its error classes, its table of contents. */
#include "native.h"

#include <string.h>

#include "pml/json/messages.h"
#include "pml_op/ops.h"

PyObject *pmli_words(const pml_error *err)
{
    return PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)strlen(err->message), "backslashreplace");
}

PyObject *pmli_raise(const pmli_state *state, const pml_error *err)
{
    pml_status code = err->code > PML_OK && err->code < PML_STATUS_COUNT ? err->code : PML_INTERNAL;
    PyObject *words = pmli_words(err);
    if (words == NULL)
        return NULL;
    if (code == PML_INTERNAL)
        PyErr_Format(state->errors[code], "%U (%s:%d)", words, err->file, err->line);
    else
        PyErr_SetObject(state->errors[code], words);
    Py_DECREF(words);
    return NULL;
}

bool pmli_interrupted(void *asked)
{
    PyThreadState **gil = asked;
    PyEval_RestoreThread(*gil);
    bool raised = PyErr_CheckSignals() < 0;
    *gil = PyEval_SaveThread();
    return raised;
}

/* The classes are Python's (pantheraml/errors.py), so that they can be read, typed and documented
 * there; BY_CODE maps the names that pml_status_name gives. */
static int load_errors(pmli_state *state)
{
    int result = -1;
    PyObject *by_code = NULL;
    PyObject *errors = PyImport_ImportModule("pantheraml.errors");
    if (errors == NULL)
        goto done;
    by_code = PyObject_GetAttrString(errors, "BY_CODE");
    if (by_code == NULL)
        goto done;
    for (int code = PML_OK + 1; code < PML_STATUS_COUNT; code++) {
        PyObject *class = PyMapping_GetItemString(by_code, pml_status_name((pml_status)code));
        if (class == NULL)
            goto done;
        state->errors[code] = class;
    }
    result = 0;
done:
    Py_XDECREF(by_code);
    Py_XDECREF(errors);
    return result;
}

static int module_exec(PyObject *module)
{
    pmli_state *state = pmli_state_of(module);
    if (load_errors(state) < 0)
        return -1;
    if (PyModule_AddFunctions(module, pmli_engine_methods) < 0 ||
        PyModule_AddFunctions(module, pmli_export_methods) < 0 ||
        PyModule_AddFunctions(module, pmli_control_methods) < 0 ||
        PyModule_AddFunctions(module, pmli_events_methods) < 0 ||
        PyModule_AddFunctions(module, pmli_attention_methods) < 0)
        return -1;
    if (PyModule_AddIntConstant(module, "FP8_UNIT", PML_FP8_UNIT) < 0 ||
        PyModule_AddIntConstant(module, "LOG_TORN_MAX", PML_LOG_TORN_MAX) < 0)
        return -1;
    state->client_type = pmli_client_type_new(module);
    if (state->client_type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Client", state->client_type);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    pmli_state *state = pmli_state_of(module);
    for (int code = 0; code < PML_STATUS_COUNT; code++)
        Py_VISIT(state->errors[code]);
    Py_VISIT(state->client_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    pmli_state *state = pmli_state_of(module);
    for (int code = 0; code < PML_STATUS_COUNT; code++)
        Py_CLEAR(state->errors[code]);
    Py_CLEAR(state->client_type);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

PyDoc_STRVAR(module_doc, "The C side of PantheraML: clients of a run, its launch, its plan.");

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,        .m_name = "pantheraml._native", .m_doc = module_doc,
    .m_size = sizeof(pmli_state), .m_slots = module_slots,        .m_traverse = module_traverse,
    .m_clear = module_clear,      .m_free = module_free,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module_def);
}
