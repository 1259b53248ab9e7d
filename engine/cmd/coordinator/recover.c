/* Going on after a failure: which failures, how often, and from where.
 *
 *   a worker died, hung or fell silent
 *     ──► all workers are ended ──► delay ──► snapshot in memory, else checkpoint, else the start
 *     ──► `restart` event, a new timeline, the workers start again
 *
 *     ──► the device's memory is with others by then ──► delay ──► the workers start again, as
 *         often as it takes: that is no failure of the run's making, and is not counted
 *         ──► a stop meanwhile ──► a worker without a device writes the snapshot in memory
 *
 *     ──► what it would go on from cannot be read just now ──► delay ──► it is read again, a
 *         few times; nothing older takes its place
 *
 * What a worker says before it ends (no memory, a damaged file) would come again, so it is the end
 * of the run; what ends without a word, or comes on no more, is replaced. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/log.h"
#include "pml/train/run.h"
#include "pml/train/slots.h"

static const double first_delay = 0.25, longest_delay = 30;
static const double hurry_seconds = 2; /* between a second signal and the end */

/* ---- which failures ---- */

bool stop_is_asked(const coordinator *c)
{
    return c->leaving || c->standing.verb == PML_REQUEST_stop || commands_stop_open(c);
}

bool recover_wanted(const coordinator *c, const failure *f)
{
    bool training = c->state == RUN_STARTING || c->state == RUN_RUNNING || c->state == RUN_PAUSED;
    bool silent_end = f->cause[0] != '\0' || f->code == PML_PEER;
    return training && silent_end && !c->ending && c->prepare == 0 && pml_run_restarts(c->run);
}

static double doubled(int times)
{
    double delay = first_delay;
    for (int i = 0; i < times && delay < longest_delay; i++)
        delay *= 2;
    return delay < longest_delay ? delay : longest_delay;
}

/* 0.25 s, and twice as long for each time that it came no further than the time before. */
static double delay_now(coordinator *c)
{
    c->futile = c->step > c->furthest ? 0 : c->futile + 1;
    c->furthest = c->step > c->furthest ? c->step : c->furthest;
    return doubled(c->futile);
}

static void end_stopped(coordinator *c, const char *reason)
{
    c->recovery.under_way = c->recovery.saves = false;
    commands_apply_stop(c);
    commands_refuse_open(c, "the run was stopped");
    set_state(c, RUN_STOPPED, PML_OK, -1, reason);
}

static void say_lost(const coordinator *c, char *words, size_t capacity)
{
    char from[600] = "the beginning, there is no checkpoint,";
    const int64_t lost = eventlog_step(c->log) - resume_newest_step(c);
    if (c->newest[0] != '\0')
        snprintf(from, sizeof from, "the newest checkpoint, %s,", c->newest);
    snprintf(words, capacity, "%lld step%s since %s are lost", (long long)(lost > 0 ? lost : 0),
             lost == 1 ? "" : "s", from);
}

/* Nobody is there who could save what the newest checkpoint lacks. */
static void stop_by_force(coordinator *c, const char *reason)
{
    char text[1800], lost[700];
    workers_kill(c, SIGKILL);
    say_lost(c, lost, sizeof lost);
    snprintf(text, sizeof text, "stopped by force, %s: %s", lost, reason);
    end_stopped(c, text);
}

bool recover_begin(coordinator *c, const failure *f)
{
    int64_t most = pml_run_max_restarts(c->run);
    bool hung = strcmp(f->cause, "hung") == 0 || strcmp(f->cause, "silent") == 0;
    if (hung && stop_is_asked(c)) {
        stop_by_force(c, f->reason);
        return true;
    }
    if (c->restarts >= most)
        return false;
    c->restarts++;
    emit_log(c, "error", f->rank, "%s", f->reason);
    workers_kill(c, SIGKILL);
    recovery *r = &c->recovery;
    *r = (recovery){.under_way = true, .rank = f->rank, .delay = delay_now(c)};
    r->at = pml_clock_monotonic() + r->delay;
    snprintf(r->cause, sizeof r->cause, "%s", f->cause[0] != '\0' ? f->cause : "died");
    snprintf(r->reason, sizeof r->reason, "%s", f->reason);
    c->ready = c->went = false;
    return true;
}

/* ---- others have the memory ---- */

bool recover_waits(const coordinator *c, const failure *f)
{
    return f->crowded && c->restarts > 0 && c->state == RUN_STARTING && !c->ending;
}

/* Between two tries it has of the device what its coordinator holds for it: all of it after the
 * death of a worker, nothing after that of a coordinator. */
void recover_wait(coordinator *c, const failure *f)
{
    char reason[sizeof c->reason];
    workers_kill(c, SIGKILL);
    recovery *r = &c->recovery;
    *r = (recovery){.under_way = true, .waits = true, .delay = doubled(c->crowded++)};
    r->at = pml_clock_monotonic() + r->delay;
    c->ready = c->went = false;
    snprintf(reason, sizeof reason, "waiting for memory of %s: %.900s", c->workers[f->rank].device,
             f->reason);
    if (strcmp(reason, c->reason) != 0) /* said once, however often it is tried */
        begin_state(c, reason);
}

/* ---- what cannot be read just now ---- */

enum { READINGS = 10 }; /* 92 seconds: a network disk comes back, a neighbour closes its files */

bool recover_reads_again(coordinator *c, pml_status status, pml_error *err)
{
    char reason[sizeof c->reason];
    rereading *r = &c->rereading;
    if (status != PML_IO && status != PML_NO_MEMORY)
        return false;
    r->tries++;
    if (r->tries >= READINGS) {
        pml_error_prefix(err, "tried %d times", r->tries);
        return false;
    }
    r->at = pml_clock_monotonic() + c->retry_seconds * doubled(r->tries - 1);
    snprintf(reason, sizeof reason, "waiting to read what the run goes on from: %.900s",
             err->message);
    if (strcmp(reason, c->reason) != 0) /* said once, however often it is tried */
        begin_state(c, reason);
    return true;
}

void recover_has_read(coordinator *c)
{
    c->rereading = (rereading){0};
}

/* ---- a stop while it waits ---- */

/* The stop is in force: a coordinator that is lost meanwhile leaves it to the next one, for which
 * the run still waits. Others may have the devices' memory now. */
static pml_status save_left(coordinator *c, pml_error *err)
{
    char reason[sizeof c->reason + 100];
    recovery *r = &c->recovery;
    workers_forget(c);
    workers_give_memory_back(c);
    c->failure = (failure){0}; /* of those that are gone */
    r->under_way = false;
    r->saves = true;
    commands_apply_stop(c);
    snprintf(reason, sizeof reason, "saving the snapshot of step %lld to stop; it was %s",
             (long long)c->step, c->reason);
    begin_state(c, reason);
    return workers_save_left(c, err);
}

/* No worker is there. What they have left in memory is saved by one that needs no device. */
static bool stops_waiting(coordinator *c)
{
    char reason[sizeof c->reason];
    pml_error err = PML_ERROR_INIT;
    const bool waits = c->recovery.waits || c->rereading.tries > 0;
    if (!c->recovery.under_way || !waits || !stop_is_asked(c))
        return false;
    if (c->slot < 0) {
        snprintf(reason, sizeof reason, "%s", c->reason);
        stop_by_force(c, reason);
    } else if (workers_gone(c) && save_left(c, &err) != PML_OK) {
        stop_by_force(c, err.message);
    }
    return true;
}

void recover_saved(coordinator *c)
{
    char reason[1400];
    const long long lost = eventlog_step(c->log) - c->step;
    int n = snprintf(reason, sizeof reason, "the snapshot in memory is %s", c->newest);
    if (lost > 0)
        snprintf(reason + n, sizeof reason - (size_t)n, "; %lld step%s after it %s lost", lost,
                 lost == 1 ? "" : "s", lost == 1 ? "is" : "are");
    end_stopped(c, reason);
}

bool recover_lost_saver(coordinator *c, failure *f)
{
    char lost[700];
    if (!c->recovery.saves)
        return false;
    if (recover_wanted(c, f)) {
        stop_by_force(c, f->reason);
        return true;
    }
    size_t n = strlen(f->reason);
    say_lost(c, lost, sizeof lost);
    snprintf(f->reason + n, sizeof f->reason - n, "; %s", lost);
    c->recovery.saves = false;
    return false;
}

/* ---- from where ---- */

static void log_restart(coordinator *c, const char *from)
{
    const recovery *r = &c->recovery;
    pml_message *event = pml_message_new(PML_EVENT_restart);
    pml_message_set_string(event, "cause", r->cause);
    pml_message_set_string(event, "reason", r->reason);
    if (r->rank >= 0)
        pml_message_set_int(event, "rank", r->rank);
    pml_message_set_int(event, "attempt", c->restarts);
    pml_message_set_int(event, "most", pml_run_max_restarts(c->run));
    pml_message_set_number(event, "delay", r->delay);
    pml_message_set_string(event, "from", from);
    pml_message_set_int(event, "step", c->step);
    emit(c, event, true);
}

/* It has the settings of its steps, also those that the log has no end of yet. */
static pml_status keep_commands(coordinator *c, pml_error *err)
{
    pml_slot_view view;
    pml_status status = pml_slots_map(c->slots, c->slot, &view, err);
    if (status == PML_OK)
        commands_kept(c, view.state->command);
    pml_slots_unmap(&view);
    return status;
}

/* A snapshot counts as far as the log has its steps: what the log does not have is made again. */
static pml_status choose(coordinator *c, const char **from, pml_error *err)
{
    int64_t step;
    pml_status status = PML_OK;
    c->slot = -1;
    if (c->slots >= 0)
        status = pml_slots_choose(c->slots, c->step, &c->slot, &step, err);
    c->named = false;
    c->checkpoint[0] = '\0';
    if (status == PML_OK && c->slot >= 0)
        status = keep_commands(c, err);
    if (status == PML_OK && c->slot >= 0) {
        c->step = step;
        *from = "snapshot";
        return PML_OK;
    }
    if (status == PML_OK)
        status = resume_choose_newest(c, err);
    *from = c->checkpoint[0] != '\0' ? "checkpoint" : "start";
    return status;
}

static void say(coordinator *c, const char *from)
{
    char reason[1400];
    log_restart(c, from);
    snprintf(reason, sizeof reason, "%s; restart %lld of %lld, from the %s of step %lld",
             c->recovery.reason, (long long)c->restarts, (long long)pml_run_max_restarts(c->run),
             from, (long long)c->step);
    begin_state(c, reason);
}

/* Where it goes on was chosen when it went on first, and nothing has happened since. */
static pml_status choose_and_say(coordinator *c, pml_error *err)
{
    const char *from;
    if (c->recovery.waits)
        return PML_OK;
    pml_status status = choose(c, &from, err);
    if (status != PML_OK)
        return status;
    c->timeline++;
    say(c, from);
    return PML_OK;
}

static void start_again(coordinator *c)
{
    pml_error err = PML_ERROR_INIT;
    workers_forget(c);
    c->failure = (failure){0}; /* of those that are gone */
    pml_status status = choose_and_say(c, &err);
    if (recover_reads_again(c, status, &err)) {
        c->recovery.at = c->rereading.at;
        return;
    }
    recover_has_read(c);
    c->recovery.under_way = false;
    if (status == PML_OK)
        status = begin_work(c, &err);
    if (status != PML_OK)
        fail_later(c, status, -1, err.message);
}

/* What is lost while a restart waits has not come further: it is made once more, not one more. */
void recover_lost_coordinator(coordinator *c)
{
    const char *reason = c->waited ? "the coordinator was lost while the run waited for memory, "
                                     "which is not counted"
                                   : "the coordinator was lost";
    int64_t most = pml_run_max_restarts(c->run);
    recovery *r = &c->recovery;
    if (c->restarts >= most && !c->waited) {
        char text[200];
        snprintf(text, sizeof text,
                 "%s, and the run has gone on by itself %lld times already "
                 "(max_restarts)",
                 reason, (long long)c->restarts);
        c->timeline++;
        fail_later(c, PML_INTERNAL, -1, text);
        return;
    }
    c->restarts += !c->waited;
    *r = (recovery){.under_way = true, .cause = "coordinator", .rank = -1, .delay = delay_now(c)};
    r->at = pml_clock_monotonic() + r->delay;
    snprintf(r->reason, sizeof r->reason, "%s", reason);
}

/* ---- when it is time ---- */

void recover_tick(coordinator *c, double now)
{
    watch_tick(c, now);
    if (c->hurry_at > 0 && now - c->hurry_at > hurry_seconds && !run_is_over(c))
        stop_by_force(c, "a second signal asked for the end at once");
    const recovery *r = &c->recovery;
    if (stops_waiting(c))
        return;
    if (r->under_way && !c->ending && workers_gone(c) && now >= r->at)
        start_again(c);
}

/* ---- from the log ---- */

/* How often it went on by itself since somebody started or resumed it. */
void recover_recover(coordinator *c, const pml_message *event)
{
    if (pml_message_type_of(event) == PML_EVENT_restart) {
        int64_t step = pml_message_int(event, "step");
        c->futile = step > c->furthest ? 0 : c->futile + 1;
        c->furthest = step > c->furthest ? step : c->furthest;
        c->restarts = pml_message_int(event, "attempt");
    } else if (pml_message_type_of(event) == PML_EVENT_state) {
        c->waited = pml_message_bool(event, "waits");
        if (strcmp(pml_message_string(event, "state"), "starting") == 0 &&
            pml_message_int(event, "timeline") != c->restarted_in)
            c->restarts = 0;
    }
}
