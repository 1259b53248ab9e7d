#include "pml/train/profile.h"

#include "stepper_impl.h"

static pml_status profile_segment(pml_stepper *s, pml_segment segment, const pml_counts *counts,
                                  pml_profile_row *rows, int capacity, int *n, pml_error *err)
{
    const pml_program *p = s->program;
    int first = *n;
    pml_status status = s->backend->mark(s->queue, 0, err);
    for (int32_t i = p->segments[segment].first; status == PML_OK && i < p->segments[segment].end;
         i++) {
        const pml_node *node = &p->nodes[i];
        pml_op_args args;
        if (node->op == PML_OP_allreduce)
            continue;
        if (*n == capacity || *n - first + 1 == PML_MARKS)
            return PML_FAIL(err, PML_INVALID, "more ops than the profile has room for");
        pml_program_bind(p, node, s->arena, counts, &args);
        pml_cost cost = pml_node_cost(node->op, &args);
        rows[*n] = (pml_profile_row){.label = node->label,
                                     .op = node->op,
                                     .layer = node->layer,
                                     .again = node->again,
                                     .flops = cost.flops,
                                     .bytes = cost.bytes};
        status = pml_op_run(s->backend, node->op, s->queue, &args, err);
        ++*n;
        if (status == PML_OK)
            status = s->backend->mark(s->queue, *n - first, err);
    }
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    for (int i = first; status == PML_OK && i < *n; i++)
        status = s->backend->between(s->queue, i - first, i - first + 1, &rows[i].seconds, err);
    return status;
}

pml_status pml_stepper_profile(pml_stepper *s, const pml_batch *batch, pml_profile_row *rows,
                               int capacity, int *n, pml_error *err)
{
    const pml_counts none = {0};
    pml_counts counts;
    *n = 0;
    pml_status status = pmli_take_batch(s, batch, &counts, err);
    if (status == PML_OK)
        status = profile_segment(s, PML_SEGMENT_MICRO, &counts, rows, capacity, n, err);
    if (status == PML_OK)
        status = profile_segment(s, PML_SEGMENT_NORM, &none, rows, capacity, n, err);
    /* With a learning rate and a gradient scale of 0 the update reads and writes all it would. */
    if (status == PML_OK) {
        const float zeros[2][PML_HYPER_COUNT] = {{[PML_HYPER_BIAS1] = 1, [PML_HYPER_BIAS2] = 1},
                                                 {[PML_HYPER_BIAS1] = 1, [PML_HYPER_BIAS2] = 1}};
        status = pmli_upload(s, s->program->hyper, zeros, sizeof zeros, err);
    }
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (status == PML_OK)
        status = profile_segment(s, PML_SEGMENT_UPDATE, &none, rows, capacity, n, err);
    if (status == PML_OK)
        status = profile_segment(s, PML_SEGMENT_CLEAR, &none, rows, capacity, n, err);
    return status;
}
