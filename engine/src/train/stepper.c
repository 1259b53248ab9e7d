/* The stepper: a step program, an arena, a queue. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/json/json.h"
#include "pml/train/config.h"
#include "stepper_impl.h"

pml_status pmli_upload(pml_stepper *s, int32_t tensor, const void *from, size_t bytes,
                       pml_error *err)
{
    return s->backend->upload(s->queue, pml_program_data(s->program, tensor, s->arena), from, bytes,
                              err);
}

static pml_status download(pml_stepper *s, int32_t tensor, void *to, size_t bytes, pml_error *err)
{
    return s->backend->download(s->queue, to, pml_program_data(s->program, tensor, s->arena), bytes,
                                err);
}

bool pmli_is_shared(const pml_stepper *s)
{
    return s->comm != NULL && pml_comm_world(s->comm) > 1;
}

/* One float64 over all workers, by way of the host. */
static pml_status reduce_total(pml_stepper *s, void *at, pml_error *err)
{
    double total = 0;
    pml_status status = s->backend->download(s->queue, &total, at, sizeof total, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (status == PML_OK)
        status = pml_comm_allreduce_f64(s->comm, &total, 1, err);
    if (status == PML_OK)
        status = s->backend->upload(s->queue, at, &total, sizeof total, err);
    return status == PML_OK ? s->backend->sync(s->queue, err) : status;
}

/* Sum over workers, in pieces that pass through host memory; the collective adds in rank order, so
 * that cutting does not change a bit. A collective between devices takes the whole view instead. */
static pml_status reduce(pml_stepper *s, const pml_view *x, pml_error *err)
{
    if (!pmli_is_shared(s))
        return PML_OK;
    if (x->dtype == PML_F64)
        return reduce_total(s, x->data, err);
    char *at = x->data;
    for (size_t left = (size_t)x->cols; left > 0;) {
        size_t n = left < PMLI_REDUCE_FLOATS ? left : PMLI_REDUCE_FLOATS;
        size_t bytes = n * sizeof(float);
        pml_status status = s->backend->download(s->queue, s->reduced, at, bytes, err);
        if (status == PML_OK)
            status = s->backend->sync(s->queue, err);
        if (status == PML_OK)
            status = pml_comm_allreduce_f32(s->comm, s->reduced, n, err);
        if (status == PML_OK)
            status = s->backend->upload(s->queue, at, s->reduced, bytes, err);
        if (status == PML_OK)
            status = s->backend->sync(s->queue, err);
        if (status != PML_OK)
            return status;
        at += bytes;
        left -= n;
    }
    return PML_OK;
}

pml_status pmli_go_on(const pml_stepper *s, pml_error *err)
{
    if (s->enough != NULL && s->enough(s->asked))
        return PML_FAIL(err, PML_TIMEOUT, "nobody waits for what the model says any more");
    return PML_OK;
}

pml_status pmli_run_node(pml_stepper *s, const pml_node *node, const pml_op_args *args,
                         pml_error *err)
{
    if (s->move != NULL)
        s->move(s->user);
    pml_status status = node->op == PML_OP_allreduce
                            ? reduce(s, &args->allreduce.x, err)
                            : pml_op_run(s->backend, node->op, s->queue, args, err);
    if (status == PML_OK)
        return status;
    return node->layer >= 0 ? pml_error_prefix(err, "%s, layer %d", node->label, node->layer)
                            : pml_error_prefix(err, "%s", node->label);
}

/* Of a token that is sampled products cost what they read, and one thread makes most of what is
 * between them: the others fetch the next one's weight meanwhile, after the last the first's. */
static void tell_ahead(pml_stepper *s, const pml_node *node)
{
    const pml_program *p = s->program;
    const int32_t first = p->segments[PML_SEGMENT_GENERATE].first,
                  end = p->segments[PML_SEGMENT_GENERATE].end;
    const int32_t n = (int32_t)(node - p->nodes);
    for (int32_t next = n + 1; next != n; next++) {
        next = next == end ? first : next;
        if (p->nodes[next].op != PML_OP_linear)
            continue;
        const pml_operand *w = &p->nodes[next].operands[PML_OPERAND(linear, w)];
        const pml_tensor *t = &p->tensors[w->tensor];
        if (t->persistent) /* else it is made on the way */
            s->backend->ahead(s->queue, pml_program_data(p, w->tensor, s->arena),
                              (size_t)t->rows * (size_t)pml_tensor_pitch(t) *
                                  pml_dtype_size(t->dtype));
        return;
    }
}

/* A sampled token's arguments, in the order of its nodes: bound anew they were a twentieth of a
 * token with many threads, for what nodes and tensors lie apart in memory. */
static const pml_op_args *bound_for(pml_stepper *s, const pml_counts *counts)
{
    const pml_program *p = s->program;
    const int32_t first = p->segments[PML_SEGMENT_GENERATE].first;
    if (memcmp(&s->bound_for, counts, sizeof *counts) != 0)
        for (int32_t n = first; n < p->segments[PML_SEGMENT_GENERATE].end; n++)
            pml_program_bind(p, &p->nodes[n], s->arena, counts, &s->bound[n - first]);
    s->bound_for = *counts;
    return s->bound;
}

/* Nodes are bound anew each time: that is some hundred small copies. */
pml_status pmli_run_segment(pml_stepper *s, pml_segment segment, const pml_counts *counts,
                            pml_error *err)
{
    const pml_program *p = s->program;
    if (s->timing)
        return pmli_run_timed(s, segment, counts, err);
    const bool sampled =
        s->bound != NULL && segment == PML_SEGMENT_GENERATE && counts->tokens == counts->labels;
    const pml_op_args *bound = sampled ? bound_for(s, counts) : NULL;
    for (int32_t n = p->segments[segment].first; n < p->segments[segment].end; n++) {
        pml_op_args args;
        const pml_op_args *at = sampled ? bound++ : &args;
        if (!sampled)
            pml_program_bind(p, &p->nodes[n], s->arena, counts, &args);
        else if (p->nodes[n].op == PML_OP_linear)
            tell_ahead(s, &p->nodes[n]);
        pml_status status = pmli_run_node(s, &p->nodes[n], at, err);
        if (status != PML_OK)
            return status;
    }
    return PML_OK;
}

/* n numbers, each less `less`, and behind them as many of `filler` as the padded batch has more. */
static size_t stage(int32_t *to, const int32_t *from, int32_t n, int32_t less, int32_t padded,
                    int32_t filler)
{
    for (int32_t i = 0; i < n; i++)
        to[i] = from[i] - less;
    for (int32_t i = n; i < padded; i++)
        to[i] = filler;
    return (size_t)padded;
}

/* The next of the places of batches, which the device has read. */
static pml_status next_inputs(pml_stepper *s, const pmli_inputs **inputs, pml_error *err)
{
    const int slot = (int)(s->taken % PMLI_INPUTS);
    *inputs = &s->inputs[slot];
    return s->taken++ < PMLI_INPUTS ? PML_OK : s->backend->passed(s->queue, PMLI_MARKS + slot, err);
}

/* Copy a batch, padded to `counts`, to its place and upload it. It may be a piece of one: its rows
 * are counted from its own first. */
static pml_status upload_batch(pml_stepper *s, const pmli_inputs *to, const pml_batch *batch,
                               const pml_counts *counts, pml_error *err)
{
    pml_status status = PML_OK;
    const pml_program *p = s->program;
    const int32_t first = batch->cu_seqlens[0];
    const struct {
        int32_t tensor;
        const int32_t *from;
        int32_t n, less, padded, filler;
    } inputs[] = {
        {p->ids, batch->ids, batch->n_tokens, 0, counts->tokens, 0},
        {p->positions_in, batch->positions, batch->n_tokens, 0, counts->tokens, 0},
        {p->bounds, batch->cu_seqlens, batch->n_docs + 1, first, counts->docs + 1, batch->n_tokens},
        {p->label_rows, batch->label_rows, batch->n_labels, first, counts->labels, -1},
        {p->labels, batch->labels, batch->n_labels, 0, counts->labels, 0}};
    int32_t *at = to->ints;
    for (size_t i = 0; status == PML_OK && i < sizeof inputs / sizeof *inputs; i++) {
        size_t n = stage(at, inputs[i].from, inputs[i].n, inputs[i].less, inputs[i].padded,
                         inputs[i].filler);
        status = pmli_upload(s, inputs[i].tensor, at, n * sizeof *at, err);
        at += n;
    }
    return status;
}

static pml_status check_batch(const pml_stepper *s, const pml_batch *batch, pml_error *err)
{
    const pml_batch_limits *l = &s->limits;
    if (batch->n_tokens > l->tokens || batch->n_docs > l->docs || batch->n_labels > l->labels ||
        batch->max_doc > l->max_doc)
        return PML_FAIL(err, PML_INVALID,
                        "a batch of %d tokens, %d documents, %d labels, longest %d, is more than "
                        "was planned (%d, %d, %d, %d)",
                        batch->n_tokens, batch->n_docs, batch->n_labels, batch->max_doc, l->tokens,
                        l->docs, l->labels, l->max_doc);
    return pml_batch_check(batch, s->spec.vocab, s->program->positions, err);
}

static pml_counts counts_of(const pml_batch *batch)
{
    return (pml_counts){.tokens = batch->n_tokens,
                        .docs = batch->n_docs,
                        .labels = batch->n_labels,
                        .max_doc = batch->max_doc};
}

/* Dropout's masks: a function of the seed, the update and each token's place in the data, and so of
 * nothing that cuts a step up. */
static pml_status choose_masks(pml_stepper *s, const pmli_inputs *to, const pml_batch *batch,
                               pml_error *err)
{
    if (s->program->places < 0)
        return PML_OK;
    if (batch->places == NULL)
        return PML_FAIL(err, PML_INVALID, "dropout needs the places of a batch's tokens");
    size_t bytes = (size_t)batch->n_tokens * sizeof *to->places; /* tokens of padding: any place */
    to->rng[0] = (int64_t)s->config.seed;
    to->rng[1] = s->updates;
    memcpy(to->places, batch->places, bytes);
    pml_status status = pmli_upload(s, s->program->rng, to->rng, 2 * sizeof *to->rng, err);
    return status == PML_OK ? pmli_upload(s, s->program->places, to->places, bytes, err) : status;
}

/* The next piece of a micro-batch: documents from `doc` on, as many as the program has room for.
 * Labels before `label` have been taken. */
static pml_batch piece_of(const pml_stepper *s, const pml_batch *whole, int32_t doc, int32_t label)
{
    const pml_batch_limits *l = &s->program->limits;
    int32_t first = whole->cu_seqlens[doc], last = doc;
    while (last < whole->n_docs && whole->cu_seqlens[last + 1] - first <= l->tokens)
        last++;
    pml_batch piece = {.n_docs = last - doc,
                       .n_tokens = whole->cu_seqlens[last] - first,
                       .max_doc = whole->max_doc,
                       .ids = whole->ids + first,
                       .positions = whole->positions + first,
                       .places = whole->places != NULL ? whole->places + first : NULL,
                       .cu_seqlens = whole->cu_seqlens + doc,
                       .label_rows = whole->label_rows + label,
                       .labels = whole->labels + label};
    while (label + piece.n_labels < whole->n_labels &&
           whole->label_rows[label + piece.n_labels] < whole->cu_seqlens[last])
        piece.n_labels++;
    piece.max_doc = piece.max_doc < piece.n_tokens ? piece.max_doc : piece.n_tokens;
    return piece;
}

/* With masks where it is trained on. */
static pml_status put_batch(pml_stepper *s, const pml_batch *batch, const pml_counts *counts,
                            bool masked, pml_error *err)
{
    const pmli_inputs *to;
    pml_status status = next_inputs(s, &to, err);
    if (status == PML_OK)
        status = upload_batch(s, to, batch, counts, err);
    if (status == PML_OK && masked)
        status = choose_masks(s, to, batch, err);
    return status == PML_OK ? s->backend->mark(s->queue, PMLI_MARKS + (int)(to - s->inputs), err)
                            : status;
}

pml_status pmli_take_batch(pml_stepper *s, const pml_batch *batch, pml_counts *counts,
                           pml_error *err)
{
    pml_status status = check_batch(s, batch, err);
    if (status != PML_OK)
        return status;
    pml_batch piece = piece_of(s, batch, 0, 0);
    *counts = pmli_bucket(s, counts_of(&piece));
    return put_batch(s, &piece, counts, true, err);
}

/* Runs a segment over a checked batch, piece by piece. A piece without labels teaches nothing. */
static pml_status run_pieces(pml_stepper *s, pml_segment segment, const pml_batch *batch,
                             pml_error *err)
{
    pml_status status = PML_OK;
    for (int32_t doc = 0, label = 0; status == PML_OK && doc < batch->n_docs;) {
        pml_batch piece = piece_of(s, batch, doc, label);
        doc += piece.n_docs;
        label += piece.n_labels;
        if (piece.n_labels == 0)
            continue;
        pml_counts counts = pmli_bucket(s, counts_of(&piece));
        if (segment == PML_SEGMENT_MICRO) /* an evaluation waits: the same number every time */
            pmli_ahead_meet(s, &counts);
        status = put_batch(s, &piece, &counts, segment == PML_SEGMENT_MICRO, err);
        if (status == PML_OK)
            status = pmli_run_recorded(s, segment, &counts, err);
        if (segment == PML_SEGMENT_MICRO)
            s->flops += pmli_flops_of(&s->cost, &piece);
    }
    return status;
}

pml_status pmli_run_micro(pml_stepper *s, const pml_batch *batch, pml_error *err)
{
    pml_status status = check_batch(s, batch, err);
    if (status == PML_OK)
        status = pmli_rope_for_training(s, batch->max_doc, err);
    if (status != PML_OK || batch->n_labels == 0)
        return status; /* nothing to learn adds nothing */
    return run_pieces(s, PML_SEGMENT_MICRO, batch, err);
}

pml_status pml_stepper_micro(pml_stepper *s, const pml_batch *batch, pml_error *err)
{
    if (batch->n_tokens == 0)
        return PML_OK;
    if (s->scale.value == 0)
        return PML_FAIL(err, PML_INVALID, "the loss scale is to be found before the first step");
    return pmli_run_micro(s, batch, err);
}

static void set_hyper(pml_stepper *s, const pml_update *u)
{
    const double t = (double)(s->applied + 1); /* as in torch, a skipped step does not count */
    for (int group = 0; group < 2; group++) {
        float *h = s->hyper[group];
        h[PML_HYPER_LR] = (float)u->learning_rate;
        h[PML_HYPER_ONE_MINUS_BETA1] = (float)(1.0 - s->config.beta1);
        h[PML_HYPER_ONE_MINUS_BETA2] = (float)(1.0 - s->config.beta2);
        h[PML_HYPER_EPS] = (float)s->config.epsilon;
        h[PML_HYPER_WEIGHT_DECAY] = group == 0 ? (float)u->weight_decay : 0.0F;
        h[PML_HYPER_BIAS1] = (float)(1.0 - pow(s->config.beta1, t));
        h[PML_HYPER_BIAS2] = (float)(1.0 - pow(s->config.beta2, t));
        h[PML_HYPER_MEAN] =
            u->labels > 0 ? (float)(1.0 / ((double)u->labels * s->scale.value)) : 0.0F;
        h[PML_HYPER_MAX_NORM] = (float)u->max_grad_norm;
        h[PML_HYPER_GRAD_SCALE] = 0.0F;
        h[PML_HYPER_MOMENTUM] = (float)s->config.momentum;
        h[PML_HYPER_NEW_GRAD] = s->applied == 0 ? 1.0F : (float)(1.0 - s->config.dampening);
    }
}

void *pml_stepper_stage(const pml_stepper *s, size_t *bytes)
{
    *bytes = s->program->stage_bytes;
    return *bytes > 0 ? (char *)s->arena + s->program->stage : NULL;
}

/* Once: what the process holds beside the arena. Only where host memory is the device's. */
static void measure_runtime(pml_stepper *s)
{
    if (s->runtime_measured || strcmp(s->backend->name, "cpu") != 0)
        return;
    s->runtime_measured = true;
    FILE *file = fopen("/proc/self/status", "re");
    if (file == NULL)
        return; /* the planner's reserve stays in the plan */
    char line[256];
    size_t kib = 0, n;
    while (fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "RssAnon: %zu", &n) == 1 || sscanf(line, "RssShmem: %zu", &n) == 1)
            kib += n;
    fclose(file);
    size_t held = kib * 1024;
    if (held <= s->plan.arena)
        return;
    s->plan.by_cause[PML_CAUSE_RUNTIME] = held - s->plan.arena;
    s->plan.total = held;
}

pml_status pml_stepper_update(pml_stepper *s, const pml_update *u, pml_step_result *result,
                              pml_error *err)
{
    const pml_program *p = s->program;
    const pml_counts none = {0};
    if (u->step < 1)
        return PML_FAIL(err, PML_INVALID, "updates are counted from 1, not %lld",
                        (long long)u->step);
    /* What the micro-batches put on the queue goes on meanwhile, and what is put here follows it
     * without a gap: `hyper` is free, the last update ended with a sync. Whether there is anything
     * to update is decided on the device (clip_scale), and here by the same numbers. */
    set_hyper(s, u);
    pml_status status = pmli_upload(s, p->hyper, s->hyper, sizeof s->hyper, err);
    if (status == PML_OK)
        status = pmli_run_segment(s, PML_SEGMENT_NORM, &none, err);
    if (status == PML_OK)
        status = pmli_run_segment(s, PML_SEGMENT_UPDATE, &none, err);
    if (status == PML_OK)
        status = download(s, p->told, s->told, sizeof *s->told, err);
    if (status == PML_OK)
        status = pmli_run_segment(s, PML_SEGMENT_CLEAR, &none, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (status != PML_OK)
        return status;
    const double loss_sum = s->told->loss_sum;
    const float norm = s->told->norm;
    /* Without a label there is no loss, but a gradient: zero. Momentum and weight decay go on, as
     * they do in transformers' Trainer. */
    bool finite = isfinite(norm), sound = isfinite(loss_sum);
    *result = (pml_step_result){.loss = u->labels > 0 ? loss_sum / (double)u->labels : NAN,
                                .grad_norm = norm,
                                .skipped = !finite || !sound,
                                .loss_scale = s->scale.dynamic ? s->scale.value : 0};
    const double scale = s->scale.value;
    /* A loss that is not finite is the forward pass's, which the scale does not reach. */
    if (sound)
        result->overflow = pml_loss_scale_next(&s->scale, finite);
    else if (s->scale.dynamic && s->applied == 0)
        s->scale.value = 0; /* nothing could be learnt of it: the next step tries again */
    if (s->scale.value != scale)
        status = pmli_set_scale(s, err);
    result->flops = s->flops;
    s->flops = 0;
    s->updates = u->step;
    s->applied += !result->skipped;
    measure_runtime(s);
    return status;
}

pml_status pml_stepper_evaluate(pml_stepper *s, const pml_batch *batch, double *loss_sum,
                                pml_error *err)
{
    if (batch->n_tokens == 0 || batch->n_labels == 0)
        return PML_OK;
    double sum = 0;
    pml_status status = check_batch(s, batch, err);
    if (status == PML_OK)
        status = pmli_rope_fit(s, batch->max_doc, err);
    if (status == PML_OK)
        status = pmli_upload(s, s->program->eval_sum, &sum, sizeof sum, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (status == PML_OK)
        status = run_pieces(s, PML_SEGMENT_EVAL, batch, err);
    if (status == PML_OK)
        status = download(s, s->program->eval_sum, &sum, sizeof sum, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (status == PML_OK)
        *loss_sum += sum;
    return status;
}

int64_t pml_stepper_applied(const pml_stepper *s)
{
    return s->applied;
}

int32_t pml_stepper_rope_length(const pml_stepper *s)
{
    return s->rope_length;
}

void pml_stepper_seek(pml_stepper *s, int64_t updates, int64_t applied, int32_t rope_length)
{
    s->updates = updates;
    s->applied = applied;
    s->rope_length = rope_length;
}

/* 0 leaves the operands in their places: they are only not read. */
pml_status pml_stepper_set_dropout(pml_stepper *s, double dropout, pml_error *err)
{
    if (!(dropout >= 0 && dropout < 1))
        return PML_FAIL(err, PML_INVALID, "lora_dropout must be in [0, 1), it is %g", dropout);
    if (dropout == 0 && s->program->places < 0)
        return PML_OK;
    if (s->program->places < 0)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "the run was planned without dropout and has no room for its masks; start "
                        "it with LoRA(lora_dropout=…) above 0");
    for (int32_t n = s->program->segments[PML_SEGMENT_MICRO].first;
         n < s->program->segments[PML_SEGMENT_MICRO].end; n++) {
        pml_node *node = &s->program->nodes[n];
        if (node->op == PML_OP_linear && node->args.linear.lora_parts != 0)
            node->args.linear.lora_dropout = (float)dropout;
        if (node->op == PML_OP_linear_bwd && node->args.linear_bwd.lora_parts != 0)
            node->args.linear_bwd.lora_dropout = (float)dropout;
    }
    pmli_drop_recorded(s); /* graphs hold the attributes that they were recorded with */
    return PML_OK;
}

const char *pml_stepper_note(const pml_stepper *s)
{
    return s->note;
}

pml_status pml_stepper_device(pml_stepper *s, pml_device_info *info, pml_error *err)
{
    return s->backend->info(s->device, info, err);
}

void pml_stepper_lacks(pml_stepper *s, char lacks[PML_LACKS])
{
    lacks[0] = '\0';
    if (s->backend->lacks != NULL)
        s->backend->lacks(s->device, lacks);
}

const pml_plan *pml_stepper_plan(const pml_stepper *s)
{
    return &s->plan;
}

const pml_model_spec *pml_stepper_spec(const pml_stepper *s)
{
    return &s->spec;
}
