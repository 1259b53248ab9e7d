#include "claim.h"

#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "patience.h"
#include "pml/net/connection.h"
#include "pml/net/reserve.h"
#include "pml_op/gauges.h"

/* Somebody plans: a second or two, with a context to be made, and as many in the line as a GPU has
 * room for. Longer than that nobody plans who is not stopped. */
static const double patience_seconds = 60;

/* What a device that is nobody's may lack, beside the contexts on it. */
static const size_t slack = (size_t)64 << 20;

enum { KEY_DIGITS = 12 }; /* of a uuid, in hexadecimal: a double has all of them */

struct claim {
    pml_reservation *r; /* NULL: in trouble */
    pml_comm *comm;
    const pml_backend *backend;
    char device[16];
    pml_device_identity identity;
    double key;     /* of the device, among workers */
    double *values; /* one a worker, and … */
    double *keys;   /* … of its device, as find_sharers left them */
    int sharing;    /* workers on this device */
    bool first;     /* of them: the turn is ours for all */
    size_t left;    /* bytes that our plan may take, as of ask, and … */
    size_t alone;   /* … at most, were the devices nobody else's */
    size_t held;    /* what the open device takes beside the arena */
    size_t had;     /* bytes that were reserved when we came */
    bool asked;     /* `left` is known, and … */
    bool settled;   /* … the plan's memory reserved */
    double patience;
    bool *crowded;
    void (*tick)(void *user);
    void *user;
    char trouble[400];
    pml_memory_claim of_stepper;
};

/* ---- among workers ---- */

/* Everybody's value, by rank, in c->values. */
static pml_status share(claim *c, double value, pml_error *err)
{
    int world = pml_comm_world(c->comm);
    memset(c->values, 0, (size_t)world * sizeof *c->values);
    c->values[pml_comm_rank(c->comm)] = value;
    return pml_comm_allreduce_f64(c->comm, c->values, (size_t)world, err);
}

static pml_status find_sharers(claim *c, pml_error *err)
{
    int rank = pml_comm_rank(c->comm);
    pml_status status = share(c, c->key, err);
    c->sharing = 0;
    c->first = true;
    for (int r = 0; status == PML_OK && r < pml_comm_world(c->comm); r++) {
        bool same = c->values[r] == c->key;
        c->keys[r] = c->values[r];
        c->sharing += same;
        c->first = c->first && !(same && r < rank);
    }
    return status;
}

/* The least key above this one; 0: there is none. */
static double next_key(const claim *c, double after)
{
    double next = 0;
    for (int r = 0; r < pml_comm_world(c->comm); r++)
        if (c->keys[r] > after && (next == 0 || c->keys[r] < next))
            next = c->keys[r];
    return next;
}

static int count_devices(const claim *c)
{
    int n = 0;
    for (double key = next_key(c, 0); key > 0; key = next_key(c, key))
        n++;
    return n;
}

/* ---- turns ---- */

static pml_status take_turn(claim *c, double patience, pml_error *err)
{
    if (c->r == NULL || !c->first)
        return PML_OK;
    pml_status status = pml_reservation_turn(c->r, patience, c->tick, c->user, err);
    *c->crowded = *c->crowded || status == PML_BUSY;
    return status == PML_OK ? status : pml_error_prefix(err, "%s", c->device);
}

/* Refused. */
static void let_go(claim *c)
{
    pml_reserved now;
    if (c->r != NULL && pml_reservation_read(c->r, &now, NULL) == PML_OK && now.ours > c->had)
        pml_reservation_resize(c->r, c->had, NULL);
}

static void end_turn(claim *c)
{
    if (c->r != NULL)
        pml_reservation_turn_end(c->r);
}

/* One device after the other, in an order that all runs have: nobody waits for one that comes
 * before what they hold, so no two wait for each other. */
static pml_status begin(void *user, pml_error *err)
{
    claim *c = user;
    c->asked = c->settled = false;
    if (pml_comm_world(c->comm) == 1)
        return take_turn(c, c->patience, err);
    pml_status status = find_sharers(c, err);
    int held = 0, devices = status == PML_OK ? count_devices(c) : 0;
    for (double key = next_key(c, 0); status == PML_OK && key > 0; key = next_key(c, key)) {
        if (key == c->key)
            status = take_turn(c, patience_with(c->patience, held, devices), err);
        held++;
        if (status == PML_OK)
            status = pml_comm_barrier(c->comm, err);
    }
    return status;
}

/* ---- what is left ---- */

static size_t less(size_t a, size_t b)
{
    return a > b ? a - b : 0;
}

/* Of what others have reserved that of this run's other workers on the device: none of it is
 * allocated yet but their contexts, and it is divided with them. */
static pml_status read_sharers(claim *c, size_t ours, size_t *theirs, pml_error *err)
{
    *theirs = 0;
    if (pml_comm_world(c->comm) == 1)
        return PML_OK;
    pml_status status = share(c, (double)ours, err);
    for (int r = 0; status == PML_OK && r < pml_comm_world(c->comm); r++)
        if (r != pml_comm_rank(c->comm) && c->keys[r] == c->key)
            *theirs += (size_t)c->values[r];
    return status;
}

static pml_status read_left(claim *c, const pml_device_info *info, pml_error *err)
{
    pml_reserved now = {0};
    size_t theirs = 0;
    pml_status status = c->r != NULL ? pml_reservation_read(c->r, &now, err) : PML_OK;
    if (status == PML_OK)
        status = read_sharers(c, now.ours, &theirs, err);
    size_t there = info->memory_free + info->held * (size_t)c->sharing;
    size_t unpromised = less(there, less(now.pending, theirs));
    size_t unreserved = less(info->memory_total, less(now.others, theirs));
    c->held = info->held;
    c->left = unpromised < unreserved || c->r == NULL ? unpromised : unreserved;
    return status;
}

/* Of so much on the device of each worker, divided with those that share it, what the one who has
 * least has. */
static pml_status share_least(claim *c, size_t *bytes, pml_error *err)
{
    if (pml_comm_world(c->comm) == 1)
        return PML_OK;
    pml_status status = share(c, (double)*bytes / c->sharing, err);
    for (int r = 0; status == PML_OK && r < pml_comm_world(c->comm); r++)
        if (r == 0 || c->values[r] < (double)*bytes)
            *bytes = (size_t)c->values[r];
    return status;
}

static pml_status ask(void *user, const pml_device_info *info, size_t *bytes, pml_error *err)
{
    claim *c = user;
    pml_status status = read_left(c, info, err);
    c->alone = info->memory_total;
    if (status == PML_OK)
        status = share_least(c, &c->left, err);
    if (status == PML_OK)
        status = share_least(c, &c->alone, err);
    *bytes = c->left;
    c->asked = status == PML_OK;
    if (status != PML_OK)
        end_turn(c);
    return status;
}

/* ---- words ---- */

static const char what_to_do[] = "wait until that ends, or take another device (devices=)";

static void say_who(const claim *c, char *words, size_t capacity)
{
    words[0] = '\0';
    if (c->r != NULL)
        pml_reservation_words(c->r, words, capacity);
    if (words[0] == '\0')
        snprintf(words, capacity, "other processes have the rest");
}

/* What an error about memory needs beside its figures. Others are named where they have something;
 * to wait for them helps who would find room without them. */
static pml_status refuse(const claim *c, size_t wanted, pml_error *err)
{
    const double gib = (double)c->left / (1 << 30);
    if (c->left + c->held + slack >= c->alone)
        return pml_error_prefix(err, "%s has %.1f GiB for this run", c->device, gib);
    char words[500];
    say_who(c, words, sizeof words);
    *c->crowded = *c->crowded || wanted <= c->alone;
    return pml_error_prefix(err, "%s has %.1f GiB left for this run (%s; %s)", c->device, gib,
                            words, what_to_do);
}

/* The driver refuses what nobody has reserved. */
static pml_status refuse_unreserved(const claim *c, pml_error *err)
{
    *c->crowded = true;
    return pml_error_prefix(err,
                            "%s: a process that reserves nothing has its memory (nvidia-smi lists "
                            "those that use a GPU; %s)",
                            c->device, what_to_do);
}

/* Whether the device has no room for a context, by NVML, as there is no context to ask with. */
static bool is_full(const claim *c)
{
    pml_gauges *gauges;
    pml_reading now;
    if (pml_gauges_new(c->identity.bus, c->identity.uuid, &gauges, NULL) != PML_OK)
        return false;
    pml_gauges_read(gauges, &now);
    pml_gauges_destroy(&gauges);
    /* Not of NVML's total, which has what the driver keeps for itself. */
    return now.missing[PML_GAUGE_memory_used] == NULL &&
           (double)c->identity.memory_total - now.value[PML_GAUGE_memory_used] <
               (double)pml_plan_beside(c->backend);
}

/* Memory that is missing may also be the host's, which nobody who waits for a device finds. */
static void give_up(void *user, size_t wanted, pml_error *err)
{
    claim *c = user;
    if (err != NULL && err->code == PML_NO_MEMORY) {
        if (c->settled || (!c->asked && is_full(c)))
            (void)refuse_unreserved(c, err);
        else if (c->asked && wanted > c->left)
            (void)refuse(c, wanted, err);
    }
    let_go(c);
    end_turn(c);
}

/* ---- reserving ---- */

static pml_status reserve(claim *c, size_t bytes, pml_error *err)
{
    if (bytes > c->left) {
        (void)PML_FAIL(err, PML_NO_MEMORY,
                       "its plan takes %.1f GiB; a smaller memory_limit=, or none, gives one that "
                       "fits",
                       (double)bytes / (1 << 30));
        return refuse(c, bytes, err);
    }
    pml_status status = c->r != NULL ? pml_reservation_resize(c->r, bytes, err) : PML_OK;
    return status == PML_NO_MEMORY ? refuse(c, bytes, err) : status;
}

/* Workers that share a turn reserve one after the other in it. */
static pml_status settle(void *user, size_t bytes, pml_error *err)
{
    claim *c = user;
    int world = pml_comm_world(c->comm);
    pml_status status = PML_OK;
    for (int r = 0; r < world && status == PML_OK; r++) {
        if (r == pml_comm_rank(c->comm))
            status = reserve(c, bytes, err);
        if (world > 1 && status == PML_OK)
            status = pml_comm_barrier(c->comm, err);
    }
    c->settled = status == PML_OK;
    if (status != PML_OK)
        let_go(c);
    end_turn(c);
    return status;
}

static pml_status taken(void *user, size_t bytes, pml_error *err)
{
    claim *c = user;
    return c->r != NULL ? pml_reservation_take(c->r, bytes + c->held, err) : PML_OK;
}

/* ---- a claim's life ---- */

static double key_of(const char *uuid)
{
    uint64_t key = 0;
    int digits = 0;
    for (; *uuid != '\0' && digits < KEY_DIGITS; uuid++)
        if (*uuid != '-') {
            char digit[2] = {*uuid, '\0'};
            key = key << 4 | strtoul(digit, NULL, 16);
            digits++;
        }
    return (double)key + 1; /* 0 is nobody's */
}

static pml_status open_reservation(claim *c, const claim_options *o, pml_error *err)
{
    char folder[PATH_MAX];
    pml_status status = PML_OK;
    if (o->devices == NULL)
        status = pml_runtime_devices(folder, sizeof folder, err);
    else
        snprintf(folder, sizeof folder, "%s", o->devices);
    pml_reservation_options options = {.folder = folder,
                                       .device = c->identity.uuid,
                                       .run = o->run,
                                       .total = c->identity.memory_total,
                                       .inherited = o->inherited};
    if (status == PML_OK)
        return pml_reservation_new(&options, &c->r, err);
    if (o->inherited >= 0)
        close(o->inherited);
    return status;
}

/* What a context takes, so that nobody who asks meanwhile plans with it; of one that goes on the
 * whole of what it had stays. */
static pml_status reserve_context(claim *c, pml_error *err)
{
    pml_reserved now = {0};
    size_t least = pml_plan_beside(c->backend);
    pml_status status = take_turn(c, c->patience, err);
    if (status == PML_OK)
        status = pml_reservation_read(c->r, &now, err);
    c->had = now.ours;
    if (status == PML_OK && now.ours < least) {
        c->alone = c->identity.memory_total;
        c->left = less(c->alone, now.others);
        status = pml_reservation_resize(c->r, least, err);
        if (status == PML_NO_MEMORY)
            refuse(c, least, err);
    }
    end_turn(c);
    return status;
}

static pml_status open_claim(claim *c, const claim_options *o, pml_error *err)
{
    pml_error why = PML_ERROR_INIT;
    c->values = calloc((size_t)pml_comm_world(o->comm), sizeof *c->values);
    c->keys = calloc((size_t)pml_comm_world(o->comm), sizeof *c->keys);
    pml_status status = c->values != NULL && c->keys != NULL
                            ? o->backend->identity_of(o->index, &c->identity, err)
                            : PML_FAIL(err, PML_NO_MEMORY, "no memory for a claim");
    if (status != PML_OK) {
        if (o->inherited >= 0)
            close(o->inherited);
        return status;
    }
    c->key = key_of(c->identity.uuid);
    status = open_reservation(c, o, &why);
    if (status == PML_OK)
        status = reserve_context(c, &why);
    if (status == PML_NO_MEMORY || status == PML_BUSY) {
        if (err != NULL)
            *err = why;
        return status;
    }
    if (status != PML_OK) { /* training does not depend on it */
        pml_reservation_destroy(&c->r);
        snprintf(c->trouble, sizeof c->trouble,
                 "memory of %s is not reserved: another run that starts now may plan with it, too "
                 "(%.200s)",
                 c->device, why.message);
        return PML_OK;
    }
    if (o->keep != NULL && !pml_reservation_inherited(c->r))
        o->keep(o->user, pml_reservation_descriptor(c->r));
    return PML_OK;
}

pml_status claim_new(const claim_options *o, claim **out, pml_error *err)
{
    claim *c = calloc(1, sizeof *c);
    *out = c;
    if (c == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a claim");
    *c = (claim){.comm = o->comm,
                 .backend = o->backend,
                 .sharing = 1,
                 .first = true,
                 .patience = o->patience > 0 ? o->patience : patience_seconds,
                 .crowded = o->crowded,
                 .tick = o->tick,
                 .user = o->user,
                 .of_stepper = {.begin = begin,
                                .ask = ask,
                                .settle = settle,
                                .give_up = give_up,
                                .taken = taken,
                                .user = c}};
    snprintf(c->device, sizeof c->device, "%s", o->device);
    pml_status status = open_claim(c, o, err);
    if (status != PML_OK)
        claim_destroy(out);
    return status;
}

void claim_destroy(claim **out)
{
    claim *c = *out;
    *out = NULL;
    if (c == NULL)
        return;
    pml_reservation_destroy(&c->r);
    free(c->keys);
    free(c->values);
    free(c);
}

const char *claim_trouble(const claim *c)
{
    if (c->trouble[0] != '\0' || c->r == NULL)
        return c->trouble;
    return pml_reservation_unnamed(c->r);
}

const pml_memory_claim *claim_of_stepper(claim *c)
{
    return &c->of_stepper;
}
