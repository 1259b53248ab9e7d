/* Events on their way to the log and to the viewers, also while the disk does not take them.
 *
 * What is not in the log does not exist: it is not published and not replayed. It waits in memory,
 * in order; heartbeat and welcome say why (`trouble`), and the commands that people send are taken
 * and carried out meanwhile. When more than `held_max` bytes wait, the run is paused (a command of
 * ours, in the one order as all are), and goes on by itself when there is room. Beyond twice that,
 * commands of others are refused, save stop. */
#include <stdio.h>
#include <string.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/log.h"

enum { STAY_SECONDS = 3600 }; /* a run that is over waits for room in its log so long */

static void publish_all(coordinator *c)
{
    const char *text;
    size_t size;
    while (eventlog_next(c->log, &text, &size)) {
        pml_error err = PML_ERROR_INIT;
        if (c->hub != NULL && pml_hub_publish(c->hub, text, size, &err) != PML_OK)
            pml_log(PML_LOG_ERROR, "cannot publish: %s", err.message);
    }
}

static void begin_trouble(coordinator *c, const pml_error *err, double now)
{
    size_t bytes;
    size_t lines = eventlog_waiting(c->log, &bytes);
    bool new = c->trouble[0] == '\0';
    snprintf(c->trouble, sizeof c->trouble,
             "%s; %zu events wait in memory: make room or mend the disk, the run goes on and they "
             "will be written",
             err->message, lines);
    if (new) {
        c->trouble_since = now;
        pml_log(PML_LOG_ERROR, "%s", c->trouble);
        snprintf(c->trouble_cause, sizeof c->trouble_cause, "%s", err->message);
        c->trouble_lines = 0;
    }
    if (lines > c->trouble_lines)
        c->trouble_lines = lines;
}

static void end_trouble(coordinator *c, double now)
{
    c->trouble[0] = '\0';
    emit_log(c, "warning", -1,
             "%s: for %.1f s; up to %zu events waited in memory and are in the log now",
             c->trouble_cause, now - c->trouble_since, c->trouble_lines);
}

void journal_write(coordinator *c)
{
    pml_error err = PML_ERROR_INIT;
    double now = pml_clock_monotonic();
    c->trouble_tried = now;
    pml_status status = eventlog_flush(c->log, &err);
    publish_all(c);
    if (status != PML_OK)
        begin_trouble(c, &err, now);
    else if (c->trouble[0] != '\0')
        end_trouble(c, now);
}

/* ---- when too much waits ---- */

static int64_t ask_myself(coordinator *c, pml_message_type verb)
{
    char id[65];
    snprintf(id, sizeof id, "log-%s-%lld-%.0f", pml_message_name(verb), (long long)c->timeline,
             pml_clock_monotonic() * 1e6);
    pml_message *request = pml_message_new(verb);
    pml_message_set_string(request, "id", id);
    int64_t number = 0;
    pml_error err = PML_ERROR_INIT;
    c->asks_itself = true; /* more than twice what may wait can have come at once */
    if (command_accept(c, request, &number, &err) != PML_OK)
        pml_log(PML_LOG_ERROR, "cannot %s: %s", pml_message_name(verb), err.message);
    c->asks_itself = false;
    pml_message_destroy(&request);
    return number;
}

/* Nobody else has said since whether the run shall stand. */
static bool still_our_pause(const coordinator *c)
{
    for (size_t i = (size_t)c->held_pause; i < c->n_commands; i++)
        if (c->commands[i].verb == PML_REQUEST_pause || c->commands[i].verb == PML_REQUEST_resume)
            return false;
    return true;
}

static void hold_or_let_go(coordinator *c)
{
    size_t bytes;
    eventlog_waiting(c->log, &bytes);
    if (bytes > c->held_max && c->state == RUN_RUNNING && c->held_pause == 0) {
        pml_log(PML_LOG_ERROR, "%zu bytes of events wait in memory: the run is paused", bytes);
        c->held_pause = ask_myself(c, PML_REQUEST_pause);
    } else if (c->trouble[0] == '\0' && c->held_pause > 0 && c->state == RUN_PAUSED) {
        if (still_our_pause(c)) {
            emit_log(c, "info", -1, "the log can be written again: the run goes on");
            ask_myself(c, PML_REQUEST_resume);
        }
        c->held_pause = 0;
    }
}

bool journal_is_full(const coordinator *c)
{
    size_t bytes;
    eventlog_waiting(c->log, &bytes);
    return bytes > 2 * c->held_max;
}

bool journal_keeps_us(const coordinator *c, double now)
{
    return c->trouble[0] != '\0' && !c->leaving && now - c->trouble_since < STAY_SECONDS;
}

void journal_tick(coordinator *c, double now)
{
    if (c->trouble[0] != '\0' && now - c->trouble_tried >= c->retry_seconds)
        journal_write(c);
    hold_or_let_go(c);
    resume_write_run_again(c, now);
}

void journal_end(coordinator *c)
{
    size_t bytes;
    if (c->log == NULL)
        return;
    if (c->trouble[0] != '\0')
        journal_write(c);
    size_t lines = eventlog_waiting(c->log, &bytes);
    if (lines > 0)
        pml_log(PML_LOG_ERROR, "the last %zu events never came into the log: %s", lines,
                c->trouble);
}
