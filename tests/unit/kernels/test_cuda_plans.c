/* Plans of cuDNN's attention by a builder of the test's own: one a shape; who waits for another
 * thread's and who does without, while it builds and between two; that what has no plan, or one
 * that wants too much, is logged with the reason, once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h> /* wants the ones above before it */

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

#include "pml/base/clock.h"

#include "cuda/sdpa_plans.c"

enum { LOG = 4096, ROOM = 1000 };

static atomic_int n_built, n_dropped;
static atomic_bool held; /* a builder that is begun waits */
static pmli_sdpa_plans *plans;
static char logged[LOG];
static int to_stderr;

/* Documents of 13 rows have no plan, those of 17 want more than there is. */
static bool build_fake(void *user, pmli_sdpa_plan *plan, char why[PMLI_SDPA_WHY])
{
    assert_ptr_equal(user, &n_built);
    atomic_fetch_add(&n_built, 1);
    while (atomic_load(&held))
        pml_clock_sleep(0.001);
    if (plan->shape.longest == 13) {
        snprintf(why, PMLI_SDPA_WHY, "No valid engine configs");
        return false;
    }
    plan->graph = &n_dropped;
    plan->workspace = plan->shape.longest == 17 ? ROOM + 1 : ROOM;
    return true;
}

static void drop_fake(void *graph)
{
    assert_ptr_equal(graph, &n_dropped);
    atomic_fetch_add(&n_dropped, 1);
}

static FILE *log_file;

static int set_up(void **state)
{
    (void)state;
    static const pmli_sdpa_builder builder = {build_fake, drop_fake, &n_built};
    pml_error err = PML_ERROR_INIT;
    atomic_store(&n_built, 0);
    atomic_store(&n_dropped, 0);
    atomic_store(&held, false);
    log_file = tmpfile();
    to_stderr = dup(STDERR_FILENO);
    if (log_file == NULL || to_stderr < 0 || dup2(fileno(log_file), STDERR_FILENO) < 0)
        return -1;
    return pmli_sdpa_plans_new(&builder, &plans, &err) == PML_OK ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    pmli_sdpa_plans_destroy(&plans);
    dup2(to_stderr, STDERR_FILENO);
    close(to_stderr);
    fclose(log_file);
    return plans == NULL ? 0 : -1;
}

/* How often the log has these words. */
static int said(const char *words)
{
    int n = 0;
    ssize_t length = pread(fileno(log_file), logged, sizeof logged - 1, 0);
    logged[length > 0 ? length : 0] = '\0';
    for (const char *at = logged; (at = strstr(at, words)) != NULL; at++)
        n++;
    return n;
}

static bool served(int64_t longest, bool waits)
{
    const pmli_sdpa_shape shape = {.slots = 4, .longest = longest, .equal = 1, .backward = 1};
    const pmli_sdpa_plan *plan;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pmli_sdpa_plans_take(plans, &shape, ROOM, waits, &plan, &err), PML_OK);
    if (plan == NULL)
        return false;
    assert_int_equal(plan->shape.longest, longest);
    assert_ptr_equal(plan->graph, &n_dropped);
    pmli_sdpa_plans_release(plans);
    return true;
}

static void test_a_shape_is_built_once(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        assert_true(served(8, i == 1));
        assert_true(served(9, i == 2));
    }
    assert_int_equal(n_built, 2);
    assert_int_equal(said("attention"), 0);
    char why[PMLI_SDPA_WHY];
    bool some;
    pmli_sdpa_plans_refused(plans, why, &some);
    assert_true(some);
    assert_string_equal(why, "");
    pmli_sdpa_plans_destroy(&plans);
    assert_int_equal(n_dropped, 2);
}

static void test_what_has_no_plan_is_said_with_the_reason(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++)
        assert_false(served(13, i == 1));
    assert_int_equal(n_built, 1);
    assert_int_equal(said("warning"), 1);
    assert_int_equal(said("attention's backward, 4 equal documents of at most 13 rows"), 1);
    assert_int_equal(said("No valid engine configs"), 1);
    char why[PMLI_SDPA_WHY];
    bool some;
    pmli_sdpa_plans_refused(plans, why, &some);
    assert_string_equal(why, "No valid engine configs");
    assert_false(some);
    assert_true(served(8, false)); /* nothing is held back */
    pmli_sdpa_plans_refused(plans, why, &some);
    assert_string_equal(why, "No valid engine configs");
    assert_true(some);
}

static void test_what_wants_too_much_is_said_with_the_sizes(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++)
        assert_false(served(17, i == 1));
    assert_int_equal(n_built, 1);
    assert_int_equal(said("warning"), 1);
    assert_int_equal(said("1001 bytes of workspace and was planned to have 1000"), 1);
    assert_true(served(8, true));
}

typedef struct other {
    pthread_t thread;
    int64_t longest;
    bool waits, done;
} other;

static void *take(void *user)
{
    other *o = user;
    o->done = served(o->longest, o->waits);
    return NULL;
}

static void begin(other *o)
{
    assert_int_equal(pthread_create(&o->thread, NULL, take, o), 0);
}

static void wait_until_built(int n)
{
    while (atomic_load(&n_built) < n)
        pml_clock_sleep(0.001);
}

/* As with deterministic=True: one kernel from the first step on. */
static void test_who_must_waits_for_the_builder(void **state)
{
    (void)state;
    other ahead = {.longest = 8, .waits = true}, first = {.longest = 8, .waits = true};
    pmli_sdpa_plans_ahead(plans, true);
    atomic_store(&held, true);
    begin(&ahead);
    wait_until_built(1);
    begin(&first);
    atomic_store(&held, false);
    pthread_join(ahead.thread, NULL);
    pthread_join(first.thread, NULL);
    assert_true(ahead.done);
    assert_true(first.done);
    assert_int_equal(n_built, 1);
    assert_true(served(9, true)); /* nor does it wait for what nobody has begun */
    assert_int_equal(n_built, 2);
    assert_int_equal(said("attention"), 0);
}

static void test_who_need_not_wait_does_without(void **state)
{
    (void)state;
    other ahead = {.longest = 8, .waits = true};
    pmli_sdpa_plans_ahead(plans, true);
    atomic_store(&held, true);
    begin(&ahead);
    wait_until_built(1);
    assert_false(served(8, false)); /* would never come back if it waited */
    assert_false(served(9, false));
    atomic_store(&held, false);
    pthread_join(ahead.thread, NULL);
    assert_true(ahead.done);
    assert_true(served(8, false));
    /* Between two: what is built serves, nothing else is begun. */
    assert_false(served(9, false));
    assert_int_equal(n_built, 1);
    assert_int_equal(said("until cuDNN's are compiled"), 1);
    pmli_sdpa_plans_ahead(plans, false);
    assert_true(served(9, false));
    assert_int_equal(n_built, 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_a_shape_is_built_once, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_has_no_plan_is_said_with_the_reason, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_what_wants_too_much_is_said_with_the_sizes, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_who_must_waits_for_the_builder, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_who_need_not_wait_does_without, set_up, tear_down),
    };
    return cmocka_run_group_tests_name("kernels.cuda_plans", tests, NULL, NULL);
}
