/* What frozen weights take: as they are stored, in NF4, in 8 bits. */
#include "small.h"

#include <string.h>

static const pml_plan_choices no_recompute = {.head_chunk = 64, .pieces = 1};

static size_t rounded(int64_t bytes)
{
    return ((size_t)bytes + 255) / 256 * 256;
}

/* Of a folder in bfloat16 the matrices that are not trained keep it, and only they. */
static void test_frozen_as_stored(void **state)
{
    (void)state;
    pml_model_spec spec = small;
    spec.dtype = PML_BF16;
    for (int method = 0; method < 2; method++) {
        pml_train_config config = config_for((pml_method)method, PML_TARGET_Q);
        pml_program *p = built(&spec, &config, &limits, no_recompute);
        int matrices = 0;
        for (int i = 0; i < p->n_parameters; i++) {
            const pml_parameter *parameter = &p->parameters[i];
            bool narrow = p->tensors[parameter->tensor].dtype == PML_BF16;
            assert_int_equal(narrow, parameter->rank == 2 && !parameter->trained);
            matrices += narrow;
        }
        assert_int_equal(matrices, method == PML_METHOD_LORA ? 7 * small.layers + 1 : 0);
        assert_int_equal(p->rounded, -1); /* arithmetic is float32 */
        pml_program_destroy(&p);
    }
}

/* Quantised layers take their codes and scales, counted here from the format alone; one dequantised
 * weight at a time, the largest, is workspace. */
static void test_nf4_bytes(void **state)
{
    (void)state;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    pml_program *plain = built(&small, &config, &limits, no_recompute);
    config.quant = PML_QUANT_NF4;
    pml_program *packed = built(&small, &config, &limits, no_recompute);
    pml_error err = PML_ERROR_INIT;
    const struct {
        int parts, rows[3], cols;
    } stacks[] = {{3, {64, 32, 32}, 64}, {1, {64}, 64}, {2, {160, 160}, 64}, {1, {64}, 160}};
    size_t was = 0, is = 0;
    for (int i = 0; i < 4; i++) {
        int64_t elements = 0, codes = 0, blocks = 0, groups = 0;
        for (int p = 0; p < stacks[i].parts; p++) {
            int64_t n = (int64_t)stacks[i].rows[p] * stacks[i].cols;
            elements += n;
            codes += (n + 1) / 2;
            blocks += (n + 63) / 64;
            groups += ((n + 63) / 64 + 255) / 256;
        }
        was += rounded(4 * elements);
        is += rounded(codes) + rounded(blocks) + rounded(4 * groups) +
              rounded(4 * (int64_t)stacks[i].parts);
    }
    assert_int_equal(plain->by_cause[PML_CAUSE_WEIGHTS] - packed->by_cause[PML_CAUSE_WEIGHTS],
                     (size_t)small.layers * (was - is));
    assert_true(packed->by_cause[PML_CAUSE_WORKSPACE] >= plain->by_cause[PML_CAUSE_WORKSPACE]);
    assert_int_equal(packed->tensors[packed->loading].cols,
                     160 * 64 * 4); /* float32 of the largest */
    assert_int_equal(plain->loading, -1);
    assert_int_equal(pml_program_check_places(packed, &err), PML_OK);
    pml_program_destroy(&plain);
    pml_program_destroy(&packed);
}

/* In 8 bits a layer takes a byte a number and a float a row, and nothing is unpacked. A border is
 * where the backend has borders. */
static void test_fp8_bytes(void **state)
{
    (void)state;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    pml_program *plain = built(&small, &config, &limits, no_recompute);
    config.quant = PML_QUANT_FP8;
    pml_program *packed = built(&small, &config, &limits, no_recompute);
    pml_error err = PML_ERROR_INIT;
    static const int64_t stacks[][2] = {{128, 64}, {64, 64}, {320, 64}, {64, 160}};
    size_t was = 0, is = 0;
    for (int i = 0; i < 4; i++) {
        was += rounded(4 * stacks[i][0] * stacks[i][1]);
        is += rounded(stacks[i][0] * stacks[i][1]) + rounded(4 * stacks[i][0]);
    }
    assert_int_equal(plain->by_cause[PML_CAUSE_WEIGHTS] - packed->by_cause[PML_CAUSE_WEIGHTS],
                     (size_t)small.layers * (was - is));
    assert_int_equal(packed->tensors[packed->loading].cols, 160 * 64 * 4);
    assert_int_equal(pml_program_check_places(packed, &err), PML_OK);
    assert_int_equal(packed->n_nodes, plain->n_nodes);
    int with_scales = 0;
    for (int i = 0; i < packed->n_nodes; i++) {
        const pml_node *node = &packed->nodes[i];
        bool forward = node->op == PML_OP_linear;
        if (!forward && node->op != PML_OP_linear_bwd)
            continue;
        int32_t scale = node->operands[forward ? PML_OPERAND(linear, w_scale)
                                               : PML_OPERAND(linear_bwd, w_scale)]
                            .tensor;
        assert_int_equal(scale >= 0, node->layer >= 0); /* the head keeps its numbers */
        if (scale >= 0) {
            assert_int_equal(packed->tensors[scale].dtype, PML_F32);
            with_scales++;
        }
        assert_int_equal(forward ? node->args.linear.border : node->args.linear_bwd.border, 0);
    }
    assert_true(with_scales >= 8 * small.layers); /* four forward, four backward */
    pml_program_destroy(&plain);
    pml_program_destroy(&packed);
    /* Where there are borders, of as many bytes: behind the codes alone, three columns of u's each.
     */
    pml_backend bordered = *pml_backend_cpu();
    bordered.border = 64;
    pml_program_options options = {.spec = &small,
                                   .config = &config,
                                   .limits = limits,
                                   .backend = &bordered,
                                   .choices = {.head_chunk = 1, .pieces = 1}};
    assert_int_equal(pml_program_build(&options, &packed, &err), PML_OK);
    for (int i = 0; i < packed->n_nodes; i++) {
        const pml_node *node = &packed->nodes[i];
        if (node->op != PML_OP_linear || node->layer < 0)
            continue;
        int32_t r = (int32_t)packed->tensors[node->operands[PML_OPERAND(linear, u)].tensor].cols;
        assert_int_equal(node->args.linear.border, (3 * r + 127) / 128 * 128);
        assert_int_equal(packed->tensors[node->operands[PML_OPERAND(linear, w)].tensor].border,
                         node->args.linear.border);
        assert_int_equal(packed->tensors[node->operands[PML_OPERAND(linear, w)].tensor].below, 0);
        assert_int_equal(packed->tensors[node->operands[PML_OPERAND(linear, x)].tensor].border, 0);
    }
    pml_program_destroy(&packed);
    pml_model_spec odd = small;
    odd.intermediate = 168; /* of no whole units */
    options.spec = &odd;
    assert_int_equal(pml_program_build(&options, &packed, &err), PML_UNSUPPORTED);
    assert_non_null(strstr(err.message, "units of 16"));
}

/* A micro-batch unpacks every weight for its forward and its backward; where the layer is made
 * again that is qkv and o once more, and gate_up serves both. No gradient goes below the first
 * layer's qkv. */
static void test_nf4_unpacks(void **state)
{
    (void)state;
    static const char *const labels[] = {"unpack qkv", "unpack o", "unpack gate_up", "unpack down"};
    static const int times[2][4] = {{2, 2, 2, 2}, {3, 3, 2, 2}};
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    config.quant = PML_QUANT_NF4;
    for (int again = 0; again < 2; again++) {
        const pml_plan_choices choices = {.recompute = again ? PML_RECOMPUTE_LAYER : 0,
                                          .recompute_layers = again ? small.layers : 0,
                                          .head_chunk = 64,
                                          .pieces = 1};
        pml_program *p = built(&small, &config, &limits, choices);
        for (int k = 0; k < 4; k++) {
            int seen = 0;
            for (int32_t n = p->segments[PML_SEGMENT_MICRO].first;
                 n < p->segments[PML_SEGMENT_MICRO].end; n++)
                seen += strcmp(p->nodes[n].label, labels[k]) == 0;
            assert_int_equal(seen, times[again][k] * small.layers - (k == 0));
        }
        pml_program_destroy(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_frozen_as_stored),
        cmocka_unit_test(test_nf4_bytes),
        cmocka_unit_test(test_nf4_unpacks),
        cmocka_unit_test(test_fp8_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
