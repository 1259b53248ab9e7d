/* Snapshot: the trained tensors in host memory, taken between two steps. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapshot.h"

static void list_entries(pml_snapshot *s, const pml_program *program)
{
    pmli_entry *e = s->entries;
    for (int32_t i = 0; i < program->n_parameters; i++) {
        const pml_parameter *p = &program->parameters[i];
        if (!p->trained)
            continue;
        snprintf(e->name, sizeof e->name, "%s", p->name);
        e->n_dims = p->rank;
        e->shape[0] = p->rank == 1 ? p->cols : p->rows;
        e->shape[1] = p->cols;
        for (int k = 0; k < PMLI_SNAPSHOT_STATES; k++) {
            e->elements[k] = pmli_state_elements(program, pmli_snapshot_states[k], p);
            s->bytes[k] +=
                e->elements[k] * pml_dtype_size(pml_state_dtype(pmli_snapshot_states[k]));
        }
        e++;
    }
}

static pml_status make_frame(const pml_program *program, const pml_train_config *config,
                             pml_snapshot **snapshot, pml_error *err)
{
    pml_snapshot *s = *snapshot = calloc(1, sizeof *s);
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory for a snapshot");
    s->config = *config;
    s->layers = program->spec.layers;
    for (int32_t i = 0; i < program->n_parameters; i++)
        s->n_entries += program->parameters[i].trained;
    s->entries = calloc((size_t)s->n_entries, sizeof *s->entries);
    if (s->entries == NULL) {
        pml_snapshot_destroy(snapshot);
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory for a snapshot");
    }
    list_entries(s, program);
    return PML_OK;
}

pml_status pml_snapshot_frame(const pml_stepper *stepper, const pml_train_config *config,
                              pml_snapshot **snapshot, pml_error *err)
{
    return make_frame(pmli_stepper_program(stepper), config, snapshot, err);
}

/* Names, shapes and their order are the same for every batch, so the least of one will do. */
pml_status pml_snapshot_frame_left(const pml_train_config *config, bool moments_8bit,
                                   const pml_backend *backend, pml_snapshot **snapshot,
                                   pml_error *err)
{
    const pml_plan_choices choices = {.head_chunk = 1, .pieces = 1, .moments_8bit = moments_8bit};
    pml_train_config settled = *config;
    pml_model_spec spec;
    pml_program *program = NULL;
    pml_plan_settle(&choices, &settled);
    const pml_program_options options = {
        .spec = &spec,
        .config = &settled,
        .limits = {.tokens = 1, .docs = 1, .labels = 1, .max_doc = 1},
        .backend = backend,
        .choices = choices};
    *snapshot = NULL;
    pml_status status = pml_model_spec_load(config->model, &spec, err);
    if (status == PML_OK)
        status = pml_program_build(&options, &program, err);
    if (status == PML_OK)
        status = make_frame(program, &settled, snapshot, err);
    pml_program_destroy(&program);
    return status;
}

size_t pml_snapshot_frame_bytes(const pml_snapshot *frame)
{
    size_t bytes = 0;
    for (int i = 0; i < PMLI_SNAPSHOT_STATES; i++)
        bytes += frame->bytes[i];
    return bytes;
}

void pml_snapshot_view(pml_snapshot *s, const pml_train_state *state, void *memory)
{
    char *at = memory;
    s->state = *state;
    for (int i = 0; i < PMLI_SNAPSHOT_STATES; i++)
        if (s->bytes[i] > 0) {
            s->buffers[i] = at;
            at += s->bytes[i];
        }
}

pml_status pml_snapshot_new(const pml_stepper *stepper, const pml_train_config *config,
                            pml_snapshot **snapshot, pml_error *err)
{
    static const pml_train_state nothing;
    size_t bytes = pml_snapshot_bytes(stepper);
    pml_status status = pml_snapshot_frame(stepper, config, snapshot, err);
    if (status != PML_OK)
        return status;
    pml_snapshot *s = *snapshot;
    s->own = malloc(bytes);
    if (s->own == NULL) {
        pml_snapshot_destroy(snapshot);
        return PML_FAIL(err, PML_NO_MEMORY, "a snapshot needs %zu MiB of host memory", bytes >> 20);
    }
    memset(s->own, 0, bytes); /* what is only promised would be taken during the first checkpoint */
    pml_snapshot_view(s, &nothing, s->own);
    return PML_OK;
}

void pml_snapshot_destroy(pml_snapshot **snapshot)
{
    if (snapshot == NULL || *snapshot == NULL)
        return;
    free((*snapshot)->own);
    free((*snapshot)->entries);
    free(*snapshot);
    *snapshot = NULL;
}

pml_status pml_snapshot_take(pml_snapshot *snapshot, pml_stepper *stepper,
                             const pml_train_state *state, pml_error *err)
{
    pml_status status = PML_OK;
    for (int i = 0; status == PML_OK && i < PMLI_SNAPSHOT_STATES; i++)
        if (snapshot->buffers[i] != NULL)
            status = pml_stepper_read(stepper, pmli_snapshot_states[i], snapshot->buffers[i], err);
    snapshot->state = *state;
    snapshot->state.applied = pml_stepper_applied(stepper);
    snapshot->state.rope_length = pml_stepper_rope_length(stepper);
    snapshot->state.loss_scale = pml_stepper_loss_scale(stepper);
    return status;
}

/* Where the stepper stands. A run that has changed its dtype finds the loss scale of its own. */
static pml_status seek(pml_stepper *stepper, const pml_train_state *state, pml_error *err)
{
    pml_stepper_seek(stepper, state->step, state->applied, state->rope_length);
    bool same = state->loss_scale.dynamic == pml_stepper_loss_scale(stepper).dynamic;
    return same ? pml_stepper_set_loss_scale(stepper, state->loss_scale, err) : PML_OK;
}

pml_status pml_snapshot_restore(const pml_snapshot *snapshot, pml_stepper *stepper, pml_error *err)
{
    pml_status status = PML_OK;
    bool same = pml_stepper_trainable_count(stepper) == snapshot->n_entries;
    for (int i = 0; i < PMLI_SNAPSHOT_STATES; i++)
        same =
            same && pml_stepper_state_bytes(stepper, pmli_snapshot_states[i]) == snapshot->bytes[i];
    if (!same)
        return PML_FAIL(err, PML_INVALID, "the snapshot is of another model, adapter or optimizer");
    for (int i = 0; status == PML_OK && i < PMLI_SNAPSHOT_STATES; i++)
        if (snapshot->buffers[i] != NULL)
            status = pml_stepper_write(stepper, pmli_snapshot_states[i], snapshot->buffers[i], err);
    return status == PML_OK ? seek(stepper, &snapshot->state, err) : status;
}

size_t pml_snapshot_bytes(const pml_stepper *stepper)
{
    size_t bytes = 0;
    for (int i = 0; i < PMLI_SNAPSHOT_STATES; i++)
        bytes += pml_stepper_state_bytes(stepper, pmli_snapshot_states[i]);
    return bytes;
}

pml_status pml_snapshot_put(pml_stepper *stepper, const pml_train_state *state,
                            pml_train_state *whole, void *memory, pml_error *err)
{
    char *at = memory;
    pml_status status = PML_OK;
    for (int i = 0; status == PML_OK && i < PMLI_SNAPSHOT_STATES; i++)
        if (pml_stepper_has(stepper, pmli_snapshot_states[i])) {
            status = pml_stepper_read(stepper, pmli_snapshot_states[i], at, err);
            at += pml_stepper_state_bytes(stepper, pmli_snapshot_states[i]);
        }
    *whole = *state;
    whole->applied = pml_stepper_applied(stepper);
    whole->rope_length = pml_stepper_rope_length(stepper);
    whole->loss_scale = pml_stepper_loss_scale(stepper);
    return status;
}

pml_status pml_snapshot_get(pml_stepper *stepper, const pml_train_state *state, const void *memory,
                            size_t bytes, pml_error *err)
{
    const char *at = memory;
    pml_status status = PML_OK;
    if (bytes != pml_snapshot_bytes(stepper))
        return PML_FAIL(err, PML_INVALID, "the snapshot is of another model or adapter");
    for (int i = 0; status == PML_OK && i < PMLI_SNAPSHOT_STATES; i++)
        if (pml_stepper_has(stepper, pmli_snapshot_states[i])) {
            status = pml_stepper_write(stepper, pmli_snapshot_states[i], at, err);
            at += pml_stepper_state_bytes(stepper, pmli_snapshot_states[i]);
        }
    return status == PML_OK ? seek(stepper, state, err) : status;
}

const pml_train_state *pml_snapshot_state(const pml_snapshot *snapshot)
{
    return &snapshot->state;
}
