/* NF4 against bitsandbytes (tools/fixtures/make_nf4.py): the same bytes, and the same numbers from
 * them. Here and not with the kernels, because a fixture is read by the model's reader.
 *
 *   test_plan_nf4 [FOLDER NAME...]    these cases in place of the committed ones */
#include "kernels/fixture.h"

#include "pml/model/safetensors.h"

#define FIXTURES SOURCE_DIR "/tests/unit/plan/fixtures"

static const char *const committed[] = {"whole", "groups", "cut", "partial", "odd", "one"};

static const char *folder = FIXTURES;
static const char *const *cases = committed;
static size_t n_cases = sizeof committed / sizeof *committed;

static pml_safetensors *open_case(const char *in, const char *name)
{
    char path[512];
    pml_safetensors *file = NULL;
    pml_error err = PML_ERROR_INIT;
    snprintf(path, sizeof path, "%s/nf4-%s.safetensors", in, name);
    if (pml_safetensors_open(path, &file, &err) != PML_OK)
        fail_msg("%s", err.message);
    return file;
}

/* A copy of a tensor as an operand: one row, but for x and y. */
static pml_view tensor(const pml_safetensors *file, const char *name)
{
    const pml_stored *t = pml_safetensors_find(file, name);
    assert_non_null(t);
    int64_t cols = t->n_dims == 2 ? t->shape[1] : t->elements;
    pml_view v = view_new(t->elements / cols, cols, 0, t->dtype);
    pml_error err = PML_ERROR_INIT;
    if (pml_stored_read(t, 0, t->bytes, v.data, &err) != PML_OK)
        fail_msg("%s", err.message);
    return v;
}

static pml_view like(const pml_view *v)
{
    return view_new(v->rows, v->cols, 0, v->dtype);
}

static void expect_bytes(const char *name, const char *what, const pml_view *got,
                         const pml_view *want)
{
    for (size_t i = 0; i < span_bytes(want); i++)
        if (((unsigned char *)got->data)[i] != ((unsigned char *)want->data)[i])
            fail_msg("%s: byte %zu of %s is %d, bitsandbytes has %d", name, i, what,
                     ((unsigned char *)got->data)[i], ((unsigned char *)want->data)[i]);
}

static const char *const stored[] = {"codes", "absmax", "nested", "offset"};

static void test_quantise(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_cases; i++) {
        pml_safetensors *file = open_case(folder, cases[i]);
        pml_view want[4];
        pml_op_args args = {0};
        pml_view *views = pml_op_views(&args);
        views[0] = tensor(file, "x");
        for (int k = 0; k < 4; k++) {
            want[k] = tensor(file, stored[k]);
            views[k + 1] = like(&want[k]);
        }
        args.nf4_quantise.grid = PML_NF4_GRID;
        run_op(PML_OP_nf4_quantise, &args);
        for (int k = 0; k < 4; k++) {
            expect_bytes(cases[i], stored[k], &views[k + 1], &want[k]);
            free(want[k].data);
        }
        free_views(PML_OP_nf4_quantise, &args);
        pml_safetensors_close(&file);
    }
}

static void test_dequantise(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_cases; i++) {
        pml_safetensors *file = open_case(folder, cases[i]);
        pml_op_args args = {0};
        pml_view *views = pml_op_views(&args), want = tensor(file, "y");
        for (int k = 0; k < 4; k++)
            views[k] = tensor(file, stored[k]);
        views[4] = like(&want);
        args.nf4_dequantise.parts = 1;
        args.nf4_dequantise.part_rows[0] = (int32_t)want.rows;
        run_op(PML_OP_nf4_dequantise, &args);
        expect_bytes(cases[i], "y", &views[4], &want);
        free(want.data);
        free_views(PML_OP_nf4_dequantise, &args);
        pml_safetensors_close(&file);
    }
}

static void append(pml_view *to, size_t *at, const pml_view *v)
{
    memcpy((char *)to->data + *at, v->data, span_bytes(v));
    *at += span_bytes(v);
}

/* Weights stacked row on row, one of them ending inside a block and inside a byte. */
static void test_stack(void **state)
{
    (void)state;
    const int32_t rows[] = {3, 70, 5}, cols = 33;
    pml_op_args stack = {0};
    pml_view *views = pml_op_views(&stack);
    int64_t n[4] = {0};
    for (int p = 0; p < 3; p++) {
        n[0] += pml_nf4_codes(rows[p] * cols);
        n[1] += pml_nf4_blocks(rows[p] * cols);
        n[2] += pml_nf4_nested(rows[p] * cols);
    }
    for (int k = 0; k < 4; k++)
        views[k] = view_new(1, k == 3 ? 3 : n[k], 0, k < 2 ? PML_U8 : PML_F32);
    views[4] = view_new(78, cols, 0, PML_F32);
    pml_view want = like(&views[4]);
    size_t at[4] = {0}, y_at = 0;
    for (int p = 0; p < 3; p++) {
        pml_op_args one = {0}, back = {0};
        pml_view *parts = pml_op_views(&one), *from = pml_op_views(&back);
        int64_t count = rows[p] * cols;
        parts[0] = random_view(rows[p], cols, 0);
        parts[1] = view_new(1, pml_nf4_codes(count), 0, PML_U8);
        parts[2] = view_new(1, pml_nf4_blocks(count), 0, PML_U8);
        parts[3] = view_new(1, pml_nf4_nested(count), 0, PML_F32);
        parts[4] = view_new(1, 1, 0, PML_F32);
        run_op(PML_OP_nf4_quantise, &one);
        for (int k = 0; k < 4; k++) {
            append(&views[k], &at[k], &parts[k + 1]);
            from[k] = parts[k + 1];
        }
        from[4] = like(&parts[0]);
        back.nf4_dequantise.parts = 1;
        back.nf4_dequantise.part_rows[0] = rows[p];
        run_op(PML_OP_nf4_dequantise, &back);
        append(&want, &y_at, &from[4]);
        for (int64_t i = 0; i < count; i++) /* a value lies at most half a gap from its code */
            assert_true(fabsf(((float *)from[4].data)[i] - ((float *)parts[0].data)[i]) < 0.17F);
        free(from[4].data);
        free_views(PML_OP_nf4_quantise, &one);
    }
    stack.nf4_dequantise.parts = 3;
    memcpy(stack.nf4_dequantise.part_rows, rows, sizeof rows);
    run_op(PML_OP_nf4_dequantise, &stack);
    expect_bytes("stack", "y", &views[4], &want);
    free(want.data);
    free_views(PML_OP_nf4_dequantise, &stack);
}

static void expect_refusal(pml_op op, pml_op_args *args, const char *word)
{
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(call_op(op, args, &err), PML_INVALID);
    assert_non_null(strstr(err.message, word));
}

static void test_refusals(void **state)
{
    (void)state;
    pml_safetensors *file = open_case(FIXTURES, "odd");
    pml_op_args args = {0};
    pml_view *views = pml_op_views(&args);
    for (int k = 0; k < 4; k++)
        views[k] = tensor(file, stored[k]);
    views[4] = tensor(file, "y");
    args.nf4_dequantise.parts = 1;
    args.nf4_dequantise.part_rows[0] = 4;
    expect_refusal(PML_OP_nf4_dequantise, &args, "part_rows");
    args.nf4_dequantise.part_rows[0] = 5;
    views[0].cols--;
    expect_refusal(PML_OP_nf4_dequantise, &args, "codes");
    views[0].cols++;
    views[1].cols++;
    expect_refusal(PML_OP_nf4_dequantise, &args, "absmax");
    views[1].cols--;
    args.nf4_dequantise.parts = 4;
    expect_refusal(PML_OP_nf4_dequantise, &args, "parts");
    free_views(PML_OP_nf4_dequantise, &args);
    pml_safetensors_close(&file);
}

int main(int argc, char **argv)
{
    if (argc > 2) {
        folder = argv[1];
        cases = (const char *const *)(argv + 2);
        n_cases = (size_t)argc - 2;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quantise),
        cmocka_unit_test(test_dequantise),
        cmocka_unit_test(test_stack),
        cmocka_unit_test(test_refusals),
    };
    return run_on_devices(tests);
}
