/* Client: pml_client as a Python object.
 *
 *   c = Client(connection_file)              or Client(connection=text)
 *   c.send('{"type":"hello","id":"…"}')
 *   c.receive(0.5)  →  [(KIND, text), …]     waits without the GIL; [] after the time
 *   c.fileno()                               eventfd, for asyncio's add_reader
 *   c.close()
 *
 * Any thread may send and receive while another closes: the pml_client goes when the last of them
 * has come back (`users`), which takes at most a slice of waiting. */
#include "native.h"

#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "pml/net/client.h"

enum { SLICE_MS = 100, BATCH = 4096 };

typedef struct client_object {
    PyObject_HEAD pml_client *client; /* NULL once closed */
    PyObject *module;                 /* for the error classes */
    pid_t owner; /* a child after fork() has the sockets' memory but not their thread */
    int users;   /* calls that are inside pml_client without the GIL */
    bool closing;
} client_object;

static const char *const kind_names[] = {"answer", "event", "up", "down", "denied", "lost"};

static const pmli_state *errors_of(const client_object *self)
{
    return pmli_state_of(self->module);
}

/* Begin a call into pml_client: true and one user more, or false and an exception. */
static bool enter(client_object *self)
{
    pml_error err = PML_ERROR_INIT;
    if (self->client == NULL || self->closing)
        PML_FAIL(&err, PML_PEER, "this client is closed");
    else if (self->owner != getpid())
        PML_FAIL(&err, PML_BUSY, "a client cannot be used in a forked child; attach anew there");
    if (err.code != PML_OK) {
        pmli_raise(errors_of(self), &err);
        return false;
    }
    self->users++;
    return true;
}

static void close_now(client_object *self)
{
    pml_client *client = self->client;
    self->client = NULL;
    if (client == NULL || self->owner != getpid())
        return; /* in a forked child it is the parent's: not ours to close */
    PyThreadState *gil = PyEval_SaveThread();
    pml_client_close(&client);
    PyEval_RestoreThread(gil);
}

static void leave(client_object *self)
{
    self->users--;
    if (self->closing && self->users == 0)
        close_now(self);
}

/* Which of the two was given; PML_INVALID when it is not one of them. */
static pml_status open_client(client_object *self, const char *file, const char *text,
                              Py_ssize_t size, pml_error *err)
{
    if ((file == NULL) == (text == NULL))
        return PML_FAIL(err, PML_INVALID, "give a connection file, or the content of one");
    if (file != NULL)
        return pml_client_open(file, &self->client, err);
    pml_connection connection;
    pml_status status = pml_connection_parse(text, (size_t)size, &connection, err);
    if (status != PML_OK)
        return status;
    status = pml_client_connect(&connection, &self->client, err);
    pml_keypair_forget(&connection.keys);
    return status;
}

static PyObject *client_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"connection_file", "connection", NULL};
    PyObject *path = NULL;
    const char *text = NULL;
    Py_ssize_t size = 0;
    client_object *self = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O&$z#:Client", names, PyUnicode_FSConverter,
                                     &path, &text, &size))
        return NULL;
    self = (client_object *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        goto failed;
    self->owner = getpid();
    self->module = PyType_GetModule(type);
    if (self->module == NULL)
        goto failed;
    Py_INCREF(self->module);
    pml_error err = PML_ERROR_INIT;
    const char *file = path == NULL ? NULL : PyBytes_AsString(path);
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = open_client(self, file, text, size, &err);
    PyEval_RestoreThread(gil);
    if (status != PML_OK) {
        pmli_raise(errors_of(self), &err);
        goto failed;
    }
    Py_XDECREF(path);
    return (PyObject *)self;
failed:
    Py_XDECREF((PyObject *)self);
    Py_XDECREF(path);
    return NULL;
}

static int client_traverse(PyObject *object, visitproc visit, void *arg)
{
    client_object *self = (client_object *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->module);
    return 0;
}

static int client_clear(PyObject *object)
{
    Py_CLEAR(((client_object *)object)->module);
    return 0;
}

static void client_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    close_now((client_object *)object);
    client_clear(object);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(send_doc,
             "send(request, /)\n--\n\n"
             "Queue one request, JSON as str or bytes. Its answer comes through receive.");

static PyObject *client_send(PyObject *object, PyObject *request)
{
    client_object *self = (client_object *)object;
    PyObject *bytes =
        PyUnicode_Check(request) ? PyUnicode_AsUTF8String(request) : PyBytes_FromObject(request);
    if (bytes == NULL)
        return NULL;
    char *text;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(bytes, &text, &size) < 0 || !enter(self)) {
        Py_DECREF(bytes);
        return NULL;
    }
    pml_error err = PML_ERROR_INIT;
    pml_status status;
    PyThreadState *gil = PyEval_SaveThread();
    status = pml_client_send(self->client, text, (size_t)size, &err);
    PyEval_RestoreThread(gil);
    leave(self);
    Py_DECREF(bytes);
    if (status != PML_OK)
        return pmli_raise(errors_of(self), &err);
    Py_RETURN_NONE;
}

/* Wait for the first message in slices, so that a signal (Ctrl-C) and close are noticed.
 * Returns PML_TIMEOUT when the time is over; -1 with a Python exception from a signal handler. */
static int wait_first(client_object *self, double seconds, pml_received **received, pml_error *err)
{
    double left_ms = seconds * 1000;
    for (;;) {
        int slice = left_ms < SLICE_MS ? (int)left_ms : SLICE_MS;
        pml_status status;
        PyThreadState *gil = PyEval_SaveThread();
        status = pml_client_receive(self->client, slice, received, err);
        PyEval_RestoreThread(gil);
        left_ms -= slice;
        if (status != PML_TIMEOUT)
            return (int)status;
        if (PyErr_CheckSignals() < 0)
            return -1;
        if (self->closing || left_ms < 1)
            return PML_TIMEOUT;
    }
}

/* Take the message over into the list and free it. */
static int append_message(PyObject *list, pml_received *received)
{
    const char *kind = kind_names[received->kind];
    PyObject *pair = Py_BuildValue("(ss#)", kind, received->text, (Py_ssize_t)received->size);
    free(received);
    if (pair == NULL)
        return -1;
    int result = PyList_Append(list, pair);
    Py_DECREF(pair);
    return result;
}

PyDoc_STRVAR(receive_doc,
             "receive(timeout=0.0)\n--\n\n"
             "Take what has arrived: a list of (kind, text), in order of arrival, empty when the\n"
             "timeout (seconds) passed. kind is answer, event, up, down, denied or lost. Waits\n"
             "without the GIL and lets signal handlers run. After a MemoryError messages may be\n"
             "missing: close this client and make another.");

static PyObject *client_receive(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"timeout", NULL};
    client_object *self = (client_object *)object;
    double timeout = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|d:receive", names, &timeout))
        return NULL;
    if (!(timeout >= 0)) {
        PyErr_SetString(PyExc_ValueError, "timeout must not be negative");
        return NULL;
    }
    PyObject *list = PyList_New(0);
    if (list == NULL)
        return NULL;
    if (!enter(self)) {
        Py_DECREF(list);
        return NULL;
    }
    pml_error err = PML_ERROR_INIT;
    pml_received *received = NULL;
    int status = wait_first(self, timeout, &received, &err);
    /* The rest is there already: taken without waiting. */
    for (int n = 1; status == PML_OK; n++) {
        if (append_message(list, received) < 0)
            status = -1;
        else if (n == BATCH)
            break;
        else
            status = (int)pml_client_receive(self->client, 0, &received, &err);
    }
    leave(self);
    /* An error behind messages that were taken comes again at the next call. */
    if (status == PML_OK || status == PML_TIMEOUT || (status > 0 && PyList_Size(list) > 0))
        return list;
    Py_DECREF(list);
    return status < 0 ? NULL : pmli_raise(errors_of(self), &err);
}

PyDoc_STRVAR(fileno_doc, "fileno()\n--\n\n"
                         "An eventfd, readable while messages wait. Not to be read or closed.");

static PyObject *client_fileno(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    client_object *self = (client_object *)object;
    if (!enter(self))
        return NULL;
    int fd = pml_client_fd(self->client);
    leave(self);
    return PyLong_FromLong(fd);
}

PyDoc_STRVAR(close_doc, "close()\n--\n\n"
                        "Leave. The run goes on. A second call does nothing.");

static PyObject *client_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    client_object *self = (client_object *)object;
    self->closing = true;
    if (self->users == 0)
        close_now(self);
    Py_RETURN_NONE;
}

static PyObject *client_enter(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    Py_INCREF(object);
    return object;
}

static PyObject *client_exit(PyObject *object, PyObject *Py_UNUSED(exception))
{
    return client_close(object, NULL);
}

static PyObject *client_closed(PyObject *object, void *Py_UNUSED(closure))
{
    client_object *self = (client_object *)object;
    return PyBool_FromLong(self->client == NULL || self->closing);
}

static PyMethodDef client_methods[] = {
    {"send", client_send, METH_O, send_doc},
    {"receive", (PyCFunction)(void (*)(void))client_receive, METH_VARARGS | METH_KEYWORDS,
     receive_doc},
    {"fileno", client_fileno, METH_NOARGS, fileno_doc},
    {"close", client_close, METH_NOARGS, close_doc},
    {"__enter__", client_enter, METH_NOARGS, NULL},
    {"__exit__", client_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef client_attributes[] = {
    {"closed", client_closed, NULL, "Whether close has been called.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(client_doc, "Client(connection_file=None, *, connection=None)\n--\n\n"
                         "A connection to a run's coordinator, with one I/O thread of its own, by\n"
                         "a connection file or by the JSON text of one.\n\n"
                         "Returns before the handshake: 'up' or 'denied' follows in receive.");

static PyType_Slot client_slots[] = {
    {Py_tp_doc, (void *)client_doc},   {Py_tp_new, client_new},
    {Py_tp_dealloc, client_dealloc},   {Py_tp_traverse, client_traverse},
    {Py_tp_clear, client_clear},       {Py_tp_methods, client_methods},
    {Py_tp_getset, client_attributes}, {0, NULL},
};

static PyType_Spec client_spec = {
    .name = "pantheraml._native.Client",
    .basicsize = sizeof(client_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = client_slots,
};

PyObject *pmli_client_type_new(PyObject *module)
{
    return PyType_FromModuleAndSpec(module, &client_spec, NULL);
}
