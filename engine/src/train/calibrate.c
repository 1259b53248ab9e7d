/* The loss scale at work: found by trying, put on the device. */
#include <math.h>

#include "stepper_impl.h"

pml_status pmli_set_scale(pml_stepper *s, pml_error *err)
{
    pml_status status = s->backend->sync(s->queue, err); /* the last upload has read it */
    s->scale_there = s->scale.value > 0 ? (float)s->scale.value : 1.0F;
    return status == PML_OK
               ? pmli_upload(s, s->program->loss_scale, &s->scale_there, sizeof s->scale_there, err)
               : status;
}

pml_loss_scale pml_stepper_loss_scale(const pml_stepper *s)
{
    return s->scale;
}

pml_status pml_stepper_set_loss_scale(pml_stepper *s, pml_loss_scale scale, pml_error *err)
{
    s->scale = scale;
    return pmli_set_scale(s, err);
}

/* The sum of squares of this worker's gradients, and its losses. */
static pml_status look(pml_stepper *s, double *sumsq, double *loss, pml_error *err)
{
    const pml_program *p = s->program;
    const pml_counts none = {0};
    pml_status status = PML_OK;
    for (int32_t n = p->segments[PML_SEGMENT_NORM].first;
         status == PML_OK && n < p->segments[PML_SEGMENT_NORM].end; n++) {
        pml_op_args args;
        if (p->nodes[n].op != PML_OP_fill && p->nodes[n].op != PML_OP_sumsq)
            continue;
        pml_program_bind(p, &p->nodes[n], s->arena, &none, &args);
        status = pmli_run_node(s, &p->nodes[n], &args, err);
    }
    if (status == PML_OK)
        status = s->backend->download(s->queue, sumsq, pml_program_data(p, p->sumsq, s->arena),
                                      sizeof *sumsq, err);
    if (status == PML_OK)
        status = s->backend->download(s->queue, loss, pml_program_data(p, p->loss_sum, s->arena),
                                      sizeof *loss, err);
    return status == PML_OK ? s->backend->sync(s->queue, err) : status;
}

/* How many workers' gradients, and losses, are not finite with the scale in force. */
static pml_status attempt(pml_stepper *s, const pml_batch *batch, double failed[2], pml_error *err)
{
    const pml_counts none = {0};
    double sumsq = 0, loss = 0;
    pml_status status = pmli_set_scale(s, err);
    if (status == PML_OK && batch->n_tokens > 0)
        status = pmli_run_micro(s, batch, err);
    if (status == PML_OK)
        status = look(s, &sumsq, &loss, err);
    if (status == PML_OK)
        status = pmli_run_segment(s, PML_SEGMENT_CLEAR, &none, err);
    failed[0] = !isfinite(sumsq);
    failed[1] = !isfinite(loss);
    if (status == PML_OK && pmli_is_shared(s))
        status = pml_comm_allreduce_f64(s->comm, failed, 2, err);
    return status;
}

pml_status pml_stepper_calibrate(pml_stepper *s, const pml_batch *batch, pml_error *err)
{
    if (s->scale.value > 0)
        return PML_OK;
    pml_loss_scale_search search = pml_loss_scale_search_begin();
    pml_status status = PML_OK;
    double failed[2] = {0}, flops = s->flops;
    while (status == PML_OK && failed[1] == 0 && pml_loss_scale_try(&search) > 0) {
        s->scale.value = pml_loss_scale_try(&search);
        status = attempt(s, batch, failed, err);
        pml_loss_scale_tried(&search, failed[0] == 0);
    }
    s->flops = flops;
    /* A loss that is not finite is no scale's fault: the step that comes will say so, and the one
     * after it looks for a scale again. */
    s->scale.value = failed[1] > 0 ? 1 : pml_loss_scale_found(&search);
    return status == PML_OK ? pmli_set_scale(s, err) : status;
}
