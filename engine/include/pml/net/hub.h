/* Hub: the coordinator's sockets, in its runtime folder.
 *
 *   ctl  ROUTER  requests of clients        keys of role control and view
 *   pub  XPUB    events for clients         keys of role control and view
 *   wrk  ROUTER  reports of workers         keys of role worker
 *
 * CURVE always; a thread answers libzmq's question (ZAP, RFC 27) whether a key may come in, from
 * the list that pml_hub_allow fills. The list is asked again at each message and each subscription.
 * Clients' connections are limited in number, viewers' more than others', their messages in size
 * and rate, those that have to be refused in particular, and what waits to be sent to one that does
 * not read. Nothing listens on
 * a network but after pml_hub_listen. All other functions belong to one thread. */
#ifndef PML_NET_HUB_H
#define PML_NET_HUB_H

#include <poll.h>
#include <stdint.h>

#include "pml/net/connection.h"
#include "pml/net/reach.h"

typedef struct pml_hub pml_hub;

typedef enum pml_door {
    PML_DOOR_CONTROL = 0,
    PML_DOOR_TELEMETRY,
    PML_DOOR_WORKER,
    PML_DOORS
} pml_door;

enum { PML_PEER_MAX = 255 };

/* Where an answer goes: a connection, not a person. */
typedef struct pml_peer {
    uint8_t size;
    uint8_t id[PML_PEER_MAX];
} pml_peer;

/* As many viewers as there may be. */
typedef struct pml_crowd {
    int viewers;  /* that are connected; 0: there is room */
    bool any_key; /* with view keys of any kind; else with the one key */
} pml_crowd;

typedef struct pml_inbound {
    pml_door door;
    pml_peer peer;
    pml_role role; /* of the key, now */
    int tag;       /* as given to pml_hub_allow */
    bool hurried;  /* sent faster than a client may: to be refused */
    /* viewers > 0: its sender is one too many. It is to be told, and is shut down soon; nothing
     * more is heard of it. */
    pml_crowd crowd;
    int socket; /* libzmq's, or -1: for pml_hub_blame */
    size_t size;
    char text[]; /* with a NUL behind */
} pml_inbound;

/* Bind the three sockets in folder (pml_runtime_create), with a new server key. */
pml_status pml_hub_new(const char *folder, pml_hub **hub, pml_error *err);

/* Whether the doors can still be found: the files of their sockets may have been removed. Those
 * that cannot are opened again in `folder`; who is connected stays so. */
bool pml_hub_is_open(const pml_hub *hub);
pml_status pml_hub_open_again(pml_hub *hub, const char *folder, pml_error *err);
/* Up to a second for what is still to be sent. */
void pml_hub_destroy(pml_hub **hub);

/* Where a door listens, and the key that its server proves itself by (Z85): the hub's. */
const char *pml_hub_endpoint(const pml_hub *hub, pml_door door);
const char *pml_hub_server_key(const pml_hub *hub);

/* Let a key in for a role; tag comes back with its messages (a worker's rank). */
pml_status pml_hub_allow(pml_hub *hub, const char *public_key, pml_role role, int tag,
                         pml_error *err);

/* Whether that key is let in for any role. */
bool pml_hub_knows(const pml_hub *hub, const char *public_key);

/* Take a key off the list. Its connections are shut down at once, and what it has sent meanwhile
 * comes with PML_ROLE_NOBODY. PML_NOT_FOUND. */
pml_status pml_hub_revoke(pml_hub *hub, const char *public_key, pml_error *err);

/* Open the clients' doors on a network address too, "tcp://ADDRESS:PORT" (pml_reach_parse):
 * commands at this port, events at the next one (`*`: at any two). *reach says who can connect.
 * PML_BUSY: they are open elsewhere already; PML_IO: the address cannot be used. */
pml_status pml_hub_listen(pml_hub *hub, const char *bind, pml_reach *reach, pml_error *err);
/* Close them; connections that are there stay until their keys are revoked. */
void pml_hub_unlisten(pml_hub *hub);
/* "tcp://…" of ctl or pub, "" while they are not open. */
const char *pml_hub_network(const pml_hub *hub, pml_door door);

/* Wait until a message or one of the n descriptors (poll's events and revents) is there, or the
 * time is over, or a signal came. */
pml_status pml_hub_wait(pml_hub *hub, struct pollfd *more, size_t n, int timeout_ms,
                        pml_error *err);

/* The next message of any door without waiting, workers' first; the caller frees it with free().
 * PML_TIMEOUT: none, or so many clients' requests that it is time to wait again. PML_NO_MEMORY: it
 * comes with the next call.
 * A message of several frames comes with size 0: nobody of ours sends such. */
pml_status pml_hub_receive(pml_hub *hub, pml_inbound **inbound, pml_error *err);

typedef enum pml_blame {
    PML_BLAME_NOTED,
    PML_BLAME_LAST, /* the next one is too much: its sender may be told */
    PML_BLAME_OUT   /* it was one too many: the connection is shut down */
} pml_blame;

/* A client's message was refused for what it was: damaged, out of range, not allowed. 40 of them at
 * once, and 2 a second for long, are forgiven to a process or, from a network, an address. For one
 * more its connection is shut down, what it has sent meanwhile is dropped unheard, and nobody
 * comes in from there for a second; for 2, 4 … 30 seconds if that happens again. Workers are not
 * blamed. */
pml_blame pml_hub_blame(pml_hub *hub, const pml_inbound *in);

/* Whether a client reads what it is sent, as far as can be told. A long answer to a viewer that
 * does not would wait in memory, hundreds of them for each connection. */
bool pml_hub_reads(pml_hub *hub, const pml_inbound *in);

/* Queue one message to a peer. One that is gone (PML_PEER), or has not read for long (PML_BUSY),
 * loses it. */
pml_status pml_hub_send(pml_hub *hub, pml_door door, const pml_peer *peer, const char *text,
                        size_t size, pml_error *err);
pml_status pml_hub_publish(pml_hub *hub, const char *text, size_t size, pml_error *err);

/* What was turned away so far: handshakes by key, for want of the right protocol, connections
 * because there were too many (of them viewers', beyond what their keys may have), and those
 * because of what was sent from there. */
typedef struct pml_refusals {
    int64_t keys, handshakes, connections, viewers, turned_out;
} pml_refusals;

/* Since pml_hub_new. */
pml_refusals pml_hub_refusals(const pml_hub *hub);

#endif
