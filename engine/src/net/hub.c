#include "pml/net/hub.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "guests.h"
#include "pml/base/clock.h"
#include "zap.h"

enum {
    HANDSHAKE_MS = 5000, /* a connection that says nothing does not hold a descriptor longer */
    EVENTS_AHEAD = 1000, /* that a slow viewer may be behind before it loses some            */
    ANSWERS_AHEAD = 256, /* that a client may leave unread before it loses some              */
    ORDERS_AHEAD = 10000,
    HEARTBEAT_MS = 10000, /* a client that does not answer one is cut off */
    HEARTBEAT_TIMEOUT_MS = 20000,
    LINGER_MS = 1000,
    SEAL_MAX = 64, /* what CURVE adds to a frame */
    MORE_MAX = 64,
    REQUESTS_AT_ONCE = 256, /* before the caller may look after other things */
    BIND_TRIES = 10         /* a port that was just closed is free in a moment */
};
static const double sweep_seconds = 1, bind_pause = 0.02;

static const struct {
    const char *name, *domain;
    int type, ahead;
    bool clients;
} doors[PML_DOORS] = {
    [PML_DOOR_CONTROL] = {"ctl", PMLI_ZAP_CLIENTS, ZMQ_ROUTER, ANSWERS_AHEAD, true},
    [PML_DOOR_TELEMETRY] = {"pub", PMLI_ZAP_CLIENTS, ZMQ_XPUB, EVENTS_AHEAD, true},
    [PML_DOOR_WORKER] = {"wrk", PMLI_ZAP_WORKERS, ZMQ_ROUTER, ORDERS_AHEAD, false},
};

struct pml_hub {
    void *context;
    pmli_zap *zap;
    pml_keypair keys;
    void *sockets[PML_DOORS], *monitors[PML_DOORS];
    char endpoints[PML_DOORS][PML_ENDPOINT_MAX];
    char network[PML_DOORS][PML_ENDPOINT_MAX];
    pmli_guests *guests;
    double swept_at;
    int left; /* requests that may be received before the next wait */
    int64_t refused_keys, refused_handshakes;
    struct {
        bool there; /* received, and there was no memory to hand it out: the next that is */
        pml_door door;
        pml_peer peer;
        zmq_msg_t frame;
        bool several;
    } kept;
};

static bool set_int(void *socket, int option, int value)
{
    return zmq_setsockopt(socket, option, &value, sizeof value) == 0;
}

static bool set_limits(void *socket)
{
    int64_t largest = PML_MESSAGE_MAX + SEAL_MAX;
    return zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &largest, sizeof largest) == 0 &&
           set_int(socket, ZMQ_HANDSHAKE_IVL, HANDSHAKE_MS) &&
           set_int(socket, ZMQ_LINGER, LINGER_MS);
}

static bool guard(void *socket, const char *domain, const char *secret)
{
    return set_int(socket, ZMQ_CURVE_SERVER, 1) &&
           zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, secret, strlen(secret)) == 0 &&
           zmq_setsockopt(socket, ZMQ_ZAP_DOMAIN, domain, strlen(domain)) == 0;
}

/* Failed handshakes and new connections arrive on an inproc pair as events. Without a limit there:
 * libzmq's I/O thread would wait for us at a full one. */
static bool watch(pml_hub *hub, pml_door door)
{
    char name[64];
    snprintf(name, sizeof name, "inproc://monitor-%s", doors[door].name);
    int events = ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                 ZMQ_EVENT_HANDSHAKE_FAILED_AUTH | (doors[door].clients ? ZMQ_EVENT_ACCEPTED : 0);
    if (zmq_socket_monitor(hub->sockets[door], name, events) != 0)
        return false;
    hub->monitors[door] = zmq_socket(hub->context, ZMQ_PAIR);
    return hub->monitors[door] != NULL && set_int(hub->monitors[door], ZMQ_LINGER, 0) &&
           set_int(hub->monitors[door], ZMQ_RCVHWM, 0) &&
           zmq_connect(hub->monitors[door], name) == 0;
}

static pml_status bind_door(pml_hub *hub, pml_door door, const char *folder, pml_error *err)
{
    char *endpoint = hub->endpoints[door];
    int n = snprintf(endpoint, PML_ENDPOINT_MAX, "ipc://%s/%s", folder, doors[door].name);
    if (n < 0 || n - (int)strlen("ipc://") > PML_SOCKET_PATH_MAX)
        return PML_FAIL(err, PML_INVALID, "%s is too long a path for a socket", folder);
    if (zmq_bind(hub->sockets[door], endpoint) != 0)
        return PML_FAIL(err, PML_IO, "cannot open %s: %s", endpoint, zmq_strerror(zmq_errno()));
    return PML_OK;
}

static pml_status open_door(pml_hub *hub, pml_door door, const char *folder, pml_error *err)
{
    void *socket = zmq_socket(hub->context, doors[door].type);
    hub->sockets[door] = socket;
    bool ok = socket != NULL && set_limits(socket) &&
              set_int(socket, ZMQ_SNDHWM, doors[door].ahead) &&
              guard(socket, doors[door].domain, hub->keys.secret_key) && watch(hub, door);
    if (ok && doors[door].clients) /* HWM: what one of them has sent ahead is not read any more */
        ok = set_int(socket, ZMQ_RCVHWM, REQUESTS_AT_ONCE) &&
             set_int(socket, ZMQ_HEARTBEAT_IVL, HEARTBEAT_MS) &&
             set_int(socket, ZMQ_HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS);
    /* MANUAL: a subscription counts when we say so, which is for keys that are still on the list.
     */
    if (ok)
        ok = doors[door].type == ZMQ_ROUTER ? set_int(socket, ZMQ_ROUTER_MANDATORY, 1)
                                            : set_int(socket, ZMQ_XPUB_MANUAL, 1);
    if (!ok)
        return PML_FAIL(err, PML_IO, "cannot make the socket %s: %s", doors[door].name,
                        zmq_strerror(zmq_errno()));
    return bind_door(hub, door, folder, err);
}

pml_status pml_hub_new(const char *folder, pml_hub **out, pml_error *err)
{
    *out = NULL;
    pml_hub *hub = calloc(1, sizeof *hub);
    if (hub == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the sockets");
    pml_status status = PML_OK;
    hub->context = zmq_ctx_new();
    if (hub->context == NULL)
        status = PML_FAIL(err, PML_INTERNAL, "cannot start libzmq: %s", zmq_strerror(zmq_errno()));
    if (status == PML_OK)
        status = pml_keypair_new(&hub->keys, err);
    if (status == PML_OK)
        status = pmli_zap_new(hub->context, &hub->zap, err);
    if (status == PML_OK)
        status = pmli_guests_new(&hub->guests, err);
    for (int door = 0; door < PML_DOORS && status == PML_OK; door++)
        status = open_door(hub, (pml_door)door, folder, err);
    if (status != PML_OK)
        pml_hub_destroy(&hub);
    *out = hub;
    return status;
}

bool pml_hub_is_open(const pml_hub *hub)
{
    bool open = true;
    for (int door = 0; door < PML_DOORS; door++)
        open = open && access(hub->endpoints[door] + strlen("ipc://"), F_OK) == 0;
    return open;
}

/* What listened there listens on, unheard, and costs a descriptor: libzmq would end it in its own
 * time, and remove whatever has the socket's name then, which would be the new one. */
pml_status pml_hub_open_again(pml_hub *hub, const char *folder, pml_error *err)
{
    pml_status status = PML_OK;
    for (int door = 0; door < PML_DOORS && status == PML_OK; door++)
        if (access(hub->endpoints[door] + strlen("ipc://"), F_OK) != 0)
            status = bind_door(hub, (pml_door)door, folder, err);
    return status;
}

void pml_hub_destroy(pml_hub **out)
{
    pml_hub *hub = *out;
    if (hub == NULL)
        return;
    *out = NULL;
    if (hub->kept.there)
        zmq_msg_close(&hub->kept.frame);
    for (int door = 0; door < PML_DOORS; door++) {
        if (hub->monitors[door] != NULL)
            zmq_close(hub->monitors[door]);
        if (hub->sockets[door] != NULL)
            zmq_close(hub->sockets[door]);
    }
    pmli_zap_destroy(&hub->zap);
    pmli_guests_destroy(&hub->guests);
    if (hub->context != NULL)
        zmq_ctx_term(hub->context);
    pml_keypair_forget(&hub->keys);
    free(hub);
}

const char *pml_hub_endpoint(const pml_hub *hub, pml_door door)
{
    return hub->endpoints[door];
}

const char *pml_hub_server_key(const pml_hub *hub)
{
    return hub->keys.public_key;
}

pml_status pml_hub_allow(pml_hub *hub, const char *public_key, pml_role role, int tag,
                         pml_error *err)
{
    return pmli_zap_allow(hub->zap, public_key, role, tag, err);
}

bool pml_hub_knows(const pml_hub *hub, const char *public_key)
{
    int tag;
    return pmli_zap_role(hub->zap, public_key, &tag) != PML_ROLE_NOBODY;
}

pml_status pml_hub_revoke(pml_hub *hub, const char *public_key, pml_error *err)
{
    pml_status status = pmli_zap_revoke(hub->zap, public_key, err);
    if (status == PML_OK)
        pmli_guests_turn_out(hub->guests, public_key);
    return status;
}

pml_refusals pml_hub_refusals(const pml_hub *hub)
{
    return (pml_refusals){.keys = hub->refused_keys,
                          .handshakes = hub->refused_handshakes,
                          .connections = pmli_guests_refused(hub->guests),
                          .viewers = pmli_guests_crowded(hub->guests),
                          .turned_out = pmli_guests_turned_out(hub->guests)};
}

/* ---- the network ---- */

static pml_status bind_network(pml_hub *hub, pml_door door, const pml_address *a, pml_error *err)
{
    void *socket = hub->sockets[door];
    char port[16] = "*", endpoint[PML_ENDPOINT_MAX];
    if (a->port != 0)
        snprintf(port, sizeof port, "%ld", a->port + (door == PML_DOOR_TELEMETRY));
    snprintf(endpoint, sizeof endpoint, a->six ? "tcp://[%s]:%s" : "tcp://%s:%s", a->host, port);
    bool bound = set_int(socket, ZMQ_IPV6, a->six) && zmq_bind(socket, endpoint) == 0;
    for (int i = 1; i < BIND_TRIES && !bound && zmq_errno() == EADDRINUSE; i++) {
        pml_clock_sleep(bind_pause);
        bound = zmq_bind(socket, endpoint) == 0;
    }
    size_t size = PML_ENDPOINT_MAX;
    if (bound && zmq_getsockopt(socket, ZMQ_LAST_ENDPOINT, hub->network[door], &size) == 0)
        return PML_OK;
    hub->network[door][0] = '\0';
    return PML_FAIL(err, PML_IO, "cannot listen on %s: %s", endpoint, zmq_strerror(zmq_errno()));
}

pml_status pml_hub_listen(pml_hub *hub, const char *bind, pml_reach *reach, pml_error *err)
{
    pml_address address;
    pml_status status = pml_reach_parse(bind, &address, err);
    if (status != PML_OK)
        return status;
    if (hub->network[PML_DOOR_CONTROL][0] != '\0')
        return PML_FAIL(err, PML_BUSY, "it listens on %s already: end that first",
                        hub->network[PML_DOOR_CONTROL]);
    status = bind_network(hub, PML_DOOR_CONTROL, &address, err);
    if (status == PML_OK)
        status = bind_network(hub, PML_DOOR_TELEMETRY, &address, err);
    if (status != PML_OK)
        pml_hub_unlisten(hub);
    else
        *reach = address.reach;
    return status;
}

void pml_hub_unlisten(pml_hub *hub)
{
    for (int door = 0; door < PML_DOORS; door++) {
        if (hub->network[door][0] != '\0')
            zmq_unbind(hub->sockets[door], hub->network[door]);
        hub->network[door][0] = '\0';
    }
}

const char *pml_hub_network(const pml_hub *hub, pml_door door)
{
    return hub->network[door];
}

/* ---- who comes and who is waited for ---- */

/* An event has two frames: its number (16 bit) with a value (32 bit), and the endpoint. */
static void take_news(pml_hub *hub, void *monitor, double now)
{
    uint8_t frame[16];
    while (zmq_recv(monitor, frame, sizeof frame, ZMQ_DONTWAIT) >= 0) {
        uint16_t event;
        uint32_t value;
        memcpy(&event, frame, sizeof event);
        memcpy(&value, frame + sizeof event, sizeof value);
        if (event == ZMQ_EVENT_ACCEPTED)
            pmli_guests_arrived(hub->guests, (int)value, now);
        else if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
            hub->refused_keys++;
        else
            hub->refused_handshakes++;
        char endpoint[PML_ENDPOINT_MAX];
        zmq_recv(monitor, endpoint, sizeof endpoint, ZMQ_DONTWAIT);
    }
}

static void take_all_news(pml_hub *hub, double now)
{
    for (int door = 0; door < PML_DOORS; door++)
        take_news(hub, hub->monitors[door], now);
}

/* The role of a message's sender now; one whose key was revoked is shut out. A connection may have
 * been accepted since the news was taken: its news is there before its messages are. */
static pml_role sender(pml_hub *hub, zmq_msg_t *frame, const pml_peer *peer, bool guest, int *tag,
                       pmli_hearing *hearing, pml_crowd *crowd)
{
    const char *key = zmq_msg_gets(frame, "User-Id");
    pml_role role = pmli_zap_role(hub->zap, key, tag);
    int fd = guest ? zmq_msg_get(frame, ZMQ_SRCFD) : -1;
    *hearing = PMLI_HEARD;
    if (guest && fd >= 0) {
        if (!pmli_guests_knows(hub->guests, fd))
            take_all_news(hub, pml_clock_monotonic());
        *hearing = pmli_guests_spoke(hub->guests, fd, peer, key == NULL ? "" : key, role,
                                     pml_clock_monotonic(), crowd);
        if (role == PML_ROLE_NOBODY)
            pmli_guests_close(hub->guests, fd);
    }
    return role;
}

/* Subscriptions to everything, of keys on the list and on connections that can be shut down when
 * their key is revoked; whatever else a viewer sends here is dropped. */
static void take_subscriptions(pml_hub *hub)
{
    void *socket = hub->sockets[PML_DOOR_TELEMETRY];
    for (int i = 0; i < REQUESTS_AT_ONCE; i++) {
        zmq_msg_t frame;
        int tag;
        pmli_hearing hearing;
        pml_crowd crowd; /* whoever is one too many here is not told, but at the other door */
        zmq_msg_init(&frame);
        if (zmq_msg_recv(&frame, socket, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&frame);
            return;
        }
        pml_role role = sender(hub, &frame, NULL, true, &tag, &hearing, &crowd);
        int fd = zmq_msg_get(&frame, ZMQ_SRCFD);
        const char *bytes = zmq_msg_data(&frame);
        size_t size = zmq_msg_size(&frame);
        if (size != 1 || (bytes[0] != 0 && bytes[0] != 1))
            (void)pmli_guests_blame(hub->guests, fd, NULL, pml_clock_monotonic());
        else if (bytes[0] == 1 && role != PML_ROLE_NOBODY && hearing == PMLI_HEARD &&
                 pmli_guests_knows(hub->guests, fd))
            zmq_setsockopt(socket, ZMQ_SUBSCRIBE, "", 0); /* for the one that it came from */
        zmq_msg_close(&frame);
    }
}

pml_status pml_hub_wait(pml_hub *hub, struct pollfd *more, size_t n, int timeout_ms, pml_error *err)
{
    zmq_pollitem_t items[2 * PML_DOORS + MORE_MAX];
    if (n > MORE_MAX)
        return PML_FAIL(err, PML_INTERNAL, "too many descriptors to wait for");
    for (int door = 0; door < PML_DOORS; door++) {
        items[2 * door] = (zmq_pollitem_t){hub->sockets[door], 0, ZMQ_POLLIN, 0};
        items[2 * door + 1] = (zmq_pollitem_t){hub->monitors[door], 0, ZMQ_POLLIN, 0};
    }
    for (size_t i = 0; i < n; i++)
        items[2 * PML_DOORS + i] = (zmq_pollitem_t){NULL, more[i].fd, ZMQ_POLLIN, 0};
    if (zmq_poll(items, 2 * PML_DOORS + (int)n, timeout_ms) < 0 && zmq_errno() != EINTR)
        return PML_FAIL(err, PML_INTERNAL, "cannot wait for messages: %s",
                        zmq_strerror(zmq_errno()));
    for (size_t i = 0; i < n; i++)
        more[i].revents = items[2 * PML_DOORS + i].revents != 0 ? POLLIN : 0;
    double now = pml_clock_monotonic();
    take_all_news(hub, now);
    if (now - hub->swept_at >= sweep_seconds) {
        pmli_guests_sweep(hub->guests, now);
        hub->swept_at = now;
    }
    take_subscriptions(hub);
    pmli_guests_waited(hub->guests);
    hub->left = REQUESTS_AT_ONCE;
    return PML_OK;
}

static void drop_rest(void *socket)
{
    for (;;) {
        int more = 0;
        size_t length = sizeof more;
        if (zmq_getsockopt(socket, ZMQ_RCVMORE, &more, &length) != 0 || !more)
            return;
        zmq_recv(socket, NULL, 0, 0);
    }
}

/* An acknowledgement that is lost would never come again, so what has been received stays. NULL:
 * what that one says is not heard. */
static pml_status hand_out(pml_hub *hub, pml_inbound **inbound, pml_error *err)
{
    zmq_msg_t *frame = &hub->kept.frame;
    size_t n = hub->kept.several ? 0 : zmq_msg_size(frame);
    pml_inbound *in = malloc(sizeof *in + n + 1);
    if (in == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to receive a message: it is tried again");
    pmli_hearing hearing;
    pml_crowd crowd;
    *in = (pml_inbound){.door = hub->kept.door, .peer = hub->kept.peer, .size = n};
    in->role = sender(hub, frame, &in->peer, doors[in->door].clients, &in->tag, &hearing, &crowd);
    in->hurried = hearing == PMLI_HURRIED;
    if (hearing == PMLI_CROWDED)
        in->crowd = crowd;
    in->socket = zmq_msg_get(frame, ZMQ_SRCFD);
    memcpy(in->text, zmq_msg_data(frame), n);
    in->text[n] = '\0';
    zmq_msg_close(frame);
    hub->kept.there = false;
    if (hearing == PMLI_UNHEARD) {
        free(in);
        in = NULL;
    }
    *inbound = in;
    return PML_OK;
}

static pml_status receive_at(pml_hub *hub, pml_door door, pml_inbound **inbound, pml_error *err)
{
    void *socket = hub->sockets[door];
    pml_peer peer;
    int size = zmq_recv(socket, peer.id, PML_PEER_MAX, ZMQ_DONTWAIT);
    if (size < 0 && (zmq_errno() == EAGAIN || zmq_errno() == EINTR))
        return PML_TIMEOUT;
    if (size < 0 || size > PML_PEER_MAX)
        return PML_FAIL(err, PML_INTERNAL, "cannot receive: %s", zmq_strerror(zmq_errno()));
    peer.size = (uint8_t)size;
    zmq_msg_t *frame = &hub->kept.frame;
    zmq_msg_init(frame);
    if (zmq_msg_recv(frame, socket, 0) < 0) {
        zmq_msg_close(frame);
        return PML_FAIL(err, PML_INTERNAL, "cannot receive: %s", zmq_strerror(zmq_errno()));
    }
    hub->kept.several = zmq_msg_more(frame) != 0;
    drop_rest(socket);
    hub->kept.door = door;
    hub->kept.peer = peer;
    hub->kept.there = true;
    return hand_out(hub, inbound, err);
}

pml_status pml_hub_receive(pml_hub *hub, pml_inbound **inbound, pml_error *err)
{
    *inbound = NULL;
    pml_status status = PML_TIMEOUT;
    if (hub->kept.there)
        status = hand_out(hub, inbound, err);
    if (status == PML_TIMEOUT || (status == PML_OK && *inbound == NULL))
        status = receive_at(hub, PML_DOOR_WORKER, inbound, err);
    while ((status == PML_TIMEOUT || (status == PML_OK && *inbound == NULL)) && hub->left > 0) {
        hub->left--;
        status = receive_at(hub, PML_DOOR_CONTROL, inbound, err);
        if (status == PML_TIMEOUT)
            break;
    }
    return status == PML_OK && *inbound == NULL ? PML_TIMEOUT : status;
}

bool pml_hub_reads(pml_hub *hub, const pml_inbound *in)
{
    return in->socket < 0 || pmli_guests_reads(hub->guests, in->socket, &in->peer);
}

pml_blame pml_hub_blame(pml_hub *hub, const pml_inbound *in)
{
    static const pml_blame words[] = {[PMLI_LET_BE] = PML_BLAME_NOTED,
                                      [PMLI_LAST_WORD] = PML_BLAME_LAST,
                                      [PMLI_TURNED_OUT] = PML_BLAME_OUT};
    if (!doors[in->door].clients || in->socket < 0)
        return PML_BLAME_NOTED;
    return words[pmli_guests_blame(hub->guests, in->socket, &in->peer, pml_clock_monotonic())];
}

pml_status pml_hub_send(pml_hub *hub, pml_door door, const pml_peer *peer, const char *text,
                        size_t size, pml_error *err)
{
    void *socket = hub->sockets[door];
    if (zmq_send(socket, peer->id, peer->size, ZMQ_SNDMORE | ZMQ_DONTWAIT) >= 0 &&
        zmq_send(socket, text, size, ZMQ_DONTWAIT) >= 0)
        return PML_OK;
    if (zmq_errno() == EHOSTUNREACH)
        return PML_FAIL(err, PML_PEER, "the peer is gone");
    if (zmq_errno() == EAGAIN)
        return PML_FAIL(err, PML_BUSY, "the peer does not read");
    return PML_FAIL(err, PML_INTERNAL, "cannot send: %s", zmq_strerror(zmq_errno()));
}

pml_status pml_hub_publish(pml_hub *hub, const char *text, size_t size, pml_error *err)
{
    if (zmq_send(hub->sockets[PML_DOOR_TELEMETRY], text, size, ZMQ_DONTWAIT) < 0)
        return PML_FAIL(err, PML_INTERNAL, "cannot publish: %s", zmq_strerror(zmq_errno()));
    return PML_OK;
}
