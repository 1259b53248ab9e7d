/* The segments of the program: what a micro-batch, an update, an evaluation, a generated token are
 * made of. */
#include <stdlib.h>

#include "layers.h"

static pmli_stream embed(pmli_builder *b)
{
    const pml_program *p = b->program;
    int32_t h = pmli_begins_wide(b) ? pmli_wide_activation(b, p->spec.hidden, "embedded")
                                    : pmli_activation(b, p->spec.hidden, "embedded", -1);
    pml_node *node = pmli_node(b, PML_OP_embed, -1, "embed");
    pmli_operand(node, 0, p->ids);
    pmli_operand(node, 1, b->table);
    pmli_operand(node, 2, h);
    pmli_node_done(b, node);
    return (pmli_stream){h, PMLI_ABSENT};
}

static int32_t final_norm(pmli_builder *b, pmli_stream in, int32_t *rstd)
{
    int32_t y = pmli_activation(b, b->program->spec.hidden, "final hidden", -1);
    *rstd = pmli_statistic(b, "final rstd");
    pmli_rmsnorm(b, -1, "final norm", in, b->final_norm.w, y, *rstd);
    return y;
}

static void sum_losses(pmli_builder *b, int32_t losses, int32_t total)
{
    pml_node *node = pmli_node(b, PML_OP_sum, -1, "add to loss");
    pmli_operand(node, 0, losses);
    pmli_operand(node, 1, total);
    pmli_node_done(b, node);
}

/* Head and cross-entropy; dx absent: the loss alone. */
static void head_loss(pmli_builder *b, int32_t x, int32_t dx, int32_t dw, int32_t total)
{
    const pml_program *p = b->program;
    pmli_shape shape = {PML_F32, PML_EXTENT_FIXED, 1, PML_EXTENT_LABELS, p->limits.labels};
    int32_t losses = pmli_transient(b, shape, PML_CAUSE_ACTIVATIONS, "losses");
    pml_node *node = pmli_node(b, PML_OP_head_loss, -1, "head and loss");
    if (node == NULL)
        return;
    const int32_t scale = dx >= 0 ? p->loss_scale : PMLI_ABSENT;
    const int32_t operands[] = {x, b->head, p->label_rows, p->labels, scale, losses, dx, dw};
    for (int i = 0; i < 8; i++)
        pmli_operand(node, i, operands[i]);
    node->args.head_loss.chunk = p->choices.head_chunk;
    pmli_node_done(b, node);
    sum_losses(b, losses, total);
}

/* The gradient that runs down the residual line: of the output of each layer's o and down. In
 * float16 all layers add to it in float32, and what the products read is its rounding. */
static pmli_residual residual(pmli_builder *b)
{
    int32_t border = 0;
    for (int32_t l = 0; l < b->program->spec.layers; l++) {
        const pmli_linear *linear = b->layers[l].linear;
        border = linear[PMLI_O].border > border ? linear[PMLI_O].border : border;
        border = linear[PMLI_DOWN].border > border ? linear[PMLI_DOWN].border : border;
    }
    bool wide = b->config->dtype == PML_F16;
    int32_t d =
        pmli_activation(b, b->program->spec.hidden, wide ? "d residual rounded" : "d residual", -1);
    pmli_border(b, d, border, 0);
    return (pmli_residual){
        .sum = wide ? pmli_wide_activation(b, b->program->spec.hidden, "d residual") : d, .d = d};
}

void pmli_build_micro(pmli_builder *b)
{
    const pml_program *p = b->program;
    const int32_t layers = p->spec.layers, first = p->n_nodes;
    pmli_saved *saved = calloc((size_t)layers, sizeof *saved);
    if (saved == NULL) {
        b->status = PML_FAIL(b->err, PML_NO_MEMORY, "no host memory for the step program");
        return;
    }
    pmli_stream stream = embed(b);
    for (int32_t l = 0; l < layers; l++)
        stream = pmli_layer_forward(b, l, stream, PMLI_ABSENT, &saved[l]);
    int32_t rstd;
    int32_t y = final_norm(b, stream, &rstd);
    pmli_residual d = residual(b);
    const int32_t middle = p->n_nodes;
    head_loss(b, y, d.d, b->dhead, p->loss_sum);
    pmli_final_norm_backward(b, d, stream.add, rstd);
    bool embed_trained = b->dembed >= 0;
    int32_t lowest = 0; /* below it nothing is trained, and no gradient goes there */
    while (!embed_trained && lowest < layers && !pmli_layer_trained(&b->layers[lowest]))
        lowest++;
    for (int32_t l = layers - 1; l >= lowest; l--) {
        pmli_layer_backward(b, l, &saved[l], pmli_level_of(&p->choices, l, layers), d,
                            l > lowest || embed_trained);
    }
    if (embed_trained) {
        pml_node *node = pmli_node(b, PML_OP_embed_bwd, -1, "embed backward");
        pmli_operand(node, 0, p->ids);
        pmli_operand(node, 1, d.sum);
        pmli_operand(node, 2, b->dembed);
        pmli_node_done(b, node);
    }
    free(saved);
    pmli_offload(b, first, middle);
}

void pmli_build_eval(pmli_builder *b)
{
    pmli_saved dropped;
    pmli_stream stream = embed(b);
    for (int32_t l = 0; l < b->program->spec.layers; l++)
        stream = pmli_layer_forward(b, l, stream, PMLI_ABSENT, &dropped);
    int32_t rstd;
    int32_t y = final_norm(b, stream, &rstd);
    head_loss(b, y, PMLI_ABSENT, PMLI_ABSENT, b->program->eval_sum);
}

/* The logits of the last token of each prompt in the chunk. */
static void last_logits(pmli_builder *b, int32_t y)
{
    pml_program *p = b->program;
    pmli_shape shape = {b->config->dtype, PML_EXTENT_LABELS, p->generate_rows, PML_EXTENT_FIXED,
                        p->spec.hidden};
    int32_t last = pmli_transient(b, shape, PML_CAUSE_ACTIVATIONS, "last hidden");
    pml_node *pick = pmli_node(b, PML_OP_gather_rows, -1, "pick last");
    pmli_operand(pick, 0, y);
    pmli_operand(pick, 1, p->last_row);
    pmli_operand(pick, 2, last);
    pmli_node_done(b, pick);
    shape.cols = p->spec.vocab;
    p->logits = pmli_transient(b, shape, PML_CAUSE_ACTIVATIONS, "logits");
    pml_node *head = pmli_node(b, PML_OP_linear, -1, "head");
    if (head == NULL)
        return;
    p->tensors[p->logits].held = true; /* read after the segment's end */
    pmli_operand(head, PML_OPERAND(linear, x), last);
    pmli_operand(head, PML_OPERAND(linear, w), b->head);
    pmli_operand(head, PML_OPERAND(linear, y), p->logits);
    head->args.linear.parts = 1;
    head->args.linear.part_cols[0] = p->spec.vocab;
    pmli_node_done(b, head);
}

void pmli_build_generate(pmli_builder *b)
{
    pml_program *p = b->program;
    const pml_model_spec *spec = &p->spec;
    pmli_shape shape = {b->config->dtype, PML_EXTENT_KEYS, p->limits.generate_length,
                        PML_EXTENT_FIXED, 2 * (int64_t)spec->kv_heads * spec->head_dim};
    pmli_saved dropped;
    pmli_stream stream = embed(b);
    for (int32_t l = 0; l < spec->layers; l++) {
        int32_t cache = pmli_transient(b, shape, PML_CAUSE_ACTIVATIONS, "keys and values %d", l);
        if (cache >= 0)
            p->tensors[cache].held = true;
        stream = pmli_layer_forward(b, l, stream, cache, &dropped);
    }
    int32_t rstd;
    last_logits(b, final_norm(b, stream, &rstd));
}

static void fill(pmli_builder *b, const char *label, int32_t tensor, double value)
{
    pml_node *node = pmli_node(b, PML_OP_fill, -1, label);
    if (node == NULL)
        return;
    pmli_operand(node, 0, tensor);
    node->args.fill.value = value;
    pmli_node_done(b, node);
}

void pmli_build_norm(pmli_builder *b)
{
    const pml_program *p = b->program;
    const int32_t shared[] = {p->grads, p->loss_sum};
    static const char *const labels[] = {"sum over workers", "sum losses over workers"};
    for (int i = 0; i < 2; i++) {
        pml_node *reduce = pmli_node(b, PML_OP_allreduce, -1, labels[i]);
        pmli_operand(reduce, 0, shared[i]);
        pmli_node_done(b, reduce);
    }
    fill(b, "clear sum of squares", p->sumsq, 0);
    pml_node *squares = pmli_node(b, PML_OP_sumsq, -1, "gradient norm");
    pmli_operand(squares, 0, p->grads);
    pmli_operand(squares, 1, p->sumsq);
    pmli_node_done(b, squares);
    pml_node *clip = pmli_node(b, PML_OP_clip_scale, -1, "clip");
    pmli_operand(clip, 0, p->sumsq);
    pmli_operand(clip, 1, p->hyper);
    pmli_operand(clip, 2, p->norm);
    pmli_operand(clip, 3, p->loss_sum);
    pmli_node_done(b, clip);
}

/* The moments of a range as operands from `first` on; returns the operand after them. */
static int moments(pmli_builder *b, pml_node *node, int first, const pml_range *r)
{
    const pml_program *p = b->program;
    if (!r->codes) {
        pmli_operand(node, first, pmli_part(b, p->exp_avg, r->state, 1, r->floats, "exp_avg part"));
        if (node->op == PML_OP_sgd)
            return first + 1;
        pmli_operand(node, first + 1,
                     pmli_part(b, p->exp_avg_sq, r->state, 1, r->floats, "exp_avg_sq part"));
        return first + 2;
    }
    int64_t blocks = (r->floats + PML_ADAMW_8BIT_BLOCK - 1) / PML_ADAMW_8BIT_BLOCK;
    const int32_t codes[] = {p->exp_avg_codes, p->exp_avg_sq_codes};
    const int32_t largest[] = {p->exp_avg_largest, p->exp_avg_sq_largest};
    for (int i = 0; i < 2; i++) {
        pmli_operand(node, first + i, pmli_part(b, codes[i], r->state, 1, r->floats, "codes part"));
        pmli_operand(node, first + 2 + i,
                     pmli_part(b, largest[i], r->block, 1, blocks, "largest part"));
    }
    return first + 4;
}

/* One range of the flat buffers; hyper row 0 has weight decay, row 1 has none. */
static void update(pmli_builder *b, const pml_range *r)
{
    const pml_program *p = b->program;
    const char *label = r->decay ? "with decay" : "without decay";
    pml_op op = b->config->optimizer == PML_OPTIMIZER_SGD ? PML_OP_sgd : PML_OP_adamw;
    int32_t values = pmli_part(b, p->values, r->at, 1, r->floats, "values %s", label);
    int32_t grads = pmli_part(b, p->grads, r->at, 1, r->floats, "gradients %s", label);
    int32_t hyper = pmli_part(b, p->hyper, r->decay ? 0 : PML_HYPER_COUNT, 1, PML_HYPER_COUNT,
                              "hyper %s", label);
    int32_t rounded = pmli_part(b, p->rounded, r->at, 1, r->floats, "rounded %s", label);
    pml_node *node = pmli_node(b, r->codes ? PML_OP_adamw_8bit : op, -1, label);
    if (node == NULL)
        return;
    pmli_operand(node, 0, values);
    pmli_operand(node, 1, grads);
    int next = moments(b, node, 2, r);
    pmli_operand(node, next, hyper);
    pmli_operand(node, next + 1, rounded);
    if (op == PML_OP_sgd)
        node->args.sgd.nesterov = b->config->nesterov;
    pmli_node_done(b, node);
}

void pmli_build_update(pmli_builder *b)
{
    const pml_program *p = b->program;
    for (int32_t i = 0; b->status == PML_OK && i < p->n_ranges; i++)
        update(b, &p->ranges[i]);
}

void pmli_build_clear(pmli_builder *b)
{
    fill(b, "clear gradients", b->program->grads, 0);
    fill(b, "clear loss", b->program->loss_sum, 0);
}
