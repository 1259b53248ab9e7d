/* RMSNorm of each head of queries and keys (Qwen3). Same arithmetic as rmsnorm, on rows of
 * head_dim, all heads of a token one after another; queries have one weight, keys another. */
#include <math.h>

#include "check.h"
#include "device.h"
#include "ops.h"
#include "vec.h"

enum { NORM_PARTS = 32, NORM_PART_ROWS = 16 };

PMLI_CLONES static void norm_rows(const pml_head_norm_args *a, int64_t first, int64_t last)
{
    int64_t n = a->head_dim, heads = a->heads + a->kv_heads;
    for (int64_t t = first; t < last; t++) {
        const float *x = (const float *)a->x.data + t * a->x.ld;
        float *y = (float *)a->y.data + t * a->y.ld;
        float *rstd = (float *)a->rstd.data + t * a->rstd.ld;
        for (int64_t h = 0; h < heads; h++, x += n, y += n) {
            const float *weight = h < a->heads ? a->q_weight.data : a->k_weight.data;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; i++)
                sum += x[i] * x[i];
            float scale = 1.0F / sqrtf(sum / (float)n + a->eps);
            rstd[h] = scale;
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                y[i] = x[i] * scale * weight[i];
        }
    }
}

static void norm_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_head_norm_args *a = arg;
    int64_t piece = pmli_piece_rows(a->x.cols);
    norm_rows(a, item * piece, pmli_min((item + 1) * piece, a->x.rows));
}

static void check_heads(pmli_check *c, int32_t heads, int32_t kv_heads, int32_t head_dim)
{
    pmli_need_that(c, heads > 0 && kv_heads > 0 && head_dim > 0,
                   "heads (%d), kv_heads (%d) and head_dim (%d) must be positive", heads, kv_heads,
                   head_dim);
}

pml_status pmli_cpu_head_norm(pml_queue *queue, const pml_head_norm_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_head_norm, err);
    int64_t rows = a->x.rows, heads = (int64_t)a->heads + a->kv_heads;
    check_heads(&c, a->heads, a->kv_heads, a->head_dim);
    PMLI_NEED(&c, a, x, PMLI_ANY, heads * a->head_dim, PML_F32);
    PMLI_NEED(&c, a, q_weight, 1, a->head_dim, PML_F32);
    PMLI_NEED(&c, a, k_weight, 1, a->head_dim, PML_F32);
    PMLI_NEED(&c, a, y, rows, a->x.cols, PML_F32);
    PMLI_NEED(&c, a, rstd, rows, heads, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(rows, pmli_piece_rows(a->x.cols)), norm_piece,
                  (void *)a);
    return PML_OK;
}

/* The weights' gradients are sums over tokens and heads: as in rmsnorm_bwd, each of at most
 * NORM_PARTS blocks of tokens makes its own in ws, then they are added in order. */
static int64_t part_rows(int64_t rows)
{
    int64_t n = pmli_div_up(rows, NORM_PARTS);
    return n < NORM_PART_ROWS ? NORM_PART_ROWS : n;
}

size_t pmli_cpu_head_norm_bwd_ws(const pml_head_norm_bwd_args *a)
{
    if (a->dq_weight.rows <= 0 || a->x.rows <= 0)
        return 0;
    int64_t parts = pmli_min(pmli_div_up(a->x.rows, NORM_PART_ROWS), NORM_PARTS);
    return (size_t)parts * 2 * (size_t)a->head_dim * sizeof(float);
}

/* With g = dy * weight:  dx = rstd (g - x rstd^2 mean(g x)). sums: | queries' | keys' | or NULL. */
PMLI_CLONES static void norm_bwd_rows(const pml_head_norm_bwd_args *a, int64_t first, int64_t last,
                                      float *sums)
{
    int64_t n = a->head_dim, heads = a->heads + a->kv_heads;
    for (int64_t t = first; t < last; t++) {
        const float *x = (const float *)a->x.data + t * a->x.ld;
        const float *dy = (const float *)a->dy.data + t * a->dy.ld;
        const float *rstds = (const float *)a->rstd.data + t * a->rstd.ld;
        float *dx = (float *)a->dx.data + t * a->dx.ld;
        for (int64_t h = 0; h < heads; h++, x += n, dy += n, dx += n) {
            const float *weight = h < a->heads ? a->q_weight.data : a->k_weight.data;
            float rstd = rstds[h], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < n; i++)
                dot += dy[i] * weight[i] * x[i];
            if (sums != NULL) { /* before dx, which may lie on dy */
                float *sum = h < a->heads ? sums : sums + n;
#pragma omp simd
                for (int64_t i = 0; i < n; i++)
                    sum[i] += dy[i] * x[i] * rstd;
            }
            float back = dot * rstd * rstd * rstd / (float)n;
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                dx[i] = dy[i] * weight[i] * rstd - x[i] * back;
        }
    }
}

static void norm_bwd_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_head_norm_bwd_args *a = arg;
    int64_t piece = part_rows(a->x.rows);
    float *sums = NULL;
    if (a->dq_weight.data != NULL) {
        sums = (float *)a->ws.data + item * 2 * a->head_dim;
        memset(sums, 0, 2 * (size_t)a->head_dim * sizeof(float));
    }
    norm_bwd_rows(a, item * piece, pmli_min((item + 1) * piece, a->x.rows), sums);
}

static void add_parts(const float *parts, int64_t count, int64_t n, float *dq, float *dk)
{
    for (int64_t p = 0; p < count; p++, parts += 2 * n)
        for (int64_t i = 0; i < n; i++) {
            dq[i] += parts[i];
            dk[i] += parts[n + i];
        }
}

pml_status pmli_cpu_head_norm_bwd(pml_queue *queue, const pml_head_norm_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_head_norm_bwd, err);
    int64_t rows = a->x.rows, heads = (int64_t)a->heads + a->kv_heads;
    check_heads(&c, a->heads, a->kv_heads, a->head_dim);
    PMLI_NEED(&c, a, x, PMLI_ANY, heads * a->head_dim, PML_F32);
    PMLI_NEED(&c, a, dy, rows, a->x.cols, PML_F32);
    PMLI_NEED(&c, a, q_weight, 1, a->head_dim, PML_F32);
    PMLI_NEED(&c, a, k_weight, 1, a->head_dim, PML_F32);
    PMLI_NEED(&c, a, rstd, rows, heads, PML_F32);
    PMLI_NEED(&c, a, dx, rows, a->x.cols, PML_F32);
    PMLI_MAY(&c, a, dq_weight, 1, a->head_dim, PML_F32);
    PMLI_MAY(&c, a, dk_weight, 1, a->head_dim, PML_F32);
    pmli_need_pair(&c, "dq_weight", &a->dq_weight, "dk_weight", &a->dk_weight);
    if (a->dq_weight.data != NULL)
        pmli_need_ws(&c, &a->ws, pmli_cpu_head_norm_bwd_ws(a));
    if (c.status != PML_OK || rows == 0)
        return c.status;
    int64_t parts = pmli_div_up(rows, part_rows(rows));
    pmli_pool_run(pmli_pool_of(queue), parts, norm_bwd_piece, (void *)a);
    if (a->dq_weight.data != NULL)
        add_parts(a->ws.data, parts, a->head_dim, a->dq_weight.data, a->dk_weight.data);
    return PML_OK;
}
