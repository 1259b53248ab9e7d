/* Step programs: what is in them, and where. */
#include "small.h"

#include <stdlib.h>
#include <string.h>

static const pml_plan_choices no_recompute = {.head_chunk = 64, .pieces = 1};

/* Everything is kept but what a recompute of so many whole layers makes again. */
static pml_program *build(pml_method method, uint32_t targets, int recompute)
{
    pml_train_config config = config_for(method, targets);
    return built(&small, &config, &limits,
                 (pml_plan_choices){.recompute = recompute > 0 ? PML_RECOMPUTE_LAYER : 0,
                                    .recompute_layers = recompute,
                                    .head_chunk = 64,
                                    .pieces = 1});
}

/* The border that an op's operand has, or -1: of linear layers those that they work in. */
static int64_t border_of(const pml_node *node, int operand)
{
    if (node->op == PML_OP_linear && (operand == 0 || operand == 1))
        return node->args.linear.border;
    if (node->op == PML_OP_linear_bwd && (operand == 0 || operand == 2))
        return node->args.linear_bwd.border;
    return -1;
}

/* What attention writes: o, or dq, dk and dv. */
static bool of_attention(const pml_node *node, int operand)
{
    return node->op == PML_OP_attention       ? operand == PML_OPERAND(attention, o)
           : node->op == PML_OP_attention_bwd ? operand >= PML_OPERAND(attention_bwd, dq) &&
                                                    operand <= PML_OPERAND(attention_bwd, dv)
                                              : false;
}

/* Where a backend has borders, a linear layer's adapters have room behind what they multiply and
 * what they make, and nobody else reads it; attention's rows begin on whole 128s. */
static void test_borders(void **state)
{
    (void)state;
    pml_backend bordered = *pml_backend_cpu();
    bordered.border = 24; /* q,k,v with three adapters of rank 12 have two such units, o has one */
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    config.lora_rank = 12;
    const pml_program_options options = {.spec = &small,
                                         .config = &config,
                                         .limits = limits,
                                         .backend = &bordered,
                                         .choices = {PML_RECOMPUTE_NORMS, 2, 64, 1}};
    pml_program *p = NULL;
    pml_error err = PML_ERROR_INIT;
    if (pml_program_build(&options, &p, &err) != PML_OK)
        fail_msg("%s", err.message);
    int wide = 0, narrow = 0;
    for (int s = 0; s < PML_SEGMENT_COUNT; s++)
        for (int n = p->segments[s].first; n < p->segments[s].end; n++) {
            const pml_node *node = &p->nodes[n];
            pml_counts counts = pml_program_capacity(p, (pml_segment)s);
            pml_op_args args;
            pml_program_bind(p, node, (void *)256, &counts, &args);
            for (int i = 0; i < pml_op_describe(node->op)->n_views; i++) {
                const pml_operand *operand = &node->operands[i];
                if (operand->tensor < 0)
                    continue;
                const pml_tensor *t = &p->tensors[operand->tensor];
                pml_view v = pml_op_views(&args)[i];
                int64_t border = border_of(node, i);
                bool weight = node->op == PML_OP_linear ? i == 1 : i == 2;
                /* Adapters' v may stand in the border of what it is made from. */
                int64_t room = node->op == PML_OP_linear_bwd && i == 14 ? t->border : 0;
                assert_true(operand->col + v.cols <= t->cols + room);
                assert_int_equal(v.ld, t->cols + t->border);
                assert_true(border < 0 || (t->border >= border && border % 24 == 0));
                assert_true(border <= 0 || !weight || t->below >= border);
                assert_true(!of_attention(node, i) || v.ld % 128 == 0);
                wide += border == 48;
                narrow += border == 24;
            }
        }
    assert_true(wide > 0 && narrow > 0);
    assert_int_equal(pml_program_check_places(p, &err), PML_OK);
    pml_program_destroy(&p);
}

static int count(const pml_program *p, pml_segment segment, pml_op op, int layer)
{
    int n = 0;
    for (int i = p->segments[segment].first; i < p->segments[segment].end; i++)
        n += p->nodes[i].op == op && (layer < -1 || p->nodes[i].layer == layer);
    return n;
}

enum { ANY = -2 };

static void test_places_of_every_method(void **state)
{
    (void)state;
    for (int recompute = 0; recompute <= small.layers; recompute += 3)
        for (int method = 0; method < 2; method++) {
            pml_program *p = build((pml_method)method, PML_TARGET_ALL_LINEAR, recompute);
            pml_error err = PML_ERROR_INIT;
            if (pml_program_check_places(p, &err) != PML_OK)
                fail_msg("%s", err.message);
            size_t sum = 0;
            for (int c = 0; c < PML_CAUSE_COUNT; c++)
                sum += p->by_cause[c];
            assert_int_equal(sum, p->arena);
            pml_program_destroy(&p);
            assert_null(p);
        }
}

/* Where a run goes on by itself, whole pages at the arena's end hold a snapshot between two steps,
 * where nothing lies still; and where activations take less than one there is room for it. */
static void test_a_stage_for_snapshots(void **state)
{
    (void)state;
    for (int tokens = 512; tokens >= 2; tokens /= 16) {
        pml_train_config config = config_for(PML_METHOD_FULL, 0);
        const pml_batch_limits few = {tokens, 1, tokens - 1, tokens, 0};
        const pml_plan_choices choices = {.head_chunk = 8, .pieces = 1};
        pml_plan without, with;
        pml_program *p;
        assert_int_equal(
            pml_plan_given(&small, &config, &few, pml_backend_cpu(), &choices, &without, NULL),
            PML_OK);
        config.restarts = true;
        assert_int_equal(
            pml_plan_given(&small, &config, &few, pml_backend_cpu(), &choices, &with, NULL),
            PML_OK);
        assert_int_equal(pml_plan_build(&with, &small, &config, pml_backend_cpu(), &p, NULL),
                         PML_OK);
        size_t snapshot = pml_program_snapshot_bytes(p, &config), still = 0;
        assert_int_equal(snapshot, 3 * sizeof(float) * (size_t)with.trainable);
        for (int i = 0; i < p->n_tensors; i++) {
            const pml_tensor *t = &p->tensors[i];
            size_t end = t->offset + (size_t)(t->rows * t->cols) * pml_dtype_size(t->dtype);
            still = t->persistent && end > still ? end : still;
        }
        assert_in_range(p->stage_bytes, snapshot, snapshot + 4095);
        assert_int_equal(p->stage % 4096, 0);
        assert_in_range(p->stage, still, p->arena - p->stage_bytes);
        if (tokens == 512) /* more than a snapshot anyway */
            assert_int_equal(with.total, without.total);
        else
            assert_true(with.arena > without.arena);
        pml_program_destroy(&p);
    }
}

/* A frozen weight never costs a product, and nothing below the lowest adapter is computed. */
static void test_lora_computes_only_what_it_needs(void **state)
{
    (void)state;
    pml_program *p = build(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR, 0);
    const pml_segment micro = PML_SEGMENT_MICRO;
    assert_int_equal(count(p, micro, PML_OP_embed_bwd, ANY), 0);
    assert_int_equal(count(p, micro, PML_OP_rmsnorm_bwd, 0), 1);
    assert_int_equal(count(p, micro, PML_OP_rmsnorm_bwd, 1), 2);
    for (int i = p->segments[micro].first; i < p->segments[micro].end; i++) {
        const pml_node *node = &p->nodes[i];
        if (node->op == PML_OP_linear_bwd) {
            assert_int_equal(node->operands[PML_OPERAND(linear_bwd, dw)].tensor, -1);
            assert_int_equal(node->operands[PML_OPERAND(linear_bwd, dbias)].tensor, -1);
            /* da, or what needs no input of the layer: dx and db */
            assert_true(node->operands[PML_OPERAND(linear_bwd, da)].tensor >= 0 ||
                        node->operands[PML_OPERAND(linear_bwd, x)].tensor < 0);
            assert_int_equal(node->operands[PML_OPERAND(linear_bwd, da)].tensor >= 0,
                             node->operands[PML_OPERAND(linear_bwd, x)].tensor >= 0);
            assert_true(node->operands[PML_OPERAND(linear_bwd, da)].tensor >= 0 ||
                        node->operands[PML_OPERAND(linear_bwd, db)].tensor >= 0);
        }
        if (node->op == PML_OP_rmsnorm_bwd)
            assert_int_equal(node->operands[PML_OPERAND(rmsnorm_bwd, dweight)].tensor, -1);
        if (node->op == PML_OP_head_loss)
            assert_int_equal(node->operands[PML_OPERAND(head_loss, dw)].tensor, -1);
    }
    pml_program_destroy(&p);

    p = build(PML_METHOD_LORA, PML_TARGET_DOWN, 0);
    assert_int_equal(count(p, micro, PML_OP_linear_bwd, 0), 1);
    assert_int_equal(count(p, micro, PML_OP_attention_bwd, 0), 0);
    assert_int_equal(count(p, micro, PML_OP_attention_bwd, 1), 1);
    assert_int_equal(p->n_parameters > 0 ? p->trained_floats : 0,
                     small.layers * 8 * (small.intermediate + small.hidden));
    pml_program_destroy(&p);
}

/* Operations of a micro-batch. */
static double all_flops(const pml_program *p)
{
    pml_counts counts = pml_program_capacity(p, PML_SEGMENT_MICRO);
    double sum = 0;
    for (int i = p->segments[PML_SEGMENT_MICRO].first; i < p->segments[PML_SEGMENT_MICRO].end;
         i++) {
        pml_op_args args;
        pml_program_bind(p, &p->nodes[i], (void *)256, &counts, &args);
        sum += pml_node_cost(p->nodes[i].op, &args).flops;
    }
    return sum;
}

/* A backend that gains by it: swiglu makes u of down, its backward v and db of gate_up and da of
 * down; each is made once, v stands in a border where there is one. With dropout down's have a mask
 * that swiglu has not. */
static void test_beside(void **state)
{
    (void)state;
    for (int form = 0; form < 5; form++) {
        bool bordered = form == 1 || form == 4, drops = form == 2 || form == 4;
        pml_backend backend = *pml_backend_cpu();
        backend.adapters_beside = true;
        backend.border = bordered ? 64 : 0;
        pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
        config.lora_dropout = drops ? 0.1 : 0;
        const pml_program_options options = {
            .spec = &small,
            .config = &config,
            .limits = limits,
            .backend = &backend,
            .choices = {form == 3 ? PML_RECOMPUTE_LAYER : PML_RECOMPUTE_NONE,
                        form == 3 ? small.layers : 0, 64, 1}};
        pml_program *p = NULL;
        pml_error err = PML_ERROR_INIT;
        if (pml_program_build(&options, &p, &err) != PML_OK)
            fail_msg("%s", err.message);
        int u = 0, v = 0, da = 0, kept = 0, weights = 0;
        for (int i = p->segments[PML_SEGMENT_MICRO].first; i < p->segments[PML_SEGMENT_MICRO].end;
             i++) {
            const pml_node *node = &p->nodes[i];
            const pml_operand *at = node->operands;
            u += node->op == PML_OP_swiglu && at[PML_OPERAND(swiglu, u)].tensor >= 0;
            u += node->op == PML_OP_linear && node->args.linear.u_made;
            weights += strcmp(node->label, "down backward, weights") == 0;
            if (node->op == PML_OP_linear_bwd && (node->args.linear_bwd.kept & PML_V_MADE) != 0) {
                kept++;
                assert_true(at[PML_OPERAND(linear_bwd, v)].tensor >= 0 &&
                            at[PML_OPERAND(linear_bwd, db)].tensor < 0);
            }
            if (node->op != PML_OP_swiglu_bwd || node->args.swiglu_bwd.lora_parts == 0)
                continue;
            v++;
            da += at[PML_OPERAND(swiglu_bwd, da)].tensor >= 0 &&
                  at[PML_OPERAND(swiglu_bwd, v_down)].tensor >= 0 &&
                  at[PML_OPERAND(swiglu_bwd, h)].tensor < 0;
            assert_true(!drops || at[PML_OPERAND(swiglu_bwd, h)].tensor >= 0);
            assert_int_equal(node->args.swiglu_bwd.lora_parts, 3);
            assert_int_equal(at[PML_OPERAND(swiglu_bwd, v)].tensor ==
                                 at[PML_OPERAND(swiglu_bwd, dgate_up)].tensor,
                             bordered);
            assert_true(!bordered || at[PML_OPERAND(swiglu_bwd, v)].col == 2 * small.intermediate);
        }
        int masked = drops ? small.layers : 0;
        assert_int_equal(u, 2 * (small.layers - masked));
        assert_int_equal(v, small.layers);
        assert_int_equal(da, small.layers - masked);
        assert_int_equal(weights, masked);
        assert_int_equal(kept, small.layers + masked); /* gate_up's; masked, down's, in two calls */
        /* Who makes them does not change what is to be made. */
        backend.adapters_beside = false;
        pml_program *apart = NULL;
        assert_int_equal(pml_program_build(&options, &apart, &err), PML_OK);
        assert_true(all_flops(p) > 0 && all_flops(p) == all_flops(apart));
        pml_program_destroy(&apart);
        pml_program_destroy(&p);
    }
}

/* The largest activation but gate_up is not kept: swiglu's backward makes it again. */
static void test_output_of_swiglu_is_not_kept(void **state)
{
    (void)state;
    for (int method = 0; method < 2; method++) {
        pml_program *p = build((pml_method)method, PML_TARGET_ALL_LINEAR, 0);
        const pml_segment micro = PML_SEGMENT_MICRO;
        int found = 0;
        for (int i = p->segments[micro].first; i < p->segments[micro].end; i++) {
            const pml_node *node = &p->nodes[i];
            if (node->op == PML_OP_swiglu) {
                assert_int_equal(p->tensors[node->operands[PML_OPERAND(swiglu, h)].tensor].last,
                                 i + 1);
                found++;
            }
            if (node->op == PML_OP_swiglu_bwd) { /* in place, and read by what comes next */
                assert_int_equal(node->operands[PML_OPERAND(swiglu_bwd, h)].tensor,
                                 node->operands[PML_OPERAND(swiglu_bwd, dh)].tensor);
                assert_int_equal(p->nodes[i + 1].op, PML_OP_linear_bwd);
                assert_int_equal(p->nodes[i + 1].operands[PML_OPERAND(linear_bwd, x)].tensor,
                                 node->operands[PML_OPERAND(swiglu_bwd, h)].tensor);
                assert_int_equal(p->tensors[node->operands[PML_OPERAND(swiglu_bwd, h)].tensor].last,
                                 i + 1);
                found++;
            }
        }
        assert_int_equal(found, 2 * small.layers);
        pml_program_destroy(&p);
    }
    /* Where the backward ends at down, there is no backward of swiglu to make it. */
    pml_program *p = build(PML_METHOD_LORA, PML_TARGET_DOWN, 0);
    assert_int_equal(count(p, PML_SEGMENT_MICRO, PML_OP_swiglu_bwd, 0), 0);
    assert_int_equal(count(p, PML_SEGMENT_MICRO, PML_OP_swiglu, 0), 1);
    pml_program_destroy(&p);
    /* Adapters on the attention alone: nobody asks for it. */
    p = build(PML_METHOD_LORA, PML_TARGET_Q, 0);
    for (int i = 0; i < p->n_nodes; i++)
        if (p->nodes[i].op == PML_OP_swiglu_bwd)
            assert_int_equal(p->nodes[i].operands[PML_OPERAND(swiglu_bwd, h)].tensor, -1);
    pml_program_destroy(&p);
}

/* What rope turned attention's backward turns back, before that of the heads' norms; no other node
 * does. */
static void test_attention_turns_back(void **state)
{
    (void)state;
    const pml_segment micro = PML_SEGMENT_MICRO;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    for (int norms = 0; norms < 2; norms++) {
        pml_model_spec spec = small;
        spec.qk_norm = norms;
        pml_program *p = built(&spec, &config, &limits, no_recompute);
        assert_int_equal(count(p, micro, PML_OP_rope, ANY), spec.layers);
        assert_int_equal(count(p, micro, PML_OP_attention_bwd, ANY), spec.layers);
        for (int i = p->segments[micro].first; i < p->segments[micro].end; i++) {
            const pml_node *node = &p->nodes[i];
            if (node->op == PML_OP_rope)
                assert_false(node->args.rope.inverse);
            if (node->op != PML_OP_attention_bwd)
                continue;
            assert_int_equal(node->operands[PML_OPERAND(attention_bwd, pos)].tensor,
                             p->positions_in);
            assert_int_equal(node->operands[PML_OPERAND(attention_bwd, table)].tensor, p->rope);
            assert_int_equal(node[1].op == PML_OP_head_norm_bwd, norms);
        }
        pml_program_destroy(&p);
    }
}

/* The table of angles is as long as the longest document or sample, whatever the model says. */
static void test_lengths_beyond_the_models_positions(void **state)
{
    (void)state;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_Q);
    const pml_batch_limits longer[] = {{700, 1, 700, 700, 200}, {512, 8, 500, 128, 900}};
    for (int i = 0; i < 2; i++) {
        pml_program *p = built(&small, &config, &longer[i], no_recompute);
        assert_int_equal(p->positions, i == 0 ? 700 : 900);
        assert_true(p->positions > small.max_positions);
        pml_program_destroy(&p);
    }
}

/* Every trained tensor lies in one range, codes where it has 4096 elements, from a block's
 * beginning on; no range meets another; and the plan counts what pml_optimizer_bytes says. */
static void check_ranges(pml_method method, int32_t rank)
{
    pml_train_config config = config_for(method, PML_TARGET_ALL_LINEAR);
    config.optimizer = PML_OPTIMIZER_ADAMW_8BIT;
    config.lora_rank = rank;
    pml_program *p = built(&small, &config, &limits, no_recompute);
    size_t kept = 0;
    int found[2] = {0};
    for (int32_t i = 0; i < p->n_parameters; i++) {
        const pml_parameter *q = &p->parameters[i];
        if (!q->trained)
            continue;
        int64_t n = q->rows * q->cols;
        const pml_range *r = pml_program_range(p, q->at);
        assert_non_null(r);
        assert_true(q->at + n <= r->at + r->floats);
        assert_int_equal(r->codes, n >= PML_8BIT_LEAST);
        assert_int_equal(r->decay, q->decay);
        assert_true(!r->codes || (q->at - r->at) % PML_ADAMW_8BIT_BLOCK == 0);
        kept += pml_optimizer_bytes(&config, n);
        found[r->codes]++;
    }
    assert_true(found[0] > 0 && found[1] > 0);
    for (int32_t i = 1; i < p->n_ranges; i++)
        assert_true(p->ranges[i - 1].at + p->ranges[i - 1].floats <= p->ranges[i].at);
    assert_int_equal(count(p, PML_SEGMENT_UPDATE, PML_OP_adamw, ANY) +
                         count(p, PML_SEGMENT_UPDATE, PML_OP_adamw_8bit, ANY),
                     p->n_ranges);
    /* More only by gaps between stacks and by what a buffer is rounded up to. */
    size_t planned = p->by_cause[PML_CAUSE_OPTIMIZER];
    size_t gaps = (size_t)p->n_ranges * 2 * PML_ADAMW_8BIT_BLOCK * sizeof(float) +
                  (size_t)p->n_parameters * 2 * PML_ADAMW_8BIT_BLOCK * sizeof(float);
    assert_true(planned >= kept && planned <= kept + gaps);
    pml_program_destroy(&p);
}

static void test_ranges_of_8_bits(void **state)
{
    (void)state;
    check_ranges(PML_METHOD_FULL, 8);
    check_ranges(PML_METHOD_LORA, 67); /* 67 x 64 = 16.75 blocks; of keys' B 2144 elements */
}

static void test_full_trains_everything(void **state)
{
    (void)state;
    pml_program *p = build(PML_METHOD_FULL, 0, 0);
    int64_t floats = 0, last = -1;
    for (int i = 0; i < p->n_parameters; i++) {
        const pml_parameter *q = &p->parameters[i];
        assert_true(q->trained && !q->adapter);
        assert_true(q->at > last);
        assert_int_equal(q->decay, q->at < p->decay_floats);
        assert_int_equal(q->decay,
                         strstr(q->name, "norm") == NULL && strstr(q->name, "bias") == NULL);
        last = q->at;
        floats += q->rows * q->cols;
    }
    int64_t layer = 64 * (64 + 2 * 32) + 128 + 64 * 64 + 3 * 64 * 160 + 2 * 64;
    assert_int_equal(floats, 500 * 64 + small.layers * layer + 64);
    assert_int_equal(count(p, PML_SEGMENT_MICRO, PML_OP_embed_bwd, ANY), 1);
    assert_int_equal(count(p, PML_SEGMENT_UPDATE, PML_OP_adamw, ANY), 2);
    pml_program_destroy(&p);
}

/* q, k and v of a layer lie row on row in one tensor, and the file's names know where. */
static void test_stacked_names(void **state)
{
    (void)state;
    pml_program *p = build(PML_METHOD_FULL, 0, 0);
    const pml_parameter *found[3] = {NULL};
    const char *names[] = {"model.layers.2.self_attn.q_proj.weight",
                           "model.layers.2.self_attn.k_proj.weight",
                           "model.layers.2.self_attn.v_proj.weight"};
    for (int i = 0; i < p->n_parameters; i++)
        for (int n = 0; n < 3; n++)
            if (strcmp(p->parameters[i].name, names[n]) == 0)
                found[n] = &p->parameters[i];
    assert_true(found[0] != NULL && found[1] != NULL && found[2] != NULL);
    assert_int_equal(found[1]->at, found[0]->at + 64 * 64);
    assert_int_equal(found[2]->at, found[1]->at + 32 * 64);
    assert_int_equal(found[2]->rows, 32);
    assert_int_equal(found[0]->tensor, found[2]->tensor);
    pml_program_destroy(&p);
}

static void test_bind_follows_the_batch(void **state)
{
    (void)state;
    pml_program *p = build(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR, 0);
    const pml_counts counts = {.tokens = 37, .docs = 3, .labels = 11, .max_doc = 20};
    static char arena[1]; /* addresses are computed, never followed */
    int seen = 0;
    for (int i = p->segments[PML_SEGMENT_MICRO].first; i < p->segments[PML_SEGMENT_MICRO].end;
         i++) {
        pml_op_args args;
        pml_program_bind(p, &p->nodes[i], arena, &counts, &args);
        if (p->nodes[i].op != PML_OP_attention)
            continue;
        const pml_attention_args *a = &args.attention;
        assert_int_equal(a->q.rows, 37);
        assert_int_equal(a->q.cols, 64);
        assert_int_equal(a->q.ld, 128);
        assert_ptr_equal((char *)a->q.data + sizeof(float) * 64, a->k.data);
        assert_int_equal(a->cu_q.cols, 4);
        assert_int_equal(a->lse.rows, 4);
        assert_int_equal(a->lse.cols, 37);
        assert_int_equal(a->max_q, 20);
        seen++;
    }
    assert_int_equal(seen, small.layers);
    pml_program_destroy(&p);
}

/* The window that a segment's attention of layer 0 (and, trained, its backward) has for a batch. */
static int32_t bound_window(const pml_program *p, pml_segment segment, pml_counts counts)
{
    static char arena[1];
    int32_t window = -1;
    for (int i = p->segments[segment].first; i < p->segments[segment].end; i++) {
        pml_op_args args;
        pml_program_bind(p, &p->nodes[i], arena, &counts, &args);
        if (p->nodes[i].op == PML_OP_attention && p->nodes[i].layer == 0)
            window = args.attention.window;
        if (p->nodes[i].op == PML_OP_attention_bwd && p->nodes[i].layer == 0)
            assert_int_equal(args.attention_bwd.window, window);
    }
    return window;
}

/* A window is one where a document, or what is cached, has more keys than it. */
static void test_window_in_force(void **state)
{
    (void)state;
    pml_model_spec spec = small;
    spec.window = 20;
    spec.sliding[0] = 1; /* of layer 0 */
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    const pml_plan_choices choices = {.pieces = 1, .head_chunk = 64};
    pml_program *p = built(&spec, &config, &limits, choices);
    const pml_counts train = {.tokens = 60, .docs = 3, .labels = 11};
    const int32_t longest[] = {21, 20, 19}, in_force[] = {20, 0, 0};
    for (int i = 0; i < 3; i++) {
        pml_counts counts = train;
        counts.max_doc = longest[i];
        assert_int_equal(bound_window(p, PML_SEGMENT_MICRO, counts), in_force[i]);
        pml_counts cached = {.tokens = 1, .docs = 1, .labels = 1, .keys = longest[i], .max_doc = 1};
        assert_int_equal(bound_window(p, PML_SEGMENT_GENERATE, cached), in_force[i]);
    }
    pml_program_destroy(&p);
}

/* One layer's down projection: 2 T N K multiplications and additions, and the adapter's. */
static void test_price_of_linear(void **state)
{
    (void)state;
    pml_program *p = build(PML_METHOD_LORA, PML_TARGET_DOWN, 0);
    pml_counts counts = pml_program_capacity(p, PML_SEGMENT_MICRO);
    static char arena[1];
    for (int i = p->segments[PML_SEGMENT_MICRO].first; i < p->segments[PML_SEGMENT_MICRO].end;
         i++) {
        pml_op_args args;
        if (strcmp(p->nodes[i].label, "down") != 0)
            continue;
        pml_program_bind(p, &p->nodes[i], arena, &counts, &args);
        pml_cost cost = pml_node_cost(PML_OP_linear, &args);
        assert_int_equal((int64_t)cost.flops, 2 * 512 * (64 * 160 + 8 * 160 + 64 * 8));
        int64_t bytes = 4 * (512 * 160 + 64 * 160 + 8 * 160 + 64 * 8 + 512 * 64 + 512 * 8);
        assert_int_equal((int64_t)cost.bytes, bytes);
        pml_program_destroy(&p);
        return;
    }
    fail_msg("no down projection in the program");
}

/* Attention's backward costs what it does by itself and rope's beside it do, but that nobody reads
 * and writes dq and dk once more. */
static void test_price_of_turning_back(void **state)
{
    (void)state;
    pml_program *p = build(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR, 0);
    pml_counts counts = pml_program_capacity(p, PML_SEGMENT_MICRO);
    static char arena[1];
    int n = p->segments[PML_SEGMENT_MICRO].first;
    while (p->nodes[n].op != PML_OP_attention_bwd)
        n++;
    pml_op_args both, alone, rope = {.rope = {.inverse = 1}};
    pml_program_bind(p, &p->nodes[n], arena, &counts, &both);
    alone = both;
    alone.attention_bwd.pos = alone.attention_bwd.table = (pml_view){0};
    const pml_attention_bwd_args *a = &both.attention_bwd;
    rope.rope.x = a->dq;
    rope.rope.x.cols += a->dk.cols; /* side by side */
    rope.rope.pos = a->pos;
    rope.rope.table = a->table;
    const pml_cost whole = pml_node_cost(PML_OP_attention_bwd, &both);
    const pml_cost plain = pml_node_cost(PML_OP_attention_bwd, &alone);
    const pml_cost turn = pml_node_cost(PML_OP_rope, &rope);
    assert_true(turn.flops > 0 && turn.bytes > 0);
    assert_true(whole.flops == plain.flops + turn.flops);
    int64_t spared = 2 * 4 * rope.rope.x.rows * rope.rope.x.cols;
    assert_int_equal((int64_t)(plain.bytes + turn.bytes - whole.bytes), spared);
    pml_program_destroy(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_places_of_every_method),
        cmocka_unit_test(test_a_stage_for_snapshots),
        cmocka_unit_test(test_lora_computes_only_what_it_needs),
        cmocka_unit_test(test_output_of_swiglu_is_not_kept),
        cmocka_unit_test(test_beside),
        cmocka_unit_test(test_attention_turns_back),
        cmocka_unit_test(test_lengths_beyond_the_models_positions),
        cmocka_unit_test(test_full_trains_everything),
        cmocka_unit_test(test_ranges_of_8_bits),
        cmocka_unit_test(test_stacked_names),
        cmocka_unit_test(test_bind_follows_the_batch),
        cmocka_unit_test(test_window_in_force),
        cmocka_unit_test(test_borders),
        cmocka_unit_test(test_price_of_linear),
        cmocka_unit_test(test_price_of_turning_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
