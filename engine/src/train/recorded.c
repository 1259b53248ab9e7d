/* Segments as graphs: what a backend records once is launched as one, without the host between its
 * ops. A graph holds addresses and sizes, so there is one for each padded batch size. */
#include <string.h>

#include "stepper_impl.h"

enum { TOKEN_UNIT = 64, LABEL_UNIT = 64, TOKEN_STEPS = 32, LABEL_STEPS = 16 };

static bool records(const pml_stepper *s)
{
    return s->backend->graph_begin != NULL;
}

/* Up to a multiple of limit / steps, itself rounded up to units; at most limit. */
static int32_t rounded_up(int32_t count, int32_t limit, int32_t steps, int32_t unit)
{
    int32_t step = (limit / steps + unit - 1) / unit * unit;
    step = step < unit ? unit : step;
    int64_t up = ((int64_t)count + step - 1) / step * step;
    return up < limit ? (int32_t)up : limit;
}

pml_counts pmli_bucket(const pml_stepper *s, pml_counts live)
{
    const pml_batch_limits *l = &s->program->limits;
    if (!records(s))
        return live;
    int32_t docs = 1;
    while (docs < live.docs)
        docs *= 2;
    pml_counts padded = {.tokens = rounded_up(live.tokens, l->tokens, TOKEN_STEPS, TOKEN_UNIT),
                         .docs = docs < l->docs ? docs : l->docs,
                         .labels = rounded_up(live.labels, l->labels, LABEL_STEPS, LABEL_UNIT),
                         .keys = live.keys,
                         .max_doc = l->max_doc};
    /* Documents no longer than the longest that fill what they could fill: none is shorter. */
    padded.equal = padded.docs == live.docs && padded.tokens == live.tokens &&
                   (int64_t)live.docs * l->max_doc == live.tokens;
    return padded;
}

/* The slot of these sizes, or the one unused for longest, emptied. */
static pmli_recorded *slot_of(pml_stepper *s, pml_segment segment, const pml_counts *counts)
{
    pmli_recorded *oldest = &s->recorded[0];
    for (int i = 0; i < PMLI_RECORDED; i++) {
        pmli_recorded *slot = &s->recorded[i];
        if (slot->last_used > 0 && slot->segment == segment &&
            memcmp(&slot->counts, counts, sizeof *counts) == 0)
            return slot;
        if (slot->last_used < oldest->last_used)
            oldest = slot;
    }
    if (oldest->graph != NULL)
        s->backend->graph_destroy(&oldest->graph);
    *oldest = (pmli_recorded){.segment = segment, .counts = *counts};
    return oldest;
}

static pml_status record(pml_stepper *s, pmli_recorded *slot, pml_error *err)
{
    pml_error at_end = PML_ERROR_INIT;
    pml_status status = s->backend->graph_begin(s->queue, err);
    if (status != PML_OK)
        return status;
    status = pmli_run_segment(s, slot->segment, &slot->counts, err);
    /* The end always closes the recording; what went wrong first is what is told. */
    pml_status ended = s->backend->graph_end(s->queue, &slot->graph, &at_end);
    if (status == PML_OK && ended != PML_OK) {
        *err = at_end;
        status = ended;
    }
    if (status != PML_OK && slot->graph != NULL)
        s->backend->graph_destroy(&slot->graph);
    return status;
}

pml_status pmli_run_recorded(pml_stepper *s, pml_segment segment, const pml_counts *counts,
                             pml_error *err)
{
    if (!records(s) || s->timing)
        return pmli_run_segment(s, segment, counts, err);
    pmli_recorded *slot = slot_of(s, segment, counts);
    slot->last_used = ++s->launches;
    /* A recording waits for what is compiled aside, though it be for batches of another size. */
    const bool waits = slot->graph == NULL && pml_stepper_is_compiling(s);
    if (!slot->is_warm || waits) {
        slot->is_warm |= !waits;
        return pmli_run_segment(s, segment, counts, err);
    }
    pml_status status = slot->graph == NULL ? record(s, slot, err) : PML_OK;
    return status == PML_OK ? s->backend->graph_launch(s->queue, slot->graph, err) : status;
}

void pmli_drop_recorded(pml_stepper *s)
{
    for (int i = 0; i < PMLI_RECORDED; i++)
        if (s->recorded[i].graph != NULL)
            s->backend->graph_destroy(&s->recorded[i].graph);
    memset(s->recorded, 0, sizeof s->recorded);
}
