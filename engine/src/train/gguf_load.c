/* A GGUF file's tensors as a stepper's weights: to see whether what was written is what was meant.
 */
#include <stdlib.h>
#include <string.h>

#include "pml/train/gguf.h"
#include "stepper_impl.h"

/* Hugging Face's order again. */
static void restore_order(const float *from, int64_t rows, int64_t width, int64_t hd, float *to)
{
    for (int64_t r = 0; r < rows; r++) {
        int64_t in = r % hd, target = r - in + in / 2 + in % 2 * (hd / 2);
        memcpy(to + target * width, from + r * width, (size_t)width * sizeof *to);
    }
}

static pml_status load_tensor(pml_stepper *s, const pml_parameter *p, const pml_gguf_tensor *t,
                              pml_error *err)
{
    size_t n = (size_t)(p->rows * p->cols);
    if (t->elements != n || t->size[0] != (uint64_t)p->cols)
        return PML_FAIL(err, PML_INVALID, "GGUF tensor '%s' does not have the shape of '%s'",
                        t->name, p->name);
    float *values = malloc(2 * n * sizeof *values);
    if (values == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to read '%s'", t->name);
    const float *data = values;
    const pml_tensor *place = &s->program->tensors[p->tensor];
    pml_status status = pml_gguf_to_f32(t, 0, n, values, err);
    if (status == PML_OK && pml_gguf_reorders(&s->spec, p->name)) {
        bool vector = p->rank == 1;
        restore_order(values, vector ? p->cols : p->rows, vector ? 1 : p->cols, s->spec.head_dim,
                      values + n);
        data = values + n;
    }
    int64_t pitch = pml_tensor_pitch(place);
    bool whole = p->rank == 1 || p->cols == pitch;
    float *to =
        (float *)pml_program_data(s->program, p->tensor, s->arena) + p->row * pitch + p->col;
    for (int64_t row = 0; status == PML_OK && row < (whole ? 1 : p->rows); row++)
        status = s->backend->upload(s->queue, to + row * pitch, data + row * p->cols,
                                    (whole ? n : (size_t)p->cols) * sizeof *data, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    free(values);
    return status;
}

pml_status pml_gguf_load(pml_stepper *s, const char *path, pml_error *err)
{
    pml_gguf *file = NULL;
    if (s->config.quant != PML_QUANT_NONE || s->config.dtype != PML_F32)
        return PML_FAIL(err, PML_UNSUPPORTED, "a GGUF file is read into float32 weights only");
    pml_status status = pml_gguf_open(path, &file, err);
    for (int32_t i = 0; status == PML_OK && i < s->program->n_parameters; i++) {
        const pml_parameter *p = &s->program->parameters[i];
        char name[96];
        if (p->adapter)
            continue;
        status = pmli_go_on(s, err);
        if (status == PML_OK)
            status = pml_gguf_name(p->name, name, sizeof name, err);
        const pml_gguf_tensor *t = status == PML_OK ? pml_gguf_find(file, name) : NULL;
        if (status == PML_OK)
            status = t != NULL ? load_tensor(s, p, t, err)
                               : PML_FAIL(err, PML_NOT_FOUND, "%s has no tensor '%s'", path, name);
    }
    pml_gguf_close(&file);
    return status;
}
