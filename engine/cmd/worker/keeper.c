#include "keeper.h"

#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/train/slots.h"

static const double least_seconds = 1, ages = 200;

struct keeper {
    const job_kind *kind;
    job *j;
    pml_slots *slots;
    void *own;             /* without slots */
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
    pml_status status = PML_OK;
    if (fd >= 0)
        status = pml_slots_open(fd, bytes, &k->slots, err);
    else if ((k->own = malloc(bytes)) == NULL)
        status =
            PML_FAIL(err, PML_NO_MEMORY, "a snapshot needs %zu MiB of host memory", bytes >> 20);
    if (k->own != NULL)
        memset(k->own, 0, bytes); /* taken now, not at the first checkpoint */
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
    free(k->own);
    free(k);
}

static pml_status put(keeper *k, const pml_train_state *state, pml_error *err)
{
    void *memory = k->own;
    pml_status status = k->slots != NULL ? pml_slots_begin(k->slots, &memory, err) : PML_OK;
    if (status == PML_OK)
        status = k->kind->put(k->j, state, &k->whole, memory, err);
    if (status != PML_OK)
        return status;
    if (k->slots != NULL)
        pml_slots_commit(k->slots, &k->whole);
    k->step = state->step;
    k->command = state->command;
    return PML_OK;
}

pml_status keeper_keep(keeper *k, const pml_train_state *state, bool at_once, pml_error *err)
{
    double begin = pml_clock_monotonic();
    bool same = k->step == state->step && k->command == state->command;
    if (k->slots == NULL || same || (!at_once && begin < k->next_at))
        return PML_OK;
    pml_status status = put(k, state, err);
    double end = pml_clock_monotonic(), wait = ages * (end - begin);
    k->next_at = end + (wait > least_seconds ? wait : least_seconds);
    return status;
}

pml_status keeper_hold(keeper *k, const pml_train_state *state, const pml_train_state **whole,
                       const void **memory, pml_error *err)
{
    pml_status status = put(k, state, err);
    if (status != PML_OK)
        return status;
    *whole = &k->whole;
    *memory = k->own;
    if (k->slots != NULL)
        pml_slots_hold(k->slots, whole, memory);
    return PML_OK;
}

void keeper_release(keeper *k)
{
    if (k->slots != NULL)
        pml_slots_release(k->slots);
}

pml_status keeper_room(keeper *k, void **memory, pml_error *err)
{
    *memory = k->own;
    return k->slots != NULL ? pml_slots_begin(k->slots, memory, err) : PML_OK;
}
