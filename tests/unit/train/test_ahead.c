/* What is compiled while weights load: attention alone, for the most documents and for the next
 * smaller size that graphs have; once where rows are full; and an end that does not wait for all.
 */
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

static struct {
    pml_op op;
    int32_t max_q, equal;
    int64_t slots;
} asked[MOST];
static atomic_int n_asked;
static atomic_bool slow; /* until the end is asked for */
static pml_stepper stepper;

static pml_status prepare(pml_device *device, pml_op op, const pml_op_args *args, pml_error *err)
{
    (void)device;
    bool forward = op == PML_OP_attention;
    int at = atomic_load(&n_asked);
    asked[at].op = op;
    asked[at].max_q = forward ? args->attention.max_q : args->attention_bwd.max_q;
    asked[at].equal = forward ? args->attention.equal : args->attention_bwd.equal;
    asked[at].slots = (forward ? args->attention.cu_q : args->attention_bwd.cu_q).cols - 1;
    atomic_store(&n_asked, at + 1);
    while (atomic_load(&slow) && !atomic_load(&stepper.ahead_enough))
        pml_clock_sleep(0.001);
    return PML_FAIL(err, PML_INTERNAL, "the op will say so itself");
}

static pml_status begin(pml_queue *queue, pml_error *err)
{
    (void)queue, (void)err;
    return PML_OK;
}

static const pml_backend compiles = {.name = "late", .graph_begin = begin, .prepare = prepare};
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
    atomic_store(&n_asked, 0);
}

/* The thread's own end, not one that pmli_ahead_end brings about. */
static void let_it_end(void)
{
    pmli_ahead_begin(&stepper);
    assert_true(stepper.is_ahead);
    pthread_join(stepper.ahead, NULL);
    stepper.is_ahead = false;
}

static void test_full_rows_are_asked_once(void **state)
{
    (void)state;
    set_up(&compiles, 4);
    let_it_end();
    assert_int_equal(n_asked, 2);
    assert_int_equal(asked[0].op, PML_OP_attention);
    assert_int_equal(asked[1].op, PML_OP_attention_bwd);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(asked[i].equal, 1);
        assert_int_equal(asked[i].slots, 4);
        assert_int_equal(asked[i].max_q, 2048);
    }
}

static void test_packed_rows_are_asked_for_two_sizes(void **state)
{
    (void)state;
    set_up(&compiles, 40);
    let_it_end();
    assert_int_equal(n_asked, 4);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(asked[i].op, i % 2 == 0 ? PML_OP_attention : PML_OP_attention_bwd);
        assert_int_equal(asked[i].equal, 0);
        assert_int_equal(asked[i].slots, i < 2 ? 40 : 32);
    }
}

static void test_the_end_waits_for_one_alone(void **state)
{
    (void)state;
    set_up(&compiles, 40);
    atomic_store(&slow, true);
    pmli_ahead_begin(&stepper);
    while (atomic_load(&n_asked) < 1)
        pml_clock_sleep(0.001);
    pmli_ahead_end(&stepper); /* says that it is enough, which the first waits for */
    atomic_store(&slow, false);
    assert_int_equal(n_asked, 1);
}

static void test_nothing_to_compile(void **state)
{
    (void)state;
    set_up(&compiles_nothing, 40);
    pmli_ahead_begin(&stepper);
    assert_false(stepper.is_ahead);
    pmli_ahead_end(&stepper);
    assert_int_equal(n_asked, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_rows_are_asked_once),
        cmocka_unit_test(test_packed_rows_are_asked_for_two_sizes),
        cmocka_unit_test(test_the_end_waits_for_one_alone),
        cmocka_unit_test(test_nothing_to_compile),
    };
    return cmocka_run_group_tests_name("train.ahead", tests, NULL, NULL);
}
