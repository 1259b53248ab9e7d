/* Snapshots of one worker, which are taken when the log has their steps, where the log is slow. */
#include "keeper.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "pml/base/clock.h"
#include "pml/train/slots.h"

enum { BYTES = 4096 };

/* What the log does in the link's place. */
static bool log_has = true;
static double log_takes;

bool link_logged(worker_link *link, double seconds)
{
    (void)link;
    pml_clock_sleep(log_takes < seconds ? log_takes : seconds);
    return log_has;
}

static pml_status put(job *j, const pml_train_state *state, pml_train_state *whole, void *memory,
                      pml_error *err)
{
    (void)j;
    (void)err;
    *whole = *state;
    memset(memory, (int)state->step, BYTES);
    return PML_OK;
}

static const job_kind kind = {.put = put};

typedef struct fixture {
    int fd;
    void *stage;
    keeper *k;
} fixture;

static void set_up(fixture *f, bool slots)
{
    pml_error err = PML_ERROR_INIT;
    log_has = true;
    log_takes = 0;
    *f = (fixture){.fd = -1};
    f->stage = aligned_alloc(BYTES, BYTES);
    assert_non_null(f->stage);
    if (slots)
        assert_int_equal(pml_slots_create(&f->fd, &err), PML_OK);
    const job_facts facts = {.payload_bytes = BYTES, .stage = f->stage};
    assert_int_equal(keeper_new(&kind, NULL, &facts, f->fd, NULL, &f->k, &err), PML_OK);
}

static void tear_down(fixture *f)
{
    keeper_destroy(&f->k);
    if (f->fd >= 0)
        close(f->fd);
    free(f->stage);
}

static bool is_kept(fixture *f, int64_t step, bool at_once)
{
    pml_train_state state = {.step = step};
    assert_int_equal(keeper_keep(f->k, &state, at_once, NULL), PML_OK);
    return !keeper_lacks(f->k, &state);
}

/* The step that a worker would go on from; -1: none. */
static int64_t newest(const fixture *f)
{
    int slot;
    int64_t step = -1;
    assert_int_equal(pml_slots_choose(f->fd, INT64_MAX, &slot, &step, NULL), PML_OK);
    return slot < 0 ? -1 : step;
}

/* The log took its time while the run stood; that is not what the next snapshot will cost. */
static void a_slow_log_puts_the_next_one_off_no_longer(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, true);
    log_takes = 1.5; /* 200 times as much are 300 s */
    assert_true(is_kept(&f, 1, true));
    log_takes = 0;
    double end = pml_clock_monotonic() + 100;
    while (!is_kept(&f, 2, false) && pml_clock_monotonic() < end)
        pml_clock_sleep(0.05);
    assert_true(pml_clock_monotonic() < end);
    assert_int_equal(newest(&f), 2);
    tear_down(&f);
}

/* In passing a slow log is what it costs, for the step waits. */
static void in_passing_it_does(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, true);
    log_takes = 1;
    log_has = false;
    double begin = pml_clock_monotonic();
    assert_false(is_kept(&f, 1, false)); /* 20 ms, so nothing for 4 s */
    log_takes = 0;
    log_has = true;
    pml_clock_sleep(1.1); /* as far apart as snapshots are that cost nothing */
    bool kept = is_kept(&f, 2, false);
    assert_true(!kept || pml_clock_monotonic() > begin + 4); /* we were held up ourselves */
    tear_down(&f);
}

/* One that the log was too slow for is lacking, and can be taken after all. */
static void what_was_dropped_is_lacking(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, true);
    assert_true(is_kept(&f, 1, true));
    log_has = false;
    assert_false(is_kept(&f, 2, true));
    assert_false(is_kept(&f, 2, true));
    assert_int_equal(newest(&f), 1);
    assert_false(keeper_can(f.k));
    log_has = true;
    assert_true(keeper_can(f.k));
    assert_true(is_kept(&f, 2, true));
    assert_int_equal(newest(&f), 2);
    tear_down(&f);
}

/* Nobody would go on from it. */
static void without_slots_nothing_is_lacking(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, false);
    assert_true(is_kept(&f, 1, true));
    tear_down(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_slow_log_puts_the_next_one_off_no_longer),
        cmocka_unit_test(in_passing_it_does),
        cmocka_unit_test(what_was_dropped_is_lacking),
        cmocka_unit_test(without_slots_nothing_is_lacking),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
