/* Requests and answers. Whatever a client sends, it gets an answer or is ignored; it never does
 * harm. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/log.h"

void answer(coordinator *c, const pml_inbound *in, pml_message *m)
{
    char *text;
    size_t size;
    pml_error err = PML_ERROR_INIT;
    pml_status status = pml_message_print(m, &text, &size, &err);
    if (status == PML_OK)
        status = pml_hub_send(c->hub, in->door, &in->peer, text, size, &err);
    /* A client that left needs no answer; one that does not read must not fill our log. */
    if (status != PML_OK && status != PML_PEER && status != PML_BUSY)
        pml_log(PML_LOG_ERROR, "cannot answer: %s", err.message);
    free(text);
    pml_message_destroy(&m);
}

/* What the sender could have known to be wrong. A run that is busy, or gone, or a disk that is full
 * are not its fault: it may ask again. */
static bool is_to_blame(pml_status code)
{
    return code == PML_CORRUPT || code == PML_INVALID || code == PML_DENIED;
}

static pml_message *error_message(const char *id, pml_status code, const char *words)
{
    pml_message *m = pml_message_new(PML_ANSWER_error);
    pml_message_set_string(m, "id", id);
    pml_message_set_string(m, "code", pml_status_name(code));
    pml_message_set_string(m, "message", words);
    return m;
}

void answer_error(coordinator *c, const pml_inbound *in, const char *id, const pml_error *err)
{
    char words[sizeof err->message + 64];
    pml_blame blame = is_to_blame(err->code) ? pml_hub_blame(c->hub, in) : PML_BLAME_NOTED;
    if (blame == PML_BLAME_OUT)
        return; /* nobody is there to read it */
    snprintf(words, sizeof words, "%s%s",
             blame == PML_BLAME_LAST ? "(the next one that is wrong closes this connection) " : "",
             err->message);
    answer(c, in, error_message(id, err->code, words));
}

static void answer_crowded(coordinator *c, const pml_inbound *in)
{
    char id[65];
    pml_error err = PML_ERROR_INIT;
    sharing_crowded(c, in, &err);
    pml_message_find_id(in->text, in->size, id);
    pml_message *m = error_message(id, err.code, err.message);
    pml_message_set_int(m, "viewers", in->crowd.viewers);
    answer(c, in, m);
}

static void answer_welcome(coordinator *c, const pml_inbound *in, const char *id)
{
    pml_message *m = pml_message_new(PML_ANSWER_welcome);
    pml_message_set_string(m, "id", id);
    pml_message_set_string(m, "run", pml_message_string(c->run, "name"));
    pml_message_set_string(m, "state", run_state_names[c->state]);
    pml_message_set_string(m, "reason", c->reason);
    if (c->trouble[0] != '\0')
        pml_message_set_string(m, "trouble", c->trouble);
    pml_message_set_int(m, "step", c->step);
    pml_message_set_int(m, "max_steps", c->max_steps);
    pml_message_set_int(m, "seq", eventlog_last(c->log));
    pml_message_set_int(m, "timeline", c->timeline);
    pml_message_set_int(m, "pid", getpid());
    pml_message_set_string(m, "role", pml_role_name(in->role));
    pml_message_set_empty(m, "workers");
    for (int r = 0; r < c->world; r++)
        pml_message_append(m, "workers", worker_record(&c->workers[r]));
    pml_refusals counts = pml_hub_refusals(c->hub);
    pml_message *refused = pml_message_new(PML_RECORD_refusals);
    pml_message_set_int(refused, "keys", counts.keys);
    pml_message_set_int(refused, "handshakes", counts.handshakes);
    pml_message_set_int(refused, "connections", counts.connections);
    pml_message_set_int(refused, "turned_out", counts.turned_out);
    pml_message_set_int(refused, "messages", c->bad_messages);
    pml_message_set_int(refused, "roles", c->bad_roles);
    pml_message_set_int(refused, "hurried", c->hurried);
    pml_message_set_part(m, "refused", refused);
    pml_message *sharing = sharing_record(c);
    if (sharing != NULL)
        pml_message_set_part(m, "sharing", sharing);
    answer(c, in, m);
}

/* What a viewer elsewhere cannot read itself. Not what only concerns this machine's disk. */
static void answer_configuration(coordinator *c, const pml_inbound *in, const char *id)
{
    pml_message *run = pml_message_copy(c->run);
    pml_message_remove(run, "prepare");
    pml_message_remove(run, "data");
    pml_message *m = pml_message_new(PML_ANSWER_configuration);
    pml_message_set_string(m, "id", id);
    pml_message_set_part(m, "run", run);
    answer(c, in, m);
}

/* The lines of the log go into the answer as they are: 10,000 steps are not parsed to be printed
 * again. */
static void answer_replay(coordinator *c, const pml_inbound *in, const char *id, int64_t from)
{
    static char text[PML_MESSAGE_MAX + 1];
    static char lines[PML_MESSAGE_MAX];
    enum { HEAD_MAX = 640 }; /* six bytes at most for each of the id's 64, and the rest */
    pml_error err = PML_ERROR_INIT;
    size_t size;
    int64_t next;
    if (!pml_hub_reads(c->hub, in)) {
        PML_FAIL(&err, PML_BUSY, "answers wait to be read; read them, and ask again");
        answer_error(c, in, id, &err);
        return;
    }
    pml_status status =
        eventlog_read(c->log, from, lines, sizeof lines - HEAD_MAX, &size, &next, &err);
    pml_message *m = NULL;
    char *head = NULL;
    size_t n = 0;
    if (status == PML_OK) {
        m = pml_message_new(PML_ANSWER_events);
        pml_message_set_string(m, "id", id);
        pml_message_set_int(m, "from", from);
        pml_message_set_int(m, "next", next);
        pml_message_set_int(m, "last", eventlog_last(c->log));
        pml_message_set_empty(m, "events");
        status = pml_message_print(m, &head, &n, &err);
    }
    if (status != PML_OK) {
        answer_error(c, in, id, &err);
    } else { /* head ends in []} */
        memcpy(text, head, n - 2);
        memcpy(text + n - 2, lines, size);
        memcpy(text + n - 2 + size, "]}", 2);
        pml_hub_send(c->hub, in->door, &in->peer, text, n + size, NULL);
    }
    free(head);
    pml_message_destroy(&m);
}

static void answer_command(coordinator *c, const pml_inbound *in, const pml_message *request)
{
    pml_error err = PML_ERROR_INIT;
    int64_t number;
    const char *id = pml_message_string(request, "id");
    if (command_accept(c, request, &number, &err) != PML_OK) {
        answer_error(c, in, id, &err);
        return;
    }
    pml_message *m = pml_message_new(PML_ANSWER_accepted);
    pml_message_set_string(m, "id", id);
    pml_message_set_int(m, "command", number);
    if (c->trouble[0] != '\0')
        pml_message_set_string(m, "trouble", c->trouble);
    answer(c, in, m);
}

/* Rank 0 writes samples. One that is over, or waits still, takes no harm from it. */
static void answer_enough(coordinator *c, const pml_inbound *in, const pml_message *request)
{
    int64_t number = pml_message_int(request, "command");
    pml_message *order = pml_message_new(PML_ORDER_enough);
    pml_message_set_int(order, "command", number);
    if (pml_message_has(request, "row"))
        pml_message_set_int(order, "row", pml_message_int(request, "row"));
    if (c->world > 0)
        (void)worker_tell(c, &c->workers[0], order); /* the sample goes on */
    pml_message_destroy(&order);
    pml_message *m = pml_message_new(PML_ANSWER_accepted);
    pml_message_set_string(m, "id", pml_message_string(request, "id"));
    pml_message_set_int(m, "command", number);
    answer(c, in, m);
}

static void note_export(coordinator *c, const pml_inbound *in, const pml_message *request)
{
    static const char *const words[] = {"format", "path"};
    static const char *const numbers[] = {"step", "bytes"};
    static const char *const measures[] = {"difference", "seconds"};
    pml_message *event = pml_message_new(PML_EVENT_export);
    for (int i = 0; i < 2; i++) {
        pml_message_set_string(event, words[i], pml_message_string(request, words[i]));
        pml_message_set_int(event, numbers[i], pml_message_int(request, numbers[i]));
        if (pml_message_has(request, measures[i]))
            pml_message_set_number(event, measures[i], pml_message_number(request, measures[i]));
    }
    emit(c, event, false);
    pml_message *m = pml_message_new(PML_ANSWER_noted);
    pml_message_set_string(m, "id", pml_message_string(request, "id"));
    answer(c, in, m);
}

static void refuse(coordinator *c, const pml_inbound *in, const pml_error *err)
{
    char id[65];
    c->bad_messages++;
    pml_message_find_id(in->text, in->size, id);
    answer_error(c, in, id, err);
}

void handle_request(coordinator *c, const pml_inbound *in)
{
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    char words[400];
    if (in->crowd.viewers > 0) {
        answer_crowded(c, in);
        return;
    }
    if (in->hurried) {
        char id[65];
        c->hurried++;
        pml_message_find_id(in->text, in->size, id);
        PML_FAIL(&err, PML_BUSY, "too many requests in too short a time; ask more slowly");
        answer_error(c, in, id, &err);
        return;
    }
    if (in->size > PML_REQUEST_MAX) {
        PML_FAIL(&err, PML_INVALID, "a request has at most %d bytes, this one has %zu",
                 PML_REQUEST_MAX, in->size);
        refuse(c, in, &err);
        return;
    }
    if (pml_message_parse(PML_CHANNEL_REQUEST, in->text, in->size, &m, &err) != PML_OK) {
        refuse(c, in, &err);
        return;
    }
    pml_message_type type = pml_message_type_of(m);
    const char *id = pml_message_string(m, "id");
    bool allowed = (pml_message_roles(type) & in->role) != 0;
    if (allowed)
        c->last_alive = pml_clock_monotonic();
    if (allowed && type != PML_REQUEST_alive)
        c->last_request = c->last_alive;
    if (!allowed) {
        c->bad_roles++;
        PML_FAIL(&err, PML_DENIED, "a key of role %s may not send %s", pml_role_name(in->role),
                 pml_message_name(type));
        answer_error(c, in, id, &err);
    } else if (type == PML_REQUEST_hello || type == PML_REQUEST_status) {
        answer_welcome(c, in, id);
    } else if (type == PML_REQUEST_replay) {
        answer_replay(c, in, id, pml_message_int(m, "from"));
    } else if (type == PML_REQUEST_configuration) {
        answer_configuration(c, in, id);
    } else if (type != PML_REQUEST_alive && resume_is_checking(c, words, sizeof words)) {
        PML_FAIL(&err, PML_BUSY, "resuming: %s; ask again", words);
        answer_error(c, in, id, &err);
    } else if (type == PML_REQUEST_share) {
        handle_share(c, in, m);
    } else if (type == PML_REQUEST_unshare) {
        handle_unshare(c, in, m);
    } else if (type == PML_REQUEST_exported) {
        note_export(c, in, m);
    } else if (type == PML_REQUEST_enough) {
        answer_enough(c, in, m);
    } else if (type != PML_REQUEST_alive) {
        answer_command(c, in, m);
    }
    pml_message_destroy(&m);
}
