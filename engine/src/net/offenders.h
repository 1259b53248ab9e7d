/* Offenders: from where messages came that had to be refused, and who has to stay away for it.
 *
 * A refused message costs as much as one that is taken, so whoever sends many of them takes time
 * from the training beside. A few are forgiven: anybody mistypes. Who goes on is turned out and may
 * not come back for a while, twice as long each time. It is the origin that is remembered, since a
 * new connection costs nothing:
 *
 *   Unix socket   the process (its number; all of other process namespaces are one)
 *   TCP           the address; of IPv6 the first 64 bits, which one host has as many of as it likes
 *
 * not the key: on one machine all clients of a run have the same one. */
#ifndef PML_NET_OFFENDERS_H
#define PML_NET_OFFENDERS_H

#include <stdbool.h>
#include <stdint.h>

enum {
    PMLI_FORGIVEN = 40,     /* refused messages of one origin at once, and                  */
    PMLI_FORGIVEN_RATE = 2, /* a second for long: each takes 0.1 to 1 ms                     */
    PMLI_AWAY_MAX = 30,     /* seconds: who stays at most so long away may come by mistake  */
    PMLI_ORIGINS = 256      /* remembered; of more, those that behave longest are forgotten */
};

typedef struct pmli_origin {
    uint8_t bytes[17]; /* kind, address */
} pmli_origin;

/* Of what is connected on fd; false where that cannot be told (it has gone). */
bool pmli_origin_of(int fd, pmli_origin *origin);

typedef struct pmli_offender {
    pmli_origin origin;
    double left, refilled_at; /* refused messages that are forgiven still        */
    double away, until;       /* for how long it has to stay away, and until when */
} pmli_offender;

/* Zeros are an empty list. Nothing to destroy. */
typedef struct pmli_offenders {
    pmli_offender all[PMLI_ORIGINS];
    int n;
} pmli_offenders;

typedef enum pmli_verdict { PMLI_LET_BE, PMLI_LAST_WORD, PMLI_TURNED_OUT } pmli_verdict;

/* A message of this origin was refused. PMLI_LAST_WORD: the next one is too much.
 * PMLI_TURNED_OUT: this one was; from now on it is away. */
pmli_verdict pmli_offenders_blame(pmli_offenders *offenders, const pmli_origin *origin, double now);

/* It is away from now on, whatever it has sent. */
void pmli_offenders_turn_out(pmli_offenders *offenders, const pmli_origin *origin, double now);

/* Whether it has to stay away still. */
bool pmli_offenders_away(const pmli_offenders *offenders, const pmli_origin *origin, double now);

#endif
