/* After a coordinator died: its workers save and end, and leave behind what it did not live to log.
 *
 *   handover.jsonl: rank 0's reports that nobody had acknowledged, one line each, in their order
 *
 * A step is taken when it is beyond the log's last one, an evaluation and a checkpoint likewise,
 * the end of a command when the log has none: what was logged, though its reporter did not hear of
 * it, is in the log once. Answers to `sample` and `evaluate` are not taken: they may lack their
 * beginning. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"
#include "pml/train/run.h"

enum { HANDOVER_MAX = 256 << 20 };
static const double saving_hangs = 20; /* of the time that counts as a hang: saving is slow */

pml_status handover_workers(const coordinator *c, bool *there, pml_error *err)
{
    pml_status status = pml_runtime_workers(c->folder, err);
    *there = status == PML_OK;
    return status == PML_IO || status == PML_NO_MEMORY ? status : PML_OK;
}

/* The run goes on from the event's step: what was made and measured behind it will be again. */
static void go_back(coordinator *c, const pml_message *event)
{
    c->began_at = pml_message_int(event, "step");
    c->began_in = pml_message_int(event, "timeline");
    if (c->measured > c->began_at)
        c->measured = c->began_at;
}

/* The log's last step. Where its last timeline has none yet, it is where that begins: what the one
 * before had beyond it does not count any more. */
static int64_t last_step(const coordinator *c)
{
    return eventlog_step_timeline(c->log) < c->began_in ? c->began_at : eventlog_step(c->log);
}

void handover_recover(coordinator *c, const pml_message *event)
{
    switch (pml_message_type_of(event)) {
    case PML_EVENT_eval:
        if (!pml_message_has(event, "command"))
            c->measured = pml_message_int(event, "step");
        break;
    case PML_EVENT_state:
        if (strcmp(pml_message_string(event, "state"), "starting") == 0)
            go_back(c, event);
        break;
    case PML_EVENT_restart:
        go_back(c, event);
        break;
    default:
        break;
    }
}

/* Who asked for one waits for the event with that command, also where the checkpoint was there. */
static bool is_new_checkpoint(const coordinator *c, const pml_message *event, bool asked)
{
    int64_t command = asked ? pml_message_int(event, "command") : 0;
    return asked ? command > c->saved_for || owed_has(c, command)
                 : !resume_is_saved(c, pml_message_int(event, "step"));
}

static bool take_event(coordinator *c, pml_message *event)
{
    pml_message_type type = pml_message_type_of(event);
    bool asked = pml_message_has(event, "command");
    int64_t step = pml_message_int(event, "step");
    bool taken = (type == PML_EVENT_step && step > c->step) ||
                 (type == PML_EVENT_eval && !asked && step > c->measured) ||
                 (type == PML_EVENT_checkpoint && is_new_checkpoint(c, event, asked));
    if (!taken) {
        pml_message_destroy(&event);
        return false;
    }
    if (type == PML_EVENT_step)
        c->step = step;
    if (type == PML_EVENT_eval)
        c->measured = step;
    emit(c, event, type == PML_EVENT_checkpoint); /* the log's reader counts on that */
    return true;
}

static bool take_report(coordinator *c, const pml_message *m)
{
    int64_t number = pml_message_int(m, "command"), step = pml_message_int(m, "step");
    switch (pml_message_type_of(m)) {
    case PML_REPORT_report:
        return take_event(c, pml_message_part(m, "event", 0));
    case PML_REPORT_applied:
        commands_hand_over(c, number, step, NULL);
        return true;
    case PML_REPORT_refused:
        commands_hand_over(c, number, step, pml_message_string(m, "reason"));
        return true;
    default:
        return false;
    }
}

/* Where memory is missing the rest stays for the next try, which begins behind what was taken. */
static pml_status take_lines(coordinator *c, char *text, pml_error *err)
{
    size_t taken = 0, n = 0;
    for (char *line = strsep(&text, "\n"); line != NULL; line = strsep(&text, "\n")) {
        pml_message *m;
        pml_error why = PML_ERROR_INIT;
        if (n++ < c->handed_over)
            continue;
        pml_status status =
            line[0] == '\0' ? PML_OK
                            : pml_message_parse(PML_CHANNEL_REPORT, line, strlen(line), &m, &why);
        if (status == PML_NO_MEMORY) {
            *err = why;
            return pml_error_prefix(err, "handover.jsonl");
        }
        c->handed_over = n;
        if (status != PML_OK)
            emit_log(c, "warning", -1, "handover.jsonl: %s", why.message);
        if (status != PML_OK || line[0] == '\0')
            continue;
        taken += take_report(c, m);
        pml_message_destroy(&m);
    }
    pml_log(PML_LOG_INFO, "%zu reports of the coordinator before are in the log now", taken);
    return PML_OK;
}

static int is_half(const struct dirent *entry)
{
    return strncmp(entry->d_name, "handover.jsonl.tmp-", strlen("handover.jsonl.tmp-")) == 0;
}

/* What a rank 0 left that was killed while it wrote: all workers of before are gone by now. */
static void remove_halves(const coordinator *c)
{
    pml_error why = PML_ERROR_INIT;
    if (pml_folder_clear(c->folder, is_half, &why) != PML_OK) /* it costs room, and nothing else */
        pml_log(PML_LOG_WARNING, "half a handover stays: %s", why.message);
}

pml_status handover_take(coordinator *c, pml_error *err)
{
    char path[PATH_MAX], *text;
    size_t size;
    pml_status status = pml_path_join(path, sizeof path, c->folder, "handover.jsonl", err);
    if (status != PML_OK)
        return status;
    c->step = last_step(c);
    remove_halves(c);
    status = pml_file_read(path, HANDOVER_MAX, false, &text, &size, err);
    if (status == PML_OK) {
        status = take_lines(c, text, err);
        free(text);
    }
    if (status != PML_OK && status != PML_NOT_FOUND)
        return status;
    commands_refuse_lost(c);
    if (status == PML_NOT_FOUND)
        return PML_OK;
    status = eventlog_sync(c->log, err); /* before the only other copy goes */
    if (status == PML_OK)
        status = pml_tree_remove(c->folder, "handover.jsonl", err);
    /* If it came back after a power cut, its checkpoints would be the log's newest once more. */
    return status == PML_OK ? pml_folder_sync(c->folder, err) : status;
}

static void kill_them(coordinator *c, double seconds, const char *what)
{
    char program[PATH_MAX];
    pml_error err = PML_ERROR_INIT;
    pml_status status = workers_program(program, sizeof program, &err);
    if (status == PML_OK)
        status = pml_runtime_workers_kill(c->folder, program, &err);
    emit_log(c, "warning", -1, "workers of the coordinator before %s for %.0f s: %s", what, seconds,
             status == PML_OK ? "killed" : err.message);
    c->waiting_since = c->moving_at = c->attended;
}

/* What is told while we wait names a step, which the next coordinator believes. */
static void say_saving(coordinator *c)
{
    c->step = last_step(c);
    if (c->rereading.tries > 0) /* that has been told, and is over */
        begin_state(c, HANDOVER_WORDS);
    recover_has_read(c);
}

/* As long as saving may take; then whoever is there hangs, and nobody else can end it. One that is
 * stopped does not save, and counts as silent. There is a bound also where nothing counts as a
 * hang. */
pml_status handover_tick(coordinator *c, bool *over, pml_error *err)
{
    bool there;
    double hang = pml_run_hang_timeout(c->run);
    double silence = hang > 0 ? hang : PML_RUN_HANG_TIMEOUT;
    pml_status status = handover_workers(c, &there, err);
    *over = status == PML_OK && !there;
    if (*over)
        return PML_OK;
    if (status != PML_OK) {
        c->step = last_step(c);
        return status;
    }
    say_saving(c);
    if (!pml_runtime_workers_stopped(c->folder))
        c->moving_at = c->attended;
    if (watch_since(c, c->moving_at) > silence)
        kill_them(c, silence, "were stopped");
    else if (watch_since(c, c->waiting_since) > saving_hangs * silence)
        kill_them(c, saving_hangs * silence, "have not ended");
    return PML_OK;
}
