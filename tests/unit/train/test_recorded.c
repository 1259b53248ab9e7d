/* Graphs within the memory that a plan has for them: those of batches that come often, by what the
 * backend says a graph takes; never more of them than that; and every batch is run once, with a
 * graph or without. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "stepper_impl.h"

/* A graph is told by its bytes. */
struct pml_graph {
    size_t bytes;
};

static size_t held, most_held, next_bytes; /* of graphs there are; of the next that is recorded */
static int n_begun, n_made, n_launched, n_run, n_synced;
static bool recording, begin_fails, end_fails;

static pml_status begin(pml_queue *queue, pml_error *err)
{
    (void)queue;
    if (begin_fails)
        return PML_FAIL(err, PML_INTERNAL, "no recording today");
    n_begun++;
    recording = true;
    return PML_OK;
}

/* The segment's one op. */
static pml_status fill(pml_queue *queue, const pml_fill_args *args, pml_error *err)
{
    (void)queue, (void)args, (void)err;
    n_run += recording ? 0 : 1;
    return PML_OK;
}

static pml_status sync_all(pml_queue *queue, pml_error *err)
{
    (void)queue, (void)err;
    n_synced++;
    return PML_OK;
}

static pml_status end(pml_queue *queue, size_t room, pml_graph **graph, size_t *bytes,
                      pml_error *err)
{
    (void)queue;
    *graph = NULL;
    *bytes = 0;
    assert_true(recording);
    recording = false;
    if (end_fails)
        return PML_FAIL(err, PML_INTERNAL, "what was recorded is no graph");
    *bytes = next_bytes;
    if (next_bytes > room)
        return PML_OK;
    *graph = malloc(sizeof **graph);
    assert_non_null(*graph);
    (*graph)->bytes = next_bytes;
    n_made++;
    held += next_bytes;
    most_held = held > most_held ? held : most_held;
    return PML_OK;
}

static pml_status launch(pml_queue *queue, pml_graph *graph, pml_error *err)
{
    (void)queue, (void)err;
    assert_non_null(graph);
    n_launched++;
    return PML_OK;
}

static void drop(pml_graph **graph)
{
    held -= (*graph)->bytes;
    free(*graph);
    *graph = NULL;
}

static const pml_backend backend = {.name = "recording",
                                    .sync = sync_all,
                                    .graph_begin = begin,
                                    .graph_end = end,
                                    .graph_launch = launch,
                                    .graph_destroy = drop,
                                    .op = {.fill = fill}};
static pml_node node = {.op = PML_OP_fill};
static pml_program program;
static pml_stepper stepper;

static int set_up(void **state)
{
    (void)state;
    memset(&stepper, 0, sizeof stepper);
    for (int o = 0; o < PML_OP_MAX_VIEWS; o++)
        node.operands[o].tensor = -1;
    program.nodes = &node;
    program.n_nodes = 1;
    program.segments[PML_SEGMENT_MICRO].end = 1;
    stepper.program = &program;
    stepper.backend = &backend;
    held = most_held = 0;
    n_begun = n_made = n_launched = n_run = n_synced = 0;
    recording = begin_fails = end_fails = false;
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    pmli_drop_recorded(&stepper);
    return held == 0 ? 0 : -1;
}

static size_t room(void)
{
    return pml_plan_graphs(&backend);
}

/* Batches of a size whose graph takes so much; how many of them went as a graph. */
static int run(int32_t docs, size_t bytes, int times)
{
    const pml_counts counts = {.tokens = 64, .docs = docs};
    const int before = n_launched, run_before = n_run;
    pml_error err = PML_ERROR_INIT;
    next_bytes = bytes;
    for (int i = 0; i < times; i++)
        assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_MICRO, &counts, &err), PML_OK);
    assert_true(held <= room());
    assert_int_equal(n_launched - before + n_run - run_before, times);
    return n_launched - before;
}

static void test_each_size_has_one_where_there_is_room(void **state)
{
    (void)state;
    for (int docs = 1; docs <= 4; docs++)
        assert_int_equal(run(docs, room() / 4, 10), 9); /* once op by op */
    assert_int_equal(n_begun, 4);
    assert_int_equal(held, room());
    for (int docs = 1; docs <= 4; docs++)
        assert_int_equal(run(docs, room() / 4, 1), 1);
    assert_int_equal(n_made, 4);
}

static void test_a_graph_that_never_fits(void **state)
{
    (void)state;
    assert_int_equal(run(1, room() + 1, 1000), 0);
    assert_int_equal(n_begun, 1); /* and is not recorded again */
    assert_int_equal(run(2, room(), 10), 9);
}

static void test_what_comes_often_has_the_room(void **state)
{
    (void)state;
    assert_int_equal(run(1, room(), 10), 9);
    assert_int_equal(run(2, room(), 20), 0); /* not much more often than the first */
    assert_int_equal(n_made, 1);
    assert_true(run(2, room(), 20) > 0);
    assert_int_equal(n_made, 2);
    assert_int_equal(held, room());
    assert_int_equal(run(2, room(), 10), 10);
    assert_int_equal(run(1, room(), 1), 0);
}

/* Nothing is gained by recording each time: sizes that take turns leave the graphs alone. */
static void test_turns_do_not_drop_each_others(void **state)
{
    (void)state;
    for (int turn = 0; turn < 500; turn++)
        for (int docs = 1; docs <= 6; docs++)
            run(docs, room() / 2, 1);
    assert_int_equal(n_made, 2);
    assert_int_equal(n_begun, 2);
    assert_true(n_launched >= 2 * 490);
}

/* What was used long ago counts less and less. */
static void test_a_run_that_changes(void **state)
{
    (void)state;
    run(1, room(), 10000);
    int launched = run(2, room(), 2000);
    assert_int_equal(n_made, 2);
    assert_true(launched > 0);
}

/* Several go for one only where it comes more often than all of them together. */
static void test_many_go_for_one(void **state)
{
    (void)state;
    for (int docs = 1; docs <= 5; docs++)
        run(docs, room() / 5, 10);
    run(6, room() + 1, 2); /* too seldom to be tried */
    assert_int_equal(n_made, 5);
    run(7, room() / 5 * 4, 2);
    assert_int_equal(run(7, room() / 5 * 4, 60), 0);
    assert_int_equal(held, room() / 5 * 5);
    assert_int_equal(n_synced, 0);
    assert_true(run(7, room() / 5 * 4, 60) > 0);
    assert_int_equal(held, room() / 5 * 5);
    assert_int_equal(n_synced, 1); /* what was dropped had run */
}

/* Batches of more sizes than are remembered leave the graphs of those that come often. */
static void test_strangers_leave_graphs_alone(void **state)
{
    (void)state;
    run(1, room() / 2, 20);
    run(2, room() / 2, 20);
    for (int i = 0; i < 100; i++) {
        for (int docs = 100; docs < 100 + PMLI_RECORDED; docs++)
            run(docs, room() / 2, 1);
        assert_int_equal(run(1, room() / 2, 3), 3);
        assert_int_equal(run(2, room() / 2, 3), 3);
    }
    assert_int_equal(n_made, 2);
    assert_int_equal(n_begun, 2); /* nor is a stranger recorded in vain */
}

/* What goes wrong is told, nothing is held, and the next batch tries again. */
static void test_a_recording_that_fails(void **state)
{
    (void)state;
    const pml_counts counts = {.tokens = 64, .docs = 1};
    pml_error err = PML_ERROR_INIT;
    run(1, room(), 1);
    begin_fails = true;
    assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_MICRO, &counts, &err), PML_INTERNAL);
    assert_string_equal(err.message, "no recording today");
    begin_fails = false;
    end_fails = true;
    assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_MICRO, &counts, &err), PML_INTERNAL);
    assert_string_equal(err.message, "what was recorded is no graph");
    assert_int_equal(held, 0);
    end_fails = false;
    assert_int_equal(run(1, room(), 5), 5);
}

/* More sizes than are remembered, some often, and graphs of all bytes: hardly anything is recorded
 * for nothing, and most batches of those that come often are launched. */
static void test_any_sizes(void **state)
{
    (void)state;
    unsigned random = 7;
    int often = 0, launched = 0;
    for (int i = 0; i < 20000; i++) {
        random = random * 1664525U + 1013904223U;
        const bool usual = random >> 31 != 0;
        const int32_t docs =
            usual ? 1 + (int32_t)(random >> 24) % 4 : 5 + (int32_t)(random >> 24) % 48;
        int went = run(docs, room() / 60 * (size_t)(8 + docs % 5), 1);
        often += usual;
        launched += usual && went;
    }
    assert_true(most_held > room() / 2);
    assert_true(launched > often / 10 * 9);
    assert_in_range(n_made, 4, 80);
    assert_in_range(n_begun, n_made, n_made + 100);
}

static void say_lacks(pml_device *device, char lacks[PML_LACKS])
{
    assert_ptr_equal(device, &held);
    strcpy(lacks, "a library");
}

static void test_what_its_device_lacks_by_now(void **state)
{
    (void)state;
    char lacks[PML_LACKS] = "of before";
    pml_stepper_lacks(&stepper, lacks);
    assert_string_equal(lacks, "");
    pml_backend says = backend;
    says.lacks = say_lacks;
    stepper.backend = &says;
    stepper.device = (pml_device *)&held;
    pml_stepper_lacks(&stepper, lacks);
    assert_string_equal(lacks, "a library");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_each_size_has_one_where_there_is_room, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_a_graph_that_never_fits, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_comes_often_has_the_room, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_turns_do_not_drop_each_others, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_many_go_for_one, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_strangers_leave_graphs_alone, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_recording_that_fails, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_run_that_changes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_any_sizes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_its_device_lacks_by_now, set_up, tear_down),
    };
    return cmocka_run_group_tests_name("train.recorded", tests, NULL, NULL);
}
