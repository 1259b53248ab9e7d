#include "guests.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct guest {
    int fd;
    uint64_t cookie;
    pmli_origin origin;
    bool has_origin, view;  /* view: it has shown a key, and not one that steers */
    bool events;            /* at the door of events */
    bool told;              /* that it is a viewer too many; it has no key here, and goes soon */
    bool leaving;           /* the other end is closed */
    bool out;               /* shut down for what it sent, or where it comes from */
    char key[PML_KEY_TEXT]; /* "" = a stranger */
    pml_peer peer;          /* size 0 = unknown */
    double since, refilled_at;
    double tokens;  /* messages that it may send at once */
    uint64_t waits; /* as the list's, when it was given a long answer; and how many since */
    int long_answers;
} guest;

struct pmli_guests {
    guest *all; /* in the order of their arrival */
    size_t n, most;
    int64_t refused, crowded, turned_out;
    uint64_t waits;
    double tellings, told_at; /* how many may be told that they are too many; as of then */
    pmli_offenders offenders;
};

/* What was on its way when its sender was shut down is there within so many seconds. */
static const double last_words = 2;
/* Until then who was told to go has read it, or does not read. */
static const double farewell = 1;

/* Messages a second that a connection may send for long, and at once. A notebook's panel sends one
 * a second; a program that steers a run in a loop waits for each answer. */
static const struct {
    double rate, burst;
} pace[2] = {{1000, 4000}, {100, 400}}; /* control, view */

static bool cookie_of(int fd, uint64_t *cookie)
{
    socklen_t size = sizeof *cookie;
    return getsockopt(fd, SOL_SOCKET, SO_COOKIE, cookie, &size) == 0;
}

static bool is_there(const guest *g)
{
    uint64_t cookie;
    return cookie_of(g->fd, &cookie) && cookie == g->cookie;
}

static guest *find(const pmli_guests *guests, int fd)
{
    for (size_t i = 0; i < guests->n; i++)
        if (guests->all[i].fd == fd && is_there(&guests->all[i]))
            return &guests->all[i];
    return NULL;
}

static void forget(pmli_guests *guests, size_t i)
{
    guests->n--;
    memmove(&guests->all[i], &guests->all[i + 1], (guests->n - i) * sizeof *guests->all);
}

/* The duplicate stands for the socket that the cookie is compared with, whatever libzmq does with
 * the number in between. */
static void shut(const guest *g)
{
    uint64_t cookie;
    int fd = fcntl(g->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return;
    if (cookie_of(fd, &cookie) && cookie == g->cookie)
        shutdown(fd, SHUT_RDWR);
    close(fd);
}

/* Connections are accepted before we hear of them, so what the system allows is asked for: a crowd
 * must not take the descriptor with which a checkpoint is written. */
static size_t room_for_guests(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return PMLI_GUESTS_MAX;
    rlim_t wanted = limit.rlim_max < PMLI_WANTED ? limit.rlim_max : PMLI_WANTED;
    if (limit.rlim_cur < wanted) {
        struct rlimit more = {wanted, limit.rlim_max};
        if (setrlimit(RLIMIT_NOFILE, &more) == 0)
            limit.rlim_cur = wanted;
    }
    if (limit.rlim_cur >= PMLI_GUESTS_MAX + PMLI_RESERVED)
        return PMLI_GUESTS_MAX;
    return limit.rlim_cur > PMLI_RESERVED + 16 ? (size_t)limit.rlim_cur - PMLI_RESERVED : 16;
}

pml_status pmli_guests_new(pmli_guests **out, pml_error *err)
{
    size_t most = room_for_guests();
    pmli_guests *guests = calloc(1, sizeof *guests);
    if (guests != NULL)
        guests->all = calloc(most, sizeof *guests->all);
    if (guests == NULL || guests->all == NULL) {
        free(guests);
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the list of connections");
    }
    guests->most = most;
    guests->tellings = PMLI_TOLD_AT_ONCE;
    *out = guests;
    return PML_OK;
}

void pmli_guests_destroy(pmli_guests **out)
{
    if (*out != NULL)
        free((*out)->all);
    free(*out);
    *out = NULL;
}

/* The oldest stranger's place, or n when everybody is known. */
static size_t oldest_stranger(const pmli_guests *guests, size_t *strangers)
{
    size_t oldest = guests->n;
    *strangers = 0;
    for (size_t i = guests->n; i > 0; i--)
        if (guests->all[i - 1].key[0] == '\0') {
            oldest = i - 1;
            ++*strangers;
        }
    return oldest;
}

void pmli_guests_arrived(pmli_guests *guests, int fd, double now)
{
    size_t strangers, most_strangers = guests->most / 2;
    if (most_strangers > PMLI_STRANGERS_MAX)
        most_strangers = PMLI_STRANGERS_MAX;
    guest new = {.fd = fd, .since = now, .refilled_at = now, .tokens = pace[1].burst};
    if (!cookie_of(fd, &new.cookie) || find(guests, fd) != NULL)
        return; /* it has ended already; the number may be a later one's, which was told of */
    new.has_origin = pmli_origin_of(fd, &new.origin);
    if (new.has_origin && pmli_offenders_away(&guests->offenders, &new.origin, now)) {
        new.out = true;
        guests->turned_out++;
        shut(&new);
    }
    size_t oldest = oldest_stranger(guests, &strangers);
    if (strangers >= most_strangers || guests->n == guests->most) {
        pmli_guests_sweep(guests, now);
        oldest = oldest_stranger(guests, &strangers);
    }
    if (strangers >= most_strangers || guests->n == guests->most) {
        guests->refused++;
        if (oldest == guests->n) { /* full of those who are known: the new one goes */
            shut(&new);
            return;
        }
        shut(&guests->all[oldest]);
        forget(guests, oldest);
    }
    guests->all[guests->n++] = new;
}

bool pmli_guests_knows(const pmli_guests *guests, int fd)
{
    return find(guests, fd) != NULL;
}

static bool same_peer(const pml_peer *a, const pml_peer *b)
{
    return a->size == b->size && memcmp(a->id, b->id, a->size) == 0;
}

/* Whose message that is. The number of a socket that has ended is soon another's, a peer's is not:
 * last words are their speaker's, until it is forgotten. Of one that was shut down as it came no
 * peer is known yet. */
static guest *find_sender(const pmli_guests *guests, int fd, const pml_peer *peer)
{
    guest *there = NULL, *out = NULL;
    for (size_t i = 0; i < guests->n; i++) {
        guest *g = &guests->all[i];
        if (g->fd != fd)
            continue;
        if (peer != NULL && g->peer.size > 0 && same_peer(&g->peer, peer))
            return g;
        if (is_there(g))
            there = g;
        else if (g->out && g->peer.size == 0)
            out = g;
    }
    return there != NULL ? there : out;
}

static void turn_out(pmli_guests *guests, guest *g, double now)
{
    if (g->has_origin)
        pmli_offenders_turn_out(&guests->offenders, &g->origin, now);
    g->out = true;
    g->since = now;
    guests->turned_out++;
    shut(g);
}

/* Whether one more with this key at this door would be too many: of those who only look, a quarter
 * of all connections with one key, and three eighths together. With both doors that is half of all,
 * and three quarters. */
static bool count_crowd(const pmli_guests *guests, const char *key, bool events, pml_crowd *crowd)
{
    size_t same = 0, all = 0;
    for (size_t i = 0; i < guests->n; i++) {
        const guest *g = &guests->all[i];
        if (!g->view || g->leaving || g->out || g->events != events)
            continue;
        all++;
        same += strcmp(g->key, key) == 0;
    }
    crowd->any_key = same < guests->most / 4;
    crowd->viewers = (int)(crowd->any_key ? all : same);
    return !crowd->any_key || all >= guests->most / 8 * 3;
}

/* Who goes and comes again at once must find its place empty: the kernel knows that it has gone
 * before libzmq does. */
static void note_leaving(pmli_guests *guests)
{
    struct pollfd ends[PMLI_GUESTS_MAX];
    for (size_t i = 0; i < guests->n; i++)
        ends[i] = (struct pollfd){guests->all[i].fd, POLLRDHUP, 0};
    if (poll(ends, guests->n, 0) < 0)
        return;
    for (size_t i = 0; i < guests->n; i++)
        guests->all[i].leaving = ends[i].revents != 0 || !is_there(&guests->all[i]);
}

static bool is_crowded(pmli_guests *guests, const char *key, bool events, pml_crowd *crowd)
{
    if (!count_crowd(guests, key, events, crowd))
        return false;
    note_leaving(guests);
    return count_crowd(guests, key, events, crowd);
}

static bool may_tell(pmli_guests *guests, double now)
{
    guests->tellings += (now - guests->told_at) * PMLI_TOLD_RATE;
    if (guests->tellings > PMLI_TOLD_AT_ONCE)
        guests->tellings = PMLI_TOLD_AT_ONCE;
    guests->told_at = now;
    if (guests->tellings < 1)
        return false;
    guests->tellings--;
    return true;
}

static pmli_hearing send_off(pmli_guests *guests, guest *g, bool tell, double now)
{
    guests->refused++;
    guests->crowded++;
    g->since = now;
    if (tell && may_tell(guests, now)) {
        g->told = true;
        return PMLI_CROWDED;
    }
    g->out = true;
    shut(g);
    return PMLI_UNHEARD;
}

pmli_hearing pmli_guests_spoke(pmli_guests *guests, int fd, const pml_peer *peer, const char *key,
                               pml_role role, double now, pml_crowd *crowd)
{
    const bool view = role != PML_ROLE_CONTROL;
    guest *g = find_sender(guests, fd, peer);
    if (g == NULL)
        return PMLI_HEARD; /* its last words */
    if (peer != NULL)
        g->peer = *peer;
    if (g->out || g->told)
        return PMLI_UNHEARD;
    if (g->key[0] != '\0' && strcmp(g->key, key) != 0)
        return PMLI_HEARD; /* of the socket that had this number before */
    if (g->key[0] == '\0' && key[0] != '\0') {
        g->events = peer == NULL;
        if (view && is_crowded(guests, key, g->events, crowd))
            return send_off(guests, g, role == PML_ROLE_VIEW && !g->events, now);
        snprintf(g->key, sizeof g->key, "%s", key);
        g->view = view;
    }
    g->tokens += (now - g->refilled_at) * pace[view].rate;
    g->tokens = g->tokens > pace[view].burst ? pace[view].burst : g->tokens;
    g->refilled_at = now;
    if (--g->tokens >= 0)
        return PMLI_HEARD;
    if (g->tokens < -pace[view].burst) /* it does not listen either */
        turn_out(guests, g, now);
    return PMLI_HURRIED;
}

void pmli_guests_waited(pmli_guests *guests)
{
    guests->waits++;
}

/* Whoever reads has asked for this one after it had read the one before: its socket is empty. */
bool pmli_guests_reads(pmli_guests *guests, int fd, const pml_peer *peer)
{
    guest *g = find_sender(guests, fd, peer);
    if (g == NULL || !g->view)
        return true;
    if (g->waits != guests->waits)
        g->long_answers = 0;
    g->waits = guests->waits;
    struct pollfd end = {fd, POLLOUT, 0};
    return ++g->long_answers <= PMLI_LONG_AT_ONCE && poll(&end, 1, 0) == 1;
}

pmli_verdict pmli_guests_blame(pmli_guests *guests, int fd, const pml_peer *peer, double now)
{
    guest *g = find_sender(guests, fd, peer);
    if (g == NULL || g->out || !g->has_origin)
        return PMLI_LET_BE;
    pmli_verdict verdict = pmli_offenders_blame(&guests->offenders, &g->origin, now);
    if (verdict == PMLI_TURNED_OUT)
        turn_out(guests, g, now);
    return verdict;
}

void pmli_guests_close(pmli_guests *guests, int fd)
{
    guest *g = find(guests, fd);
    if (g != NULL)
        shut(g);
}

void pmli_guests_turn_out(pmli_guests *guests, const char *key)
{
    for (size_t i = 0; i < guests->n; i++)
        if (strcmp(guests->all[i].key, key) == 0)
            shut(&guests->all[i]);
}

void pmli_guests_sweep(pmli_guests *guests, double now)
{
    for (size_t i = guests->n; i > 0; i--) {
        guest *g = &guests->all[i - 1];
        if (g->told && !g->out && now - g->since >= farewell) {
            g->out = true;
            g->since = now;
            shut(g);
        }
        bool expected = g->out && now - g->since < last_words;
        if (!expected && !is_there(g))
            forget(guests, i - 1);
    }
}

size_t pmli_guests_count(const pmli_guests *guests)
{
    return guests->n;
}

int64_t pmli_guests_refused(const pmli_guests *guests)
{
    return guests->refused;
}

int64_t pmli_guests_crowded(const pmli_guests *guests)
{
    return guests->crowded;
}

int64_t pmli_guests_turned_out(const pmli_guests *guests)
{
    return guests->turned_out;
}
