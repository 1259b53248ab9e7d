/* The middle of a layer's MLP: swiglu and the linear layer behind it, forward and backward, with
 * what swiglu does for the adapters on both sides where a backend gains by that.
 *
 *   gate_up ► swiglu ─► act ─► down          d ─► down backward ─► dact, v
 *                └────► u of down ─┘              swiglu backward ─► dgate_up; v, db of gate_up;
 *                                                                   da of down                  */
#include "layers.h"

/* Whether swiglu and its backward work for the adapter behind them: a dropped-out input is not what
 * they have in hand. For the one before them, whose output's gradient they make, they always can.
 */
static bool helps_down(const pmli_builder *b)
{
    return b->backend->adapters_beside &&
           (b->segment != PML_SEGMENT_MICRO || b->config->lora_dropout == 0);
}

/* Whether what swiglu and its backward make is rounded to 8 bits on the way: where the linear layer
 * that reads it multiplies 8 bits, and where they do all else that reads it, so that it is written
 * once, in a byte, in place of written in two, read and written again. */
static bool in_8_bits(const pmli_builder *b)
{
    return b->config->quant == PML_QUANT_FP8 && helps_down(b);
}

/* [tokens, cols] in 8 bits with room for linear layer `which`'s adapters, and scales of its parts'
 * pieces. */
static pmli_rows codes_for(pmli_builder *b, int32_t layer, int which, int64_t cols, int parts,
                           const char *name)
{
    pml_counts capacity = pml_program_capacity(b->program, b->segment);
    pmli_shape shape = {PML_U8, PML_EXTENT_TOKENS, capacity.tokens, PML_EXTENT_FIXED, cols};
    pmli_rows rows =
        pmli_plain(pmli_transient(b, shape, PML_CAUSE_ACTIVATIONS, "%s codes %d", name, layer));
    pmli_border(b, rows.x, b->layers[layer].linear[which].code_border, 0);
    shape.dtype = PML_F32;
    shape.cols = parts * pml_fp8_pieces(cols / parts);
    rows.scale = pmli_transient(b, shape, PML_CAUSE_ACTIVATIONS, "%s scales %d", name, layer);
    return rows;
}

/* v of a linear layer whose output's gradient is dy: in dy's border where there is one. */
static pml_operand place_of_v(pmli_builder *b, int32_t layer, int which, int32_t dy)
{
    static const char *const names[] = {"qkv v", "o v", "gate_up v", "down v"};
    const pmli_linear *l = &b->layers[layer].linear[which];
    int32_t cols = l->lora_blocks * l->rank;
    if (cols == 0)
        return (pml_operand){PMLI_ABSENT, 0, 0};
    if (l->border > 0)
        return (pml_operand){dy, l->outputs, cols};
    return (pml_operand){pmli_activation(b, cols, names[which], layer), 0, 0};
}

/* And u of down, on the way, where that gains. Returns whether it has. */
static bool swiglu(pmli_builder *b, int32_t layer, pmli_saved *s)
{
    const pmli_linear *down = &b->layers[layer].linear[PMLI_DOWN];
    bool kept = pmli_lowest_trained(&b->layers[layer]) == PMLI_DOWN; /* da of down reads it */
    s->act = in_8_bits(b) && !kept ? codes_for(b, layer, PMLI_DOWN, down->inputs, 1, "swiglu")
                                   : pmli_plain(pmli_input_of(b, layer, PMLI_DOWN, "swiglu"));
    s->u_down = pmli_low_rank_of(b, layer, PMLI_DOWN, "down u");
    bool helps = s->u_down >= 0 && helps_down(b);
    pml_node *node = pmli_node(b, PML_OP_swiglu, layer, "swiglu");
    if (node == NULL)
        return false;
    pmli_operand(node, PML_OPERAND(swiglu, gate_up), s->gate_up);
    pmli_operand(node, PML_OPERAND(swiglu, h), s->act.x);
    pmli_operand(node, PML_OPERAND(swiglu, a), helps ? down->a : PMLI_ABSENT);
    pmli_operand(node, PML_OPERAND(swiglu, u), helps ? s->u_down : PMLI_ABSENT);
    pmli_operand(node, PML_OPERAND(swiglu, h_scale), s->act.scale);
    node->args.swiglu.lora_scale = helps ? (float)down->scale[0] : 0;
    pmli_node_done(b, node);
    return helps;
}

/* What swiglu's backward does beside its own: v and db of gate_up, da of down. */
typedef struct pmli_beside {
    bool gate_up, down;
    pml_operand v_gate_up, v_down;
} pmli_beside;

/* dgate_up, and in place of dact the forward's output where somebody reads that. */
static void swiglu_bwd(pmli_builder *b, int32_t layer, int32_t dact, const pmli_saved *s,
                       pmli_rows dgate_up, const pmli_beside *beside, bool again)
{
    const pmli_linear *linear = b->layers[layer].linear;
    pml_node *node = pmli_node(b, PML_OP_swiglu_bwd, layer, "swiglu backward");
    if (node == NULL)
        return;
    pml_swiglu_bwd_args *args = &node->args.swiglu_bwd;
    const int32_t operands[] = {dact, s->gate_up, dgate_up.x, again ? dact : PMLI_ABSENT};
    for (int i = 0; i < 4; i++)
        pmli_operand(node, i, operands[i]);
    if (dgate_up.scale >= 0)
        pmli_operand(node, PML_OPERAND(swiglu_bwd, w_scale), linear[PMLI_GATE_UP].w_scale);
    pmli_operand(node, PML_OPERAND(swiglu_bwd, scale), dgate_up.scale);
    if (beside->gate_up) {
        const pmli_linear *l = &linear[PMLI_GATE_UP];
        args->lora_parts = l->lora_parts;
        args->rank = l->rank;
        for (int p = 0; p < 2; p++)
            args->lora_scale[p] = (float)l->scale[p];
        pmli_operand(node, PML_OPERAND(swiglu_bwd, u), s->u_gate_up);
        pmli_operand(node, PML_OPERAND(swiglu_bwd, b), l->b);
        node->operands[PML_OPERAND(swiglu_bwd, v)] = beside->v_gate_up;
        pmli_operand(node, PML_OPERAND(swiglu_bwd, db), l->db);
    }
    if (beside->down) {
        node->operands[PML_OPERAND(swiglu_bwd, v_down)] = beside->v_down;
        pmli_operand(node, PML_OPERAND(swiglu_bwd, da), linear[PMLI_DOWN].da);
    }
    pmli_node_done(b, node);
}

int32_t pmli_mlp_end(pmli_builder *b, int32_t layer, pmli_saved *s)
{
    bool u_made = swiglu(b, layer, s);
    int32_t down = pmli_activation(b, b->program->spec.hidden, "layer output", layer);
    pmli_linear_forward(b, layer, PMLI_DOWN, s->act, down, s->u_down, u_made);
    return down;
}

pml_operand pmli_down_backward(pmli_builder *b, int32_t layer, const pmli_saved *s, int32_t d,
                               int32_t dact)
{
    pml_operand v = place_of_v(b, layer, PMLI_DOWN, d);
    pmli_linear_backward(b, layer, PMLI_DOWN, PMLI_BEFORE_INPUT, pmli_plain(d), PMLI_ABSENT,
                         s->u_down, v, dact);
    return v;
}

pmli_dgate_up pmli_swiglu_backward(pmli_builder *b, int32_t layer, const pmli_saved *s, int32_t d,
                                   int32_t dact, pml_operand v_down, bool input_needed)
{
    const pmli_linear *linear = b->layers[layer].linear, *down = &linear[PMLI_DOWN];
    const pmli_linear *gate_up = &linear[PMLI_GATE_UP];
    pmli_beside beside = {.gate_up = b->backend->adapters_beside && gate_up->db >= 0,
                          .down = helps_down(b) && down->da >= 0,
                          .v_gate_up = {PMLI_ABSENT, 0, 0},
                          .v_down = v_down};
    pmli_dgate_up made = {.rows = pmli_plain(s->gate_up)};
    if (in_8_bits(b) && input_needed)
        made.rows = codes_for(b, layer, PMLI_GATE_UP, gate_up->outputs, 2, "d gate_up");
    if (beside.gate_up)
        beside.v_gate_up = place_of_v(b, layer, PMLI_GATE_UP, s->gate_up);
    bool again = down->dw >= 0 || (down->da >= 0 && !beside.down);
    swiglu_bwd(b, layer, dact, s, made.rows, &beside, again);
    if (again)
        pmli_linear_backward(b, layer, PMLI_DOWN, PMLI_OF_INPUT, pmli_plain(d), dact, PMLI_ABSENT,
                             v_down, PMLI_ABSENT);
    made.v = beside.v_gate_up;
    return made;
}
