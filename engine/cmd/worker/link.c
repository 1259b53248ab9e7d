#include "link.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "backlog.h"
#include "outbox.h"
#include "pml/base/clock.h"
#include "pml/base/log.h"
#include "pml/net/client.h"
#include "takeover.h"

enum { BEAT_MS = 1000, LOOK_MS = 250 };

struct worker_link {
    int rank, lease, stop; /* stop: eventfd */
    const pml_message *start;
    pid_t parent; /* the coordinator */
    pml_client *client;
    pulse pulse;

    orders *orders;
    outbox *outbox;
    backlog *backlog;         /* rank 0 */
    _Atomic int64_t reported; /* number of the last report; the outbox's thread counts */

    pthread_t thread;
    bool running;

    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int64_t step;
    gpu_watch *gpu;
    bool went, released, lost;

    /* of the I/O thread */
    double beat_at, cpu_seconds, cpu_at;
};

/* ---- reports ---- */

/* Whether the lease has ended, also where its end has not been read yet: it may be the thread which
 * reads it that waits. */
static bool is_alone(const worker_link *l)
{
    struct pollfd end = {.fd = l->lease};
    return poll(&end, 1, 0) > 0;
}

/* A queue that is full means that the coordinator takes reports in more slowly than we make them,
 * or is stopped: they must not be dropped, so we wait for as long as it lives, and the training
 * thread for us. Then it is not that which does not come on. */
static pml_status send_in_time(worker_link *l, const char *text, size_t size, pml_error *err)
{
    pml_status status = pml_client_send(l->client, text, size, err);
    while (status == PML_BUSY && !is_alone(l)) {
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
        pulse_move(&l->pulse);
        status = pml_client_send(l->client, text, size, err);
    }
    return status;
}

/* What we have no memory to hear or to tell would be missing for good: a command that is never in
 * force, a step that is not in the history. Who replaces us hears all that is open and makes again
 * what was not told. */
static _Noreturn void give_way(const char *what, const pml_error *why)
{
    pml_log(PML_LOG_ERROR, "%s: %s: another worker takes over", what, why->message);
    _exit(1);
}

/* waits: for room; a beat does not, as the next one is as good. */
static void send_report(worker_link *l, pml_message *report, int64_t number, bool waits)
{
    char *text;
    size_t size;
    pml_error err = PML_ERROR_INIT;
    pml_message_set_int(report, "rank", l->rank);
    if (number > 0)
        pml_message_set_int(report, "number", number);
    pml_status status = pml_message_print(report, &text, &size, &err);
    if (status == PML_OK && number > 0)
        status = backlog_keep(l->backlog, number, text, size, &err);
    bool kept = status == PML_OK && number > 0;
    if (status == PML_OK)
        status = waits ? send_in_time(l, text, size, &err)
                       : pml_client_send(l->client, text, size, &err);
    /* The next coordinator hears what was kept, and waits for nothing else. */
    if (status == PML_NO_MEMORY && waits && (!is_alone(l) || (number > 0 && !kept)))
        give_way("cannot report", &err);
    if (status != PML_OK)
        pml_log(PML_LOG_ERROR, "cannot report: %s", err.message);
    free(text);
    pml_message_destroy(&report);
}

/* On the outbox's thread. */
static void send_in_turn(void *user, pml_message *report, int64_t *number)
{
    worker_link *l = user;
    pml_message_type type = report != NULL ? pml_message_type_of(report) : PML_MESSAGE_COUNT;
    bool kept = l->backlog != NULL && (type == PML_REPORT_report || type == PML_REPORT_applied ||
                                       type == PML_REPORT_refused || type == PML_REPORT_sync);
    if (kept)
        l->reported++;
    if (number != NULL)
        *number = kept ? l->reported : 0;
    send_report(l, report, kept ? l->reported : 0, true);
}

void link_post(worker_link *l, link_writer write, const void *facts, size_t bytes)
{
    outbox_put(l->outbox, write, facts, bytes);
}

pml_message *link_wrap(pml_message *event)
{
    pml_message *report = pml_message_new(PML_REPORT_report);
    pml_message_set_part(report, "event", event);
    return report;
}

void link_report(worker_link *l, pml_message *report)
{
    outbox_send(l->outbox, report);
}

void link_last_word(worker_link *l, pml_message *report)
{
    char *text;
    size_t size;
    pml_error err = PML_ERROR_INIT;
    pml_message_set_int(report, "rank", l->rank);
    pml_status status = pml_message_print(report, &text, &size, &err);
    if (status == PML_OK && send(l->lease, text, size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
        errno != EPIPE && errno != ECONNRESET) /* nobody is there who would listen */
        status = PML_FAIL(&err, PML_IO, "%s", strerror(errno));
    if (status != PML_OK)
        pml_log(PML_LOG_ERROR, "the last word does not go over the lease: %s", err.message);
    free(text);
}

void link_event(worker_link *l, pml_message *event)
{
    link_report(l, link_wrap(event));
}

void link_drain(worker_link *l)
{
    outbox_drain(l->outbox);
}

void link_discard(worker_link *l, order *o)
{
    outbox_discard(l->outbox, o->args);
    outbox_discard(l->outbox, o->keywords);
    o->args = o->keywords = NULL;
}

/* RssAnon + RssShmem in bytes: what the process really holds, without mapped files. */
static int64_t resident(void)
{
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    int64_t total = 0;
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        long long kib;
        if (sscanf(line, "RssAnon: %lld", &kib) == 1 || sscanf(line, "RssShmem: %lld", &kib) == 1)
            total += kib * 1024;
    }
    if (file != NULL)
        fclose(file);
    return total;
}

static double processor_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void beat(worker_link *l, double now)
{
    double cpu = processor_seconds(), elapsed = now - l->cpu_at;
    pml_message *m = pml_message_new(PML_REPORT_beat);
    pthread_mutex_lock(&l->mutex);
    pml_message_set_int(m, "step", l->step);
    if (l->gpu != NULL)
        gpu_watch_tell(l->gpu, m);
    pthread_mutex_unlock(&l->mutex);
    pml_message_set_int(m, "rss", resident());
    pml_message_set_number(m, "cpu", elapsed > 0 ? (cpu - l->cpu_seconds) / elapsed : 0);
    l->cpu_seconds = cpu;
    l->cpu_at = now;
    l->beat_at = now;
    pulse_tell(&l->pulse, m);
    send_report(l, m, 0, false);
}

/* ---- orders ---- */

static void take_command(worker_link *l, const pml_message *m)
{
    pml_message *args = pml_message_part(m, "args", 0);
    bool again = pml_message_type_of(m) == PML_ORDER_again;
    bool kept = false;
    if (args != NULL) {
        order o = {.number = pml_message_int(m, "command"),
                   .step = pml_message_int(m, "step"),
                   .answers = again ? pml_message_int(m, "answers") : 0,
                   .verb = pml_message_type_of(args),
                   .args = args,
                   .keywords = pml_message_part(args, "lr_scheduler_kwargs", 0)};
        const bool whole = o.keywords != NULL || !pml_message_has(args, "lr_scheduler_kwargs");
        kept = whole && (again ? orders_put_again(l->orders, &o) : orders_put(l->orders, &o));
    }
    if (!kept) {
        pml_error err = PML_ERROR_INIT;
        PML_FAIL(&err, PML_NO_MEMORY, "no memory for a command");
        give_way("order", &err);
    }
    if (!again) {
        pml_message *ack = pml_message_new(PML_REPORT_ack);
        pml_message_set_int(ack, "command", pml_message_int(m, "command"));
        send_report(l, ack, 0, true); /* not in turn: the ring may be full, and beats go on */
    }
}

static void take_order(worker_link *l, const char *text, size_t size)
{
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    if (pml_message_parse(PML_CHANNEL_ORDER, text, size, &m, &err) != PML_OK)
        give_way("order", &err);
    switch (pml_message_type_of(m)) {
    case PML_ORDER_command:
    case PML_ORDER_again:
        take_command(l, m);
        break;
    case PML_ORDER_heard:
        if (l->backlog != NULL)
            backlog_heard(l->backlog, pml_message_int(m, "number"));
        break;
    case PML_ORDER_commit:
        orders_commit(l->orders, pml_message_int(m, "command"));
        break;
    case PML_ORDER_go:
        pthread_mutex_lock(&l->mutex);
        l->went = true;
        l->beat_at = 0; /* what loading took is worth a beat at once */
        pthread_cond_broadcast(&l->changed);
        pthread_mutex_unlock(&l->mutex);
        break;
    case PML_ORDER_enough:
        orders_enough(l->orders, pml_message_int(m, "command"),
                      pml_message_has(m, "row") ? pml_message_int(m, "row") : -1);
        break;
    default:
        break;
    }
    pml_message_destroy(&m);
}

/* ---- the thread ---- */

/* Nothing is to be saved before the run has begun, and loading cannot be interrupted. */
static void lose_lease(worker_link *l)
{
    pthread_mutex_lock(&l->mutex);
    bool went = l->went, released = l->released;
    l->lost = true;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->mutex);
    orders_end(l->orders);
    if (l->backlog != NULL)
        backlog_wake(l->backlog);
    pml_log(PML_LOG_WARNING, "the coordinator %s: %s", released ? "has let go" : "is gone",
            went ? "stopping at the next safe point" : "nothing had begun");
    if (went)
        return;
    if (!released)
        link_take_over(l);
    _exit(0);
}

/* What the lease has: the word that it ends on purpose, or its end. False: it has ended. */
static bool read_lease(worker_link *l)
{
    char text[256];
    ssize_t n = recv(l->lease, text, sizeof text, MSG_DONTWAIT);
    if (n > 0) {
        pml_message *m;
        if (pml_message_parse(PML_CHANNEL_ORDER, text, (size_t)n, &m, NULL) == PML_OK) {
            pthread_mutex_lock(&l->mutex);
            l->released = l->released || pml_message_type_of(m) == PML_ORDER_release;
            pthread_mutex_unlock(&l->mutex);
            pml_message_destroy(&m);
        }
        return true;
    }
    /* errno says nothing about an end: it may be left over from another call */
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    lose_lease(l);
    return false;
}

/* Nobody is there who could kill us when our training thread hangs: we do. */
static void watch_ourselves(worker_link *l)
{
    if (!pulse_hangs(&l->pulse))
        return;
    pml_log(PML_LOG_ERROR, "the training thread does not come on, and the coordinator is gone");
    pthread_mutex_lock(&l->mutex);
    bool released = l->released;
    pthread_mutex_unlock(&l->mutex);
    if (l->backlog != NULL)
        link_hand_over(l, NULL);
    if (!released)
        link_take_over(l);
    _exit(1);
}

static void *serve(void *argument)
{
    worker_link *l = argument;
    bool leased = true;
    for (;;) {
        double now = pml_clock_monotonic();
        bool news = pulse_look(&l->pulse);
        if (news || (now - l->beat_at) * 1e3 >= BEAT_MS)
            beat(l, now);
        if (!leased)
            watch_ourselves(l);
        struct pollfd fds[] = {{pml_client_fd(l->client), POLLIN, 0},
                               {l->stop, POLLIN, 0},
                               {leased ? l->lease : -1, POLLIN, 0}};
        if (poll(fds, 3, LOOK_MS) < 0 && errno != EINTR)
            return NULL;
        if (fds[1].revents != 0)
            return NULL;
        if (fds[2].revents != 0)
            leased = read_lease(l);
        pml_received *r;
        pml_status status;
        pml_error err = PML_ERROR_INIT;
        while ((status = pml_client_receive(l->client, 0, &r, &err)) == PML_OK) {
            if (r->kind == PML_RECEIVED_ANSWER)
                take_order(l, r->text, r->size);
            free(r);
        }
        if (status == PML_NO_MEMORY) /* an order may be among what was lost */
            give_way("order", &err);
    }
}

static void copy_text(char *to, size_t capacity, const pml_message *start, const char *field)
{
    snprintf(to, capacity, "%s", pml_message_string(start, field));
}

pml_status link_new(const pml_message *start, int lease, worker_link **out, pml_error *err)
{
    *out = NULL;
    worker_link *l = calloc(1, sizeof *l);
    if (l == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the link");
    l->rank = (int)pml_message_int(start, "rank");
    l->lease = lease;
    l->went = pml_message_bool(start, "save"); /* what it has to save is there already */
    l->start = start;
    l->parent = getppid();
    l->cpu_at = pml_clock_monotonic();
    pulse_init(&l->pulse);
    pthread_mutex_init(&l->mutex, NULL);
    pthread_cond_init(&l->changed, NULL);
    pml_connection c = {.role = PML_ROLE_WORKER};
    copy_text(c.control, sizeof c.control, start, "endpoint");
    copy_text(c.server_key, sizeof c.server_key, start, "server_key");
    copy_text(c.keys.public_key, PML_KEY_TEXT, start, "public_key");
    copy_text(c.keys.secret_key, PML_KEY_TEXT, start, "secret_key");
    l->stop = eventfd(0, EFD_CLOEXEC);
    pml_status status = l->stop < 0
                            ? PML_FAIL(err, PML_IO, "cannot make an eventfd: %s", strerror(errno))
                            : pml_client_connect(&c, &l->client, err);
    pml_keypair_forget(&c.keys);
    if (status == PML_OK)
        status = orders_new(&l->orders, err);
    if (status == PML_OK && l->rank == 0)
        status = backlog_new(&l->backlog, err);
    if (status == PML_OK)
        status = outbox_new(send_in_turn, l, &l->outbox, err);
    if (status == PML_OK) {
        pml_message *joined = pml_message_new(PML_REPORT_joined);
        pml_message_set_int(joined, "pid", getpid());
        link_report(l, joined);
        if (pthread_create(&l->thread, NULL, serve, l) != 0)
            status = PML_FAIL(err, PML_NO_MEMORY, "cannot start the I/O thread");
        else
            l->running = true;
    }
    if (status != PML_OK)
        link_destroy(&l);
    *out = l;
    return status;
}

void link_destroy(worker_link **out)
{
    worker_link *l = *out;
    if (l == NULL)
        return;
    *out = NULL;
    outbox_destroy(&l->outbox);
    if (l->running) {
        eventfd_write(l->stop, 1);
        pthread_join(l->thread, NULL);
    }
    pml_client_close(&l->client);
    if (l->stop >= 0)
        close(l->stop);
    orders_destroy(&l->orders);
    backlog_destroy(&l->backlog);
    pulse_destroy(&l->pulse);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->mutex);
    free(l);
}

/* ---- for the training thread ---- */

void link_set_step(worker_link *l, int64_t step)
{
    pthread_mutex_lock(&l->mutex);
    l->step = step;
    pthread_mutex_unlock(&l->mutex);
}

void link_set_gpu(worker_link *l, gpu_watch *gpu)
{
    pthread_mutex_lock(&l->mutex);
    l->gpu = gpu;
    pthread_mutex_unlock(&l->mutex);
}

void link_take_over(worker_link *l)
{
    take_over(l->start, l->parent);
}

pulse *link_pulse(worker_link *l)
{
    return &l->pulse;
}

bool link_flush(worker_link *l)
{
    if (l->backlog == NULL)
        return true;
    int64_t number = outbox_flush(l->outbox, pml_message_new(PML_REPORT_sync));
    if (backlog_wait(l->backlog, number, 60))
        return true;
    pml_error err = PML_ERROR_INIT;
    if (link_orphaned(l) && link_hand_over(l, &err) == PML_OK)
        return true;
    if (err.code != PML_OK)
        pml_log(PML_LOG_ERROR, "%s", err.message);
    return false;
}

bool link_logged(worker_link *l, double seconds)
{
    if (l->backlog == NULL)
        return true;
    outbox_drain(l->outbox);
    return backlog_wait(l->backlog, atomic_load(&l->reported), seconds);
}

pml_status link_hand_over(worker_link *l, pml_error *err)
{
    if (l->backlog == NULL)
        return PML_OK;
    outbox_drain(l->outbox);
    return backlog_write(l->backlog, pml_message_string(l->start, "folder"), err);
}

pml_status link_wait_go(worker_link *l, pml_error *err)
{
    pthread_mutex_lock(&l->mutex);
    while (!l->went && !l->lost)
        pthread_cond_wait(&l->changed, &l->mutex);
    bool went = l->went;
    pthread_mutex_unlock(&l->mutex);
    return went ? PML_OK : PML_FAIL(err, PML_PEER, "the coordinator is gone");
}

orders *link_orders(worker_link *l)
{
    return l->orders;
}

bool link_lost(worker_link *l)
{
    pthread_mutex_lock(&l->mutex);
    bool lost = l->lost;
    pthread_mutex_unlock(&l->mutex);
    return lost;
}

/* Another rank may have seen the coordinator's end first and stopped all of us: then the end lies
 * in our socket and our I/O thread has not come to it. */
static bool lease_has_ended(const worker_link *l)
{
    char byte;
    return recv(l->lease, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

bool link_orphaned(worker_link *l)
{
    bool ended = lease_has_ended(l);
    pthread_mutex_lock(&l->mutex);
    bool orphaned = (l->lost || ended) && !l->released;
    pthread_mutex_unlock(&l->mutex);
    return orphaned;
}
