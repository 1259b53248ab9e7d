/* Bad messages by the thousand, made from the message table so that every field of every request is
 * hit: each is refused and counted, none has an effect. The same ones in every run.
 *
 * PML_GENERATED=10000 makes so many of them (1,000 otherwise). */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

#include "messages_table.h"
#include "pml/base/clock.h"

enum { ROOM = 1 << 18, DEEP = 5000 };

static uint64_t chance = 0x9E3779B97F4A7C15U;

static uint32_t pick(uint32_t below) /* xorshift64*; below > 0 */
{
    chance ^= chance >> 12;
    chance ^= chance << 25;
    chance ^= chance >> 27;
    return (uint32_t)((chance * 0x2545F4914F6CDD1DU) >> 33) % below;
}

/* ---- text ---- */

typedef struct text {
    char bytes[ROOM];
    size_t n;
} text;

static void add_bytes(text *t, const void *bytes, size_t n)
{
    assert_true(t->n + n <= ROOM);
    memcpy(t->bytes + t->n, bytes, n);
    t->n += n;
}

static void add(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void add(text *t, const char *format, ...)
{
    char piece[1000];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(piece, sizeof piece, format, args);
    va_end(args);
    assert_true(n >= 0 && n < (int)sizeof piece);
    add_bytes(t, piece, (size_t)n);
}

static void repeat(text *t, const char *piece, size_t times)
{
    for (size_t i = 0; i < times; i++)
        add_bytes(t, piece, strlen(piece));
}

/* ---- values ---- */

static void good_value(text *t, const pmli_field *f)
{
    double value = f->low > 1 ? f->low : f->high < 1 ? f->high : 1;
    switch (f->kind) {
    case PMLI_BOOL:
        add(t, "true");
        break;
    case PMLI_INT:
    case PMLI_NUMBER:
    case PMLI_FLOAT:
        add(t, "%.0f", value);
        break;
    case PMLI_ENUM:
        add(t, "\"%.*s\"", (int)strcspn(f->extra, " "), f->extra);
        break;
    case PMLI_STRING:
        add(t, "\"");
        repeat(t, "a", f->low < 1 ? 1 : (size_t)f->low);
        add(t, "\"");
        break;
    case PMLI_INTS:
        add(t, "[1]");
        break;
    case PMLI_RECORD: /* the required fields of the record */
        add(t, "{");
        for (const pmli_field *g = pmli_types[pmli_type_find(PML_CHANNEL_RECORD, f->extra)].fields;
             g->name != NULL; g++)
            if (g->required) {
                add(t, "%s\"%s\":", t->bytes[t->n - 1] == '{' ? "" : ",", g->name);
                good_value(t, g);
            }
        add(t, "}");
        break;
    default:
        fail_msg("no request has a field of kind %d", (int)f->kind);
    }
}

/* A value that the field cannot have: of another kind, or just outside its range. */
static void bad_value(text *t, const pmli_field *f)
{
    static const char *const others[] = {
        "null", "[[]]", "{\"a\":1}", "[null]", "[\"a\",{}]", "[1.5]", "[-1]", "[2147483648]",
    };
    bool number = f->kind == PMLI_INT || f->kind == PMLI_NUMBER || f->kind == PMLI_FLOAT;
    switch (pick(6)) {
    case 0: /* far or just outside */
        if (number)
            add(t, "%.17g", pick(2) ? f->high * 2 + 1 : f->low - 1);
        else if (f->kind == PMLI_STRING || f->kind == PMLI_ENUM) {
            add(t, "\"");
            repeat(t, "a", (size_t)f->high + 1);
            add(t, "\"");
        } else {
            add(t, "[");
            repeat(t, "1,", (size_t)f->high);
            add(t, "1]");
        }
        break;
    case 1: /* numbers that are none, or too large for one */
        add(t, "%s",
            number ? (const char *[]){"\"NaN\"", "\"Infinity\"", "\"1\"", "true"}[pick(4)] : "1.5");
        break;
    case 2:
        add(t, "%s", f->kind == PMLI_INT ? "9223372036854775807" : "false");
        break;
    default:
        add(t, "%s", others[pick(sizeof others / sizeof others[0])]);
    }
}

/* A value of this field that is no JSON, or not one that we read. */
static void broken_value(text *t)
{
    static const char *const pieces[] = {
        "\"\xff\xfe\"", "\"\xc3\"",    "\"\xed\xa0\x80\"",
        "\"\\ud800\"",  "\"\\u0000\"", "\"\xf4\x90\x80\x80\"",
        "\"\xc0\x80\"", "NaN",         "-",
        "1e999",        "'a'",         "\"\n\"",
        "01",           "+1",          "0x1",
        "\"\\x\"",      "Infinity",    "1.",
    };
    add(t, "%s", pieces[pick(sizeof pieces / sizeof pieces[0])]);
}

/* ---- requests ---- */

static int requests[PML_MESSAGE_COUNT], n_requests;

static void find_requests(void)
{
    n_requests = 0;
    for (int i = 0; i < PML_MESSAGE_COUNT; i++)
        if (pmli_types[i].channel == PML_CHANNEL_REQUEST && i != PML_REQUEST_alive)
            requests[n_requests++] = i;
}

static size_t fields_of(const pmli_type *type)
{
    size_t n = 0;
    while (type->fields[n].name != NULL)
        n++;
    return n;
}

typedef enum fault {
    FAULT_VALUE,
    FAULT_BROKEN,
    FAULT_MISSING,
    FAULT_UNKNOWN,
    FAULT_TWICE,
    FAULT_DEEP,
    FAULT_CUT,
    FAULT_TYPE,
    FAULT_ID,
    FAULT_LONG,
    FAULT_NOISE,
    FAULTS
} fault;

/* One request with one fault; a field is hit where the fault is one of a field. */
static void make(text *t, const pmli_type *type, fault what, int number)
{
    size_t n = fields_of(type), hit = n == 0 ? 0 : pick((uint32_t)n);
    if (n == 0 && (what == FAULT_VALUE || what == FAULT_BROKEN || what == FAULT_MISSING))
        what = FAULT_UNKNOWN;
    t->n = 0;
    add(t, "{\"type\":\"");
    if (what == FAULT_TYPE)
        add(t, "%s",
            (const char *[]){"applied", "step", "joined", "go", "commit", "shared", "Stop", "stop ",
                             "", "welcome", "run"}[pick(11)]);
    else
        add(t, "%s", type->name);
    add(t, "\",\"id\":");
    if (what == FAULT_ID)
        add(t, "%s", (const char *[]){"1", "\"\"", "null", "[]", "{\"id\":\"x\"}"}[pick(5)]);
    else
        add(t, "\"bad-%d\"", number);
    for (size_t i = 0; i < n; i++) {
        const pmli_field *f = &type->fields[i];
        if (what == FAULT_MISSING && (f->required || type == &pmli_types[PML_REQUEST_set]))
            continue;
        add(t, ",\"%s\":", f->name);
        if (i == hit && what == FAULT_VALUE)
            bad_value(t, f);
        else if (i == hit && what == FAULT_BROKEN)
            broken_value(t);
        else
            good_value(t, f);
    }
    bool lacks = what != FAULT_MISSING;
    for (size_t i = 0; i < n; i++)
        lacks = lacks || type->fields[i].required;
    if (what == FAULT_UNKNOWN || (!lacks && type != &pmli_types[PML_REQUEST_set]))
        add(t, ",\"%s\":1", (const char *[]){"x", "command", "Type", "id ", "__proto__"}[pick(5)]);
    if (what == FAULT_TWICE)
        add(t, ",\"type\":\"%s\"", type->name);
    if (what == FAULT_DEEP) {
        size_t levels = pick(2) ? 16 : DEEP;
        add(t, ",\"x\":");
        repeat(t, "[", levels);
        repeat(t, "]", levels);
    }
    if (what == FAULT_LONG) {
        add(t, ",\"x\":\"");
        repeat(t, "a", PML_REQUEST_MAX - t->n + pick(PML_MESSAGE_MAX - PML_REQUEST_MAX - 8));
        add(t, "\"");
    }
    add(t, "}");
    if (what == FAULT_CUT)
        t->n = 1 + pick((uint32_t)t->n - 1);
    if (what == FAULT_NOISE)
        for (uint32_t i = 0; i < 40; i++) /* enough that something breaks */
            t->bytes[pick((uint32_t)t->n)] = (char)pick(256);
}

/* The same one for a number in every run, whoever makes it. */
static void make_number(text *t, int number)
{
    chance = 0x9E3779B97F4A7C15U * (2 * (uint64_t)number + 1);
    for (int i = 0; i < 4; i++)
        (void)pick(2);
    const pmli_type *type = &pmli_types[requests[pick((uint32_t)n_requests)]];
    make(t, type, (fault)(number % FAULTS), number);
}

/* ---- doors ---- */

static void *dealer(void *context, const pml_connection *c)
{
    void *socket = zmq_socket(context, ZMQ_DEALER);
    int linger = 0, patience = 200000;
    assert_int_equal(zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof linger), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_RCVTIMEO, &patience, sizeof patience), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, c->server_key, 40), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, c->keys.public_key, 40), 0);
    assert_int_equal(zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, c->keys.secret_key, 40), 0);
    assert_int_equal(zmq_connect(socket, c->control), 0);
    return socket;
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

/* A part of them, by a process of its own: who sends many is turned out (net/offenders.h). It has
 * no part in what cmocka counts, and says what is wrong by its end. */
static _Noreturn void send_part(const pml_connection *own, const pml_connection *seen, int from,
                                int to)
{
    static text t;
    static char answer[PML_MESSAGE_MAX + 1];
    static const char *const codes[] = {"corrupt", "invalid", "busy"};
    void *context = zmq_ctx_new(), *control = dealer(context, own), *view = dealer(context, seen);
    for (int i = from; i < to; i++) {
        make_number(&t, i);
        void *socket = i % 8 == 7 ? view : control;
        pml_message *m = NULL;
        int n =
            zmq_send(socket, t.bytes, t.n, 0) < 0 ? -1 : zmq_recv(socket, answer, sizeof answer, 0);
        bool good = n > 0 &&
                    pml_message_parse(PML_CHANNEL_ANSWER, answer, (size_t)n, &m, NULL) == PML_OK &&
                    pml_message_type_of(m) == PML_ANSWER_error;
        bool known = false;
        for (size_t c = 0; good && c < sizeof codes / sizeof codes[0]; c++)
            known = known || strcmp(pml_message_string(m, "code"), codes[c]) == 0;
        if (!known) {
            fprintf(stderr, "message %d: %.*s\nanswer: %.*s\n", i, (int)(t.n < 500 ? t.n : 500),
                    t.bytes, n < 0 ? 0 : n, answer);
            _exit(1);
        }
        pml_message_destroy(&m);
    }
    zmq_close(control);
    zmq_close(view);
    zmq_ctx_term(context);
    _exit(0);
}

static void bad_messages_are_refused_and_counted(void **state)
{
    (void)state;
    enum { PART = 30 };
    harness *h = harness_new(1, 1000000, NULL);
    setenv("FAKE_STEP_MS", "20", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    harness_event(h, 0, PML_EVENT_step, "step", "2", NULL);
    pml_connection own;
    assert_int_equal(pml_connection_read(h->connection_file, &own, NULL), PML_OK);
    pml_connection seen = view_key(h, &own);
    int64_t before = count(h, "messages") + count(h, "roles") + count(h, "hurried");
    int64_t commands = commands_logged(h);
    find_requests();
    int total = how_many();
    double begin = pml_clock_monotonic();
    for (int from = 0; from < total; from += PART) {
        int status;
        pid_t pid = fork();
        if (pid == 0)
            send_part(&own, &seen, from, from + PART < total ? from + PART : total);
        assert_true(pid > 0 && waitpid(pid, &status, 0) == pid);
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
                  pml_clock_monotonic() - begin, total / FAULTS);
    harness_destroy(&h);
}

/* The same from one process, as fast as they are taken: after some it is turned out, what it sends
 * has no effect as before, and nobody else notices. */
static void who_sends_them_all_is_turned_out(void **state)
{
    (void)state;
    harness *h = harness_new(1, 1000000, NULL);
    setenv("FAKE_STEP_MS", "20", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    pml_connection own;
    assert_int_equal(pml_connection_read(h->connection_file, &own, NULL), PML_OK);
    int64_t commands = commands_logged(h), before = count(h, "messages");
    find_requests();
    pid_t pid = fork();
    if (pid == 0) {
        static text t;
        void *socket = dealer(zmq_ctx_new(), &own);
        for (int i = 0;; i++) {
            make_number(&t, i);
            zmq_send(socket, t.bytes, t.n, ZMQ_DONTWAIT);
            pml_clock_sleep(0.001);
        }
    }
    assert_true(pid > 0);
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

/* Every request that the table has, whole and right, with a key that may not send it. */
static void a_view_key_changes_nothing(void **state)
{
    (void)state;
    static text t;
    harness *h = harness_new(1, 1000000, NULL);
    setenv("FAKE_STEP_MS", "20", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    pml_connection own;
    assert_int_equal(pml_connection_read(h->connection_file, &own, NULL), PML_OK);
    pml_connection seen = view_key(h, &own);
    void *context = zmq_ctx_new(), *view = dealer(context, &seen);
    int64_t commands = commands_logged(h), roles = count(h, "roles");
    int tried = 0;
    find_requests();
    for (int i = 0; i < n_requests; i++) {
        const pmli_type *type = &pmli_types[requests[i]];
        if ((type->roles & PML_ROLE_VIEW) != 0)
            continue;
        char code[33];
        t.n = 0;
        add(&t, "{\"type\":\"%s\",\"id\":\"view-%d\"", type->name, i);
        for (const pmli_field *f = type->fields; f->name != NULL; f++) {
            add(&t, ",\"%s\":", f->name);
            good_value(&t, f);
        }
        add(&t, "}");
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
    harness *h = harness_new(1, 1000000, NULL);
    setenv("FAKE_STEP_MS", "20", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    pml_connection own;
    assert_int_equal(pml_connection_read(h->connection_file, &own, NULL), PML_OK);
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
    add(&t, "{\"type\":\"set\",\"id\":\"once\",\"learning_rate\":0.25}");
    void *socket = dealer(context, &own);
    refused(socket, &t, code);
    assert_string_equal(code, "invalid");
    t.n = 0;
    add(&t, "%s", words);
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
    harness *h = harness_new(1, 1000000, NULL);
    setenv("FAKE_STEP_MS", "20", 1);
    assert_true(harness_start(h, NULL));
    unsetenv("FAKE_STEP_MS");
    pml_connection own, strange;
    assert_int_equal(pml_connection_read(h->connection_file, &own, NULL), PML_OK);
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

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_messages_are_refused_and_counted),
        cmocka_unit_test(who_sends_them_all_is_turned_out),
        cmocka_unit_test(a_view_key_changes_nothing),
        cmocka_unit_test(replayed_messages_have_no_effect),
        cmocka_unit_test(what_is_no_message_gets_no_answer),
    };
    if (!harness_programs(argc, argv))
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
