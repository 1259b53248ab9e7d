/* Segments as graphs: what a backend records once is launched as one, without the host between its
 * ops. A graph holds addresses and sizes, so there is one for each padded batch size that comes
 * often, as far as the memory goes that the plan has for them. The others run op by op. */
#include <string.h>

#include "stepper_impl.h"

enum { TOKEN_UNIT = 64, LABEL_UNIT = 64, TOKEN_STEPS = 32, LABEL_STEPS = 16 };

/* Launches after which uses count half; and how much more often who drops graphs is used. */
enum { LATELY = 256, MORE_OFTEN = 2 };

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

/* The slot of these sizes, or of those without a graph the one unused for longest, emptied: which
 * graphs go is make_room's to say, and they have no room for as many as there are slots. */
static pmli_recorded *slot_of(pml_stepper *s, pml_segment segment, const pml_counts *counts)
{
    pmli_recorded *oldest = NULL;
    for (int i = 0; i < PMLI_RECORDED; i++) {
        pmli_recorded *slot = &s->recorded[i];
        if (slot->last_used > 0 && slot->segment == segment &&
            memcmp(&slot->counts, counts, sizeof *counts) == 0)
            return slot;
        if (slot->graph == NULL && (oldest == NULL || slot->last_used < oldest->last_used))
            oldest = slot;
    }
    if (oldest == NULL) { /* a backend whose graphs take next to nothing */
        oldest = &s->recorded[s->launches % PMLI_RECORDED];
        s->backend->graph_destroy(&oldest->graph);
    }
    *oldest = (pmli_recorded){.segment = segment, .counts = *counts};
    return oldest;
}

/* What graphs may still take. */
static size_t room_for_graphs(const pml_stepper *s)
{
    size_t room = pml_plan_graphs(s->backend);
    for (int i = 0; i < PMLI_RECORDED; i++)
        if (s->recorded[i].graph != NULL)
            room -= s->recorded[i].bytes < room ? s->recorded[i].bytes : room;
    return room;
}

/* What the slot's graph takes; until it was recorded, what that of another size of its segment
 * takes is the best guess. 0: there is none. */
static size_t wanted_by(const pml_stepper *s, const pmli_recorded *slot)
{
    size_t wanted = slot->bytes;
    for (int i = 0; i < PMLI_RECORDED && wanted == 0; i++)
        if (s->recorded[i].graph != NULL && s->recorded[i].segment == slot->segment)
            wanted = s->recorded[i].bytes;
    return wanted;
}

/* How many graphs would go for the slot's, those used least; -1: they are used too often to be
 * recorded again for it. */
static int who_goes(const pml_stepper *s, const pmli_recorded *slot, bool *goes)
{
    const size_t wanted = wanted_by(s, slot);
    size_t room = room_for_graphs(s);
    int many = 0;
    for (int64_t uses = 0; room < wanted; many++) {
        int least = -1;
        for (int i = 0; i < PMLI_RECORDED; i++)
            if (s->recorded[i].graph != NULL && !goes[i] &&
                (least < 0 || s->recorded[i].uses < s->recorded[least].uses))
                least = i;
        if (least < 0 || MORE_OFTEN * (uses += s->recorded[least].uses) >= slot->uses)
            return -1;
        goes[least] = true;
        room += s->recorded[least].bytes;
    }
    return many;
}

/* Whether to record. Nothing goes for a guess: what a graph takes is told by recording it, too. */
static pml_status make_room(pml_stepper *s, const pmli_recorded *slot, bool *made, pml_error *err)
{
    bool goes[PMLI_RECORDED] = {false};
    const int many = who_goes(s, slot, goes);
    *made = many >= 0;
    if (many <= 0 || slot->bytes == 0)
        return PML_OK;
    pml_status status = s->backend->sync(s->queue, err); /* a graph under way keeps its memory */
    for (int i = 0; i < PMLI_RECORDED && status == PML_OK; i++)
        if (goes[i])
            s->backend->graph_destroy(&s->recorded[i].graph);
    return status;
}

/* Without a graph where it would not fit after all. */
static pml_status record(pml_stepper *s, pmli_recorded *slot, pml_error *err)
{
    pml_error at_end = PML_ERROR_INIT;
    pml_status status = s->backend->graph_begin(s->queue, err);
    if (status != PML_OK)
        return status;
    status = pmli_run_segment(s, slot->segment, &slot->counts, err);
    /* The end always closes the recording; what went wrong first is what is told. */
    pml_status ended =
        s->backend->graph_end(s->queue, room_for_graphs(s), &slot->graph, &slot->bytes, &at_end);
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
    slot->uses++;
    for (int i = 0; i < PMLI_RECORDED && s->launches % LATELY == 0; i++)
        s->recorded[i].uses /= 2;
    /* A recording waits for what is compiled aside, though it be for batches of another size. */
    const bool waits = slot->graph == NULL && pml_stepper_is_compiling(s);
    if (!slot->is_warm || waits) {
        slot->is_warm |= !waits;
        return pmli_run_segment(s, segment, counts, err);
    }
    bool room = false;
    pml_status status = slot->graph == NULL ? make_room(s, slot, &room, err) : PML_OK;
    if (status == PML_OK && room)
        status = record(s, slot, err);
    if (status != PML_OK)
        return status;
    return slot->graph != NULL ? s->backend->graph_launch(s->queue, slot->graph, err)
                               : pmli_run_segment(s, segment, counts, err);
}

void pmli_drop_recorded(pml_stepper *s)
{
    for (int i = 0; i < PMLI_RECORDED; i++)
        if (s->recorded[i].graph != NULL)
            s->backend->graph_destroy(&s->recorded[i].graph);
    memset(s->recorded, 0, sizeof s->recorded);
}
