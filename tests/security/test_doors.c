/* The doors: who is not let in, what is not taken, and that the run does not notice. */
#include "harness.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"

static int64_t refused(harness *h, const char *which)
{
    pml_message *m = harness_ask(h, "status", "");
    pml_message *counts = pml_message_part(m, "refused", 0);
    int64_t n = pml_message_int(counts, which);
    pml_message_destroy(&counts);
    pml_message_destroy(&m);
    return n;
}

static void wait_refused(harness *h, const char *which, int64_t at_least)
{
    for (int i = 0; i < 10000 && refused(h, which) < at_least; i++)
        harness_receive_for(h, 0.02);
    assert_true(refused(h, which) >= at_least);
}

/* Steps go on, without a gap. */
static void undisturbed(harness *h)
{
    pml_message *m = harness_ask(h, "status", "");
    int64_t step = pml_message_int(m, "step");
    assert_string_equal(pml_message_string(m, "state"), "running");
    pml_message_destroy(&m);
    char next[32];
    snprintf(next, sizeof next, "%lld", (long long)step + 3);
    harness_event(h, 0, PML_EVENT_step, "step", next, NULL);
}

static harness *running(void)
{
    harness *h = harness_new(1, 100000, NULL);
    assert_true(harness_start(h, NULL));
    harness_event(h, 0, PML_EVENT_step, "step", "2", NULL);
    return h;
}

/* The right file with another key in it. */
static void a_strangers_key_is_refused(void **state)
{
    (void)state;
    harness *h = running();
    pml_connection c;
    pml_client *stranger;
    pml_received *r;
    assert_int_equal(pml_connection_read(h->connection_file, &c, NULL), PML_OK);
    assert_int_equal(pml_keypair_new(&c.keys, NULL), PML_OK);
    assert_int_equal(pml_client_connect(&c, &stranger, NULL), PML_OK);
    assert_int_equal(pml_client_send(stranger, "{\"type\":\"stop\",\"id\":\"x\"}", 24, NULL),
                     PML_OK);
    assert_int_equal(pml_client_receive(stranger, 200000, &r, NULL), PML_OK);
    assert_int_equal(r->kind, PML_RECEIVED_DENIED);
    free(r);
    wait_refused(h, "keys", 1);
    undisturbed(h);
    const pml_message *told = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    assert_non_null(strstr(pml_message_string(told, "message"), "turned away at the doors: "));
    assert_non_null(strstr(pml_message_string(told, "message"), "not, or no longer, on the list"));
    pml_client_close(&stranger);

    /* Our key, but meant for another coordinator. */
    pml_keypair other;
    assert_int_equal(pml_connection_read(h->connection_file, &c, NULL), PML_OK);
    assert_int_equal(pml_keypair_new(&other, NULL), PML_OK);
    memcpy(c.server_key, other.public_key, sizeof c.server_key);
    int64_t before = refused(h, "handshakes");
    assert_int_equal(pml_client_connect(&c, &stranger, NULL), PML_OK);
    wait_refused(h, "handshakes", before + 1);
    undisturbed(h);
    pml_client_close(&stranger);
    harness_destroy(&h);
}

/* A worker's door does not open for a client's key, nor the other way round. */
static void doors_are_for_their_roles(void **state)
{
    (void)state;
    harness *h = running();
    pml_connection c;
    pml_client *client;
    assert_int_equal(pml_connection_read(h->connection_file, &c, NULL), PML_OK);
    memcpy(strrchr(c.control, '/'), "/wrk", 5);
    c.telemetry[0] = '\0';
    int64_t before = refused(h, "keys");
    assert_int_equal(pml_client_connect(&c, &client, NULL), PML_OK);
    wait_refused(h, "keys", before + 1);
    undisturbed(h);
    pml_client_close(&client);
    harness_destroy(&h);
}

static int raw_connection(const harness *h, const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int n = snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", h->runtime, name);
    assert_true(n < (int)sizeof address.sun_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

/* How many lines of the log say this. */
static int said(harness *h, const char *words)
{
    int n = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++)
        if (pml_message_type_of(h->events[i]) == PML_EVENT_log)
            n += strstr(pml_message_string(h->events[i], "message"), words) != NULL;
    return n;
}

/* Bytes that are no ZMTP, a ZMTP 1.0 peer, ZMTP 3 with the NULL mechanism (no key), and a torn one.
 */
static void raw_bytes_are_refused(void **state)
{
    (void)state;
    static const char null_greeting[64] = "\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL";
    static const char *const doors[] = {"ctl", "pub", "wrk"};
    double begin = pml_clock_monotonic();
    harness *h = running();
    for (int door = 0; door < 3; door++) {
        int64_t before = refused(h, "handshakes");
        char noise[5000];
        for (size_t i = 0; i < sizeof noise; i++)
            noise[i] = (char)(i * 2654435761U >> 13);
        const struct {
            const char *bytes;
            size_t n;
        } attacks[] = {
            {noise, sizeof noise},        {"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 35},
            {"\x01\x00\x05\x00stop!", 9}, {null_greeting, sizeof null_greeting},
            {null_greeting, 20},          {"", 0},
        };
        enum { ATTACKS = sizeof attacks / sizeof attacks[0] };
        int fds[ATTACKS];
        for (size_t a = 0; a < ATTACKS; a++) {
            fds[a] = raw_connection(h, doors[door]);
            (void)send(fds[a], attacks[a].bytes, attacks[a].n, MSG_NOSIGNAL); /* refused already */
        }
        wait_refused(h, "handshakes", before + 3); /* who has left by then need not be refused */
        for (size_t a = 0; a < ATTACKS; a++)
            close(fds[a]);
        undisturbed(h);
    }
    for (int round = 0; round < 2; round++) { /* and when they are many the log has it, once */
        int64_t before = refused(h, "handshakes");
        for (int i = 0; i < 40; i++)
            close(raw_connection(h, "ctl"));
        wait_refused(h, "handshakes", before + 40);
        undisturbed(h);
    }
    int lines = said(h, "that said nothing, or did not speak the protocol");
    assert_true(lines >= 1 && lines <= 1 + (int)((pml_clock_monotonic() - begin) / 60));
    harness_destroy(&h);
}

static void expect_error(harness *h, const char *text, size_t size, const char *code)
{
    assert_int_equal(pml_client_send(h->client, text, size, NULL), PML_OK);
    for (;;) {
        pml_received *r;
        assert_int_equal(pml_client_receive(h->client, 200000, &r, NULL), PML_OK);
        if (r->kind != PML_RECEIVED_ANSWER) {
            free(r);
            continue;
        }
        pml_message *m;
        assert_int_equal(pml_message_parse(PML_CHANNEL_ANSWER, r->text, r->size, &m, NULL), PML_OK);
        assert_int_equal(pml_message_type_of(m), PML_ANSWER_error);
        assert_string_equal(pml_message_string(m, "code"), code);
        pml_message_destroy(&m);
        free(r);
        return;
    }
}

/* From somebody who has the key: an answer with a code, a count, and no harm. */
static void garbage_messages_are_answered(void **state)
{
    (void)state;
    harness *h = running();
    int64_t before = refused(h, "messages");
    static const char *const texts[] = {
        "{",
        "[]",
        "null",
        "\"stop\"",
        "{\"type\":\"stop\"}",
        "{\"type\":\"fly\",\"id\":\"1\"}",
        "{\"type\":\"set\",\"id\":\"1\",\"learning_rate\":1e999}",
        "{\"type\":\"set\",\"id\":\"1\",\"learning_rate\":\"NaN\"}",
        "{\"type\":\"replay\",\"id\":\"1\",\"from\":0}",
        "{\"type\":\"replay\",\"id\":\"1\",\"from\":-9223372036854775808}",
        "{\"type\":\"applied\",\"id\":\"1\",\"command\":1}",
        "\xff\xfe\x00\x01",
    };
    int n = (int)(sizeof texts / sizeof texts[0]);
    for (int i = 0; i < n; i++)
        expect_error(h, texts[i], strlen(texts[i]),
                     i < 4 || i == 6 || i == n - 1 ? "corrupt" : "invalid");
    char *large = malloc(PML_MESSAGE_MAX);
    memset(large, '[', PML_MESSAGE_MAX);
    expect_error(h, large, PML_REQUEST_MAX, "corrupt");
    expect_error(h, large, PML_MESSAGE_MAX, "invalid");
    unsigned random = 7;
    for (int k = 0; k < 20; k++) { /* more would turn us out: security/test_generated.c */
        size_t size = 1 + (random >> 8) % 300;
        for (size_t i = 0; i < size; i++)
            large[i] = (char)((random = random * 1664525 + 1013904223) >> 24);
        expect_error(h, large, size, "corrupt");
    }
    free(large);
    assert_true(refused(h, "messages") >= before + n + 22);
    undisturbed(h);
    harness_destroy(&h);
}

static void the_connection_file_is_ours_alone(void **state)
{
    (void)state;
    harness *h = running();
    struct stat st;
    assert_int_equal(lstat(h->connection_file, &st), 0);
    assert_true(S_ISREG(st.st_mode));
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(stat(h->runtime, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    char *run = harness_read(h, "run.json"), *log = harness_read(h, "events.jsonl");
    pml_connection c;
    assert_int_equal(pml_connection_read(h->connection_file, &c, NULL), PML_OK);
    assert_null(strstr(run, c.keys.secret_key)); /* the run folder may be on anybody's disk */
    assert_null(strstr(log, c.keys.secret_key));
    free(run);
    free(log);
    harness_destroy(&h);
}

/* Inodes of the sockets of a process, as "socket:[123]" links. */
static bool owns_socket(pid_t pid, unsigned long inode)
{
    char folder[64], link[300], want[64];
    snprintf(folder, sizeof folder, "/proc/%d/fd", (int)pid);
    snprintf(want, sizeof want, "socket:[%lu]", inode);
    DIR *dir = opendir(folder);
    bool found = false;
    for (struct dirent *e = dir == NULL ? NULL : readdir(dir); e != NULL; e = readdir(dir)) {
        ssize_t n = readlinkat(dirfd(dir), e->d_name, link, sizeof link - 1);
        link[n > 0 ? n : 0] = '\0';
        found = found || strcmp(link, want) == 0;
    }
    if (dir != NULL)
        closedir(dir);
    return found;
}

static int network_sockets(pid_t pid)
{
    static const char *const tables[] = {"/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp",
                                         "/proc/net/udp6"};
    int n = 0;
    for (int t = 0; t < 4; t++) {
        FILE *file = fopen(tables[t], "r");
        char line[512];
        unsigned long inode;
        while (file != NULL && fgets(line, sizeof line, file) != NULL)
            if (sscanf(line, " %*d: %*s %*s %*s %*s %*s %*s %*s %*s %lu", &inode) == 1 &&
                owns_socket(pid, inode))
                n++;
        if (file != NULL)
            fclose(file);
    }
    return n;
}

static void nothing_listens_on_a_network(void **state)
{
    (void)state;
    harness *h = running();
    /* The oracle sees a socket when there is one. */
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    assert_int_equal(bind(fd, (struct sockaddr *)&any, sizeof any), 0);
    assert_int_equal(listen(fd, 1), 0);
    assert_int_equal(network_sockets(getpid()), 1);
    close(fd);
    assert_int_equal(network_sockets(h->coordinator), 0);
    assert_int_equal(network_sockets(harness_worker_pid(h, 0)), 0);
    harness_destroy(&h);
}

/* No secret in what other users can see of a process. */
static void argv_and_environment_hold_no_secret(void **state)
{
    (void)state;
    harness *h = running();
    pml_connection c;
    assert_int_equal(pml_connection_read(h->connection_file, &c, NULL), PML_OK);
    pid_t pids[] = {h->coordinator, harness_worker_pid(h, 0)};
    static const char *const names[] = {"cmdline", "environ"};
    for (int i = 0; i < 4; i++) {
        char path[64], text[65536];
        snprintf(path, sizeof path, "/proc/%d/%s", (int)pids[i / 2], names[i % 2]);
        FILE *file = fopen(path, "r");
        assert_non_null(file);
        size_t n = fread(text, 1, sizeof text, file);
        fclose(file);
        assert_true(n > 0);
        assert_null(memmem(text, n, c.keys.secret_key, PML_KEY_TEXT - 1));
        assert_null(memmem(text, n, c.server_key, PML_KEY_TEXT - 1));
    }
    harness_destroy(&h);
}

/* The number of the newest event that an event or a heartbeat tells of. */
static int64_t newest_told(const char *text)
{
    static const char *const fields[] = {"{\"seq\":", "\"last\":"};
    for (int i = 0; i < 2; i++) {
        const char *at = strstr(text, fields[i]);
        if (at != NULL)
            return strtoll(at + strlen(fields[i]), NULL, 10);
    }
    fail_msg("neither an event nor a heartbeat: %s", text);
    return 0;
}

/* Where somebody else gets in with these keys, once they are shared. */
static pml_client *share_with(harness *h, const pml_keypair *keys, const char *role)
{
    char fields[300];
    pml_client *guest;
    pml_connection c = {.keys = *keys};
    snprintf(fields, sizeof fields,
             "\"bind\":\"tcp://127.0.0.1:*\",\"role\":\"%s\",\"public_key\":\"%s\"", role,
             keys->public_key);
    pml_message *shared = harness_ask(h, "share", fields);
    pml_message *where = pml_message_part(shared, "sharing", 0);
    snprintf(c.control, sizeof c.control, "%s", pml_message_string(where, "control"));
    snprintf(c.telemetry, sizeof c.telemetry, "%s", pml_message_string(where, "telemetry"));
    snprintf(c.server_key, sizeof c.server_key, "%s", pml_message_string(shared, "server_key"));
    pml_message_destroy(&where);
    pml_message_destroy(&shared);
    assert_int_equal(pml_client_connect(&c, &guest, NULL), PML_OK);
    return guest;
}

/* Steps come all the time when the key goes: none that was published since is received, and what
 * is asked then has no effect. */
static void a_key_is_revoked_in_the_midst_of_a_stream(void **state)
{
    (void)state;
    for (int control = 0; control < 2; control++) {
        static const char stop[] = "{\"type\":\"stop\",\"id\":\"late\"}";
        harness *h = running();
        pml_keypair keys;
        pml_received *r;
        char fields[100];
        assert_int_equal(pml_keypair_new(&keys, NULL), PML_OK);
        pml_client *guest = share_with(h, &keys, control ? "control" : "view");
        for (int events = 0; events < 50; free(r)) {
            assert_int_equal(pml_client_receive(guest, 200000, &r, NULL), PML_OK);
            events += r->kind == PML_RECEIVED_EVENT;
        }
        snprintf(fields, sizeof fields, "\"public_key\":\"%s\"", keys.public_key);
        pml_message *m = harness_ask(h, "unshare", fields);
        assert_int_equal(pml_message_type_of(m), PML_ANSWER_unshared);
        pml_message_destroy(&m);
        assert_int_equal(pml_client_send(guest, stop, sizeof stop - 1, NULL), PML_OK);
        m = harness_ask(h, "status", "");
        int64_t gone = pml_message_int(m, "seq");
        pml_message_destroy(&m);
        undisturbed(h);
        for (bool denied = false; !denied; free(r)) {
            assert_int_equal(pml_client_receive(guest, 200000, &r, NULL), PML_OK);
            denied = r->kind == PML_RECEIVED_DENIED;
            assert_true(r->kind != PML_RECEIVED_ANSWER || strstr(r->text, "late") == NULL);
            if (r->kind == PML_RECEIVED_EVENT)
                assert_true(newest_told(r->text) <= gone);
        }
        undisturbed(h);
        while (pml_client_receive(guest, 0, &r, NULL) == PML_OK) {
            assert_int_not_equal(r->kind, PML_RECEIVED_EVENT);
            free(r);
        }
        pml_client_close(&guest);
        harness_destroy(&h);
    }
}

/* The answer to the last request of this guest. */
static pml_message *answer_to(pml_client *guest, const char *request)
{
    pml_message *m = NULL;
    assert_int_equal(pml_client_send(guest, request, strlen(request), NULL), PML_OK);
    while (m == NULL) {
        pml_received *r;
        assert_int_equal(pml_client_receive(guest, 200000, &r, NULL), PML_OK);
        if (r->kind == PML_RECEIVED_ANSWER)
            assert_int_equal(pml_message_parse(PML_CHANNEL_ANSWER, r->text, r->size, &m, NULL),
                             PML_OK);
        free(r);
    }
    return m;
}

static void gets_in(pml_client *guest, bool in)
{
    pml_message *m = answer_to(guest, "{\"type\":\"hello\",\"id\":\"first\"}");
    assert_string_equal(pml_message_string(m, "id"), "first");
    assert_int_equal(pml_message_type_of(m), in ? PML_ANSWER_welcome : PML_ANSWER_error);
    if (!in) {
        assert_string_equal(pml_message_string(m, "code"), "busy");
        assert_int_equal(pml_message_int(m, "viewers"), 8);
        assert_non_null(strstr(pml_message_string(m, "message"), "8 viewers are connected with"));
    }
    pml_message_destroy(&m);
}

/* With few descriptors there are few places: eight for viewers with one key. Who finds none is
 * told, then shut down; the owner is told once a minute; and who has another key, or finds a place
 * again, gets in. */
static void a_viewer_too_many_is_told(void **state)
{
    (void)state;
    enum { PLACES = 8 };
    pml_client *guests[PLACES];
    pml_keypair keys, others;
    pml_received *r;
    double begin = pml_clock_monotonic();
    harness *h = harness_new(1, 100000, NULL);
    h->descriptors = 160;
    assert_true(harness_start(h, NULL));
    assert_int_equal(pml_keypair_new(&keys, NULL), PML_OK);
    assert_int_equal(pml_keypair_new(&others, NULL), PML_OK);
    for (int i = 0; i < PLACES; i++)
        gets_in(guests[i] = share_with(h, &keys, "view"), true);
    int64_t before = refused(h, "connections");
    for (int i = 0; i < 2; i++) {
        pml_client *late = share_with(h, &keys, "view");
        gets_in(late, false);
        for (bool down = false; !down; free(r)) { /* and nothing else is said to it */
            assert_int_equal(pml_client_receive(late, 200000, &r, NULL), PML_OK);
            assert_int_not_equal(r->kind, PML_RECEIVED_ANSWER);
            down = r->kind == PML_RECEIVED_DOWN;
        }
        pml_client_close(&late);
    }
    assert_true(refused(h, "connections") >= before + 2);
    int lines = said(h, "8 viewers are connected with it");
    assert_true(lines >= 1 && lines <= 1 + (int)((pml_clock_monotonic() - begin) / 60));

    pml_client *other = share_with(h, &others, "view");
    gets_in(other, true);
    pml_client_close(&other);
    pml_client_close(&guests[0]);
    gets_in(guests[0] = share_with(h, &keys, "view"), true);
    undisturbed(h);
    for (int i = 0; i < PLACES; i++)
        pml_client_close(&guests[i]);
    harness_destroy(&h);
}

/* What somebody else's run folder says is to be run is not run, with shards or without. */
static void a_folder_runs_nothing(void **state)
{
    (void)state;
    for (int resumed = 0; resumed < 2; resumed++) {
        char extra[300], marker[64] = "/tmp/pml-test-XXXXXX";
        assert_non_null(mkdtemp(marker));
        snprintf(extra, sizeof extra, "\"prepare\":[\"sh\",\"-c\",\"touch %s/was-run\"]", marker);
        harness *h = harness_new(1, 5, extra);
        assert_true(resumed ? harness_start(h, "--resume", NULL) : harness_start(h, NULL));
        harness_wait_state(h, "finished");
        harness_destroy(&h);
        assert_int_equal(rmdir(marker), 0); /* empty still */
    }
}

/* Names of files that lead out of the run folder. */
static void a_folder_names_nothing_outside(void **state)
{
    (void)state;
    static const char *const names[] = {"../x", "/etc/passwd", "data/../../x", ".", "data//x"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char extra[200];
        snprintf(extra, sizeof extra, "\"eval_data\":\"%s\"", names[i]);
        harness *h = harness_new(1, 5, extra);
        assert_false(harness_start(h, NULL));
        assert_int_equal(atoi(h->error), PML_INVALID);
        assert_non_null(strstr(h->error, "below the run folder"));
        harness_destroy(&h);
    }
    harness *h = running();
    static const char *const checkpoints[] = {"../x", "/tmp/x", "a/b", ".",
                                              "..",   "-x",     "x y", "\\n"};
    for (size_t i = 0; i < sizeof checkpoints / sizeof checkpoints[0]; i++) {
        char fields[64];
        snprintf(fields, sizeof fields, "\"name\":\"%s\"", checkpoints[i]);
        pml_message *m = harness_ask(h, "checkpoint", fields);
        if (pml_message_type_of(m) == PML_ANSWER_accepted) { /* a name of its own, in its place */
            char number[32];
            snprintf(number, sizeof number, "%lld", (long long)pml_message_int(m, "command"));
            const pml_message *made =
                harness_event(h, 0, PML_EVENT_checkpoint, "command", number, NULL);
            const char *path = pml_message_string(made, "path");
            assert_int_equal(strncmp(path, "checkpoints/step-", 17), 0);
            assert_null(strchr(path + 12, '/'));
        } else {
            assert_int_equal(pml_message_type_of(m), PML_ANSWER_error);
        }
        pml_message_destroy(&m);
    }
    undisturbed(h);
    harness_destroy(&h);
}

/* Checkpoints of a folder from somebody else are written, read and removed in it or not at all. */
static void a_link_is_not_followed(void **state)
{
    (void)state;
    char elsewhere[200], link[200];
    harness *h = harness_new(1, 5, NULL);
    snprintf(elsewhere, sizeof elsewhere, "%s/elsewhere", h->root);
    snprintf(link, sizeof link, "%s/checkpoints", h->folder);
    assert_int_equal(mkdir(elsewhere, 0700), 0);
    assert_int_equal(symlink(elsewhere, link), 0);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "failed");
    const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
    assert_non_null(strstr(pml_message_string(m, "reason"), "checkpoints is a link"));
    assert_int_equal(rmdir(elsewhere), 0); /* it is empty */
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);
    assert_false(harness_start(h, "--resume", NULL));
    assert_non_null(strstr(h->error, "checkpoints is a link"));
    assert_false(harness_start(h, "--resume", "step-000005", NULL));
    assert_non_null(strstr(h->error, "checkpoints is a link"));
    harness_destroy(&h);
}

/* What is planted, and what the coordinator says of it when it starts. */
static const struct planted {
    const char *name;
    bool folder; /* it leads to one */
} planted[] = {{"run.json", false}, {"events.jsonl", false}, {"lock", false},
               {"workers", false},  {"log", true},           {"handover.jsonl", false}};

static void put(const char *path, const char *text)
{
    assert_int_equal(pml_file_write(path, text, strlen(text), 0600, NULL), PML_OK);
}

static void expect_untouched(const char *folder)
{
    char path[PATH_MAX], *text = NULL;
    size_t size;
    snprintf(path, sizeof path, "%s/file", folder);
    assert_int_equal(pml_file_read(path, 100, false, &text, &size, NULL), PML_OK);
    assert_string_equal(text, "theirs");
    free(text);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(folder), 0); /* nothing else has come */
}

/* Links in the place of each of a run's own files and of its folder for logs. */
static void a_link_stands_in_nobodys_place(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof planted / sizeof planted[0]; i++) {
        const struct planted *p = &planted[i];
        harness *h = harness_new(1, 5, NULL);
        char elsewhere[PATH_MAX], file[PATH_MAX], link[PATH_MAX], words[200];
        snprintf(elsewhere, sizeof elsewhere, "%s/elsewhere", h->root);
        snprintf(file, sizeof file, "%s/elsewhere/file", h->root);
        snprintf(link, sizeof link, "%s/%s", h->folder, p->name);
        snprintf(words, sizeof words, "%s is a link", p->name);
        assert_int_equal(mkdir(elsewhere, 0700), 0);
        put(file, "theirs");
        unlink(link);
        assert_int_equal(symlink(p->folder ? elsewhere : file, link), 0);
        if (strcmp(p->name, "workers") == 0) { /* looked at when there is one to start */
            assert_true(harness_start(h, NULL));
            harness_wait_state(h, "failed");
            const pml_message *m = harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL);
            assert_non_null(strstr(pml_message_string(m, "reason"), words));
        } else {
            assert_false(harness_start(h, "--resume", NULL));
            if (strstr(h->error, words) == NULL)
                fail_msg("%s: %s", p->name, h->error);
        }
        if (p->folder) { /* the harness's own hand, which stands for the launcher's */
            strcat(elsewhere, "/coordinator.log");
            unlink(elsewhere);
            *strrchr(elsewhere, '/') = '\0';
        }
        expect_untouched(elsewhere);
        harness_destroy(&h);
    }
}

/* A worker's log that is one costs its words, which is told; the run goes on. */
static void a_linked_log_is_not_written(void **state)
{
    (void)state;
    harness *h = harness_new(1, 5, NULL);
    char elsewhere[PATH_MAX], file[PATH_MAX], path[PATH_MAX];
    snprintf(elsewhere, sizeof elsewhere, "%s/elsewhere", h->root);
    snprintf(file, sizeof file, "%s/elsewhere/file", h->root);
    snprintf(path, sizeof path, "%s/log", h->folder);
    assert_int_equal(mkdir(elsewhere, 0700), 0);
    put(file, "theirs");
    assert_int_equal(mkdir(path, 0700), 0);
    strcat(path, "/worker-0.log");
    assert_int_equal(symlink(file, path), 0);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    const pml_message *m = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    assert_non_null(strstr(pml_message_string(m, "message"), "worker-0.log is a link"));
    expect_untouched(elsewhere);
    harness_destroy(&h);
}

/* One in a checkpoint's place is not gone on from, and what is saved under its name takes its
 * place. */
static void a_linked_checkpoint_is_not_used(void **state)
{
    (void)state;
    char elsewhere[PATH_MAX], step[PATH_MAX], words[] = "step-000005 is a link";
    harness *h = harness_new(1, 5, NULL);
    assert_true(harness_start(h, NULL));
    harness_wait_state(h, "finished");
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);
    snprintf(elsewhere, sizeof elsewhere, "%s/elsewhere", h->root);
    snprintf(step, sizeof step, "%s/checkpoints/step-000005", h->folder);
    assert_int_equal(rename(step, elsewhere), 0);
    assert_int_equal(symlink(elsewhere, step), 0);
    assert_false(harness_start(h, "--resume", "step-000005", NULL));
    assert_non_null(strstr(h->error, words));
    assert_true(harness_start(h, "--resume", NULL)); /* from the beginning */
    harness_wait_state(h, "finished");
    harness_catch_up(h);
    const pml_message *m = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    assert_non_null(strstr(pml_message_string(m, "message"), words));
    struct stat info;
    assert_int_equal(lstat(step, &info), 0);
    assert_true(S_ISDIR(info.st_mode));
    assert_int_equal(stat(elsewhere, &info), 0);
    assert_int_equal(info.st_nlink, 2);
    strcat(elsewhere, "/MANIFEST");
    assert_int_equal(access(elsewhere, F_OK), 0);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_strangers_key_is_refused),
        cmocka_unit_test(doors_are_for_their_roles),
        cmocka_unit_test(raw_bytes_are_refused),
        cmocka_unit_test(garbage_messages_are_answered),
        cmocka_unit_test(a_key_is_revoked_in_the_midst_of_a_stream),
        cmocka_unit_test(a_viewer_too_many_is_told),
        cmocka_unit_test(a_folder_runs_nothing),
        cmocka_unit_test(a_folder_names_nothing_outside),
        cmocka_unit_test(a_link_is_not_followed),
        cmocka_unit_test(a_link_stands_in_nobodys_place),
        cmocka_unit_test(a_linked_log_is_not_written),
        cmocka_unit_test(a_linked_checkpoint_is_not_used),
        cmocka_unit_test(the_connection_file_is_ours_alone),
        cmocka_unit_test(nothing_listens_on_a_network),
        cmocka_unit_test(argv_and_environment_hold_no_secret),
    };
    setenv("FAKE_STEP_MS", "20", 1); /* a test keeps all events, and some of these take a while */
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
