/* The table of rotary angles in the arena. It is made once, but for dynamic rope, whose angles
 * follow the length of what is read. */
#include <stdlib.h>

#include "stepper_impl.h"

static int32_t beyond(const pml_stepper *s, int32_t length)
{
    return length > s->spec.max_positions ? length : s->spec.max_positions;
}

pml_status pmli_rope_fit(pml_stepper *s, int32_t length, pml_error *err)
{
    bool dynamic = s->spec.rope.type == PML_ROPE_DYNAMIC;
    length = beyond(s, length);
    if (s->rope_made == length || (s->rope_made > 0 && !dynamic))
        return PML_OK;
    int32_t positions = s->program->positions;
    size_t bytes = (size_t)positions * (size_t)s->spec.head_dim * sizeof *s->angles;
    pml_status status = PML_OK;
    if (s->angles == NULL)
        s->angles = malloc(bytes);
    if (s->angles == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory for the table of angles");
    pml_rope_table(&s->spec, positions, length, s->angles);
    status = pmli_upload(s, s->program->rope, s->angles, bytes, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (!dynamic) {
        free(s->angles);
        s->angles = NULL;
    }
    if (status == PML_OK)
        s->rope_made = length;
    return status;
}

/* transformers keeps the angles of the longest micro-batch so far until one comes that is shorter
 * than max_position_embeddings (dynamic_rope_update). That is part of what a curve of its Trainer
 * shows, so training follows it; evaluating and sampling do not take part in it. */
pml_status pmli_rope_for_training(pml_stepper *s, int32_t length, pml_error *err)
{
    if (s->spec.rope.type != PML_ROPE_DYNAMIC)
        return PML_OK;
    if (length > s->rope_length)
        s->rope_length = beyond(s, length);
    else if (length < s->spec.max_positions)
        s->rope_length = s->spec.max_positions;
    return pmli_rope_fit(s, s->rope_length, err);
}
