/* Guests of a hub: doors on a network, keys that are revoked, too many connections, too many
 * messages, and wrong ones. */
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "guests_fixture.h"

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

/* So many keys, and not one more: each message is looked up among them. */
static void keys_are_bounded(void **state)
{
    house *h = *state;
    enum { KEYS = 2048 };
    pml_keypair keys;
    pml_error err = PML_ERROR_INIT;
    for (int i = 0; i < KEYS; i++)
        keys = a_key(h, PML_ROLE_VIEW);
    pml_keypair more;
    assert_int_equal(pml_keypair_new(&more, NULL), PML_OK);
    assert_int_equal(pml_hub_allow(h->hub, more.public_key, PML_ROLE_VIEW, 0, &err), PML_BUSY);
    assert_non_null(strstr(err.message, "revoke some"));
    assert_int_equal(pml_hub_revoke(h->hub, keys.public_key, NULL), PML_OK);
    assert_int_equal(pml_hub_allow(h->hub, more.public_key, PML_ROLE_VIEW, 0, &err), PML_OK);
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

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(doors_on_a_network_open_and_close),
        TEST(a_revoked_key_is_out_at_once),
        TEST(who_just_came_is_out_too),
        TEST(a_silent_crowd_keeps_nobody_out),
        TEST(keys_are_bounded),
        TEST(a_flood_is_refused),
        TEST(who_sends_what_is_wrong_is_turned_out),
        TEST(who_was_turned_out_comes_back_later),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
