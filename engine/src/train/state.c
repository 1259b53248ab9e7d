/* The stepper's trained tensors as files see them, and what decides its bits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/json/json.h"
#include "stepper_impl.h"

static const pml_parameter *trained_at(const pml_stepper *s, int index)
{
    return &s->program->parameters[s->trained[index]];
}

int pml_stepper_trainable_count(const pml_stepper *s)
{
    return s->n_trained;
}

void pml_stepper_trainable(const pml_stepper *s, int index, const char **name, int64_t *rows,
                           int64_t *cols, int *n_dims)
{
    const pml_parameter *p = trained_at(s, index);
    *name = p->name;
    *rows = p->rows;
    *cols = p->cols;
    if (n_dims != NULL)
        *n_dims = p->rank;
}

size_t pml_stepper_state_floats(const pml_stepper *s)
{
    return s->trained_floats;
}

static int32_t flat_tensor(const pml_stepper *s, pml_state state)
{
    const pml_program *p = s->program;
    const int32_t tensors[] = {[PML_STATE_VALUE] = p->values,
                               [PML_STATE_GRAD] = p->grads,
                               [PML_STATE_EXP_AVG] = p->exp_avg,
                               [PML_STATE_EXP_AVG_SQ] = p->exp_avg_sq};
    return tensors[state];
}

bool pml_stepper_has(const pml_stepper *s, pml_state state)
{
    return flat_tensor(s, state) >= 0;
}

/* NULL with a reason where the optimizer has none. */
static float *flat_buffer(const pml_stepper *s, pml_state state, pml_error *err)
{
    if (pml_stepper_has(s, state))
        return pml_program_data(s->program, flat_tensor(s, state), s->arena);
    PML_FAIL(err, PML_INVALID, "the optimizer has no such buffer");
    return NULL;
}

/* A tensor's rows lie one behind the other, but for a B whose rank is not the greatest of its
 * stack. */
static int64_t pitch_of(const pml_stepper *s, const pml_parameter *p)
{
    return p->rank == 1 ? p->cols : s->program->tensors[p->tensor].cols;
}

/* One copy, or one for each row. */
static pml_status copy_parameter(pml_stepper *s, const pml_parameter *p, float *flat, float *host,
                                 bool to_device, pml_error *err)
{
    int64_t pitch = pitch_of(s, p);
    bool whole = pitch == p->cols;
    int64_t rows = whole ? 1 : p->rows;
    size_t n = (size_t)(whole ? p->rows * p->cols : p->cols) * sizeof *host;
    pml_status status = PML_OK;
    for (int64_t row = 0; status == PML_OK && row < rows; row++) {
        float *device = flat + p->at + row * pitch, *mine = host + row * p->cols;
        status = to_device ? s->backend->upload(s->queue, device, mine, n, err)
                           : s->backend->download(s->queue, mine, device, n, err);
    }
    return status;
}

static pml_status copy_all(pml_stepper *s, pml_state state, float *host, bool to_device,
                           pml_error *err)
{
    float *flat = flat_buffer(s, state, err);
    pml_status status = flat != NULL ? PML_OK : PML_INVALID;
    for (int i = 0; status == PML_OK && i < s->n_trained; i++) {
        const pml_parameter *p = trained_at(s, i);
        status = copy_parameter(s, p, flat, host, to_device, err);
        host += p->rows * p->cols;
    }
    if (status == PML_OK && state == PML_STATE_VALUE)
        status = pmli_round_values(s, err);
    return status == PML_OK ? s->backend->sync(s->queue, err) : status;
}

pml_status pml_stepper_read(pml_stepper *s, pml_state state, float *host, pml_error *err)
{
    return copy_all(s, state, host, false, err);
}

pml_status pml_stepper_write(pml_stepper *s, pml_state state, const float *host, pml_error *err)
{
    return copy_all(s, state, (float *)(uintptr_t)host, true, err); /* only read */
}

pml_status pml_stepper_identity(pml_stepper *s, char *json, size_t capacity, pml_error *err)
{
    pml_device_info info;
    pml_json_writer *w = NULL;
    char *text = NULL;
    size_t size = 0;
    pml_status status = s->backend->info(s->device, &info, err);
    if (status == PML_OK)
        status = pml_json_writer_new(&w, err);
    if (status != PML_OK)
        return status;
    pml_json_put_string(w, "backend", s->backend->name);
    pml_json_put_string(w, "device", info.name);
    pml_json_put_string(w, "libraries", info.libraries);
    pml_json_put_string(w, "instructions", info.instructions);
    pml_json_put_int(w, "threads", info.threads);
    pml_json_put_int(w, "workers", s->comm != NULL ? pml_comm_world(s->comm) : 1);
    pml_json_put_string(w, "dtype", pml_dtype_name(s->config.dtype));
    pml_json_put_bool(w, "deterministic", s->config.deterministic);
    pml_json_put_int(w, "recompute", s->plan.choices.recompute);
    pml_json_put_int(w, "recompute_layers", s->plan.choices.recompute_layers);
    pml_json_put_int(w, "head_chunk", s->plan.choices.head_chunk);
    pml_json_put_int(w, "pieces", s->plan.choices.pieces);
    status = pml_json_writer_finish(w, 0, &text, &size, err);
    if (status == PML_OK && size >= capacity)
        status = PML_FAIL(err, PML_INVALID, "identity needs %zu bytes, the buffer has %zu",
                          size + 1, capacity);
    if (status == PML_OK)
        memcpy(json, text, size + 1);
    free(text);
    pml_json_writer_destroy(&w);
    return status;
}
