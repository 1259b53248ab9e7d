/* The one order of commands.
 *
 *   accepted ──► sent to every worker ──► acknowledged by all ──► commit to all ──► reports ──►
 * applied (logged) (fsynced)
 *
 * Commands are committed in their order, so commit n says that everybody has all up to n. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator.h"
#include "pml/base/hash.h"
#include "pml/base/table.h"
#include "states.h"

enum { COMMANDS_MAX = 1000000 };

static command *find_number(coordinator *c, int64_t number)
{
    if (number < 1 || number >= c->next_number || c->n_commands == 0)
        return NULL;
    return &c->commands[number - 1];
}

static command *find_id(coordinator *c, const char *id)
{
    for (size_t i = c->n_commands; i > 0; i--)
        if (strcmp(c->commands[i - 1].id, id) == 0)
            return &c->commands[i - 1];
    return NULL;
}

/* Tells a repeated request from another one under the same id. */
static pml_status digest_of(const pml_message *m, const char *verb, const char *args_field,
                            uint64_t *digest, pml_error *err)
{
    pml_message *order = pml_message_new(PML_ORDER_command);
    pml_message *args = args_field == NULL ? NULL : pml_message_part(m, args_field, 0);
    pml_message_set_int(order, "command", 1);
    pml_message_set_string(order, "verb", verb);
    pml_message_set_args(order, "args", args_field == NULL ? m : args);
    char *text = NULL;
    size_t size;
    uint8_t hash[PML_HASH_BYTES];
    pml_status status = pml_message_print(order, &text, &size, err);
    if (status == PML_OK)
        status = pml_hash_memory(text, size, hash, err);
    if (status == PML_OK)
        memcpy(digest, hash, sizeof *digest);
    free(text);
    pml_message_destroy(&order);
    pml_message_destroy(&args);
    return status;
}

static command *add(coordinator *c, pml_message_type verb, const char *id, uint64_t digest)
{
    command *larger =
        pml_table_room(c->commands, &c->command_capacity, c->n_commands + 1, sizeof *larger);
    if (larger == NULL)
        return NULL;
    c->commands = larger;
    command *k = &c->commands[c->n_commands++];
    *k = (command){.number = c->next_number++, .verb = verb, .digest = digest};
    snprintf(k->id, sizeof k->id, "%s", id);
    return k;
}

static pml_message_type verb_type(const char *verb)
{
    for (int i = 0; i < PML_MESSAGE_COUNT; i++)
        if (pml_message_channel((pml_message_type)i) == PML_CHANNEL_REQUEST &&
            strcmp(pml_message_name((pml_message_type)i), verb) == 0)
            return (pml_message_type)i;
    return PML_MESSAGE_COUNT;
}

/* It has its end. */
static void close_command(coordinator *c, command *k)
{
    pml_message_destroy(&k->request);
    while (c->first_open < c->n_commands && c->commands[c->first_open].request == NULL)
        c->first_open++;
}

/* Commands of the log keep their numbers and ids; those that have no end in it are open. */
void commands_recover(coordinator *c, const pml_message *event)
{
    pml_message_type type = pml_message_type_of(event);
    if (type == PML_EVENT_applied || type == PML_EVENT_refused) {
        command *ended = find_number(c, pml_message_int(event, "command"));
        if (ended != NULL)
            close_command(c, ended);
    }
    if (type != PML_EVENT_command)
        return;
    const char *name = pml_message_string(event, "verb");
    pml_message_type verb = verb_type(name);
    uint64_t digest;
    if (verb == PML_MESSAGE_COUNT || c->next_number != pml_message_int(event, "command")) {
        c->broken = PML_CORRUPT;
        return;
    }
    command *k = digest_of(event, name, "args", &digest, NULL) != PML_OK
                     ? NULL
                     : add(c, verb, pml_message_string(event, "id"), digest);
    if (k == NULL || (k->request = pml_message_part(event, "args", 0)) == NULL)
        c->broken = PML_NO_MEMORY;
}

static void send_order(coordinator *c, worker *w, const command *k)
{
    pml_message *order = pml_message_new(PML_ORDER_command);
    pml_message_set_int(order, "command", k->number);
    pml_message_set_string(order, "verb", pml_message_name(k->verb));
    pml_message_set_args(order, "args", k->request);
    worker_order(c, w, order);
    pml_message_destroy(&order);
}

static void log_accepted(coordinator *c, const command *k)
{
    pml_message *event = pml_message_new(PML_EVENT_command);
    pml_message_set_int(event, "command", k->number);
    pml_message_set_string(event, "verb", pml_message_name(k->verb));
    pml_message_set_string(event, "id", k->id);
    pml_message_set_args(event, "args", k->request);
    emit(c, event, false);
}

static situation situation_of(const coordinator *c)
{
    if (c->ending)
        return IN_ENDING;
    switch (c->state) {
    case RUN_STOPPED:
        return IN_STOPPED;
    case RUN_FAILED:
        return IN_FAILED;
    case RUN_FINISHED:
        return workers_gone(c) ? IN_DONE : IN_SERVING;
    default:
        break;
    }
    if (!c->went)
        return c->begun || c->waiting || c->recover ? IN_AGAIN : IN_NEW;
    return c->state == RUN_PAUSED ? IN_PAUSED : IN_RUNNING;
}

static pml_status refusal(situation in, pml_message_type verb, pml_error *err)
{
    switch (in) {
    case IN_ENDING:
        return PML_FAIL(err, PML_BUSY, "the run is ending");
    case IN_DONE:
        return PML_FAIL(err, PML_BUSY, "the run is finished and its workers are gone: resume it");
    case IN_SERVING:
        return PML_FAIL(err, PML_BUSY, "the run is finished: there is nothing to %s",
                        pml_message_name(verb));
    default:
        return PML_FAIL(err, PML_BUSY, "the run has %s: resume it from a checkpoint first",
                        states_name(in));
    }
}

static pml_status allowed_now(const coordinator *c, pml_message_type verb, action *what,
                              pml_error *err)
{
    situation in = situation_of(c);
    *what = states_action(in, verb);
    if (*what == ACT_REFUSE)
        return refusal(in, verb, err);
    if (verb != PML_REQUEST_stop && !c->asks_itself && journal_is_full(c))
        return PML_FAIL(err, PML_IO, "%s", c->trouble);
    if (c->n_commands >= COMMANDS_MAX)
        return PML_FAIL(err, PML_BUSY, "a run takes at most %d commands", COMMANDS_MAX);
    return PML_OK;
}

/* Nothing has begun, so nothing is to be saved: a stop need not wait for workers to load. */
static void stop_at_once(coordinator *c)
{
    workers_kill(c, SIGKILL);
    if (c->prepare > 0)
        kill(c->prepare, SIGKILL);
    commands_apply_stop(c);
    c->recovery.under_way = c->failure.seen = false;
    commands_refuse_open(c, "the run was stopped before it began");
    set_state(c, RUN_STOPPED, PML_OK, -1, "stopped before it began");
}

pml_status command_accept(coordinator *c, const pml_message *request, int64_t *number,
                          pml_error *err)
{
    const char *id = pml_message_string(request, "id");
    pml_message_type verb = pml_message_type_of(request);
    uint64_t digest;
    pml_status status = digest_of(request, pml_message_name(verb), NULL, &digest, err);
    if (status != PML_OK)
        return status;
    const command *before = find_id(c, id);
    if (before != NULL && before->digest != digest)
        return PML_FAIL(err, PML_INVALID, "id \"%s\" was used for another request (a %s)", id,
                        pml_message_name(before->verb));
    if (before != NULL) {
        *number = before->number;
        return PML_OK;
    }
    action what;
    status = allowed_now(c, verb, &what, err);
    if (status != PML_OK)
        return status;
    pml_message *copy = pml_message_copy(request);
    command *k = copy == NULL ? NULL : add(c, verb, id, digest);
    if (k == NULL) {
        pml_message_destroy(&copy);
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for one more command");
    }
    k->request = copy;
    *number = k->number;
    log_accepted(c, k);
    if (c->broken)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the log: the run ends");
    if (what == ACT_END)
        stop_at_once(c);
    else /* what is queued goes to the workers when they are ready, all else now */
        for (int r = 0; r < c->world && c->ready; r++)
            send_order(c, &c->workers[r], k);
    return PML_OK;
}

void commands_catch_up(coordinator *c, worker *w)
{
    for (size_t i = c->first_open; i < c->n_commands; i++)
        if (c->commands[i].request != NULL)
            send_order(c, w, &c->commands[i]);
}

static void commit(coordinator *c, command *k)
{
    pml_message *order = pml_message_new(PML_ORDER_commit);
    pml_message_set_int(order, "command", k->number);
    for (int r = 0; r < c->world; r++)
        worker_order(c, &c->workers[r], order);
    pml_message_destroy(&order);
    k->committed = true;
}

/* Commands that have their end already are not sent. */
static size_t next_open(const coordinator *c, size_t index)
{
    while (index < c->n_commands && c->commands[index].request == NULL)
        index++;
    return index;
}

/* In order, and none left out: whoever acknowledges 7 without 6 has no memory for 6, or is wrong
 * about 7. */
void command_acked(coordinator *c, worker *w, int64_t number)
{
    w->acked = next_open(c, w->acked);
    if (w->acked == c->n_commands || c->commands[w->acked].number != number) {
        emit_log(c, "error", w->rank, "command %lld is acknowledged out of order: not taken",
                 (long long)number);
        return;
    }
    w->acked++;
    size_t all = c->n_commands;
    for (int r = 0; r < c->world; r++) {
        size_t mine = next_open(c, c->workers[r].acked);
        all = mine < all ? mine : all;
    }
    for (; c->next_commit < all; c->next_commit++)
        if (c->commands[c->next_commit].request != NULL)
            commit(c, &c->commands[c->next_commit]);
    go_when_committed(c);
}

/* world: ranks that carried it out. */
static void log_end(coordinator *c, command *k, int world)
{
    const char *verb = pml_message_name(k->verb);
    bool refused = k->refusal[0] != '\0';
    pml_message *event = pml_message_new(refused ? PML_EVENT_refused : PML_EVENT_applied);
    pml_message_set_int(event, "command", k->number);
    pml_message_set_string(event, "verb", verb);
    pml_message_set_int(event, "step", k->step);
    if (refused) {
        pml_message_set_string(event, "reason", k->refusal);
    } else {
        int32_t ranks[512];
        for (int r = 0; r < world; r++)
            ranks[r] = r;
        pml_message_set_ints(event, "workers", ranks, (size_t)world);
        if (k->verb == PML_REQUEST_set || k->verb == PML_REQUEST_checkpoint ||
            k->verb == PML_REQUEST_resume)
            pml_message_set_args(event, "args", k->request);
    }
    emit(c, event, true);
    close_command(c, k);
}

void command_reported(coordinator *c, const worker *w, int64_t report, int64_t number, int64_t step,
                      const char *refusal)
{
    command *k = find_number(c, number);
    if (k == NULL || k->request == NULL || !k->committed) {
        emit_log(c, "error", w->rank, "report on command %lld, which is not under way",
                 (long long)number);
        return;
    }
    if (k->reports > 0 && k->step != step)
        emit_log(c, "error", w->rank,
                 "command %lld took effect at step %lld here and at %lld there", (long long)number,
                 (long long)step, (long long)k->step);
    if (k->reports == 0)
        k->step = step;
    if (w->rank == 0)
        k->first_said = report;
    k->reports++;
    if (refusal != NULL && k->refusal[0] == '\0')
        snprintf(k->refusal, sizeof k->refusal, "%s", refusal);
    if (k->reports == c->world)
        log_end(c, k, c->world);
}

int64_t commands_half_reported(const coordinator *c)
{
    int64_t first = INT64_MAX;
    for (size_t i = c->first_open; i < c->n_commands; i++) {
        const command *k = &c->commands[i];
        if (k->request != NULL && k->first_said > 0 && k->first_said < first)
            first = k->first_said;
    }
    return first;
}

void commands_hand_over(coordinator *c, int64_t number, int64_t step, const char *refusal)
{
    command *k = find_number(c, number);
    if (k == NULL || k->request == NULL || k->verb == PML_REQUEST_sample ||
        k->verb == PML_REQUEST_evaluate || number > (int64_t)c->n_logged)
        return; /* beyond what was logged: the number is another command's now */
    k->step = step;
    snprintf(k->refusal, sizeof k->refusal, "%s", refusal != NULL ? refusal : "");
    log_end(c, k, c->world);
}

/* They were committed, so all ranks had carried out what one of them had, or were about to. */
void commands_kept(coordinator *c, int64_t last)
{
    for (size_t i = c->first_open; i < c->n_commands; i++) {
        command *k = &c->commands[i];
        if (k->request != NULL && k->first_said > 0 && k->number <= last)
            log_end(c, k, c->world);
    }
}

void commands_rewind(coordinator *c)
{
    c->next_commit = c->first_open;
    for (size_t i = c->first_open; i < c->n_commands; i++) {
        c->commands[i].committed = false;
        c->commands[i].reports = 0;
        c->commands[i].first_said = 0;
        c->commands[i].refusal[0] = '\0';
    }
    for (int r = 0; r < c->world; r++)
        c->workers[r].acked = c->first_open;
}

static command *open_stop(const coordinator *c)
{
    for (size_t i = c->first_open; i < c->n_commands; i++)
        if (c->commands[i].request != NULL && c->commands[i].verb == PML_REQUEST_stop)
            return &c->commands[i];
    return NULL;
}

bool commands_stop_open(const coordinator *c)
{
    return open_stop(c) != NULL;
}

void commands_apply_stop(coordinator *c)
{
    command *k = open_stop(c);
    if (k == NULL)
        return;
    k->step = c->step + 1;
    k->refusal[0] = '\0';
    log_end(c, k, 0);
}

static void refuse_open(coordinator *c, size_t n, const char *reason)
{
    for (size_t i = c->first_open; i < n; i++) {
        command *k = &c->commands[i];
        if (k->request == NULL)
            continue;
        snprintf(k->refusal, sizeof k->refusal, "%s", reason);
        k->step = c->step + 1;
        log_end(c, k, 0);
    }
}

void commands_refuse_open(coordinator *c, const char *reason)
{
    refuse_open(c, c->n_commands, reason);
}

void commands_refuse_lost(coordinator *c)
{
    refuse_open(c, c->n_logged, "the run's coordinator ended before it took effect");
}

void commands_free(coordinator *c)
{
    for (size_t i = 0; i < c->n_commands; i++)
        pml_message_destroy(&c->commands[i].request);
    free(c->commands);
}
