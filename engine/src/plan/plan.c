/* The search: of all programs that fit into the memory there is, the one that costs least. */
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "build.h"
#include "search.h"

/* Moments of 8 bits are taken where a plan is faster by more than this for what it need not make
 * again: the prices are a model, and float32 moments are what AdamW is. */
static const double worth_8bit = 0.98;

/* What stands beside the arena of a worker on the CPU: by their sizes what threads of an op share
 * and what a weight passes through while it is loaded, before there are snapshots; measured by
 * tools/bench/plan_check.py, the process with its libraries and sockets, and a thread's stack and
 * its share of scratch. */
static const size_t shared_bytes = (size_t)4 << 20, loading_bytes = (size_t)4 << 20;
static const size_t process_bytes = (size_t)11 << 18, thread_bytes = (size_t)384 << 10;

/* On a GPU: the context, cuBLASLt and kernels, of which a worker on an H200 (driver 580) has 541 to
 * 547 MiB by NVML, and graphs. A graph takes 2 to 20 MiB; batches of sizes without one go op
 * by op, so there is a limit to them (docs/performance/gpu.md). */
static const size_t gpu_context = (size_t)548 << 20, gpu_graphs = (size_t)32 << 20;

/* The most that a process was found to take beyond its plan is 3.6 MiB. */
static const size_t margin = (size_t)4 << 20;

size_t pml_plan_beside(const pml_backend *backend)
{
    return strcmp(backend->name, "cpu") == 0 ? 0 : gpu_context + gpu_graphs;
}

size_t pml_plan_graphs(const pml_backend *backend)
{
    return strcmp(backend->name, "cpu") == 0 ? 0 : gpu_graphs;
}

static int threads_of(const pml_train_config *config)
{
    cpu_set_t set;
    if (config->threads > 0)
        return config->threads;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    int workers = config->workers > 1 ? config->workers : 1;
    return cores > workers ? cores / workers : 1;
}

static size_t least_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static int32_t least_count(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* Where the device's memory is the host's, the snapshot that checkpoints are written from, and a
 * run goes on from, counts too. A second one, while it is written, is in the arena. */
static size_t runtime_bytes(const pmli_search *s, const pml_program *p, const pml_plan *plan)
{
    if (strcmp(s->backend->name, "cpu") != 0)
        return pml_plan_beside(s->backend);
    pml_train_config settled = *s->config;
    pml_plan_settle(&plan->choices, &settled);
    size_t snapshot = pml_program_snapshot_bytes(p, &settled);
    size_t largest = (size_t)s->spec->vocab * (size_t)s->spec->hidden * sizeof(float);
    size_t loading = least_size(loading_bytes, largest);
    return process_bytes + shared_bytes + pml_program_bytes(p) + plan->host +
           thread_bytes * (size_t)threads_of(s->config) + (snapshot > loading ? snapshot : loading);
}

/* Gradients on their way through the collective: a piece of them in the worker, and the shared
 * memory that every worker's part of two pieces and their sums pass through. */
static size_t communication_bytes(const pmli_search *s, const pml_plan *plan)
{
    int32_t workers = s->config->workers;
    if (workers <= 1 || strcmp(s->backend->name, "cpu") != 0)
        return 0;
    size_t piece = least_size((size_t)1 << 20, sizeof(float) * (size_t)plan->trainable);
    return piece * (1 + 2 * ((size_t)workers + 1));
}

static const char *const cause_names[PML_CAUSE_COUNT] = {
    "weights",     "adapters",  "gradients",     "optimizer",
    "activations", "workspace", "communication", "runtime"};

const char *pml_cause_name(pml_cause cause)
{
    return (unsigned)cause < PML_CAUSE_COUNT ? cause_names[cause] : "?";
}

const char *pml_recompute_name(pml_recompute recompute)
{
    static const char *const names[PML_RECOMPUTE_COUNT] = {"none", "norms", "attention", "layer"};
    return (unsigned)recompute < PML_RECOMPUTE_COUNT ? names[recompute] : "?";
}

enum {
    SHORTEST_LENGTH = 32,
    LEAST_GENERATED = 512 /* generate_length where neither it nor a longer max_length is given */
};

static int32_t div_up(int32_t a, int32_t b)
{
    return a / b + (a % b != 0);
}

pml_batch_limits pml_piece_limits(const pml_batch_limits *limits, int32_t pieces)
{
    pml_batch_limits l = *limits;
    l.tokens = div_up(limits->tokens, pieces);
    l.tokens = l.tokens < limits->max_doc ? limits->max_doc : l.tokens;
    l.labels = limits->labels < l.tokens ? limits->labels : l.tokens;
    return l;
}

static pml_program_options options_for(const pmli_search *s, const pml_batch_limits *limits,
                                       const pml_plan_choices *choices, bool estimate)
{
    return (pml_program_options){.spec = s->spec,
                                 .config = s->config,
                                 .limits = pml_piece_limits(limits, choices->pieces),
                                 .backend = s->backend,
                                 .choices = *choices,
                                 .estimate = estimate};
}

static void add_costs(const pmli_search *s, const pml_program *p, pml_plan *plan)
{
    pml_counts counts = pml_program_capacity(p, PML_SEGMENT_MICRO);
    double pieces = plan->choices.pieces;
    pmli_clocks piece = {0};
    for (int32_t n = p->segments[PML_SEGMENT_MICRO].first; n < p->segments[PML_SEGMENT_MICRO].end;
         n++) {
        pml_op_args args;
        pml_program_bind(p, &p->nodes[n], (void *)(uintptr_t)PMLI_ALIGN, &counts, &args);
        pml_cost cost = pml_node_cost(p->nodes[n].op, &args);
        plan->flops += pieces * cost.flops;
        plan->bytes += pieces * cost.bytes;
        pmli_advance(&piece, p->nodes[n].op, pml_rates_seconds(&s->rates, p->nodes[n].op, cost));
    }
    plan->seconds = pieces * piece.ops;
    plan->link = pieces * piece.busy;
    plan->waited = pieces * piece.waited;
}

pml_status pmli_try_plan(const pmli_search *s, const pml_batch_limits *limits,
                         const pml_plan_choices *choices, bool estimate, pml_plan *plan,
                         pml_error *err)
{
    pml_program_options options = options_for(s, limits, choices, estimate);
    pml_program *p = NULL,
                **spare = estimate && s->tried != NULL ? pmli_tried_spare(s->tried) : NULL;
    options.spare = spare;
    pml_status status = pml_program_build(&options, &p, err);
    if (status != PML_OK)
        return status;
    *plan = (pml_plan){
        .arena = p->arena, .host = p->host_bytes, .choices = *choices, .limits = options.limits};
    memcpy(plan->by_cause, p->by_cause, sizeof plan->by_cause);
    add_costs(s, p, plan);
    plan->parameters = pml_model_parameters(s->spec);
    for (int32_t i = 0; i < p->n_parameters; i++)
        if (p->parameters[i].trained)
            plan->trainable += p->parameters[i].rows * p->parameters[i].cols;
    plan->by_cause[PML_CAUSE_RUNTIME] = runtime_bytes(s, p, plan);
    plan->by_cause[PML_CAUSE_COMMUNICATION] += communication_bytes(s, plan);
    for (int c = 0; c < PML_CAUSE_COUNT; c++)
        plan->total += plan->by_cause[c];
    if (spare != NULL)
        *spare = p; /* the build has taken what was there */
    else
        pml_program_destroy(&p);
    return PML_OK;
}

bool pmli_plan_fits(const pmli_search *s, const pml_plan *plan)
{
    return (s->available == 0 || plan->total <= s->available) && plan->host <= s->host;
}

bool pmli_may_unpack(const pmli_search *s)
{
    return s->config->quant != PML_QUANT_NONE && s->available > 0 &&
           strcmp(s->backend->name, "cpu") != 0;
}

pml_status pmli_unpack_most(const pmli_search *s, const pml_batch_limits *limits, bool estimate,
                            double below, pml_plan *plan, pml_error *err)
{
    if (!pmli_may_unpack(s))
        return PML_OK;
    pml_plan candidate;
    pml_plan_choices choices = plan->choices;
    int32_t low = choices.unpacked, high = s->spec->layers * PMLI_LINEARS + 1; /* high does not */
    for (int32_t next = high - 1; next > low && next < high; next = low + (high - low) / 2) {
        choices.unpacked = next;
        pml_status status = estimate ? pmli_estimate(s, limits, &choices, &candidate, err)
                                     : pmli_try_plan(s, limits, &choices, false, &candidate, err);
        if (status != PML_OK)
            return status;
        if (pmli_plan_fits(s, &candidate)) {
            low = next;
            *plan = candidate;
        } else if (candidate.seconds < below) {
            high = next;
        } else { /* fewer take longer still */
            return PML_OK;
        }
    }
    return PML_OK;
}

/* Fewer layers at a level may be fewer than were to be offloaded of them. */
static pml_plan_choices clipped(pml_plan_choices choices, int32_t layers)
{
    int32_t span = pml_offload_span(&choices, layers);
    choices.offload_layers = choices.offload_layers < span ? choices.offload_layers : span;
    return choices;
}

/* Halves what is between low, which does not fit, and *high, which does or is out of reach: of the
 * levels for all layers, or of the layers at choices.recompute. *plan is *high's. */
static pml_status bisect(const pmli_search *s, const pml_batch_limits *limits,
                         pml_plan_choices choices, bool levels, double below, int32_t low,
                         int32_t *high, pml_plan *plan, bool *worth, pml_error *err)
{
    const int32_t layers = s->spec->layers;
    while (*worth && *high - low > 1) {
        pml_plan candidate;
        int32_t middle = low + (*high - low) / 2;
        choices.recompute = levels ? middle : choices.recompute;
        choices.recompute_layers = !levels ? middle : middle == PML_RECOMPUTE_NONE ? 0 : layers;
        const pml_plan_choices now = clipped(choices, layers);
        pml_status status = pmli_estimate(s, limits, &now, &candidate, err);
        if (status != PML_OK)
            return status;
        if (pmli_plan_fits(s, &candidate)) {
            *high = middle;
            *plan = candidate;
        } else {
            /* More layers, with as many offloaded, are more ops; what waits for the link may fall.
             */
            bool more = !levels && now.offload_layers == choices.offload_layers;
            low = middle;
            *worth = !more || candidate.seconds - candidate.waited < below;
        }
    }
    return PML_OK;
}

pml_status pmli_least_recompute(const pmli_search *s, const pml_batch_limits *limits,
                                pml_plan_choices choices, double below, pml_plan *plan, bool *found,
                                pml_error *err)
{
    int32_t level = PML_RECOMPUTE_COUNT, layers = s->spec->layers;
    bool worth = true;
    pml_status status = bisect(s, limits, choices, true, below, -1, &level, plan, &worth, err);
    choices.recompute = level;
    if (status == PML_OK && level > PML_RECOMPUTE_NONE && level < PML_RECOMPUTE_COUNT)
        status = bisect(s, limits, choices, false, below, 0, &layers, plan, &worth, err);
    *found = status == PML_OK && worth && level < PML_RECOMPUTE_COUNT;
    return status;
}

int32_t pmli_most_pieces(const pml_batch_limits *limits)
{
    return div_up(limits->tokens, limits->max_doc);
}

/* The smallest there is: everything made again, one document at a time. */
static pml_status smallest(const pmli_search *s, const pml_batch_limits *limits, pml_plan *plan,
                           pml_error *err)
{
    const pml_plan_choices choices = {.recompute = PML_RECOMPUTE_LAYER,
                                      .recompute_layers = s->spec->layers,
                                      .head_chunk = PMLI_SMALLEST_CHUNK,
                                      .pieces = pmli_most_pieces(limits),
                                      .moments_8bit = s->moments_8bit};
    return pmli_try_plan(s, limits, &choices, false, plan, err);
}

static int32_t scaled(int32_t value, int64_t part, int64_t whole)
{
    int64_t result = ((int64_t)value * part + whole - 1) / whole;
    return result < 1 ? 1 : (int32_t)result;
}

/* Limits with `rows` of the configured rows a micro-batch, cut at `length` tokens. */
static pml_batch_limits reduced(const pmli_search *s, const pml_batch_limits *limits, int32_t rows,
                                int32_t length)
{
    int32_t all_rows = s->config->batch_size, all_length = s->config->max_length;
    pml_batch_limits r = *limits;
    r.docs = scaled(limits->docs, rows, all_rows);
    r.tokens = scaled(scaled(limits->tokens, rows, all_rows), length, all_length);
    r.labels = scaled(scaled(limits->labels, rows, all_rows), length, all_length);
    r.max_doc = limits->max_doc < length ? limits->max_doc : length;
    r.tokens = r.tokens < r.max_doc ? r.max_doc : r.tokens;
    if (limits->generate_length == all_length && length < all_length) { /* not given: follows */
        int32_t least =
            LEAST_GENERATED < s->spec->max_positions ? LEAST_GENERATED : s->spec->max_positions;
        r.generate_length = length > least ? length : least;
    }
    return r;
}

/* The largest value in [low, high] for which the smallest plan fits; 0 when none does. */
static int32_t largest_that_fits(const pmli_search *s, const pml_batch_limits *limits, bool length,
                                 int32_t low, int32_t high)
{
    int32_t best = 0;
    while (low <= high) {
        int32_t middle = low + (high - low) / 2;
        pml_batch_limits r = length ? reduced(s, limits, 1, middle)
                                    : reduced(s, limits, middle, s->config->max_length);
        pml_plan plan;
        if (smallest(s, &r, &plan, NULL) == PML_OK && pmli_plan_fits(s, &plan)) {
            best = middle;
            low = middle + 1;
        } else {
            high = middle - 1;
        }
    }
    return best;
}

static double mib(size_t bytes)
{
    return (double)bytes / (1 << 20);
}

static bool fits_with(const pmli_search *s, const pml_batch_limits *limits,
                      const pml_train_config *other)
{
    pmli_search t = *s;
    pml_plan plan;
    t.config = other;
    return smallest(&t, limits, &plan, NULL) == PML_OK && pmli_plan_fits(&t, &plan);
}

static void add_advice(char *advice, size_t capacity, const char *what)
{
    size_t n = strlen(advice);
    snprintf(advice + n, capacity - n, "%s%s fits", n > 0 ? ", " : "", what);
}

/* The nearest settings that do, each of them tried: a smaller batch, shorter rows, and what holds
 * the same numbers in fewer bits. "" when none does. */
static void nearest(const pmli_search *s, const pml_batch_limits *limits, char *advice,
                    size_t capacity)
{
    char what[96];
    pml_train_config other = *s->config;
    int32_t rows = largest_that_fits(s, limits, false, 1, s->config->batch_size - 1);
    int32_t length =
        rows > 0 ? 0
                 : largest_that_fits(s, limits, true, SHORTEST_LENGTH, s->config->max_length - 1);
    advice[0] = '\0';
    if (rows > 0)
        snprintf(what, sizeof what, "per_device_train_batch_size=%d", rows);
    else
        snprintf(what, sizeof what, "per_device_train_batch_size=1 with max_length=%d", length);
    if (rows > 0 || length > 0)
        add_advice(advice, capacity, what);
    other.optimizer = PML_OPTIMIZER_ADAMW_8BIT;
    if (s->config->optimizer == PML_OPTIMIZER_ADAMW && fits_with(s, limits, &other))
        add_advice(advice, capacity, "optim=\"adamw_8bit\"");
    other = *s->config;
    other.quant = PML_QUANT_NF4;
    if (s->config->method == PML_METHOD_LORA && s->config->quant != PML_QUANT_NF4 &&
        fits_with(s, limits, &other))
        add_advice(advice, capacity, "quant=\"nf4\"");
}

static pml_status does_not_fit(const pmli_search *s, const pml_batch_limits *limits, size_t *needed,
                               pml_error *err)
{
    pml_plan least;
    pml_status status = smallest(s, limits, &least, err);
    if (status != PML_OK)
        return status;
    *needed = least.total + margin;
    char advice[256];
    nearest(s, limits, advice, sizeof advice);
    if (advice[0] == '\0')
        snprintf(advice, sizeof advice,
                 "no batch does; %sgive it that much, or take a smaller model",
                 s->config->method == PML_METHOD_FULL ? "method=\"lora\" needs less, or " : "");
    /* What a person gave, or what is free: the margin is in what is needed. */
    char room[48] = "less than that is";
    if (s->available > 1)
        snprintf(room, sizeof room, "%.1f MiB are", mib(s->available + margin));
    return PML_FAIL(err, PML_NO_MEMORY,
                    "the smallest plan needs %.1f MiB (%.1f MiB of it weights, %.0f MiB to spare) "
                    "and %s available: %s",
                    mib(least.total + margin), mib(least.by_cause[PML_CAUSE_WEIGHTS]), mib(margin),
                    room, advice);
}

/* All of recompute, head chunk and pieces, by sizes from below. The first that keeps everything is
 * the fastest: whatever comes after it costs more. */
static pml_status search(const pmli_search *s, const pml_batch_limits *limits, pml_plan *plan,
                         bool *any, pml_error *err)
{
    *any = false;
    for (int32_t pieces = 1;;
         pieces = pieces * 2 < pmli_most_pieces(limits) ? pieces * 2 : pmli_most_pieces(limits)) {
        pml_batch_limits piece = pml_piece_limits(limits, pieces);
        int32_t chunk = pmli_widest_chunk(s, &piece);
        for (;;) {
            pml_plan candidate;
            bool found;
            pml_status status = pmli_least_recompute(
                s, limits,
                (pml_plan_choices){
                    .head_chunk = chunk, .pieces = pieces, .moments_8bit = s->moments_8bit},
                HUGE_VAL, &candidate, &found, err);
            if (status != PML_OK)
                return status;
            bool narrower = chunk > PMLI_SMALLEST_CHUNK;
            if (found)
                status = pmli_unpack_most(s, limits, true, *any ? plan->seconds : HUGE_VAL,
                                          &candidate, err);
            if (status == PML_OK && found && narrower)
                status = pmli_chunk_matters(s, limits, &candidate, &narrower, err);
            if (status != PML_OK)
                return status;
            if (found && (!*any || candidate.seconds < plan->seconds)) {
                *plan = candidate;
                *any = true;
            }
            if ((found && candidate.choices.recompute == 0) || !narrower)
                break;
            chunk = chunk / PMLI_CHUNK_STEP > PMLI_SMALLEST_CHUNK ? chunk / PMLI_CHUNK_STEP
                                                                  : PMLI_SMALLEST_CHUNK;
        }
        if (pieces >= pmli_most_pieces(limits) || (*any && plan->choices.recompute == 0))
            return PML_OK;
    }
}

/* Of all plans next to as fast as *plan the smallest, where the device's memory is the host's,
 * which others want too; a GPU's is the run's alone. All layers at one level. */
static pml_status spare_memory(const pmli_search *s, const pml_batch_limits *limits, pml_plan *plan,
                               pml_error *err)
{
    static const double little = 0.005; /* of a step, by the table of rates */
    static const size_t much = (size_t)16 << 20;
    if (strcmp(s->backend->name, "cpu") != 0)
        return PML_OK;
    const double longest = plan->seconds * (1 + little);
    const int32_t most = pmli_most_pieces(limits);
    pml_plan least = *plan, candidate;
    pml_plan_choices choices = plan->choices;
    bool in_time = true;
    for (; in_time && (choices.pieces == plan->choices.pieces || choices.pieces <= most);
         choices.pieces *= 2) {
        const pml_batch_limits piece = pml_piece_limits(limits, choices.pieces);
        choices.head_chunk = least_count(plan->choices.head_chunk, pmli_widest_chunk(s, &piece));
        for (int level = PML_RECOMPUTE_NONE; level < PML_RECOMPUTE_COUNT; level++) {
            choices.recompute = level;
            choices.recompute_layers = level == PML_RECOMPUTE_NONE ? 0 : s->spec->layers;
            pml_status status = pmli_estimate(s, limits, &choices, &candidate, err);
            if (status != PML_OK)
                return status;
            if (candidate.seconds > longest) { /* what comes after takes longer still */
                in_time = level > PML_RECOMPUTE_NONE;
                break;
            }
            if (candidate.total < least.total && pmli_plan_fits(s, &candidate))
                least = candidate;
        }
    }
    if (least.total + much <= plan->total)
        *plan = least;
    return PML_OK;
}

/* Places take a little more than the fullest moment where they do not fit one another: then again,
 * within so much less. *any = false when nothing fits. */
static pml_status placed(pmli_search s, const pml_batch_limits *limits, pml_plan *plan, bool *any,
                         pml_error *err)
{
    const size_t available = s.available;
    for (int i = 0; i < 64; i++) {
        pml_plan found;
        pml_status status = search(&s, limits, &found, any, err);
        if (status == PML_OK)
            status = pmli_search_offload(&s, limits, &found, any, err);
        if (status == PML_OK && *any)
            status = spare_memory(&s, limits, &found, err);
        if (status == PML_OK && *any)
            status = pmli_try_plan(&s, limits, &found.choices, false, plan, err);
        if (status != PML_OK || (*any && (available == 0 || plan->total <= available)))
            return status;
        if (!*any)
            break;
        size_t apart = plan->total - found.total; /* so that this one does not come again */
        s.available = available > apart ? available - apart : 1;
    }
    /* What was passed over by a little may have held the smallest, whose places fit as they are. */
    s.available = available;
    pml_status status = smallest(&s, limits, plan, err);
    *any = status == PML_OK && pmli_plan_fits(&s, plan);
    return status;
}

/* Prices are those of TABLE_THREADS; arithmetic of more of them takes so much less, but a weight is
 * laid out in memory that all of them share, which takes as long with 16 as with two. */
static pml_status get_rates(pmli_search *s, pml_error *err)
{
    enum { TABLE_THREADS = 2 };
    pml_status status = pml_rates_get(s->backend->name, &s->rates, err);
    int threads = threads_of(s->config);
    s->rates.laid *= threads > TABLE_THREADS ? (double)threads / TABLE_THREADS : 1;
    return status;
}

pml_status pml_plan_make(const pml_model_spec *spec, const pml_train_config *config,
                         const pml_batch_limits *limits, const pml_backend *backend,
                         size_t available, pml_plan *plan, pml_error *err)
{
    pmli_search s = {.spec = spec, .config = config, .backend = backend, .available = available};
    pml_status status = pmli_check_limits(limits, err);
    if (status == PML_OK)
        status = get_rates(&s, err);
    bool any = false, narrow_fits = false;
    if (status == PML_OK)
        status = pmli_host_room(config, backend, &s.host, err);
    if (status == PML_OK)
        status = pmli_tried_new(&s.tried, err);
    if (status == PML_OK)
        status = placed(s, limits, plan, &any, err);
    if (status == PML_OK && config->optimizer == PML_OPTIMIZER_ADAMW_AUTO) {
        pml_plan narrow;
        s.moments_8bit = 1;
        status = placed(s, limits, &narrow, &narrow_fits, err);
        if (status == PML_OK && narrow_fits &&
            (!any || narrow.seconds < worth_8bit * plan->seconds))
            *plan = narrow;
    }
    pmli_tried_destroy(&s.tried);
    if (status == PML_OK && (any || narrow_fits))
        return status;
    plan->total = 0;
    return status == PML_OK ? does_not_fit(&s, limits, &plan->total, err) : status;
}

void pml_plan_settle(const pml_plan_choices *choices, pml_train_config *config)
{
    if (config->optimizer == PML_OPTIMIZER_ADAMW_AUTO)
        config->optimizer = choices->moments_8bit ? PML_OPTIMIZER_ADAMW_8BIT : PML_OPTIMIZER_ADAMW;
}

size_t pml_plan_room(size_t limit)
{
    if (limit == 0)
        return 0;
    return limit > margin ? limit - margin : 1;
}

pml_status pml_plan_given(const pml_model_spec *spec, const pml_train_config *config,
                          const pml_batch_limits *limits, const pml_backend *backend,
                          const pml_plan_choices *choices, pml_plan *plan, pml_error *err)
{
    pmli_search s = {.spec = spec, .config = config, .backend = backend};
    pml_status status = pmli_check_limits(limits, err);
    if (status == PML_OK)
        status = get_rates(&s, err);
    if (status == PML_OK && (choices->pieces < 1 || choices->pieces > pmli_most_pieces(limits)))
        status =
            PML_FAIL(err, PML_INVALID, "a micro-batch cannot be run in %d pieces", choices->pieces);
    return status == PML_OK ? pmli_try_plan(&s, limits, choices, false, plan, err) : status;
}

pml_status pml_plan_unpack(const pml_model_spec *spec, const pml_train_config *config,
                           const pml_batch_limits *limits, const pml_backend *backend,
                           size_t available, pml_plan *plan, pml_error *err)
{
    pmli_search s = {.spec = spec,
                     .config = config,
                     .backend = backend,
                     .available = available,
                     .host = plan->host};
    pml_status status = get_rates(&s, err);
    return status == PML_OK ? pmli_unpack_most(&s, limits, false, HUGE_VAL, plan, err) : status;
}

pml_status pml_plan_build(const pml_plan *plan, const pml_model_spec *spec,
                          const pml_train_config *config, const pml_backend *backend,
                          pml_program **program, pml_error *err)
{
    const pml_program_options options = {.spec = spec,
                                         .config = config,
                                         .limits = plan->limits,
                                         .backend = backend,
                                         .choices = plan->choices};
    return pml_program_build(&options, program, err);
}
