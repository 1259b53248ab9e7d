/* The residual line: what its sums lose and hand on, the weights of its norms, and the gradient
 * that runs back along it. */
#include "small.h"

/* Layers that are made again, from the first on. */
static pml_plan_choices choices(int level, int32_t layers)
{
    return (pml_plan_choices){
        .recompute = level, .recompute_layers = layers, .head_chunk = 64, .pieces = 1};
}

static pml_program *built_in(pml_method method, pml_dtype dtype, pml_plan_choices choices)
{
    pml_backend any = *pml_backend_cpu();
    any.dtypes |= 1U << PML_F16 | 1U << PML_BF16;
    pml_train_config config =
        config_for(method, method == PML_METHOD_LORA ? PML_TARGET_ALL_LINEAR : 0);
    config.dtype = dtype;
    const pml_program_options options = {
        .spec = &small, .config = &config, .limits = limits, .backend = &any, .choices = choices};
    pml_program *p = NULL;
    pml_error err = PML_ERROR_INIT;
    if (pml_program_build(&options, &p, &err) != PML_OK)
        fail_msg("%s", err.message);
    return p;
}

/* The weights that a program's norms read, forward and backward, have this dtype. */
static void expect_weights(const pml_program *p, pml_dtype dtype)
{
    int norms = 0;
    for (int i = 0; i < p->n_nodes; i++) {
        const pml_operand *of = p->nodes[i].operands;
        bool back = p->nodes[i].op == PML_OP_rmsnorm_bwd;
        if (!back && p->nodes[i].op != PML_OP_rmsnorm)
            continue;
        int at = back ? PML_OPERAND(rmsnorm_bwd, weight) : PML_OPERAND(rmsnorm, weight);
        assert_int_equal(p->tensors[of[at].tensor].dtype, dtype);
        norms++;
    }
    assert_true(norms > 0);
}

/* Where a norm is trained its ops read the float32 that is trained; frozen ones stay as narrow as
 * the rest of the model. An adapter may hold norms, of which it trains those that it holds. */
static void test_weights_of_norms(void **state)
{
    (void)state;
    static const struct {
        pml_method method;
        pml_dtype dtype, expected;
    } cases[] = {{PML_METHOD_FULL, PML_F32, PML_F32},
                 {PML_METHOD_FULL, PML_BF16, PML_F32},
                 {PML_METHOD_FULL, PML_F16, PML_F32},
                 {PML_METHOD_LORA, PML_BF16, PML_BF16},
                 {PML_METHOD_LORA, PML_F16, PML_F16}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_program *p = built_in(cases[i].method, cases[i].dtype, choices(PML_RECOMPUTE_LAYER, 2));
        expect_weights(p, cases[i].expected);
        pml_program_destroy(&p);
    }
}

/* In float16 the residual line's gradient is float32, with a rounding for products beside it; in
 * other dtypes it is one tensor. The loss scale is read where the gradient begins, always. */
static void test_gradients_of_float16(void **state)
{
    (void)state;
    for (int f16 = 0; f16 < 2; f16++) {
        const pml_dtype dtype = f16 ? PML_F16 : PML_F32;
        pml_program *p = built_in(PML_METHOD_FULL, dtype, choices(PML_RECOMPUTE_NONE, 0));
        int32_t sum = -1, norms = 0;
        for (int i = p->segments[PML_SEGMENT_MICRO].first; i < p->segments[PML_SEGMENT_MICRO].end;
             i++) {
            const pml_node *node = &p->nodes[i];
            const pml_operand *of = node->operands;
            if (node->op == PML_OP_head_loss)
                assert_int_equal(of[PML_OPERAND(head_loss, scale)].tensor, p->loss_scale);
            if (node->op == PML_OP_embed_bwd)
                assert_int_equal(of[PML_OPERAND(embed_bwd, dy)].tensor, sum);
            if (node->op != PML_OP_rmsnorm_bwd)
                continue;
            assert_int_equal(of[PML_OPERAND(rmsnorm_bwd, dres)].tensor,
                             sum); /* at first there is none to add to */
            sum = of[PML_OPERAND(rmsnorm_bwd, dx)].tensor;
            assert_int_equal(p->tensors[sum].dtype, PML_F32);
            assert_int_equal(p->tensors[of[PML_OPERAND(rmsnorm_bwd, dy)].tensor].dtype, dtype);
            assert_int_equal(of[PML_OPERAND(rmsnorm_bwd, rounded)].tensor >= 0, f16);
            if (f16)
                assert_int_equal(p->tensors[of[PML_OPERAND(rmsnorm_bwd, rounded)].tensor].dtype,
                                 PML_F16);
            norms++;
        }
        assert_int_equal(norms, 2 * small.layers + 1);
        pml_program_destroy(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_weights_of_norms),
        cmocka_unit_test(test_gradients_of_float16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
