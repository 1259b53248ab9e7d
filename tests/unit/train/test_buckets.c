/* Sizes that graphs are recorded for, and when a batch counts as one of equal documents: attention
 * is then told that no bound says anything new, and must not be told so when one does. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "stepper_impl.h"

static pml_status begin(pml_queue *queue, pml_error *err)
{
    (void)queue;
    (void)err;
    return PML_OK;
}

static const pml_backend recording = {.name = "recording", .graph_begin = begin};
static const pml_backend plain = {.name = "plain"};

static pml_counts bucket(const pml_backend *backend, int32_t tokens, int32_t docs, int32_t labels)
{
    static pml_program program = {
        .limits = {.tokens = 8192, .docs = 12, .labels = 8188, .max_doc = 2048}};
    static pml_stepper stepper;
    stepper.program = &program;
    stepper.backend = backend;
    pml_counts live = {.tokens = tokens, .docs = docs, .labels = labels, .max_doc = 2048};
    return pmli_bucket(&stepper, live);
}

static void test_counts_are_rounded_up(void **state)
{
    (void)state;
    pml_counts c = bucket(&recording, 5000, 5, 77);
    assert_in_range(c.tokens, 5000, 5000 + 255);
    assert_int_equal(c.docs, 8);
    assert_in_range(c.labels, 77, 77 + 511);
    assert_int_equal(c.max_doc, 2048);
    c = bucket(&recording, 8192, 9, 8188);
    assert_int_equal(c.tokens, 8192);
    assert_int_equal(c.docs, 12); /* not 16: never more than there is room for */
    assert_int_equal(c.labels, 8188);
    c = bucket(&plain, 5001, 5, 77);
    assert_int_equal(c.tokens, 5001);
    assert_int_equal(c.docs, 5);
    assert_int_equal(c.labels, 77);
    assert_int_equal(c.equal, 0);
}

static void test_equal_documents(void **state)
{
    (void)state;
    static const struct {
        int32_t tokens, docs, equal;
    } batches[] = {
        {8192, 4, 1}, {4096, 2, 1}, {2048, 1, 1}, {6144, 3, 0}, /* 4 slots, one of them empty */
        {8192, 5, 0},                                           /* one is shorter */
        {8191, 4, 0},                                           /* and a token of padding */
        {2047, 1, 0}, {4096, 4, 0},
    };
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
        pml_counts c = bucket(&recording, batches[i].tokens, batches[i].docs, 100);
        assert_int_equal(c.equal, batches[i].equal);
        if (c.equal) {
            assert_int_equal(c.tokens, batches[i].tokens);
            assert_int_equal((int64_t)c.docs * c.max_doc, c.tokens);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts_are_rounded_up),
        cmocka_unit_test(test_equal_documents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
