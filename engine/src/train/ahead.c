/* What a backend compiles at an op's first use, compiled on a thread of its own while weights are
 * on their way and steps are made: cuDNN's attention takes more than half a second a kernel where
 * the driver does not have it kept, longer than a small model loads, and than a step takes. */
#include "stepper_impl.h"

static void *compile(void *user)
{
    pml_stepper *s = user;
    const pml_program *p = s->program;
    for (int i = 0; i < s->n_ahead; i++)
        for (int32_t n = p->segments[PML_SEGMENT_MICRO].first;
             n < p->segments[PML_SEGMENT_MICRO].end && !atomic_load(&s->ahead_enough); n++) {
            pml_error none = PML_ERROR_INIT; /* what fails here is told when the op itself fails */
            pml_op_args args;
            if (p->nodes[n].op != PML_OP_attention && p->nodes[n].op != PML_OP_attention_bwd)
                continue;
            pml_program_bind(p, &p->nodes[n], s->arena, &s->ahead_for[i], &args);
            s->backend->prepare(s->device, p->nodes[n].op, &args, &none);
        }
    s->backend->prepares(s->device, false);
    atomic_store(&s->ahead_done, true);
    return NULL;
}

/* Of s->ahead_for, with the last thread's work joined. */
static void begin(pml_stepper *s)
{
    atomic_store(&s->ahead_enough, false);
    atomic_store(&s->ahead_done, false);
    s->backend->prepares(s->device, true); /* before the next op, not when the thread begins */
    s->is_ahead = pthread_create(&s->ahead, NULL, compile, s) == 0;
    if (!s->is_ahead)
        s->backend->prepares(s->device, false);
}

/* Attention's shape is decided by the slots for documents, of which there are few numbers
 * (pmli_bucket), and whether they are equal: a bit for each. */
static uint64_t bit_of(const pml_counts *counts)
{
    int doublings = 0;
    while ((int64_t)1 << doublings < counts->docs)
        doublings++;
    return (uint64_t)1 << (2 * doublings + (counts->equal != 0));
}

static void want(pml_stepper *s, pml_counts counts)
{
    s->ahead_for[s->n_ahead++] = counts;
    s->asked_for |= bit_of(&counts);
}

/* How many documents a batch will have nobody knows yet: first it is all that were planned for,
 * then the next smaller size. A wrong guess costs nothing but the thread's time. */
void pmli_ahead_begin(pml_stepper *s)
{
    if (s->backend->prepare == NULL)
        return;
    const pml_counts most = pml_program_capacity(s->program, PML_SEGMENT_MICRO);
    pml_counts fewer = most;
    for (fewer.docs = 1; 2 * fewer.docs < most.docs;)
        fewer.docs *= 2;
    s->n_ahead = 0;
    want(s, pmli_bucket(s, most));
    /* Of full rows all batches but the last have as many. */
    if ((int64_t)most.docs * most.max_doc > most.tokens)
        want(s, pmli_bucket(s, fewer));
    begin(s);
}

void pmli_ahead_meet(pml_stepper *s, const pml_counts *counts)
{
    if (s->backend->prepare == NULL || (s->asked_for & bit_of(counts)) != 0 ||
        pml_stepper_is_compiling(s))
        return;
    pmli_ahead_end(s);
    s->n_ahead = 0;
    want(s, *counts);
    begin(s);
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
