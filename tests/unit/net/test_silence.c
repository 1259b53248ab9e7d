/* Guests of a hub that are silent: who does not say who it is, does not read what it is sent, asks
 * and does not wait, or is gone without an end. */
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "guests_fixture.h"

static long resident_kib(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%*d %ld", &pages), 1);
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

/* Connections that never say who they are: one says nothing, one stops in the midst of its
 * greeting. Nobody else comes, so that only their time can end them. */
static void who_does_not_say_who_it_is_is_cut(void **state)
{
    house *h = *state;
    static const char greeting[10] = "\xff\0\0\0\0\0\0\0\1\x7f";
    bool open[2] = {true, true};
    char bytes[100];
    listen_on_loopback(h);
    int fds[2];
    for (int i = 0; i < 2; i++)
        assert_true((fds[i] = connect_to(pml_hub_network(h->hub, PML_DOOR_CONTROL))) >= 0);
    assert_int_equal(send(fds[1], greeting, sizeof greeting, 0), sizeof greeting);
    for (double end = pml_clock_monotonic() + patience;
         (open[0] || open[1]) && pml_clock_monotonic() < end;) {
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 20, NULL), PML_OK);
        for (int i = 0; i < 2; i++)
            open[i] = open[i] && recv(fds[i], bytes, sizeof bytes, MSG_DONTWAIT) != 0;
    }
    assert_false(open[0] || open[1]);
    assert_int_equal(pml_hub_refusals(h->hub).handshakes, 2);
    assert_int_equal(pml_hub_refusals(h->hub).connections, 0);
    close(fds[0]);
    close(fds[1]);
}

/* A process that asks without waiting for answers; what it can say first, as a letter on fd: that
 * all MANY have left, or that for a second none did. */
enum { MANY = 6000 };
static pid_t one_who_asks_ahead(house *h, const pml_keypair *keys, int fd)
{
    static const char text[1000] = "x";
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pml_client *client = a_client(h, keys, false);
    int stuck = 0;
    for (int sent = 0; sent < MANY && stuck < 200;) {
        if (pml_client_send(client, text, sizeof text, NULL) == PML_OK) {
            sent++;
            stuck = 0;
        } else {
            stuck++;
            pml_clock_sleep(0.005);
        }
    }
    _exit(write(fd, stuck == 200 ? "s" : "a", 1) == 1 ? 0 : 1);
}

/* While nobody reads them, requests of a client wait with the client: we would have to keep them.
 */
static void who_asks_ahead_waits_outside(void **state)
{
    house *h = *state;
    int ends[2], status;
    char said = 0;
    pml_keypair keys = a_key(h, PML_ROLE_VIEW);
    assert_int_equal(pipe(ends), 0);
    pid_t pid = one_who_asks_ahead(h, &keys, ends[1]);
    close(ends[1]);
    assert_int_equal(read(ends[0], &said, 1), 1);
    assert_int_equal(said, 's');
    close(ends[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
}

/* A process that asks for something, follows the run and then stops, as in a debugger or on a
 * closed laptop; *peer is where its answers go. */
static pid_t stopped_viewer(house *h, const pml_keypair *keys, pml_peer *peer)
{
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves nobody behind */
        pml_client *client = a_client(h, keys, true);
        pml_received *r;
        bool answered = false, told = false;
        pml_client_send(client, "x", 1, NULL);
        while (pml_client_receive(client, 10000, &r, NULL) == PML_OK) {
            answered = answered || r->kind == PML_RECEIVED_ANSWER;
            told = told || r->kind == PML_RECEIVED_EVENT;
            if (answered && told)
                raise(SIGSTOP);
        }
        _exit(0);
    }
    int status;
    for (double end = pml_clock_monotonic() + patience; pml_clock_monotonic() < end;) {
        pml_inbound *in;
        pml_hub_wait(h->hub, NULL, 0, 5, NULL);
        pml_hub_publish(h->hub, "news", 4, NULL);
        while (pml_hub_receive(h->hub, &in, NULL) == PML_OK) {
            *peer = in->peer;
            pml_hub_send(h->hub, in->door, peer, "y", 1, NULL);
            free(in);
        }
        if (waitpid(pid, &status, WNOHANG | WUNTRACED) == pid && WIFSTOPPED(status))
            return pid;
    }
    fail_msg("the viewer does not come up");
    return -1;
}

/* A viewer that does not read loses events and answers; nobody waits for it, and memory does not
 * grow with it. */
static void a_stopped_viewer_costs_nothing(void **state)
{
    house *h = *state;
    enum { EVENTS = 20000, SIZE = 4000 };
    static char event[SIZE];
    memset(event, 'x', sizeof event);
    listen_on_loopback(h);
    pml_keypair keys = a_key(h, PML_ROLE_VIEW);
    pml_peer peer;
    pid_t deaf = stopped_viewer(h, &keys, &peer);
    long before = resident_kib();
    int lost = 0;
    for (int i = 0; i < EVENTS; i++) {
        assert_int_equal(pml_hub_publish(h->hub, event, sizeof event, NULL), PML_OK);
        lost += pml_hub_send(h->hub, PML_DOOR_CONTROL, &peer, event, sizeof event, NULL) != PML_OK;
    }
    assert_true(lost > EVENTS / 2);
/* Sanitizers keep freed memory, and shadows of it. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    (void)before;
#else
    /* Of 160 MB: a thousand events and 256 answers wait for it. */
    assert_true(resident_kib() - before < 16000);
#endif
    pml_client *reads = a_client(h, &keys, true);
    expect(h, reads, PML_RECEIVED_EVENT, NULL);
    pml_client_close(&reads);
    kill(deaf, SIGKILL);
    waitpid(deaf, NULL, 0);
}

static int open_sockets(void)
{
    int n = 0;
    struct stat st;
    for (int fd = 0; fd < 1024; fd++)
        n += fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode);
    return n;
}

/* A laptop that was closed: no end comes from it, ever. Half a minute, and its places are free. */
static void a_dead_viewer_is_cut_off(void **state)
{
    house *h = *state;
    listen_on_loopback(h);
    pml_keypair keys = a_key(h, PML_ROLE_VIEW);
    pml_peer peer;
    int before = open_sockets();
    pid_t deaf = stopped_viewer(h, &keys, &peer);
    assert_int_equal(open_sockets(), before + 2);
    for (double end = pml_clock_monotonic() + 2 * patience;
         open_sockets() > before && pml_clock_monotonic() < end;)
        assert_int_equal(pml_hub_wait(h->hub, NULL, 0, 100, NULL), PML_OK);
    assert_int_equal(open_sockets(), before);
    kill(deaf, SIGKILL);
    waitpid(deaf, NULL, 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(who_does_not_say_who_it_is_is_cut),
        TEST(who_asks_ahead_waits_outside),
        TEST(a_stopped_viewer_costs_nothing),
        TEST(a_dead_viewer_is_cut_off),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
