/* Client: the other end of a coordinator, for a notebook, a shell or a test.
 *
 *   any thread ── pml_client_send ──► queue ─► I/O thread ══ DEALER ══► coordinator
 *   any thread ◄─ pml_client_receive ─ queue ◄─ I/O thread ◄═ SUB ═════ coordinator
 *                                       │
 *                                    eventfd: readable while the queue is not empty
 *
 * One I/O thread owns the sockets. It reconnects by itself, sends `alive` so that the coordinator's
 * grace time does not pass while we are here, and never calls back. All functions are thread-safe
 * except close, which must be the last call. Not usable in a child after fork(). */
#ifndef PML_NET_CLIENT_H
#define PML_NET_CLIENT_H

#include <stddef.h>

#include "pml/base/error.h"
#include "pml/net/connection.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pml_client pml_client;

typedef enum pml_received_kind {
    PML_RECEIVED_ANSWER = 0, /* text: the JSON answer to a request                         */
    PML_RECEIVED_EVENT,      /* text: a published event or heartbeat                       */
    PML_RECEIVED_UP,         /* connected and let in (again); no text                      */
    PML_RECEIVED_DOWN,       /* the coordinator is gone; we keep trying; no text           */
    PML_RECEIVED_DENIED,     /* our key is not, or no longer, on the list; text: why       */
    PML_RECEIVED_LOST        /* events were dropped, for want of a receiver or of memory: ask a
                              * replay; no text                                            */
} pml_received_kind;

typedef struct pml_received {
    pml_received_kind kind;
    size_t size; /* bytes of text, without its NUL */
    char text[];
} pml_received;

enum {
    PML_CLIENT_SEND_LIMIT = 1000,               /* requests that may wait to be sent      */
    PML_CLIENT_RECEIVE_LIMIT = 64 * 1024 * 1024 /* bytes that may wait to be received */
};

/* Connect to the coordinator of a connection file (checked as pml_connection_read does). Returns
 * before the handshake; UP, DENIED or nothing (nobody there) follows as a received message. */
pml_status pml_client_open(const char *connection_file, pml_client **client, pml_error *err);

/* The same from a connection in memory. An empty telemetry endpoint: no events, no alive. */
pml_status pml_client_connect(const pml_connection *connection, pml_client **client,
                              pml_error *err);

/* Wakes everybody in receive (they get PML_PEER), stops the thread, gives queued requests up to a
 * second to leave, closes the sockets. */
void pml_client_close(pml_client **client);

/* Queue one JSON request of size bytes; copied. PML_INVALID beyond PML_MESSAGE_MAX, PML_BUSY when
 * PML_CLIENT_SEND_LIMIT requests wait, PML_PEER when the client has failed. Whether the content is
 * right is the coordinator's to say. */
pml_status pml_client_send(pml_client *client, const char *text, size_t size, pml_error *err);

/* The next message in order of arrival (LOST comes last); the caller frees it with free(). Waits up
 * to timeout_ms (0: not at all, negative: for ever): PML_TIMEOUT. PML_NO_MEMORY behind what could
 * be kept, and from then on, when something other than an event could not be: close, connect again.
 */
pml_status pml_client_receive(pml_client *client, int timeout_ms, pml_received **received,
                              pml_error *err);

/* An eventfd, readable while messages wait. For poll or asyncio; do not read it, do not close it.
 */
int pml_client_fd(const pml_client *client);

#ifdef __cplusplus
}
#endif
#endif
