#include "pml/net/hub.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#include "zap.h"

enum {
    HANDSHAKE_MS = 5000,   /* a connection that says nothing does not hold a descriptor longer */
    PUBLISH_AHEAD = 10000, /* events a slow viewer may be behind before it loses some          */
    LINGER_MS = 1000,
    SEAL_MAX = 64, /* what CURVE adds to a frame */
    MORE_MAX = 64
};

static const struct {
    const char *name, *domain;
    int type;
} doors[PML_DOORS] = {
    [PML_DOOR_CONTROL] = {"ctl", PMLI_ZAP_CLIENTS, ZMQ_ROUTER},
    [PML_DOOR_TELEMETRY] = {"pub", PMLI_ZAP_CLIENTS, ZMQ_PUB},
    [PML_DOOR_WORKER] = {"wrk", PMLI_ZAP_WORKERS, ZMQ_ROUTER},
};

struct pml_hub {
    void *context;
    pmli_zap *zap;
    pml_keypair keys;
    void *sockets[PML_DOORS], *monitors[PML_DOORS];
    char endpoints[PML_DOORS][PML_ENDPOINT_MAX];
    int64_t refused_keys, refused_handshakes;
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

/* Failed handshakes arrive on an inproc pair as events. */
static bool watch(pml_hub *hub, pml_door door)
{
    char name[64];
    snprintf(name, sizeof name, "inproc://monitor-%s", doors[door].name);
    int events = ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                 ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;
    if (zmq_socket_monitor(hub->sockets[door], name, events) != 0)
        return false;
    hub->monitors[door] = zmq_socket(hub->context, ZMQ_PAIR);
    return hub->monitors[door] != NULL && set_int(hub->monitors[door], ZMQ_LINGER, 0) &&
           zmq_connect(hub->monitors[door], name) == 0;
}

static pml_status open_door(pml_hub *hub, pml_door door, const char *folder, pml_error *err)
{
    void *socket = zmq_socket(hub->context, doors[door].type);
    hub->sockets[door] = socket;
    bool ok = socket != NULL && set_limits(socket) &&
              guard(socket, doors[door].domain, hub->keys.secret_key) && watch(hub, door);
    if (ok && doors[door].type == ZMQ_ROUTER)
        ok = set_int(socket, ZMQ_ROUTER_MANDATORY, 1) && set_int(socket, ZMQ_SNDHWM, PUBLISH_AHEAD);
    else if (ok)
        ok = set_int(socket, ZMQ_SNDHWM, PUBLISH_AHEAD);
    int n =
        snprintf(hub->endpoints[door], PML_ENDPOINT_MAX, "ipc://%s/%s", folder, doors[door].name);
    if (n < 0 || n - (int)strlen("ipc://") > PML_SOCKET_PATH_MAX)
        return PML_FAIL(err, PML_INVALID, "%s is too long a path for a socket", folder);
    if (!ok || zmq_bind(socket, hub->endpoints[door]) != 0)
        return PML_FAIL(err, PML_IO, "cannot open %s: %s", hub->endpoints[door],
                        zmq_strerror(zmq_errno()));
    return PML_OK;
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
    for (int door = 0; door < PML_DOORS && status == PML_OK; door++)
        status = open_door(hub, (pml_door)door, folder, err);
    if (status != PML_OK)
        pml_hub_destroy(&hub);
    *out = hub;
    return status;
}

void pml_hub_destroy(pml_hub **out)
{
    pml_hub *hub = *out;
    if (hub == NULL)
        return;
    *out = NULL;
    for (int door = 0; door < PML_DOORS; door++) {
        if (hub->monitors[door] != NULL)
            zmq_close(hub->monitors[door]);
        if (hub->sockets[door] != NULL)
            zmq_close(hub->sockets[door]);
    }
    pmli_zap_destroy(&hub->zap);
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

void pml_hub_refusals(const pml_hub *hub, int64_t *keys, int64_t *handshakes)
{
    *keys = hub->refused_keys;
    *handshakes = hub->refused_handshakes;
}

/* An event has two frames: its number (16 bit) with a value, and the endpoint. */
static void count_refusals(pml_hub *hub, void *monitor)
{
    uint8_t frame[16];
    while (zmq_recv(monitor, frame, sizeof frame, ZMQ_DONTWAIT) >= 0) {
        uint16_t event;
        memcpy(&event, frame, sizeof event);
        if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
            hub->refused_keys++;
        else
            hub->refused_handshakes++;
        char endpoint[PML_ENDPOINT_MAX];
        zmq_recv(monitor, endpoint, sizeof endpoint, ZMQ_DONTWAIT);
    }
}

pml_status pml_hub_wait(pml_hub *hub, struct pollfd *more, size_t n, int timeout_ms, pml_error *err)
{
    zmq_pollitem_t items[2 + PML_DOORS + MORE_MAX] = {
        {hub->sockets[PML_DOOR_CONTROL], 0, ZMQ_POLLIN, 0},
        {hub->sockets[PML_DOOR_WORKER], 0, ZMQ_POLLIN, 0},
    };
    if (n > MORE_MAX)
        return PML_FAIL(err, PML_INTERNAL, "too many descriptors to wait for");
    for (int door = 0; door < PML_DOORS; door++)
        items[2 + door] = (zmq_pollitem_t){hub->monitors[door], 0, ZMQ_POLLIN, 0};
    for (size_t i = 0; i < n; i++)
        items[2 + PML_DOORS + i] = (zmq_pollitem_t){NULL, more[i].fd, ZMQ_POLLIN, 0};
    if (zmq_poll(items, 2 + PML_DOORS + (int)n, timeout_ms) < 0 && zmq_errno() != EINTR)
        return PML_FAIL(err, PML_INTERNAL, "cannot wait for messages: %s",
                        zmq_strerror(zmq_errno()));
    for (size_t i = 0; i < n; i++)
        more[i].revents = items[2 + PML_DOORS + i].revents != 0 ? POLLIN : 0;
    for (int door = 0; door < PML_DOORS; door++)
        count_refusals(hub, hub->monitors[door]);
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
    zmq_msg_t frame;
    zmq_msg_init(&frame);
    if (zmq_msg_recv(&frame, socket, 0) < 0) {
        zmq_msg_close(&frame);
        return PML_FAIL(err, PML_INTERNAL, "cannot receive: %s", zmq_strerror(zmq_errno()));
    }
    bool several = zmq_msg_more(&frame) != 0;
    drop_rest(socket);
    size_t n = several ? 0 : zmq_msg_size(&frame);
    pml_inbound *in = malloc(sizeof *in + n + 1);
    if (in != NULL) {
        *in = (pml_inbound){.door = door, .peer = peer, .size = n};
        in->role = pmli_zap_role(hub->zap, zmq_msg_gets(&frame, "User-Id"), &in->tag);
        memcpy(in->text, zmq_msg_data(&frame), n);
        in->text[n] = '\0';
    }
    zmq_msg_close(&frame);
    *inbound = in;
    return in != NULL ? PML_OK : PML_FAIL(err, PML_NO_MEMORY, "no memory to receive a message");
}

pml_status pml_hub_receive(pml_hub *hub, pml_inbound **inbound, pml_error *err)
{
    *inbound = NULL;
    pml_status status = receive_at(hub, PML_DOOR_WORKER, inbound, err);
    return status == PML_TIMEOUT ? receive_at(hub, PML_DOOR_CONTROL, inbound, err) : status;
}

pml_status pml_hub_send(pml_hub *hub, pml_door door, const pml_peer *peer, const char *text,
                        size_t size, pml_error *err)
{
    void *socket = hub->sockets[door];
    if (zmq_send(socket, peer->id, peer->size, ZMQ_SNDMORE | ZMQ_DONTWAIT) >= 0 &&
        zmq_send(socket, text, size, ZMQ_DONTWAIT) >= 0)
        return PML_OK;
    if (zmq_errno() == EHOSTUNREACH || zmq_errno() == EAGAIN)
        return PML_FAIL(err, PML_PEER, "the peer is gone or does not read");
    return PML_FAIL(err, PML_INTERNAL, "cannot send: %s", zmq_strerror(zmq_errno()));
}

pml_status pml_hub_publish(pml_hub *hub, const char *text, size_t size, pml_error *err)
{
    if (zmq_send(hub->sockets[PML_DOOR_TELEMETRY], text, size, ZMQ_DONTWAIT) < 0)
        return PML_FAIL(err, PML_INTERNAL, "cannot publish: %s", zmq_strerror(zmq_errno()));
    return PML_OK;
}
