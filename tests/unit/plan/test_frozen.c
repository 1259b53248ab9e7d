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

static int count(const pml_program *p, pml_op op)
{
    int found = 0;
    for (int i = 0; i < p->n_nodes; i++)
        found += p->nodes[i].op == op;
    return found;
}

/* In 8 bits a layer takes a byte a number and a float a row, and nothing is unpacked: codes are
 * turned round before each dx. A border is where the backend has borders. */
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
    assert_int_equal(packed->n_nodes, plain->n_nodes + count(packed, PML_OP_fp8_turn));
    assert_int_equal(count(packed, PML_OP_fp8_turn), 4 * small.layers - 1); /* no d embedding */
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

static pml_program *built_with(const pml_train_config *config, const pml_backend *backend,
                               int32_t unpacked)
{
    pml_error err = PML_ERROR_INIT;
    pml_program *p = NULL;
    pml_program_options options = {.spec = &small,
                                   .config = config,
                                   .limits = limits,
                                   .backend = backend,
                                   .choices = {.head_chunk = 1, .pieces = 1, .unpacked = unpacked}};
    assert_int_equal(pml_program_build(&options, &p, &err), PML_OK);
    assert_int_equal(pml_program_check_places(p, &err), PML_OK);
    return p;
}

/* Codes that are kept turned round cost a byte a number more, and no op. */
static void test_fp8_turned_for_good(void **state)
{
    (void)state;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    config.quant = PML_QUANT_FP8;
    const int all = 4 * small.layers;
    pml_program *none = built_with(&config, pml_backend_cpu(), 0);
    pml_program *some = built_with(&config, pml_backend_cpu(), 1); /* o of the first layer */
    pml_program *every = built_with(&config, pml_backend_cpu(), all);
    assert_int_equal(count(some, PML_OP_fp8_turn), count(none, PML_OP_fp8_turn) - 1);
    assert_int_equal(count(every, PML_OP_fp8_turn), 0);
    assert_int_equal(some->by_cause[PML_CAUSE_WEIGHTS] - none->by_cause[PML_CAUSE_WEIGHTS],
                     rounded(64 * 64));
    int kept = 0;
    for (int i = 0; i < every->n_parameters; i++) {
        const pml_parameter *p = &every->parameters[i];
        if (!p->fp8)
            continue;
        if (p->fp8_turned < 0) /* q, k and v of the first layer: nothing is trained before them */
            continue;
        const pml_tensor *t = &every->tensors[p->fp8_turned];
        assert_int_equal(t->rows, p->cols);
        assert_true(p->row + p->rows <= t->cols);
        kept++;
    }
    assert_int_equal(kept, 7 * small.layers - 3);
    pml_program_destroy(&none);
    pml_program_destroy(&some);
    pml_program_destroy(&every);
}

/* Where swiglu works for adapters it makes codes, which nobody but the products reads; not where
 * dropout keeps it from that, nor h where down alone is trained, whose da reads it again. */
static void test_fp8_codes_of_swiglu(void **state)
{
    (void)state;
    pml_backend backend = *pml_backend_cpu();
    backend.adapters_beside = true;
    backend.border = 64;
    for (int form = 0; form < 3; form++) {
        pml_train_config config =
            config_for(PML_METHOD_LORA, form == 2 ? PML_TARGET_DOWN : PML_TARGET_ALL_LINEAR);
        config.quant = PML_QUANT_FP8;
        config.lora_dropout = form == 1 ? 0.1 : 0;
        pml_program *p = built_with(&config, &backend, 0);
        int codes = 0, back = 0;
        for (int i = p->segments[PML_SEGMENT_MICRO].first; i < p->segments[PML_SEGMENT_MICRO].end;
             i++) {
            const pml_node *node = &p->nodes[i];
            const pml_operand *o = node->operands;
            if (node->op == PML_OP_swiglu) {
                int32_t h = o[PML_OPERAND(swiglu, h)].tensor;
                bool made = p->tensors[h].dtype == PML_U8;
                assert_int_equal(made, o[PML_OPERAND(swiglu, h_scale)].tensor >= 0);
                codes += made;
            } else if (node->op == PML_OP_swiglu_bwd) {
                int32_t d = o[PML_OPERAND(swiglu_bwd, dgate_up)].tensor;
                bool made = p->tensors[d].dtype == PML_U8;
                assert_int_equal(made, o[PML_OPERAND(swiglu_bwd, w_scale)].tensor >= 0);
                assert_int_equal(made, o[PML_OPERAND(swiglu_bwd, scale)].tensor >= 0);
                back += made;
            } else if (node->op == PML_OP_linear || node->op == PML_OP_linear_bwd) {
                bool forward = node->op == PML_OP_linear;
                int32_t scale =
                    o[forward ? PML_OPERAND(linear, x_scale) : PML_OPERAND(linear_bwd, dy_scale)]
                        .tensor;
                assert_int_equal(p->tensors[o[0].tensor].dtype == PML_U8, scale >= 0);
            }
        }
        assert_int_equal(codes, form == 0 ? small.layers : 0);
        assert_int_equal(back, form == 1 ? 0 : form == 2 ? small.layers - 1 : small.layers);
        pml_program_destroy(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_frozen_as_stored),    cmocka_unit_test(test_nf4_bytes),
        cmocka_unit_test(test_nf4_unpacks),         cmocka_unit_test(test_fp8_bytes),
        cmocka_unit_test(test_fp8_turned_for_good), cmocka_unit_test(test_fp8_codes_of_swiglu),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
