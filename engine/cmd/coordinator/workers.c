/* Workers: starting them, orders to them, and how they end. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"
#include "pml/dist/comm.h"
#include "pml/net/reserve.h"
#include "pml/train/run.h"
#include "pml/train/slots.h"
#include "spawn.h"

/* What workers said before may arrive after an end; by the clock of watch.c and longer than one
 * round counts, so that we have listened since. */
static const double better_cause_seconds = 0.5;
static const double touch_seconds = 3600;    /* cleaners of /tmp go by days */
static const double last_words_seconds = 10; /* of one that is there, after a failure */

void worker_set_state(worker *w, const char *state)
{
    snprintf(w->state, sizeof w->state, "%s", state);
}

pml_message *worker_record(const worker *w)
{
    pml_message *m = pml_message_new(PML_RECORD_worker);
    pml_message_set_int(m, "rank", w->rank);
    pml_message_set_string(m, "device", w->device);
    pml_message_set_int(m, "pid", w->pid);
    pml_message_set_string(m, "state", w->state);
    return m;
}

void workers_publish(coordinator *c)
{
    pml_message *event = pml_message_new(PML_EVENT_workers);
    pml_message_set_empty(event, "workers");
    for (int r = 0; r < c->world; r++)
        pml_message_append(event, "workers", worker_record(&c->workers[r]));
    emit(c, event, false);
}

/* ---- starting ---- */

static pml_status our_program(char *path, size_t capacity, pml_error *err)
{
    ssize_t n = readlink("/proc/self/exe", path, capacity - 1);
    if (n < 0)
        return PML_FAIL(err, PML_IO, "cannot find our own program: %s", strerror(errno));
    path[n] = '\0';
    return PML_OK;
}

/* $PML_WORKER, else pml-worker beside our own program. */
pml_status workers_program(char *path, size_t capacity, pml_error *err)
{
    const char *wish = getenv("PML_WORKER");
    if (wish != NULL) {
        snprintf(path, capacity, "%s", wish);
        return PML_OK;
    }
    char self[PATH_MAX], folder[PATH_MAX];
    pml_status status = our_program(self, sizeof self, err);
    if (status == PML_OK)
        status = pml_path_folder(folder, sizeof folder, self, err);
    return status == PML_OK ? pml_path_join(path, capacity, folder, "pml-worker", err) : status;
}

/* The secrets travel over the lease, never in argv or the environment. */
static pml_status send_start(coordinator *c, worker *w, pml_error *err)
{
    char checkpoint[PATH_MAX] = "", self[PATH_MAX] = "", folder[PATH_MAX];
    pml_status status = pml_run_restarts(c->run) ? our_program(self, sizeof self, err) : PML_OK;
    if (status == PML_OK)
        status = pml_hold_where(c->folder, folder, sizeof folder, err);
    if (status == PML_OK && c->checkpoint[0] != '\0')
        status = pml_path_join(checkpoint, sizeof checkpoint, folder, c->checkpoint, err);
    if (status != PML_OK)
        return status;
    pml_message *m = pml_message_new(PML_ORDER_start);
    pml_message_set_string(m, "folder", folder);
    pml_message_set_int(m, "rank", w->rank);
    pml_message_set_int(m, "world", c->recovery.saves ? 1 : c->world);
    pml_message_set_string(m, "device", w->device);
    pml_message_set_int(m, "share", c->world); /* all are CPU workers in this version */
    pml_message_set_string(m, "endpoint", pml_hub_endpoint(c->hub, PML_DOOR_WORKER));
    pml_message_set_string(m, "server_key", pml_hub_server_key(c->hub));
    pml_message_set_string(m, "public_key", w->keys.public_key);
    pml_message_set_string(m, "secret_key", w->keys.secret_key);
    pml_message_set_string(m, "checkpoint", checkpoint);
    pml_message_set_int(m, "slot", c->slot);
    if (c->slot >= 0 && resume_is_saved(c, c->step))
        pml_message_set_bool(m, "saved", true);
    if (c->recovery.saves)
        pml_message_set_bool(m, "save", true);
    pml_message_set_int(m, "timeline", c->timeline);
    pml_message_set_string(m, "coordinator", self);
    char *text;
    size_t size;
    status = pml_message_print(m, &text, &size, err);
    if (status == PML_OK && send(w->lease, text, size, MSG_NOSIGNAL) != (ssize_t)size)
        status = PML_FAIL(err, PML_IO, "cannot tell worker %d how to start: %s", w->rank,
                          strerror(errno));
    free(text);
    pml_message_destroy(&m);
    return status;
}

static pml_status start_one(coordinator *c, worker *w, const char *program, pml_error *err)
{
    char log_path[PATH_MAX], name[32];
    int pair[2], lock = -1;
    snprintf(name, sizeof name, "log/worker-%d.log", w->rank);
    pml_status status = pml_path_join(log_path, sizeof log_path, c->folder, name, err);
    if (status == PML_OK)
        status = pml_keypair_new(&w->keys, err);
    if (status == PML_OK)
        status = pml_hub_allow(c->hub, w->keys.public_key, PML_ROLE_WORKER, w->rank, err);
    if (status == PML_OK)
        status = pml_runtime_worker_lock(c->folder, w->rank, &lock, err);
    if (status == PML_IO) { /* a full disk is no reason not to train */
        emit_log(c, "warning", w->rank,
                 "%s: should this coordinator die, the next one does not wait for this worker",
                 err->message);
        status = PML_OK;
    }
    if (status != PML_OK)
        return status;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) {
        if (lock >= 0)
            close(lock);
        return PML_FAIL(err, PML_IO, "cannot make a lease: %s", strerror(errno));
    }
    w->lease = pair[0];
    status = send_start(c, w, err);
    pml_keypair_forget(&w->keys);
    const char *argv[] = {program, NULL};
    spawn s = {.argv = argv,
               .log_path = log_path,
               .out = -1,
               .fds = {pair[1], c->comm >= 0 ? c->comm : SPAWN_NULL, c->slots,
                       lock >= 0 ? lock : SPAWN_NULL, w->reserved >= 0 ? w->reserved : SPAWN_NULL,
                       SPAWN_END}};
    if (status == PML_OK)
        status = spawn_process(&s, &w->pid, err);
    if (s.unlogged.code != PML_OK)
        emit_log(c, "warning", w->rank, "%s: what is said there is lost", s.unlogged.message);
    close(pair[1]);
    if (lock >= 0)
        close(lock); /* the worker's copy holds it */
    if (status != PML_OK)
        w->pid = 0;
    w->inherits = w->reserved >= 0;
    w->heard_at = c->attended;
    w->waits_for = -1;
    w->told_since = false;
    worker_set_state(w, status == PML_OK ? "starting" : "gone");
    return status;
}

pml_status workers_start(coordinator *c, pml_error *err)
{
    char program[PATH_MAX];
    commands_rewind(c);
    pml_status status = workers_program(program, sizeof program, err);
    if (status == PML_OK && c->slots < 0)
        status = pml_slots_create(&c->slots, err);
    if (status == PML_OK && c->world > 1)
        status = pml_comm_shared_create(c->world, &c->comm, err);
    for (int r = 0; r < c->world && status == PML_OK; r++)
        status = start_one(c, &c->workers[r], program, err);
    workers_publish(c);
    return status;
}

pml_status workers_save_left(coordinator *c, pml_error *err)
{
    char program[PATH_MAX];
    pml_status status = workers_program(program, sizeof program, err);
    if (status == PML_OK)
        status = start_one(c, &c->workers[0], program, err);
    workers_publish(c);
    return status;
}

/* ---- orders ---- */

static pml_status send_to(coordinator *c, worker *w, const pml_message *order, pml_error *err)
{
    char *text;
    size_t size;
    pml_status status = pml_message_print(order, &text, &size, err);
    if (status == PML_OK && w->joined && w->pid > 0)
        status = pml_hub_send(c->hub, PML_DOOR_WORKER, &w->peer, text, size, err);
    if (status != PML_OK)
        pml_log(PML_LOG_WARNING, "worker %d: %s", w->rank, err->message);
    free(text);
    return status;
}

bool worker_tell(coordinator *c, worker *w, const pml_message *word)
{
    pml_error err = PML_ERROR_INIT;
    return send_to(c, w, word, &err) == PML_OK;
}

void worker_order(coordinator *c, worker *w, const pml_message *order)
{
    char reason[1000];
    pml_error err = PML_ERROR_INIT;
    pml_status status = send_to(c, w, order, &err);
    if (status == PML_OK || status == PML_PEER) /* of one that is gone, its end tells more */
        return;
    snprintf(reason, sizeof reason, "worker %d could not be told what to do: %.900s", w->rank,
             err.message);
    fail_worker(c, w, "died", reason);
}

/* ---- ends ---- */

bool workers_gone(const coordinator *c)
{
    for (int r = 0; r < c->world; r++)
        if (c->workers[r].pid > 0)
            return false;
    return true;
}

void workers_kill(coordinator *c, int signal)
{
    if (c->comm >= 0)
        pml_comm_shared_abort(c->comm, NULL);
    for (int r = 0; r < c->world; r++) {
        c->workers[r].asked_to_end = true;
        if (c->workers[r].pid > 0)
            kill(c->workers[r].pid, signal);
    }
}

/* The word comes first: without it the end of a lease is our death. */
void workers_release(coordinator *c)
{
    static const char word[] = "{\"type\":\"release\"}";
    for (int r = 0; r < c->world; r++) {
        worker *w = &c->workers[r];
        w->asked_to_end = true;
        if (w->lease < 0)
            continue;
        if (send(w->lease, word, sizeof word - 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
            errno != EPIPE)
            pml_log(PML_LOG_WARNING, "worker %d: cannot say that we let go: %s", r,
                    strerror(errno));
        close(w->lease);
        w->lease = -1;
    }
}

/* The secret half went to the worker, and may have outlived it. */
static void shut_out(coordinator *c, const worker *w)
{
    pml_error err = PML_ERROR_INIT;
    const char *key = w->keys.public_key;
    if (key[0] != '\0' && pml_hub_knows(c->hub, key) && pml_hub_revoke(c->hub, key, &err) != PML_OK)
        pml_log(PML_LOG_ERROR, "worker %d: its key is not revoked: %s", w->rank, err.message);
}

/* A run that waits with a part of the memory that it needs could wait for one that waits for that
 * part. Who was refused has let go of it by itself, unless it was ended before. */
static void let_go(const coordinator *c, worker *w)
{
    if (w->reserved < 0 || w->inherits || !c->recovery.waits)
        return;
    close(w->reserved);
    w->reserved = -1;
}

void workers_forget(coordinator *c)
{
    for (int r = 0; r < c->world; r++) {
        worker *w = &c->workers[r];
        shut_out(c, w);
        hear_last_word(c, w); /* where it has passed us its memory, that is there */
        let_go(c, w);
        if (w->lease >= 0)
            close(w->lease);
        pml_message_destroy(&w->plan);
        pml_message_destroy(&w->identity);
        pml_message_destroy(&w->gpu);
        *w = (worker){.rank = r, .device = w->device, .lease = -1, .reserved = w->reserved};
        worker_set_state(w, "starting");
    }
    if (c->comm >= 0)
        close(c->comm);
    c->comm = -1;
}

void workers_give_memory_back(coordinator *c)
{
    for (int r = 0; r < c->world; r++) {
        worker *w = &c->workers[r];
        if (w->reserved >= 0)
            close(w->reserved);
        if (w->lease >= 0) /* where it may be still on its way */
            close(w->lease);
        w->reserved = w->lease = -1;
    }
}

void workers_use_memory(coordinator *c, double now)
{
    if (now < c->memory_used_at)
        return;
    c->memory_used_at = now + touch_seconds;
    for (int r = 0; r < c->world; r++)
        if (c->workers[r].reserved >= 0)
            pml_reservation_touch(c->workers[r].reserved);
}

/* The first of the weightiest counts. */
static void remember(coordinator *c, failure_weight weight, pml_status code, int rank,
                     const char *cause, const char *reason)
{
    failure *f = &c->failure;
    if (f->seen && weight <= f->weight)
        return;
    f->seen_at = c->attended;
    f->seen = true;
    f->crowded = false;
    f->weight = weight;
    f->code = code;
    f->rank = rank;
    snprintf(f->cause, sizeof f->cause, "%s", cause);
    snprintf(f->reason, sizeof f->reason, "%s", reason);
}

void fail_later(coordinator *c, pml_status code, int rank, const char *reason)
{
    if (c->state == RUN_FAILED || c->state == RUN_STOPPED)
        return;
    if (c->comm >= 0) /* nobody shall wait for one who does not come */
        pml_comm_shared_abort(c->comm, NULL);
    remember(c, code == PML_PEER ? FAILURE_CONSEQUENCE : FAILURE_CAUSE, code, rank, "", reason);
}

void fail_crowded(coordinator *c, pml_status code, const worker *w, const char *reason)
{
    failure *f = &c->failure;
    fail_later(c, code, w->rank, reason);
    if (f->seen && f->rank == w->rank && f->cause[0] == '\0')
        f->crowded = true;
}

static void lose(coordinator *c, failure_weight weight, const worker *w, const char *cause,
                 const char *reason)
{
    if (c->state == RUN_FAILED || c->state == RUN_STOPPED)
        return;
    if (c->comm >= 0)
        pml_comm_shared_abort(c->comm, NULL);
    remember(c, weight, PML_INTERNAL, w->rank, cause, reason);
}

void fail_worker(coordinator *c, const worker *w, const char *cause, const char *reason)
{
    hear_last_word(c, &c->workers[w->rank]); /* what it says itself comes first */
    lose(c, FAILURE_CAUSE, w, cause, reason);
}

/* Who fails has the others leave before it says why, so that they may be heard first: a consequence
 * waits for the word of each that is still there. One whose heart beats has had the time to speak;
 * one of which nothing is heard, stopped or starved, may do so as long as it is not called silent.
 */
bool fail_is_decided(const coordinator *c)
{
    const failure *f = &c->failure;
    double passed = watch_since(c, f->seen_at);
    if (!f->seen || passed < better_cause_seconds)
        return false;
    if (f->weight == FAILURE_CAUSE)
        return true;
    for (int r = 0; r < c->world; r++) {
        const worker *w = &c->workers[r];
        bool has_spoken = w->pid == 0 || strcmp(w->state, "failed") == 0;
        if (!has_spoken &&
            (passed < last_words_seconds || watch_may_speak(c, w, last_words_seconds)))
            return false;
    }
    return true;
}

static bool ended_well(const worker *w)
{
    return w->pid == 0 && w->exit_status == 0 &&
           (strcmp(w->state, "stopped") == 0 || strcmp(w->state, "finished") == 0);
}

void fail_now(coordinator *c)
{
    failure f = c->failure;
    c->failure.seen = false;
    if (f.rank >= 0 && ended_well(&c->workers[f.rank])) /* its word came after its end */
        return;
    if (recover_lost_saver(c, &f))
        return;
    if (recover_waits(c, &f)) {
        recover_wait(c, &f);
        return;
    }
    if (recover_wanted(c, &f) && recover_begin(c, &f))
        return;
    workers_kill(c, SIGKILL);
    if (c->prepare > 0)
        kill(c->prepare, SIGKILL);
    if (f.cause[0] != '\0' && c->restarts > 0) {
        size_t n = strlen(f.reason);
        snprintf(f.reason + n, sizeof f.reason - n, "; the run has gone on by itself %lld times",
                 (long long)c->restarts);
    }
    if (c->state == RUN_FINISHED) { /* what was trained is on disk: only the service ends */
        emit_log(c, "error", f.rank, "the workers of the finished run have ended: %s", f.reason);
        commands_refuse_open(c, f.reason);
        c->ending = true;
        return;
    }
    set_state(c, RUN_FAILED, f.code, f.rank, f.reason);
    commands_refuse_open(c, "the run has failed");
}

static void describe_end(const worker *w, int status, char *text, size_t capacity)
{
    if (WIFSIGNALED(status))
        snprintf(text, capacity, "worker %d (process %d) was killed by signal %d (%s)%s", w->rank,
                 (int)w->pid, WTERMSIG(status), strsignal(WTERMSIG(status)),
                 WTERMSIG(status) == SIGKILL ? ": perhaps out of memory, or by hand" : "");
    else
        snprintf(text, capacity,
                 "worker %d (process %d) ended with status %d; see log/worker-%d.log", w->rank,
                 (int)w->pid, WEXITSTATUS(status), w->rank);
}

void worker_ended(coordinator *c, worker *w, int status)
{
    char reason[256];
    describe_end(w, status, reason, sizeof reason);
    if (!w->asked_to_end)
        hear_last_word(c, w);
    bool failed = strcmp(w->state, "failed") == 0;
    w->pid = 0;
    w->exit_status = status;
    if (ended_well(w) || w->asked_to_end) {
        pml_log(PML_LOG_INFO, "%s", reason);
        return;
    }
    if (!failed && status != 0)
        worker_set_state(w, "gone");
    if (status == 0)
        remember(c, FAILURE_CAUSE, PML_INTERNAL, w->rank, "died", reason);
    else if (failed)
        fail_later(c, PML_PEER, w->rank, reason);
    else
        lose(c, WIFEXITED(status) ? FAILURE_WORDLESS : FAILURE_CAUSE, w, "died", reason);
}

void workers_free(coordinator *c)
{
    workers_give_memory_back(c);
    for (int r = 0; r < c->world; r++) {
        pml_message_destroy(&c->workers[r].plan);
        pml_message_destroy(&c->workers[r].identity);
        pml_message_destroy(&c->workers[r].gpu);
    }
    free(c->workers);
    if (c->comm >= 0)
        close(c->comm);
    if (c->slots >= 0)
        close(c->slots);
}
