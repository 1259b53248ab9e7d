/* What workers report, and what becomes of it. */
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/log.h"
#include "pml/net/pass.h"

static void go_when_all_are_ready(coordinator *c)
{
    for (int r = 0; r < c->world; r++)
        if (!c->workers[r].ready)
            return;
    worker *first = &c->workers[0];
    pml_error err = PML_ERROR_INIT;
    for (int r = 1; r < c->world; r++)
        if (c->workers[r].step != first->step || c->workers[r].max_steps != first->max_steps) {
            fail_later(c, PML_INTERNAL, r, "the workers do not agree on where the run stands");
            return;
        }
    c->step = first->step;
    c->max_steps = first->max_steps;
    if (resume_check_identity(c, first->identity, &err) != PML_OK) {
        fail_later(c, err.code, -1, err.message);
        return;
    }
    emit(c, pml_message_part(first->identity, "plan", 0), false);
    for (int r = 0; r < c->world; r++) {
        resume_apply_again(c, &c->workers[r]);
        commands_catch_up(c, &c->workers[r]);
    }
    c->ready = true;
    c->crowded = 0;
    c->go_after = c->n_commands;
    go_when_committed(c);
}

/* What was asked for while the workers were loading is in force from the first step: the go waits
 * until it is committed. */
void go_when_committed(coordinator *c)
{
    if (!c->ready || c->went || c->next_commit < c->go_after)
        return;
    pml_message *go = pml_message_new(PML_ORDER_go);
    for (int r = 0; r < c->world; r++)
        worker_order(c, &c->workers[r], go);
    pml_message_destroy(&go);
    c->went = c->begun = true;
}

static void take_ready(coordinator *c, worker *w, pml_message **m)
{
    if (w->ready)
        return;
    w->ready = true;
    hear_last_word(c, w); /* not its last: what it has reserved, before it was ready */
    w->step = pml_message_int(*m, "step");
    w->max_steps = pml_message_int(*m, "max_steps");
    pml_message *plan = pml_message_part(*m, "plan", 0);
    w->plan = pml_message_part(plan, "by_cause", 0);
    pml_message_destroy(&plan);
    w->identity = *m;
    *m = NULL;
    worker_set_state(w, "ready");
    go_when_all_are_ready(c);
}

static void take_failure(coordinator *c, const worker *w, const pml_message *m)
{
    const char *code = pml_message_string(m, "code");
    pml_status status = PML_INTERNAL;
    for (int i = 1; i < PML_STATUS_COUNT; i++)
        if (strcmp(pml_status_name((pml_status)i), code) == 0)
            status = (pml_status)i;
    if (pml_message_bool(m, "crowded"))
        fail_crowded(c, status, w, pml_message_string(m, "reason"));
    else
        fail_later(c, status, w->rank, pml_message_string(m, "reason"));
}

/* A pause that is taken up again by other workers has the reason that the log has: they know none.
 */
static const char *why(const coordinator *c, run_state s)
{
    bool again = s == RUN_PAUSED && c->said[s][0] == '\0' &&
                 c->standing.verb == PML_REQUEST_pause && c->standing.step == c->step + 1;
    return again ? c->standing.reason : c->said[s];
}

/* All workers make the same turns: the run makes its nth when the last of them has made its nth,
 * where the first may be a turn ahead by then. */
static void take_turn(coordinator *c, worker *w, const pml_message *m)
{
    const char *state = pml_message_string(m, "state");
    if (strcmp(w->state, "failed") == 0) /* heard already, over its lease */
        return;
    worker_set_state(w, state);
    w->step = pml_message_int(m, "step");
    if (strcmp(state, "failed") == 0) {
        take_failure(c, w, m);
        return;
    }
    if (c->recovery.saves) { /* it is alone, and makes no other turn */
        recover_saved(c);
        return;
    }
    int s = RUN_RUNNING;
    while (s < RUN_STOPPED && strcmp(run_state_names[s], state) != 0)
        s++;
    w->turns[s]++;
    if (w->rank == 0) /* it alone writes, and so can name, checkpoints */
        snprintf(c->said[s], sizeof c->said[s], "%s", pml_message_string(m, "reason"));
    for (int r = 0; r < c->world; r++)
        if (c->workers[r].turns[s] < w->turns[s])
            return;
    if (w->step > c->step) /* the last to say so may be behind a step that rank 0 has told since */
        c->step = w->step;
    /* a finished run that is stopped releases its workers, and is finished still */
    if (!(c->state == RUN_FINISHED && s == RUN_STOPPED))
        set_state(c, (run_state)s, PML_OK, -1, why(c, (run_state)s));
    workers_publish(c);
}

/* What each worker's plan says, and what the system says; when it changed by 1%, or every 50 steps.
 */
static void add_memory(coordinator *c, pml_message *step)
{
    int64_t rss = 0, at = pml_message_int(step, "step");
    for (int r = 0; r < c->world; r++)
        rss += c->workers[r].rss;
    int64_t change = rss > c->memory_rss ? rss - c->memory_rss : c->memory_rss - rss;
    if (at < c->memory_step + 50 && at > c->memory_step && change * 100 <= c->memory_rss)
        return;
    c->memory_step = at;
    c->memory_rss = rss;
    for (int r = 0; r < c->world; r++) {
        pml_message *record = pml_message_copy(c->workers[r].plan);
        pml_message_set_int(record, "rss", c->workers[r].rss);
        pml_message_append(step, "memory", record);
    }
}

/* The first step after a reading, and then each ten seconds. */
static void add_gpus(coordinator *c, pml_message *step)
{
    const double period = 10, now = pml_clock_monotonic();
    if (c->gpus_at > 0 && now - c->gpus_at < period)
        return;
    for (int r = 0; r < c->world && r < GPUS_TOLD; r++) {
        const pml_message *gpu = c->workers[r].gpu;
        if (!pml_message_has(gpu, "age") && !pml_message_has(gpu, "trouble"))
            continue; /* nothing was read yet */
        pml_message_append(step, "gpus", pml_message_copy(gpu));
        c->gpus_at = now;
    }
}

/* What is not heard would be missing from the history, and what comes after it would be there: the
 * run ends, as where there is no memory for its log. */
static void lack_memory(coordinator *c, const worker *w, const char *reason)
{
    pml_log(PML_LOG_ERROR, "worker %d: %s: the run ends", w->rank, reason);
    c->broken = PML_NO_MEMORY;
}

/* What a worker may put into the log; state, applied and the like are ours alone. */
static void take_event(coordinator *c, worker *w, const pml_message *m)
{
    pml_message *event = pml_message_part(m, "event", 0);
    if (event == NULL) {
        lack_memory(c, w, "no memory for an event");
        return;
    }
    pml_message_type type = pml_message_type_of(event);
    switch (type) {
    case PML_EVENT_step:
        c->step = pml_message_int(event, "step");
        pml_message_remove(event, "memory");
        pml_message_remove(event, "gpus");
        add_memory(c, event);
        add_gpus(c, event);
        emit(c, event, false);
        return;
    case PML_EVENT_log:
        pml_message_set_int(event, "rank", w->rank);
        emit(c, event, false);
        return;
    case PML_EVENT_eval:
    case PML_EVENT_sample:
    case PML_EVENT_progress:
    case PML_EVENT_profile:
        emit(c, event, false);
        return;
    case PML_EVENT_checkpoint:
        emit(c, event, true);
        return;
    default:
        c->bad_roles++;
        pml_log(PML_LOG_ERROR, "worker %d may not log %s", w->rank, pml_message_name(type));
        pml_message_destroy(&event);
    }
}

static void take_report(coordinator *c, worker *w, const pml_inbound *in, pml_message **m)
{
    int64_t number = pml_message_int(*m, "number");
    pml_message_type type = pml_message_type_of(*m);
    /* While the workers are being ended, what one says of its own way is no news: a failure is a
     * consequence, and a ready worker is not there much longer. */
    if (c->recovery.under_way && (type == PML_REPORT_turn || type == PML_REPORT_ready))
        return;
    switch (type) {
    case PML_REPORT_joined:
        w->joined = true;
        w->peer = in->peer;
        worker_set_state(w, "loading");
        break;
    case PML_REPORT_sync:
        w->sync = true;
        break;
    case PML_REPORT_ready:
        take_ready(c, w, m);
        break;
    case PML_REPORT_ack:
        command_acked(c, w, pml_message_int(*m, "command"));
        break;
    case PML_REPORT_applied:
        command_reported(c, w, number, pml_message_int(*m, "command"), pml_message_int(*m, "step"),
                         NULL);
        break;
    case PML_REPORT_refused:
        command_reported(c, w, number, pml_message_int(*m, "command"), pml_message_int(*m, "step"),
                         pml_message_string(*m, "reason"));
        break;
    case PML_REPORT_turn:
        take_turn(c, w, *m);
        break;
    case PML_REPORT_report:
        w->told_since = true;
        take_event(c, w, *m);
        break;
    case PML_REPORT_beat:
        w->rss = pml_message_int(*m, "rss");
        w->cpu = pml_message_number(*m, "cpu");
        pml_message_destroy(&w->gpu);
        w->gpu = pml_message_part(*m, "gpu", 0);
        w->idle = pml_message_number(*m, "idle");
        w->limit = pml_message_number(*m, "limit");
        w->longest = pml_message_number(*m, "longest");
        snprintf(w->phase, sizeof w->phase, "%s", pml_message_string(*m, "phase"));
        w->waits_for =
            pml_message_has(*m, "waits_for") ? (int)pml_message_int(*m, "waits_for") : -1;
        w->told_since = false;
        w->beat_at = pml_clock_monotonic();
        watch_heard(c, w);
        break;
    default:
        break;
    }
    w->heard = number > w->heard ? number : w->heard;
}

/* What a worker had still on its way when it was replaced is not its successor's. */
static bool is_of_now(const worker *w, const pml_inbound *in, const pml_message *m)
{
    if (pml_message_type_of(m) == PML_REPORT_joined)
        return !w->joined && pml_message_int(m, "pid") == w->pid;
    return w->joined && in->peer.size == w->peer.size &&
           memcmp(in->peer.id, w->peer.id, w->peer.size) == 0;
}

/* The rank is the key's; what the message says must agree. */
void handle_report(coordinator *c, const pml_inbound *in)
{
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    if (in->role != PML_ROLE_WORKER || in->tag < 0 || in->tag >= c->world) {
        c->bad_roles++;
        return;
    }
    worker *w = &c->workers[in->tag];
    pml_status status = pml_message_parse(PML_CHANNEL_REPORT, in->text, in->size, &m, &err);
    if (status == PML_NO_MEMORY) {
        lack_memory(c, w, err.message);
        return;
    }
    if (status != PML_OK) {
        c->bad_messages++;
        pml_log(PML_LOG_ERROR, "worker %d: %s", w->rank, err.message);
        fail_later(c, PML_INTERNAL, w->rank, err.message);
        return;
    }
    if (pml_message_int(m, "rank") != w->rank) {
        c->bad_roles++;
        pml_log(PML_LOG_ERROR, "worker %d reports as worker %lld", w->rank,
                (long long)pml_message_int(m, "rank"));
    } else if (is_of_now(w, in, m)) {
        take_report(c, w, in, &m);
    }
    pml_message_destroy(&m);
}

static void take_last_word(coordinator *c, worker *w, const char *text, size_t size)
{
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    if (pml_message_parse(PML_CHANNEL_REPORT, text, size, &m, &err) != PML_OK) {
        c->bad_messages++;
        pml_log(PML_LOG_ERROR, "worker %d: %s", w->rank, err.message);
        return;
    }
    if (pml_message_type_of(m) == PML_REPORT_turn && pml_message_int(m, "rank") == w->rank &&
        strcmp(pml_message_string(m, "state"), "failed") == 0)
        take_turn(c, w, m);
    else
        c->bad_roles++;
    pml_message_destroy(&m);
}

/* Of its device's memory: kept for who replaces it, in the place of what it was started with and
 * could not go on with. */
static void take_reserved(coordinator *c, worker *w, int descriptor)
{
    if (w->reserved >= 0)
        close(w->reserved);
    w->reserved = descriptor == PML_PASS_LOST ? -1 : descriptor;
    w->inherits = false;
    if (descriptor == PML_PASS_LOST)
        emit_log(c, "warning", w->rank,
                 "should this worker die, its GPU's memory is free to all until it is replaced: "
                 "the coordinator has no descriptor left to hold it by");
}

void hear_last_word(coordinator *c, worker *w)
{
    static char text[PML_MESSAGE_MAX];
    int descriptor;
    for (ssize_t n = 1; n > 0;) {
        n = w->lease < 0 ? 0 : pml_pass_receive(w->lease, text, sizeof text, &descriptor);
        if (n <= 0)
            return;
        if (descriptor != -1)
            take_reserved(c, w, descriptor);
        else if (!c->recovery.under_way) /* else as in take_report */
            take_last_word(c, w, text, (size_t)n);
    }
}

/* What is acknowledged is forgotten where it was reported: of a command that rank 0 has applied and
 * another rank has not told of yet, only rank 0 could say so to the next coordinator. */
void workers_acknowledge(coordinator *c)
{
    for (int r = 0; r < c->world; r++) {
        worker *w = &c->workers[r];
        pml_error err = PML_ERROR_INIT;
        size_t bytes;
        int64_t number = w->heard, half = r == 0 ? commands_half_reported(c) : INT64_MAX;
        if (number >= half)
            number = half - 1;
        if (number <= w->told || eventlog_waiting(c->log, &bytes) > 0)
            continue; /* what waits for the disk is not in the log */
        if (w->sync && eventlog_sync(c->log, &err) != PML_OK)
            continue;
        w->sync = w->sync && number < w->heard;
        pml_message *heard = pml_message_new(PML_ORDER_heard);
        pml_message_set_int(heard, "number", number);
        if (worker_tell(c, w, heard)) /* else with the next round: rank 0 may be waiting for it */
            w->told = number;
        pml_message_destroy(&heard);
    }
}
