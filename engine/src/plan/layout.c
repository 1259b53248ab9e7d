/* What lies still: weights, adapters, the flat buffers of training, inputs and scalars; and which
 * rows of them each tensor of a model or adapter file is. */
#include <stdio.h>
#include <string.h>

#include "build.h"

static const char *const part_names[PMLI_LINEARS][PML_LINEAR_MAX_PARTS] = {
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    {"self_attn.o_proj", NULL, NULL},
    {"mlp.gate_proj", "mlp.up_proj", NULL},
    {"mlp.down_proj", NULL, NULL}};
static const char *const linear_names[PMLI_LINEARS] = {"qkv", "o", "gate_up", "down"};
static const int first_target_bit[PMLI_LINEARS] = {0, 3, 4, 6}; /* of pml_target */

static bool full(const pmli_builder *b)
{
    return b->config->method == PML_METHOD_FULL;
}

/* The next free place of the flat buffer. */
static int64_t reserve(pmli_builder *b, int64_t floats)
{
    int64_t at = b->program->trained_floats, align = pmli_flat_align(b->config);
    b->program->trained_floats = (at + floats + align - 1) / align * align;
    return at;
}

/* A stacked tensor in the flat buffer, as the products read it, and its gradient. */
static int32_t trained(pmli_builder *b, int64_t rows, int64_t cols, int32_t *grad, const char *name)
{
    int64_t at = reserve(b, rows * cols);
    pml_program *p = b->program;
    *grad = pmli_part(b, p->grads, at, rows, cols, "grad %s", name);
    int32_t value = pmli_part(b, p->values, at, rows, cols, "%s", name);
    if (p->rounded < 0)
        return value;
    int32_t rounded = pmli_part(b, p->rounded, at, rows, cols, "%s rounded", name);
    if (rounded >= 0)
        p->tensors[rounded].master = value;
    return rounded;
}

/* A matrix that is not trained stays as the model's folder stores it, where the backend reads that
 * as the float32 that it is: half the bytes, the same bits. */
static pml_dtype frozen_dtype(const pmli_builder *b, int64_t rows)
{
    pml_dtype stored = b->program->spec.dtype;
    bool kept = rows > 1 && b->config->dtype == PML_F32 && (b->backend->frozen >> stored & 1) != 0;
    return kept ? stored : b->config->dtype;
}

/* A weight of the model: trained in full fine-tuning and where an adapter holds it whole, else
 * frozen. */
static int32_t weight(pmli_builder *b, int64_t rows, int64_t cols, bool saved, int32_t *grad,
                      const char *name)
{
    if (full(b) || saved)
        return trained(b, rows, cols, grad, name);
    *grad = PMLI_ABSENT;
    return pmli_persistent(b, pmli_fixed(frozen_dtype(b, rows), rows, cols), PML_CAUSE_WEIGHTS,
                           "%s", name);
}

/* Rows [row, row + rows) of `tensor` are the file's tensor of that name. Returns NULL after a
 * failure. */
static pml_parameter *name_rows(pmli_builder *b, int32_t tensor, int64_t row, int64_t rows,
                                int rank, bool decay, const char *name)
{
    pml_parameter *parameter = pmli_parameter(b, "%s", name);
    if (parameter == NULL)
        return NULL;
    if (b->program->tensors[tensor].master >= 0) /* files speak of what is trained */
        tensor = b->program->tensors[tensor].master;
    const pml_tensor *t = &b->program->tensors[tensor];
    parameter->tensor = tensor;
    parameter->row = rank == 1 ? 0 : row;
    parameter->rows = rank == 1 ? 1 : rows;
    parameter->cols = rank == 1 ? rows : t->cols;
    parameter->rank = rank;
    parameter->trained = t->parent >= 0 && t->parent == b->program->values;
    parameter->adapter = parameter->trained && !full(b);
    parameter->decay = decay;
    parameter->at = parameter->trained ? t->at + (rank == 1 ? row : row * t->cols) : 0;
    parameter->col = rank == 1 ? row : 0;
    return parameter;
}

static bool saved(const pmli_builder *b, pml_saved which)
{
    return !full(b) && (b->config->lora_saved & (uint32_t)which) != 0;
}

/* A whole tensor of the model file, which may be part of the adapter's file instead; source: where
 * its first value is, if not under its own name. */
static void name_whole(pmli_builder *b, int32_t tensor, int rank, const char *name,
                       const char *source)
{
    if (tensor < 0)
        return;
    int32_t master = b->program->tensors[tensor].master;
    const pml_tensor t = b->program->tensors[master >= 0 ? master : tensor];
    bool adapter = !full(b) && t.parent >= 0 && t.parent == b->program->values;
    char full_name[112];
    pmli_name(b, full_name, sizeof full_name, "%s%s", adapter ? "base_model.model." : "", name);
    pml_parameter *p =
        name_rows(b, tensor, 0, rank == 1 ? t.cols : t.rows, rank, rank == 2, full_name);
    if (p != NULL && adapter)
        snprintf(p->source, sizeof p->source, "%s", source);
}

static void describe_linear(const pmli_builder *b, int l, int which, pmli_linear *linear)
{
    const pml_model_spec *spec = &b->program->spec;
    int32_t q = spec->heads * spec->head_dim, kv = spec->kv_heads * spec->head_dim;
    const pmli_linear shapes[PMLI_LINEARS] = {
        {.inputs = spec->hidden, .parts = 3, .part_cols = {q, kv, kv}},
        {.inputs = q, .parts = 1, .part_cols = {spec->hidden}},
        {.inputs = spec->hidden, .parts = 2, .part_cols = {spec->intermediate, spec->intermediate}},
        {.inputs = spec->intermediate, .parts = 1, .part_cols = {spec->hidden}}};
    *linear = shapes[which];
    for (int p = 0; p < linear->parts; p++) {
        linear->outputs += linear->part_cols[p];
        pml_target target = (pml_target)(1U << (first_target_bit[which] + p));
        pml_lora_module module = pml_lora_of(b->config, l, target);
        if (module.rank == 0)
            continue;
        linear->lora_parts |= 1U << p;
        linear->lora_blocks++;
        linear->part_rank[p] = module.rank;
        linear->scale[p] = pml_lora_scale(module.alpha, module.rank, b->config->lora_rslora);
        linear->rank = module.rank > linear->rank ? module.rank : linear->rank;
    }
    int32_t unit = b->backend->border, used = linear->lora_blocks * linear->rank;
    if (unit > 0 && b->config->quant == PML_QUANT_FP8) {
        unit *= 2; /* as many bytes */
        linear->code_border = (PML_FP8_COLUMNS * used + unit - 1) / unit * unit;
    } else if (unit > 0) {
        linear->border = (used + unit - 1) / unit * unit;
    }
    linear->w = linear->w_scale = linear->turned = linear->bias = linear->a = linear->b =
        linear->unpacked = PMLI_ABSENT;
    for (int k = 0; k < PML_NF4_TENSORS; k++)
        linear->nf4[k] = PMLI_ABSENT;
    linear->dw = linear->dbias = linear->da = linear->db = PMLI_ABSENT;
}

static void nf4_lengths(int64_t n, int64_t lengths[PML_NF4_TENSORS])
{
    const int64_t all[PML_NF4_TENSORS] = {pml_nf4_codes(n), pml_nf4_blocks(n), pml_nf4_nested(n),
                                          1};
    memcpy(lengths, all, sizeof all);
}

static size_t aligned(size_t bytes)
{
    return (bytes + PMLI_ALIGN - 1) / PMLI_ALIGN * PMLI_ALIGN;
}

size_t pml_nf4_stage(int64_t n, size_t at[PML_NF4_TENSORS])
{
    size_t end = aligned((size_t)n * sizeof(float));
    int64_t lengths[PML_NF4_TENSORS];
    nf4_lengths(n, lengths);
    for (int k = 0; k < PML_NF4_TENSORS; k++) {
        at[k] = end;
        end += aligned((size_t)lengths[k] * (k < PML_NF4_SCALES ? 1 : sizeof(float)));
    }
    return end;
}

/* Room to quantise a weight in while the model is loaded: float32 at the widest, its codes and
 * scales where they have no other place, and workspace. */
static void room_to_load(pmli_builder *b, pml_op op, int64_t rows, int64_t cols, bool staged)
{
    pml_program *p = b->program;
    size_t at[PML_NF4_TENSORS];
    pml_op_args args = {0}; /* x is the first operand of either op that quantises */
    pml_op_views(&args)[0] = pml_matrix((void *)(uintptr_t)PMLI_ALIGN, rows, cols, PML_F32);
    size_t bytes =
        staged ? pml_nf4_stage(rows * cols, at) : aligned((size_t)(rows * cols) * sizeof(float));
    bytes += b->backend->workspace(NULL, op, &args);
    if (p->loading < 0)
        p->loading =
            pmli_transient(b, pmli_fixed(PML_U8, 1, 0), PML_CAUSE_WORKSPACE, "weight to quantise");
    if (p->loading >= 0 && (int64_t)bytes > p->tensors[p->loading].cols)
        p->tensors[p->loading].cols = (int64_t)bytes;
}

/* The four tensors of a quantised stack, and each file's tensor's share of them. */
static void lay_nf4(pmli_builder *b, int l, int which, pmli_linear *linear)
{
    static const char *const names[PML_NF4_TENSORS] = {"codes", "absmax", "scales", "offset"};
    int64_t length[PML_NF4_TENSORS] = {0}, at[PML_NF4_TENSORS] = {0};
    int64_t share[PML_LINEAR_MAX_PARTS][PML_NF4_TENSORS];
    for (int p = 0; p < linear->parts; p++) {
        nf4_lengths((int64_t)linear->part_cols[p] * linear->inputs, share[p]);
        for (int k = 0; k < PML_NF4_TENSORS; k++)
            length[k] += share[p][k];
    }
    for (int k = 0; k < PML_NF4_TENSORS; k++)
        linear->nf4[k] =
            pmli_persistent(b, pmli_fixed(k < PML_NF4_SCALES ? PML_U8 : PML_F32, 1, length[k]),
                            PML_CAUSE_WEIGHTS, "layers.%d.%s.%s", l, linear_names[which], names[k]);
    for (int p = 0; p < linear->parts; p++) {
        pml_parameter *parameter =
            pmli_parameter(b, "model.layers.%d.%s.weight", l, part_names[which][p]);
        if (parameter == NULL)
            return;
        room_to_load(b, PML_OP_nf4_quantise, linear->part_cols[p], linear->inputs, false);
        parameter->rows = linear->part_cols[p];
        parameter->cols = linear->inputs;
        parameter->rank = 2;
        parameter->nf4 = true;
        for (int k = 0; k < PML_NF4_TENSORS; k++) {
            parameter->nf4_parts[k] =
                pmli_part(b, linear->nf4[k], at[k], 1, share[p][k], "layers.%d.%s.%s", l,
                          part_names[which][p], names[k]);
            at[k] += share[p][k];
        }
    }
}

/* Which weights of what is quantised are there as their products read them, in memory that is left:
 * NF4's numbers in place of its codes, 8-bit codes also turned round. First those of all layers
 * that gain most a byte: short kernels are furthest from the memory's speed, and o and qkv are
 * unpacked once more where a layer is made again. */
static bool unpacked_for_good(const pmli_builder *b, int l, int which)
{
    static const int turn[PMLI_LINEARS] = {
        [PMLI_O] = 0, [PMLI_QKV] = 1, [PMLI_DOWN] = 2, [PMLI_GATE_UP] = 3};
    return turn[which] * b->program->spec.layers + l < b->program->choices.unpacked;
}

/* Whether a gradient goes through it, to something trained before it: else there is no dx to turn
 * it round for. Where anything is saved whole (norms, embeddings) one is taken to. */
static bool passes_gradient(const pmli_builder *b, int l, int which)
{
    bool before = b->config->lora_saved != 0;
    for (int k = 0; k <= l && !before; k++)
        for (int w = 0; w < PMLI_LINEARS && !before && (k < l || w < which); w++)
            before = b->layers[k].linear[w].lora_parts != 0;
    return before;
}

/* A stack in 8 bits and its rows' scales; and turned round, its parts side by side. */
static void lay_fp8(pmli_builder *b, int l, int which, pmli_linear *linear)
{
    char name[112];
    if (unpacked_for_good(b, l, which) && passes_gradient(b, l, which)) {
        linear->turned =
            pmli_persistent(b, pmli_fixed(PML_U8, linear->inputs, linear->outputs),
                            PML_CAUSE_WEIGHTS, "layers.%d.%s.turned", l, linear_names[which]);
        pmli_border(b, linear->turned, linear->code_border, 0);
    }
    linear->w = pmli_persistent(b, pmli_fixed(PML_U8, linear->outputs, linear->inputs),
                                PML_CAUSE_WEIGHTS, "layers.%d.%s.codes", l, linear_names[which]);
    pmli_border(b, linear->w, linear->code_border, 0);
    linear->w_scale = pmli_persistent(b, pmli_fixed(PML_F32, 1, linear->outputs), PML_CAUSE_WEIGHTS,
                                      "layers.%d.%s.scales", l, linear_names[which]);
    for (int p = 0, row = 0; p < linear->parts; row += linear->part_cols[p], p++) {
        if (b->status == PML_OK && (linear->part_cols[p] | linear->inputs) % PML_FP8_UNIT != 0)
            b->status =
                PML_FAIL(b->err, PML_UNSUPPORTED,
                         "quant=\"fp8\": %s of this model is %d x %d, 8-bit products come "
                         "in units of %d; use quant=\"nf4\"",
                         part_names[which][p], linear->part_cols[p], linear->inputs, PML_FP8_UNIT);
        pmli_name(b, name, sizeof name, "model.layers.%d.%s.weight", l, part_names[which][p]);
        pml_parameter *parameter =
            name_rows(b, linear->w, row, linear->part_cols[p], 2, true, name);
        if (parameter == NULL)
            return;
        room_to_load(b, PML_OP_fp8_quantise, linear->part_cols[p], linear->inputs, false);
        parameter->fp8 = true;
        parameter->fp8_turned = linear->turned;
        parameter->fp8_scale = pmli_part(b, linear->w_scale, row, 1, linear->part_cols[p],
                                         "layers.%d.%s.scales", l, part_names[which][p]);
    }
}

static void lay_weight(pmli_builder *b, int l, int which, pmli_linear *linear)
{
    char name[112];
    bool nf4 = b->config->quant == PML_QUANT_NF4;
    if (b->config->quant == PML_QUANT_FP8) {
        lay_fp8(b, l, which, linear);
        return;
    }
    if (nf4 && !unpacked_for_good(b, l, which)) {
        lay_nf4(b, l, which, linear);
        return;
    }
    pmli_name(b, name, sizeof name, "layers.%d.%s.weight", l, linear_names[which]);
    linear->w =
        nf4 ? pmli_persistent(b, pmli_fixed(b->config->dtype, linear->outputs, linear->inputs),
                              PML_CAUSE_WEIGHTS, "%s", name)
            : weight(b, linear->outputs, linear->inputs, false, &linear->dw, name);
    pmli_border(b, linear->w, linear->border, linear->border);
    for (int p = 0, row = 0; p < linear->parts; row += linear->part_cols[p], p++) {
        pmli_name(b, name, sizeof name, "model.layers.%d.%s.weight", l, part_names[which][p]);
        pml_parameter *parameter =
            name_rows(b, linear->w, row, linear->part_cols[p], 2, true, name);
        if (!nf4 || parameter == NULL)
            continue;
        room_to_load(b, PML_OP_nf4_quantise, parameter->rows, parameter->cols, true);
        parameter->nf4 = true;
        for (int k = 0; k < PML_NF4_TENSORS; k++)
            parameter->nf4_parts[k] = PMLI_ABSENT;
    }
}

static void lay_bias(pmli_builder *b, int l, int which, pmli_linear *linear)
{
    const pml_model_spec *spec = &b->program->spec;
    bool given =
        which == PMLI_QKV ? spec->qkv_bias : (which == PMLI_O ? spec->o_bias : spec->mlp_bias);
    if (!given)
        return;
    char name[112];
    pmli_name(b, name, sizeof name, "layers.%d.%s.bias", l, linear_names[which]);
    linear->bias = weight(b, 1, linear->outputs, false, &linear->dbias, name);
    for (int p = 0, at = 0; p < linear->parts; at += linear->part_cols[p], p++) {
        pmli_name(b, name, sizeof name, "model.layers.%d.%s.bias", l, part_names[which][p]);
        name_rows(b, linear->bias, at, linear->part_cols[p], 1, false, name);
    }
}

/* Of norms and the table of embeddings the ops read the float32 that is trained, not its rounding:
 * that stands still for many steps, for weights near 1 above all, and then jumps at once. */
static int32_t unrounded(const pmli_builder *b, int32_t tensor)
{
    int32_t master = tensor >= 0 ? b->program->tensors[tensor].master : PMLI_ABSENT;
    return master >= 0 ? master : tensor;
}

/* wide_x: what the norm reads is in float32, and so is its weight, frozen or not. */
static void lay_norm(pmli_builder *b, pmli_norm *norm, int64_t width, bool wide_x, pml_saved which,
                     const char *name)
{
    char file_name[80];
    norm->w = unrounded(b, weight(b, 1, width, saved(b, which), &norm->dw, name));
    if (wide_x && norm->w >= 0)
        b->program->tensors[norm->w].dtype = PML_F32;
    pmli_name(b, file_name, sizeof file_name, "model.%s", name);
    name_whole(b, norm->w, 1, file_name, file_name);
}

/* What a layer has without weight decay: norms and biases. */
static void lay_vectors(pmli_builder *b, int l)
{
    const pml_model_spec *spec = &b->program->spec;
    pmli_layer *layer = &b->layers[l];
    const bool wide_x = l == 0 && pmli_begins_wide(b);
    char name[64];
    pmli_name(b, name, sizeof name, "layers.%d.input_layernorm.weight", l);
    lay_norm(b, &layer->input_norm, spec->hidden, wide_x, PML_SAVED_INPUT_NORM, name);
    for (int which = 0; which < PMLI_LINEARS; which++)
        lay_bias(b, l, which, &layer->linear[which]);
    layer->q_norm = layer->k_norm = (pmli_norm){PMLI_ABSENT, PMLI_ABSENT};
    if (spec->qk_norm) {
        pmli_name(b, name, sizeof name, "layers.%d.self_attn.q_norm.weight", l);
        lay_norm(b, &layer->q_norm, spec->head_dim, false, PML_SAVED_Q_NORM, name);
        pmli_name(b, name, sizeof name, "layers.%d.self_attn.k_norm.weight", l);
        lay_norm(b, &layer->k_norm, spec->head_dim, false, PML_SAVED_K_NORM, name);
    }
    pmli_name(b, name, sizeof name, "layers.%d.post_attention_layernorm.weight", l);
    lay_norm(b, &layer->post_norm, spec->hidden, wide_x, PML_SAVED_POST_NORM, name);
}

/* A blocks and B blocks of the parts that have an adapter, stacked as pml_linear_args says. */
static void lay_adapter(pmli_builder *b, int l, int which, pmli_linear *linear)
{
    if (linear->lora_blocks == 0)
        return;
    int32_t rank = linear->rank, b_rows = 0;
    for (int p = 0; p < linear->parts; p++)
        b_rows += (linear->lora_parts >> p & 1) ? linear->part_cols[p] : 0;
    char name[112];
    pmli_name(b, name, sizeof name, "layers.%d.%s.lora_A", l, linear_names[which]);
    linear->a = trained(b, (int64_t)rank * linear->lora_blocks, linear->inputs, &linear->da, name);
    pmli_name(b, name, sizeof name, "layers.%d.%s.lora_B", l, linear_names[which]);
    linear->b = trained(b, b_rows, rank, &linear->db, name);
    for (int side = 0; side < 2; side++)
        for (int p = 0, row = 0; p < linear->parts; p++) {
            if (!(linear->lora_parts >> p & 1))
                continue;
            int32_t own = linear->part_rank[p];
            pmli_name(b, name, sizeof name, "base_model.model.model.layers.%d.%s.lora_%c.weight", l,
                      part_names[which][p], "AB"[side]);
            pml_parameter *parameter =
                side == 0 ? name_rows(b, linear->a, row, own, 2, true, name)
                          : name_rows(b, linear->b, row, linear->part_cols[p], 2, true, name);
            if (parameter != NULL && side == 1)
                parameter->cols = own;
            row += side == 0 ? rank : linear->part_cols[p];
        }
}

/* The head, which may be the table of embeddings; not where an adapter holds one of them. */
static void lay_head(pmli_builder *b)
{
    static const char table[] = "model.embed_tokens.weight", own[] = "lm_head.weight";
    const pml_model_spec *spec = &b->program->spec;
    bool apart = saved(b, PML_SAVED_HEAD) || (spec->tied_head && saved(b, PML_SAVED_EMBED));
    b->head = b->embed;
    b->dhead = b->dembed;
    if (spec->tied_head && !apart)
        return;
    b->head = weight(b, spec->vocab, spec->hidden, saved(b, PML_SAVED_HEAD), &b->dhead, "lm_head");
    const char *source = spec->tied_head ? table : own;
    name_whole(b, b->head, 2, saved(b, PML_SAVED_HEAD) ? own : source, source);
}

/* Matrices first, then what has no weight decay, as transformers' Trainer groups them. */
static void lay_model(pmli_builder *b)
{
    const pml_model_spec *spec = &b->program->spec;
    static const char table[] = "model.embed_tokens.weight";
    if (!spec->qk_norm && (saved(b, PML_SAVED_Q_NORM) || saved(b, PML_SAVED_K_NORM))) {
        b->status = PML_FAIL(b->err, PML_INVALID,
                             "modules_to_save: a %s model has no q_norm and k_norm", spec->family);
        return;
    }
    if (saved(b, PML_SAVED_Q_NORM) != saved(b, PML_SAVED_K_NORM)) {
        b->status = PML_FAIL(b->err, PML_UNSUPPORTED,
                             "modules_to_save: q_norm and k_norm are trained together in this "
                             "version; name both, or neither");
        return;
    }
    b->embed = weight(b, spec->vocab, spec->hidden, saved(b, PML_SAVED_EMBED), &b->dembed, "embed");
    b->table = unrounded(b, b->embed);
    name_whole(b, b->embed, 2, table, table);
    for (int l = 0; l < spec->layers; l++)
        for (int which = 0; which < PMLI_LINEARS; which++) {
            describe_linear(b, l, which, &b->layers[l].linear[which]);
            lay_weight(b, l, which, &b->layers[l].linear[which]);
            lay_adapter(b, l, which, &b->layers[l].linear[which]);
        }
    lay_head(b);
    b->program->decay_floats = b->program->trained_floats;
    for (int l = 0; l < spec->layers; l++)
        lay_vectors(b, l);
    lay_norm(b, &b->final_norm, spec->hidden, false, PML_SAVED_NORM, "norm.weight");
}

/* Side by side, as pml_told has them, so that one read has all of a step. */
static void lay_told(pmli_builder *b, pml_cause cause)
{
    pml_program *p = b->program;
    p->told = pmli_persistent(b, pmli_fixed(PML_F64, 1, sizeof(pml_told) / sizeof(double)), cause,
                              "told of a step");
    p->loss_sum = pmli_part(b, p->told, 0, 1, 1, "loss sum");
    p->norm =
        pmli_part(b, p->told, offsetof(pml_told, norm) / sizeof(float), 1, 1, "gradient norm");
    if (p->norm >= 0)
        p->tensors[p->norm].dtype = PML_F32;
}

static void lay_inputs(pmli_builder *b)
{
    pml_program *p = b->program;
    const pml_batch_limits *limits = &p->limits;
    pmli_shape tokens = {PML_I32, PML_EXTENT_FIXED, 1, PML_EXTENT_TOKENS, limits->tokens};
    int64_t slots = 2 * (int64_t)p->generate_rows; /* a sampled row, and the gap behind it */
    slots = slots > limits->docs ? slots : limits->docs;
    pmli_shape bounds = {PML_I32, PML_EXTENT_FIXED, 1, PML_EXTENT_BOUNDS, slots + 1};
    pmli_shape labels = {PML_I32, PML_EXTENT_FIXED, 1, PML_EXTENT_LABELS, limits->labels};
    pml_cause cause = PML_CAUSE_ACTIVATIONS;
    p->ids = pmli_persistent(b, tokens, cause, "ids");
    p->positions_in = pmli_persistent(b, tokens, cause, "positions");
    p->bounds = pmli_persistent(b, bounds, cause, "document bounds");
    p->key_bounds = pmli_persistent(b, bounds, cause, "cache bounds");
    pmli_shape chunk = {PML_I32, PML_EXTENT_FIXED, 1, PML_EXTENT_TOKENS, p->generate_chunk + 1};
    p->cache_rows = pmli_persistent(b, chunk, cause, "cache rows");
    pmli_shape places = tokens;
    places.dtype = PML_I64;
    p->places = !full(b) && b->config->lora_dropout > 0
                    ? pmli_persistent(b, places, cause, "places")
                    : PMLI_ABSENT;
    p->label_rows = pmli_persistent(b, labels, cause, "label rows");
    p->labels = pmli_persistent(b, labels, cause, "labels");
    pmli_shape rows = {PML_I32, PML_EXTENT_FIXED, 1, PML_EXTENT_LABELS, p->generate_rows};
    p->last_row = pmli_persistent(b, rows, cause, "last rows");
    lay_told(b, cause);
    p->eval_sum = pmli_persistent(b, pmli_fixed(PML_F64, 1, 1), cause, "evaluation loss sum");
    p->rope = pmli_persistent(b, pmli_fixed(PML_F32, p->positions, p->spec.head_dim),
                              PML_CAUSE_WEIGHTS, "rope table");
    cause = PML_CAUSE_OPTIMIZER;
    p->rng = pmli_persistent(b, pmli_fixed(PML_I64, 1, 2), cause, "seed and step");
    p->hyper = pmli_persistent(b, pmli_fixed(PML_F32, 2, PML_HYPER_COUNT), cause, "hyper");
    p->sumsq = pmli_persistent(b, pmli_fixed(PML_F64, 1, 1), cause, "sum of squares");
    p->loss_scale = pmli_persistent(b, pmli_fixed(PML_F32, 1, 1), cause, "loss scale");
    p->logits = PMLI_ABSENT;
}

void pmli_layout(pmli_builder *b)
{
    pml_program *p = b->program;
    pml_cause cause = full(b) ? PML_CAUSE_WEIGHTS : PML_CAUSE_ADAPTERS;
    pmli_shape flat = pmli_fixed(PML_F32, 1, 0); /* length known at the end */
    p->values = pmli_persistent(b, flat, cause, full(b) ? "parameters" : "adapter");
    p->grads = pmli_persistent(b, flat, PML_CAUSE_GRADIENTS, "gradients");
    p->loading = PMLI_ABSENT;
    flat.dtype = b->config->dtype;
    p->rounded = flat.dtype == PML_F32 ? PMLI_ABSENT : pmli_persistent(b, flat, cause, "rounded");
    lay_model(b);
    lay_inputs(b);
    if (b->status != PML_OK)
        return;
    const int32_t buffers[] = {p->values, p->grads, p->rounded};
    for (int i = 0; i < 3; i++)
        if (buffers[i] >= 0)
            p->tensors[buffers[i]].cols = p->trained_floats;
    pmli_lay_moments(b);
    if (b->status == PML_OK && p->trained_floats == 0)
        b->status = PML_FAIL(b->err, PML_INVALID, "nothing to train: lora_targets is empty");
}
