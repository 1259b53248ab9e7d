/* Placement on its own: made-up lifetimes, where the right answer is known or can be proved. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "pml/plan/program.h"

enum { KIB = 1024, MOST = 200 };

/* A program of `nodes` fills in one segment; tensor i is used at its first and last node. */
typedef struct made {
    pml_program program;
    pml_tensor tensors[MOST];
    pml_node nodes[MOST];
} made;

static void begin(made *m, int nodes)
{
    memset(m, 0, sizeof *m);
    m->program.tensors = m->tensors;
    m->program.nodes = m->nodes;
    m->program.n_nodes = nodes;
    m->program.segments[PML_SEGMENT_MICRO].end = nodes;
    for (int n = 0; n < nodes; n++)
        for (int v = 0; v < PML_OP_MAX_VIEWS; v++)
            m->nodes[n].operands[v].tensor = -1;
}

static void use(made *m, int node, int tensor)
{
    int v = 0;
    while (m->nodes[node].operands[v].tensor >= 0)
        v++;
    assert_in_range(v, 0, PML_OP_MAX_VIEWS - 1);
    m->nodes[node].operands[v].tensor = tensor;
}

static int tensor(made *m, size_t bytes, int first, int last)
{
    int id = m->program.n_tensors++;
    m->tensors[id] = (pml_tensor){.dtype = PML_U8,
                                  .rows = 1,
                                  .cols = (int64_t)bytes,
                                  .cause = PML_CAUSE_ACTIVATIONS,
                                  .parent = -1};
    use(m, first, id);
    use(m, last, id);
    return id;
}

static void place(made *m)
{
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_program_place(&m->program, &err), PML_OK);
    if (pml_program_check_places(&m->program, &err) != PML_OK)
        fail_msg("%s", err.message);
}

static void test_apart_in_time_share_memory(void **state)
{
    (void)state;
    static made m;
    begin(&m, 4);
    int a = tensor(&m, 4 * KIB, 0, 1), b = tensor(&m, 4 * KIB, 2, 3);
    place(&m);
    assert_int_equal(m.tensors[a].offset, m.tensors[b].offset);
    assert_int_equal(m.program.arena, 4 * KIB);
}

static void test_one_node_in_common_does_not_share(void **state)
{
    (void)state;
    static made m;
    begin(&m, 3);
    tensor(&m, 4 * KIB, 0, 1);
    tensor(&m, 4 * KIB, 1, 2);
    place(&m);
    assert_int_equal(m.program.arena, 8 * KIB);
}

static void test_tightest_gap_is_taken(void **state)
{
    (void)state;
    static made m;
    begin(&m, 6);
    /* Placed in order of size, from the bottom: 8, 7, 6 and 5 KiB; the first and the third are gone
     * by the time the last, of 3 KiB, comes: holes of 8 and of 6, and the smaller one is taken. */
    tensor(&m, 8 * KIB, 0, 1);
    tensor(&m, 7 * KIB, 0, 5);
    tensor(&m, 6 * KIB, 0, 1);
    tensor(&m, 5 * KIB, 0, 5);
    int late = tensor(&m, 3 * KIB, 3, 4);
    place(&m);
    assert_int_equal(m.tensors[late].offset, 15 * KIB);
    assert_int_equal(m.program.arena, 26 * KIB);
}

static void test_persistent_lie_below_and_parts_inside(void **state)
{
    (void)state;
    static made m;
    begin(&m, 2);
    int whole = tensor(&m, 4 * KIB, 0, 1), part = tensor(&m, KIB, 0, 1);
    m.tensors[whole].persistent = m.tensors[part].persistent = true;
    m.tensors[part].parent = whole;
    m.tensors[part].at = 512;
    m.tensors[whole].cause = PML_CAUSE_WEIGHTS;
    tensor(&m, KIB, 0, 0);
    place(&m);
    assert_int_equal(m.tensors[part].offset, 512);
    assert_int_equal(m.program.by_cause[PML_CAUSE_WEIGHTS], 4 * KIB);
    assert_int_equal(m.program.by_cause[PML_CAUSE_ACTIVATIONS], KIB);
    assert_int_equal(m.program.arena, 5 * KIB);
}

static void test_held_lives_through_its_segment(void **state)
{
    (void)state;
    static made m;
    begin(&m, 4);
    int cache = tensor(&m, 4 * KIB, 1, 1);
    m.tensors[cache].held = true;
    tensor(&m, 4 * KIB, 0, 0);
    tensor(&m, 4 * KIB, 3, 3);
    place(&m);
    assert_int_equal(m.program.arena, 8 * KIB);
}

static void test_segments_overlap(void **state)
{
    (void)state;
    static made m;
    begin(&m, 4);
    m.program.segments[PML_SEGMENT_MICRO].end = 2;
    m.program.segments[PML_SEGMENT_EVAL].first = 2;
    m.program.segments[PML_SEGMENT_EVAL].end = 4;
    tensor(&m, 4 * KIB, 0, 1);
    tensor(&m, 6 * KIB, 2, 3);
    place(&m);
    assert_int_equal(m.program.arena, 6 * KIB);
}

static void test_too_large_is_refused(void **state)
{
    (void)state;
    static made m;
    begin(&m, 1);
    int id = tensor(&m, KIB, 0, 0);
    m.tensors[id].rows = INT64_MAX / 2;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_program_place(&m.program, &err), PML_INVALID);
}

static void test_check_finds_overlap(void **state)
{
    (void)state;
    static made m;
    begin(&m, 2);
    tensor(&m, 4 * KIB, 0, 1);
    int b = tensor(&m, 4 * KIB, 0, 1);
    place(&m);
    m.tensors[b].offset -= 256;
    assert_int_equal(pml_program_check_places(&m.program, NULL), PML_INTERNAL);
}

/* Many random lifetimes: never an overlap, never worse than twice the unavoidable, always the
 * same. */
static void test_random(void **state)
{
    (void)state;
    static made m, again;
    srand(3);
    for (int round = 0; round < 200; round++) {
        int nodes = 2 + rand() % 60;
        size_t live[MOST] = {0}, most = 0;
        begin(&m, nodes);
        for (int i = 0; i < 120; i++) {
            int first = rand() % nodes, last = first + rand() % (nodes - first);
            if (m.nodes[first].operands[PML_OP_MAX_VIEWS - 2].tensor >= 0 ||
                m.nodes[last].operands[PML_OP_MAX_VIEWS - 2].tensor >= 0)
                continue;
            size_t bytes = (size_t)(1 + rand() % 40) * 256;
            tensor(&m, bytes, first, last);
            for (int n = first; n <= last; n++)
                live[n] += bytes;
        }
        for (int n = 0; n < nodes; n++)
            most = live[n] > most ? live[n] : most;
        memcpy(&again, &m, sizeof m);
        again.program.tensors = again.tensors;
        again.program.nodes = again.nodes;
        place(&m);
        place(&again);
        assert_memory_equal(m.tensors, again.tensors, sizeof m.tensors);
        assert_in_range(m.program.arena, most, 2 * most);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_apart_in_time_share_memory),
        cmocka_unit_test(test_one_node_in_common_does_not_share),
        cmocka_unit_test(test_tightest_gap_is_taken),
        cmocka_unit_test(test_persistent_lie_below_and_parts_inside),
        cmocka_unit_test(test_held_lives_through_its_segment),
        cmocka_unit_test(test_segments_overlap),
        cmocka_unit_test(test_too_large_is_refused),
        cmocka_unit_test(test_check_finds_overlap),
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
