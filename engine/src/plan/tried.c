/* Candidates of a search, by their choices: a table of twice as many places as there are plans,
 * open, the next place where one is taken. */
#include <stdlib.h>
#include <string.h>

#include "build.h"
#include "search.h"

struct pmli_tried {
    pml_plan *plans; /* pieces 0: free */
    size_t places, n;
    pml_program *spare;
};

enum { FIRST_PLACES = 256 };

static size_t place_of(const pmli_tried *t, const pml_plan_choices *c)
{
    uint64_t hash = 0xcbf29ce484222325U; /* FNV-1a over words */
    const int32_t words[] = {c->recompute, c->recompute_layers, c->head_chunk,
                             c->pieces,    c->moments_8bit,     c->unpacked,
                             c->offload,   c->offload_layers};
    _Static_assert(sizeof words == sizeof *c, "every choice");
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        hash = (hash ^ (uint32_t)words[i]) * 0x100000001b3U;
    size_t at = (size_t)(hash ^ hash >> 32) & (t->places - 1);
    while (t->plans[at].choices.pieces != 0 && memcmp(&t->plans[at].choices, c, sizeof *c) != 0)
        at = (at + 1) & (t->places - 1);
    return at;
}

static pml_status make_room(pmli_tried *t, pml_error *err)
{
    if (2 * (t->n + 1) <= t->places)
        return PML_OK;
    pmli_tried wider = {.places = 2 * t->places, .n = t->n, .spare = t->spare};
    wider.plans = calloc(wider.places, sizeof *wider.plans);
    if (wider.plans == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory to compare %zu plans", t->n);
    for (size_t i = 0; i < t->places; i++)
        if (t->plans[i].choices.pieces != 0)
            wider.plans[place_of(&wider, &t->plans[i].choices)] = t->plans[i];
    free(t->plans);
    *t = wider;
    return PML_OK;
}

pml_status pmli_tried_new(pmli_tried **tried, pml_error *err)
{
    *tried = calloc(1, sizeof **tried);
    if (*tried != NULL) {
        (*tried)->places = FIRST_PLACES;
        (*tried)->plans = calloc(FIRST_PLACES, sizeof *(*tried)->plans);
        if ((*tried)->plans != NULL)
            return PML_OK;
    }
    pmli_tried_destroy(tried);
    return PML_FAIL(err, PML_NO_MEMORY, "no host memory to compare plans");
}

void pmli_tried_destroy(pmli_tried **tried)
{
    if (*tried == NULL)
        return;
    free((*tried)->plans);
    pml_program_destroy(&(*tried)->spare);
    free(*tried);
    *tried = NULL;
}

pml_program **pmli_tried_spare(pmli_tried *tried)
{
    return &tried->spare;
}

pml_status pmli_estimate(const pmli_search *s, const pml_batch_limits *limits,
                         const pml_plan_choices *choices, pml_plan *plan, pml_error *err)
{
    if (s->tried == NULL)
        return pmli_try_plan(s, limits, choices, true, plan, err);
    pml_status status = make_room(s->tried, err);
    if (status != PML_OK)
        return status;
    size_t at = place_of(s->tried, choices);
    pml_plan *known = &s->tried->plans[at];
    if (known->choices.pieces == 0) {
        status = pmli_try_plan(s, limits, choices, true, plan, err);
        if (status != PML_OK)
            return status;
        *known = *plan;
        s->tried->n++;
    }
    *plan = *known;
    return PML_OK;
}
