/* The residual line: what its norms and those of heads read as their weights, and the gradient that
 * runs back along it. */
#include "small.h"

#include <string.h>

/* Layers that are made again, from the first on. */
static pml_plan_choices choices(int level, int32_t layers)
{
    return (pml_plan_choices){
        .recompute = level, .recompute_layers = layers, .head_chunk = 64, .pieces = 1};
}

static pml_status build(pml_method method, pml_dtype dtype, uint32_t saved,
                        pml_plan_choices choices, pml_program **p, pml_error *err)
{
    pml_backend any = *pml_backend_cpu();
    any.dtypes |= 1U << PML_F16 | 1U << PML_BF16;
    pml_model_spec spec = small;
    spec.qk_norm = true;
    pml_train_config config =
        config_for(method, method == PML_METHOD_LORA ? PML_TARGET_ALL_LINEAR : 0);
    config.dtype = dtype;
    config.lora_saved = saved;
    const pml_program_options options = {
        .spec = &spec, .config = &config, .limits = limits, .backend = &any, .choices = choices};
    return pml_program_build(&options, p, err);
}

static pml_program *built_in(pml_method method, pml_dtype dtype, uint32_t saved,
                             pml_plan_choices choices)
{
    pml_program *p = NULL;
    pml_error err = PML_ERROR_INIT;
    if (build(method, dtype, saved, choices, &p, &err) != PML_OK)
        fail_msg("%s", err.message);
    return p;
}

/* The weights that ops of norms read, forward and backward, each by its name: trained ones are in
 * float32, and of the flat buffer; frozen ones in the program's dtype. */
static void expect_weights(const pml_program *p, pml_dtype dtype, const char *const trained[],
                           size_t n_trained)
{
    int rows = 0, heads = 0;
    for (int i = 0; i < p->n_nodes; i++) {
        const pml_node *node = &p->nodes[i];
        bool head = node->op == PML_OP_head_norm || node->op == PML_OP_head_norm_bwd;
        if (!head && node->op != PML_OP_rmsnorm && node->op != PML_OP_rmsnorm_bwd)
            continue;
        const pml_op_info *info = pml_op_describe(node->op);
        for (int v = 0; v < info->n_views; v++) {
            const char *operand = info->operands[v];
            size_t end = strlen(operand);
            if (operand[0] == 'd' || end < 6 || strcmp(operand + end - 6, "weight") != 0)
                continue;
            const pml_tensor *t = &p->tensors[node->operands[v].tensor];
            bool trains = false;
            for (size_t k = 0; k < n_trained; k++)
                trains = trains || strstr(t->name, trained[k]) != NULL;
            assert_int_equal(t->dtype, trains ? PML_F32 : dtype);
            assert_int_equal(t->parent == p->values, trains);
            rows += !head;
            heads += head;
        }
    }
    assert_true(rows > 0 && heads > 0);
}

/* Whole models, adapters alone, and adapters that hold some norms. */
static void test_weights_of_norms(void **state)
{
    (void)state;
    static const char *const all[] = {"norm"}, *const some[] = {"q_norm", "k_norm", "post_"};
    const uint32_t held = PML_SAVED_Q_NORM | PML_SAVED_K_NORM | PML_SAVED_POST_NORM;
    for (int dtype = PML_F32; dtype <= PML_F16; dtype++) {
        const pml_plan_choices again = choices(PML_RECOMPUTE_LAYER, 2);
        pml_program *p = built_in(PML_METHOD_FULL, (pml_dtype)dtype, 0, again);
        expect_weights(p, (pml_dtype)dtype, all, 1);
        pml_program_destroy(&p);
        p = built_in(PML_METHOD_LORA, (pml_dtype)dtype, 0, again);
        expect_weights(p, (pml_dtype)dtype, NULL, 0);
        pml_program_destroy(&p);
        p = built_in(PML_METHOD_LORA, (pml_dtype)dtype, held, again);
        expect_weights(p, (pml_dtype)dtype, some, 3);
        pml_program_destroy(&p);
    }
}

/* The norms that read what embed looked up, in all segments; all that they read and write besides
 * has the program's dtype. Returns how many. */
static int readers_of_embedded(const pml_program *p, pml_dtype begins, pml_dtype dtype)
{
    int readers = 0;
    int32_t embedded = -1;
    for (int i = 0; i < p->n_nodes; i++) {
        const pml_operand *of = p->nodes[i].operands;
        const pml_op op = p->nodes[i].op;
        if (op == PML_OP_embed) {
            const pml_tensor *table = &p->tensors[of[PML_OPERAND(embed, table)].tensor];
            embedded = of[PML_OPERAND(embed, y)].tensor;
            assert_int_equal(p->tensors[embedded].dtype, begins);
            assert_int_equal(table->dtype, begins);
            assert_string_equal(table->name, "embed");
        }
        bool back = op == PML_OP_rmsnorm_bwd;
        if (op != PML_OP_rmsnorm && !back)
            continue;
        int x = back ? PML_OPERAND(rmsnorm_bwd, x) : PML_OPERAND(rmsnorm, x);
        int weight = back ? PML_OPERAND(rmsnorm_bwd, weight) : PML_OPERAND(rmsnorm, weight);
        bool reads = of[x].tensor == embedded;
        if (reads && begins == PML_F32)
            assert_int_equal(p->tensors[of[weight].tensor].dtype, PML_F32);
        assert_int_equal(p->tensors[of[x].tensor].dtype, reads ? begins : dtype);
        const int plain[2][2] = {{PML_OPERAND(rmsnorm, sum), PML_OPERAND(rmsnorm, y)},
                                 {PML_OPERAND(rmsnorm_bwd, dy), PML_OPERAND(rmsnorm_bwd, rounded)}};
        for (int k = 0; k < 2; k++)
            if (of[plain[back][k]].tensor >= 0)
                assert_int_equal(p->tensors[of[plain[back][k]].tensor].dtype, dtype);
        readers += reads;
    }
    return readers;
}

/* Where the table of embeddings is trained its rows come in float32 as far as the first sum; its
 * norms' weights are in float32 then, trained or not. */
static void test_the_line_begins_as_it_is_trained(void **state)
{
    (void)state;
    for (int dtype = PML_F32; dtype <= PML_F16; dtype++) {
        const pml_dtype narrow = (pml_dtype)dtype;
        static const struct {
            pml_method method;
            uint32_t saved;
            bool trained;
        } cases[] = {{PML_METHOD_FULL, 0, true},
                     {PML_METHOD_LORA, PML_SAVED_EMBED, true},
                     {PML_METHOD_LORA, PML_SAVED_POST_NORM | PML_SAVED_HEAD, false}};
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            pml_program *p =
                built_in(cases[i].method, narrow, cases[i].saved, choices(PML_RECOMPUTE_LAYER, 2));
            /* Two of each forward, twice in the micro-batch, which makes the layer again; and the
             * input norm's backward. */
            int readers = readers_of_embedded(p, cases[i].trained ? PML_F32 : narrow, narrow);
            assert_int_equal(readers, 2 * (1 + 1 + 1) + 1 + (p->generate_rows > 0 ? 2 : 0));
            pml_program_destroy(&p);
        }
    }
}

/* One op norms queries and keys, and makes both weights' gradients or none. */
static void test_norms_of_heads_go_together(void **state)
{
    (void)state;
    static const uint32_t one[] = {PML_SAVED_Q_NORM, PML_SAVED_K_NORM};
    for (int i = 0; i < 2; i++) {
        pml_program *p = NULL;
        pml_error err = PML_ERROR_INIT;
        assert_int_equal(
            build(PML_METHOD_LORA, PML_F32, one[i], choices(PML_RECOMPUTE_NONE, 0), &p, &err),
            PML_UNSUPPORTED);
        assert_non_null(strstr(err.message, "name both"));
        assert_null(p);
    }
}

/* In float16 the residual line's gradient is float32, with a rounding for products beside it; in
 * other dtypes it is one tensor. The loss scale is read where the gradient begins, always. */
static void test_gradients_of_float16(void **state)
{
    (void)state;
    for (int f16 = 0; f16 < 2; f16++) {
        const pml_dtype dtype = f16 ? PML_F16 : PML_F32;
        pml_program *p = built_in(PML_METHOD_FULL, dtype, 0, choices(PML_RECOMPUTE_NONE, 0));
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
        cmocka_unit_test(test_the_line_begins_as_it_is_trained),
        cmocka_unit_test(test_norms_of_heads_go_together),
        cmocka_unit_test(test_gradients_of_float16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
