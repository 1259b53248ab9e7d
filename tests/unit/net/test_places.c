/* The list of guests by itself, with a time of its own: how many find a place, who has to go, who
 * is told so, and who has to stay away. */
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "../../../engine/src/net/guests.h"

typedef struct guest {
    int fd, other; /* ends of a connection: ours, and the guest's */
    pml_peer peer;
} guest;

/* A list of connections as at a hub's doors, with a time of its own. */
typedef struct party {
    pmli_guests *guests;
    guest all[PMLI_GUESTS_MAX + 200];
    size_t n;
    double now;
    pml_crowd crowd; /* as it was told last */
} party;

static int begin_party(void **state)
{
    party *p = calloc(1, sizeof *p);
    assert_int_equal(pmli_guests_new(&p->guests, NULL), PML_OK);
    p->now = 1000;
    *state = p;
    return 0;
}

static int end_party(void **state)
{
    party *p = *state;
    pmli_guests_destroy(&p->guests);
    for (size_t i = 0; i < p->n; i++) {
        close(p->all[i].fd);
        if (p->all[i].other >= 0)
            close(p->all[i].other);
    }
    free(p);
    return 0;
}

static pmli_hearing speaks(party *p, guest *g, bool events, const char *key, pml_role role)
{
    return pmli_guests_spoke(p->guests, g->fd, events ? NULL : &g->peer, key, role, p->now,
                             &p->crowd);
}

/* One more comes to a door, and sends a message with this key. */
static pmli_hearing comes(party *p, bool events, const char *key, pml_role role)
{
    int pair[2];
    guest *g = &p->all[p->n];
    assert_true(p->n < sizeof p->all / sizeof p->all[0]);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    *g = (guest){.fd = pair[0], .other = pair[1], .peer = {.size = sizeof p->n}};
    memcpy(g->peer.id, &p->n, sizeof p->n);
    p->n++;
    pmli_guests_arrived(p->guests, g->fd, p->now);
    return speaks(p, g, events, key, role);
}

static bool sees_the_end(const guest *g)
{
    char byte;
    return recv(g->other, &byte, 1, MSG_DONTWAIT) == 0;
}

/* Viewers, as many as there can be: with one key, with others, and who steers gets in still. A door
 * that is full for them leaves the other one as it was. */
static void a_looking_crowd_keeps_nobody_out(void **state)
{
    party *p = *state;
    enum { SOME = 20 };
    for (int events = 0; events < 2; events++) {
        size_t with[4] = {0};
        for (size_t key = 0; key < 4; key++) {
            char name[] = {(char)('a' + key), '\0'};
            pml_role role = key < 3 ? PML_ROLE_VIEW : PML_ROLE_CONTROL;
            pmli_hearing heard = PMLI_HEARD;
            while (heard == PMLI_HEARD && with[key] < (key == 3 ? SOME : PMLI_GUESTS_MAX)) {
                heard = comes(p, events, name, role);
                with[key] += heard == PMLI_HEARD;
            }
            /* At the door of events nobody can be told. */
            assert_int_equal(heard, role == PML_ROLE_CONTROL ? PMLI_HEARD
                                    : events                 ? PMLI_UNHEARD
                                                             : PMLI_CROWDED);
        }
        assert_int_equal(with[0], PMLI_GUESTS_MAX / 4);
        assert_int_equal(with[1], PMLI_GUESTS_MAX / 8);
        assert_int_equal(with[2], 0);
        assert_int_equal(with[3], SOME);
        assert_int_equal(pmli_guests_refused(p->guests), 3 * (events + 1));
        assert_int_equal(pmli_guests_crowded(p->guests), 3 * (events + 1));
    }
    /* Where one has ended there is room for another, though nobody has noticed yet. */
    close(p->all[0].other);
    p->all[0].other = -1;
    assert_int_equal(comes(p, true, "a", PML_ROLE_VIEW), PMLI_UNHEARD);
    assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_HEARD);
}

/* It hears how many there are, has time to read that, and nothing more is heard of it. */
static void a_viewer_too_many_is_told(void **state)
{
    party *p = *state;
    for (int i = 0; i < PMLI_GUESTS_MAX / 4; i++)
        assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_HEARD);
    assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_CROWDED);
    assert_int_equal(p->crowd.viewers, PMLI_GUESTS_MAX / 4);
    assert_false(p->crowd.any_key);
    guest *told = &p->all[p->n - 1];
    assert_int_equal(speaks(p, told, false, "a", PML_ROLE_VIEW), PMLI_UNHEARD);
    p->now += 0.9;
    pmli_guests_sweep(p->guests, p->now);
    assert_false(sees_the_end(told));
    assert_int_equal(speaks(p, told, false, "a", PML_ROLE_VIEW), PMLI_UNHEARD);
    p->now += 0.2;
    pmli_guests_sweep(p->guests, p->now);
    assert_true(sees_the_end(told));
    assert_false(sees_the_end(told - 1));
    assert_int_equal(speaks(p, told, false, "a", PML_ROLE_VIEW), PMLI_UNHEARD);

    for (int i = 0; i < PMLI_GUESTS_MAX / 8; i++)
        assert_int_equal(comes(p, false, "b", PML_ROLE_VIEW), PMLI_HEARD);
    assert_int_equal(comes(p, false, "c", PML_ROLE_VIEW), PMLI_CROWDED);
    assert_int_equal(p->crowd.viewers, PMLI_GUESTS_MAX / 8 * 3);
    assert_true(p->crowd.any_key);
    /* Whose key went meanwhile hears nothing. */
    assert_int_equal(comes(p, false, "d", PML_ROLE_NOBODY), PMLI_UNHEARD);
}

/* However many come, only some are told: the rest sees the end at once, and is told when it comes
 * again later. */
static void few_are_told_at_once(void **state)
{
    party *p = *state;
    for (int i = 0; i < PMLI_GUESTS_MAX / 4; i++)
        assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_HEARD);
    for (int i = 0; i < PMLI_TOLD_AT_ONCE; i++)
        assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_CROWDED);
    assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_UNHEARD);
    assert_true(sees_the_end(&p->all[p->n - 1]));
    p->now += 1;
    for (int i = 0; i < PMLI_TOLD_RATE; i++)
        assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_CROWDED);
    assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_UNHEARD);
    p->now += 3600; /* nobody saves up */
    for (int i = 0; i < PMLI_TOLD_AT_ONCE; i++)
        assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_CROWDED);
    assert_int_equal(comes(p, false, "a", PML_ROLE_VIEW), PMLI_UNHEARD);
}

/* All places are taken by those who steer: one more sees the end before it has said a word, and a
 * stranger that has a place gives it up for one. */
static void a_full_house_takes_nobody(void **state)
{
    party *p = *state;
    for (int i = 0; i < PMLI_GUESTS_MAX; i++)
        assert_int_equal(comes(p, false, "a", PML_ROLE_CONTROL), PMLI_HEARD);
    assert_int_equal(pmli_guests_count(p->guests), PMLI_GUESTS_MAX);
    comes(p, false, "", PML_ROLE_NOBODY);
    assert_true(sees_the_end(&p->all[p->n - 1]));
    assert_int_equal(pmli_guests_count(p->guests), PMLI_GUESTS_MAX);
    assert_int_equal(pmli_guests_refused(p->guests), 1);
    close(p->all[0].fd);
    p->all[0].fd = -1;
    pmli_guests_sweep(p->guests, p->now);
    comes(p, false, "", PML_ROLE_NOBODY);
    guest *silent = &p->all[p->n - 1];
    assert_false(sees_the_end(silent));
    assert_int_equal(comes(p, false, "a", PML_ROLE_CONTROL), PMLI_HEARD);
    assert_true(sees_the_end(silent));
    assert_int_equal(pmli_guests_count(p->guests), PMLI_GUESTS_MAX);
    assert_int_equal(pmli_guests_refused(p->guests), 2);
}

/* Long answers do not pile up for a viewer that does not read them. */
static void who_does_not_read_gets_no_more(void **state)
{
    party *p = *state;
    static char bytes[65536];
    comes(p, false, "a", PML_ROLE_VIEW);
    guest *g = &p->all[0];
    for (int i = 0; i < PMLI_LONG_AT_ONCE; i++)
        assert_true(pmli_guests_reads(p->guests, g->fd, &g->peer));
    assert_false(pmli_guests_reads(p->guests, g->fd, &g->peer));
    pmli_guests_waited(p->guests);
    assert_true(pmli_guests_reads(p->guests, g->fd, &g->peer));
    while (send(g->fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0)
        continue;
    pmli_guests_waited(p->guests);
    assert_false(pmli_guests_reads(p->guests, g->fd, &g->peer));
    while (recv(g->other, bytes, sizeof bytes, MSG_DONTWAIT) > 0)
        continue;
    assert_true(pmli_guests_reads(p->guests, g->fd, &g->peer));
    /* Who steers may do worse. */
    comes(p, false, "b", PML_ROLE_CONTROL);
    g = &p->all[1];
    for (int i = 0; i < 10 * PMLI_LONG_AT_ONCE; i++)
        assert_true(pmli_guests_reads(p->guests, g->fd, &g->peer));
}

/* Who was turned out sees the end of its next connection before it can say a word, which would cost
 * us the arithmetic of a handshake; until its time is over. */
static void who_is_away_is_not_let_in(void **state)
{
    party *p = *state;
    assert_int_equal(comes(p, false, "a", PML_ROLE_CONTROL), PMLI_HEARD);
    guest *g = &p->all[0]; /* all are of this process, and so of one origin */
    while (pmli_guests_blame(p->guests, g->fd, &g->peer, p->now) != PMLI_TURNED_OUT)
        assert_false(sees_the_end(g));
    assert_true(sees_the_end(g));
    assert_int_equal(pmli_guests_turned_out(p->guests), 1);
    p->now += 0.9;
    assert_int_equal(comes(p, false, "a", PML_ROLE_CONTROL), PMLI_UNHEARD);
    assert_true(sees_the_end(&p->all[1]));
    assert_int_equal(pmli_guests_turned_out(p->guests), 2);
    p->now += 0.2;
    assert_int_equal(comes(p, false, "a", PML_ROLE_CONTROL), PMLI_HEARD);
    assert_false(sees_the_end(&p->all[2]));
}

/* Offenders stay away for a second, and twice as long each time; nobody for longer than half a
 * minute, and who behaved for ten minutes begins anew. */
static void who_offends_again_stays_away_longer(void **state)
{
    (void)state;
    static pmli_offenders offenders;
    const pmli_origin one = {{4, 10, 0, 0, 1}}, other = {{4, 10, 0, 0, 2}};
    static const double away[] = {1, 2, 4, 8, 16, 30, 30};
    double now = 1000;
    for (size_t i = 0; i < sizeof away / sizeof away[0]; i++) {
        pmli_offenders_turn_out(&offenders, &one, now);
        assert_true(pmli_offenders_away(&offenders, &one, now + away[i] - 0.1));
        assert_false(pmli_offenders_away(&offenders, &one, now + away[i] + 0.1));
        now += away[i] + 1;
    }
    assert_false(pmli_offenders_away(&offenders, &other, now - 1));
    now += 700;
    for (int i = 0; i < PMLI_FORGIVEN - 1; i++)
        assert_int_equal(pmli_offenders_blame(&offenders, &one, now), PMLI_LET_BE);
    assert_int_equal(pmli_offenders_blame(&offenders, &one, now), PMLI_LAST_WORD);
    assert_int_equal(pmli_offenders_blame(&offenders, &one, now), PMLI_TURNED_OUT);
    assert_false(pmli_offenders_away(&offenders, &one, now + 1.1));
    /* Of more origins than there is room for, those that were last to blame are remembered. */
    for (int i = 0; i < 2 * PMLI_ORIGINS; i++) {
        const pmli_origin many = {{4, 11, 0, (uint8_t)(i >> 8), (uint8_t)i}};
        now += 0.001;
        pmli_offenders_turn_out(&offenders, &many, now);
        assert_true(pmli_offenders_away(&offenders, &many, now));
    }
    assert_int_equal(offenders.n, PMLI_ORIGINS);
    assert_false(pmli_offenders_away(&offenders, &one, now));
}

/* One host has 2^64 addresses of IPv6 of its own. */
static void a_host_of_ipv6_is_one_origin(void **state)
{
    (void)state;
    static const pmli_origin loopback = {{6}};
    struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    socklen_t size = sizeof a;
    pmli_origin origin;
    int door = socket(AF_INET6, SOCK_STREAM, 0), fd = socket(AF_INET6, SOCK_STREAM, 0);
    if (door < 0 || bind(door, (struct sockaddr *)&a, sizeof a) != 0) {
        close(door);
        close(fd);
        skip(); /* this machine has none */
    }
    assert_int_equal(listen(door, 1), 0);
    assert_int_equal(getsockname(door, (struct sockaddr *)&a, &size), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    int there = accept(door, NULL, NULL);
    assert_true(pmli_origin_of(there, &origin));
    assert_memory_equal(&origin, &loopback,
                        sizeof origin); /* ::1 differs from it in the last bit */
    close(there);
    close(fd);
    close(door);
}

int main(void)
{
#define PARTY(f) cmocka_unit_test_setup_teardown(f, begin_party, end_party)
    const struct CMUnitTest tests[] = {
        PARTY(a_looking_crowd_keeps_nobody_out),
        PARTY(a_viewer_too_many_is_told),
        PARTY(few_are_told_at_once),
        PARTY(a_full_house_takes_nobody),
        PARTY(who_does_not_read_gets_no_more),
        PARTY(who_is_away_is_not_let_in),
        cmocka_unit_test(who_offends_again_stays_away_longer),
        cmocka_unit_test(a_host_of_ipv6_is_one_origin),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
