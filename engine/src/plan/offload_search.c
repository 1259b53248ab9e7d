/* Offload among the search's choices.
 *
 * A layer that is offloaded costs the link its kept activations twice, one that is made again costs
 * a forward. What is sent while other layers run costs no time, so that some layers of each kind
 * are best: how many is what is searched here, by two clocks. */
#include <math.h>
#include <string.h>

#include "build.h"
#include "search.h"

/* Of a copy's time, what it takes from the ops beside it, which want memory and power, too: on an
 * H200 8 products of 21.2 ms took 22.5 beside a copy of 9.7, and steps of 8B lost about half of
 * that rate. */
static const double held_up = 0.08;

void pmli_advance(pmli_clocks *c, pml_op op, double seconds)
{
    if (op == PML_OP_offload || op == PML_OP_fetch) {
        c->link = (c->link > c->ops ? c->link : c->ops) + seconds;
        c->busy += seconds;
        c->ops += held_up * seconds;
    } else if (op != PML_OP_await) {
        c->ops += seconds;
    } else if (c->link > c->ops) {
        c->waited += c->link - c->ops;
        c->ops = c->link;
    }
}

pml_status pmli_host_room(const pml_train_config *config, const pml_backend *backend, size_t *bytes,
                          pml_error *err)
{
    *bytes = 0;
    if (config->no_offload || strcmp(backend->name, "cpu") == 0 ||
        !pml_op_is_there(backend, PML_OP_offload))
        return PML_OK;
    const pml_backend *host = pml_backend_cpu();
    const pml_device_options options = {.threads = 1};
    pml_device *device = NULL;
    pml_device_info info;
    pml_status status = host->open(&options, &device, err);
    if (status == PML_OK)
        status = host->info(device, &info, err);
    host->close(&device);
    if (status != PML_OK)
        return status;
    /* Half of what is free, a share for each worker, and a power of two: planned again a moment
     * later, or by the next worker, it is the same. */
    size_t most = info.memory_free / 2 / (size_t)(config->workers > 1 ? config->workers : 1);
    for (*bytes = 1; *bytes <= most / 2;)
        *bytes *= 2;
    return PML_OK;
}

/* The best plan with these choices but for how much is made again, if it beats *plan. */
static pml_status weigh(const pmli_search *s, const pml_batch_limits *limits,
                        pml_plan_choices choices, int32_t layers, pml_plan *plan, bool *any,
                        bool *better, pml_error *err)
{
    pml_plan candidate;
    bool found;
    choices.offload_layers = layers;
    pml_status status = pmli_least_recompute(s, limits, choices, *any ? plan->seconds : HUGE_VAL,
                                             &candidate, &found, err);
    *better = status == PML_OK && found && (!*any || candidate.seconds < plan->seconds);
    if (*better) {
        *plan = candidate;
        *any = true;
    }
    return status;
}

/* *narrower is set where a narrower chunk of the head may do better. How many layers: from half of
 * them by halved steps, either way while it gets better. Seconds fall with it until the link has no
 * time left, and rise from there. */
static pml_status climb(const pmli_search *s, const pml_batch_limits *limits,
                        pml_plan_choices choices, pml_plan *plan, bool *any, bool *narrower,
                        pml_error *err)
{
    const int32_t most = s->spec->layers - 1;
    /* Where half of them do not fit: on the device, or in host memory. */
    const int32_t begin[] = {(most + 1) / 2, most, (most + 3) / 4, (most + 7) / 8};
    int32_t at = 0;
    pml_plan here;
    bool found = false, better;
    pml_status status = PML_OK;
    for (int i = 0; status == PML_OK && !found && i < 4; i++) {
        at = begin[i];
        status = weigh(s, limits, choices, at, &here, &found, &better, err);
    }
    for (int32_t step = (most + 3) / 4; status == PML_OK && found && step > 0; step /= 2)
        for (int way = -1; status == PML_OK && way <= 1; way += 2) {
            int32_t next = at + way * step;
            if (next < 1 || next > most)
                continue;
            status = weigh(s, limits, choices, next, &here, &found, &better, err);
            if (!better)
                continue;
            at = next;
            break;
        }
    if (status == PML_OK && found)
        status = pmli_unpack_most(s, limits, true, *any ? plan->seconds : HUGE_VAL, &here, err);
    bool matters = true;
    if (status == PML_OK && found)
        status = pmli_chunk_matters(s, limits, &here, &matters, err);
    *narrower = *narrower || matters;
    if (status == PML_OK && found && (!*any || here.seconds < plan->seconds)) {
        *plan = here;
        *any = true;
    }
    return status;
}

/* Offloaded layers stand at one of two levels: all that is dear is sent, or the layer's input
 * alone. What norms put out is next to nothing to make and takes the link as long as the rest. */
static pml_status both_levels(const pmli_search *s, const pml_batch_limits *limits,
                              pml_plan_choices choices, pml_plan *plan, bool *any, bool *narrower,
                              pml_error *err)
{
    *narrower = false;
    choices.offload = PML_RECOMPUTE_NORMS;
    pml_status status = climb(s, limits, choices, plan, any, narrower, err);
    choices.offload = PML_RECOMPUTE_LAYER;
    return status == PML_OK ? climb(s, limits, choices, plan, any, narrower, err) : status;
}

/* Whether these pieces and this chunk could be better than what there is: with a device that all
 * fits on. */
static pml_status may_be_better(const pmli_search *s, const pml_batch_limits *limits,
                                pml_plan_choices choices, const pml_plan *plan, bool any, bool *may,
                                pml_error *err)
{
    pml_plan free_of_charge;
    *may = true;
    if (!any)
        return PML_OK;
    choices.unpacked = pmli_may_unpack(s) ? s->spec->layers * PMLI_LINEARS : 0;
    pml_status status = pmli_estimate(s, limits, &choices, &free_of_charge, err);
    *may = status == PML_OK && free_of_charge.seconds < plan->seconds;
    return status;
}

pml_status pmli_search_offload(const pmli_search *s, const pml_batch_limits *limits, pml_plan *plan,
                               bool *any, pml_error *err)
{
    const int32_t all = pmli_most_pieces(limits);
    pml_status status = PML_OK;
    if (s->host == 0 || s->spec->layers < 2)
        return PML_OK;
    for (int32_t pieces = 1;; pieces = pieces * 2 < all ? pieces * 2 : all) {
        const pml_batch_limits piece = pml_piece_limits(limits, pieces);
        pml_plan_choices choices = {.head_chunk = pmli_widest_chunk(s, &piece),
                                    .pieces = pieces,
                                    .moments_8bit = s->moments_8bit};
        for (;;) {
            bool may, narrower = false;
            status = may_be_better(s, limits, choices, plan, *any, &may, err);
            if (status == PML_OK && may)
                status = both_levels(s, limits, choices, plan, any, &narrower, err);
            if (status != PML_OK || !narrower || choices.head_chunk == PMLI_SMALLEST_CHUNK)
                break;
            choices.head_chunk = choices.head_chunk / PMLI_CHUNK_STEP > PMLI_SMALLEST_CHUNK
                                     ? choices.head_chunk / PMLI_CHUNK_STEP
                                     : PMLI_SMALLEST_CHUNK;
        }
        if (status != PML_OK || pieces >= all)
            return status;
    }
}
