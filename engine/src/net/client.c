#include "pml/net/client.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

#include "pml/base/clock.h"
#include "queue.h"

enum {
    RECEIVE_AHEAD = 10000,
    RECONNECT_MS = 100,
    RECONNECT_MAX_MS = 2000,
    FLUSH_MS = 1000,
    SEAL_MAX = 64
};
static const double alive_seconds = 5;

/* What waits to be sent. */
typedef struct outgoing {
    size_t size;
    char text[];
} outgoing;

struct pml_client {
    /* Owned by the I/O thread once it runs. */
    void *context, *dealer, *sub, *monitor;
    bool viewer;   /* has a telemetry endpoint */
    bool up, lost; /* lost: was up, and is not */

    pthread_t thread;
    bool running;
    int wake;  /* eventfd: there is something to send, or closing */
    int ready; /* eventfd: there is something to receive          */

    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pmli_queue to_send, received;
    size_t received_bytes;
    bool gap;     /* events were dropped since the last LOST */
    bool starved; /* something else was: there is no going on */
    bool closing, dead;
    int waiting; /* threads inside receive */
};

/* ---- the queue of received messages ---- */

static pml_received *received_new(pml_received_kind kind, const void *text, size_t size)
{
    pml_received *r = malloc(sizeof *r + size + 1);
    if (r == NULL)
        return NULL;
    r->kind = kind;
    r->size = size;
    memcpy(r->text, text, size);
    r->text[size] = '\0';
    return r;
}

/* With the mutex held: whether receive has something to give. */
static bool something_waits(const pml_client *c)
{
    return c->received.n > 0 || c->gap || c->starved;
}

/* With the mutex held. An event that finds no memory or no room can be asked for again; without
 * anything else (an answer, that we are up) nobody would know what to wait for. Neither is said in
 * words here, for which there may be no memory either. */
static void push_received(pml_client *c, pml_received_kind kind, const void *text, size_t size)
{
    bool event = kind == PML_RECEIVED_EVENT, waited = something_waits(c);
    bool full = event && c->received_bytes + size > PML_CLIENT_RECEIVE_LIMIT;
    pml_received *r = full ? NULL : received_new(kind, text, size);
    if (r != NULL && pmli_queue_push(&c->received, r)) {
        c->received_bytes += size;
    } else {
        free(r);
        c->gap = c->gap || event;
        c->starved = c->starved || !event;
    }
    if (!waited)
        eventfd_write(c->ready, 1);
    pthread_cond_signal(&c->changed);
}

static void deliver(pml_client *c, pml_received_kind kind, const void *text, size_t size)
{
    pthread_mutex_lock(&c->mutex);
    push_received(c, kind, text, size);
    pthread_mutex_unlock(&c->mutex);
}

/* ---- the I/O thread ---- */

static void drain_socket(pml_client *c, void *socket, pml_received_kind kind)
{
    zmq_msg_t frame;
    for (;;) {
        zmq_msg_init(&frame);
        if (zmq_msg_recv(&frame, socket, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&frame);
            return;
        }
        deliver(c, kind, zmq_msg_data(&frame), zmq_msg_size(&frame));
        zmq_msg_close(&frame);
    }
}

/* Two frames: event number (16 bit) and value (32 bit); endpoint. */
static void drain_monitor(pml_client *c)
{
    uint8_t frame[16];
    while (zmq_recv(c->monitor, frame, sizeof frame, ZMQ_DONTWAIT) >= 0) {
        uint16_t event;
        memcpy(&event, frame, sizeof event);
        char endpoint[PML_ENDPOINT_MAX];
        zmq_recv(c->monitor, endpoint, sizeof endpoint, ZMQ_DONTWAIT);
        if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED && !c->up) {
            c->up = true;
            c->lost = false;
            deliver(c, PML_RECEIVED_UP, "", 0);
        } else if (event == ZMQ_EVENT_DISCONNECTED && c->up) {
            c->up = false;
            c->lost = true;
            deliver(c, PML_RECEIVED_DOWN, "", 0);
        } else if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) {
            static const char why[] = "this key is not on the coordinator's list";
            deliver(c, PML_RECEIVED_DENIED, why, sizeof why - 1);
        }
    }
}

/* Send what can go now; false when more waits and the socket takes no more. */
static bool send_waiting(pml_client *c)
{
    for (;;) {
        pthread_mutex_lock(&c->mutex);
        outgoing *o = pmli_queue_front(&c->to_send);
        pthread_mutex_unlock(&c->mutex);
        if (o == NULL)
            return true;
        if (zmq_send(c->dealer, o->text, o->size, ZMQ_DONTWAIT) < 0)
            return false;
        pthread_mutex_lock(&c->mutex);
        free(pmli_queue_pop(&c->to_send));
        pthread_mutex_unlock(&c->mutex);
    }
}

static bool is_closing(pml_client *c)
{
    pthread_mutex_lock(&c->mutex);
    bool closing = c->closing;
    pthread_mutex_unlock(&c->mutex);
    return closing;
}

static void serve(pml_client *c)
{
    double alive_at = pml_clock_monotonic() + alive_seconds, give_up = 0;
    for (;;) {
        bool sent = send_waiting(c);
        double now = pml_clock_monotonic();
        if (is_closing(c)) {
            give_up = give_up == 0 ? now + FLUSH_MS / 1e3 : give_up;
            if (sent || c->lost || now >= give_up)
                return;
        }
        /* Nobody is there: the socket becomes writable when somebody is. */
        zmq_pollitem_t items[] = {
            {c->dealer, 0, (short)(ZMQ_POLLIN | (sent ? 0 : ZMQ_POLLOUT)), 0},
            {c->monitor, 0, ZMQ_POLLIN, 0},
            {NULL, c->wake, ZMQ_POLLIN, 0},
            {c->sub, 0, ZMQ_POLLIN, 0},
        };
        long wait = give_up > 0 ? 50 : c->viewer ? (long)((alive_at - now) * 1e3) + 1 : -1;
        if (zmq_poll(items, c->viewer ? 4 : 3, wait) < 0 && zmq_errno() != EINTR)
            return;
        eventfd_t count;
        if (items[2].revents != 0)
            (void)eventfd_read(c->wake, &count);
        drain_monitor(c);
        drain_socket(c, c->dealer, PML_RECEIVED_ANSWER);
        if (c->viewer)
            drain_socket(c, c->sub, PML_RECEIVED_EVENT);
        if (c->viewer && pml_clock_monotonic() >= alive_at) {
            static const char alive[] = "{\"type\":\"alive\",\"id\":\"alive\"}";
            if (c->up) /* not worth a place in the queue: the next one follows */
                zmq_send(c->dealer, alive, sizeof alive - 1, ZMQ_DONTWAIT);
            alive_at = pml_clock_monotonic() + alive_seconds;
        }
    }
}

static void *run(void *argument)
{
    pml_client *c = argument;
    serve(c);
    pthread_mutex_lock(&c->mutex);
    c->dead = true;
    eventfd_write(c->ready, 1);
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

/* ---- making and closing ---- */

static bool set_int(void *socket, int option, int value)
{
    return zmq_setsockopt(socket, option, &value, sizeof value) == 0;
}

/* An address of IPv6 stands in brackets. A name is looked up as IPv4, by which a door on all
 * addresses listens wherever the machine has it. */
static bool is_six(const pml_connection *connection)
{
    return strchr(connection->control, '[') != NULL;
}

static bool prepare_socket(void *socket, const pml_connection *connection)
{
    int64_t largest = PML_MESSAGE_MAX + SEAL_MAX;
    const pml_keypair *keys = &connection->keys;
    return socket != NULL && set_int(socket, ZMQ_LINGER, FLUSH_MS) &&
           set_int(socket, ZMQ_IPV6, is_six(connection)) &&
           set_int(socket, ZMQ_RECONNECT_IVL, RECONNECT_MS) &&
           set_int(socket, ZMQ_RECONNECT_IVL_MAX, RECONNECT_MAX_MS) &&
           set_int(socket, ZMQ_RCVHWM, RECEIVE_AHEAD) &&
           zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &largest, sizeof largest) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, connection->server_key,
                          strlen(connection->server_key)) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, keys->public_key,
                          strlen(keys->public_key)) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, keys->secret_key,
                          strlen(keys->secret_key)) == 0;
}

/* A socket pair of libzmq tells what becomes of the connection. */
static bool watch(pml_client *c)
{
    int events =
        ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;
    if (zmq_socket_monitor(c->dealer, "inproc://monitor", events) != 0)
        return false;
    c->monitor = zmq_socket(c->context, ZMQ_PAIR);
    return c->monitor != NULL && set_int(c->monitor, ZMQ_LINGER, 0) &&
           zmq_connect(c->monitor, "inproc://monitor") == 0;
}

static pml_status open_sockets(pml_client *c, const pml_connection *connection, pml_error *err)
{
    c->context = zmq_ctx_new();
    c->dealer = c->context == NULL ? NULL : zmq_socket(c->context, ZMQ_DEALER);
    c->viewer = connection->telemetry[0] != '\0';
    /* IMMEDIATE: what cannot be sent now waits with us, not with a connection that may be dead. */
    bool ok = prepare_socket(c->dealer, connection) && set_int(c->dealer, ZMQ_IMMEDIATE, 1) &&
              watch(c) && zmq_connect(c->dealer, connection->control) == 0;
    if (ok && c->viewer) {
        c->sub = zmq_socket(c->context, ZMQ_SUB);
        ok = prepare_socket(c->sub, connection) &&
             zmq_setsockopt(c->sub, ZMQ_SUBSCRIBE, "", 0) == 0 &&
             zmq_connect(c->sub, connection->telemetry) == 0;
    }
    if (ok)
        return PML_OK;
    int why = zmq_errno();
    pml_status status = why == ENOMEM ? PML_NO_MEMORY : why == EMFILE ? PML_IO : PML_INVALID;
    return PML_FAIL(err, status, "cannot connect to %s: %s", connection->control,
                    zmq_strerror(why));
}

/* Signals are the program's business (Ctrl-C in a notebook cell), not this thread's. */
static int start_quiet(pml_client *c)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&c->thread, NULL, run, c);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

pml_status pml_client_connect(const pml_connection *connection, pml_client **out, pml_error *err)
{
    *out = NULL;
    pml_client *c = calloc(1, sizeof *c);
    if (c == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a client");
    pthread_mutex_init(&c->mutex, NULL);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&c->changed, &clock);
    pthread_condattr_destroy(&clock);
    c->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->ready = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pml_status status = PML_OK;
    if (c->wake < 0 || c->ready < 0)
        status = PML_FAIL(err, PML_IO, "cannot make an eventfd: %s", strerror(errno));
    if (status == PML_OK)
        status = open_sockets(c, connection, err);
    if (status == PML_OK && start_quiet(c) != 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "cannot start the client's thread");
    c->running = status == PML_OK;
    if (status != PML_OK)
        pml_client_close(&c);
    *out = c;
    return status;
}

pml_status pml_client_open(const char *connection_file, pml_client **client, pml_error *err)
{
    *client = NULL;
    pml_connection connection;
    pml_status status = pml_connection_read(connection_file, &connection, err);
    if (status != PML_OK)
        return status;
    status = pml_client_connect(&connection, client, err);
    pml_keypair_forget(&connection.keys);
    return status;
}

static void join_thread(pml_client *c)
{
    pthread_mutex_lock(&c->mutex);
    c->closing = true;
    eventfd_write(c->wake, 1);
    pthread_cond_broadcast(&c->changed);
    while (c->waiting > 0)
        pthread_cond_wait(&c->changed, &c->mutex);
    pthread_mutex_unlock(&c->mutex);
    pthread_join(c->thread, NULL);
}

void pml_client_close(pml_client **out)
{
    pml_client *c = *out;
    if (c == NULL)
        return;
    *out = NULL;
    if (c->running)
        join_thread(c);
    void *sockets[] = {c->monitor, c->dealer, c->sub};
    for (int i = 0; i < 3; i++)
        if (sockets[i] != NULL)
            zmq_close(sockets[i]);
    if (c->context != NULL)
        zmq_ctx_term(c->context);
    if (c->wake >= 0)
        close(c->wake);
    if (c->ready >= 0)
        close(c->ready);
    pmli_queue_clear(&c->to_send);
    pmli_queue_clear(&c->received);
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->mutex);
    free(c);
}

/* ---- what callers do ---- */

pml_status pml_client_send(pml_client *c, const char *text, size_t size, pml_error *err)
{
    if (size == 0 || size > PML_MESSAGE_MAX)
        return PML_FAIL(err, PML_INVALID, "a request has 1 to %d bytes, this one has %zu",
                        PML_REQUEST_MAX, size);
    outgoing *o = malloc(sizeof *o + size);
    if (o == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a request");
    o->size = size;
    memcpy(o->text, text, size);
    pml_status status = PML_OK;
    pthread_mutex_lock(&c->mutex);
    if (c->dead || c->closing)
        status = PML_FAIL(err, PML_PEER, "the client is closed");
    else if (c->to_send.n >= PML_CLIENT_SEND_LIMIT)
        status = PML_FAIL(err, PML_BUSY, "%zu requests wait: the coordinator does not answer",
                          c->to_send.n);
    else if (!pmli_queue_push(&c->to_send, o))
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory for a request");
    else
        eventfd_write(c->wake, 1);
    pthread_mutex_unlock(&c->mutex);
    if (status != PML_OK)
        free(o);
    return status;
}

static struct timespec deadline_after(int timeout_ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += timeout_ms / 1000;
    t.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    return t;
}

/* With the mutex held, where something waits. */
static pml_status take(pml_client *c, pml_received **received, pml_error *err)
{
    if (c->received.n > 0) {
        *received = pmli_queue_pop(&c->received);
        c->received_bytes -= (*received)->size;
    } else if (c->starved || (*received = received_new(PML_RECEIVED_LOST, "", 0)) == NULL) {
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for what the coordinator sent");
    } else {
        c->gap = false;
    }
    eventfd_t count;
    if (!something_waits(c) && !c->dead)
        (void)eventfd_read(c->ready, &count);
    return PML_OK;
}

pml_status pml_client_receive(pml_client *c, int timeout_ms, pml_received **received,
                              pml_error *err)
{
    *received = NULL;
    pml_status status = PML_OK;
    struct timespec deadline = deadline_after(timeout_ms > 0 ? timeout_ms : 0);
    pthread_mutex_lock(&c->mutex);
    c->waiting++;
    while (!something_waits(c) && !c->closing && !c->dead && timeout_ms != 0 && status == PML_OK) {
        if (timeout_ms < 0)
            pthread_cond_wait(&c->changed, &c->mutex);
        else if (pthread_cond_timedwait(&c->changed, &c->mutex, &deadline) == ETIMEDOUT)
            status = PML_TIMEOUT;
    }
    if (something_waits(c) && !c->closing)
        status = take(c, received, err);
    else if (c->closing || c->dead)
        status = PML_FAIL(err, PML_PEER, "the client is closed");
    else
        status = PML_FAIL(err, PML_TIMEOUT, "nothing came within %d ms", timeout_ms);
    c->waiting--;
    if (c->closing)
        pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

int pml_client_fd(const pml_client *client)
{
    return client->ready;
}
