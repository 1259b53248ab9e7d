/* pantheraml._native: what its files share. The only place with Python.h.
 *
 * Limited API of Python 3.11, so that one file serves every later version; multi-phase
 * initialisation, heap types and module state, so that it may be loaded more than once.
 * Locking: module and type state is only touched with the GIL (the module does not claim to run
 * without it); every call that waits for anything gives the GIL up. */
#ifndef PMLI_EXT_NATIVE_H
#define PMLI_EXT_NATIVE_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

#include "pml/base/error.h"

typedef struct pmli_state {
    PyObject
        *errors[PML_STATUS_COUNT]; /* classes of pantheraml.errors by status; [PML_OK] unused */
    PyObject *client_type;
} pmli_state;

/* What err says, as str. A message that names a file has its bytes, which need not be UTF-8. New
 * reference, NULL with an exception. */
PyObject *pmli_words(const pml_error *err);

/* Raise err as its class of pantheraml.errors. Returns NULL. */
PyObject *pmli_raise(const pmli_state *state, const pml_error *err);

/* Whether a signal's handler has raised an exception (Ctrl-C): what long calls of the engine ask
 * now and then. `asked`: PyThreadState **, of the thread that has given up the GIL. The exception
 * is there when it has the GIL again. */
bool pmli_interrupted(void *asked);

/* The number of a GPU as a device has it, 0 to INT_MAX; false with an exception. */
bool pmli_gpu_index(PyObject *module, PyObject *argument, int *index);

/* The Client type, made for this module. New reference, NULL with an exception. */
PyObject *pmli_client_type_new(PyObject *module);

/* Module functions, one table a file, each ending with a row of NULLs. */
extern PyMethodDef pmli_engine_methods[];  /* plan, program, check_model, device_info, hash_file */
extern PyMethodDef pmli_export_methods[];  /* merge, gguf, compare_export, model_mark */
extern PyMethodDef pmli_control_methods[]; /* launch, connection_file, coordinator_pid, keypair */
extern PyMethodDef pmli_events_methods[];  /* first_damaged, check_message */
extern PyMethodDef pmli_attention_methods[]; /* compile_attention */

static inline pmli_state *pmli_state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

#endif
