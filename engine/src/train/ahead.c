/* What a backend compiles at an op's first use, compiled on a thread of its own while weights are
 * on their way and the first steps are made: cuDNN's attention takes more than half a second a
 * kernel where the driver does not have it kept, longer than a small model loads. */
#include "stepper_impl.h"

/* Attention's shapes depend on how many documents a batch has (pmli_bucket), which nobody knows
 * yet: first it is all that were planned for, then the next smaller size. A wrong guess costs
 * nothing but the thread's time; what fails here is told when the op itself fails. */
static void *compile(void *user)
{
    pml_stepper *s = user;
    const pml_program *p = s->program;
    pml_counts most = pml_program_capacity(p, PML_SEGMENT_MICRO), fewer = most;
    for (fewer.docs = 1; 2 * fewer.docs < most.docs;)
        fewer.docs *= 2;
    for (int guess = 0; guess < 2; guess++) {
        const pml_counts counts = pmli_bucket(s, guess == 0 ? most : fewer);
        for (int32_t n = p->segments[PML_SEGMENT_MICRO].first;
             n < p->segments[PML_SEGMENT_MICRO].end && !atomic_load(&s->ahead_enough); n++) {
            pml_error none = PML_ERROR_INIT;
            pml_op_args args;
            if (p->nodes[n].op != PML_OP_attention && p->nodes[n].op != PML_OP_attention_bwd)
                continue;
            pml_program_bind(p, &p->nodes[n], s->arena, &counts, &args);
            s->backend->prepare(s->device, p->nodes[n].op, &args, &none);
        }
        if ((int64_t)most.docs * most.max_doc <= most.tokens)
            break; /* full rows: every batch but the last has as many */
    }
    s->backend->prepares(s->device, false);
    atomic_store(&s->ahead_done, true);
    return NULL;
}

void pmli_ahead_begin(pml_stepper *s)
{
    atomic_store(&s->ahead_enough, false);
    atomic_store(&s->ahead_done, false);
    if (s->backend->prepare == NULL)
        return;
    s->backend->prepares(s->device, true); /* before the first op, not when the thread begins */
    s->is_ahead = pthread_create(&s->ahead, NULL, compile, s) == 0;
    if (!s->is_ahead)
        s->backend->prepares(s->device, false);
}

bool pml_stepper_is_compiling(const pml_stepper *s)
{
    return s->is_ahead && !atomic_load(&s->ahead_done);
}

void pmli_ahead_end(pml_stepper *s)
{
    if (!s->is_ahead)
        return;
    atomic_store(&s->ahead_enough, true);
    pthread_join(s->ahead, NULL);
    s->is_ahead = false;
}
