#include "keeper.h"

#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/train/slots.h"

static const double least_seconds = 1, ages = 200;

/* How long a snapshot waits for the log to have its steps: one that is taken in passing, and one
 * for a state that is to be left, or saved. Without them the one before it stands. */
static const double passing_seconds = 0.02, standing_seconds = 2;

struct keeper {
    const job_kind *kind;
    job *j;
    worker_link *link;
    pml_slots *slots;
    void *own;              /* without slots */
    const void *left;       /* of a worker that is gone; then there is nothing else */
    int64_t step, command;  /* of the last one; -1: none */
    double next_at, waited; /* waited: of the last try, for the log */
    pml_train_state whole;
};

pml_status keeper_new(const job_kind *kind, job *j, const job_facts *facts, int fd,
                      worker_link *link, keeper **out, pml_error *err)
{
    const size_t bytes = facts->payload_bytes;
    keeper *k = *out = calloc(1, sizeof *k);
    if (k == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the keeper of snapshots");
    k->kind = kind;
    k->j = j;
    k->link = link;
    k->step = -1;
    pml_status status = PML_OK;
    if (fd >= 0)
        status = pml_slots_open(fd, bytes, facts->stage, &k->slots, err);
    else if ((k->own = malloc(bytes)) == NULL)
        status =
            PML_FAIL(err, PML_NO_MEMORY, "a snapshot needs %zu MiB of host memory", bytes >> 20);
    if (k->own != NULL)
        memset(k->own, 0, bytes); /* taken now, not at the first checkpoint */
    if (status != PML_OK)
        keeper_destroy(out);
    return status;
}

pml_status keeper_of_left(const void *payload, keeper **out, pml_error *err)
{
    keeper *k = *out = calloc(1, sizeof *k);
    if (k == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the keeper of snapshots");
    k->left = payload;
    return PML_OK;
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

/* From the stage into its slot; must: also where the log has not got so far. *taken = false: it has
 * not, and what was there before stands. */
static pml_status settle(keeper *k, double seconds, bool must, bool *taken, pml_error *err)
{
    double begin = pml_clock_monotonic();
    *taken = link_logged(k->link, seconds) || must;
    k->waited = pml_clock_monotonic() - begin;
    if (*taken)
        return pml_slots_settle(k->slots, err);
    pml_slots_drop(k->slots);
    return PML_OK;
}

static pml_status put(keeper *k, const pml_train_state *state, double seconds, bool must,
                      pml_error *err)
{
    bool taken = true;
    void *memory = k->own;
    k->waited = 0;
    pml_status status = k->slots != NULL ? pml_slots_begin(k->slots, &memory, err) : PML_OK;
    if (status == PML_OK)
        status = k->kind->put(k->j, state, &k->whole, memory, err);
    if (status != PML_OK)
        return status;
    if (k->slots != NULL)
        pml_slots_commit(k->slots, &k->whole);
    if (k->slots != NULL && pml_slots_staged(k->slots))
        status = settle(k, seconds, must, &taken, err);
    if (status == PML_OK && taken) {
        k->step = state->step;
        k->command = state->command;
    }
    return status;
}

pml_status keeper_keep(keeper *k, const pml_train_state *state, bool at_once, pml_error *err)
{
    double begin = pml_clock_monotonic();
    bool same = k->step == state->step && k->command == state->command;
    if (k->slots == NULL || same || (!at_once && begin < k->next_at) || !pml_slots_room(k->slots))
        return PML_OK;
    pml_status status = put(k, state, at_once ? standing_seconds : passing_seconds, false, err);
    double end = pml_clock_monotonic();
    /* A state that is left or saved waits anyway: what the log took then says nothing of what the
     * next snapshot will cost. */
    double wait = ages * (end - begin - (at_once ? k->waited : 0));
    k->next_at = end + (wait > least_seconds ? wait : least_seconds);
    return status;
}

bool keeper_lacks(const keeper *k, const pml_train_state *state)
{
    return k->slots != NULL && k->step != state->step;
}

bool keeper_can(const keeper *k)
{
    return pml_slots_room(k->slots) && (!pml_slots_staged(k->slots) || link_logged(k->link, 0));
}

pml_status keeper_hold(keeper *k, const pml_train_state *state, const pml_train_state **whole,
                       const void **memory, pml_error *err)
{
    pml_status status = PML_OK;
    if (k->left != NULL)
        k->whole = *state;
    else
        status = put(k, state, standing_seconds, true, err);
    if (status != PML_OK)
        return status;
    *whole = &k->whole;
    *memory = k->left != NULL ? k->left : k->own;
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
