#include "keeper.h"

#include <stdlib.h>

#include "pml/base/clock.h"
#include "pml/train/slots.h"

static const double least_seconds = 1, ages = 200;

struct keeper {
    const job_kind *kind;
    job *j;
    pml_slots *slots;
    int64_t step, command; /* of the last one; -1: none */
    double next_at;
    pml_train_state whole;
};

pml_status keeper_new(const job_kind *kind, job *j, int fd, size_t bytes, keeper **out,
                      pml_error *err)
{
    keeper *k = *out = calloc(1, sizeof *k);
    if (k == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the keeper of snapshots");
    k->kind = kind;
    k->j = j;
    k->step = -1;
    pml_status status = pml_slots_open(fd, bytes, &k->slots, err);
    if (status != PML_OK)
        keeper_destroy(out);
    return status;
}

void keeper_destroy(keeper **out)
{
    keeper *k = *out;
    *out = NULL;
    if (k == NULL)
        return;
    pml_slots_close(&k->slots);
    free(k);
}

pml_status keeper_keep(keeper *k, const pml_train_state *state, bool at_once, pml_error *err)
{
    double begin = pml_clock_monotonic();
    bool same = k->step == state->step && k->command == state->command;
    if (same || (!at_once && begin < k->next_at))
        return PML_OK;
    void *memory;
    pml_status status = pml_slots_begin(k->slots, &memory, err);
    if (status == PML_OK)
        status = k->kind->put(k->j, state, &k->whole, memory, err);
    if (status != PML_OK)
        return status;
    pml_slots_commit(k->slots, &k->whole);
    double end = pml_clock_monotonic(), wait = ages * (end - begin);
    k->step = state->step;
    k->command = state->command;
    k->next_at = end + (wait > least_seconds ? wait : least_seconds);
    return PML_OK;
}
