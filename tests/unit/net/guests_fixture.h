/* A hub with guests: what its tests share. */
#ifndef PML_TESTS_NET_GUESTS_FIXTURE_H
#define PML_TESTS_NET_GUESTS_FIXTURE_H

#include <arpa/inet.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/net/client.h"
#include "pml/net/hub.h"

static const double patience = 60;

typedef struct house {
    char root[64];
    pml_hub *hub;
} house;

static inline int set_up(void **state)
{
    house *h = calloc(1, sizeof *h);
    snprintf(h->root, sizeof h->root, "/tmp/pml-test-XXXXXX");
    assert_non_null(mkdtemp(h->root));
    assert_int_equal(pml_hub_new(h->root, &h->hub, NULL), PML_OK);
    *state = h;
    return 0;
}

static inline int tear_down(void **state)
{
    house *h = *state;
    pml_hub_destroy(&h->hub);
    pml_tree_remove("/tmp", h->root + 5, NULL);
    free(h);
    return 0;
}

static inline void listen_on_loopback(house *h)
{
    pml_reach reach;
    assert_int_equal(pml_hub_listen(h->hub, "tcp://127.0.0.1:*", &reach, NULL), PML_OK);
    assert_int_equal(reach, PML_REACH_LOOPBACK);
}

static inline pml_keypair a_key(house *h, pml_role role)
{
    pml_keypair keys;
    assert_int_equal(pml_keypair_new(&keys, NULL), PML_OK);
    assert_int_equal(pml_hub_allow(h->hub, keys.public_key, role, 0, NULL), PML_OK);
    return keys;
}

static inline pml_client *a_client(house *h, const pml_keypair *keys, bool network)
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
static inline pml_received *serve_until(house *h, pml_client *client, pml_received_kind kind)
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

static inline void expect(house *h, pml_client *client, pml_received_kind kind, const char *text)
{
    pml_received *r = serve_until(h, client, kind);
    if (text != NULL)
        assert_string_equal(r->text, text);
    free(r);
}

static inline int connect_to(const char *endpoint)
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

#endif
