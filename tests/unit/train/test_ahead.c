/* What is compiled while weights load and steps are made: attention alone, for the most documents
 * and for the next smaller size that graphs have; once where rows are full; for other sizes when
 * batches of them come, once; an end that does not wait for all; and that nothing is recorded
 * before. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdatomic.h>
#include <string.h>

#include "pml/base/clock.h"
#include "stepper_impl.h"

enum { NODES = 5, MOST = 64 };

enum { FORWARD, BACKWARD, WAYS };

typedef struct asking {
    int32_t max_q, equal;
    int64_t slots;
} asking;

static asking asked[WAYS][MOST];
static atomic_int n_asked[WAYS];
static atomic_bool slow; /* until the end is asked for */
static pml_stepper stepper;

static pml_status prepare(pml_device *device, pml_op op, const pml_op_args *args, pml_error *err)
{
    (void)device;
    const pml_attention_args *f = &args->attention;
    const pml_attention_bwd_args *b = &args->attention_bwd;
    if (op == PML_OP_attention)
        asked[FORWARD][atomic_load(&n_asked[FORWARD])] =
            (asking){f->max_q, f->equal, f->cu_q.cols - 1};
    else if (op == PML_OP_attention_bwd)
        asked[BACKWARD][atomic_load(&n_asked[BACKWARD])] =
            (asking){b->max_q, b->equal, b->cu_q.cols - 1};
    else
        return PML_FAIL(err, PML_INTERNAL, "nothing else is compiled late");
    atomic_fetch_add(&n_asked[op == PML_OP_attention ? FORWARD : BACKWARD], 1);
    while (atomic_load(&slow) && !atomic_load(&stepper.ahead_enough))
        pml_clock_sleep(0.001);
    return PML_FAIL(err, PML_INTERNAL, "the op will say so itself");
}

static atomic_int n_on, n_off;
static int asked_before; /* the thread begins */

/* Off comes before anybody may take the thread for through. */
static void prepares(pml_device *device, bool on)
{
    (void)device;
    if (!on)
        assert_false(atomic_load(&stepper.ahead_done)); /* is_ahead is the other thread's own */
    else
        assert_int_equal(n_asked[FORWARD] + n_asked[BACKWARD], asked_before);
    atomic_fetch_add(on ? &n_on : &n_off, 1);
}

static int n_begun, n_launched;

static pml_status begin(pml_queue *queue, pml_error *err)
{
    (void)queue, (void)err;
    n_begun++;
    return PML_OK;
}

static pml_status end(pml_queue *queue, size_t room, pml_graph **graph, size_t *bytes,
                      pml_error *err)
{
    (void)queue, (void)err;
    *graph = (pml_graph *)(void *)&n_begun; /* some address */
    *bytes = 1;
    assert_true(*bytes <= room);
    return PML_OK;
}

static pml_status launch(pml_queue *queue, pml_graph *graph, pml_error *err)
{
    (void)queue, (void)err;
    assert_ptr_equal(graph, &n_begun);
    n_launched++;
    return PML_OK;
}

static void drop(pml_graph **graph)
{
    *graph = NULL;
}

static const pml_backend compiles = {.name = "late",
                                     .graph_begin = begin,
                                     .graph_end = end,
                                     .graph_launch = launch,
                                     .graph_destroy = drop,
                                     .prepare = prepare,
                                     .prepares = prepares};
static const pml_backend compiles_nothing = {.name = "early", .graph_begin = begin};

static pml_tensor bounds;
static pml_node nodes[NODES];
static pml_program program;

static void set_up(const pml_backend *backend, int32_t docs)
{
    static const pml_op ops[NODES] = {PML_OP_embed, PML_OP_attention, PML_OP_linear,
                                      PML_OP_attention_bwd, PML_OP_attention};
    memset(&program, 0, sizeof program);
    bounds = (pml_tensor){.dtype = PML_I32,
                          .row_extent = PML_EXTENT_FIXED,
                          .col_extent = PML_EXTENT_BOUNDS,
                          .rows = 1,
                          .cols = docs + 1,
                          .parent = -1};
    for (int i = 0; i < NODES; i++) {
        nodes[i] = (pml_node){.op = ops[i]};
        for (int o = 0; o < PML_OP_MAX_VIEWS; o++)
            nodes[i].operands[o].tensor = -1;
    }
    nodes[1].operands[PML_OPERAND(attention, cu_q)].tensor = 0;
    nodes[3].operands[PML_OPERAND(attention_bwd, cu_q)].tensor = 0;
    program.nodes = nodes;
    program.n_nodes = NODES;
    program.tensors = &bounds;
    program.n_tensors = 1;
    program.limits =
        (pml_batch_limits){.tokens = 8192, .docs = docs, .labels = 8188, .max_doc = 2048};
    program.segments[PML_SEGMENT_MICRO].end = NODES - 1; /* the last is another segment's */
    stepper.program = &program;
    stepper.backend = backend;
    stepper.arena = &bounds; /* looked at by nobody */
    stepper.asked_for = 0;
    asked_before = 0;
    for (int way = 0; way < WAYS; way++)
        atomic_store(&n_asked[way], 0);
    atomic_store(&n_on, 0);
    atomic_store(&n_off, 0);
}

static void wait_for_the_end(void)
{
    while (pml_stepper_is_compiling(&stepper))
        pml_clock_sleep(0.001);
}

/* The thread's own end, not one that pmli_ahead_end brings about. */
static void let_it_end(void)
{
    pmli_ahead_begin(&stepper);
    wait_for_the_end();
    pmli_ahead_end(&stepper);
}

/* A batch of so many documents comes, and what it asks for is waited for: how many threads began
 * for it. */
static int met(int32_t docs, int32_t equal)
{
    const pml_counts counts = {
        .tokens = 8192, .docs = docs, .labels = 100, .max_doc = 2048, .equal = equal};
    const int before = n_on;
    wait_for_the_end();
    asked_before = n_asked[FORWARD] + n_asked[BACKWARD];
    pmli_ahead_meet(&stepper, &counts);
    const int begun = n_on - before;
    wait_for_the_end();
    return begun;
}

static void test_full_rows_are_asked_once(void **state)
{
    (void)state;
    set_up(&compiles, 4);
    let_it_end();
    for (int way = 0; way < WAYS; way++) {
        assert_int_equal(n_asked[way], 1);
        assert_int_equal(asked[way][0].equal, 1);
        assert_int_equal(asked[way][0].slots, 4);
        assert_int_equal(asked[way][0].max_q, 2048);
    }
}

static void test_packed_rows_are_asked_for_two_sizes(void **state)
{
    (void)state;
    set_up(&compiles, 40);
    let_it_end();
    assert_int_equal(n_on, 1);
    assert_int_equal(n_off, 1);
    for (int way = 0; way < WAYS; way++) {
        assert_int_equal(n_asked[way], 2);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(asked[way][i].equal, 0);
            assert_int_equal(asked[way][i].slots, i == 0 ? 40 : 32);
        }
    }
}

/* Each size once, and the guesses not again. */
static void test_another_size_is_asked_for_when_it_comes(void **state)
{
    (void)state;
    set_up(&compiles, 40);
    pmli_ahead_begin(&stepper);
    assert_int_equal(met(40, 0), 0);
    assert_int_equal(met(32, 0), 0);
    assert_int_equal(n_asked[FORWARD], 2);
    static const struct {
        int32_t docs, equal;
    } sizes[] = {{8, 0}, {16, 0}, {4, 1}, {4, 0}, {1, 0}, {1, 1}};
    for (int i = 0; i < 6; i++) {
        const int forward = n_asked[FORWARD], backward = n_asked[BACKWARD];
        assert_int_equal(met(sizes[i].docs, sizes[i].equal), 1);
        assert_int_equal(n_asked[FORWARD], forward + 1);
        assert_int_equal(n_asked[BACKWARD], backward + 1);
        assert_int_equal(asked[FORWARD][forward].slots, sizes[i].docs);
        assert_int_equal(asked[FORWARD][forward].equal, sizes[i].equal);
        assert_int_equal(n_off, n_on);
    }
    for (int i = 0; i < 6; i++)
        assert_int_equal(met(sizes[i].docs, sizes[i].equal), 0);
    pmli_ahead_end(&stepper);
}

/* A batch of so many documents comes, and its attention takes until pmli_ahead_end. */
static void compile_slowly_for(int32_t docs)
{
    const pml_counts counts = {.tokens = 8192, .docs = docs, .labels = 100, .max_doc = 2048};
    atomic_store(&slow, true);
    asked_before = n_asked[FORWARD] + n_asked[BACKWARD];
    pmli_ahead_meet(&stepper, &counts);
    assert_true(pml_stepper_is_compiling(&stepper));
}

static void wait_for_the_first(void)
{
    while (atomic_load(&n_asked[FORWARD]) < 1)
        pml_clock_sleep(0.001);
}

static void test_the_end_waits_for_one_alone(void **state)
{
    (void)state;
    set_up(&compiles, 40);
    atomic_store(&slow, true);
    pmli_ahead_begin(&stepper);
    wait_for_the_first();
    pmli_ahead_end(&stepper); /* says that it is enough, which the first waits for */
    atomic_store(&slow, false);
    assert_int_equal(n_asked[FORWARD], 1);
    assert_int_equal(n_asked[BACKWARD], 0);
    assert_int_equal(n_on, 1);
    assert_int_equal(n_off, 1); /* this way, too */
}

/* While the thread is at something a batch that comes goes without; one like it is asked for later.
 */
static void test_one_thing_at_a_time(void **state)
{
    (void)state;
    const pml_counts eight = {.tokens = 8192, .docs = 8, .labels = 100, .max_doc = 2048};
    set_up(&compiles, 40);
    atomic_store(&slow, true);
    pmli_ahead_begin(&stepper);
    wait_for_the_first();
    pmli_ahead_meet(&stepper, &eight);
    assert_int_equal(n_on, 1);
    assert_true(pml_stepper_is_compiling(&stepper)); /* nor was the thread cut short */
    atomic_store(&slow, false);
    wait_for_the_end();
    assert_int_equal(n_asked[FORWARD], 2); /* both guesses */
    assert_int_equal(met(8, 0), 1);
    assert_int_equal(asked[FORWARD][2].slots, 8);
    pmli_ahead_end(&stepper);
}

static void test_nothing_to_compile(void **state)
{
    (void)state;
    const pml_counts eight = {.tokens = 8192, .docs = 8, .labels = 100, .max_doc = 2048};
    set_up(&compiles_nothing, 40);
    pmli_ahead_begin(&stepper);
    pmli_ahead_meet(&stepper, &eight);
    assert_false(pml_stepper_is_compiling(&stepper));
    pmli_ahead_end(&stepper);
    assert_int_equal(n_asked[FORWARD] + n_asked[BACKWARD], 0);
}

/* An empty segment: begun, ended and launched is what counts. */
static void test_nothing_is_recorded_before(void **state)
{
    (void)state;
    const pml_counts counts = {.tokens = 8192, .docs = 40, .labels = 8188, .max_doc = 2048};
    pml_error err = PML_ERROR_INIT;
    set_up(&compiles, 40);
    n_begun = n_launched = 0;
    atomic_store(&slow, true);
    pmli_ahead_begin(&stepper);
    wait_for_the_first();
    for (int i = 0; i < 3; i++)
        assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_NORM, &counts, &err), PML_OK);
    assert_int_equal(n_begun, 0);
    pmli_ahead_end(&stepper);
    atomic_store(&slow, false);
    /* Once more op by op: now with what was compiled. */
    assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_NORM, &counts, &err), PML_OK);
    assert_int_equal(n_begun, 0);
    /* And as long as something is compiled for others, which a recording would wait for. */
    compile_slowly_for(8);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_NORM, &counts, &err), PML_OK);
    assert_int_equal(n_begun, 0);
    pmli_ahead_end(&stepper);
    atomic_store(&slow, false);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_NORM, &counts, &err), PML_OK);
    assert_int_equal(n_begun, 1);
    assert_int_equal(n_launched, 2);
    compile_slowly_for(16); /* what is recorded has what it needs */
    assert_int_equal(pmli_run_recorded(&stepper, PML_SEGMENT_NORM, &counts, &err), PML_OK);
    assert_int_equal(n_launched, 3);
    pmli_ahead_end(&stepper);
    atomic_store(&slow, false);
    pmli_drop_recorded(&stepper);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_rows_are_asked_once),
        cmocka_unit_test(test_packed_rows_are_asked_for_two_sizes),
        cmocka_unit_test(test_another_size_is_asked_for_when_it_comes),
        cmocka_unit_test(test_the_end_waits_for_one_alone),
        cmocka_unit_test(test_one_thing_at_a_time),
        cmocka_unit_test(test_nothing_to_compile),
        cmocka_unit_test(test_nothing_is_recorded_before),
    };
    return cmocka_run_group_tests_name("train.ahead", tests, NULL, NULL);
}
