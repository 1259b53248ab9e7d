/* The coordinator without memory: each allocation of its own, refused once in a life of its own. It
 * never crashes and never hangs; its log stays whole, and where the run does not end as it was
 * asked to, it says that there was no memory. A life has what a run has: it starts, trains, is
 * steered, saves and stops, one after the other, so that a slow machine and a fast one come to the
 * same allocations. And of a run that goes on by itself: what becomes of a command, wherever on its
 * way there is no memory for it; and of what becomes of the run where a worker has none.
 * libzmq's own allocations are not refused: it would end the process, which is recovered as any
 * death.
 *
 *   PML_NOMEM_POINTS=0   every allocation; otherwise so many, spread over the life (default 12)
 *   PML_NOMEM_AT=7       that one alone, 0: none; tools/chaos/memory.py does so for each of them */
#include "history.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nomem.h"
#include "pml/base/clock.h"
#include "pml/json/sum.h"
#include "pml/train/run.h"

static const char *shim;

static struct {
    bool answered, accepted, trains, saved, applied, over;
} life;

static void watch(const pml_received *r)
{
    const char *text = r->text;
    life.answered |= r->kind == PML_RECEIVED_ANSWER;
    life.accepted |=
        r->kind == PML_RECEIVED_ANSWER && strstr(text, "\"type\":\"accepted\"") != NULL;
    life.over |= r->kind == PML_RECEIVED_DOWN;
    if (r->kind != PML_RECEIVED_EVENT)
        return;
    life.trains |= strstr(text, "\"type\":\"step\"") != NULL;
    life.applied |= strstr(text, "\"type\":\"applied\"") != NULL;
    life.saved |= strstr(text, "\"type\":\"checkpoint\"") != NULL;
    life.over |= strstr(text, "\"state\":\"stopped\"") != NULL ||
                 strstr(text, "\"state\":\"failed\"") != NULL;
}

/* Whether the coordinator has ended; it is still to be waited for. */
static bool is_gone(const harness *h)
{
    siginfo_t info = {0};
    return waitid(P_PID, (id_t)h->coordinator, &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
           info.si_pid == h->coordinator;
}

/* What comes until something has come about, the run is over, or so many seconds have passed. */
static void hear(harness *h, const bool *until, double seconds)
{
    double end = pml_clock_monotonic() + seconds;
    bool late = false;
    while (!*until && !life.over && !late) {
        pml_received *r;
        const bool last = pml_clock_monotonic() >= end;
        pml_status status = pml_client_receive(h->client, last ? 0 : 100, &r, NULL);
        life.over |= status == PML_TIMEOUT && is_gone(h);
        late = last && status == PML_TIMEOUT; /* and nothing came while we were late ourselves */
        if (status == PML_TIMEOUT)
            continue;
        if (status != PML_OK)
            return;
        watch(r);
        free(r);
    }
}

/* Say it and wait a moment for an answer, which may not come: there was no memory for it. */
static void say(harness *h, const char *text)
{
    life.answered = false;
    if (pml_client_send(h->client, text, strlen(text), NULL) == PML_OK)
        hear(h, &life.answered, 0.5);
}

/* patience: seconds for what comes about in every life that lacks nothing. */
static void talk(harness *h, double patience)
{
    char key[PML_KEY_TEXT + 100];
    pml_keypair keys;
    assert_int_equal(pml_keypair_new(&keys, NULL), PML_OK);
    say(h, "{\"type\":\"hello\",\"id\":\"1\"}");
    hear(h, &life.trains, patience);
    say(h, "{\"type\":\"replay\",\"id\":\"2\",\"from\":1}");
    say(h, "{\"type\":\"set\",\"id\":\"3\",\"learning_rate\":0.5}");
    say(h, "{\"type\":\"set\",\"id\":\"3\",\"learning_rate\":0.5}");
    say(h, "{\"type\":\"fly\",\"id\":\"4\"}");
    say(h, "{\"type\":\"configuration\",\"id\":\"5\"}");
    snprintf(key, sizeof key,
             "{\"type\":\"share\",\"id\":\"6\",\"bind\":\"tcp://127.0.0.1:*\",\"role\":\"view\","
             "\"public_key\":\"%s\"}",
             keys.public_key);
    say(h, key);
    say(h, "{\"type\":\"unshare\",\"id\":\"7\"}");
    say(h, "{\"type\":\"checkpoint\",\"id\":\"8\"}");
    hear(h, &life.saved, patience);
    say(h, "{\"type\":\"stop\",\"id\":\"9\"}");
}

/* Its exit status, or 256 + signal. */
static int wait_in_time(harness *h, long number)
{
    int status = 0;
    double end = pml_clock_monotonic() + harness_bound(30);
    while (waitpid(h->coordinator, &status, WNOHANG) == 0) {
        if (pml_clock_monotonic() > end)
            fail_msg("it hangs after allocation %ld was refused", number);
        pml_clock_sleep(0.01);
    }
    h->coordinator = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

/* ---- what is left behind ---- */

/* The last state that its log tells of, and why; "" where there is none. */
typedef struct ending {
    char state[32], reason[1500];
    int replaced; /* workers, because they could not be told what to do */
} ending;

static void take_event(ending *e, const pml_message *m, int64_t *step)
{
    switch (pml_message_type_of(m)) {
    case PML_EVENT_state:
        snprintf(e->state, sizeof e->state, "%s", pml_message_string(m, "state"));
        snprintf(e->reason, sizeof e->reason, "%s", pml_message_string(m, "reason"));
        break;
    case PML_EVENT_restart:
        e->replaced +=
            strstr(pml_message_string(m, "reason"), "could not be told what to do") != NULL;
        *step = pml_message_int(m, "step");
        break;
    case PML_EVENT_step:
        if (pml_message_int(m, "step") != ++*step)
            fail_msg("step %lld follows %lld", (long long)pml_message_int(m, "step"),
                     (long long)*step - 1);
        break;
    default:
        break;
    }
}

/* Its lines are whole and have the right sums, none is missing, and no step is. */
static void read_back(const harness *h, long number, ending *e)
{
    char *text = harness_read(h, "events.jsonl"), *line = text;
    int64_t step = 0;
    *e = (ending){0};
    for (int64_t seq = 1; *line != '\0'; seq++) {
        pml_error err = PML_ERROR_INIT;
        pml_message *m = NULL;
        char *end = strchr(line, '\n');
        if (end == NULL)
            fail_msg("allocation %ld: the log ends in the midst of a line: %s", number, line);
        size_t n = (size_t)(end - line);
        if (pml_sum_check(line, n, &err) != PML_OK ||
            pml_message_parse(PML_CHANNEL_EVENT, line, n, &m, &err) != PML_OK)
            fail_msg("allocation %ld: line %lld: %s", number, (long long)seq, err.message);
        if (pml_message_int(m, "seq") != seq)
            fail_msg("allocation %ld: line %lld is another's: %.*s", number, (long long)seq, (int)n,
                     line);
        take_event(e, m, &step);
        pml_message_destroy(&m);
        line = end + 1;
    }
    free(text);
}

/* ended: its exit status. Whoever did not stop as it was asked to says that there was no memory:
 * in the log's last state, or, where the log itself could not be written, in its own. */
static void check_what_is_left(const harness *h, long number, int ended)
{
    ending e;
    pml_message *run;
    pml_error err = PML_ERROR_INIT;
    read_back(h, number, &e);
    if (pml_run_read(h->folder, &run, &err) != PML_OK)
        fail_msg("allocation %ld: %s", number, err.message);
    pml_message_destroy(&run);
    if (ended == 0 && strcmp(e.state, "stopped") == 0)
        return;
    char *said = harness_read(h, "log/coordinator.log");
    const char *where = strcmp(e.state, "failed") == 0 ? e.reason : said;
    if (strstr(where, "memory") == NULL)
        fail_msg("allocation %ld: status %d, %s (%s), and nothing of memory is said:\n%s", number,
                 ended, e.state, e.reason, said);
    free(said);
}

/* ---- lives ---- */

/* A coordinator that shares its counts; whether it is ready. */
static bool start_watched(harness *h, long number, char *const *more, int n, nomem_counts **counts)
{
    char path[128];
    snprintf(path, sizeof path, "%s/counts", h->root);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_int_equal(ftruncate(fd, sizeof **counts), 0);
    *counts = mmap(NULL, sizeof **counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(*counts != MAP_FAILED);
    close(fd);
    atomic_store(&(*counts)->wanted, number);
    setenv("PML_NOMEM", path, 1);
    setenv("LD_PRELOAD", shim, 1);
    bool ready = harness_spawn(h, more, n);
    unsetenv("LD_PRELOAD");
    return ready;
}

/* One life in which allocation `number` is refused; how many there were. */
static long live_once(long number)
{
    pml_error err = PML_ERROR_INIT;
    nomem_counts *counts;
    harness *h = harness_new(1, 100000, NULL);
    int ended = -1;
    bool ready = start_watched(h, number, NULL, 0, &counts);
    if (ready && pml_client_open(h->connection_file, &h->client, &err) != PML_OK) {
        /* It may have ended by now, and the way to it with it. */
        ended = wait_in_time(h, number);
        if (ended != 1)
            fail_msg("status %d after allocation %ld was refused; %s", ended, number, err.message);
    } else if (ready) {
        memset(&life, 0, sizeof life);
        talk(h, number > 0 ? 1 : harness_bound(30));
        if (number == 0 && !(life.trains && life.saved))
            fail_msg("a life that lacks nothing: trains %d, saved %d", life.trains, life.saved);
        kill(h->coordinator, SIGTERM); /* one more stop, while the first one is under way */
        ended = wait_in_time(h, number);
        if (ended > 1)
            fail_msg("status %d after allocation %ld was refused", ended, number);
    } else if (atoi(h->error) != PML_NO_MEMORY) {
        fail_msg("allocation %ld: it said \"%s\"", number, h->error);
    }
    check_what_is_left(h, number, ended);
    long seen = atomic_load(&counts->seen);
    assert_int_equal(atomic_load(&counts->refused), number > 0 && number <= seen);
    munmap(counts, sizeof *counts);
    harness_destroy(&h);
    return seen;
}

static void every_allocation_of_the_coordinator(void **state)
{
    (void)state;
    const char *points = getenv("PML_NOMEM_POINTS"), *at = getenv("PML_NOMEM_AT");
    if (at != NULL) {
        print_message("%ld allocations\n", live_once(atol(at)));
        return;
    }
    long n = points == NULL ? 12 : atol(points), total = live_once(0);
    long stride = n <= 0 || n >= total ? 1 : total / n, tried = 0;
    assert_true(total > 300);
    for (long number = 1; number <= total; number += stride, tried++)
        (void)live_once(number);
    print_message("%ld of %ld allocations refused\n", tried, total);
}

/* ---- of a run that is resumed ---- */

/* A run that has ended, with commands of all kinds in its log. */
static harness *one_with_a_past(void)
{
    harness *h = harness_new(1, 40, NULL);
    harness_mark(h, "slow", true); /* or its steps may be over before the pause comes */
    assert_true(harness_start(h, NULL));
    harness_command(h, "pause", "");
    harness_mark(h, "slow", false);
    for (int i = 0; i < 8; i++)
        harness_command(h, "set", "\"learning_rate\":0.25");
    harness_command(h, "checkpoint", "");
    harness_command(h, "resume", "\"nonfinite\":\"skip\"");
    harness_wait_state(h, "finished");
    kill(h->coordinator, SIGTERM);
    assert_int_equal(harness_wait(h), 0);
    harness_disconnect(h);
    return h;
}

/* One resume without allocation `number`, up to the moment that it is ready; how many there were.
 * That memory was missing is no word on the log or on a checkpoint: it says so, and has changed
 * nothing, or it goes on from the newest. */
static long resume_once(harness *h, long number)
{
    char *before = harness_read(h, "events.jsonl");
    nomem_counts *counts;
    bool ready = start_watched(h, number, (char *[]){"--resume"}, 1, &counts);
    long seen = atomic_load(&counts->seen);
    munmap(counts, sizeof *counts);
    if (!ready && atoi(h->error) != PML_NO_MEMORY)
        fail_msg("allocation %ld: it said \"%s\"", number, h->error);
    if (ready) { /* and is over before the next one, which would wait for its worker */
        kill(h->coordinator, SIGTERM);
        assert_true(wait_in_time(h, number) <= 1);
    }
    char *after = harness_read(h, "events.jsonl");
    assert_memory_equal(after, before, strlen(before));
    if (strstr(after, "is not used") != NULL || strstr(after, "begins again") != NULL ||
        strstr(after, "were cut from the log") != NULL)
        fail_msg("allocation %ld: %s", number, after + strlen(before));
    free(before);
    free(after);
    return seen;
}

static void every_allocation_of_a_resume(void **state)
{
    (void)state;
    const char *points = getenv("PML_NOMEM_POINTS");
    harness *h = one_with_a_past();
    long n = points == NULL ? 60 : atol(points), total = resume_once(h, 0), tried = 0;
    long stride = n <= 0 || n >= total ? 1 : total / n;
    assert_true(total > 100);
    for (long number = 1; number <= total; number += stride, tried++)
        (void)resume_once(h, number);
    print_message("%ld of %ld allocations refused\n", tried, total);
    harness_destroy(&h);
}

/* ---- of a run that goes on by itself ---- */

/* A run in which one command after another is sent. It may end of what is refused, where it could
 * not write its log: then there is another one. */
typedef struct steered {
    harness *h;
    nomem_counts *counts;
    int sent;
} steered;

static void begin(steered *s)
{
    pml_error err = PML_ERROR_INIT;
    s->h = harness_new(1, 1000000, "\"restart\":\"on-failure\",\"max_restarts\":100");
    assert_true(start_watched(s->h, 0, NULL, 0, &s->counts));
    if (pml_client_open(s->h->connection_file, &s->h->client, &err) != PML_OK)
        fail_msg("%s", err.message);
    memset(&life, 0, sizeof life);
    say(s->h, "{\"type\":\"hello\",\"id\":\"1\"}");
    hear(s->h, &life.trains, harness_bound(30));
    assert_true(life.trains);
}

/* Ends it and looks at what it left: how many workers were replaced. */
static int end(steered *s, long number)
{
    ending e;
    kill(s->h->coordinator, SIGTERM);
    int ended = wait_in_time(s->h, number);
    if (ended > 1)
        fail_msg("status %d after allocation %ld was refused", ended, number);
    check_what_is_left(s->h, number, ended);
    read_back(s->h, number, &e);
    munmap(s->counts, sizeof *s->counts);
    harness_destroy(&s->h);
    return e.replaced;
}

/* Send a setting, and refuse the number-th allocation from then on. Whether it was accepted and
 * applied; what was accepted always is, unless the run is over, which it then says. */
static bool set_without(steered *s, long number)
{
    char text[128];
    if (s->h == NULL)
        begin(s);
    life.trains = false; /* until it has just made a step: nothing else is under way then */
    hear(s->h, &life.trains, harness_bound(30));
    if (life.over)
        return false;
    memset(&life, 0, sizeof life);
    snprintf(text, sizeof text, "{\"type\":\"set\",\"id\":\"s%d\",\"learning_rate\":%d}",
             s->sent + 1, s->sent + 1);
    s->sent++;
    atomic_store(&s->counts->wanted, atomic_load(&s->counts->seen) + number);
    say(s->h, text);
    if (life.accepted)
        hear(s->h, &life.applied, harness_bound(30));
    atomic_store(&s->counts->wanted, 0);
    if (life.accepted && !life.applied && !life.over)
        fail_msg("allocation %ld of a command: it was accepted and is never applied", number);
    return life.accepted && life.applied;
}

static void a_worker_that_cannot_be_told_is_replaced(void **state)
{
    (void)state;
    enum { MOST = 400, STRIDE = 4 }; /* an order takes more allocations than that */
    steered s = {0};
    int replaced = 0, tried = 0;
    for (long number = 1; number < MOST && replaced == 0; number += STRIDE, tried++) {
        bool applied = set_without(&s, number);
        bool over = life.over;
        char *log = harness_read(s.h, "events.jsonl");
        bool told = strstr(log, "could not be told what to do") != NULL;
        free(log);
        if (!over && !told)
            continue;
        int here = end(&s, number);
        replaced += told && applied ? here : 0;
    }
    if (s.h != NULL)
        (void)end(&s, 0);
    print_message("%d tried, %d replaced\n", tried, replaced);
    assert_true(replaced > 0);
}

/* How often it had no memory to receive a message. */
static int not_received(const harness *h)
{
    int n = 0;
    char *log = harness_read(h, "log/coordinator.log");
    for (const char *at = log; (at = strstr(at, "no memory to receive a message")) != NULL; at++)
        n++;
    free(log);
    return n;
}

static void a_message_without_memory_is_not_lost(void **state)
{
    (void)state;
    enum { WANTED = 5, MOST = 100 };
    steered s = {0};
    int met = 0;
    for (int i = 0; i < MOST && met < WANTED; i++) {
        int before = s.h == NULL ? 0 : not_received(s.h);
        bool applied = set_without(&s, 1);
        bool kept = not_received(s.h) > before;
        if (kept && !applied) { /* the answer may only have been slow */
            hear(s.h, &life.applied, harness_bound(30));
            applied = life.applied;
        }
        if (kept && !applied)
            fail_msg("a message for which there was no memory is lost");
        met += kept;
        if (life.over)
            (void)end(&s, 1);
    }
    if (s.h != NULL)
        (void)end(&s, 1);
    assert_int_equal(met, WANTED);
}

/* ---- of a worker ---- */

/* Refuse allocation `number` from now on; others may come to it before it is named. */
static void refuse_one(harness *h, nomem_counts *counts, long number)
{
    for (const long before = atomic_load(&counts->refused);
         atomic_load(&counts->refused) == before;) {
        if (atomic_load(&counts->seen) >= atomic_load(&counts->wanted))
            atomic_store(&counts->wanted, atomic_load(&counts->seen) + number);
        harness_receive_for(h, 0.01); /* beats alone come to it */
    }
}

/* A restart that comes no further than the one before waits twice as long. */
static void come_further(harness *h)
{
    int64_t furthest = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++)
        if (pml_message_type_of(h->events[i]) == PML_EVENT_step &&
            pml_message_int(h->events[i], "step") > furthest)
            furthest = pml_message_int(h->events[i], "step");
    history_reach(h, furthest + 1);
}

/* Whatever it has no memory to hear or to tell, the run is as it would have been: another worker
 * takes over, and no command and no step is missing. */
static void every_allocation_of_a_worker(void **state)
{
    (void)state;
    enum { MOST = 60, STRIDE = 4 }; /* a command takes less, with the steps beside it */
    const char *points = getenv("PML_NOMEM_POINTS");
    const long stride = points == NULL ? STRIDE : 1;
    nomem_counts *counts;
    harness *h = harness_new(2, 1000000, "\"restart\":\"on-failure\",\"max_restarts\":1000");
    setenv("PML_NOMEM_IN", "fake_worker", 1);
    bool ready = start_watched(h, 0, NULL, 0, &counts);
    setenv("PML_NOMEM_IN", "pml-coordinator", 1);
    assert_true(ready);
    harness_connect(h);
    for (long number = 1; number <= MOST; number += stride) {
        char fields[64];
        come_further(h);
        snprintf(fields, sizeof fields, "\"learning_rate\":%ld", number);
        atomic_store(&counts->wanted, atomic_load(&counts->seen) + number);
        int64_t k = harness_command(h, "set", fields);
        refuse_one(h, counts, number);
        history_applied(h, k);
    }
    print_message("%ld refused, %d restarts\n", atomic_load(&counts->refused), history_restarts(h));
    assert_true(history_restarts(h) > 0);
    int64_t steps = history_stop(h);
    assert_int_equal(history_check(h), steps);
    munmap(counts, sizeof *counts);
    harness_destroy(&h);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest one[] = {cmocka_unit_test(every_allocation_of_the_coordinator)};
    const struct CMUnitTest more[] = {
        cmocka_unit_test(every_allocation_of_a_resume),
        cmocka_unit_test(a_worker_that_cannot_be_told_is_replaced),
        cmocka_unit_test(a_message_without_memory_is_not_lost),
        cmocka_unit_test(every_allocation_of_a_worker),
    };
    if (!harness_programs(argc, argv) || argc < 4)
        return 2;
    shim = argv[3];
    setenv("PML_NOMEM_IN", "pml-coordinator", 1);
    setenv("FAKE_STEP_MS", "20", 1); /* few steps in a life, however long it is */
    int failed = cmocka_run_group_tests(one, NULL, NULL);
    return getenv("PML_NOMEM_AT") != NULL ? failed
                                          : failed + cmocka_run_group_tests(more, NULL, NULL);
}
