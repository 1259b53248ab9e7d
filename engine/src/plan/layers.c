/* A transformer layer as ops, forward and backward.
 *
 *   x ─┬─► norm ► qkv ► (head norm) ► rope ► attention ► o ─┬─► norm ► gate_up ► swiglu ► down ─┬─►
 *      └──────────────── + ───────────────────┘└──────────────── + ───────────────┘
 *
 * Each + is done by the norm that comes next (rmsnorm's `add`), and its sum overwrites the branch's
 * output. In the backward one gradient runs down the residual line; each norm's backward adds its
 * branch's gradient to it in place. */
#include <string.h>

#include "layers.h"

static pmli_shape tokens_by(const pmli_builder *b, pml_dtype dtype, int64_t cols)
{
    pml_counts capacity = pml_program_capacity(b->program, b->segment);
    return (pmli_shape){dtype, PML_EXTENT_TOKENS, capacity.tokens, PML_EXTENT_FIXED, cols};
}

int32_t pmli_activation(pmli_builder *b, int64_t cols, const char *name, int32_t layer)
{
    return pmli_transient(b, tokens_by(b, b->config->dtype, cols), PML_CAUSE_ACTIVATIONS,
                          layer < 0 ? "%s" : "%s %d", name, layer);
}

int32_t pmli_wide_activation(pmli_builder *b, int64_t cols, const char *name)
{
    return pmli_transient(b, tokens_by(b, PML_F32, cols), PML_CAUSE_ACTIVATIONS, "%s", name);
}

/* Rows that attention's kernels write begin on 256 bytes, in 16 bits: cuDNN's backward takes 1.8 %
 * longer where every second one does not. */
static int64_t attention_border(int64_t cols, int64_t border)
{
    enum { UNIT = 128 };
    return border > 0 ? (cols + border + UNIT - 1) / UNIT * UNIT - cols : 0;
}

int32_t pmli_input_of(pmli_builder *b, int32_t layer, int which, const char *name)
{
    const pmli_linear *l = &b->layers[layer].linear[which];
    int32_t x = pmli_activation(b, l->inputs, name, layer);
    pmli_border(b, x, which == PMLI_O ? attention_border(l->inputs, l->border) : l->border, 0);
    return x;
}

/* What linear layer `which` writes, with room for its adapters' factors. */
static int32_t output_of(pmli_builder *b, int32_t layer, int which, const char *name)
{
    const pmli_linear *l = &b->layers[layer].linear[which];
    int32_t y = pmli_activation(b, l->outputs, name, layer);
    pmli_border(b, y, which == PMLI_QKV ? attention_border(l->outputs, l->border) : l->border, 0);
    return y;
}

/* One float32 a token, `rows` times: [rows, T]. */
static int32_t statistic(pmli_builder *b, int64_t rows, const char *name, int32_t layer)
{
    pml_counts capacity = pml_program_capacity(b->program, b->segment);
    pmli_shape shape = {PML_F32, PML_EXTENT_FIXED, rows, PML_EXTENT_TOKENS, capacity.tokens};
    return pmli_transient(b, shape, PML_CAUSE_ACTIVATIONS, layer < 0 ? "%s" : "%s %d", name, layer);
}

void pmli_rmsnorm(pmli_builder *b, int32_t layer, const char *label, pmli_stream in, int32_t weight,
                  int32_t y, int32_t rstd)
{
    pml_node *node = pmli_node(b, PML_OP_rmsnorm, layer, label);
    if (node == NULL)
        return;
    pmli_operand(node, 0, in.x);
    pmli_operand(node, 1, in.add);
    pmli_operand(node, 2, weight);
    pmli_operand(node, 3, in.add); /* the sum takes the branch's place */
    pmli_operand(node, 4, y);
    pmli_operand(node, 5, rstd);
    node->args.rmsnorm.eps = b->program->spec.rms_eps;
    pmli_node_done(b, node);
}

/* Adds to the residual line's gradient; first: there is nothing yet to add to. */
static void rmsnorm_bwd(pmli_builder *b, int32_t layer, const char *label, int32_t dy, int32_t x,
                        const pmli_norm *norm, int32_t rstd, bool first, pmli_residual d)
{
    pml_node *node = pmli_node(b, PML_OP_rmsnorm_bwd, layer, label);
    if (node == NULL)
        return;
    pmli_operand(node, 0, dy);
    pmli_operand(node, 1, x);
    pmli_operand(node, 2, norm->w);
    pmli_operand(node, 3, rstd);
    pmli_operand(node, 4, first ? PMLI_ABSENT : d.sum);
    pmli_operand(node, 5, d.sum);
    pmli_operand(node, 6, d.sum != d.d ? d.d : PMLI_ABSENT);
    pmli_operand(node, 7, norm->dw);
    pmli_node_done(b, node);
}

static const char *const forward_labels[PMLI_LINEARS] = {"qkv", "o", "gate_up", "down"};
static const char *const unpack_labels[PMLI_LINEARS] = {"unpack qkv", "unpack o", "unpack gate_up",
                                                        "unpack down"};
static const char *const turn_labels[PMLI_LINEARS] = {"turn qkv", "turn o", "turn gate_up",
                                                      "turn down"};
static const char *const backward_labels[PMLI_LINEARS] = {"qkv backward", "o backward",
                                                          "gate_up backward", "down backward"};

/* The mask of a dropped-out LoRA input is a function of its purpose, so that forward, recompute
 * and backward agree. Only training drops. */
static void lora_attributes(const pmli_builder *b, int32_t layer, int which, uint32_t *parts,
                            int32_t *rank, float scale[PML_LINEAR_MAX_PARTS], float *dropout,
                            uint32_t *purpose)
{
    const pml_train_config *config = b->config;
    const pmli_linear *l = &b->layers[layer].linear[which];
    *parts = l->lora_parts;
    *rank = l->rank;
    for (int p = 0; p < PML_LINEAR_MAX_PARTS; p++)
        scale[p] = (float)l->scale[p];
    *dropout = *parts != 0 && b->segment == PML_SEGMENT_MICRO ? (float)config->lora_dropout : 0.0F;
    static const uint32_t first_part[PMLI_LINEARS] = {0, 3, 4, 6};
    *purpose = PML_PURPOSE_DROPOUT + (uint32_t)layer * 8 + first_part[which];
}

/* The weight as the products take it: one in NF4 is unpacked just before, into memory that the
 * layers share, unless the layer's recompute has done so. */
static int32_t unpacked(pmli_builder *b, int32_t layer, int which)
{
    const pmli_linear *l = &b->layers[layer].linear[which];
    if (l->nf4[0] < 0)
        return l->w;
    if (l->unpacked >= 0)
        return l->unpacked;
    int32_t w = pmli_transient(b, pmli_fixed(b->config->dtype, l->outputs, l->inputs),
                               PML_CAUSE_WORKSPACE, "%s weight %d", forward_labels[which], layer);
    pmli_border(b, w, l->border, l->border);
    pml_node *node = pmli_node(b, PML_OP_nf4_dequantise, layer, unpack_labels[which]);
    if (node == NULL)
        return PMLI_ABSENT;
    for (int k = 0; k < PML_NF4_TENSORS; k++)
        pmli_operand(node, k, l->nf4[k]);
    pmli_operand(node, PML_NF4_TENSORS, w);
    node->args.nf4_dequantise.parts = l->parts;
    memcpy(node->args.nf4_dequantise.part_rows, l->part_cols, sizeof l->part_cols);
    pmli_node_done(b, node);
    return w;
}

/* A weight in 8 bits as dx's product takes it: turned round just before where it is not kept so. */
static int32_t turned(pmli_builder *b, int32_t layer, int which)
{
    const pmli_linear *l = &b->layers[layer].linear[which];
    if (l->turned >= 0)
        return l->turned;
    int32_t w = pmli_transient(b, pmli_fixed(PML_U8, l->inputs, l->outputs), PML_CAUSE_WORKSPACE,
                               "%s turned %d", forward_labels[which], layer);
    pmli_border(b, w, l->code_border, 0);
    pml_node *node = pmli_node(b, PML_OP_fp8_turn, layer, turn_labels[which]);
    pmli_operand(node, PML_OPERAND(fp8_turn, x), l->w);
    pmli_operand(node, PML_OPERAND(fp8_turn, y), w);
    pmli_node_done(b, node);
    return w;
}

int32_t pmli_linear_forward(pmli_builder *b, int32_t layer, int which, pmli_rows x, int32_t y,
                            int32_t u, bool u_made)
{
    int32_t w = unpacked(b, layer, which);
    pml_node *node = pmli_node(b, PML_OP_linear, layer, forward_labels[which]);
    if (node == NULL)
        return PMLI_ABSENT;
    const pmli_linear *l = &b->layers[layer].linear[which];
    pml_linear_args *args = &node->args.linear;
    lora_attributes(b, layer, which, &args->lora_parts, &args->rank, args->lora_scale,
                    &args->lora_dropout, &args->lora_purpose);
    args->parts = l->parts;
    args->border = l->border + l->code_border;
    args->u_made = u_made;
    memcpy(args->part_cols, l->part_cols, sizeof args->part_cols);
    const int32_t operands[] = {x.x, w, l->w_scale, l->bias, l->a, l->b};
    for (int i = 0; i < 6; i++)
        pmli_operand(node, i, operands[i]);
    if (args->lora_dropout > 0) {
        pmli_operand(node, PML_OPERAND(linear, rng), b->program->rng);
        pmli_operand(node, PML_OPERAND(linear, places), b->program->places);
    }
    pmli_operand(node, PML_OPERAND(linear, y), y);
    pmli_operand(node, PML_OPERAND(linear, u), u);
    pmli_operand(node, PML_OPERAND(linear, x_scale), x.scale);
    pmli_node_done(b, node);
    return w;
}

/* Only the gradient of the input reads the weight; where it is quantised it may not be there. */
static int32_t weight_of_dx(pmli_builder *b, int32_t layer, int which, int32_t dx)
{
    const pmli_linear *l = &b->layers[layer].linear[which];
    bool quantised = l->nf4[0] >= 0 || l->w_scale >= 0;
    return dx < 0 && quantised ? PMLI_ABSENT
           : l->w_scale >= 0   ? turned(b, layer, which)
                               : unpacked(b, layer, which);
}

void pmli_linear_backward(pmli_builder *b, int32_t layer, int which, pmli_gradients part,
                          pmli_rows dy, int32_t x, int32_t u, pml_operand v, int32_t dx)
{
    int32_t w = weight_of_dx(b, layer, which, dx);
    pml_node *node =
        pmli_node(b, PML_OP_linear_bwd, layer,
                  part == PMLI_OF_INPUT ? "down backward, weights" : backward_labels[which]);
    if (node == NULL)
        return;
    const pmli_linear *l = &b->layers[layer].linear[which];
    bool of_input = part != PMLI_BEFORE_INPUT, others = part != PMLI_OF_INPUT;
    bool db = others && part != PMLI_AFTER_SWIGLU, v_made = !db && v.tensor >= 0;
    pml_linear_bwd_args *args = &node->args.linear_bwd;
    lora_attributes(b, layer, which, &args->lora_parts, &args->rank, args->lora_scale,
                    &args->lora_dropout, &args->lora_purpose);
    args->parts = l->parts;
    args->border = l->border + l->code_border;
    bool filled = l->nf4[0] < 0 || l->unpacked >= 0; /* its border, by the forward */
    args->kept = (filled ? PML_BORDER_OF_W : 0U) | (v_made ? PML_V_MADE : 0U);
    memcpy(args->part_cols, l->part_cols, sizeof args->part_cols);
    bool reads = of_input && (l->dw >= 0 || l->da >= 0);
    const int32_t operands[] = {dy.x, reads ? x : PMLI_ABSENT, w, l->w_scale, l->a,
                                l->b, db ? u : PMLI_ABSENT};
    for (int i = 0; i < 7; i++)
        pmli_operand(node, i, operands[i]);
    if (args->lora_dropout > 0) {
        pmli_operand(node, PML_OPERAND(linear_bwd, rng), b->program->rng);
        pmli_operand(node, PML_OPERAND(linear_bwd, places), b->program->places);
    }
    const int32_t results[] = {dx, of_input ? l->dw : PMLI_ABSENT, others ? l->dbias : PMLI_ABSENT,
                               of_input ? l->da : PMLI_ABSENT, db ? l->db : PMLI_ABSENT};
    for (int i = 0; i < 5; i++)
        pmli_operand(node, PML_OPERAND(linear_bwd, dx) + i, results[i]);
    node->operands[PML_OPERAND(linear_bwd, v)] = v;
    pmli_operand(node, PML_OPERAND(linear_bwd, dy_scale), dy.scale);
    pmli_node_done(b, node);
}

int32_t pmli_low_rank_of(pmli_builder *b, int32_t layer, int which, const char *name)
{
    const pmli_linear *l = &b->layers[layer].linear[which];
    return l->lora_blocks == 0 ? PMLI_ABSENT
                               : pmli_activation(b, (int64_t)l->lora_blocks * l->rank, name, layer);
}

static void input_norm(pmli_builder *b, int32_t layer, pmli_stream in, pmli_saved *s)
{
    s->y1 = pmli_input_of(b, layer, PMLI_QKV, "attention input");
    s->rstd1 = statistic(b, 1, "input rstd", layer);
    pmli_rmsnorm(b, layer, "input norm", in, b->layers[layer].input_norm.w, s->y1, s->rstd1);
}

static void post_norm(pmli_builder *b, int32_t layer, pmli_stream in, pmli_saved *s)
{
    s->y2 = pmli_input_of(b, layer, PMLI_GATE_UP, "mlp input");
    s->rstd2 = statistic(b, 1, "post rstd", layer);
    pmli_rmsnorm(b, layer, "post norm", in, b->layers[layer].post_norm.w, s->y2, s->rstd2);
}

static void normalised_qk(pmli_builder *b, int32_t layer, pmli_saved *s)
{
    const pml_model_spec *spec = &b->program->spec;
    int32_t heads = spec->heads + spec->kv_heads;
    s->qk = pmli_activation(b, (int64_t)heads * spec->head_dim, "normalised qk", layer);
    s->rstd_qk = pmli_transient(b, tokens_by(b, PML_F32, heads), PML_CAUSE_ACTIVATIONS,
                                "head rstd %d", layer);
    pmli_head_norm(b, layer, s);
    pmli_rope(b, layer, s->qk);
}

static void attend(pmli_builder *b, int32_t layer, int32_t cache, pmli_saved *s)
{
    s->o = pmli_input_of(b, layer, PMLI_O, "attention output");
    s->lse = statistic(b, b->program->spec.heads, "lse", layer);
    pmli_attention(b, layer, s, cache);
}

/* As far as the MLP's gate and up, which is what a recompute must bring back. */
static void layer_inside(pmli_builder *b, int32_t layer, pmli_stream in, int32_t cache,
                         pmli_saved *s)
{
    const pml_model_spec *spec = &b->program->spec;
    const pmli_layer *w = &b->layers[layer];
    s->h = in.add < 0 ? in.x : in.add;
    input_norm(b, layer, in, s);
    s->qkv = pmli_activation(b, w->linear[PMLI_QKV].outputs, "qkv", layer);
    s->u_qkv = pmli_low_rank_of(b, layer, PMLI_QKV, "qkv u");
    pmli_linear_forward(b, layer, PMLI_QKV, pmli_plain(s->y1), s->qkv, s->u_qkv, false);
    s->qk = s->rstd_qk = PMLI_ABSENT;
    if (spec->qk_norm)
        normalised_qk(b, layer, s);
    else
        pmli_rope(b, layer, s->qkv);
    attend(b, layer, cache, s);
    s->mid = pmli_activation(b, spec->hidden, "middle", layer);
    s->u_o = pmli_low_rank_of(b, layer, PMLI_O, "o u");
    pmli_linear_forward(b, layer, PMLI_O, pmli_plain(s->o), s->mid, s->u_o, false);
    post_norm(b, layer, (pmli_stream){s->h, s->mid}, s);
    s->gate_up = output_of(b, layer, PMLI_GATE_UP, "gate_up"); /* its gradient comes there */
    s->u_gate_up = pmli_low_rank_of(b, layer, PMLI_GATE_UP, "gate_up u");
    s->w_gate_up = pmli_linear_forward(b, layer, PMLI_GATE_UP, pmli_plain(s->y2), s->gate_up,
                                       s->u_gate_up, false);
}

pmli_stream pmli_layer_forward(pmli_builder *b, int32_t layer, pmli_stream in, int32_t cache,
                               pmli_saved *s)
{
    layer_inside(b, layer, in, cache, s);
    return (pmli_stream){s->mid, pmli_mlp_end(b, layer, s)};
}

static bool norm_trained(const pmli_layer *layer)
{
    return layer->input_norm.dw >= 0 || layer->post_norm.dw >= 0 || layer->q_norm.dw >= 0 ||
           layer->k_norm.dw >= 0;
}

bool pmli_layer_trained(const pmli_layer *layer)
{
    bool found = norm_trained(layer);
    for (int which = 0; which < PMLI_LINEARS; which++)
        found = found || layer->linear[which].da >= 0 || layer->linear[which].dw >= 0;
    return found;
}

int pmli_lowest_trained(const pmli_layer *layer)
{
    if (norm_trained(layer))
        return -1;
    int which = 0;
    while (which < PMLI_LINEARS && layer->linear[which].da < 0 && layer->linear[which].dw < 0)
        which++;
    return which;
}

static bool reads_input(const pmli_builder *b, int32_t layer, int which)
{
    const pmli_linear *l = &b->layers[layer].linear[which];
    return l->dw >= 0 || l->da >= 0;
}

/* Marks the nodes from `first` on as done a second time. */
static void mark_again(pmli_builder *b, int32_t first)
{
    for (int32_t i = first; b->status == PML_OK && i < b->program->n_nodes; i++)
        b->program->nodes[i].again = true;
}

/* What the backward of linear layer `which` is about to read and the forward has not kept, by the
 * same ops on the same operands and so bit for bit. The sums of the residual stream are kept, or
 * made by a whole layer's recompute, so that a norm reads its own sum. */
static void remake(pmli_builder *b, int32_t layer, int which, int32_t recompute, pmli_saved *s)
{
    int32_t first = b->program->n_nodes;
    bool whole = recompute == PML_RECOMPUTE_LAYER;
    if (whole && which == PMLI_DOWN) {
        layer_inside(b, layer, (pmli_stream){s->h, PMLI_ABSENT}, PMLI_ABSENT, s);
        /* The widest weight is the next that is read: it is not unpacked twice. */
        b->layers[layer].linear[PMLI_GATE_UP].unpacked = s->w_gate_up;
    }
    if (whole || recompute == PML_RECOMPUTE_NONE) {
        mark_again(b, first);
        return;
    }
    if (which == PMLI_GATE_UP && reads_input(b, layer, PMLI_GATE_UP))
        post_norm(b, layer, (pmli_stream){s->mid, PMLI_ABSENT}, s);
    if (which == PMLI_O && b->program->spec.qk_norm)
        normalised_qk(b, layer, s);
    if (which == PMLI_O && recompute == PML_RECOMPUTE_ATTENTION)
        attend(b, layer, PMLI_ABSENT, s);
    if (which == PMLI_QKV && reads_input(b, layer, PMLI_QKV))
        input_norm(b, layer, (pmli_stream){s->h, PMLI_ABSENT}, s);
    mark_again(b, first);
}

void pmli_layer_backward(pmli_builder *b, int32_t layer, pmli_saved *s, int32_t recompute,
                         pmli_residual res, bool input_needed)
{
    const pml_model_spec *spec = &b->program->spec;
    const pmli_layer *w = &b->layers[layer];
    const pml_operand none = {PMLI_ABSENT, 0, 0};
    const int32_t d = res.d;
    int stop = input_needed ? -1 : pmli_lowest_trained(w);
    if (stop == PMLI_DOWN) { /* swiglu's output is kept: no backward of swiglu makes it again */
        pmli_linear_backward(b, layer, PMLI_DOWN, PMLI_ALL, pmli_plain(d), s->act.x, s->u_down,
                             none, PMLI_ABSENT);
        return;
    }
    int32_t dact = pmli_activation(b, spec->intermediate, "d swiglu", layer);
    pml_operand v_down = pmli_down_backward(b, layer, s, d, dact);
    remake(b, layer, PMLI_DOWN, recompute, s); /* after it: down's weight is unpacked and gone */
    const pmli_dgate_up dy =
        pmli_swiglu_backward(b, layer, s, d, dact, v_down, stop != PMLI_GATE_UP);
    int32_t dy2 =
        stop == PMLI_GATE_UP ? PMLI_ABSENT : pmli_activation(b, spec->hidden, "d mlp input", layer);
    remake(b, layer, PMLI_GATE_UP, recompute, s);
    pmli_linear_backward(b, layer, PMLI_GATE_UP, dy.v.tensor >= 0 ? PMLI_AFTER_SWIGLU : PMLI_ALL,
                         dy.rows, s->y2, s->u_gate_up, dy.v, dy2);
    b->layers[layer].linear[PMLI_GATE_UP].unpacked = PMLI_ABSENT;
    if (stop == PMLI_GATE_UP)
        return;
    rmsnorm_bwd(b, layer, "post norm backward", dy2, s->mid, &w->post_norm, s->rstd2, false, res);
    int32_t dout = stop == PMLI_O
                       ? PMLI_ABSENT
                       : pmli_activation(b, w->linear[PMLI_O].inputs, "d attention output", layer);
    remake(b, layer, PMLI_O, recompute, s);
    pmli_linear_backward(b, layer, PMLI_O, PMLI_ALL, pmli_plain(d), s->o, s->u_o, none, dout);
    if (stop == PMLI_O)
        return;
    int32_t dqkv = output_of(b, layer, PMLI_QKV, "d qkv");
    pmli_attention_backward(b, layer, s, dout, dqkv);
    int32_t dy1 = stop == PMLI_QKV ? PMLI_ABSENT
                                   : pmli_activation(b, spec->hidden, "d attention input", layer);
    remake(b, layer, PMLI_QKV, recompute, s);
    pmli_linear_backward(b, layer, PMLI_QKV, PMLI_ALL, pmli_plain(dqkv), s->y1, s->u_qkv, none,
                         dy1);
    if (stop == PMLI_QKV)
        return;
    rmsnorm_bwd(b, layer, "input norm backward", dy1, s->h, &w->input_norm, s->rstd1, false, res);
}

void pmli_final_norm_backward(pmli_builder *b, pmli_residual d, int32_t h, int32_t rstd)
{
    rmsnorm_bwd(b, -1, "final norm backward", d.d, h, &b->final_norm, rstd, true, d);
}

int32_t pmli_statistic(pmli_builder *b, const char *name)
{
    return statistic(b, 1, name, -1);
}
