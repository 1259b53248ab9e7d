#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "left.h"
#include "loop.h"
#include "pml/base/clock.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"
#include "pml/net/connection.h"
#include "pml/net/pass.h"
#include "pml/train/run.h"
#include "pml/train/slots.h"

static const double progress_seconds = 0.25;

typedef struct worker {
    pml_message *start, *run;
    worker_link *link;
    gpu_watch *gpu; /* NULL: the device is none */
    pml_comm *comm;
    job *j;
    job_facts facts;
    int rank, world;
    double progress_at;
} worker;

static pml_status read_start(worker *w, pml_error *err)
{
    static char text[PML_MESSAGE_MAX];
    for (int fd = LEASE_FD; fd <= RESERVED_FD; fd++)
        if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
            return PML_FAIL(err, PML_INVALID, "a worker is started by a coordinator, not by hand");
    ssize_t n = recv(LEASE_FD, text, sizeof text, 0);
    if (n <= 0)
        return PML_FAIL(err, PML_PEER, "the coordinator said nothing: %s",
                        n < 0 ? strerror(errno) : "it is gone");
    pml_status status = pml_message_parse(PML_CHANNEL_ORDER, text, (size_t)n, &w->start, err);
    explicit_bzero(text, (size_t)n); /* it holds our secret key */
    if (status == PML_OK && pml_message_type_of(w->start) != PML_ORDER_start)
        return PML_FAIL(err, PML_INVALID, "the coordinator's first word is not start");
    if (status == PML_OK) {
        w->rank = (int)pml_message_int(w->start, "rank");
        w->world = (int)pml_message_int(w->start, "world");
        pml_runtime_worker_sign(LOCK_FD, w->rank, NULL); /* without it we cannot be killed by it */
    }
    return status;
}

/* ---- what the coordinator hears before go ---- */

static void progress(void *user, const char *what, double fraction)
{
    worker *w = user;
    double now = pml_clock_monotonic();
    pulse_tick(link_pulse(w->link));
    if (w->rank != 0 || (now - w->progress_at < progress_seconds && fraction < 1))
        return;
    w->progress_at = now;
    pml_message *event = pml_message_new(PML_EVENT_progress);
    pml_message_set_string(event, "what", what);
    pml_message_set_number(event, "fraction", fraction < 0 ? 0 : fraction > 1 ? 1 : fraction);
    link_event(w->link, event);
}

static void tick(void *user)
{
    worker *w = user;
    pulse_tick(link_pulse(w->link));
}

static void move(void *user)
{
    worker *w = user;
    pulse_move(link_pulse(w->link));
}

static pml_message *plan_event(const job_facts *f)
{
    const pml_plan *p = &f->plan;
    pml_message *causes = pml_message_new(PML_RECORD_causes);
    size_t total = 0;
    for (int i = 0; i < PML_CAUSE_COUNT; i++) {
        pml_message_set_int(causes, pml_cause_name((pml_cause)i), (int64_t)p->by_cause[i]);
        total += p->by_cause[i];
    }
    pml_message *limits = pml_message_new(PML_RECORD_limits);
    pml_message_set_int(limits, "tokens", p->limits.tokens);
    pml_message_set_int(limits, "docs", p->limits.docs);
    pml_message_set_int(limits, "labels", p->limits.labels);
    pml_message_set_int(limits, "max_doc", p->limits.max_doc);
    pml_message_set_int(limits, "generate_length", p->limits.generate_length);
    pml_message *event = pml_message_new(PML_EVENT_plan);
    pml_message_set_part(event, "by_cause", causes);
    pml_message_set_int(event, "total", (int64_t)total);
    pml_message_set_int(event, "available", (int64_t)f->available);
    pml_message_set_string(event, "recompute",
                           pml_recompute_name((pml_recompute)p->choices.recompute));
    pml_message_set_int(event, "recompute_layers", p->choices.recompute_layers);
    pml_message_set_int(event, "head_chunk", p->choices.head_chunk);
    pml_message_set_int(event, "pieces", p->choices.pieces);
    if (p->choices.moments_8bit)
        pml_message_set_bool(event, "moments_8bit", true);
    if (p->choices.unpacked > 0)
        pml_message_set_int(event, "unpacked", p->choices.unpacked);
    if (p->choices.offload_layers > 0) {
        pml_message_set_string(event, "offload",
                               pml_recompute_name((pml_recompute)p->choices.offload));
        pml_message_set_int(event, "offload_layers", p->choices.offload_layers);
        pml_message_set_int(event, "host", (int64_t)p->host);
    }
    pml_message_set_part(event, "limits", limits);
    pml_message_set_int(event, "parameters", p->parameters);
    pml_message_set_int(event, "trainable", p->trainable);
    pml_message_set_int(event, "max_steps", f->max_steps);
    return event;
}

static void report_ready(worker *w)
{
    pml_message *m = pml_message_new(PML_REPORT_ready);
    pml_message_set_int(m, "step", w->facts.state.step);
    pml_message_set_int(m, "max_steps", w->facts.max_steps);
    pml_message_set_part(m, "plan", plan_event(&w->facts));
    pml_message_set_json(m, "identity", w->facts.state.identity);
    link_report(w->link, m);
}

static void warn(worker *w, const char *text)
{
    pml_message *event = pml_message_new(PML_EVENT_log);
    pml_message_set_string(event, "level", "warning");
    pml_message_set_string(event, "message", text);
    link_event(w->link, event);
}

/* The coordinator holds it for the worker that may have to replace us. */
static void keep(void *user, int descriptor)
{
    worker *w = user;
    char text[300];
    pml_error err = PML_ERROR_INIT;
    if (pml_pass_send(LEASE_FD, descriptor, &err) == PML_OK)
        return;
    snprintf(text, sizeof text,
             "should this worker die, its GPU's memory is free to all until it is replaced: %.200s",
             err.message);
    warn(w, text);
}

/* Rotary angles have no end, so transformers trains such rows too, and so do we. */
static void warn_of_long_rows(worker *w)
{
    const job_facts *f = &w->facts;
    if (w->rank != 0 || f->positions == 0 || f->plan.limits.max_doc <= f->positions)
        return;
    char text[224];
    snprintf(text, sizeof text,
             "rows of up to %d tokens (max_length=%d) are longer than the model's "
             "max_position_embeddings=%d: it has not been trained for the positions beyond",
             f->plan.limits.max_doc, f->max_length, f->positions);
    warn(w, text);
}

/* Whether its readings are there or not, training goes on. */
static pml_status watch_gpu(worker *w, pml_error *err)
{
    if (w->facts.bus[0] == '\0')
        return PML_OK;
    pml_status status =
        gpu_watch_new(w->rank, w->facts.bus, w->facts.uuid, w->facts.device, &w->gpu, err);
    if (status != PML_OK)
        return status;
    link_set_gpu(w->link, w->gpu);
    const char *trouble = gpu_watch_trouble(w->gpu);
    if (trouble[0] == '\0')
        return PML_OK;
    char text[1100];
    snprintf(text, sizeof text, "nothing is known of the GPU's load, temperature and power: %s",
             trouble);
    warn(w, text);
    return PML_OK;
}

static pml_message *failed(const worker *w, const pml_error *err)
{
    pml_message *m = pml_message_new(PML_REPORT_turn);
    pml_message_set_string(m, "state", "failed");
    pml_message_set_int(m, "step", w->facts.state.step);
    pml_message_set_string(m, "reason", err->message);
    pml_message_set_string(m, "code", pml_status_name(err->code));
    if (w->facts.crowded)
        pml_message_set_bool(m, "crowded", true);
    return m;
}

/* The others must not wait for one who does not come, however long our own end takes; nor may what
 * they say then be heard before our word. */
static void fail(worker *w, const pml_error *err)
{
    pml_log(PML_LOG_ERROR, "%s (%s:%d)", err->message, err->file, err->line);
    pml_message *word = failed(w, err);
    if (w->link != NULL)
        link_last_word(w->link, word);
    if (w->world > 1)
        pml_comm_shared_abort(COMM_FD, NULL);
    if (w->link != NULL)
        link_report(w->link, word);
    else
        pml_message_destroy(&word);
}

/* ---- the life of a worker ---- */

static pml_status open_job(worker *w, const job_kind *kind, pml_error *err)
{
    pml_status status = w->world == 1 ? pml_comm_self(&w->comm, err)
                                      : pml_comm_shared(COMM_FD, w->rank, w->world, &w->comm, err);
    if (status != PML_OK)
        return status;
    pulse_set_comm(link_pulse(w->link), w->comm);
    job_setup setup = {.folder = pml_message_string(w->start, "folder"),
                       .checkpoint = pml_message_string(w->start, "checkpoint"),
                       .run = w->run,
                       .rank = w->rank,
                       .world = w->world,
                       .share = (int)pml_message_int(w->start, "share"),
                       .comm = w->comm,
                       .progress = progress,
                       .tick = tick,
                       .move = move,
                       .reserved = RESERVED_FD,
                       .keep = keep,
                       .user = w};
    int slot = (int)pml_message_int(w->start, "slot");
    pml_slot_view view = {0};
    if (slot >= 0)
        status = pml_slots_map(SLOTS_FD, slot, &view, err);
    setup.kept = view.state;
    setup.payload = view.payload;
    setup.payload_bytes = view.bytes;
    if (status == PML_OK)
        status = kind->open(&setup, &w->j, &w->facts, err);
    pml_slots_unmap(&view);
    return status;
}

/* What keeps the run from being lost: checkpoints on disk, snapshots in memory. */
static pml_status make_savers(worker *w, const job_kind *kind, loop *l, pml_error *err)
{
    if (w->rank != 0)
        return PML_OK;
    const char *from = pml_message_string(w->start, "checkpoint");
    pml_status status =
        keeper_new(kind, w->j, &w->facts, w->facts.slots ? SLOTS_FD : -1, w->link, &l->keeper, err);
    return status != PML_OK
               ? status
               : saver_new(kind, w->j, l->keeper, w->link, pml_message_string(w->start, "folder"),
                           from[0] != '\0' ? &l->state : NULL, pml_path_name(from), &l->saver, err);
}

static pml_status train(worker *w, const job_kind *kind, pml_error *err)
{
    static loop l; /* pml_train_state is too large for comfort on a stack */
    l = (loop){.kind = kind,
               .j = w->j,
               .link = w->link,
               .comm = w->comm,
               .gpu = w->gpu,
               .rank = w->rank,
               .max_steps = w->facts.max_steps,
               .has_eval = w->facts.has_eval,
               .policy = w->facts.policy,
               .folder = pml_message_string(w->start, "folder"),
               .positions = w->facts.positions,
               .unfollowed =
                   pml_message_int(w->start, "slot") >= 0 && !pml_message_bool(w->start, "saved"),
               .told_lack = w->facts.lacks[0] != '\0',
               .state = w->facts.state};
    l.state.timeline = pml_message_int(w->start, "timeline");
    pml_status status = make_savers(w, kind, &l, err);
    if (status == PML_OK) {
        if (w->facts.note[0] != '\0')
            warn(w, w->facts.note);
        if (w->facts.lacks[0] != '\0')
            warn(w, w->facts.lacks);
        if (w->facts.unreserved[0] != '\0')
            warn(w, w->facts.unreserved);
        warn_of_long_rows(w);
        report_ready(w);
        pulse_enter(link_pulse(w->link), PHASE_STANDING);
        status = link_wait_go(w->link, err);
    }
    if (status == PML_OK)
        status = loop_run(&l, err);
    w->facts.state.step = l.state.step;
    if (status != PML_OK)
        fail(w, err);
    pulse_enter(link_pulse(w->link), PHASE_SAVING);
    saver_destroy(&l.saver);
    keeper_destroy(&l.keeper);
    return status;
}

/* When the coordinator died, what it has not heard goes to the next one. Also when the last step is
 * made: that the run is finished may not be in the log yet. Where it is, the next one sees it there
 * and ends at once. */
static void leave_behind(worker *w)
{
    pml_error err = PML_ERROR_INIT;
    if (!link_orphaned(w->link))
        return;
    if (link_hand_over(w->link, &err) != PML_OK)
        pml_log(PML_LOG_ERROR, "%s", err.message);
    link_take_over(w->link);
}

/* All that comes before training, or the whole of a life that only saves. */
static pml_status set_out(worker *w, const job_kind *kind, bool saves, pml_error *err)
{
    pulse_set_timeout(link_pulse(w->link), pml_run_hang_timeout(w->run));
    if (saves)
        return left_save(kind, w->start, w->run, w->link, SLOTS_FD, err);
    pml_status status = open_job(w, kind, err);
    return status == PML_OK ? watch_gpu(w, err) : status;
}

int worker_main(const job_kind *kind)
{
    static worker w;
    pml_hold *hold = NULL;
    pml_error err = PML_ERROR_INIT;
    char name[32];
    umask(0077);
    /* What loading used goes back at once and is not kept for later, so that what the process holds
     * is what its plan says. Setting either ends glibc's own raising of both. */
    mallopt(M_MMAP_THRESHOLD, 128 << 10);
    mallopt(M_TRIM_THRESHOLD, 128 << 10);
    signal(SIGPIPE, SIG_IGN);
    /* Whoever ends the session or the machine tells the coordinator too, and it decides; its own
     * end reaches us through the lease. */
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    pml_status status = read_start(&w, &err);
    if (status != PML_OK) {
        fprintf(stderr, "pml-worker: %s\n", err.message);
        return 2;
    }
    snprintf(name, sizeof name, "worker-%d", w.rank);
    pml_log_init(name, PML_LOG_INFO);
    status = link_new(w.start, LEASE_FD, &w.link, &err);
    if (status == PML_OK)
        status = pml_hold_new(pml_message_string(w.start, "folder"), &hold, &err);
    if (status == PML_OK)
        status = pml_run_read(pml_message_string(w.start, "folder"), &w.run, &err);
    const bool saves = pml_message_bool(w.start, "save");
    if (status == PML_OK)
        status = set_out(&w, kind, saves, &err);
    if (status != PML_OK)
        fail(&w, &err);
    else if (!saves)
        status = train(&w, kind, &err);
    if (w.link != NULL)
        leave_behind(&w);
    if (w.j != NULL)
        kind->close(&w.j);
    if (w.link != NULL) {
        pulse_set_comm(link_pulse(w.link), NULL);
        link_set_gpu(w.link, NULL);
    }
    gpu_watch_destroy(&w.gpu);
    pml_comm_destroy(&w.comm);
    link_destroy(&w.link);
    pml_hold_destroy(&hold);
    pml_message_destroy(&w.run);
    pml_message_destroy(&w.start);
    return status == PML_OK ? 0 : 1;
}
