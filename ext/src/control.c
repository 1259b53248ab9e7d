/* Launching a run's coordinator and finding one that is there. */
#include "native.h"

#include <limits.h>
#include <stdbool.h>

#include "pml/net/connection.h"
#include "pml/net/launch.h"
#include "pml/net/reserve.h"
#include "pml_op/backend.h"

/* Paths come as str, bytes or os.PathLike; converted to bytes that the caller owns. */
static const char *text(PyObject *bytes)
{
    return bytes == NULL ? NULL : PyBytes_AsString(bytes);
}

enum { PREPARE_MAX = 16 };

/* The strings of a sequence, borrowed from the list that is returned; NULL with an exception. */
static PyObject *borrow_strings(PyObject *sequence, const char *strings[PREPARE_MAX + 1])
{
    PyObject *list = PySequence_List(sequence);
    Py_ssize_t n = list == NULL ? -1 : PyList_Size(list);
    if (n > PREPARE_MAX)
        PyErr_Format(PyExc_ValueError, "prepare has at most %d arguments", PREPARE_MAX);
    bool failed = n < 0 || n > PREPARE_MAX;
    for (Py_ssize_t i = 0; !failed && i < n; i++) {
        strings[i] = PyUnicode_AsUTF8AndSize(PyList_GetItem(list, i), NULL);
        failed = strings[i] == NULL;
    }
    if (failed) {
        Py_XDECREF(list);
        return NULL;
    }
    strings[n] = NULL;
    return list;
}

PyDoc_STRVAR(
    launch_doc,
    "launch(program, run_folder, resume=None, accept_changes=False, timeout=20.0,\n"
    "       recover=False, prepare=None)\n--\n\n"
    "Start the detached coordinator of a run and wait for its sockets.\n\n"
    "resume is None for a new run, '' for the newest whole checkpoint, or the name of\n"
    "one; recover: in the place of one that died, as often as the run allows.\n"
    "prepare: arguments of the program that makes the token shards where they are missing.\n"
    "Ctrl-C ends the waiting; the coordinator starts nevertheless.\n"
    "Returns (connection_file, started); started is False when the run has a\n"
    "coordinator already.");

static PyObject *launch(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"program", "run_folder", "resume",  "accept_changes",
                            "timeout", "recover",    "prepare", NULL};
    PyObject *program = NULL;
    PyObject *folder = NULL;
    PyObject *result = NULL;
    PyObject *prepare = NULL;
    PyObject *list = NULL;
    const char *argv[PREPARE_MAX + 1];
    const char *resume = NULL;
    int accept_changes = 0, recover = 0;
    double timeout = 20.0;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O&O&|zpdpO:launch", names, PyUnicode_FSConverter, &program,
            PyUnicode_FSConverter, &folder, &resume, &accept_changes, &timeout, &recover, &prepare))
        goto done;
    if (!(timeout > 0 && timeout < 1e6)) {
        PyErr_SetString(PyExc_ValueError, "timeout must be a positive number of seconds");
        goto done;
    }
    if (prepare != NULL && prepare != Py_None && (list = borrow_strings(prepare, argv)) == NULL)
        goto done;
    pml_launch options = {.program = text(program),
                          .run_folder = text(folder),
                          .resume = resume,
                          .recover = recover,
                          .prepare = list == NULL ? NULL : argv,
                          .accept_changes = accept_changes,
                          .timeout_ms = (int)(timeout * 1000)};
    pml_error err = PML_ERROR_INIT;
    char file[PATH_MAX] = "";
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    options.enough = pmli_interrupted;
    options.asked = &gil;
    status = pml_launch_coordinator(&options, file, sizeof file, &err);
    PyEval_RestoreThread(gil);
    if (PyErr_Occurred() != NULL)
        goto done;
    if (status == PML_OK || (status == PML_BUSY && file[0] != '\0'))
        result = Py_BuildValue("(NO)", PyUnicode_DecodeFSDefault(file),
                               status == PML_OK ? Py_True : Py_False);
    else
        pmli_raise(pmli_state_of(module), &err);
done:
    Py_XDECREF(list);
    Py_XDECREF(program);
    Py_XDECREF(folder);
    return result;
}

PyDoc_STRVAR(
    connection_file_doc,
    "connection_file(run_folder, /)\n--\n\n"
    "Where the connection file of a run's coordinator is. Raises NotFoundError where there has\n"
    "been none, PeerError when it has ended, BusyError when it is just starting or on\n"
    "another machine.");

static PyObject *connection_file(PyObject *module, PyObject *argument)
{
    PyObject *folder = NULL;
    if (!PyUnicode_FSConverter(argument, &folder))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    char file[PATH_MAX];
    pml_status status = pml_connection_find(text(folder), file, sizeof file, &err);
    Py_DECREF(folder);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return PyUnicode_DecodeFSDefault(file);
}

PyDoc_STRVAR(runtime_folder_doc,
             "runtime_folder(run_folder, /)\n--\n\n"
             "Where a coordinator started from here would keep its sockets and keys.");

static PyObject *runtime_folder(PyObject *module, PyObject *argument)
{
    PyObject *folder = NULL;
    if (!PyUnicode_FSConverter(argument, &folder))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    char path[PATH_MAX];
    pml_status status = pml_runtime_path(text(folder), path, sizeof path, &err);
    Py_DECREF(folder);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return PyUnicode_DecodeFSDefault(path);
}

PyDoc_STRVAR(
    coordinator_pid_doc,
    "coordinator_pid(connection_file, /)\n--\n\n"
    "Process id in a connection file. Raises NotFoundError where there is none, PeerError\n"
    "when its process is gone (a stale file), DeniedError when it is not ours alone.");

static PyObject *coordinator_pid(PyObject *module, PyObject *argument)
{
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(argument, &path))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_connection connection = {0};
    pml_status status = pml_connection_read(text(path), &connection, &err);
    pml_keypair_forget(&connection.keys);
    Py_DECREF(path);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return PyLong_FromLong(connection.pid);
}

PyDoc_STRVAR(workers_there_doc,
             "workers_there(run_folder, /)\n--\n\n"
             "Whether any worker of a run is there, with or without a coordinator.");

static PyObject *workers_there(PyObject *module, PyObject *argument)
{
    PyObject *folder = NULL;
    if (!PyUnicode_FSConverter(argument, &folder))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_status status = pml_runtime_workers(text(folder), &err);
    Py_DECREF(folder);
    if (status != PML_OK && status != PML_PEER && status != PML_NOT_FOUND)
        return pmli_raise(pmli_state_of(module), &err);
    return PyBool_FromLong(status == PML_OK);
}

PyDoc_STRVAR(keypair_doc, "keypair()\n--\n\nA new key pair in Z85: (public, secret).");

static PyObject *keypair(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    pml_error err = PML_ERROR_INIT;
    pml_keypair keys;
    if (pml_keypair_new(&keys, &err) != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    PyObject *pair = Py_BuildValue("(ss)", keys.public_key, keys.secret_key);
    pml_keypair_forget(&keys);
    return pair;
}

/* ---- device memory that runs have reserved ---- */

enum { HOLDERS_TOLD = 16 };

static pml_status look_at_gpu(int index, pml_device_identity *identity, pml_holder *holders,
                              size_t *n, pml_reserved *sum, pml_error *err)
{
    const pml_backend *backend;
    char folder[PATH_MAX];
    pml_status status = pml_backend_cuda(&backend, err);
    if (status == PML_OK)
        status = backend->identity_of(index, identity, err);
    if (status == PML_OK)
        status = pml_runtime_devices(folder, sizeof folder, err);
    return status == PML_OK
               ? pml_reservation_look(folder, identity->uuid, holders, HOLDERS_TOLD, n, sum, err)
               : status;
}

static PyObject *list_holders(const pml_holder *holders, size_t n)
{
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < n; i++) {
        PyObject *one =
            Py_BuildValue("{sN si sn}", "run", PyUnicode_DecodeFSDefault(holders[i].run), "pid",
                          holders[i].pid, "bytes", (Py_ssize_t)holders[i].bytes);
        if (one == NULL || PyList_Append(list, one) != 0)
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

PyDoc_STRVAR(gpu_reserved_doc,
             "gpu_reserved(index, /)\n--\n\n"
             "Which GPU it is (uuid, bus, memory_total), and what runs have reserved of it: bytes\n"
             "(reserved, and of them pending: not allocated yet) and holders (run, pid, bytes).");

static PyObject *gpu_reserved(PyObject *module, PyObject *argument)
{
    pml_holder holders[HOLDERS_TOLD];
    pml_device_identity identity;
    pml_reserved sum = {0};
    pml_error err = PML_ERROR_INIT;
    size_t n = 0;
    int index;
    if (!pmli_gpu_index(module, argument, &index))
        return NULL;
    PyThreadState *gil = PyEval_SaveThread();
    pml_status status = look_at_gpu(index, &identity, holders, &n, &sum, &err);
    PyEval_RestoreThread(gil);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return Py_BuildValue("{ss ss sn sn sn sN}", "uuid", identity.uuid, "bus", identity.bus,
                         "memory_total", (Py_ssize_t)identity.memory_total, "reserved",
                         (Py_ssize_t)sum.others, "pending", (Py_ssize_t)sum.pending, "holders",
                         list_holders(holders, n < HOLDERS_TOLD ? n : HOLDERS_TOLD));
}

PyMethodDef pmli_control_methods[] = {
    {"gpu_reserved", gpu_reserved, METH_O, gpu_reserved_doc},
    {"launch", (PyCFunction)(void (*)(void))launch, METH_VARARGS | METH_KEYWORDS, launch_doc},
    {"connection_file", connection_file, METH_O, connection_file_doc},
    {"runtime_folder", runtime_folder, METH_O, runtime_folder_doc},
    {"workers_there", workers_there, METH_O, workers_there_doc},
    {"keypair", keypair, METH_NOARGS, keypair_doc},
    {"coordinator_pid", coordinator_pid, METH_O, coordinator_pid_doc},
    {NULL, NULL, 0, NULL},
};
