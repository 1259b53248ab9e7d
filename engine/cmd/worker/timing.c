#include "timing.h"

enum { WINDOW = 8, FIRST_MARK = 3, CHUNK = 256 };
static const double peak_seconds = 0.05;

void timing_before(timing *t, const job_kind *kind, job *j, worker_link *link)
{
    if (kind->timing == NULL)
        return;
    if (t->mark == 0)
        t->mark = FIRST_MARK;
    t->step++;
    if (t->on || t->step == 1 || t->step + WINDOW <= t->mark || kind->is_compiling(j))
        return;
    link_drain(link); /* the times of the last mark are read by then */
    kind->timing(j, true);
    t->on = true;
    t->steps = t->tokens = 0;
    t->seconds = 0;
}

/* 3, 10, 30, 100, … */
static int64_t next_mark(int64_t mark)
{
    for (int64_t ten = 10;; ten *= 10) {
        if (mark < ten)
            return ten;
        if (mark < 3 * ten)
            return 3 * ten;
    }
}

typedef struct chunk {
    int64_t step, steps, tokens;
    double seconds;
    pml_peak peak;
    const pml_op_time *times; /* lie still until the next timing_before that begins anew */
    int32_t first, end;
    bool done;
} chunk;

static void write_peak(pml_message *event, const pml_peak *peak)
{
    if (peak->gemm_size > 0) {
        pml_message_set_number(event, "gemm_flops", peak->gemm_flops);
        pml_message_set_int(event, "gemm_size", peak->gemm_size);
    }
    if (peak->copy_size > 0) {
        pml_message_set_number(event, "copy_bytes", peak->copy_bytes);
        pml_message_set_int(event, "copy_size", peak->copy_size);
    }
}

static pml_message *write_chunk(const void *facts)
{
    const chunk *c = facts;
    pml_message *event = pml_message_new(PML_EVENT_profile);
    pml_message_set_int(event, "step", c->step);
    pml_message_set_int(event, "steps", c->steps);
    pml_message_set_number(event, "seconds", c->seconds);
    pml_message_set_int(event, "tokens", c->tokens);
    write_peak(event, &c->peak);
    pml_message_set_empty(event, "ops");
    for (int32_t n = c->first; n < c->end; n++) {
        const pml_op_time *t = &c->times[n];
        if (t->calls == 0)
            continue;
        pml_message *op = pml_message_new(PML_RECORD_op_time);
        pml_message_set_int(op, "node", n);
        pml_message_set_int(op, "calls", t->calls);
        pml_message_set_number(op, "seconds", t->seconds);
        pml_message_set_number(op, "flops", t->flops);
        pml_message_set_number(op, "bytes", t->bytes);
        pml_message_append(event, "ops", op);
    }
    pml_message_set_bool(event, "done", c->done);
    return link_wrap(event);
}

static void tell(const timing *t, const pml_op_time *times, int32_t n, worker_link *link,
                 int64_t step)
{
    for (int32_t at = 0; at < n; at += CHUNK) {
        const chunk c = {.step = step,
                         .steps = t->steps,
                         .tokens = t->tokens,
                         .seconds = t->seconds,
                         .peak = t->peak,
                         .times = times,
                         .first = at,
                         .end = at + CHUNK < n ? at + CHUNK : n,
                         .done = at + CHUNK >= n};
        link_post(link, write_chunk, &c, sizeof c);
    }
}

/* Whatever disturbs such a measurement makes it lower. */
static void keep_best(pml_peak *best, const pml_peak *now)
{
    if (now->gemm_flops > best->gemm_flops) {
        best->gemm_flops = now->gemm_flops;
        best->gemm_size = now->gemm_size;
    }
    if (now->copy_bytes > best->copy_bytes) {
        best->copy_bytes = now->copy_bytes;
        best->copy_size = now->copy_size;
    }
}

pml_status timing_after(timing *t, const job_kind *kind, job *j, worker_link *link, int64_t step,
                        int64_t tokens, double seconds, pml_error *err)
{
    if (!t->on)
        return PML_OK;
    t->steps++;
    t->tokens += tokens;
    t->seconds += seconds;
    if (t->step < t->mark)
        return PML_OK;
    kind->timing(j, false);
    t->on = false;
    t->mark = next_mark(t->mark);
    pml_peak now;
    pml_status status = kind->peak(j, peak_seconds, &now, err);
    if (status == PML_OK)
        keep_best(&t->peak, &now);
    int32_t n;
    const pml_op_time *times = kind->times(j, &n);
    if (status == PML_OK)
        tell(t, times, n, link, step);
    return status;
}
