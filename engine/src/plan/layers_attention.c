/* The middle of a layer's attention block: heads' norms, rope and attention, forward and backward.
 *
 *   qkv ► (head norm) ► rope ► attention ► o
 *   d o ► attention backward, which turns back what rope turned ► (head norm backward) ► dqkv   */
#include "layers.h"

/* Queries and keys of qkv, each head on its own, into qk. */
void pmli_head_norm(pmli_builder *b, int32_t layer, const pmli_saved *s)
{
    const pml_model_spec *spec = &b->program->spec;
    const pmli_layer *w = &b->layers[layer];
    pml_node *node = pmli_node(b, PML_OP_head_norm, layer, "head norm");
    if (node == NULL)
        return;
    pmli_operand_slice(node, 0, s->qkv, 0, (spec->heads + spec->kv_heads) * spec->head_dim);
    pmli_operand(node, 1, w->q_norm.w);
    pmli_operand(node, 2, w->k_norm.w);
    pmli_operand(node, 3, s->qk);
    pmli_operand(node, 4, s->rstd_qk);
    pml_head_norm_args *args = &node->args.head_norm;
    args->heads = spec->heads;
    args->kv_heads = spec->kv_heads;
    args->head_dim = spec->head_dim;
    args->eps = spec->rms_eps;
    pmli_node_done(b, node);
}

/* In place on the queries' and keys' columns of dqkv. */
static void head_norm_bwd(pmli_builder *b, int32_t layer, const pmli_saved *s, int32_t dqkv)
{
    const pml_model_spec *spec = &b->program->spec;
    const pmli_layer *w = &b->layers[layer];
    pml_node *node = pmli_node(b, PML_OP_head_norm_bwd, layer, "head norm backward");
    if (node == NULL)
        return;
    int32_t columns = (spec->heads + spec->kv_heads) * spec->head_dim;
    pmli_operand_slice(node, 0, dqkv, 0, columns);
    pmli_operand_slice(node, 1, s->qkv, 0, columns);
    pmli_operand(node, 2, w->q_norm.w);
    pmli_operand(node, 3, w->k_norm.w);
    pmli_operand(node, 4, s->rstd_qk);
    pmli_operand_slice(node, 5, dqkv, 0, columns);
    pmli_operand(node, 6, w->q_norm.dw);
    pmli_operand(node, 7, w->k_norm.dw);
    pml_head_norm_bwd_args *args = &node->args.head_norm_bwd;
    args->heads = spec->heads;
    args->kv_heads = spec->kv_heads;
    args->head_dim = spec->head_dim;
    pmli_node_done(b, node);
}

/* On the queries' and keys' columns of qkv. */
void pmli_rope(pmli_builder *b, int32_t layer, int32_t qkv)
{
    const pml_model_spec *spec = &b->program->spec;
    pml_node *node = pmli_node(b, PML_OP_rope, layer, "rope");
    if (node == NULL)
        return;
    int32_t heads = spec->heads + spec->kv_heads; /* queries and keys, side by side */
    pmli_operand_slice(node, PML_OPERAND(rope, x), qkv, 0, heads * spec->head_dim);
    pmli_operand(node, PML_OPERAND(rope, pos), b->program->positions_in);
    pmli_operand(node, PML_OPERAND(rope, table), b->program->rope);
    node->args.rope.heads = heads;
    node->args.rope.head_dim = spec->head_dim;
    pmli_node_done(b, node);
}

/* q, k and v as slices at operands index, +1, +2: v of the fused buffer qkv, q and k of qk, or of
 * qkv where qk is absent. */
static void fused_slices(const pmli_builder *b, pml_node *node, int index, int32_t qkv, int32_t qk)
{
    const pml_model_spec *spec = &b->program->spec;
    int32_t q = spec->heads * spec->head_dim, kv = spec->kv_heads * spec->head_dim;
    pmli_operand_slice(node, index, qk >= 0 ? qk : qkv, 0, q);
    pmli_operand_slice(node, index + 1, qk >= 0 ? qk : qkv, q, kv);
    pmli_operand_slice(node, index + 2, qkv, q + kv, kv);
}

/* Columns [from, from + cols) of this chunk's x join those of earlier chunks at column `to`. */
static void append(pmli_builder *b, int32_t layer, int32_t x, int32_t from, int32_t cols,
                   int32_t cache, int32_t to)
{
    pml_node *node = pmli_node(b, PML_OP_scatter_rows, layer, "append to cache");
    pmli_operand_slice(node, 0, x, from, cols);
    pmli_operand(node, 1, b->program->cache_rows);
    pmli_operand_slice(node, 2, cache, to, cols);
    pmli_node_done(b, node);
}

static float attention_scale(const pml_model_spec *spec)
{
    return (float)(1.0 / __builtin_sqrt((double)spec->head_dim));
}

void pmli_attention(pmli_builder *b, int32_t layer, const pmli_saved *s, int32_t cache)
{
    const pml_program *p = b->program;
    const pml_model_spec *spec = &p->spec;
    int32_t q = spec->heads * spec->head_dim, kv = spec->kv_heads * spec->head_dim;
    if (cache >= 0 && s->qk < 0) {
        append(b, layer, s->qkv, q, 2 * kv, cache, 0);
    } else if (cache >= 0) {
        append(b, layer, s->qk, q, kv, cache, 0);
        append(b, layer, s->qkv, q + kv, kv, cache, kv);
    }
    pml_node *node = pmli_node(b, PML_OP_attention, layer, "attention");
    if (node == NULL)
        return;
    fused_slices(b, node, 0, s->qkv, s->qk);
    if (cache >= 0) {
        pmli_operand_slice(node, 1, cache, 0, kv);
        pmli_operand_slice(node, 2, cache, kv, kv);
    }
    pmli_operand(node, 3, p->bounds);
    pmli_operand(node, 4, cache >= 0 ? p->key_bounds : p->bounds);
    pmli_operand(node, 5, s->o);
    pmli_operand(node, 6, s->lse);
    pml_attention_args *args = &node->args.attention;
    args->heads = spec->heads;
    args->kv_heads = spec->kv_heads;
    args->head_dim = spec->head_dim;
    args->window = pml_layer_window(spec, layer);
    args->scale = attention_scale(spec);
    pmli_node_done(b, node);
}

void pmli_attention_backward(pmli_builder *b, int32_t layer, const pmli_saved *s, int32_t dout,
                             int32_t dqkv)
{
    const pml_model_spec *spec = &b->program->spec;
    pml_node *node = pmli_node(b, PML_OP_attention_bwd, layer, "attention backward");
    if (node == NULL)
        return;
    pmli_operand(node, PML_OPERAND(attention_bwd, dout), dout);
    fused_slices(b, node, PML_OPERAND(attention_bwd, q), s->qkv, s->qk);
    pmli_operand(node, PML_OPERAND(attention_bwd, o), s->o);
    pmli_operand(node, PML_OPERAND(attention_bwd, lse), s->lse);
    pmli_operand(node, PML_OPERAND(attention_bwd, cu_q), b->program->bounds);
    pmli_operand(node, PML_OPERAND(attention_bwd, cu_k), b->program->bounds);
    pmli_operand(node, PML_OPERAND(attention_bwd, pos), b->program->positions_in);
    pmli_operand(node, PML_OPERAND(attention_bwd, table), b->program->rope);
    fused_slices(b, node, PML_OPERAND(attention_bwd, dq), dqkv, PMLI_ABSENT);
    pml_attention_bwd_args *args = &node->args.attention_bwd;
    args->heads = spec->heads;
    args->kv_heads = spec->kv_heads;
    args->head_dim = spec->head_dim;
    args->window = pml_layer_window(spec, layer);
    args->scale = attention_scale(spec);
    pmli_node_done(b, node);
    if (b->program->spec.qk_norm)
        head_norm_bwd(b, layer, s, dqkv);
}
