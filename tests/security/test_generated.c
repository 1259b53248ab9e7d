/* Bad messages by the thousand, made from the message table so that every field of every request is
 * hit: each is refused and counted, none has an effect. The same ones in every run.
 *
 * PML_GENERATED=10000 makes so many of them (1,000 otherwise). */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

#include "bad_requests.h"
#include "pml/base/clock.h"

/* ---- doors ---- */

/* A run that goes on as long as a test may take, and its owner's way in. */
static harness *running(pml_connection *own)
{
    harness *h = harness_new(1, 1000000, NULL);
    setenv("FAKE_STEP_MS", "20", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    assert_int_equal(pml_connection_read(h->connection_file, own, NULL), PML_OK);
    return h;
}

static void *connected(void *context, const pml_connection *c, int type, const char *endpoint)
{
    void *socket = zmq_socket(context, type);
    int linger = 0, patience = 200000;
    assert_int_equal(zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof linger), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_RCVTIMEO, &patience, sizeof patience), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, c->server_key, 40), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, c->keys.public_key, 40), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, c->keys.secret_key, 40), 0);
    assert_int_equal(zmq_connect(socket, endpoint), 0);
    return socket;
}

static void *dealer(void *context, const pml_connection *c)
{
    return connected(context, c, ZMQ_DEALER, c->control);
}

/* Send, and have an error back; its code goes into code. */
static void refused(void *socket, const text *t, char code[33])
{
    static char answer[PML_MESSAGE_MAX + 1];
    assert_int_equal(zmq_send(socket, t->bytes, t->n, 0), (int)t->n);
    int n = zmq_recv(socket, answer, sizeof answer, 0);
    pml_message *m;
    if (n < 0 || pml_message_parse(PML_CHANNEL_ANSWER, answer, (size_t)n, &m, NULL) != PML_OK)
        fail_msg("no answer to %.*s", (int)(t->n < 500 ? t->n : 500), t->bytes);
    if (pml_message_type_of(m) != PML_ANSWER_error)
        fail_msg("accepted: %.*s", (int)(t->n < 500 ? t->n : 500), t->bytes);
    snprintf(code, 33, "%s", pml_message_string(m, "code"));
    pml_message_destroy(&m);
}

static int64_t count(harness *h, const char *which)
{
    pml_message *m = harness_ask(h, "status", "");
    pml_message *counts = pml_message_part(m, "refused", 0);
    int64_t n = pml_message_int(counts, which);
    pml_message_destroy(&counts);
    pml_message_destroy(&m);
    return n;
}

/* Commands that the log has, from its end: their number. */
static int64_t commands_logged(const harness *h)
{
    char *log = harness_read(h, "events.jsonl");
    int64_t n = 0;
    for (const char *at = log; (at = strstr(at, "\"type\":\"command\"")) != NULL; at++)
        n++;
    free(log);
    return n;
}

static pml_connection view_key(harness *h, const pml_connection *own)
{
    pml_connection c = *own;
    char fields[200];
    assert_int_equal(pml_keypair_new(&c.keys, NULL), PML_OK);
    /* Z85 has neither quotes nor backslashes. */
    snprintf(fields, sizeof fields,
             "\"bind\":\"tcp://127.0.0.1:*\",\"role\":\"view\",\"public_key\":\"%s\"",
             c.keys.public_key);
    pml_message *m = harness_ask(h, "share", fields);
    assert_int_equal(pml_message_type_of(m), PML_ANSWER_shared);
    pml_message_destroy(&m);
    return c;
}

static int how_many(void)
{
    const char *wanted = getenv("PML_GENERATED");
    return wanted == NULL ? 1000 : atoi(wanted);
}

/* ---- by processes of their own: who sends many is turned out (net/offenders.h) ---- */

static const char part_option[] = "--part", flood_option[] = "--flood";

/* The numbers from `from` to `to`, each after the answer to the one before, which is checked. Its
 * process has no part in what cmocka counts, and says what is wrong by its end. */
static int send_part(const pml_connection *own, const pml_connection *seen, int from, int to)
{
    static text t;
    static char answer[PML_MESSAGE_MAX + 1];
    static const char *const codes[] = {"corrupt", "invalid", "busy"};
    void *context = zmq_ctx_new(), *control = dealer(context, own), *view = dealer(context, seen);
    for (int i = from; i < to; i++) {
        bad_request(&t, i);
        void *socket = i % 8 == 7 ? view : control;
        pml_message *m = NULL;
        int n = -1;
        if (zmq_send(socket, t.bytes, t.n, 0) >= 0)
            n = zmq_recv(socket, answer, sizeof answer, 0);
        bool known = false;
        if (n > 0 && pml_message_parse(PML_CHANNEL_ANSWER, answer, (size_t)n, &m, NULL) == PML_OK &&
            pml_message_type_of(m) == PML_ANSWER_error)
            for (size_t c = 0; c < sizeof codes / sizeof codes[0]; c++)
                known = known || strcmp(pml_message_string(m, "code"), codes[c]) == 0;
        pml_message_destroy(&m);
        if (!known) {
            fprintf(stderr, "message %d: %.*s\nanswer: %.*s\n", i, (int)(t.n < 500 ? t.n : 500),
                    t.bytes, n < 0 ? 0 : n, answer);
            return 1;
        }
    }
    zmq_close(control);
    zmq_close(view);
    zmq_ctx_term(context);
    return 0;
}

/* As fast as they are taken, until it is killed. */
static _Noreturn void send_all(const pml_connection *own)
{
    static text t;
    void *socket = dealer(zmq_ctx_new(), own);
    for (int i = 0;; i++) {
        bad_request(&t, i);
        zmq_send(socket, t.bytes, t.n, ZMQ_DONTWAIT);
        pml_clock_sleep(0.001);
    }
}

/* What main does in such a process; connections come through its input. */
static int be_a_sender(int argc, char **argv)
{
    pml_connection own, seen;
    if (read(STDIN_FILENO, &own, sizeof own) != (ssize_t)sizeof own ||
        read(STDIN_FILENO, &seen, sizeof seen) != (ssize_t)sizeof seen)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves nobody behind */
    if (argc == 4 && strcmp(argv[1], part_option) == 0)
        return send_part(&own, &seen, atoi(argv[2]), atoi(argv[3]));
    send_all(&own);
}

/* It is executed anew: a fork of a process with threads may have none of its own. */
static pid_t a_sender(const pml_connection *own, const pml_connection *seen, const char *option,
                      int from, int to)
{
    int ends[2];
    char first[16], last[16];
    snprintf(first, sizeof first, "%d", from);
    snprintf(last, sizeof last, "%d", to);
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(ends[0], STDIN_FILENO);
        close(ends[1]);
        execl("/proc/self/exe", "sender", option, first, last, (char *)NULL);
        _exit(127);
    }
    close(ends[0]);
    assert_int_equal(write(ends[1], own, sizeof *own), sizeof *own);
    assert_int_equal(write(ends[1], seen, sizeof *seen), sizeof *seen);
    close(ends[1]);
    return pid;
}

static void bad_messages_are_refused_and_counted(void **state)
{
    (void)state;
    enum { PART = 30 };
    pml_connection own;
    harness *h = running(&own);
    harness_event(h, 0, PML_EVENT_step, "step", "2", NULL);
    pml_connection seen = view_key(h, &own);
    int64_t before = count(h, "messages") + count(h, "roles") + count(h, "hurried");
    int64_t commands = commands_logged(h);
    int total = how_many();
    double begin = pml_clock_monotonic();
    for (int from = 0; from < total; from += PART) {
        int status, to = from + PART < total ? from + PART : total;
        pid_t pid = a_sender(&own, &seen, part_option, from, to);
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, 0);
        harness_receive_for(h, 0.001);
    }
    int64_t counted = count(h, "messages") + count(h, "roles") + count(h, "hurried") - before;
    assert_int_equal(counted, total);
    assert_int_equal(count(h, "turned_out"), 0);
    assert_int_equal(commands_logged(h), commands);
    harness_receive_for(h, 0.1);
    pml_message *m = harness_ask(h, "status", "");
    assert_string_equal(pml_message_string(m, "state"), "running");
    pml_message_destroy(&m);
    print_message("%d bad messages in %.1f s, %d of each fault\n", total,
                  pml_clock_monotonic() - begin, total / BAD_FAULTS);
    harness_destroy(&h);
}

/* The same from one process, as fast as they are taken: after some it is turned out, what it sends
 * has no effect as before, and nobody else notices. */
static void who_sends_them_all_is_turned_out(void **state)
{
    (void)state;
    pml_connection own;
    harness *h = running(&own);
    int64_t commands = commands_logged(h), before = count(h, "messages");
    pid_t pid = a_sender(&own, &own, flood_option, 0, 0);
    int64_t out = 0;
    for (int i = 0; i < 10000 && out < 2; i++) { /* and once more, when it comes again */
        harness_receive_for(h, 0.01);
        out = count(h, "turned_out");
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    assert_true(out >= 2);
    assert_true(count(h, "messages") - before >= 40);
    assert_int_equal(commands_logged(h), commands);
    harness_destroy(&h);
}

/* Who is about to be turned out is told so with the last answer. */
static void the_last_answer_warns(void **state)
{
    (void)state;
    static const char words[] = "{\"type\":\"fly\",\"id\":\"1\"}";
    static char answer[PML_MESSAGE_MAX];
    enum { FORGIVEN = 40, MANY = 10000 }; /* net/offenders.h; it forgives more as time goes on */
    pml_connection own;
    harness *h = running(&own);
    void *context = zmq_ctx_new(), *socket = dealer(context, &own);
    int sent = 0;
    for (bool warned = false; !warned && sent < MANY; sent++) {
        assert_int_equal(zmq_send(socket, words, sizeof words - 1, 0), sizeof words - 1);
        int n = zmq_recv(socket, answer, sizeof answer, 0);
        assert_true(n > 0 && n < (int)sizeof answer);
        warned = memmem(answer, (size_t)n, "closes this connection", 22) != NULL;
    }
    assert_true(sent >= FORGIVEN && sent < MANY);
    assert_int_equal(count(h, "turned_out"), 0);
    for (int i = 0; i < MANY && count(h, "turned_out") == 0; i++)
        zmq_send(socket, words, sizeof words - 1, ZMQ_DONTWAIT);
    assert_true(count(h, "turned_out") > 0);
    zmq_close(socket);
    zmq_ctx_term(context);
    harness_destroy(&h);
}

/* Every request that the table has, whole and right, with a key that may not send it. */
static void a_view_key_changes_nothing(void **state)
{
    (void)state;
    static text t;
    pml_connection own;
    harness *h = running(&own);
    pml_connection seen = view_key(h, &own);
    void *context = zmq_ctx_new(), *view = dealer(context, &seen);
    int64_t commands = commands_logged(h), roles = count(h, "roles");
    int tried = 0;
    const int *types;
    int n = requests_of_the_table(&types);
    for (int i = 0; i < n; i++) {
        const pmli_type *type = &pmli_types[types[i]];
        if ((type->roles & PML_ROLE_VIEW) != 0)
            continue;
        char code[33];
        t.n = 0;
        text_add(&t, "{\"type\":\"%s\",\"id\":\"view-%d\"", type->name, i);
        for (const pmli_field *f = type->fields; f->name != NULL; f++) {
            text_add(&t, ",\"%s\":", f->name);
            good_value(&t, f);
        }
        text_add(&t, "}");
        refused(view, &t, code);
        assert_string_equal(code, "denied");
        tried++;
    }
    assert_true(tried >= 9);
    assert_int_equal(count(h, "roles"), roles + tried);
    assert_int_equal(commands_logged(h), commands);
    zmq_close(view);
    zmq_ctx_term(context);
    harness_destroy(&h);
}

/* The bytes of a request that was taken, once more: the same answer and nothing else. Another
 * content under its id is refused. On other connections and with other keys too. */
static void replayed_messages_have_no_effect(void **state)
{
    (void)state;
    static const char words[] = "{\"type\":\"set\",\"id\":\"once\",\"learning_rate\":0.5}";
    static text t;
    char answers[2][512], code[33];
    pml_connection own;
    harness *h = running(&own);
    pml_connection seen = view_key(h, &own);
    void *context = zmq_ctx_new(), *view = dealer(context, &seen);
    for (int i = 0; i < 200; i++) {
        void *socket = dealer(context, &own);
        zmq_send(socket, words, sizeof words - 1, 0);
        int n = zmq_recv(socket, answers[i > 0], sizeof answers[0] - 1, 0);
        assert_true(n > 0 && n < (int)sizeof answers[0]);
        answers[i > 0][n] = '\0';
        assert_string_equal(answers[i > 0], answers[0]);
        zmq_close(socket);
    }
    assert_int_equal(commands_logged(h), 1);
    t.n = 0;
    text_add(&t, "{\"type\":\"set\",\"id\":\"once\",\"learning_rate\":0.25}");
    void *socket = dealer(context, &own);
    refused(socket, &t, code);
    assert_string_equal(code, "invalid");
    t.n = 0;
    text_add(&t, "%s", words);
    refused(view, &t, code);
    assert_string_equal(code, "denied");
    assert_int_equal(commands_logged(h), 1);
    zmq_close(socket);
    zmq_close(view);
    zmq_ctx_term(context);
    harness_destroy(&h);
}

/* More than a message may have: cut off by the door itself, before it is all here. Several frames:
 * one refusal. And a stranger gets no byte of anything. */
static void what_is_no_message_gets_no_answer(void **state)
{
    (void)state;
    static char large[PML_MESSAGE_MAX * 4];
    pml_connection own, strange;
    harness *h = running(&own);
    void *context = zmq_ctx_new(), *control = dealer(context, &own);
    memset(large, ' ', sizeof large);
    int short_patience = 300;
    for (size_t size = PML_MESSAGE_MAX + 200; size <= sizeof large; size *= 2) {
        void *socket = dealer(context, &own);
        zmq_setsockopt(socket, ZMQ_RCVTIMEO, &short_patience, sizeof short_patience);
        zmq_send(socket, large, size, 0);
        assert_int_equal(zmq_recv(socket, large, 1, 0), -1);
        zmq_close(socket);
    }
    char answer[1000];
    zmq_send(control, "{\"type\":\"stop\",", 15, ZMQ_SNDMORE);
    zmq_send(control, "\"id\":\"1\"}", 9, 0);
    int n = zmq_recv(control, answer, sizeof answer, 0);
    assert_true(n > 0 && memmem(answer, (size_t)n, "error", 5) != NULL);
    strange = own;
    int64_t before = count(h, "keys");
    assert_int_equal(pml_keypair_new(&strange.keys, NULL), PML_OK);
    void *stranger = dealer(context, &strange);
    zmq_setsockopt(stranger, ZMQ_RCVTIMEO, &short_patience, sizeof short_patience);
    for (int i = 0; i < 50; i++)
        zmq_send(stranger, "{\"type\":\"hello\",\"id\":\"1\"}", 25, ZMQ_DONTWAIT);
    assert_int_equal(zmq_recv(stranger, answer, sizeof answer, 0), -1);
    for (int i = 0; i < 10000 && count(h, "keys") == before; i++)
        harness_receive_for(h, 0.02);
    assert_true(count(h, "keys") > before);
    assert_int_equal(commands_logged(h), 0);
    zmq_close(stranger);
    zmq_close(control);
    zmq_ctx_term(context);
    harness_destroy(&h);
}

/* At the door of events there is nothing to ask: whoever goes on is turned out there, too. */
static void who_asks_at_the_door_of_events_is_turned_out(void **state)
{
    (void)state;
    static const char stop[] = "{\"type\":\"stop\",\"id\":\"1\"}";
    pml_connection own;
    harness *h = running(&own);
    void *context = zmq_ctx_new();
    void *socket = connected(context, &own, ZMQ_XSUB, own.telemetry);
    int64_t out = 0;
    for (int i = 0; i < 10000 && out == 0; i++) {
        (void)zmq_send(socket, stop, sizeof stop - 1, ZMQ_DONTWAIT); /* not before it is in */
        harness_receive_for(h, 0.005);
        out = i % 20 == 0 ? count(h, "turned_out") : 0;
    }
    assert_true(out > 0);
    assert_int_equal(commands_logged(h), 0);
    zmq_close(socket);
    zmq_ctx_term(context);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    if (argc > 1 && (strcmp(argv[1], part_option) == 0 || strcmp(argv[1], flood_option) == 0))
        return be_a_sender(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_messages_are_refused_and_counted),
        cmocka_unit_test(who_sends_them_all_is_turned_out),
        cmocka_unit_test(the_last_answer_warns),
        cmocka_unit_test(a_view_key_changes_nothing),
        cmocka_unit_test(replayed_messages_have_no_effect),
        cmocka_unit_test(what_is_no_message_gets_no_answer),
        cmocka_unit_test(who_asks_at_the_door_of_events_is_turned_out),
    };
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
