/* Guests: which sockets are connected at the doors of clients, and whose key each has shown.
 *
 * libzmq neither limits connections nor closes one by its key. It tells of each that it accepts by
 * its descriptor, and each message says on which descriptor it came; the descriptor is libzmq's, so
 * a socket is told from a later one of the same number by its kernel cookie, and it is shut down
 * through a duplicate, which cannot become another socket meanwhile. libzmq sees the end of file.
 *
 * A connection that has not shown a key by a message is a stranger; of strangers the oldest has to
 * go when there are too many, so that a crowd of silent ones does not keep others out.
 *
 * Viewers come in pairs of connections, one at each door. So many pairs may have one key, and so
 * many all view keys together: whoever steers finds a place, and other keys do. At the door of
 * commands one too many is told, and has a second to hear it; meanwhile it is a stranger still. So
 * that nobody can make us write by coming again and again, some are told at once and a few each
 * second; the rest is shut down without a word, and libzmq brings it back until it is told. At the
 * door of events there is nothing to answer.
 *
 * Who sends what has to be refused, again and again, is shut down, and so is whatever comes from
 * there for a while (offenders.h). Until libzmq sees that, more of its messages may come: they are
 * unheard. */
#ifndef PML_NET_GUESTS_H
#define PML_NET_GUESTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "offenders.h"
#include "pml/net/hub.h"

typedef struct pmli_guests pmli_guests;

enum {
    PMLI_GUESTS_MAX = 1024,   /* connections, of which                     */
    PMLI_STRANGERS_MAX = 128, /* may not have sent a message yet           */
    PMLI_RESERVED = 128,      /* descriptors that connections never take   */
    PMLI_WANTED = 8192,       /* descriptors to ask the system for         */
    /* Told that they are too many: at once, and a second. Those that have not gone yet, two seconds
     * later, are half of the strangers at most. */
    PMLI_TOLD_AT_ONCE = 40,
    PMLI_TOLD_RATE = 10,
    PMLI_LONG_AT_ONCE = 4 /* long answers to a viewer before libzmq has had time to send them */
};

/* Raises the process's limit of descriptors up to PMLI_WANTED, where the system lets it; holds
 * fewer than PMLI_GUESTS_MAX connections where there are not so many descriptors. */
pml_status pmli_guests_new(pmli_guests **guests, pml_error *err);
void pmli_guests_destroy(pmli_guests **guests);

/* A connection was accepted on fd. */
void pmli_guests_arrived(pmli_guests *guests, int fd, double now);

/* Whether what is connected on fd is one of these connections. */
bool pmli_guests_knows(const pmli_guests *guests, int fd);

typedef enum pmli_hearing {
    PMLI_HEARD,
    PMLI_HURRIED, /* it came too fast after others of its connection and is to be refused */
    PMLI_CROWDED, /* of a viewer too many: it is to be told, and is shut down by a sweep   */
    PMLI_UNHEARD  /* of one that was turned out, or told: to be dropped without a word     */
} pmli_hearing;

/* A message came on fd with this key ("" = unknown) and role, of this peer (NULL at the door of
 * events). A connection that goes on in a hurry is turned out. *crowd: written at PMLI_CROWDED. */
pmli_hearing pmli_guests_spoke(pmli_guests *guests, int fd, const pml_peer *peer, const char *key,
                               pml_role role, double now, pml_crowd *crowd);

/* The caller has waited for messages: libzmq had time to send what it was given. */
void pmli_guests_waited(pmli_guests *guests);

/* Whether a long answer may go to whom a message came from on fd: not to a viewer whose socket is
 * full of what it has not read, nor so many at once that the socket had no time to become full. */
bool pmli_guests_reads(pmli_guests *guests, int fd, const pml_peer *peer);

/* A message that came on fd, of this peer, was refused for what it was. PMLI_TURNED_OUT: that was
 * one too many. PMLI_LET_BE where it has gone already. */
pmli_verdict pmli_guests_blame(pmli_guests *guests, int fd, const pml_peer *peer, double now);

/* Shut down what is connected on fd, if it is one of these connections. */
void pmli_guests_close(pmli_guests *guests, int fd);

/* Shut down the connections that have shown this key. */
void pmli_guests_turn_out(pmli_guests *guests, const char *key);

/* Forget the connections that have ended, and shut down those of viewers that were told to go. */
void pmli_guests_sweep(pmli_guests *guests, double now);

/* Connections now; those shut down so far because there were too many, of them viewers', and those
 * because of what came from there. */
size_t pmli_guests_count(const pmli_guests *guests);
int64_t pmli_guests_refused(const pmli_guests *guests);
int64_t pmli_guests_crowded(const pmli_guests *guests);
int64_t pmli_guests_turned_out(const pmli_guests *guests);

#endif
