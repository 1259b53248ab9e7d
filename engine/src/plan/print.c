/* The program as JSON, for tools and for those who make a table of it. */
#include "build.h"
#include "pml/json/json.h"
#include "search.h"

typedef struct row {
    const pml_node *node;
    const pml_op_info *info;
    pml_op_args args; /* bound at capacity */
    pml_cost cost;
} row;

static row row_at(const pml_program *p, pml_segment segment, int32_t index)
{
    pml_counts counts = pml_program_capacity(p, segment);
    row r = {.node = &p->nodes[index]};
    r.info = pml_op_describe(r.node->op);
    pml_program_bind(p, r.node, (void *)(uintptr_t)PMLI_ALIGN, &counts, &r.args);
    r.cost = pml_node_cost(r.node->op, &r.args);
    return r;
}

static void put_tensors(pml_json_writer *w, const pml_program *p)
{
    pml_json_begin_array(w, "tensors");
    for (int32_t i = 0; i < p->n_tensors; i++) {
        const pml_tensor *t = &p->tensors[i];
        pml_json_begin_object(w, NULL);
        pml_json_put_string(w, "name", t->name);
        pml_json_put_string(w, "dtype", pml_dtype_name(t->dtype));
        pml_json_put_int(w, "rows", t->rows);
        pml_json_put_int(w, "cols", t->cols);
        if (t->border > 0)
            pml_json_put_int(w, "border", t->border);
        pml_json_put_string(w, "cause", pml_cause_name(t->cause));
        if (t->host)
            pml_json_put_bool(w, "host", true);
        pml_json_put_int(w, "offset", (int64_t)t->offset);
        if (t->parent >= 0)
            pml_json_put_int(w, "part_of", t->parent);
        if (!t->persistent) {
            pml_json_put_int(w, "first", t->first);
            pml_json_put_int(w, "last", t->last);
        }
        pml_json_end(w);
    }
    pml_json_end(w);
}

static void put_node(pml_json_writer *w, const row *r, int32_t number, const pml_rates *rates,
                     pmli_clocks *clocks)
{
    const pmli_clocks before = *clocks;
    pmli_advance(clocks, r->node->op, pml_rates_seconds(rates, r->node->op, r->cost));
    pml_json_begin_object(w, NULL);
    pml_json_put_int(w, "node", number);
    pml_json_put_string(w, "op", r->info->name);
    pml_json_put_string(w, "label", r->node->label);
    if (r->node->layer >= 0)
        pml_json_put_int(w, "layer", r->node->layer);
    pml_json_put_bool(w, "again", r->node->again);
    pml_json_put_double(w, "flops", r->cost.flops);
    pml_json_put_double(w, "bytes", r->cost.bytes);
    pml_json_put_double(w, "predicted", clocks->ops - before.ops);
    if (clocks->busy > before.busy) /* beside the ops that follow */
        pml_json_put_double(w, "link", clocks->busy - before.busy);
    pml_json_begin_array(w, "operands");
    const pml_view *views = pml_op_views((pml_op_args *)&r->args);
    for (int v = 0; v < r->info->n_views; v++) {
        if (views[v].data == NULL)
            continue;
        pml_json_begin_object(w, NULL);
        pml_json_put_string(w, "name", r->info->operands[v]);
        pml_json_put_int(w, "tensor", r->node->operands[v].tensor);
        pml_json_put_int(w, "column", r->node->operands[v].col);
        pml_json_put_int(w, "rows", views[v].rows);
        pml_json_put_int(w, "cols", views[v].cols);
        pml_json_end(w);
    }
    pml_json_end(w);
    pml_json_end(w);
}

static void put_plan(pml_json_writer *w, const pml_plan *plan)
{
    pml_json_begin_object(w, "by_cause");
    for (int c = 0; c < PML_CAUSE_COUNT; c++)
        pml_json_put_int(w, pml_cause_name((pml_cause)c), (int64_t)plan->by_cause[c]);
    pml_json_end(w);
    pml_json_put_int(w, "total", (int64_t)plan->total);
    pml_json_put_string(w, "recompute", pml_recompute_name((pml_recompute)plan->choices.recompute));
    pml_json_put_int(w, "recompute_layers", plan->choices.recompute_layers);
    pml_json_put_int(w, "head_chunk", plan->choices.head_chunk);
    pml_json_put_int(w, "pieces", plan->choices.pieces);
    pml_json_put_bool(w, "moments_8bit", plan->choices.moments_8bit != 0);
    pml_json_put_int(w, "unpacked", plan->choices.unpacked);
    pml_json_put_double(w, "seconds", plan->seconds);
    pml_json_begin_object(w, "limits");
    pml_json_put_int(w, "tokens", plan->limits.tokens);
    pml_json_put_int(w, "docs", plan->limits.docs);
    pml_json_put_int(w, "labels", plan->limits.labels);
    pml_json_put_int(w, "max_doc", plan->limits.max_doc);
    pml_json_put_int(w, "generate_length", plan->limits.generate_length);
    pml_json_end(w);
    pml_json_put_int(w, "parameters", plan->parameters);
    pml_json_put_int(w, "trainable", plan->trainable);
    pml_json_put_double(w, "flops", plan->flops);
    pml_json_put_double(w, "bytes", plan->bytes);
}

/* What waits on the host, and what its copies take of a micro-batch. */
static void put_offload(pml_json_writer *w, const pml_program *p, const pml_rates *rates)
{
    const pml_plan_choices *c = &p->choices;
    pmli_clocks piece = {0};
    for (int32_t n = p->segments[PML_SEGMENT_MICRO].first; n < p->segments[PML_SEGMENT_MICRO].end;
         n++) {
        row r = row_at(p, PML_SEGMENT_MICRO, n);
        pmli_advance(&piece, r.node->op, pml_rates_seconds(rates, r.node->op, r.cost));
    }
    pml_json_put_int(w, "offload_layers", c->offload_layers);
    pml_json_put_string(w, "offload", pml_recompute_name((pml_recompute)c->offload));
    pml_json_put_int(w, "host", (int64_t)p->host_bytes);
    pml_json_put_double(w, "link", c->pieces * piece.busy);
    pml_json_put_double(w, "waited", c->pieces * piece.waited);
}

static pml_status print_json(const pml_program *p, const pml_plan *plan, const pml_rates *rates,
                             char **text, pml_error *err)
{
    pml_json_writer *w = NULL;
    pml_status status = pml_json_writer_new(&w, err);
    if (status != PML_OK)
        return status;
    pml_json_put_int(w, "format", 1);
    put_plan(w, plan);
    if (p->choices.offload_layers > 0)
        put_offload(w, p, rates);
    pml_json_put_string(w, "rates", rates->source);
    pml_json_begin_object(w, "ops");
    for (int op = 0; op < PML_OP_COUNT; op++)
        pml_json_put_string(w, pml_op_describe((pml_op)op)->name,
                            pml_op_describe((pml_op)op)->sentence);
    pml_json_end(w);
    put_tensors(w, p);
    pml_json_begin_array(w, "segments");
    for (int s = 0; s < PML_SEGMENT_COUNT; s++) {
        pml_json_begin_object(w, NULL);
        pml_json_put_string(w, "name", pml_segment_name((pml_segment)s));
        pml_json_begin_array(w, "nodes");
        pmli_clocks clocks = {0};
        for (int32_t n = p->segments[s].first; n < p->segments[s].end; n++) {
            row r = row_at(p, (pml_segment)s, n);
            put_node(w, &r, n, rates, &clocks);
        }
        pml_json_end(w);
        pml_json_end(w);
    }
    pml_json_end(w);
    size_t size;
    status = pml_json_writer_finish(w, 0, text, &size, err);
    pml_json_writer_destroy(&w);
    return status;
}

pml_status pml_plan_print_program(const pml_model_spec *spec, const pml_train_config *config,
                                  const pml_plan *plan, const pml_backend *backend, char **text,
                                  pml_error *err)
{
    *text = NULL;
    pml_rates rates;
    pml_program *program = NULL;
    pml_status status = pml_rates_get(backend->name, &rates, err);
    if (status == PML_OK)
        status = pml_plan_build(plan, spec, config, backend, &program, err);
    if (status == PML_OK)
        status = print_json(program, plan, &rates, text, err);
    pml_program_destroy(&program);
    return status;
}
