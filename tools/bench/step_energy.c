#include "step_energy.h"

#include <ctype.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pml/base/clock.h"
#include "pml_op/gauges.h"
#include "stepper_impl.h"

enum { EDGES_MOST = 8192, LABELS_MOST = 256, NODES_MOST = 1 << 14, GRAPH_OPS_MOST = 512 };
static const size_t COPIED = (size_t)512 << 20; /* and written once more */
/* Labels that take less in a step than LEAST are only timed. */
static const double GRAPH_SECONDS = 0.02, EDGE_SECONDS = 1e-3, LEAST_SECONDS = 2e-4;

/* The count's steps, as a thread sees them come. */
typedef struct edge {
    double time, joules, clock; /* clock: MHz then */
} edge;

typedef struct meter {
    pml_gauges *gauges;
    pthread_t thread;
    atomic_bool over;
    atomic_int n;
    edge edges[EDGES_MOST];
} meter;

typedef struct bench {
    pml_stepper *stepper;
    meter meter;
    double seconds;
    void *scratch;
    size_t scratch_bytes;
} bench;

/* What one op took, on average. */
typedef struct cost {
    double seconds, watts, clock;
    int edges;
} cost;

/* The other gauges take a while to read: right behind an edge, where the next is furthest off. */
static void *watch(void *argument)
{
    meter *m = argument;
    double last = -1, joules;
    pml_error err = PML_ERROR_INIT;
    while (!atomic_load(&m->over)) {
        nanosleep(&(struct timespec){.tv_nsec = (long)(EDGE_SECONDS * 1e9)}, NULL);
        int n = atomic_load(&m->n);
        if (n == EDGES_MOST || pml_gauges_energy(m->gauges, &joules, &err) != PML_OK)
            break; /* whoever waits for edges gets none, and says so */
        if (joules == last)
            continue;
        pml_reading reading;
        m->edges[n] = (edge){.time = pml_clock_monotonic(), .joules = joules};
        pml_gauges_read(m->gauges, &reading);
        m->edges[n].clock = reading.value[PML_GAUGE_clock];
        last = joules;
        atomic_store(&m->n, n + 1);
    }
    return NULL;
}

/* Power and clock between the first and the last edge from begin to now. */
static pml_status read_meter(meter *m, double begin, cost *c, pml_error *err)
{
    const double end = pml_clock_monotonic();
    int n = atomic_load(&m->n), first = 0, last;
    while (first < n && m->edges[first].time < begin)
        first++;
    for (last = first; last + 1 < n && m->edges[last + 1].time <= end;)
        last++;
    if (first >= n || last == first)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "NVML counted energy less than twice in %.2f s: measure for longer",
                        end - begin);
    double clock = 0;
    for (int i = first; i <= last; i++)
        clock += m->edges[i].clock / (last - first + 1);
    c->watts = (m->edges[last].joules - m->edges[first].joules) /
               (m->edges[last].time - m->edges[first].time);
    c->clock = clock;
    c->edges = last - first;
    return PML_OK;
}

/* ---- loops ---- */

static pml_status record(pml_stepper *s, pml_op op, const pml_op_args *args, int times,
                         pml_graph **graph, pml_error *err)
{
    pml_error at_end = PML_ERROR_INIT;
    size_t bytes = 0;
    pml_status status = s->backend->graph_begin(s->queue, err);
    if (status != PML_OK)
        return status;
    for (int i = 0; status == PML_OK && i < times; i++)
        status = pml_op_run(s->backend, op, s->queue, args, err);
    pml_status ended = s->backend->graph_end(s->queue, SIZE_MAX, graph, &bytes, &at_end);
    if (status == PML_OK && ended != PML_OK) {
        *err = at_end;
        return ended;
    }
    return status;
}

static pml_status launch(pml_stepper *s, pml_graph *graph, int times, double *seconds,
                         pml_error *err)
{
    pml_status status = s->backend->mark(s->queue, 0, err);
    for (int i = 0; status == PML_OK && i < times; i++)
        status = s->backend->graph_launch(s->queue, graph, err);
    if (status == PML_OK)
        status = s->backend->mark(s->queue, 1, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    return status == PML_OK ? s->backend->between(s->queue, 0, 1, seconds, err) : status;
}

/* The op in a loop: a graph of some, as often as fit into the time. count: how many a step has. */
static pml_status loop(bench *b, pml_op op, const pml_op_args *args, int count, cost *c,
                       pml_error *err)
{
    pml_stepper *s = b->stepper;
    pml_graph *graph = NULL;
    double once = 0, all = 0;
    pml_status status = record(s, op, args, 1, &graph, err);
    if (status == PML_OK)
        status = launch(s, graph, 1, &once, err);
    if (status == PML_OK)
        status = launch(s, graph, 1, &once, err); /* the second is warm */
    c->seconds = once;
    if (status != PML_OK || once * count < LEAST_SECONDS)
        goto cleanup;
    int ops = (int)(GRAPH_SECONDS / once) + 1;
    ops = ops < GRAPH_OPS_MOST ? ops : GRAPH_OPS_MOST;
    s->backend->graph_destroy(&graph);
    status = record(s, op, args, ops, &graph, err);
    if (status != PML_OK)
        goto cleanup;
    int launches = (int)(b->seconds / (once * ops)) + 1;
    status = launch(s, graph, launches / 3 + 1, &all, err);
    double begin = pml_clock_monotonic();
    if (status == PML_OK)
        status = launch(s, graph, launches, &all, err);
    if (status == PML_OK)
        status = read_meter(&b->meter, begin, c, err);
    c->seconds = all / launches / ops;
cleanup:
    if (graph != NULL)
        s->backend->graph_destroy(&graph);
    return status;
}

static size_t reach(const pml_view *v)
{
    return (size_t)(v->rows * v->ld) * pml_dtype_size(v->dtype);
}

/* What an op writes over its own input would be another input the next time: it goes elsewhere. */
static pml_status turn_aside(bench *b, pml_op op, pml_op_args *args, pml_error *err)
{
    const pml_op_info *info = pml_op_describe(op);
    pml_view *views = pml_op_views(args);
    for (int out = 0; out < info->n_views; out++)
        for (int in = 0; in < info->n_views; in++) {
            if (toupper(info->signature[out]) != 'O' || toupper(info->signature[in]) != 'I' ||
                views[out].data == NULL || views[out].data != views[in].data)
                continue;
            if (reach(&views[out]) > b->scratch_bytes)
                return PML_FAIL(err, PML_INTERNAL, "%s writes %zu bytes over its input: no room",
                                info->name, reach(&views[out]));
            views[out].data = b->scratch;
        }
    return PML_OK;
}

/* ---- the table ---- */

static void print_head(void)
{
    printf("%-24s %-12s %5s %9s %7s %6s %9s %9s %8s %9s %6s\n", "label", "op", "count", "ms each",
           "W", "MHz", "ms/step", "J/step", "GB each", "TFLOP", "edges");
}

static void print_line(const char *label, const char *op, int count, const cost *c,
                       const pml_cost *work)
{
    printf("%-24s %-12s %5d %9.4f %7.1f %6.0f %9.3f %9.3f %8.4f %9.4f %6d\n", label, op, count,
           c->seconds * 1e3, c->watts, c->clock, c->seconds * 1e3 * count,
           c->watts * c->seconds * count, work->bytes * 1e-9, work->flops * 1e-12, c->edges);
    fflush(stdout);
}

typedef struct label {
    const char *name;
    int count, seen; /* nodes of it; those that have run */
} label;

typedef struct sums {
    label labels[LABELS_MOST];
    int n;
    double seconds, joules;
} sums;

static const pml_segment segments[] = {PML_SEGMENT_MICRO, PML_SEGMENT_NORM, PML_SEGMENT_UPDATE,
                                       PML_SEGMENT_CLEAR};
enum { SEGMENTS = (int)(sizeof segments / sizeof *segments) };

/* NULL: more than there is room for. */
static label *label_of(sums *all, const char *name)
{
    int i = 0;
    while (i < all->n && strcmp(all->labels[i].name, name) != 0)
        i++;
    if (i == LABELS_MOST)
        return NULL;
    if (i == all->n)
        all->labels[all->n++].name = name;
    return &all->labels[i];
}

static pml_status count_labels(const pml_stepper *s, sums *all, pml_error *err)
{
    for (int k = 0; k < SEGMENTS; k++)
        for (int32_t i = s->program->segments[segments[k]].first;
             i < s->program->segments[segments[k]].end; i++) {
            label *l = label_of(all, s->program->nodes[i].label);
            if (l == NULL)
                return PML_FAIL(err, PML_INTERNAL, "more labels than there is room for");
            l->count++;
        }
    return PML_OK;
}

/* One node: in a loop where it is the middle one of its label, and then as the step has it. */
static pml_status run_node(bench *b, sums *all, const pml_node *node, const pml_counts *counts,
                           pml_error *err)
{
    pml_stepper *s = b->stepper;
    pml_op_args args;
    label *l = label_of(all, node->label);
    pml_status status = PML_OK;
    pml_program_bind(s->program, node, s->arena, counts, &args);
    if (l->seen++ == l->count / 2 && node->op != PML_OP_allreduce) {
        pml_op_args again = args;
        cost c = {0};
        pml_cost work = pml_node_cost(node->op, &again);
        pml_program_bind(s->program, node, s->arena, counts, &again);
        status = turn_aside(b, node->op, &again, err);
        if (status == PML_OK)
            status = loop(b, node->op, &again, l->count, &c, err);
        if (status != PML_OK)
            return pml_error_prefix(err, "%s", node->label);
        print_line(l->name, pml_op_describe(node->op)->name, l->count, &c, &work);
        all->seconds += c.seconds * l->count;
        all->joules += c.seconds * c.watts * l->count;
    }
    return pmli_run_node(s, node, &args, err);
}

static pml_status run_all(bench *b, sums *all, const pml_batch *batch, pml_error *err)
{
    pml_stepper *s = b->stepper;
    /* With a learning rate and a gradient scale of 0 the update reads and writes all it would. */
    static const float zeros[2][PML_HYPER_COUNT] = {{[PML_HYPER_BIAS1] = 1, [PML_HYPER_BIAS2] = 1},
                                                    {[PML_HYPER_BIAS1] = 1, [PML_HYPER_BIAS2] = 1}};
    pml_counts counts;
    pml_status status = pmli_take_batch(s, batch, &counts, err);
    const pml_counts none = {0};
    for (int k = 0; status == PML_OK && k < SEGMENTS; k++) {
        if (segments[k] == PML_SEGMENT_UPDATE)
            status = pmli_upload(s, s->program->hyper, zeros, sizeof zeros, err);
        for (int32_t i = s->program->segments[segments[k]].first;
             status == PML_OK && i < s->program->segments[segments[k]].end; i++)
            status = run_node(b, all, &s->program->nodes[i],
                              segments[k] == PML_SEGMENT_MICRO ? &counts : &none, err);
    }
    return status == PML_OK ? s->backend->sync(s->queue, err) : status;
}

static pml_status whole_steps(bench *b, void (*step)(void *user), void *user, pml_error *err)
{
    cost c = {0};
    const pml_cost nothing = {0};
    int steps = 0;
    for (double end = pml_clock_monotonic() + b->seconds; pml_clock_monotonic() < end;)
        step(user);
    double begin = pml_clock_monotonic();
    for (; pml_clock_monotonic() < begin + 3 * b->seconds; steps++)
        step(user);
    c.seconds = (pml_clock_monotonic() - begin) / steps;
    pml_status status = read_meter(&b->meter, begin, &c, err);
    if (status == PML_OK)
        print_line("whole steps", "", 1, &c, &nothing);
    return status;
}

static pml_status idle_card(bench *b, pml_error *err)
{
    cost c = {.seconds = b->seconds};
    const pml_cost nothing = {0};
    double begin = pml_clock_monotonic();
    nanosleep(&(struct timespec){.tv_sec = (time_t)b->seconds,
                                 .tv_nsec = (long)((b->seconds - (int)b->seconds) * 1e9)},
              NULL);
    pml_status status = read_meter(&b->meter, begin, &c, err);
    if (status == PML_OK)
        print_line("nothing runs", "", 0, &c, &nothing);
    return status;
}

/* Of weights, which are no zeros. */
static pml_status copies(bench *b, pml_error *err)
{
    pml_stepper *s = b->stepper;
    cost c = {0};
    pml_op_args args = {.copy = {.x = pml_vector(s->arena, (int64_t)COPIED, PML_U8),
                                 .y = pml_vector(b->scratch, (int64_t)COPIED, PML_U8)}};
    const pml_cost work = pml_node_cost(PML_OP_copy, &args);
    pml_status status = loop(b, PML_OP_copy, &args, 1, &c, err);
    if (status == PML_OK)
        print_line("copy", "copy", 0, &c, &work);
    return status;
}

pml_status step_energy_print(pml_stepper *s, const char *bus, double seconds,
                             const pml_batch *batch, void (*step)(void *user), void *user,
                             pml_error *err)
{
    static bench b;
    static sums all;
    bool watches = false;
    b = (bench){.stepper = s, .seconds = seconds, .scratch_bytes = COPIED};
    all = (sums){.n = 0};
    if (s->backend->graph_begin == NULL)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s records no loops", s->backend->name);
    if (s->plan.arena < COPIED)
        return PML_FAIL(err, PML_INVALID, "a model this small tells nothing of energy");
    pml_status status = pml_gauges_new(bus, NULL, &b.meter.gauges, err);
    double joules;
    if (status == PML_OK)
        status = pml_gauges_energy(b.meter.gauges, &joules, err);
    if (status == PML_OK)
        status = s->backend->alloc(s->device, b.scratch_bytes, &b.scratch, err);
    if (status == PML_OK) {
        watches = pthread_create(&b.meter.thread, NULL, watch, &b.meter) == 0;
        status = watches ? PML_OK : PML_FAIL(err, PML_NO_MEMORY, "no thread to read energy");
    }
    if (status != PML_OK)
        goto cleanup;
    print_head();
    status = whole_steps(&b, step, user, err);
    if (status == PML_OK)
        status = count_labels(s, &all, err);
    if (status == PML_OK)
        status = run_all(&b, &all, batch, err);
    if (status == PML_OK)
        printf("%-24s %70.3f %9.3f\n", "sum of ops", all.seconds * 1e3, all.joules);
    if (status == PML_OK)
        status = copies(&b, err);
    if (status == PML_OK)
        status = whole_steps(&b, step, user, err);
    if (status == PML_OK)
        status = idle_card(&b, err);
cleanup:
    if (watches) {
        atomic_store(&b.meter.over, true);
        pthread_join(b.meter.thread, NULL);
    }
    if (b.scratch != NULL)
        s->backend->free(s->device, &b.scratch, b.scratch_bytes);
    pml_gauges_destroy(&b.meter.gauges);
    return status;
}
