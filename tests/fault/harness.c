#include "harness.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/net/connection.h"
#include "reap.h"

/* Ten times what a quiet machine could need: who reaches it waits for what does not come. */
static const double patience = 200;
static const char *coordinator_program, *worker_program;
static harness *current; /* of the test that runs; of one that failed, once it has */
static const char mark[] = "PML_TEST_PROCESS";

double harness_bound(double quiet)
{
    return harness_is_quiet() ? quiet : patience;
}

bool harness_is_quiet(void)
{
    return getenv("PML_QUIET") != NULL;
}

bool harness_programs(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: %s PML-COORDINATOR FAKE-WORKER\n", argv[0]);
        return false;
    }
    /* Absolute: a coordinator that takes over has another working folder. They live to the end. */
    coordinator_program = realpath(argv[1], NULL);
    worker_program = realpath(argv[2], NULL);
    if (coordinator_program == NULL || worker_program == NULL) {
        fprintf(stderr, "%s, %s: %s\n", argv[1], argv[2], strerror(errno));
        return false;
    }
    char entry[64];
    harness_entry(getpid(), entry);
    setenv(mark, entry + sizeof mark, 1);
    current = NULL; /* a test's child is not its parent */
    if (!reap_at_end(entry)) {
        fprintf(stderr, "nobody reaps: %s\n", strerror(errno));
        return false;
    }
    return true;
}

void harness_entry(pid_t test, char entry[64])
{
    snprintf(entry, 64, "%s=%d", mark, (int)test);
}

static void reap_failed(void)
{
    char entry[64];
    if (current == NULL)
        return;
    harness_entry(getpid(), entry);
    reap(entry);
    if (current->coordinator > 0)
        waitpid(current->coordinator, NULL, 0);
    current = NULL; /* its memory and its folder, with its logs, stay */
}

const char *harness_coordinator(void)
{
    return coordinator_program;
}

static void write_run(harness *h, const char *extra)
{
    char text[4000], devices[200] = "", path[160];
    for (int i = 0; i < h->workers; i++)
        strcat(devices, i == 0 ? "\"cpu\"" : ",\"cpu\"");
    snprintf(text, sizeof text,
             "{\"format\":1,\"name\":\"test\",\"model\":\"/nowhere\",\"model_id\":\"fake\","
             "\"method\":\"lora\",\"dtype\":\"float32\",\"lora_r\":4,\"lora_alpha\":8,"
             "\"lora_dropout\":0.0,\"lora_targets\":[\"q_proj\"],\"lora_init\":\"\","
             "\"max_steps\":%d,\"num_train_epochs\":1,\"learning_rate\":0.001,"
             "\"lr_scheduler_type\":\"linear\",\"warmup_steps\":0,\"weight_decay\":0,"
             "\"adam_beta1\":0.9,\"adam_beta2\":0.999,\"adam_epsilon\":1e-8,\"max_grad_norm\":1,"
             "\"per_device_train_batch_size\":1,\"gradient_accumulation_steps\":1,"
             "\"max_length\":64,\"packing\":false,\"shuffle\":false,\"deterministic\":true,"
             "\"seed\":1,\"eval_steps\":0,\"save_total_limit\":0,"
             "\"memory_limit\":0,\"threads\":1,\"generate_length\":64,\"devices\":[%s],"
             "\"train_data\":\"data/train.safetensors\",\"data\":{},"
             "\"created\":1,\"version\":\"0\"%s%s%s%s%s}",
             h->max_steps, devices, extra == NULL ? "" : ",", extra == NULL ? "" : extra,
             extra != NULL && strstr(extra, "save_steps") ? "" : ",\"save_steps\":0",
             extra != NULL && strstr(extra, "eval_data") ? "" : ",\"eval_data\":\"\"",
             extra != NULL && strstr(extra, "restart") ? "" : ",\"restart\":\"never\"");
    snprintf(path, sizeof path, "%s/run.json", h->folder);
    assert_int_equal(pml_file_write(path, text, strlen(text), 0600, NULL), PML_OK);
}

harness *harness_new(int workers, int max_steps, const char *extra)
{
    reap_failed();
    harness *h = calloc(1, sizeof *h);
    assert_non_null(h);
    current = h;
    assert_true(workers <= HARNESS_WORKERS);
    h->workers = workers;
    h->max_steps = max_steps;
    h->coordinator = -1;
    snprintf(h->root, sizeof h->root, "/tmp/pml-test-XXXXXX");
    assert_non_null(mkdtemp(h->root));
    setenv("XDG_RUNTIME_DIR", h->root, 1);
    setenv("PML_WORKER", worker_program, 1);
    /* Longer than a test can be starved: who comes back late is still to find somebody to ask. */
    setenv("PML_GRACE_SECONDS", "100", 1);
    snprintf(h->folder, sizeof h->folder, "%s/run", h->root);
    assert_int_equal(mkdir(h->folder, 0700), 0);
    write_run(h, extra);
    assert_int_equal(pml_runtime_path(h->folder, h->runtime, sizeof h->runtime, NULL), PML_OK);
    snprintf(h->connection_file, sizeof h->connection_file, "%s/connection.json", h->runtime);
    return h;
}

void harness_is_brief(void)
{
    setenv("PML_GRACE_SECONDS", "10", 1);
}

static _Noreturn void become_coordinator(harness *h, int ready, char *const *more, int n)
{
    /* A test that fails leaves by a jump or by abort; what it started goes with it. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    char number[16], log[160];
    const char *argv[24] = {coordinator_program, h->folder};
    for (int i = 0; i < n; i++)
        argv[2 + i] = more[i];
    snprintf(number, sizeof number, "%d", ready);
    argv[2 + n] = "--ready-fd";
    argv[3 + n] = number;
    if (h->prepare[0] != NULL)
        argv[4 + n] = "--";
    for (int i = 0; h->prepare[i] != NULL; i++)
        argv[5 + n + i] = h->prepare[i];
    snprintf(log, sizeof log, "%s/log", h->folder);
    mkdir(log, 0700);
    strcat(log, "/coordinator.log");
    int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(fd, 1);
    dup2(fd, 2);
    struct rlimit few = {(rlim_t)h->descriptors, (rlim_t)h->descriptors};
    if (h->descriptors > 0 && setrlimit(RLIMIT_NOFILE, &few) != 0)
        _exit(126);
    execv(coordinator_program, (char *const *)argv);
    _exit(127);
}

bool harness_spawn(harness *h, char *const *more, int n)
{
    char line[1100] = "";
    int ready[2];
    assert_int_equal(pipe(ready), 0);
    fcntl(ready[0], F_SETFD, FD_CLOEXEC);
    h->coordinator = fork();
    if (h->coordinator == 0)
        become_coordinator(h, ready[1], more, n);
    close(ready[1]);
    size_t got = 0;
    for (ssize_t n = 1; n > 0 && got<sizeof line - 1; got += n> 0 ? (size_t)n : 0)
        n = read(ready[0], line + got, sizeof line - 1 - got);
    close(ready[0]);
    const char *word = line + strspn(line, "+"); /* signs of life come before it */
    if (word[0] != '0') {
        snprintf(h->error, sizeof h->error, "%s", word);
        harness_wait(h);
        return false;
    }
    h->error[0] = '\0';
    return true;
}

bool harness_start(harness *h, ...)
{
    char *more[8];
    int n = 0;
    va_list args;
    va_start(args, h);
    for (char *a = va_arg(args, char *); a != NULL; a = va_arg(args, char *))
        more[n++] = a;
    va_end(args);
    if (!harness_spawn(h, more, n))
        return false;
    assert_int_equal(pml_runtime_find(h->folder, h->runtime, sizeof h->runtime, NULL), PML_OK);
    harness_connect(h);
    return true;
}

void harness_connect(harness *h)
{
    pml_error err = PML_ERROR_INIT;
    if (pml_client_open(h->connection_file, &h->client, &err) != PML_OK)
        fail_msg("%s", err.message);
    pml_message *m = harness_ask(h, "hello", "");
    assert_int_equal(pml_message_type_of(m), PML_ANSWER_welcome);
    pml_message_destroy(&m);
}

void harness_disconnect(harness *h)
{
    pml_client_close(&h->client);
}

void harness_adopt(harness *h)
{
    pml_connection found;
    harness_disconnect(h);
    for (double end = pml_clock_monotonic() + patience; pml_clock_monotonic() < end;) {
        if (pml_runtime_find(h->folder, h->runtime, sizeof h->runtime, NULL) == PML_OK &&
            snprintf(h->connection_file, sizeof h->connection_file, "%s/connection.json",
                     h->runtime) > 0 &&
            pml_connection_read(h->connection_file, &found, NULL) == PML_OK) {
            pml_keypair_forget(&found.keys);
            h->adopted = found.pid;
            harness_connect(h);
            return;
        }
        pml_clock_sleep(0.01);
    }
    fail_msg("nobody takes over");
}

int harness_wait(harness *h)
{
    int status;
    pid_t ended = 0;
    for (double end = pml_clock_monotonic() + patience; ended == 0;) {
        ended = waitpid(h->coordinator, &status, WNOHANG);
        if (ended == 0 && pml_clock_monotonic() > end)
            fail_msg("the coordinator (process %d) does not end", (int)h->coordinator);
        if (ended == 0)
            pml_clock_sleep(0.005);
    }
    assert_int_equal(ended, h->coordinator);
    h->coordinator = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

char *harness_read(const harness *h, const char *name)
{
    char path[512], *text;
    size_t size;
    snprintf(path, sizeof path, "%s/%s", h->folder, name);
    if (pml_file_read(path, 64 << 20, false, &text, &size, NULL) != PML_OK)
        return strdup("");
    return text;
}

void harness_mark(const harness *h, const char *name, bool there)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s", h->folder, name);
    if (there)
        assert_int_equal(pml_file_write(path, "", 0, 0600, NULL), PML_OK);
    else
        assert_int_equal(unlink(path), 0);
}

void harness_wait_mark(harness *h, const char *name)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s", h->folder, name);
    for (double end = pml_clock_monotonic() + patience; access(path, F_OK) != 0;) {
        if (pml_clock_monotonic() > end)
            fail_msg("there is never a file %s", name);
        harness_receive_for(h, 0.02);
    }
    harness_mark(h, name, false);
}

static void check_logs(const harness *h)
{
    static const char *const signs[] = {"Sanitizer", "runtime error"};
    char path[160], name[300];
    snprintf(path, sizeof path, "%s/log", h->folder);
    DIR *dir = opendir(path);
    for (struct dirent *e = dir == NULL ? NULL : readdir(dir); e != NULL; e = readdir(dir)) {
        snprintf(name, sizeof name, "log/%s", e->d_name);
        char *text = harness_read(h, name);
        for (size_t i = 0; i < sizeof signs / sizeof signs[0]; i++)
            if (strstr(text, signs[i]) != NULL) {
                fprintf(stderr, "%s:\n%s\n", name, text);
                fail_msg("%s has a sanitizer's report", name);
            }
        free(text);
    }
    if (dir != NULL)
        closedir(dir);
}

void harness_destroy(harness **out)
{
    harness *h = *out;
    *out = NULL;
    if (h->client != NULL)
        harness_disconnect(h);
    if (h->coordinator > 0) {
        kill(h->coordinator, SIGTERM);
        harness_wait(h);
    }
    if (h->adopted > 0 && process_is_there(h->adopted)) {
        kill(h->adopted, SIGTERM);
        harness_wait_gone(h->adopted, patience);
    }
    check_logs(h);
    for (int i = 0; i < h->n_events; i++)
        pml_message_destroy(&h->events[i]);

    assert_int_equal(pml_tree_remove("/tmp", h->root + 5, NULL), PML_OK);
    if (current == h)
        current = NULL;
    free(h);
}

/* ---- talking ---- */

/* The next event in order; one that comes too early or again is left to the replay. Takes m. */
static void keep_event(harness *h, pml_message *m)
{
    if (pml_message_int(m, "seq") != h->last_seq + 1 || h->n_events == HARNESS_KEPT) {
        pml_message_destroy(&m);
        return;
    }
    h->last_seq++;
    h->events[h->n_events++] = m;
}

static void keep_published(harness *h, const pml_received *r)
{
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    if (strncmp(r->text, "{\"type\":\"heartbeat\"", 19) == 0)
        return;
    if (pml_message_parse(PML_CHANNEL_EVENT, r->text, r->size, &m, &err) != PML_OK)
        fail_msg("%s: %s", err.message, r->text);
    keep_event(h, m);
}

void harness_catch_up(harness *h)
{
    double end = pml_clock_monotonic() + patience;
    /* To what had happened when it was asked first: steps may be quicker than who reads of them. */
    for (int64_t last, goal = -1; goal < 0 || h->last_seq < goal;) {
        char fields[64];
        if (pml_clock_monotonic() > end)
            fail_msg("event %lld never comes", (long long)h->last_seq + 1);
        snprintf(fields, sizeof fields, "\"from\":%lld", (long long)h->last_seq + 1);
        pml_message *m = harness_ask(h, "replay", fields);
        assert_int_equal(pml_message_type_of(m), PML_ANSWER_events);
        last = pml_message_int(m, "last");
        goal = goal < 0 ? last : goal;
        for (size_t i = 0; i < pml_message_count(m, "events"); i++)
            keep_event(h, pml_message_part(m, "events", i));
        pml_message_destroy(&m);
        if (h->last_seq < goal && h->n_events == HARNESS_KEPT)
            fail_msg("more than the %d events that a test keeps", HARNESS_KEPT);
    }
}

/* One received message; an answer is returned, an event kept. NULL after the deadline. */
static pml_received *pump(harness *h, double deadline)
{
    for (;;) {
        pml_received *r;
        double left = deadline - pml_clock_monotonic();
        if (pml_client_receive(h->client, left > 0 ? (int)(left * 1e3) + 1 : 0, &r, NULL) != PML_OK)
            return NULL;
        if (r->kind == PML_RECEIVED_ANSWER)
            return r;
        if (r->kind == PML_RECEIVED_EVENT) {
            keep_published(h, r);
            free(r);
            return NULL;
        }
        free(r);
    }
}

pml_message *harness_ask_as(harness *h, const char *id, const char *type, const char *fields)
{
    static char text[PML_MESSAGE_MAX];
    int n = snprintf(text, sizeof text, "{\"type\":\"%s\",\"id\":\"%s\"%s%s}", type, id,
                     fields[0] != '\0' ? "," : "", fields);
    assert_int_equal(pml_client_send(h->client, text, (size_t)n, NULL), PML_OK);
    for (double deadline = pml_clock_monotonic() + patience; pml_clock_monotonic() < deadline;) {
        pml_received *r = pump(h, deadline);
        if (r == NULL)
            continue;
        pml_error err = PML_ERROR_INIT;
        pml_message *m;
        if (pml_message_parse(PML_CHANNEL_ANSWER, r->text, r->size, &m, &err) != PML_OK)
            fail_msg("%s: %s", err.message, r->text);
        free(r);
        if (strcmp(pml_message_string(m, "id"), id) == 0)
            return m;
        pml_message_destroy(&m);
    }
    fail_msg("no answer to %s", text);
    return NULL;
}

pml_message *harness_ask(harness *h, const char *type, const char *fields)
{
    char id[32];
    snprintf(id, sizeof id, "t%d-%d", (int)getpid(), ++h->next_id);
    return harness_ask_as(h, id, type, fields);
}

int64_t harness_command(harness *h, const char *verb, const char *fields)
{
    pml_message *m = harness_ask(h, verb, fields);
    if (pml_message_type_of(m) != PML_ANSWER_accepted)
        fail_msg("%s: %s", verb, pml_message_string(m, "message"));
    int64_t number = pml_message_int(m, "command");
    pml_message_destroy(&m);
    return number;
}

static bool reads_as(const pml_message *m, const char *field, const char *value)
{
    if (strcmp(pml_message_string(m, field), value) == 0)
        return true;
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)pml_message_int(m, field));
    return pml_message_has(m, field) && strcmp(text, value) == 0;
}

const pml_message *harness_event(harness *h, int from, pml_message_type type, const char *field,
                                 const char *value, int *index)
{
    double deadline = pml_clock_monotonic() + patience;
    for (int i = from;;) {
        for (; i < h->n_events; i++) {
            const pml_message *m = h->events[i];
            if (pml_message_type_of(m) != type || (field != NULL && !reads_as(m, field, value)))
                continue;
            if (index != NULL)
                *index = i;
            return m;
        }
        if (pml_clock_monotonic() > deadline)
            fail_msg("no event %s with %s = %s", pml_message_name(type), field, value);
        free(pump(h, pml_clock_monotonic() + 0.05));
        harness_catch_up(h);
    }
}

void harness_receive_for(harness *h, double seconds)
{
    for (double end = pml_clock_monotonic() + seconds; pml_clock_monotonic() < end;)
        free(pump(h, end));
    harness_catch_up(h);
}

void harness_wait_state(harness *h, const char *state)
{
    for (double end = pml_clock_monotonic() + patience; pml_clock_monotonic() < end;) {
        pml_message *m = harness_ask(h, "status", "");
        bool there = strcmp(pml_message_string(m, "state"), state) == 0;
        pml_message_destroy(&m);
        if (there)
            return;
        harness_receive_for(h, 0.02);
    }
    fail_msg("the run is never %s", state);
}

pid_t harness_worker_pid(harness *h, int rank)
{
    pml_message *m = harness_ask(h, "status", "");
    pml_message *w = pml_message_part(m, "workers", (size_t)rank);
    pid_t pid = (pid_t)pml_message_int(w, "pid");
    pml_message_destroy(&w);
    pml_message_destroy(&m);
    return pid;
}

pid_t harness_wait_worker(harness *h, int rank)
{
    for (double end = pml_clock_monotonic() + patience; pml_clock_monotonic() < end;) {
        pid_t pid = harness_worker_pid(h, rank);
        if (pid > 0)
            return pid;
        harness_receive_for(h, 0.02);
    }
    fail_msg("worker %d is never there", rank);
    return 0;
}

/* A zombie is not there any more, once its other threads are not: until then what the process has
 * open stays open, its locks are held, and what a coordinator has said is found. */
bool process_is_there(pid_t pid)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return false;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = '\0';
    char state;
    int threads;
    const char *name_end = strrchr(text, ')');
    if (name_end == NULL || sscanf(name_end,
                                   ") %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
                                   "%*s %*s %*s %*s %d",
                                   &state, &threads) != 2)
        return false;
    return (state != 'Z' && state != 'X') || threads > 1;
}

void harness_wait_gone(pid_t pid, double seconds)
{
    double bound = harness_bound(seconds);
    for (double end = pml_clock_monotonic() + bound; process_is_there(pid);) {
        if (pml_clock_monotonic() > end)
            fail_msg("process %d is there after %g s", (int)pid, bound);
        pml_clock_sleep(0.01);
    }
}

void harness_kill_coordinator(harness *h)
{
    if (h->adopted > 0) {
        kill(h->adopted, SIGKILL);
        harness_wait_gone(h->adopted, 5);
    } else {
        kill(h->coordinator, SIGKILL);
        assert_int_equal(harness_wait(h), 256 + SIGKILL);
    }
}
