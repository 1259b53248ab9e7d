#include "scratch.h"

#include "pml/data/batch.h"

static int32_t ids[] = {1, 2, 3, 4, 5}, positions[] = {0, 1, 0, 1, 2}, cu[] = {0, 2, 2, 5};
static int32_t label_rows[] = {0, 2, 3}, labels[] = {2, 4, 5};

static pml_batch whole(void)
{
    return (pml_batch){.n_tokens = 5,
                       .n_docs = 3,
                       .n_labels = 3,
                       .max_doc = 3,
                       .ids = ids,
                       .positions = positions,
                       .cu_seqlens = cu,
                       .label_rows = label_rows,
                       .labels = labels};
}

static void test_accepts(void **state)
{
    (void)state;
    pml_batch batch = whole();
    EXPECT_OK(pml_batch_check(&batch, 6, 3, e));
    const int32_t zero = 0;
    batch = (pml_batch){.cu_seqlens = &zero};
    EXPECT_OK(pml_batch_check(&batch, 6, 3, e));
}

/* One number changed, the offence named, the number put back. */
static void refuse(int32_t *number, int32_t value, const char *words)
{
    pml_batch batch = whole();
    int32_t kept = *number;
    *number = value;
    EXPECT_FAIL(PML_INVALID, words, pml_batch_check(&batch, 6, 3, e));
    *number = kept;
}

static void test_names_the_first_offence(void **state)
{
    (void)state;
    pml_batch batch = whole();
    refuse(&ids[3], 6, "token 3 of the batch has id 6");
    refuse(&ids[0], -1, "token 0 of the batch has id -1");
    refuse(&positions[4], 3, "token 4 of the batch has position 3");
    refuse(&positions[4], -1, "token 4 of the batch has position -1");
    refuse(&cu[0], 1, "span");
    refuse(&cu[3], 4, "span");
    refuse(&cu[1], 3, "document 1");
    refuse(&cu[1], INT32_MIN, "document 0");
    refuse(&label_rows[1], 0, "label 1 of the batch is at row 0");
    refuse(&label_rows[2], 5, "label 2");
    refuse(&label_rows[0], -1, "label 0");
    refuse(&labels[2], 6, "label 2 of the batch is 6");
    refuse(&labels[2], -100, "label 2 of the batch is -100");
    batch.max_doc = 2;
    EXPECT_FAIL(PML_INVALID, "document 2 of the batch has 3", pml_batch_check(&batch, 6, 3, e));
    batch.n_docs = -1;
    EXPECT_FAIL(PML_INVALID, "-1 documents", pml_batch_check(&batch, 6, 3, e));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accepts),
        cmocka_unit_test(test_names_the_first_offence),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
