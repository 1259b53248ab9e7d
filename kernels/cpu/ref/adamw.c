/* The update: gradient clipping's factor, AdamW and SGD. Loshchilov & Hutter, "Decoupled Weight
 * Decay Regularization", 2019; arithmetic in the order of torch.optim.AdamW. */
#include <math.h>

#include "check.h"
#include "convert.h"
#include "device.h"
#include "ops.h"
#include "update.h"
#include "vec.h"

pml_status pmli_cpu_clip_scale(pml_queue *queue, const pml_clip_scale_args *a, pml_error *err)
{
    (void)queue;
    pmli_check c = pmli_check_begin(PML_OP_clip_scale, err);
    PMLI_NEED(&c, a, sumsq, 1, 1, PML_F64);
    PMLI_NEED(&c, a, hyper, PMLI_ANY, PML_HYPER_COUNT, PML_F32);
    PMLI_MAY(&c, a, norm, 1, 1, PML_F32);
    PMLI_MAY(&c, a, loss, 1, 1, PML_F64);
    pmli_need_that(&c, a->hyper.rows > 0, "operand 'hyper' must have a row");
    if (c.status != PML_OK)
        return c.status;
    float *hyper = a->hyper.data;
    double mean = hyper[PML_HYPER_MEAN], limit = hyper[PML_HYPER_MAX_NORM];
    double norm = sqrt(*(const double *)a->sumsq.data) * mean;
    double factor = limit > 0 ? limit / (norm + 1e-6) : 1.0;
    factor = factor > 1.0 ? 1.0 : factor;
    bool sound =
        isfinite((float)norm) && (a->loss.data == NULL || isfinite(*(const double *)a->loss.data));
    for (int64_t g = 0; g < a->hyper.rows; g++)
        hyper[g * a->hyper.ld + PML_HYPER_GRAD_SCALE] = sound ? (float)(mean * factor) : NAN;
    if (a->norm.data != NULL)
        *(float *)a->norm.data = (float)norm;
    return PML_OK;
}

enum { UPDATE_PIECE = 16384 };

PMLI_CLONES static void adamw_range(const void *args, int64_t first, int64_t last)
{
    const pml_adamw_args *a = args;
    const float *hyper = a->hyper.data, *g = a->g.data;
    float *p = a->p.data, *m = a->m.data, *v = a->v.data;
    const double lr = hyper[PML_HYPER_LR];
    const float keep = (float)(1.0 - lr * hyper[PML_HYPER_WEIGHT_DECAY]);
    const float step = (float)(lr / hyper[PML_HYPER_BIAS1]);
    const float root2 = (float)sqrt((double)hyper[PML_HYPER_BIAS2]);
    const float new1 = hyper[PML_HYPER_ONE_MINUS_BETA1], new2 = hyper[PML_HYPER_ONE_MINUS_BETA2];
    const float beta2 = (float)(1.0 - (double)new2), eps = hyper[PML_HYPER_EPS];
    const float scale = hyper[PML_HYPER_GRAD_SCALE];
#pragma omp simd
    for (int64_t i = first; i < last; i++) {
        float grad = g[i] * scale;
        float m1 = m[i] + (grad - m[i]) * new1;
        float v1 = beta2 * v[i] + new2 * grad * grad;
        m[i] = m1;
        v[i] = v1;
        p[i] = p[i] * keep - step * m1 / (sqrtf(v1) / root2 + eps);
    }
}

/* What the update leaves, in the dtype of whoever computes with it. */
static void make_copy(const pml_view *p, const pml_view *copy, int64_t first, int64_t last)
{
    if (copy->data != NULL)
        pmli_convert((const float *)p->data + first, PML_F32,
                     (char *)copy->data + (size_t)first * pml_dtype_size(copy->dtype), copy->dtype,
                     last - first);
}

bool pmli_is_skipped(const pml_view *hyper)
{
    return !isfinite(((const float *)hyper->data)[PML_HYPER_GRAD_SCALE]);
}

void pmli_check_copy(pmli_check *c, const pml_view *p, const pml_view *copy)
{
    if (copy->data == NULL)
        return;
    pmli_need_any(c, "copy", copy, 1, p->cols);
    pmli_need_that(c, pmli_can_convert(PML_F32, copy->dtype),
                   "operand 'copy' is %s; must be F32, BF16 or F16", pml_dtype_name(copy->dtype));
}

/* An update of all of p, a piece a job. */
typedef struct update_job {
    const void *args;
    void (*range)(const void *args, int64_t first, int64_t last);
    const pml_view *p, *copy;
} update_job;

static void update_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const update_job *job = arg;
    int64_t first = item * UPDATE_PIECE, last = pmli_min(first + UPDATE_PIECE, job->p->cols);
    job->range(job->args, first, last);
    make_copy(job->p, job->copy, first, last);
}

static pml_status run_update(pml_queue *queue, update_job job, const pml_view *hyper)
{
    if (pmli_is_skipped(hyper))
        return PML_OK;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(job.p->cols, UPDATE_PIECE), update_piece, &job);
    return PML_OK;
}

pml_status pmli_cpu_adamw(pml_queue *queue, const pml_adamw_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_adamw, err);
    PMLI_NEED(&c, a, p, 1, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, g, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, m, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, v, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, hyper, 1, PML_HYPER_COUNT, PML_F32);
    pmli_check_copy(&c, &a->p, &a->copy);
    if (c.status != PML_OK)
        return c.status;
    return run_update(queue, (update_job){a, adamw_range, &a->p, &a->copy}, &a->hyper);
}

PMLI_CLONES static void sgd_range(const void *args, int64_t first, int64_t last)
{
    const pml_sgd_args *a = args;
    const float *hyper = a->hyper.data, *g = a->g.data;
    float *p = a->p.data, *m = a->m.data;
    const float lr = hyper[PML_HYPER_LR], decay = hyper[PML_HYPER_WEIGHT_DECAY];
    const float momentum = hyper[PML_HYPER_MOMENTUM], fresh = hyper[PML_HYPER_NEW_GRAD];
    const float scale = hyper[PML_HYPER_GRAD_SCALE];
    const float ahead = a->nesterov ? 1.0F : 0.0F;
    if (m == NULL) {
#pragma omp simd
        for (int64_t i = first; i < last; i++)
            p[i] -= lr * (g[i] * scale + decay * p[i]);
        return;
    }
#pragma omp simd
    for (int64_t i = first; i < last; i++) {
        float grad = g[i] * scale + decay * p[i];
        float m1 = momentum * m[i] + fresh * grad;
        m[i] = m1;
        p[i] -= lr * (ahead > 0 ? grad + momentum * m1 : m1);
    }
}

pml_status pmli_cpu_sgd(pml_queue *queue, const pml_sgd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_sgd, err);
    PMLI_NEED(&c, a, p, 1, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, g, 1, a->p.cols, PML_F32);
    PMLI_MAY(&c, a, m, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, hyper, 1, PML_HYPER_COUNT, PML_F32);
    pmli_need_that(&c, !a->nesterov || a->m.data != NULL, "nesterov needs operand 'm'");
    pmli_check_copy(&c, &a->p, &a->copy);
    if (c.status != PML_OK)
        return c.status;
    return run_update(queue, (update_job){a, sgd_range, &a->p, &a->copy}, &a->hyper);
}
