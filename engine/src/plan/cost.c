/* What an op costs: floating-point operations, and bytes that must cross to or from memory when
 * nothing stays in a cache between ops. Used to choose between plans and to teach; never as a
 * measurement. */
#include "pml/plan/program.h"

static pml_cost cost_of(double flops, double bytes)
{
    return (pml_cost){.flops = flops, .bytes = bytes};
}

static double elements(pml_view v)
{
    return v.data == NULL ? 0 : (double)v.rows * (double)v.cols;
}

static double size(pml_view v)
{
    return elements(v) * (double)pml_dtype_size(v.dtype);
}

/* What is either read or written, though it may be either. */
static double one_way_bytes(pml_op op, const pml_op_args *args)
{
    return op == PML_OP_linear       ? size(args->linear.u)
           : op == PML_OP_linear_bwd ? size(args->linear_bwd.v)
                                     : 0;
}

/* Every operand once, updated ones twice, workspace not at all. */
static double operand_bytes(pml_op op, pml_op_args *args)
{
    const pml_op_info *info = pml_op_describe(op);
    const pml_view *views = pml_op_views(args);
    double sum = 0;
    for (int i = 0; i < info->n_views; i++) {
        char kind = info->signature[i] | 0x20; /* lower case */
        sum += kind == 'w' ? 0 : size(views[i]) * (kind == 'u' ? 2 : 1);
    }
    return sum - one_way_bytes(op, args);
}

/* As if every document were max_q long: a bound when they are shorter. */
static double visible_pairs(pml_view q, pml_view k, int32_t max_q, int32_t window)
{
    double nq = (double)q.rows, nk = (double)k.rows;
    double pairs = nk > nq ? nq * nk - nq * nq / 2 : nq * max_q / 2.0;
    return window > 0 && nq * window < pairs ? nq * window : pairs;
}

/* Rows that the adapter's B blocks add to. */
static double adapter_columns(const int32_t *part_cols, int32_t parts, uint32_t lora_parts)
{
    double sum = 0;
    for (int p = 0; p < parts; p++)
        sum += (lora_parts >> p & 1) ? part_cols[p] : 0;
    return sum;
}

static double linear_flops(const pml_linear_args *a)
{
    double tokens = (double)a->x.rows, k = (double)a->x.cols, n = (double)a->y.cols;
    double columns = adapter_columns(a->part_cols, a->parts, a->lora_parts);
    return 2 * tokens * (n * k + (a->u_made ? 0 : elements(a->a)) + columns * a->rank);
}

static double linear_bwd_flops(const pml_linear_bwd_args *a)
{
    double tokens = (double)a->dy.rows, n = (double)a->dy.cols;
    bool codes = a->w_scale.data != NULL; /* turned round */
    double k = (double)(a->x.data != NULL ? a->x.cols : codes ? a->w.rows : a->w.cols);
    double columns = adapter_columns(a->part_cols, a->parts, a->lora_parts);
    double dx = a->dx.data != NULL, dw = a->dw.data != NULL, da = a->da.data != NULL;
    double db = a->db.data != NULL, products = dx + dw;
    double v = (a->kept & PML_V_MADE) == 0 && (dx > 0 || da > 0 || a->v.data != NULL);
    double low_rank = columns * a->rank * (v + db) + elements(a->a) * (dx + da);
    return 2 * tokens * (products * n * k + low_rank);
}

/* The frozen product, where both its factors have 8 bits. */
static double in_8_bits(const pml_view *w_scale, const pml_view *made, const pml_view *of)
{
    return w_scale->data == NULL ? 0
                                 : 2 * (double)made->rows * (double)made->cols * (double)of->cols;
}

double pml_beside_flops(pml_op op, const pml_op_args *args)
{
    if (op == PML_OP_swiglu)
        return 2 * elements(args->swiglu.u) * (double)args->swiglu.h.cols;
    if (op != PML_OP_swiglu_bwd)
        return 0;
    const pml_swiglu_bwd_args *a = &args->swiglu_bwd;
    double inner = (double)a->dh.cols;
    return 2 * inner * (elements(a->v) + elements(a->u) + elements(a->v_down));
}

static pml_cost head_cost(const pml_head_loss_args *a, double bytes)
{
    double labels = (double)a->rows.cols,
           products = 1 + (a->dx.data != NULL) + (a->dw.data != NULL);
    double chunks = (labels + a->chunk - 1) / a->chunk;
    chunks = chunks < 1 ? 1 : (double)(int64_t)chunks;
    double again = (chunks - 1) * size(a->w) + chunks * size(a->w) * (a->dx.data != NULL);
    again += (chunks - 1) * 2 * size(a->dw);
    pml_cost cost = cost_of(2 * labels * elements(a->w) * products, bytes + again);
    cost.laid = chunks * elements(a->w) * (1 + (a->dx.data != NULL));
    return cost;
}

pml_cost pml_node_cost(pml_op op, pml_op_args *args)
{
    double bytes = operand_bytes(op, args);
    switch (op) {
    case PML_OP_embed: /* only the rows looked up are read */
        return cost_of(0, bytes - size(args->embed.table) + size(args->embed.y));
    case PML_OP_embed_bwd:
        return cost_of(elements(args->embed_bwd.dy),
                       bytes - 2 * size(args->embed_bwd.dtable) +
                           2 * sizeof(float) * elements(args->embed_bwd.dy));
    case PML_OP_gather_rows:
        return cost_of(0, bytes - size(args->gather_rows.x) + size(args->gather_rows.y));
    case PML_OP_scatter_rows:
        return cost_of(0, bytes - 2 * size(args->scatter_rows.y) + size(args->scatter_rows.x));
    case PML_OP_rmsnorm:
        return cost_of(4 * elements(args->rmsnorm.y), bytes);
    case PML_OP_rmsnorm_bwd:
        return cost_of(9 * elements(args->rmsnorm_bwd.dx), bytes);
    case PML_OP_head_norm:
        return cost_of(4 * elements(args->head_norm.y), bytes);
    case PML_OP_head_norm_bwd:
        return cost_of(9 * elements(args->head_norm_bwd.dx), bytes);
    case PML_OP_linear:
        return (pml_cost){.flops = linear_flops(&args->linear),
                          .bytes = bytes,
                          .narrow =
                              in_8_bits(&args->linear.w_scale, &args->linear.y, &args->linear.x),
                          .laid = elements(args->linear.w)};
    case PML_OP_linear_bwd:
        return (pml_cost){
            .flops = linear_bwd_flops(&args->linear_bwd),
            .bytes = bytes,
            .narrow =
                in_8_bits(&args->linear_bwd.w_scale, &args->linear_bwd.dx, &args->linear_bwd.dy),
            .laid = args->linear_bwd.dx.data != NULL ? elements(args->linear_bwd.w) : 0};
    case PML_OP_rope:
        return cost_of(3 * elements(args->rope.x), bytes);
    case PML_OP_attention: {
        const pml_attention_args *a = &args->attention;
        return cost_of(4 * visible_pairs(a->q, a->k, a->max_q, a->window) * (double)a->q.cols,
                       bytes);
    }
    case PML_OP_attention_bwd: { /* five products where the forward has two; and rope's turn */
        const pml_attention_bwd_args *a = &args->attention_bwd;
        double turned = a->pos.data != NULL ? elements(a->dq) + elements(a->dk) : 0;
        return cost_of(10 * visible_pairs(a->q, a->k, a->max_q, a->window) * (double)a->q.cols +
                           3 * turned,
                       bytes);
    }
    case PML_OP_swiglu:
        return cost_of(5 * elements(args->swiglu.h) + pml_beside_flops(op, args), bytes);
    case PML_OP_swiglu_bwd:
        return cost_of(10 * elements(args->swiglu_bwd.dh) + pml_beside_flops(op, args), bytes);
    case PML_OP_head_loss:
        return head_cost(&args->head_loss, bytes);
    case PML_OP_sum:
        return cost_of(elements(args->sum.x), bytes);
    case PML_OP_sumsq:
        return cost_of(2 * elements(args->sumsq.x), bytes);
    case PML_OP_adamw:
        return cost_of(14 * elements(args->adamw.p), bytes);
    case PML_OP_adamw_8bit:
        return cost_of(40 * elements(args->adamw_8bit.p), bytes);
    case PML_OP_sgd:
        return cost_of(7 * elements(args->sgd.p), bytes);
    case PML_OP_nf4_quantise:
        return cost_of(6 * elements(args->nf4_quantise.x), bytes);
    case PML_OP_fp8_quantise:
        return cost_of(3 * elements(args->fp8_quantise.x), bytes);
    case PML_OP_fp8_turn:
        return cost_of(0, bytes);
    case PML_OP_nf4_dequantise:
        return cost_of(elements(args->nf4_dequantise.y), bytes);
    case PML_OP_offload: /* over the link once; its other side is no bottleneck */
        return cost_of(0, size(args->offload.x));
    case PML_OP_fetch:
        return cost_of(0, size(args->fetch.x));
    case PML_OP_await:
        return cost_of(0, 0);
    case PML_OP_fill:
    case PML_OP_copy:
    case PML_OP_clip_scale:
    case PML_OP_allreduce:
    case PML_OP_COUNT:
        break;
    }
    return cost_of(0, bytes);
}
