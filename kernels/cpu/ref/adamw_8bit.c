/* AdamW with moments in 8 bits. The same bits on every backend: wherever a product meets a sum the
 * two are one fmaf, so that no compiler chooses between fusing them and not. What belongs to the
 * step or to a block is multiplied out beforehand, and the root of the second bias is in the step
 * and in eps, as bitsandbytes' kernels have it: one division and one root an element. */
#include <float.h>
#include <math.h>

#include "check.h"
#include "convert.h"
#include "device.h"
#include "ops.h"
#include "update.h"
#include "vec.h"

enum { MAP = PML_DYNAMIC_CODES, BLOCK = PML_ADAMW_8BIT_BLOCK, PIECE = 64 * BLOCK };

/* What the codes mean, and the middles between neighbours; what depends on the step alone. */
typedef struct moment_job {
    const pml_adamw_8bit_args *a;
    float m_map[MAP], v_map[MAP], m_middle[MAP], v_middle[MAP];
    float keep, step, eps, new1, beta1, new2, beta2, scale;
} moment_job;

static void make_middles(const float map[MAP], float middle[MAP])
{
    for (int i = 0; i + 1 < MAP; i++)
        middle[i] = (map[i] + map[i + 1]) * 0.5F;
    middle[MAP - 1] = INFINITY; /* nothing is nearer to a code above the last */
}

/* How many middles lie below x: the nearest code, a tie goes to the lower. 0 for NaN. */
PMLI_INLINE int nearest(const float middle[MAP], float x)
{
    int code = 0;
    for (int half = MAP / 2; half > 0; half /= 2)
        code += middle[code + half - 1] < x ? half : 0;
    return code;
}

PMLI_CLONES static void update_block(const moment_job *job, int64_t block)
{
    const pml_adamw_8bit_args *a = job->a;
    int64_t first = block * BLOCK, n = pmli_min(BLOCK, a->p.cols - first);
    float *p = (float *)a->p.data + first;
    const float *g = (const float *)a->g.data + first;
    uint8_t *m_code = (uint8_t *)a->m.data + first, *v_code = (uint8_t *)a->v.data + first;
    float *m_largest = (float *)a->m_largest.data + block;
    float *v_largest = (float *)a->v_largest.data + block;
    const float m_was = job->beta1 * *m_largest, v_was = job->beta2 * *v_largest;
    float m[BLOCK], v[BLOCK], m_top = 0, v_top = 0;
    for (int64_t i = 0; i < n; i++) {
        float grad = g[i] * job->scale;
        m[i] = fmaf(job->new1, grad, job->m_map[m_code[i]] * m_was);
        v[i] = fmaf(job->new2 * grad, grad, job->v_map[v_code[i]] * v_was);
        m_top = fmaxf(m_top, fabsf(m[i]));
        v_top = fmaxf(v_top, v[i]);
        p[i] = fmaf(p[i], job->keep, -(job->step * m[i] / (sqrtf(v[i]) + job->eps)));
    }
    *m_largest = m_top;
    *v_largest = v_top;
    const float m_inverse = m_top >= FLT_MIN ? 1.0F / m_top : 0;
    const float v_inverse = v_top >= FLT_MIN ? 1.0F / v_top : 0;
    for (int64_t i = 0; i < n; i++) {
        int code = nearest(job->m_middle, m[i] * m_inverse);
        if (m[i] < 0 && job->m_map[code] == 0)
            code--;
        m_code[i] = (uint8_t)code;
        v_code[i] = (uint8_t)nearest(job->v_middle, v[i] * v_inverse);
    }
}

static void update_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const moment_job *job = arg;
    const pml_adamw_8bit_args *a = job->a;
    int64_t first = item * PIECE, last = pmli_min(first + PIECE, a->p.cols);
    for (int64_t at = first; at < last; at += BLOCK)
        update_block(job, at / BLOCK);
    if (a->copy.data != NULL)
        pmli_convert((const float *)a->p.data + first, PML_F32,
                     (char *)a->copy.data + (size_t)first * pml_dtype_size(a->copy.dtype),
                     a->copy.dtype, last - first);
}

pml_status pmli_cpu_adamw_8bit(pml_queue *queue, const pml_adamw_8bit_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_adamw_8bit, err);
    int64_t blocks = pmli_div_up(a->p.cols, BLOCK);
    PMLI_NEED(&c, a, p, 1, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, g, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, m, 1, a->p.cols, PML_U8);
    PMLI_NEED(&c, a, v, 1, a->p.cols, PML_U8);
    PMLI_NEED(&c, a, m_largest, 1, blocks, PML_F32);
    PMLI_NEED(&c, a, v_largest, 1, blocks, PML_F32);
    PMLI_NEED(&c, a, hyper, 1, PML_HYPER_COUNT, PML_F32);
    pmli_check_copy(&c, &a->p, &a->copy);
    if (c.status != PML_OK || pmli_is_skipped(&a->hyper))
        return c.status;
    const float *hyper = a->hyper.data;
    const double lr = hyper[PML_HYPER_LR], root2 = sqrt((double)hyper[PML_HYPER_BIAS2]);
    const double new1 = hyper[PML_HYPER_ONE_MINUS_BETA1], new2 = hyper[PML_HYPER_ONE_MINUS_BETA2];
    moment_job job = {.a = a,
                      .keep = (float)(1.0 - lr * hyper[PML_HYPER_WEIGHT_DECAY]),
                      .step = (float)(lr * root2 / hyper[PML_HYPER_BIAS1]),
                      .eps = (float)(hyper[PML_HYPER_EPS] * root2),
                      .new1 = (float)new1,
                      .beta1 = (float)(1.0 - new1),
                      .new2 = (float)new2,
                      .beta2 = (float)(1.0 - new2),
                      .scale = hyper[PML_HYPER_GRAD_SCALE]};
    pml_dynamic_map(true, job.m_map);
    pml_dynamic_map(false, job.v_map);
    make_middles(job.m_map, job.m_middle);
    make_middles(job.v_map, job.v_middle);
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(a->p.cols, PIECE), update_piece, &job);
    return PML_OK;
}
