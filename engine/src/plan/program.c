/* The program's tables: growing them while building, and binding nodes to live sizes. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "build.h"

static const char *const segment_names[PML_SEGMENT_COUNT] = {"micro", "norm", "update",
                                                             "clear", "eval", "generate"};

const char *pml_segment_name(pml_segment segment)
{
    return (unsigned)segment < PML_SEGMENT_COUNT ? segment_names[segment] : "?";
}

/* Room for one more element; doubles, so that building is linear. */
static void *grown(pmli_builder *b, void *table, int32_t count, int32_t *capacity, size_t size)
{
    if (count < *capacity)
        return table;
    int32_t wanted = *capacity == 0 ? 64 : *capacity * 2;
    void *larger = realloc(table, (size_t)wanted * size);
    if (larger == NULL) {
        b->status = PML_FAIL(b->err, PML_NO_MEMORY, "no host memory for the step program");
        return table;
    }
    *capacity = wanted;
    return larger;
}

/* No more room than there are elements. */
static void *fitted(void *table, int32_t count, size_t size)
{
    void *smaller = count > 0 ? realloc(table, (size_t)count * size) : NULL;
    return smaller != NULL ? smaller : table;
}

static void fit_tables(pml_program *p)
{
    p->tensors = fitted(p->tensors, p->n_tensors, sizeof *p->tensors);
    p->nodes = fitted(p->nodes, p->n_nodes, sizeof *p->nodes);
    p->parameters = fitted(p->parameters, p->n_parameters, sizeof *p->parameters);
}

/* The tables of a program that nobody wants any more, as large as they are. */
static void take_tables(pmli_builder *b, pml_program **spare)
{
    pml_program *from = *spare, *p = b->program;
    if (from == NULL)
        return;
    p->tensors = from->tensors;
    p->nodes = from->nodes;
    p->parameters = from->parameters;
    b->tensor_capacity = from->n_tensors;
    b->node_capacity = from->n_nodes;
    b->parameter_capacity = from->n_parameters;
    from->tensors = NULL;
    from->nodes = NULL;
    from->parameters = NULL;
    pml_program_destroy(spare);
}

size_t pml_program_bytes(const pml_program *p)
{
    return sizeof *p + (size_t)p->n_tensors * sizeof *p->tensors +
           (size_t)p->n_nodes * sizeof *p->nodes + (size_t)p->n_parameters * sizeof *p->parameters;
}

static void name(const pmli_builder *b, char *to, size_t size, const char *format, va_list args)
{
    if (!b->nameless)
        vsnprintf(to, size, format, args);
}

/* Of the caller's "..." after `format`. */
#define NAME(b, to, format)                                                                        \
    do {                                                                                           \
        va_list args;                                                                              \
        va_start(args, format);                                                                    \
        name(b, to, sizeof(to), format, args);                                                     \
        va_end(args);                                                                              \
    } while (0)

void pmli_name(const pmli_builder *b, char *to, size_t size, const char *format, ...)
{
    va_list args;
    to[0] = '\0';
    va_start(args, format);
    name(b, to, size, format, args);
    va_end(args);
}

static int32_t new_tensor(pmli_builder *b, pmli_shape shape, pml_cause cause)
{
    pml_program *p = b->program;
    if (b->status == PML_OK)
        p->tensors = grown(b, p->tensors, p->n_tensors, &b->tensor_capacity, sizeof *p->tensors);
    if (b->status != PML_OK)
        return PMLI_ABSENT;
    pml_tensor *t = &p->tensors[p->n_tensors];
    *t = (pml_tensor){.dtype = shape.dtype,
                      .row_extent = shape.row_extent,
                      .rows = shape.rows,
                      .col_extent = shape.col_extent,
                      .cols = shape.cols,
                      .cause = cause,
                      .parent = PMLI_ABSENT,
                      .master = PMLI_ABSENT,
                      .first = -1,
                      .last = -1};
    return p->n_tensors++;
}

int32_t pmli_transient(pmli_builder *b, pmli_shape shape, pml_cause cause, const char *format, ...)
{
    int32_t id = new_tensor(b, shape, cause);
    if (id < 0)
        return id;
    NAME(b, b->program->tensors[id].name, format);
    return id;
}

int32_t pmli_persistent(pmli_builder *b, pmli_shape shape, pml_cause cause, const char *format, ...)
{
    int32_t id = new_tensor(b, shape, cause);
    if (id < 0)
        return id;
    pml_tensor *t = &b->program->tensors[id];
    t->persistent = true;
    NAME(b, t->name, format);
    return id;
}

void pmli_border(pmli_builder *b, int32_t tensor, int64_t columns, int64_t rows)
{
    if (b->status != PML_OK || tensor < 0)
        return;
    b->program->tensors[tensor].border = columns;
    b->program->tensors[tensor].below = rows;
}

int32_t pmli_part(pmli_builder *b, int32_t parent, int64_t at, int64_t rows, int64_t cols,
                  const char *format, ...)
{
    if (b->status != PML_OK || parent < 0)
        return PMLI_ABSENT;
    pml_tensor whole = b->program->tensors[parent];
    int32_t id = new_tensor(b, pmli_fixed(whole.dtype, rows, cols), whole.cause);
    if (id < 0)
        return id;
    pml_tensor *t = &b->program->tensors[id];
    t->persistent = true;
    t->parent = parent;
    t->at = at;
    NAME(b, t->name, format);
    return id;
}

pml_parameter *pmli_parameter(pmli_builder *b, const char *format, ...)
{
    pml_program *p = b->program;
    if (b->status == PML_OK)
        p->parameters =
            grown(b, p->parameters, p->n_parameters, &b->parameter_capacity, sizeof *p->parameters);
    if (b->status != PML_OK)
        return NULL;
    pml_parameter *parameter = &p->parameters[p->n_parameters++];
    *parameter = (pml_parameter){.tensor = PMLI_ABSENT};
    NAME(b, parameter->name, format);
    return parameter;
}

pml_node *pmli_node(pmli_builder *b, pml_op op, int32_t layer, const char *label)
{
    pml_program *p = b->program;
    if (b->status == PML_OK)
        p->nodes = grown(b, p->nodes, p->n_nodes, &b->node_capacity, sizeof *p->nodes);
    if (b->status != PML_OK)
        return NULL;
    pml_node *node = &p->nodes[p->n_nodes++];
    memset(node, 0, sizeof *node);
    node->op = op;
    node->layer = layer;
    memcpy(node->label, label, strnlen(label, sizeof node->label - 1)); /* zeros behind it */
    for (int i = 0; i < PML_OP_MAX_VIEWS; i++)
        node->operands[i].tensor = PMLI_ABSENT;
    return node;
}

void pmli_operand_slice(pml_node *node, int index, int32_t tensor, int32_t col, int32_t cols)
{
    if (node != NULL)
        node->operands[index] = (pml_operand){tensor, col, cols};
}

void pmli_operand(pml_node *node, int index, int32_t tensor)
{
    pmli_operand_slice(node, index, tensor, 0, 0);
}

/* Any address but NULL will do where only shapes are read. */
#define NOWHERE ((void *)(uintptr_t)PMLI_ALIGN)

void pmli_node_done(pmli_builder *b, pml_node *node)
{
    const pml_op_info *info = node != NULL ? pml_op_describe(node->op) : NULL;
    if (info == NULL || b->status != PML_OK)
        return;
    if (node->op == PML_OP_allreduce) /* the collective's */
        return;
    if (!pml_op_is_there(b->backend, node->op)) {
        b->status = PML_FAIL(b->err, PML_UNSUPPORTED, "%s: the %s backend has no op '%s'",
                             node->label, b->backend->name, info->name);
        return;
    }
    const char *found = strpbrk(info->signature, "Ww");
    if (found == NULL)
        return;
    int ws = (int)(found - info->signature);
    pml_counts capacity = pml_program_capacity(b->program, b->segment);
    pml_op_args args;
    pml_program_bind(b->program, node, NOWHERE, &capacity, &args);
    /* Without a device: the answer holds for any, so that the plan shown is the plan in force. */
    size_t bytes = b->backend->workspace(NULL, node->op, &args);
    if (bytes == 0)
        return;
    int32_t id = pmli_transient(b, pmli_fixed(PML_U8, 1, (int64_t)bytes), PML_CAUSE_WORKSPACE,
                                "%s workspace", node->label);
    pmli_operand(node, ws, id);
}

static int64_t live(pml_extent extent, int64_t capacity, const pml_counts *counts)
{
    switch (extent) {
    case PML_EXTENT_TOKENS:
        return counts->tokens;
    case PML_EXTENT_BOUNDS:
        return (int64_t)counts->docs + 1;
    case PML_EXTENT_LABELS:
        return counts->labels;
    case PML_EXTENT_KEYS:
        return counts->keys;
    case PML_EXTENT_FIXED:
        break;
    }
    return capacity;
}

void *pml_program_data(const pml_program *program, int32_t tensor, void *base)
{
    const pml_tensor *t = &program->tensors[tensor];
    if (t->host) /* none yet: only shapes are read */
        base = program->host != NULL ? program->host : NOWHERE;
    return (char *)base + t->offset;
}

/* A window of as many keys as there are is none: backends have faster ways without. */
static int32_t window_of(int32_t window, const pml_counts *counts)
{
    return window >= (counts->keys > 0 ? counts->keys : counts->max_doc) ? 0 : window;
}

void pml_program_bind(const pml_program *program, const pml_node *node, void *base,
                      const pml_counts *counts, pml_op_args *args)
{
    *args = node->args;
    pml_view *views = pml_op_views(args);
    int n = pml_op_describe(node->op)->n_views;
    for (int i = 0; i < n; i++) {
        const pml_operand *operand = &node->operands[i];
        views[i] = (pml_view){0};
        if (operand->tensor < 0)
            continue;
        const pml_tensor *t = &program->tensors[operand->tensor];
        views[i].data = (char *)pml_program_data(program, operand->tensor, base) +
                        (size_t)operand->col * pml_dtype_size(t->dtype);
        views[i].rows = live(t->row_extent, t->rows, counts);
        views[i].cols = operand->cols > 0 ? operand->cols : live(t->col_extent, t->cols, counts);
        views[i].ld = pml_tensor_pitch(t);
        views[i].dtype = t->dtype;
    }
    if (node->op == PML_OP_attention) {
        args->attention.max_q = counts->max_doc;
        args->attention.equal = counts->equal;
        args->attention.window = window_of(args->attention.window, counts);
    } else if (node->op == PML_OP_attention_bwd) {
        args->attention_bwd.max_q = counts->max_doc;
        args->attention_bwd.equal = counts->equal;
        args->attention_bwd.window = window_of(args->attention_bwd.window, counts);
    }
}

pml_counts pml_program_capacity(const pml_program *program, pml_segment segment)
{
    const pml_batch_limits *limits = &program->limits;
    if (segment == PML_SEGMENT_GENERATE)
        return (pml_counts){.tokens = program->generate_chunk,
                            .docs = 1, /* cut into more of them, no op needs more room */
                            .labels = program->generate_rows,
                            .keys = limits->generate_length,
                            .max_doc = program->generate_chunk};
    return (pml_counts){.tokens = limits->tokens,
                        .docs = limits->docs,
                        .labels = limits->labels,
                        .max_doc = limits->max_doc};
}

void pml_program_destroy(pml_program **program)
{
    if (program == NULL || *program == NULL)
        return;
    free((*program)->tensors);
    free((*program)->nodes);
    free((*program)->parameters);
    free((*program)->ranges);
    free(*program);
    *program = NULL;
}

/* Each segment is the nodes that its builder appends. */
static void build_segment(pmli_builder *b, pml_segment segment, void (*build)(pmli_builder *))
{
    b->program->segments[segment].first = b->program->n_nodes;
    b->segment = segment;
    build(b);
    b->program->segments[segment].end = b->program->n_nodes;
}

pml_status pmli_check_limits(const pml_batch_limits *l, pml_error *err)
{
    if (l->tokens < 1 || l->docs < 1 || l->labels < 1 || l->max_doc < 1 || l->max_doc > l->tokens ||
        l->generate_length < 0)
        return PML_FAIL(
            err, PML_INVALID,
            "a batch of %d tokens, %d documents, %d labels, longest %d, cannot be planned",
            l->tokens, l->docs, l->labels, l->max_doc);
    return PML_OK;
}

pml_status pml_program_build(const pml_program_options *options, pml_program **program,
                             pml_error *err)
{
    *program = NULL;
    const pml_model_spec *spec = options->spec;
    pml_batch_limits limits = options->limits;
    pml_status valid = pmli_check_limits(&limits, err);
    if (valid != PML_OK)
        return valid;
    /* Angles follow from the position alone: the table is as long as what will be asked of it, also
     * beyond max_position_embeddings, which says only how far the model was trained. */
    int32_t positions =
        limits.max_doc > limits.generate_length ? limits.max_doc : limits.generate_length;
    if ((options->backend->dtypes >> options->config->dtype & 1) == 0)
        return PML_FAIL(err, PML_UNSUPPORTED, "the %s backend does not train in %s",
                        options->backend->name, pml_dtype_name(options->config->dtype));
    if (options->config->lora_dropout > 0 && !options->backend->drops_out)
        return PML_FAIL(err, PML_UNSUPPORTED, "lora_dropout is not on the %s backend yet",
                        options->backend->name);
    const pml_plan_choices *c = &options->choices;
    if (c->recompute < 0 || c->recompute >= PML_RECOMPUTE_COUNT || c->recompute_layers < 0 ||
        c->recompute_layers > spec->layers || c->head_chunk < 1 ||
        (c->recompute == PML_RECOMPUTE_NONE && c->recompute_layers > 0) || c->unpacked < 0 ||
        c->unpacked > spec->layers * PMLI_LINEARS)
        return PML_FAIL(err, PML_INVALID,
                        "recompute %d of %d layers, head_chunk %d and %d unpacked weights cannot "
                        "be planned",
                        c->recompute, c->recompute_layers, c->head_chunk, c->unpacked);
    if (c->offload < 0 || c->offload >= PML_RECOMPUTE_COUNT || c->offload_layers < 0 ||
        c->offload_layers > pml_offload_span(c, spec->layers))
        return PML_FAIL(err, PML_INVALID,
                        "%d offloaded layers at level %d, of %d, cannot be planned",
                        c->offload_layers, c->offload, pml_offload_span(c, spec->layers));

    pml_program *p = calloc(1, sizeof *p);
    pml_train_config settled = *options->config;
    pml_plan_settle(c, &settled);
    pmli_builder b = {.program = p,
                      .config = &settled,
                      .backend = options->backend,
                      .err = err,
                      .nameless = options->estimate};
    if (p != NULL && options->spare != NULL)
        take_tables(&b, options->spare);
    b.layers = calloc((size_t)spec->layers, sizeof *b.layers);
    if (p == NULL || b.layers == NULL) {
        b.status = PML_FAIL(err, PML_NO_MEMORY, "no host memory for the step program");
        goto cleanup;
    }
    p->spec = *spec;
    p->limits = limits;
    p->choices = *c;
    p->positions = positions;
    p->generate_chunk =
        limits.generate_length < limits.tokens ? limits.generate_length : limits.tokens;
    p->generate_rows =
        p->generate_chunk < PML_GENERATE_ROWS ? p->generate_chunk : PML_GENERATE_ROWS;
    p->generate_rows = p->generate_rows > 1 ? p->generate_rows : 1;
    pmli_layout(&b);
    build_segment(&b, PML_SEGMENT_MICRO, pmli_build_micro);
    build_segment(&b, PML_SEGMENT_NORM, pmli_build_norm);
    build_segment(&b, PML_SEGMENT_UPDATE, pmli_build_update);
    build_segment(&b, PML_SEGMENT_CLEAR, pmli_build_clear);
    build_segment(&b, PML_SEGMENT_EVAL, pmli_build_eval);
    if (limits.generate_length > 0)
        build_segment(&b, PML_SEGMENT_GENERATE, pmli_build_generate);
    if (settled.restarts && strcmp(options->backend->name, "cpu") == 0)
        p->stage_bytes =
            (pml_program_snapshot_bytes(p, &settled) + PMLI_PAGE - 1) / PMLI_PAGE * PMLI_PAGE;
    if (b.status == PML_OK)
        b.status = options->estimate ? pml_program_estimate(p, err) : pml_program_place(p, err);
cleanup:
    free(b.layers);
    if (b.status != PML_OK) {
        pml_program_destroy(&p);
        return b.status;
    }
    if (!options->estimate)
        fit_tables(p);
    *program = p;
    return PML_OK;
}
