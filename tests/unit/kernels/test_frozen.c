/* Weights stored in bfloat16 give the bits of the same weights in float32, in every op that reads
 * them, however few or odd the rows and columns are. Runs a second time with
 * PANTHERAML_MATRIX=plain.
 */
#include "kernels/fixture.h"

/* Numbers that both can hold, in either. */
static void make_pair(int64_t rows, int64_t cols, int64_t border, pml_view *wide, pml_view *narrow)
{
    *wide = view_new(rows, cols, border, PML_F32);
    *narrow = view_new(rows, cols, border + 3, PML_BF16);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            uint32_t bits;
            float value = random_float();
            memcpy(&bits, &value, sizeof bits);
            bits &= 0xffff0000;
            memcpy(at(wide, r, c), &bits, sizeof bits);
            ((uint16_t *)narrow->data)[r * narrow->ld + c] = (uint16_t)(bits >> 16);
        }
}

/* Runs the op with the weight in either form and compares outputs `a` and `b` (none: -1). */
static void both(pml_op op, pml_op_args *args, int weight, const int outputs[2], pml_view narrow)
{
    pml_view *views = pml_op_views(args);
    void *kept[2] = {NULL};
    run_op(op, args);
    for (int i = 0; i < 2 && outputs[i] >= 0; i++) {
        kept[i] = must_alloc(span_bytes(&views[outputs[i]]));
        memcpy(kept[i], views[outputs[i]].data, span_bytes(&views[outputs[i]]));
    }
    pml_view wide = views[weight];
    views[weight] = narrow;
    run_op(op, args);
    for (int i = 0; i < 2 && outputs[i] >= 0; i++) {
        assert_memory_equal(kept[i], views[outputs[i]].data, span_bytes(&views[outputs[i]]));
        free(kept[i]);
    }
    views[weight] = wide;
    free(narrow.data);
    free_views(op, args);
}

static const int64_t tokens[] = {1, 3, 8, 70, 100};

static void test_linear(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{64, 96}, {33, 50}, {1, 16}, {520, 70}, {1400, 1040}};
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            for (int adapter = 0; adapter < 2; adapter++) {
                const int64_t rows = tokens[t], k = sizes[i][0], n = sizes[i][1];
                if (k > 1000 && rows != 70) /* once: more than the common memory holds */
                    continue;
                pml_view narrow;
                pml_op_args args = {.linear = {.x = random_view(rows, k, 0),
                                               .y = view_new(rows, n, 0, PML_F32),
                                               .parts = 1,
                                               .part_cols = {(int32_t)n},
                                               .lora_parts = (uint32_t)adapter,
                                               .rank = 4 * adapter,
                                               .lora_scale = {0.5F}}};
                if (adapter) {
                    args.linear.a = random_view(4, k, 0);
                    args.linear.b = random_view(n, 4, 0);
                }
                make_pair(n, k, 2, &args.linear.w, &narrow);
                both(PML_OP_linear, &args, 1, (const int[]){8, -1}, narrow);
            }
}

static void test_linear_bwd(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{64, 96}, {50, 33}, {16, 1}, {70, 520}, {1040, 1400}};
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            const int64_t rows = tokens[t], k = sizes[i][0], n = sizes[i][1];
            if (k > 1000 && rows != 70)
                continue;
            pml_view narrow;
            pml_op_args args = {.linear_bwd = {.dy = random_view(rows, n, 0),
                                               .dx = view_new(rows, k, 0, PML_F32),
                                               .parts = 1,
                                               .part_cols = {(int32_t)n}}};
            make_pair(n, k, 0, &args.linear_bwd.w, &narrow);
            both(PML_OP_linear_bwd, &args, 2, (const int[]){9, -1}, narrow);
        }
}

static void test_head_loss(void **state)
{
    (void)state;
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++) {
        const int64_t rows = tokens[t], hidden = 80, vocab = 300;
        int32_t which[100], labels[100];
        for (int32_t i = 0; i < rows; i++) {
            which[i] = (int32_t)rows - 1 - i;
            labels[i] = 3 * i % (int32_t)vocab;
        }
        pml_view narrow;
        pml_op_args args = {.head_loss = {.x = random_view(rows, hidden, 0),
                                          .rows = int_view(rows, which),
                                          .labels = int_view(rows, labels),
                                          .loss = view_new(1, rows, 0, PML_F32),
                                          .dx = view_new(rows, hidden, 0, PML_F32),
                                          .chunk = 64}};
        make_pair(vocab, hidden, 0, &args.head_loss.w, &narrow);
        both(PML_OP_head_loss, &args, 1, (const int[]){5, 6}, narrow);
    }
}

static void test_embed(void **state)
{
    (void)state;
    static const int32_t ids[] = {4, 0, 6, 4, 2};
    pml_view narrow;
    pml_op_args args = {.embed = {.ids = int_view(5, ids), .y = view_new(5, 37, 1, PML_F32)}};
    make_pair(7, 37, 0, &args.embed.table, &narrow);
    both(PML_OP_embed, &args, 1, (const int[]){2, -1}, narrow);
}

/* What is trained cannot be narrow, and a row that no scratch holds is refused by name. */
static void test_refusals(void **state)
{
    (void)state;
    static uint16_t data[16];
    pml_error err = PML_ERROR_INIT;
    pml_op_args args = {.linear = {.x = random_view(1, 4, 0),
                                   .w = pml_matrix(data, 4, 4, PML_F16),
                                   .y = view_new(1, 4, 0, PML_F32),
                                   .parts = 1,
                                   .part_cols = {4}}};
    assert_int_equal(call_op(PML_OP_linear, &args, &err), PML_INVALID);
    assert_non_null(strstr(err.message, "'w' is F16, must be F32 or BF16"));
    free(args.linear.x.data);
    args.linear.x = pml_matrix(data, 1, 1 << 19, PML_F32);
    args.linear.w = pml_matrix(data, 4, 1 << 19, PML_BF16);
    assert_int_equal(call_op(PML_OP_linear, &args, &err), PML_INVALID);
    assert_non_null(strstr(err.message, "can be widened"));
    free(args.linear.y.data);
}

static int open_three(void **state)
{
    (void)state;
    return open_device(3);
}

static int close_three(void **state)
{
    (void)state;
    close_device();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear), cmocka_unit_test(test_linear_bwd),
        cmocka_unit_test(test_head_loss), cmocka_unit_test(test_embed),
        cmocka_unit_test(test_refusals)};
    return cmocka_run_group_tests(tests, open_three, close_three);
}
