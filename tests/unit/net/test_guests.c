/* Guests of a hub: doors on a network, keys that are revoked, too many connections, too many
 * messages, viewers that do not read. */
#include <arpa/inet.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "../../../engine/src/net/guests.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/net/client.h"
#include "pml/net/hub.h"

static const double patience = 60;

typedef struct house {
    char root[64];
    pml_hub *hub;
} house;

static int set_up(void **state)
{
    house *h = calloc(1, sizeof *h);
    snprintf(h->root, sizeof h->root, "/tmp/pml-test-XXXXXX");
    assert_non_null(mkdtemp(h->root));
    assert_int_equal(pml_hub_new(h->root, &h->hub, NULL), PML_OK);
    *state = h;
    return 0;
}

static int tear_down(void **state)
{
    house *h = *state;
    pml_hub_destroy(&h->hub);
    pml_tree_remove("/tmp", h->root + 5, NULL);
    free(h);
    return 0;
}

static void listen_on_loopback(house *h)
{
    pml_reach reach;
    assert_int_equal(pml_hub_listen(h->hub, "tcp://127.0.0.1:*", &reach, NULL), PML_OK);
    assert_int_equal(reach, PML_REACH_LOOPBACK);
}

static pml_keypair a_key(house *h, pml_role role)
{
    pml_keypair keys;
    assert_int_equal(pml_keypair_new(&keys, NULL), PML_OK);
    assert_int_equal(pml_hub_allow(h->hub, keys.public_key, role, 0, NULL), PML_OK);
    return keys;
}

static pml_client *a_client(house *h, const pml_keypair *keys, bool network)
{
    pml_connection c = {.pid = 1, .keys = *keys};
    pml_client *client;
    const char *control = network ? pml_hub_network(h->hub, PML_DOOR_CONTROL)
                                  : pml_hub_endpoint(h->hub, PML_DOOR_CONTROL);
    const char *telemetry = network ? pml_hub_network(h->hub, PML_DOOR_TELEMETRY)
                                    : pml_hub_endpoint(h->hub, PML_DOOR_TELEMETRY);
    snprintf(c.control, sizeof c.control, "%s", control);
    snprintf(c.telemetry, sizeof c.telemetry, "%s", telemetry);
    snprintf(c.server_key, sizeof c.server_key, "%s", pml_hub_server_key(h->hub));
    assert_int_equal(pml_client_connect(&c, &client, NULL), PML_OK);
    return client;
}

/* Serve until the client has a message of this kind: publishes, and answers every request with the
 * name of the sender's role. */
static pml_received *serve_until(house *h, pml_client *client, pml_received_kind kind)
{
    for (double end = pml_clock_monotonic() + patience; pml_clock_monotonic() < end;) {
        pml_inbound *in;
        pml_received *r;
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 5, NULL), PML_OK);
        while (pml_hub_receive(h->hub, &in, NULL) == PML_OK) {
            const char *role = pml_role_name(in->role);
            pml_hub_send(h->hub, in->door, &in->peer, role, strlen(role), NULL);
            free(in);
        }
        assert_int_equal(pml_hub_publish(h->hub, "news", 4, NULL), PML_OK);
        while (client != NULL && pml_client_receive(client, 0, &r, NULL) == PML_OK) {
            if (r->kind == kind)
                return r;
            free(r);
        }
    }
    fail_msg("no message of kind %d", kind);
    return NULL;
}

static void expect(house *h, pml_client *client, pml_received_kind kind, const char *text)
{
    pml_received *r = serve_until(h, client, kind);
    if (text != NULL)
        assert_string_equal(r->text, text);
    free(r);
}

static int connect_to(const char *endpoint)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    a.sin_port = htons((uint16_t)atoi(strrchr(endpoint, ':') + 1));
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

static long resident_kib(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%*d %ld", &pages), 1);
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void doors_on_a_network_open_and_close(void **state)
{
    house *h = *state;
    pml_reach reach;
    pml_error err = PML_ERROR_INIT;
    assert_string_equal(pml_hub_network(h->hub, PML_DOOR_CONTROL), "");
    assert_int_equal(pml_hub_listen(h->hub, "tcp://203.0.113.7:5", &reach, &err), PML_IO);
    assert_string_equal(pml_hub_network(h->hub, PML_DOOR_TELEMETRY), "");
    for (int round = 0; round < 3; round++) {
        listen_on_loopback(h);
        assert_string_equal(pml_hub_network(h->hub, PML_DOOR_WORKER), "");
        assert_int_equal(pml_hub_listen(h->hub, "tcp://127.0.0.1:*", &reach, &err), PML_BUSY);
        pml_keypair view = a_key(h, PML_ROLE_VIEW);
        pml_client *client = a_client(h, &view, true);
        assert_int_equal(pml_client_send(client, "who am I", 8, NULL), PML_OK);
        expect(h, client, PML_RECEIVED_ANSWER, "view");
        expect(h, client, PML_RECEIVED_EVENT, "news");
        char endpoint[PML_ENDPOINT_MAX];
        snprintf(endpoint, sizeof endpoint, "%s", pml_hub_network(h->hub, PML_DOOR_CONTROL));
        pml_hub_unlisten(h->hub);
        int fd = 0;
        for (int i = 0; i < 500 && fd >= 0; i++) {
            fd = connect_to(endpoint);
            if (fd >= 0)
                close(fd);
            pml_hub_wait(h->hub, NULL, 0, 5, NULL);
        }
        assert_int_equal(fd, -1);
        pml_client_close(&client);
    }
    /* One port for two: the next one is that of the events. It may be somebody's: neither opens. */
    char bind[64];
    pml_status status = PML_IO;
    int port = 0;
    for (int i = 0; i < 20 && status == PML_IO; i++) {
        listen_on_loopback(h);
        port = atoi(strrchr(pml_hub_network(h->hub, PML_DOOR_CONTROL), ':') + 1);
        pml_hub_unlisten(h->hub);
        snprintf(bind, sizeof bind, "tcp://127.0.0.1:%d", port);
        status = pml_hub_listen(h->hub, bind, &reach, &err);
        assert_int_equal(status == PML_OK, pml_hub_network(h->hub, PML_DOOR_CONTROL)[0] != '\0');
    }
    assert_int_equal(status, PML_OK);
    assert_string_equal(pml_hub_network(h->hub, PML_DOOR_CONTROL), bind);
    snprintf(bind, sizeof bind, "tcp://127.0.0.1:%d", port + 1);
    assert_string_equal(pml_hub_network(h->hub, PML_DOOR_TELEMETRY), bind);
}

/* On an established connection: it ends, nothing more is told, and the key does not come back in.
 * The other key notices nothing. */
/* It came after the news of connections was taken, and was heard before more of it was. */
static void who_just_came_is_out_too(void **state)
{
    house *h = *state;
    listen_on_loopback(h);
    pml_keypair gone = a_key(h, PML_ROLE_VIEW);
    assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 0, NULL), PML_OK);
    pml_client *a = a_client(h, &gone, true);
    assert_int_equal(pml_client_send(a, "x", 1, NULL), PML_OK);
    pml_inbound *in = NULL;
    for (double end = pml_clock_monotonic() + patience;
         pml_hub_receive(h->hub, &in, NULL) != PML_OK && pml_clock_monotonic() < end;)
        pml_clock_sleep(0.05);
    assert_non_null(in);
    assert_int_equal(in->role, PML_ROLE_VIEW);
    free(in);
    assert_int_equal(pml_hub_revoke(h->hub, gone.public_key, NULL), PML_OK);
    bool down = false;
    for (double end = pml_clock_monotonic() + patience; !down && pml_clock_monotonic() < end;) {
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 5, NULL), PML_OK);
        assert_int_equal(pml_hub_receive(h->hub, &in, NULL), PML_TIMEOUT); /* not a word more */
        pml_received *r;
        if (pml_client_receive(a, 0, &r, NULL) == PML_OK) {
            down = r->kind == PML_RECEIVED_DOWN;
            free(r);
        }
    }
    assert_true(down);
    pml_client_close(&a);
}

static void a_revoked_key_is_out_at_once(void **state)
{
    house *h = *state;
    for (int network = 0; network < 2; network++) {
        if (network)
            listen_on_loopback(h);
        pml_keypair gone = a_key(h, PML_ROLE_CONTROL), stays = a_key(h, PML_ROLE_VIEW);
        pml_client *a = a_client(h, &gone, network), *b = a_client(h, &stays, network);
        assert_int_equal(pml_client_send(a, "x", 1, NULL), PML_OK);
        assert_int_equal(pml_client_send(b, "x", 1, NULL), PML_OK);
        expect(h, a, PML_RECEIVED_ANSWER, "control");
        expect(h, b, PML_RECEIVED_ANSWER, "view");
        expect(h, a, PML_RECEIVED_EVENT, NULL);
        expect(h, b, PML_RECEIVED_EVENT, NULL);
        /* What is under way when the key goes comes as nobody's. */
        assert_int_equal(pml_client_send(a, "pause", 5, NULL), PML_OK);
        pml_clock_sleep(0.2);
        assert_int_equal(pml_hub_revoke(h->hub, gone.public_key, NULL), PML_OK);
        assert_int_equal(pml_hub_revoke(h->hub, gone.public_key, NULL), PML_NOT_FOUND);
        pml_inbound *in = NULL;
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 100, NULL), PML_OK);
        while (pml_hub_receive(h->hub, &in, NULL) == PML_OK) {
            if (strcmp(in->text, "pause") == 0)
                assert_int_equal(in->role, PML_ROLE_NOBODY);
            free(in);
        }
        expect(h, a, PML_RECEIVED_DOWN, NULL);
        expect(h, a, PML_RECEIVED_DENIED, NULL);
        pml_received *r;
        for (int i = 0; i < 20; i++) { /* and no event any more */
            assert_int_equal(pml_hub_publish(h->hub, "secret", 6, NULL), PML_OK);
            pml_hub_wait(h->hub, NULL, 0, 5, NULL);
            while (pml_client_receive(a, 0, &r, NULL) == PML_OK) {
                assert_string_not_equal(r->text, "secret");
                free(r);
            }
        }
        assert_int_equal(pml_client_send(b, "x", 1, NULL), PML_OK);
        expect(h, b, PML_RECEIVED_ANSWER, "view");
        expect(h, b, PML_RECEIVED_EVENT, NULL);
        while (pml_client_receive(b, 0, &r, NULL) == PML_OK) {
            assert_int_not_equal(r->kind, PML_RECEIVED_DOWN);
            free(r);
        }
        pml_client_close(&a);
        pml_client_close(&b);
    }
}

/* Connections that say nothing: of so many only some are kept, and a real viewer gets in. */
static void a_silent_crowd_keeps_nobody_out(void **state)
{
    house *h = *state;
    enum { CROWD = 600 };
    int fds[CROWD];
    listen_on_loopback(h);
    for (int i = 0; i < CROWD; i++) {
        fds[i] = connect_to(pml_hub_network(h->hub, PML_DOOR_CONTROL));
        assert_true(fds[i] >= 0);
        if (i % 50 == 49)
            assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 1, NULL), PML_OK);
    }
    pml_keypair view = a_key(h, PML_ROLE_VIEW);
    pml_client *client = a_client(h, &view, true);
    assert_int_equal(pml_client_send(client, "x", 1, NULL), PML_OK);
    expect(h, client, PML_RECEIVED_ANSWER, "view");
    expect(h, client, PML_RECEIVED_EVENT, NULL);
    assert_true(pml_hub_refusals(h->hub).connections >= CROWD / 2);
    pml_client_close(&client);
    for (int i = 0; i < CROWD; i++)
        close(fds[i]);
}

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

/* Faster than a viewer may: refused, and the connection of one that does not stop is cut. */
static void a_flood_is_refused(void **state)
{
    house *h = *state;
    pml_keypair view = a_key(h, PML_ROLE_VIEW);
    pml_client *client = a_client(h, &view, false);
    pml_received *r = serve_until(h, client, PML_RECEIVED_UP);
    free(r);
    int hurried = 0, well = 0;
    bool down = false;
    for (double end = pml_clock_monotonic() + patience; !down && pml_clock_monotonic() < end;) {
        pml_inbound *in;
        for (int i = 0; i < 200; i++)
            (void)pml_client_send(client, "x", 1, NULL); /* full: it waits, as told */
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 1, NULL), PML_OK);
        int taken = 0;
        for (; pml_hub_receive(h->hub, &in, NULL) == PML_OK; taken++) {
            hurried += in->hurried;
            well += !in->hurried;
            free(in);
        }
        assert_true(taken <= 256); /* a flood leaves time for other things */
        while (pml_client_receive(client, 0, &r, NULL) == PML_OK) {
            down = down || r->kind == PML_RECEIVED_DOWN;
            free(r);
        }
    }
    assert_true(down);
    assert_true(hurried > 0 && well >= 400);
    pml_client_close(&client);
}

/* A process of its own that sends `wrong` bad messages, each after the answer to the one before,
 * and then asks for what is right; ends with 0 when it was answered, and was never turned out. */
static pid_t one_who_errs(house *h, const pml_keypair *keys, int wrong)
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pml_connection c = {.pid = 1, .keys = *keys};
    snprintf(c.control, sizeof c.control, "%s", pml_hub_endpoint(h->hub, PML_DOOR_CONTROL));
    snprintf(c.server_key, sizeof c.server_key, "%s", pml_hub_server_key(h->hub));
    pml_client *client;
    pml_received *r;
    if (pml_client_connect(&c, &client, NULL) != PML_OK)
        _exit(3);
    for (int sent = 0; sent <= wrong; sent++) {
        bool answered = false;
        if (pml_client_send(client, sent < wrong ? "wrong" : "right", 5, NULL) != PML_OK)
            _exit(3);
        while (!answered) {
            if (pml_client_receive(client, (int)(patience * 1e3), &r, NULL) != PML_OK)
                _exit(4);
            if (r->kind == PML_RECEIVED_DOWN)
                _exit(1);
            answered = r->kind == PML_RECEIVED_ANSWER;
            free(r);
        }
    }
    _exit(0);
}

/* Serve until it ends: what is wrong is refused, and whoever sent it is blamed. Its status. */
static int serve_one_who_errs(house *h, pid_t pid, int *heard, int *out)
{
    int status = 0;
    *heard = *out = 0;
    for (double end = pml_clock_monotonic() + patience; pml_clock_monotonic() < end;) {
        pml_inbound *in;
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 5, NULL), PML_OK);
        while (pml_hub_receive(h->hub, &in, NULL) == PML_OK) {
            bool wrong = strcmp(in->text, "wrong") == 0;
            *heard += wrong;
            *out += wrong && pml_hub_blame(h->hub, in) == PML_BLAME_OUT;
            pml_hub_send(h->hub, in->door, &in->peer, "no", 2, NULL);
            free(in);
        }
        if (waitpid(pid, &status, WNOHANG) == pid) {
            assert_true(WIFEXITED(status));
            return WEXITSTATUS(status);
        }
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    fail_msg("it does not end");
    return -1;
}

/* Who errs now and then notices nothing, who goes on is turned out, and everybody else who has the
 * same key is let be. */
static void who_sends_what_is_wrong_is_turned_out(void **state)
{
    house *h = *state;
    int heard, out;
    pml_keypair own = a_key(h, PML_ROLE_CONTROL);
    pml_client *other = a_client(h, &own, false);
    assert_int_equal(pml_client_send(other, "x", 1, NULL), PML_OK);
    expect(h, other, PML_RECEIVED_ANSWER, "control");
    assert_int_equal(serve_one_who_errs(h, one_who_errs(h, &own, 30), &heard, &out), 0);
    assert_int_equal(heard, 30);
    assert_int_equal(out, 0);
    assert_int_equal(pml_hub_refusals(h->hub).turned_out, 0);
    assert_int_equal(serve_one_who_errs(h, one_who_errs(h, &own, 100000), &heard, &out), 1);
    assert_true(heard > 40);
    assert_int_equal(out, 1);
    assert_true(pml_hub_refusals(h->hub).turned_out >= 1);
    pml_received *r;
    while (pml_client_receive(other, 0, &r, NULL) == PML_OK) {
        assert_int_not_equal(r->kind, PML_RECEIVED_DOWN);
        free(r);
    }
    pml_client *newcomer = a_client(h, &own, false);
    assert_int_equal(pml_client_send(other, "x", 1, NULL), PML_OK);
    assert_int_equal(pml_client_send(newcomer, "x", 1, NULL), PML_OK);
    expect(h, other, PML_RECEIVED_ANSWER, "control");
    expect(h, newcomer, PML_RECEIVED_ANSWER, "control");
    pml_client_close(&newcomer);
    pml_client_close(&other);
}

/* Messages that were on their way when their sender was turned out are dropped, its next
 * connections too, until its time is over: then it is heard again. */
static void who_was_turned_out_comes_back_later(void **state)
{
    house *h = *state;
    pml_keypair own = a_key(h, PML_ROLE_CONTROL);
    pml_client *client = a_client(h, &own, false);
    pml_received *r = serve_until(h, client, PML_RECEIVED_UP);
    free(r);
    for (int i = 0; i < 200; i++)
        assert_int_equal(pml_client_send(client, "wrong", 5, NULL), PML_OK);
    int heard = 0;
    bool out = false, down = false;
    for (double end = pml_clock_monotonic() + patience; !down && pml_clock_monotonic() < end;) {
        pml_inbound *in;
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 5, NULL), PML_OK);
        while (pml_hub_receive(h->hub, &in, NULL) == PML_OK) {
            assert_false(out); /* not a word more */
            heard++;
            out = pml_hub_blame(h->hub, in) == PML_BLAME_OUT;
            free(in);
        }
        while (pml_client_receive(client, 0, &r, NULL) == PML_OK) {
            down = down || r->kind == PML_RECEIVED_DOWN;
            free(r);
        }
    }
    assert_true(out && down);
    assert_true(heard > 40 && heard <= 200);
    int64_t turned_out = pml_hub_refusals(h->hub).turned_out;
    free(serve_until(h, client, PML_RECEIVED_UP));
    assert_true(turned_out >= 1);
    assert_int_equal(pml_client_send(client, "x", 1, NULL), PML_OK);
    expect(h, client, PML_RECEIVED_ANSWER, "control");
    pml_client_close(&client);
}

/* A process that follows the run and then stops, as in a debugger or on a closed laptop. */
static pid_t stopped_viewer(house *h, const pml_keypair *keys)
{
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves nobody behind */
        pml_client *client = a_client(h, keys, true);
        pml_received *r;
        while (pml_client_receive(client, 10000, &r, NULL) == PML_OK)
            if (r->kind == PML_RECEIVED_EVENT)
                raise(SIGSTOP);
        _exit(0);
    }
    int status;
    for (double end = pml_clock_monotonic() + patience; pml_clock_monotonic() < end;) {
        pml_hub_wait(h->hub, NULL, 0, 5, NULL);
        pml_hub_publish(h->hub, "news", 4, NULL);
        if (waitpid(pid, &status, WNOHANG | WUNTRACED) == pid && WIFSTOPPED(status))
            return pid;
    }
    fail_msg("the viewer does not come up");
    return -1;
}

/* A viewer that does not read loses events; nobody waits for it, and memory does not grow with it.
 */
static void a_stopped_viewer_costs_nothing(void **state)
{
    house *h = *state;
    enum { EVENTS = 20000, SIZE = 4000 };
    static char event[SIZE];
    memset(event, 'x', sizeof event);
    listen_on_loopback(h);
    pml_keypair keys = a_key(h, PML_ROLE_VIEW);
    pid_t deaf = stopped_viewer(h, &keys);
    long before = resident_kib();
    for (int i = 0; i < EVENTS; i++)
        assert_int_equal(pml_hub_publish(h->hub, event, sizeof event, NULL), PML_OK);
/* Sanitizers keep freed memory, and shadows of it. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    (void)before;
#else
    assert_true(resident_kib() - before < 16000); /* of 80 MB: a thousand events wait for it */
#endif
    pml_client *reads = a_client(h, &keys, true);
    expect(h, reads, PML_RECEIVED_EVENT, NULL);
    pml_client_close(&reads);
    kill(deaf, SIGKILL);
    waitpid(deaf, NULL, 0);
}

int main(void)
{
#define TEST(f)  cmocka_unit_test_setup_teardown(f, set_up, tear_down)
#define PARTY(f) cmocka_unit_test_setup_teardown(f, begin_party, end_party)
    const struct CMUnitTest tests[] = {
        TEST(doors_on_a_network_open_and_close),
        TEST(a_revoked_key_is_out_at_once),
        TEST(who_just_came_is_out_too),
        TEST(a_silent_crowd_keeps_nobody_out),
        PARTY(a_looking_crowd_keeps_nobody_out),
        PARTY(a_viewer_too_many_is_told),
        PARTY(few_are_told_at_once),
        TEST(a_flood_is_refused),
        TEST(who_sends_what_is_wrong_is_turned_out),
        TEST(who_was_turned_out_comes_back_later),
        TEST(a_stopped_viewer_costs_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
