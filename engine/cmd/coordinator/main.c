/* pml-coordinator RUNDIR [--resume [step-000412]] [--recover] [--accept-changes] [--ready-fd N]
 *                 [-- PREPARE ARG…]
 *
 * Owns one run: its log, its commands, its workers, its viewers. Says on the ready descriptor "0"
 * when its sockets are there, or the code and words of the error that kept it from starting; and a
 * "+" now and then before that while it comes on. */
#include "coordinator.h"

#include <errno.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/log.h"
#include "pml/base/path.h"

enum {
    GRACE_SECONDS = 15,
    END_SECONDS = 120,
    KILL_SECONDS = 5,
    HURRY_SECONDS = 2,
    TRIM_SECONDS = 10,
    HELD_BYTES = 16 << 20
};

static const double sign_seconds = 0.2; /* between two signs of life while we start */

const char *const run_state_names[] = {
    [RUN_STARTING] = "starting", [RUN_RUNNING] = "running", [RUN_PAUSED] = "paused",
    [RUN_FINISHED] = "finished", [RUN_STOPPED] = "stopped", [RUN_FAILED] = "failed",
};

bool run_is_over(const coordinator *c)
{
    return c->state == RUN_FINISHED || c->state == RUN_STOPPED || c->state == RUN_FAILED;
}

/* ---- events ---- */

void emit(coordinator *c, pml_message *event, bool durable)
{
    pml_error err = PML_ERROR_INIT;
    if (!c->broken && eventlog_append(c->log, event, c->timeline, durable, &err) != PML_OK) {
        pml_log(PML_LOG_ERROR, "%s", err.message);
        /* A message that was built wrong is a fault of ours, but no reason to end. */
        if (err.code != PML_INTERNAL && err.code != PML_INVALID)
            c->broken = err.code;
    } else if (!c->broken) {
        resume_recover(c, event);
    }
    pml_message_destroy(&event);
    if (c->trouble[0] == '\0') /* else it is tried again in its time */
        journal_write(c);
}

void emit_log(coordinator *c, const char *level, int rank, const char *format, ...)
{
    char text[1200];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    pml_message *event = pml_message_new(PML_EVENT_log);
    pml_message_set_string(event, "level", level);
    pml_message_set_string(event, "message", text);
    if (rank >= 0)
        pml_message_set_int(event, "rank", rank);
    emit(c, event, false);
}

static void emit_state(coordinator *c, pml_status code, int rank)
{
    pml_message *event = pml_message_new(PML_EVENT_state);
    pml_message_set_string(event, "state", run_state_names[c->state]);
    pml_message_set_int(event, "step", c->step);
    if (c->reason[0] != '\0')
        pml_message_set_string(event, "reason", c->reason);
    if (code != PML_OK)
        pml_message_set_string(event, "code", pml_status_name(code));
    if (rank >= 0)
        pml_message_set_int(event, "rank", rank);
    if (c->state == RUN_STARTING && c->checkpoint[0] != '\0') {
        pml_message_set_string(event, "checkpoint", c->checkpoint);
        if (c->named)
            pml_message_set_bool(event, "rewound", true);
        c->named = false; /* said once */
    }
    if (c->state == RUN_STARTING && c->recovery.waits)
        pml_message_set_bool(event, "waits", true);
    emit(c, event, true);
}

void set_state(coordinator *c, run_state state, pml_status code, int rank, const char *reason)
{
    if (c->state == state)
        return;
    c->state = state;
    c->state_since = pml_clock_monotonic();
    snprintf(c->reason, sizeof c->reason, "%s", reason);
    emit_state(c, code, rank);
}

void begin_state(coordinator *c, const char *reason)
{
    c->state = RUN_STARTING;
    c->state_since = pml_clock_monotonic();
    snprintf(c->reason, sizeof c->reason, "%s", reason);
    emit_state(c, PML_OK, -1);
}

static void heartbeat(coordinator *c)
{
    pml_message *m = pml_message_new(PML_SIGNAL_heartbeat);
    pml_message_set_number(m, "time", pml_clock_unix());
    pml_message_set_string(m, "state", run_state_names[c->state]);
    if (c->trouble[0] != '\0')
        pml_message_set_string(m, "trouble", c->trouble);
    pml_message_set_int(m, "step", c->step);
    pml_message_set_int(m, "last", eventlog_last(c->log));
    pml_message_set_empty(m, "workers");
    for (int r = 0; r < c->world; r++) {
        const worker *w = &c->workers[r];
        if (w->pid == 0 || w->beat_at == 0)
            continue;
        pml_message *usage = pml_message_new(PML_RECORD_usage);
        pml_message_set_int(usage, "rank", r);
        pml_message_set_int(usage, "rss", w->rss);
        pml_message_set_number(usage, "cpu", w->cpu);
        if (w->gpu != NULL && r < GPUS_TOLD)
            pml_message_set_part(usage, "gpu", pml_message_copy(w->gpu));
        pml_message_append(m, "workers", usage);
    }
    char *text;
    size_t size;
    pml_error err = PML_ERROR_INIT;
    if (pml_message_print(m, &text, &size, &err) != PML_OK ||
        pml_hub_publish(c->hub, text, size, &err) != PML_OK)
        pml_log(PML_LOG_WARNING, "heartbeat: %s", err.message);
    free(text);
    pml_message_destroy(&m);
}

/* What a loop that is busy elsewhere owes the others: whoever started us waits for as long as there
 * is a sign of life, and viewers take a run without a heartbeat for gone. */
void keep_in_touch(coordinator *c)
{
    char words[400];
    double now = pml_clock_monotonic();
    if (c->ready_fd >= 0 && now - c->touched_at >= sign_seconds) {
        c->touched_at = now;
        ssize_t ignored = write(c->ready_fd, "+", 1); /* say_ready tells that nobody listens */
        (void)ignored;
    }
    if (c->hub != NULL && now - c->beat_at >= 1) {
        c->beat_at = now;
        heartbeat(c);
    }
    if (c->hub == NULL || !resume_is_checking(c, words, sizeof words) ||
        pml_hub_wait(c->hub, NULL, 0, 0, NULL) != PML_OK)
        return;
    for (pml_inbound *in; pml_hub_receive(c->hub, &in, NULL) == PML_OK; free(in))
        if (in->door != PML_DOOR_WORKER) /* nobody works for us yet, or any more */
            handle_request(c, in);
}

/* ---- the loop ---- */

static void begin_end(coordinator *c)
{
    if (c->ending && c->ending_since > 0)
        return;
    c->ending = true;
    c->ending_since = pml_clock_monotonic();
    workers_release(c);
    if (c->prepare > 0)
        kill(c->prepare, SIGTERM);
}

/* SIGTERM: as a stop command, and no grace afterwards. */
static void leave(coordinator *c)
{
    c->leaving = true;
    if (run_is_over(c)) {
        begin_end(c);
        return;
    }
    char id[64];
    snprintf(id, sizeof id, "signal-%d-%.0f", (int)getpid(), pml_clock_unix() * 1e6);
    pml_message *stop = pml_message_new(PML_REQUEST_stop);
    pml_message_set_string(stop, "id", id);
    int64_t number;
    pml_error err = PML_ERROR_INIT;
    pml_status status = stop == NULL ? PML_FAIL(&err, PML_NO_MEMORY, "no memory for the command")
                                     : command_accept(c, stop, &number, &err);
    if (status != PML_OK) {
        pml_log(PML_LOG_ERROR, "cannot stop in order: %s", err.message);
        begin_end(c);
    }
    pml_message_destroy(&stop);
}

static void reap(coordinator *c)
{
    int status;
    for (pid_t pid = waitpid(-1, &status, WNOHANG); pid > 0; pid = waitpid(-1, &status, WNOHANG)) {
        if (pid == c->prepare)
            prepare_ended(c, status);
        for (int r = 0; r < c->world; r++)
            if (c->workers[r].pid == pid)
                worker_ended(c, &c->workers[r], status);
    }
}

static void take_signals(coordinator *c)
{
    struct signalfd_siginfo info;
    while (read(c->signals, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGCHLD)
            reap(c);
        else if (!c->leaving)
            leave(c);
        else if (c->hurry_at == 0)
            c->hurry_at = pml_clock_monotonic();
    }
}

static void take_messages(coordinator *c)
{
    pml_inbound *in;
    pml_error err = PML_ERROR_INIT;
    pml_status status;
    while ((status = pml_hub_receive(c->hub, &in, &err)) == PML_OK) {
        if (in->door == PML_DOOR_WORKER)
            handle_report(c, in);
        else
            handle_request(c, in);
        free(in);
    }
    if (status != PML_TIMEOUT)
        pml_log(PML_LOG_ERROR, "%s", err.message);
    workers_acknowledge(c);
}

/* A finished run serves as long as a viewer is there; one that has stopped or failed has nothing to
 * serve, and waits only for those that are still asking. */
static void end_in_time(coordinator *c, double now)
{
    if (!run_is_over(c) || c->ending || journal_keeps_us(c, now))
        return;
    bool serving = c->state == RUN_FINISHED && !workers_gone(c);
    double last = serving ? c->last_alive : c->last_request;
    last = c->state_since > last ? c->state_since : last;
    if (c->leaving || now - last >= c->grace)
        begin_end(c);
}

static void take_up_and_begin(coordinator *c);

static void tick(coordinator *c)
{
    double now = pml_clock_monotonic();
    if (c->waiting && now >= c->rereading.at)
        take_up_and_begin(c);
    recover_tick(c, now);
    for (int r = 0; r < c->world && c->failure.seen; r++) /* it may be a consequence */
        hear_last_word(c, &c->workers[r]);
    if (fail_is_decided(c))
        fail_now(c);
    if (c->broken)
        begin_end(c);
    sharing_tick(c, now);
    upkeep_tick(c, now);
    journal_tick(c, now);
    workers_use_memory(c, now);
    if (now - c->beat_at >= 1) {
        c->beat_at = now;
        heartbeat(c);
    }
    if (now - c->trimmed_at >= TRIM_SECONDS) {
        c->trimmed_at = now;
        malloc_trim(0); /* a burst leaves holes between what stays, and the heap would keep them */
    }
    if (run_is_over(c) && workers_gone(c)) { /* nobody is left to carry them out */
        commands_refuse_open(c, "the run has ended");
        workers_give_memory_back(c);
    }
    end_in_time(c, now);
    if (c->ending && c->ending_since == 0)
        begin_end(c);
    double ending = c->ending ? now - c->ending_since : 0;
    if (ending > (c->hurry_at > 0 ? HURRY_SECONDS : END_SECONDS))
        workers_kill(c, SIGKILL);
    if (ending > KILL_SECONDS && c->prepare > 0)
        kill(c->prepare, SIGKILL);
}

static void loop(coordinator *c)
{
    while (!(c->ending && workers_gone(c) && c->prepare == 0)) {
        struct pollfd more[2] = {{c->signals, POLLIN, 0}, {c->prepare_out, POLLIN, 0}};
        pml_error err = PML_ERROR_INIT;
        int wait = c->failure.seen || c->ending || c->trouble[0] != '\0' ? 50 : 200;
        if (pml_hub_wait(c->hub, more, c->prepare_out >= 0 ? 2 : 1, wait, &err) != PML_OK) {
            pml_log(PML_LOG_ERROR, "%s", err.message);
            c->broken = err.code;
        }
        take_messages(c);
        if (more[1].revents != 0)
            prepare_read(c);
        if (more[0].revents != 0)
            take_signals(c);
        tick(c);
    }
}

/* ---- the beginning ---- */

/* One that cannot be looked at is not gone: the worker that loads it says what is the matter. */
static bool shard_is_there(const coordinator *c, const char *field)
{
    char path[PATH_MAX];
    const char *name = pml_message_string(c->run, field);
    return name[0] == '\0' || (pml_path_join(path, sizeof path, c->folder, name, NULL) == PML_OK &&
                               (access(path, R_OK) == 0 || (errno != ENOENT && errno != ENOTDIR)));
}

/* Shards that are there are whole, and nothing needs to be run. What is run comes from whoever
 * starts us, never from the run folder, which may be from somebody else. */
static bool must_prepare(const coordinator *c)
{
    return c->prepare_argv != NULL &&
           !(shard_is_there(c, "train_data") && shard_is_there(c, "eval_data"));
}

pml_status begin_work(coordinator *c, pml_error *err)
{
    return must_prepare(c) ? prepare_start(c, err) : workers_start(c, err);
}

static void begin_run(coordinator *c)
{
    char reason[64];
    pml_error err = PML_ERROR_INIT;
    if (c->recover) {
        recover_lost_coordinator(c);
        return;
    }
    snprintf(reason, sizeof reason, must_prepare(c) ? "preparing the data" : "starting %d worker%s",
             c->world, c->world == 1 ? "" : "s");
    begin_state(c, reason);
    pml_status status = begin_work(c, &err);
    if (status != PML_OK)
        fail_later(c, status, -1, err.message);
}

/* What a person's resume cannot read it is told at once; but that there were workers has been seen
 * before, and whoever asked has heard it. */
static void take_up_and_begin(coordinator *c)
{
    bool over;
    pml_error err = PML_ERROR_INIT;
    pml_status status = handover_tick(c, &over, &err);
    if (status == PML_OK && !over)
        return;
    if (run_is_over(c)) { /* somebody did not want to wait */
        c->waiting = false;
        return;
    }
    bool again = c->recover || status != PML_OK;
    if (status == PML_OK)
        status = take_up(c, &err);
    c->waiting = again && recover_reads_again(c, status, &err);
    if (c->waiting)
        return;
    recover_has_read(c);
    if (status == PML_OK)
        begin_run(c);
    else
        fail_later(c, status, -1, err.message);
}

static void start_run(coordinator *c)
{
    c->state = RUN_STARTING;
    c->state_since = c->last_request = c->last_alive = pml_clock_monotonic();
    snprintf(c->reason, sizeof c->reason, HANDOVER_WORDS);
    if (!c->waiting)
        begin_run(c);
}

static void tear_down(coordinator *c)
{
    free(c->shared);
    commands_free(c);
    resume_free(c);
    if (c->workers != NULL)
        workers_free(c);
    pml_hub_destroy(&c->hub);
    eventlog_close(&c->log);
    pml_message_destroy(&c->run);
    if (c->signals >= 0)
        close(c->signals);
    pml_runtime_leave(c->runtime, &c->lock);
    pml_hold_destroy(&c->hold);
}

int main(int argc, char **argv)
{
    static coordinator c = {.lock = -1,
                            .ready_fd = -1,
                            .signals = -1,
                            .comm = -1,
                            .slots = -1,
                            .slot = -1,
                            .saved_step = -1,
                            .standing = {.verb = PML_MESSAGE_COUNT},
                            .restarted_in = -1,
                            .logged_in = -1,
                            .measured = -1,
                            .prepare_out = -1,
                            .next_number = 1,
                            .grace = GRACE_SECONDS,
                            .retry_seconds = 1,
                            .held_max = HELD_BYTES};
    pml_error err = PML_ERROR_INIT;
    pml_log_init("coordinator", PML_LOG_INFO);
    const char *grace = getenv("PML_GRACE_SECONDS");
    if (grace != NULL)
        c.grace = atof(grace);
    const char *retry = getenv("PML_RETRY_SECONDS");
    if (retry != NULL)
        c.retry_seconds = atof(retry);
    const char *held = getenv("PML_HELD_BYTES");
    if (held != NULL)
        c.held_max = strtoul(held, NULL, 10);
    umask(0077);
    /* Of our children: each would start as many threads of OpenBLAS as there are cores, which turn
     * for a tenth of a second before they sleep. Preparing multiplies nothing (it loads numpy), and
     * workers' threads are their own. */
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    pml_status status = parse_arguments(&c, argc, argv, &err);
    if (status == PML_OK)
        status = set_up(&c, &err);
    if (status == PML_OK) {
        say_ready(&c, NULL);
        pml_log(PML_LOG_INFO, "run %s, timeline %lld", c.folder, (long long)c.timeline);
        start_run(&c);
        loop(&c);
        journal_end(&c);
        pml_log(PML_LOG_INFO, "ends; the run is %s", run_state_names[c.state]);
    } else {
        pml_log(PML_LOG_ERROR, "%s", err.message);
    }
    tear_down(&c);
    if (status != PML_OK) /* only now: whoever hears it may try again, and needs the lock */
        say_ready(&c, &err);
    return status == PML_OK && !c.broken ? 0 : 1;
}
