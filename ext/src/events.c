/* Messages held against the table: events as they come from outside, out of a log or over a wire,
 * before Python reads a field of them, and requests before they are sent. */
#include "native.h"

#include <string.h>

#include "pml/json/messages.h"
#include "pml/json/sum.h"

/* A whole line of the log: what was written, an event, and (seq > 0) the one that belongs here. */
static pml_status check_line(const char *line, size_t size, int64_t seq, pml_error *err)
{
    pml_message *event = NULL;
    pml_status status = pml_sum_check(line, size, err);
    if (status == PML_OK)
        status = pml_message_parse(PML_CHANNEL_EVENT, line, size, &event, err);
    if (status == PML_OK && seq > 0 && pml_message_int(event, "seq") != seq)
        status =
            PML_FAIL(err, PML_CORRUPT, "its seq is %lld", (long long)pml_message_int(event, "seq"));
    pml_message_destroy(&event);
    return status;
}

PyDoc_STRVAR(
    first_damaged_doc,
    "first_damaged(lines, seq, /)\n--\n\n"
    "The first line of a log that is not an event as it was written: (its index, why), or None.\n"
    "lines: bytes, each line with its newline. seq: of the first of them; 0: not looked at.");

static PyObject *first_damaged(PyObject *module, PyObject *args)
{
    const char *text;
    Py_ssize_t size;
    long long seq;
    if (!PyArg_ParseTuple(args, "y#L:first_damaged", &text, &size, &seq))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    pml_status status = PML_OK;
    const char *end = text + size;
    Py_ssize_t index = 0;
    PyThreadState *gil = PyEval_SaveThread(); /* args hold the bytes, which nobody can change */
    for (const char *line = text; line < end; index++) {
        const char *stop = memchr(line, '\n', (size_t)(end - line));
        if (stop == NULL)
            stop = end;
        status = check_line(line, (size_t)(stop - line), seq == 0 ? 0 : seq + index, &err);
        if (status != PML_OK)
            break;
        line = stop + 1;
    }
    PyEval_RestoreThread(gil);
    if (status == PML_NO_MEMORY)
        return pmli_raise(pmli_state_of(module), &err);
    if (status != PML_OK)
        return Py_BuildValue("(nN)", index, pmli_words(&err));
    Py_RETURN_NONE;
}

/* What is published: an event of the log, or a signal, such as a heartbeat. */
static pml_status check_published(const char *text, size_t size, pml_message **m, pml_error *err)
{
    pml_error event = PML_ERROR_INIT, signal = PML_ERROR_INIT;
    pml_status status = pml_message_parse(PML_CHANNEL_EVENT, text, size, m, &event);
    if (status != PML_INVALID) {
        *err = event;
        return status;
    }
    status = pml_message_parse(PML_CHANNEL_SIGNAL, text, size, m, &signal);
    if (status == PML_INVALID) /* its type is unknown to one of them, at least */
        return PML_FAIL(err, PML_INVALID, "as an event: %s; as a signal: %s", event.message,
                        signal.message);
    *err = signal;
    return status;
}

static pml_status check_as(const char *kind, const char *text, size_t size, pml_error *err)
{
    pml_message *message = NULL;
    pml_status status;
    if (strcmp(kind, "run") == 0)
        status = pml_message_parse_as(PML_FILE_run, text, size, &message, err);
    else if (strcmp(kind, "answer") == 0)
        status = pml_message_parse(PML_CHANNEL_ANSWER, text, size, &message, err);
    else if (strcmp(kind, "event") == 0)
        status = check_published(text, size, &message, err);
    else if (strcmp(kind, "request") == 0)
        status = pml_message_parse(PML_CHANNEL_REQUEST, text, size, &message, err);
    else
        status = PML_FAIL(err, PML_INVALID, "kind is event, answer, request or run, not %s", kind);
    pml_message_destroy(&message);
    return status;
}

PyDoc_STRVAR(
    check_message_doc,
    "check_message(kind, text, /)\n--\n\n"
    "Raise what is wrong, by name, with an 'event' or an 'answer' of a coordinator, with a\n"
    "'request' to it, or with the text of run.json ('run').");

static PyObject *check_message(PyObject *module, PyObject *args)
{
    const char *kind, *text;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "ss#:check_message", &kind, &text, &size))
        return NULL;
    pml_error err = PML_ERROR_INIT;
    PyThreadState *gil = PyEval_SaveThread();
    pml_status status = check_as(kind, text, (size_t)size, &err);
    PyEval_RestoreThread(gil);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    Py_RETURN_NONE;
}

PyMethodDef pmli_events_methods[] = {
    {"first_damaged", first_damaged, METH_VARARGS, first_damaged_doc},
    {"check_message", check_message, METH_VARARGS, check_message_doc},
    {NULL, NULL, 0, NULL}};
