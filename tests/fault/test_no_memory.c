/* The coordinator without memory: each allocation of its own, refused once in a life of its own. It
 * never crashes and never hangs; what it cannot do it says, or ends the run with its reason. A life
 * has what a run has: it starts, trains, is steered, saves and stops, one after the other, so
 * that a slow machine and a fast one come to the same allocations.
 * libzmq's own allocations are not refused: it would end the process, which is recovered as any
 * death.
 *
 *   PML_NOMEM_POINTS=0   every allocation; otherwise so many, spread over the life (default 12)
 *   PML_NOMEM_AT=7       that one alone, 0: none; tools/chaos/memory.py does so for each of them */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"

static const char *shim;

static struct {
    bool answered, trains, saved, over;
} life;

static void watch(const pml_received *r)
{
    const char *text = r->text;
    life.answered |= r->kind == PML_RECEIVED_ANSWER;
    life.over |= r->kind == PML_RECEIVED_DOWN;
    if (r->kind != PML_RECEIVED_EVENT)
        return;
    life.trains |= strstr(text, "\"type\":\"step\"") != NULL;
    life.saved |= strstr(text, "\"type\":\"checkpoint\"") != NULL;
    life.over |= strstr(text, "\"state\":\"stopped\"") != NULL ||
                 strstr(text, "\"state\":\"failed\"") != NULL;
}

/* What comes until something has come about, the run is over, or so many seconds have passed. */
static void hear(harness *h, const bool *until, double seconds)
{
    double end = pml_clock_monotonic() + seconds;
    while (!*until && !life.over && pml_clock_monotonic() < end) {
        pml_received *r;
        pml_status status = pml_client_receive(h->client, 100, &r, NULL);
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

/* One life in which allocation `number` is refused; how many there were. */
static long live_once(long number)
{
    char text[32], mark[128];
    long seen = -1;
    int refused = -1;
    pml_error err = PML_ERROR_INIT;
    harness *h = harness_new(1, 100000, NULL);
    snprintf(mark, sizeof mark, "%s/mark", h->root);
    snprintf(text, sizeof text, "%ld", number);
    setenv("PML_NOMEM", text, 1);
    setenv("PML_NOMEM_MARK", mark, 1);
    setenv("LD_PRELOAD", shim, 1);
    bool ready = harness_spawn(h, NULL, 0);
    unsetenv("LD_PRELOAD");
    if (ready && pml_client_open(h->connection_file, &h->client, &err) != PML_OK) {
        /* It may have ended by now, and the way to it with it. */
        int ended = wait_in_time(h, number);
        if (ended != 1)
            fail_msg("status %d after allocation %ld was refused; %s", ended, number, err.message);
    } else if (ready) {
        memset(&life, 0, sizeof life);
        talk(h, number > 0 ? 1 : harness_bound(30));
        if (number == 0 && !(life.trains && life.saved))
            fail_msg("a life that lacks nothing: trains %d, saved %d", life.trains, life.saved);
        kill(h->coordinator, SIGTERM); /* one more stop, while the first one is under way */
        int ended = wait_in_time(h, number);
        if (ended > 1)
            fail_msg("status %d after allocation %ld was refused", ended, number);
    } else if (atoi(h->error) != PML_NO_MEMORY) {
        fail_msg("allocation %ld: it said \"%s\"", number, h->error);
    }
    FILE *file = fopen(mark, "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%ld %d", &seen, &refused), 2);
    fclose(file);
    assert_int_equal(refused, number > 0 && number <= seen);
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

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_allocation_of_the_coordinator)};
    if (!harness_programs(argc, argv) || argc < 4)
        return 2;
    shim = argv[3];
    setenv("FAKE_STEP_MS", "20", 1); /* few steps in a life, however long it is */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
