#include "pml/train/profile.h"

#include <string.h>

#include "pml/base/clock.h"
#include "pml/base/philox.h"
#include "stepper_impl.h"

void pml_stepper_timing(pml_stepper *s, bool on)
{
    if (on)
        memset(s->times, 0, (size_t)s->program->n_nodes * sizeof *s->times);
    s->timing = on;
}

const pml_op_time *pml_stepper_times(const pml_stepper *s, int32_t *n_nodes)
{
    *n_nodes = s->program->n_nodes;
    return s->times;
}

/* Nodes [first, end), one mark before and after each; their times are read after a sync, so that a
 * device that works behind the host is not held up between them. */
static pml_status run_stretch(pml_stepper *s, int32_t first, int32_t end, const pml_counts *counts,
                              pml_error *err)
{
    const pml_program *p = s->program;
    pml_status status = s->backend->mark(s->queue, 0, err);
    for (int32_t i = first; status == PML_OK && i < end; i++) {
        pml_op_args args;
        pml_program_bind(p, &p->nodes[i], s->arena, counts, &args);
        pml_cost cost = pml_node_cost(p->nodes[i].op, &args);
        if (p->nodes[i].op != PML_OP_allreduce || pmli_is_shared(s)) {
            s->times[i].flops += cost.flops;
            s->times[i].bytes += cost.bytes;
            s->times[i].calls++;
        }
        status = pmli_run_node(s, &p->nodes[i], &args, err);
        if (status == PML_OK)
            status = s->backend->mark(s->queue, i - first + 1, err);
    }
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    for (int32_t i = first; status == PML_OK && i < end; i++) {
        double seconds = 0;
        status = s->backend->between(s->queue, i - first, i - first + 1, &seconds, err);
        s->times[i].seconds += s->times[i].calls > 0 ? seconds : 0;
    }
    return status;
}

pml_status pmli_run_timed(pml_stepper *s, pml_segment segment, const pml_counts *counts,
                          pml_error *err)
{
    const int32_t most = PMLI_MARKS - 1;
    pml_status status = PML_OK;
    int32_t end = s->program->segments[segment].end;
    for (int32_t at = s->program->segments[segment].first; status == PML_OK && at < end; at += most)
        status = run_stretch(s, at, at + most < end ? at + most : end, counts, err);
    return status;
}

/* ---- one batch, for benches ---- */

static pml_status collect(const pml_stepper *s, pml_profile_row *rows, int capacity, int *n,
                          pml_error *err)
{
    for (int32_t i = 0; i < s->program->n_nodes; i++) {
        const pml_node *node = &s->program->nodes[i];
        const pml_op_time *t = &s->times[i];
        if (t->calls == 0 || node->op == PML_OP_allreduce)
            continue;
        if (*n == capacity)
            return PML_FAIL(err, PML_INVALID, "more ops than the profile has room for");
        rows[(*n)++] = (pml_profile_row){.label = node->label,
                                         .op = node->op,
                                         .layer = node->layer,
                                         .again = node->again,
                                         .seconds = t->seconds,
                                         .flops = t->flops,
                                         .bytes = t->bytes};
    }
    return PML_OK;
}

pml_status pml_stepper_profile(pml_stepper *s, const pml_batch *batch, pml_profile_row *rows,
                               int capacity, int *n, pml_error *err)
{
    static const pml_segment after[] = {PML_SEGMENT_UPDATE, PML_SEGMENT_CLEAR};
    const pml_counts none = {0};
    /* With a learning rate and a gradient scale of 0 the update reads and writes all it would. */
    const float zeros[2][PML_HYPER_COUNT] = {{[PML_HYPER_BIAS1] = 1, [PML_HYPER_BIAS2] = 1},
                                             {[PML_HYPER_BIAS1] = 1, [PML_HYPER_BIAS2] = 1}};
    pml_counts counts;
    *n = 0;
    pml_status status = pmli_take_batch(s, batch, &counts, err);
    pml_stepper_timing(s, true);
    if (status == PML_OK)
        status = pmli_run_segment(s, PML_SEGMENT_MICRO, &counts, err);
    if (status == PML_OK)
        status = pmli_run_segment(s, PML_SEGMENT_NORM, &none, err);
    if (status == PML_OK)
        status = pmli_upload(s, s->program->hyper, zeros, sizeof zeros, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    for (size_t i = 0; status == PML_OK && i < sizeof after / sizeof *after; i++)
        status = pmli_run_segment(s, after[i], &none, err);
    pml_stepper_timing(s, false);
    return status == PML_OK ? collect(s, rows, capacity, n, err) : status;
}

/* ---- what the device can do ---- */

/* A GPU's caches are larger, and it takes a larger product to keep all of it busy. */
typedef struct pmli_sizes {
    int32_t gemm;
    size_t copy, room;
} pmli_sizes;
static const pmli_sizes host_sizes = {1024, (size_t)64 << 20, (size_t)80 << 20};
static const pmli_sizes gpu_sizes = {8192, (size_t)1 << 30, (size_t)1200 << 20};
enum { LEAST_GEMM = 64 };

static const pmli_sizes *sizes_for(const pml_stepper *s)
{
    return strcmp(s->backend->name, "cpu") == 0 ? &host_sizes : &gpu_sizes;
}

/* The arena's end, where transient tensors have their places. */
static char *idle_region(const pml_stepper *s, size_t *bytes)
{
    size_t begin = s->program->arena;
    for (int32_t i = 0; i < s->program->n_tensors; i++) {
        const pml_tensor *t = &s->program->tensors[i];
        if (!t->persistent && t->first >= 0 && t->offset < begin)
            begin = t->offset;
    }
    size_t room = sizes_for(s)->room;
    *bytes = s->program->arena - begin;
    *bytes = *bytes < room ? *bytes : room;
    return (char *)s->arena + begin;
}

/* Best of as many as fit into the time, since everything that disturbs makes it longer. */
static pml_status best_of(pml_stepper *s, pml_op op, const pml_op_args *args, double seconds,
                          double *best, pml_error *err)
{
    const double end = pml_clock_monotonic() + seconds;
    pml_status status = PML_OK;
    *best = 0;
    for (int i = 0; status == PML_OK && (i < 3 || pml_clock_monotonic() < end); i++) {
        double took = 0;
        status = s->backend->mark(s->queue, 0, err);
        if (status == PML_OK)
            status = pml_op_run(s->backend, op, s->queue, args, err);
        if (status == PML_OK)
            status = s->backend->mark(s->queue, 1, err);
        if (status == PML_OK)
            status = s->backend->sync(s->queue, err);
        if (status == PML_OK)
            status = s->backend->between(s->queue, 0, 1, &took, err);
        if (took > 0 && (*best == 0 || took < *best))
            *best = took;
    }
    return status;
}

static pml_status copy_floats(pml_stepper *s, char *from, char *to, size_t floats, pml_error *err)
{
    const pml_op_args args = {.copy = {.x = pml_vector(from, (int64_t)floats, PML_F32),
                                       .y = pml_vector(to, (int64_t)floats, PML_F32)}};
    return pml_op_run(s->backend, PML_OP_copy, s->queue, &args, err);
}

/* Numbers of either sign between 1/8 and 2 in each half of a word, so in every dtype: neither NaNs
 * nor denormals, which are slow, nor all the same, of which chips take less power than of weights.
 * A first piece comes from the host, and is copied behind itself. */
static pml_status draw_numbers(pml_stepper *s, char *at, size_t bytes, pml_error *err)
{
    const size_t all = bytes / sizeof(float);
    size_t n = s->staged_ints < all ? s->staged_ints : all;
    for (size_t i = 0; i < n; i++) {
        uint32_t word = pml_philox_at(0, 0, PML_PURPOSE_SAMPLE, i).word[0];
        s->staged[i] = (int32_t)((word & 0x81ff81ffU) | 0x3e003e00U);
    }
    pml_status status = s->backend->upload(s->queue, at, s->staged, n * sizeof(float), err);
    for (size_t done = n; status == PML_OK && done < all; done += n) {
        n = done < all - done ? done : all - done;
        status = copy_floats(s, at, at + done * sizeof(float), n, err);
    }
    return status;
}

/* y = x w^T of n rows and columns, the largest for which there is room. */
static pml_status measure_gemm(pml_stepper *s, char *at, size_t room, double seconds,
                               pml_peak *peak, pml_error *err)
{
    for (int32_t n = sizes_for(s)->gemm; n >= LEAST_GEMM; n /= 2) {
        const size_t one = (size_t)n * (size_t)n * pml_dtype_size(s->config.dtype);
        pml_op_args args = {.linear = {.x = pml_matrix(at, n, n, s->config.dtype),
                                       .w = pml_matrix(at + one, n, n, s->config.dtype),
                                       .y = pml_matrix(at + 2 * one, n, n, s->config.dtype),
                                       .parts = 1,
                                       .part_cols = {n}}};
        size_t ws = s->backend->workspace(s->device, PML_OP_linear, &args);
        double best;
        if (3 * one + ws > room)
            continue;
        if (ws > 0)
            args.linear.ws = pml_vector(at + 3 * one, (int64_t)ws, PML_U8);
        pml_status status = best_of(s, PML_OP_linear, &args, seconds, &best, err);
        if (best > 0) {
            peak->gemm_size = n;
            peak->gemm_flops = 2.0 * n * n * n / best;
        }
        return status;
    }
    return PML_OK;
}

pml_status pml_stepper_peak(pml_stepper *s, double seconds, pml_peak *peak, pml_error *err)
{
    size_t room;
    char *at = idle_region(s, &room);
    *peak = (pml_peak){0};
    pml_status status = s->backend->sync(s->queue, err);
    const size_t most = sizes_for(s)->copy;
    size_t half = (room < most ? room : most) / 2 / 256 * 256;
    if (status == PML_OK && half > 0)
        status = draw_numbers(s, at, room, err);
    if (status == PML_OK)
        status = measure_gemm(s, at, room, seconds / 2, peak, err);
    if (status != PML_OK || half == 0)
        return status;
    double best;
    const int64_t floats = (int64_t)(half / sizeof(float));
    const pml_op_args copy = {.copy = {.x = pml_vector(at, floats, PML_F32),
                                       .y = pml_vector(at + half, floats, PML_F32)}};
    status = best_of(s, PML_OP_copy, &copy, seconds / 2, &best, err);
    if (best > 0) {
        peak->copy_size = (int64_t)(2 * half);
        peak->copy_bytes = 2.0 * (double)half / best;
    }
    return status;
}
