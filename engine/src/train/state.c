/* The stepper's trained tensors as files see them, and what decides its bits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/json/json.h"
#include "pml/model/mark.h"
#include "snapshot.h"
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

static int32_t flat_tensor(const pml_program *p, pml_state state)
{
    const int32_t tensors[PML_STATE_COUNT] = {[PML_STATE_VALUE] = p->values,
                                              [PML_STATE_GRAD] = p->grads,
                                              [PML_STATE_EXP_AVG] = p->exp_avg,
                                              [PML_STATE_EXP_AVG_SQ] = p->exp_avg_sq,
                                              [PML_STATE_EXP_AVG_LARGEST] = p->exp_avg_largest,
                                              [PML_STATE_EXP_AVG_SQ_LARGEST] =
                                                  p->exp_avg_sq_largest,
                                              [PML_STATE_EXP_AVG_CODES] = p->exp_avg_codes,
                                              [PML_STATE_EXP_AVG_SQ_CODES] = p->exp_avg_sq_codes};
    return tensors[state];
}

bool pml_stepper_has(const pml_stepper *s, pml_state state)
{
    return flat_tensor(s->program, state) >= 0;
}

pml_dtype pml_state_dtype(pml_state state)
{
    return state == PML_STATE_EXP_AVG_CODES || state == PML_STATE_EXP_AVG_SQ_CODES ? PML_U8
                                                                                   : PML_F32;
}

/* A tensor's rows lie one behind the other, but for a B whose rank is not the greatest of its
 * stack. */
static int64_t pitch_of(const pml_program *program, const pml_parameter *p)
{
    return p->rank == 1 ? p->cols : program->tensors[p->tensor].cols;
}

/* Where a tensor's part of a state buffer lies: `rows` of `cols` elements, `pitch` apart, from
 * element `at` on. */
typedef struct part {
    int64_t at, rows, cols, pitch;
} part;

/* Its moments are floats or codes, never both: of the other it has nothing. */
static part part_of(const pml_program *program, pml_state state, const pml_parameter *p)
{
    part whole = {p->at, p->rows, p->cols, pitch_of(program, p)};
    if (state == PML_STATE_VALUE || state == PML_STATE_GRAD)
        return whole;
    const pml_range *r = pml_program_range(program, p->at);
    bool of_codes = state != PML_STATE_EXP_AVG && state != PML_STATE_EXP_AVG_SQ;
    if (r->codes != of_codes)
        return (part){0};
    whole.at = r->state + p->at - r->at;
    if (!of_codes || pml_state_dtype(state) == PML_U8)
        return whole;
    int64_t span = (p->rows - 1) * whole.pitch + p->cols;
    int64_t blocks = (span + PML_ADAMW_8BIT_BLOCK - 1) / PML_ADAMW_8BIT_BLOCK;
    return (part){r->block + (p->at - r->at) / PML_ADAMW_8BIT_BLOCK, 1, blocks, blocks};
}

size_t pmli_state_elements(const pml_program *program, pml_state state, const pml_parameter *p)
{
    if (flat_tensor(program, state) < 0)
        return 0;
    part whole = part_of(program, state, p);
    return (size_t)(whole.rows * whole.cols);
}

const pml_program *pmli_stepper_program(const pml_stepper *s)
{
    return s->program;
}

size_t pml_stepper_state_elements(const pml_stepper *s, pml_state state, int index)
{
    return pmli_state_elements(s->program, state, trained_at(s, index));
}

size_t pml_stepper_state_bytes(const pml_stepper *s, pml_state state)
{
    size_t elements = 0;
    for (int i = 0; i < s->n_trained; i++)
        elements += pml_stepper_state_elements(s, state, i);
    return elements * pml_dtype_size(pml_state_dtype(state));
}

/* One copy, or one for each row. */
static pml_status copy_part(pml_stepper *s, const part *whole, size_t size, char *buffer,
                            char *host, bool to_device, pml_error *err)
{
    bool dense = whole->pitch == whole->cols;
    int64_t rows = dense && whole->rows > 0 ? 1 : whole->rows;
    size_t n = (size_t)(dense ? whole->rows * whole->cols : whole->cols) * size;
    pml_status status = PML_OK;
    for (int64_t row = 0; status == PML_OK && row < rows; row++) {
        char *device = buffer + (size_t)(whole->at + row * whole->pitch) * size;
        char *mine = host + (size_t)(row * whole->cols) * size;
        status = to_device ? s->backend->upload(s->queue, device, mine, n, err)
                           : s->backend->download(s->queue, mine, device, n, err);
    }
    return status;
}

static pml_status copy_all(pml_stepper *s, pml_state state, char *host, bool to_device,
                           pml_error *err)
{
    if (!pml_stepper_has(s, state))
        return PML_FAIL(err, PML_INVALID, "the optimizer has no such buffer");
    char *buffer = pml_program_data(s->program, flat_tensor(s->program, state), s->arena);
    size_t size = pml_dtype_size(pml_state_dtype(state));
    pml_status status = PML_OK;
    for (int i = 0; status == PML_OK && i < s->n_trained; i++) {
        part whole = part_of(s->program, state, trained_at(s, i));
        status = copy_part(s, &whole, size, buffer, host, to_device, err);
        host += (size_t)(whole.rows * whole.cols) * size;
    }
    if (status == PML_OK && state == PML_STATE_VALUE)
        status = pmli_round_values(s, err);
    return status == PML_OK ? s->backend->sync(s->queue, err) : status;
}

pml_status pml_stepper_read(pml_stepper *s, pml_state state, void *host, pml_error *err)
{
    return copy_all(s, state, host, false, err);
}

pml_status pml_stepper_write(pml_stepper *s, pml_state state, const void *host, pml_error *err)
{
    return copy_all(s, state, (char *)(uintptr_t)host, true, err); /* only read */
}

static bool has_frozen_in(const pml_program *p, unsigned dtypes)
{
    for (int32_t i = 0; i < p->n_tensors; i++)
        if (p->tensors[i].cause == PML_CAUSE_WEIGHTS && (dtypes >> p->tensors[i].dtype & 1) != 0)
            return true;
    return false;
}

pml_status pml_stepper_identity(pml_stepper *s, char *json, size_t capacity, pml_error *err)
{
    pml_device_info info;
    pml_json_writer *w = NULL;
    char *text = NULL, model[PML_MARK_HEX];
    size_t size = 0;
    pml_status status = s->backend->info(s->device, &info, err);
    if (status == PML_OK)
        status = pml_model_mark(s->config.model, model, err);
    if (status == PML_OK)
        status = pml_json_writer_new(&w, err);
    if (status != PML_OK)
        return status;
    pml_json_put_string(w, "model", model);
    pml_json_put_string(w, "backend", s->backend->name);
    pml_json_put_string(w, "device", info.name);
    pml_json_put_string(w, "libraries", info.libraries);
    char instructions[sizeof info.instructions + sizeof info.narrow];
    snprintf(instructions, sizeof instructions, "%s%s", info.instructions,
             has_frozen_in(s->program, s->backend->frozen) ? info.narrow : "");
    pml_json_put_string(w, "instructions", instructions);
    pml_json_put_int(w, "threads", info.threads);
    pml_json_put_int(w, "workers", s->comm != NULL ? pml_comm_world(s->comm) : 1);
    pml_json_put_string(w, "dtype", pml_dtype_name(s->config.dtype));
    pml_json_put_bool(w, "deterministic", s->config.deterministic);
    pml_json_put_int(w, "recompute", s->plan.choices.recompute);
    pml_json_put_int(w, "recompute_layers", s->plan.choices.recompute_layers);
    pml_json_put_int(w, "head_chunk", s->plan.choices.head_chunk);
    pml_json_put_int(w, "pieces", s->plan.choices.pieces);
    if (s->plan.choices.moments_8bit)
        pml_json_put_bool(w, "moments_8bit", true);
    if (s->plan.choices.offload_layers > 0) {
        pml_json_put_int(w, "offload", s->plan.choices.offload);
        pml_json_put_int(w, "offload_layers", s->plan.choices.offload_layers);
    }
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
