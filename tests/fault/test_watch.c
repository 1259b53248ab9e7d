/* Who is called hung, and by which words: the coordinator's judgement alone, of beats that a test
 * gives it. The whole of it, with processes: test_hang.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "coordinator.h"
#include "pml/train/run.h"

enum { TIMEOUT = 5 };

static int blamed; /* rank, -1: nobody */

/* ---- in the place of the rest of the coordinator ---- */

void fail_worker(coordinator *c, const worker *w, const char *cause, const char *reason)
{
    (void)reason;
    assert_string_equal(cause, "hung");
    blamed = w->rank;
    c->failure.seen = true;
}

bool stop_is_asked(const coordinator *c)
{
    (void)c;
    return false;
}

double pml_run_hang_timeout(const pml_message *run)
{
    (void)run;
    return TIMEOUT;
}

/* ---- */

static void beats(const coordinator *c, int rank, const char *phase, double limit, double idle,
                  int waits_for)
{
    worker *w = &c->workers[rank];
    snprintf(w->phase, sizeof w->phase, "%s", phase);
    w->limit = limit;
    w->idle = idle;
    w->waits_for = waits_for;
    w->told_since = false;
    w->beat_at = 1;
    watch_heard(c, w);
}

static int who_is_blamed(coordinator *c)
{
    blamed = -1;
    c->failure.seen = false;
    watch_tick(c, c->looked_at + 0.2);
    return blamed;
}

/* Rank 1 waits in a step's collective for rank 0, which was last heard to stand. */
static void who_stands_while_another_one_waits_hangs_if_it_says_so_still(void **state)
{
    (void)state;
    worker workers[2] = {{.rank = 0, .pid = getpid()}, {.rank = 1, .pid = getpid()}};
    coordinator c = {.workers = workers, .world = 2, .looked_at = 1};
    beats(&c, 0, "standing", 0, 30, -1);
    beats(&c, 1, "stepping", TIMEOUT, TIMEOUT - 1, 0);
    assert_int_equal(who_is_blamed(&c), -1);
    beats(&c, 1, "stepping", TIMEOUT, TIMEOUT + 1, 0);
    assert_int_equal(who_is_blamed(&c), 0);

    /* A step of it came since, and its next beat is behind others. */
    workers[0].told_since = true;
    assert_int_equal(who_is_blamed(&c), -1);
    beats(&c, 0, "stepping", TIMEOUT, 0, -1);
    assert_int_equal(who_is_blamed(&c), -1);
    beats(&c, 0, "stepping", TIMEOUT, TIMEOUT + 1, -1);
    assert_int_equal(who_is_blamed(&c), 0);
    beats(&c, 0, "standing", 0, 0, -1);
    assert_int_equal(who_is_blamed(&c), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(who_stands_while_another_one_waits_hangs_if_it_says_so_still),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
