/* Lifetimes and places.
 *
 *   offset ▲  ┌──────────────┐            persistent tensors lie below, end to end; above them the
 *          │  │ b            │ ┌────┐     transient ones of all segments share one region: two may
 *          │  └──┬───────────┘ │ d  │     overlap in place when they do not in time
 *          │ ┌───┴─────┐ ┌─────┴────┤
 *          │ │ a       │ │ c        │
 *          └─┴─────────┴─┴──────────┴──► nodes
 *
 * Placed from the largest to the smallest, each into the tightest gap among those already placed
 * whose lifetimes meet its own (Pisarchyk & Lee, Efficient Memory Management for Deep Neural Net
 * Inference, 2020, "greedy by size"). */
#include <stdlib.h>

#include "build.h"

static size_t aligned(size_t bytes)
{
    return (bytes + PMLI_ALIGN - 1) / PMLI_ALIGN * PMLI_ALIGN;
}

/* Bytes of a tensor's place; false on overflow. */
static bool tensor_bytes(const pml_tensor *t, size_t *bytes)
{
    size_t elements;
    int64_t rows, pitch;
    if (t->rows < 0 || t->cols < 0 || __builtin_add_overflow(t->rows, t->below, &rows) ||
        __builtin_add_overflow(t->cols, t->border, &pitch) ||
        __builtin_mul_overflow((size_t)rows, (size_t)pitch, &elements) ||
        __builtin_mul_overflow(elements, pml_dtype_size(t->dtype), bytes) || *bytes > SIZE_MAX / 4)
        return false;
    *bytes = aligned(*bytes);
    return true;
}

static void touch(pml_tensor *t, int32_t node)
{
    if (t->first < 0 || node < t->first)
        t->first = node;
    if (node > t->last)
        t->last = node;
}

static void find_lifetimes(pml_program *p)
{
    for (int32_t i = 0; i < p->n_tensors; i++)
        p->tensors[i].first = p->tensors[i].last = -1;
    for (int s = 0; s < PML_SEGMENT_COUNT; s++)
        for (int32_t n = p->segments[s].first; n < p->segments[s].end; n++)
            for (int v = 0; v < PML_OP_MAX_VIEWS; v++) {
                int32_t id = p->nodes[n].operands[v].tensor;
                if (id < 0)
                    continue;
                pml_tensor *t = &p->tensors[id];
                touch(t, n);
                if (t->held) {
                    touch(t, p->segments[s].first);
                    touch(t, p->segments[s].end - 1);
                }
            }
    if (p->loading >= 0) /* before all segments: as if in one that has nothing else */
        touch(&p->tensors[p->loading], p->segments[PML_SEGMENT_CLEAR].first);
}

/* By size downwards; equals in order of first use, then of number: the order is total. */
typedef struct placed {
    size_t bytes, offset;
    int32_t first, last, tensor;
} placed;

static int by_size(const void *left, const void *right)
{
    const placed *a = left, *b = right;
    if (a->bytes != b->bytes)
        return a->bytes < b->bytes ? 1 : -1;
    if (a->first != b->first)
        return a->first < b->first ? -1 : 1;
    return a->tensor < b->tensor ? -1 : a->tensor > b->tensor;
}

/* done[0..n) is kept in order of offset. */
static size_t tightest_gap(const placed *done, int32_t n, const placed *item)
{
    size_t end = 0, best = SIZE_MAX, best_width = SIZE_MAX;
    for (int32_t i = 0; i < n; i++) {
        if (done[i].last < item->first || done[i].first > item->last)
            continue;
        if (done[i].offset > end) {
            size_t width = done[i].offset - end;
            if (width >= item->bytes && width < best_width) {
                best = end;
                best_width = width;
            }
        }
        if (done[i].offset + done[i].bytes > end)
            end = done[i].offset + done[i].bytes;
    }
    return best != SIZE_MAX ? best : end;
}

static void insert_by_offset(placed *done, int32_t n, placed item)
{
    while (n > 0 && done[n - 1].offset > item.offset) {
        done[n] = done[n - 1];
        n--;
    }
    done[n] = item;
}

static pml_status place_transient(pml_program *p, size_t base, size_t *top, pml_error *err)
{
    pml_status status = PML_OK;
    size_t n_bytes = (size_t)p->n_tensors * sizeof(placed);
    placed *items = malloc(n_bytes > 0 ? n_bytes : 1), *done = malloc(n_bytes > 0 ? n_bytes : 1);
    int32_t n = 0;
    if (items == NULL || done == NULL) {
        status = PML_FAIL(err, PML_NO_MEMORY, "no host memory to place %d tensors", p->n_tensors);
        goto cleanup;
    }
    for (int32_t i = 0; i < p->n_tensors; i++) {
        const pml_tensor *t = &p->tensors[i];
        if (t->persistent || t->first < 0)
            continue;
        items[n] = (placed){.first = t->first, .last = t->last, .tensor = i};
        if (!tensor_bytes(t, &items[n].bytes)) {
            status = PML_FAIL(err, PML_INVALID, "tensor '%s' is too large to address", t->name);
            goto cleanup;
        }
        n++;
    }
    qsort(items, (size_t)n, sizeof *items, by_size);
    *top = base;
    for (int32_t i = 0; i < n; i++) {
        items[i].offset = tightest_gap(done, i, &items[i]);
        insert_by_offset(done, i, items[i]);
        p->tensors[items[i].tensor].offset = base + items[i].offset;
        size_t end = base + items[i].offset + items[i].bytes;
        *top = end > *top ? end : *top;
    }
cleanup:
    free(items);
    free(done);
    return status;
}

static pml_status place_persistent(pml_program *p, size_t *top, pml_error *err)
{
    size_t at = 0;
    for (int32_t i = 0; i < p->n_tensors; i++) {
        pml_tensor *t = &p->tensors[i];
        size_t bytes;
        if (!tensor_bytes(t, &bytes))
            return PML_FAIL(err, PML_INVALID, "tensor '%s' is too large to address", t->name);
        if (!t->persistent)
            continue;
        if (t->host) { /* written and read once a micro-batch, all of it alive between */
            t->offset = p->host_bytes;
            if (__builtin_add_overflow(p->host_bytes, bytes, &p->host_bytes))
                return PML_FAIL(err, PML_INVALID, "what is offloaded is too large to address");
            continue;
        }
        if (t->parent >= 0) { /* parents come before their parts */
            t->offset = p->tensors[t->parent].offset + (size_t)t->at * pml_dtype_size(t->dtype);
            continue;
        }
        t->offset = at;
        p->by_cause[t->cause] += bytes;
        if (__builtin_add_overflow(at, bytes, &at))
            return PML_FAIL(err, PML_INVALID, "the model is too large to address");
    }
    *top = at;
    return PML_OK;
}

/* Bytes of transient tensors, and of workspace among them, that live at the fullest node: what each
 * node adds and the one before it gives back, added up in one pass. */
static pml_status fullest(const pml_program *p, size_t *most, size_t *workspace, pml_error *err)
{
    *most = *workspace = 0;
    int64_t(*change)[2] = calloc((size_t)p->n_nodes + 1, sizeof *change);
    if (change == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory to plan %d nodes", p->n_nodes);
    for (int32_t i = 0; i < p->n_tensors; i++) {
        const pml_tensor *t = &p->tensors[i];
        size_t bytes;
        if (t->persistent || t->first < 0)
            continue;
        if (!tensor_bytes(t, &bytes)) {
            free(change);
            return PML_FAIL(err, PML_INVALID, "tensor '%s' is too large to address", t->name);
        }
        size_t scratch = t->cause == PML_CAUSE_WORKSPACE ? bytes : 0;
        change[t->first][0] += (int64_t)bytes;
        change[t->first][1] += (int64_t)scratch;
        change[t->last + 1][0] -= (int64_t)bytes;
        change[t->last + 1][1] -= (int64_t)scratch;
    }
    int64_t live = 0, scratch = 0;
    for (int32_t n = 0; n < p->n_nodes; n++) {
        live += change[n][0];
        scratch += change[n][1];
        if ((size_t)live > *most) {
            *most = (size_t)live;
            *workspace = (size_t)scratch;
        }
    }
    free(change);
    return PML_OK;
}

/* What both begin with: places of what lies still, lifetimes of the rest, and its fullest moment.
 */
static pml_status begin(pml_program *p, size_t *still, size_t *most, size_t *workspace,
                        pml_error *err)
{
    for (int c = 0; c < PML_CAUSE_COUNT; c++)
        p->by_cause[c] = 0;
    p->host_bytes = 0;
    pml_status status = place_persistent(p, still, err);
    if (status != PML_OK)
        return status;
    find_lifetimes(p);
    return fullest(p, most, workspace, err);
}

/* The shared region as causes: workspace is what the op at its fullest moment works in. */
static void share_causes(pml_program *p, size_t region, size_t workspace)
{
    p->by_cause[PML_CAUSE_WORKSPACE] += workspace;
    p->by_cause[PML_CAUSE_ACTIVATIONS] += region - workspace;
}

/* What transient tensors share holds a snapshot, too, on the edge of a page. */
static size_t with_stage(const pml_program *p, size_t region)
{
    size_t least = p->stage_bytes > 0 ? p->stage_bytes + PMLI_PAGE : 0;
    return region > least ? region : least;
}

pml_status pml_program_estimate(pml_program *program, pml_error *err)
{
    size_t still, most, workspace;
    pml_status status = begin(program, &still, &most, &workspace, err);
    if (status != PML_OK)
        return status;
    most = with_stage(program, most);
    program->arena = still + most;
    share_causes(program, most, workspace);
    return PML_OK;
}

pml_status pml_program_place(pml_program *program, pml_error *err)
{
    size_t still, most, workspace;
    pml_status status = begin(program, &still, &most, &workspace, err);
    if (status == PML_OK)
        status = place_transient(program, still, &program->arena, err);
    if (status != PML_OK)
        return status;
    program->arena = still + with_stage(program, program->arena - still);
    program->stage = program->arena / PMLI_PAGE * PMLI_PAGE - program->stage_bytes;
    share_causes(program, program->arena - still, workspace);
    return PML_OK;
}

pml_status pml_program_check_places(const pml_program *p, pml_error *err)
{
    for (int32_t i = 0; i < p->n_tensors; i++) {
        const pml_tensor *a = &p->tensors[i];
        size_t a_bytes, b_bytes;
        if (!tensor_bytes(a, &a_bytes) || a->parent >= 0 || (!a->persistent && a->first < 0))
            continue;
        if (a->offset % PMLI_ALIGN != 0 ||
            a->offset + a_bytes > (a->host ? p->host_bytes : p->arena))
            return PML_FAIL(err, PML_INTERNAL, "tensor '%s' lies outside the arena", a->name);
        for (int32_t j = i + 1; j < p->n_tensors; j++) {
            const pml_tensor *b = &p->tensors[j];
            if (!tensor_bytes(b, &b_bytes) || b->parent >= 0 || a->host != b->host ||
                (!b->persistent && b->first < 0))
                continue;
            bool in_time =
                a->persistent || b->persistent || (a->first <= b->last && b->first <= a->last);
            bool in_place = a->offset < b->offset + b_bytes && b->offset < a->offset + a_bytes;
            if (in_time && in_place)
                return PML_FAIL(err, PML_INTERNAL, "tensors '%s' and '%s' share memory", a->name,
                                b->name);
        }
    }
    return PML_OK;
}
