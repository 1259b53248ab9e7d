/* The op table agrees with the argument structs: operand i of an op is the i-th view of its struct.
 */
#include "kernels/fixture.h"

#define OFFSET(op, field) offsetof(pml_##op##_args, field) / sizeof(pml_view)

typedef struct expectation {
    pml_op op;
    const char *field;
    size_t index;
} expectation;

#define E(op, field)                                                                               \
    {                                                                                              \
        PML_OP_##op, #field, OFFSET(op, field)                                                     \
    }

static const expectation expectations[] = {
    E(embed, ids),
    E(embed, table),
    E(embed, y),
    E(embed_bwd, ids),
    E(embed_bwd, dy),
    E(embed_bwd, dtable),
    E(embed_bwd, ws),
    E(rmsnorm, x),
    E(rmsnorm, add),
    E(rmsnorm, weight),
    E(rmsnorm, sum),
    E(rmsnorm, y),
    E(rmsnorm, rstd),
    E(rmsnorm_bwd, dy),
    E(rmsnorm_bwd, x),
    E(rmsnorm_bwd, weight),
    E(rmsnorm_bwd, rstd),
    E(rmsnorm_bwd, dres),
    E(rmsnorm_bwd, dx),
    E(rmsnorm_bwd, rounded),
    E(rmsnorm_bwd, dweight),
    E(rmsnorm_bwd, ws),
    E(head_norm, x),
    E(head_norm, q_weight),
    E(head_norm, k_weight),
    E(head_norm, y),
    E(head_norm, rstd),
    E(head_norm_bwd, dy),
    E(head_norm_bwd, x),
    E(head_norm_bwd, q_weight),
    E(head_norm_bwd, k_weight),
    E(head_norm_bwd, rstd),
    E(head_norm_bwd, dx),
    E(head_norm_bwd, dq_weight),
    E(head_norm_bwd, dk_weight),
    E(head_norm_bwd, ws),
    E(linear, x),
    E(linear, w),
    E(linear, w_scale),
    E(linear, bias),
    E(linear, a),
    E(linear, b),
    E(linear, rng),
    E(linear, places),
    E(linear, y),
    E(linear, u),
    E(linear, x_scale),
    E(linear, ws),
    E(linear_bwd, dy),
    E(linear_bwd, x),
    E(linear_bwd, w),
    E(linear_bwd, w_scale),
    E(linear_bwd, a),
    E(linear_bwd, b),
    E(linear_bwd, u),
    E(linear_bwd, rng),
    E(linear_bwd, places),
    E(linear_bwd, dx),
    E(linear_bwd, dw),
    E(linear_bwd, dbias),
    E(linear_bwd, da),
    E(linear_bwd, db),
    E(linear_bwd, v),
    E(linear_bwd, dy_scale),
    E(linear_bwd, ws),
    E(rope, x),
    E(rope, pos),
    E(rope, table),
    E(attention, q),
    E(attention, k),
    E(attention, v),
    E(attention, cu_q),
    E(attention, cu_k),
    E(attention, o),
    E(attention, lse),
    E(attention, ws),
    E(attention_bwd, dout),
    E(attention_bwd, q),
    E(attention_bwd, k),
    E(attention_bwd, v),
    E(attention_bwd, o),
    E(attention_bwd, lse),
    E(attention_bwd, cu_q),
    E(attention_bwd, cu_k),
    E(attention_bwd, pos),
    E(attention_bwd, table),
    E(attention_bwd, dq),
    E(attention_bwd, dk),
    E(attention_bwd, dv),
    E(attention_bwd, ws),
    E(swiglu, gate_up),
    E(swiglu, h),
    E(swiglu, a),
    E(swiglu, u),
    E(swiglu, h_scale),
    E(swiglu, ws),
    E(swiglu_bwd, dh),
    E(swiglu_bwd, gate_up),
    E(swiglu_bwd, dgate_up),
    E(swiglu_bwd, h),
    E(swiglu_bwd, u),
    E(swiglu_bwd, b),
    E(swiglu_bwd, v),
    E(swiglu_bwd, db),
    E(swiglu_bwd, v_down),
    E(swiglu_bwd, da),
    E(swiglu_bwd, w_scale),
    E(swiglu_bwd, scale),
    E(swiglu_bwd, ws),
    E(head_loss, x),
    E(head_loss, w),
    E(head_loss, rows),
    E(head_loss, labels),
    E(head_loss, scale),
    E(head_loss, loss),
    E(head_loss, dx),
    E(head_loss, dw),
    E(head_loss, ws),
    E(sum, x),
    E(sum, total),
    E(sum, ws),
    E(sumsq, x),
    E(sumsq, total),
    E(sumsq, ws),
    E(fill, y),
    E(copy, x),
    E(copy, y),
    E(gather_rows, x),
    E(gather_rows, index),
    E(gather_rows, y),
    E(scatter_rows, x),
    E(scatter_rows, index),
    E(scatter_rows, y),
    E(clip_scale, sumsq),
    E(clip_scale, hyper),
    E(clip_scale, norm),
    E(clip_scale, loss),
    E(adamw, p),
    E(adamw, g),
    E(adamw, m),
    E(adamw, v),
    E(adamw, hyper),
    E(adamw, copy),
    E(adamw_8bit, p),
    E(adamw_8bit, g),
    E(adamw_8bit, m),
    E(adamw_8bit, v),
    E(adamw_8bit, m_largest),
    E(adamw_8bit, v_largest),
    E(adamw_8bit, hyper),
    E(adamw_8bit, copy),
    E(sgd, p),
    E(sgd, g),
    E(sgd, m),
    E(sgd, hyper),
    E(sgd, copy),
    E(nf4_quantise, x),
    E(nf4_quantise, codes),
    E(nf4_quantise, absmax),
    E(nf4_quantise, nested),
    E(nf4_quantise, offset),
    E(nf4_quantise, ws),
    E(nf4_dequantise, codes),
    E(nf4_dequantise, absmax),
    E(nf4_dequantise, nested),
    E(nf4_dequantise, offset),
    E(nf4_dequantise, y),
    E(offload, x),
    E(offload, y),
    E(fetch, x),
    E(fetch, y),
    E(await, x),
    E(fp8_quantise, x),
    E(fp8_quantise, codes),
    E(fp8_quantise, scale),
    E(fp8_quantise, ws),
    E(fp8_turn, x),
    E(fp8_turn, y),
    E(allreduce, x),
};

static void test_names_follow_structs(void **state)
{
    (void)state;
    int seen[PML_OP_COUNT] = {0};
    for (size_t i = 0; i < sizeof expectations / sizeof *expectations; i++) {
        const expectation *e = &expectations[i];
        const pml_op_info *info = pml_op_describe(e->op);
        assert_true((int)e->index < info->n_views);
        assert_string_equal(info->operands[e->index], e->field);
        seen[e->op]++;
    }
    for (int op = 0; op < PML_OP_COUNT; op++) {
        const pml_op_info *info = pml_op_describe((pml_op)op);
        assert_int_equal(seen[op], info->n_views);
        assert_int_equal(strlen(info->signature), info->n_views);
        assert_true(info->n_views <= PML_OP_MAX_VIEWS);
    }
}

/* Views come first and without gaps, so that pml_op_views may treat them as an array. */
static void test_views_come_first(void **state)
{
    (void)state;
#define FIRST(name, signature, sentence)                                                           \
    assert_true(sizeof(pml_##name##_args) >= (sizeof signature - 1) * sizeof(pml_view));
    PML_OPS(FIRST)
#undef FIRST
    assert_int_equal(offsetof(pml_linear_args, parts), 12 * sizeof(pml_view));
    assert_int_equal(offsetof(pml_attention_args, heads), 8 * sizeof(pml_view));
    assert_int_equal(offsetof(pml_rmsnorm_args, eps), 6 * sizeof(pml_view));
    assert_int_equal(offsetof(pml_fill_args, value), sizeof(pml_view));
}

static void test_outside_the_enum(void **state)
{
    (void)state;
    assert_null(pml_op_describe(PML_OP_COUNT));
    assert_null(pml_op_describe((pml_op)-1));
    pml_error err = PML_ERROR_INIT;
    pml_op_args args = {0};
    assert_int_equal(pml_op_run(pml_backend_cpu(), PML_OP_COUNT, NULL, &args, &err),
                     PML_UNSUPPORTED);
    assert_int_equal(pml_op_run(pml_backend_cpu(), PML_OP_allreduce, NULL, &args, &err),
                     PML_UNSUPPORTED);
    assert_non_null(strstr(err.message, "allreduce"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names_follow_structs),
        cmocka_unit_test(test_views_come_first),
        cmocka_unit_test(test_outside_the_enum),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
