/* RMSNorm with the residual add in front of it. Zhang & Sennrich, "Root Mean Square Layer
 * Normalization", 2019. */
#include <math.h>

#include "check.h"
#include "device.h"
#include "ops.h"
#include "vec.h"

PMLI_INLINE float sum_squares(const float *x, int64_t n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

PMLI_CLONES static const float *add_row(const pml_rmsnorm_args *a, int64_t t)
{
    const float *x = (const float *)a->x.data + t * a->x.ld;
    const float *add = (const float *)a->add.data + t * a->add.ld;
    float *sum = (float *)a->sum.data + t * a->sum.ld;
#pragma omp simd
    for (int64_t i = 0; i < a->x.cols; i++)
        sum[i] = x[i] + add[i];
    return sum;
}

/* A function of its own: the norm of a sum and one that reads this sum later, where it is made
 * again, have the same bits only by the same code, of which a compiler is free to make two. */
PMLI_CLONES static float norm_row(const float *x, const float *weight, float eps, int64_t n,
                                  float *y)
{
    float rstd = 1.0F / sqrtf(sum_squares(x, n) / (float)n + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        y[i] = x[i] * rstd * weight[i];
    return rstd;
}

static void norm_rows(const pml_rmsnorm_args *a, int64_t first, int64_t last)
{
    for (int64_t t = first; t < last; t++) {
        const float *x =
            a->add.data != NULL ? add_row(a, t) : (const float *)a->x.data + t * a->x.ld;
        ((float *)a->rstd.data)[t] =
            norm_row(x, a->weight.data, a->eps, a->x.cols, (float *)a->y.data + t * a->y.ld);
    }
}

static void norm_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_rmsnorm_args *a = arg;
    int64_t piece = pmli_piece_rows(a->x.cols);
    norm_rows(a, item * piece, pmli_min((item + 1) * piece, a->x.rows));
}

pml_status pmli_cpu_rmsnorm(pml_queue *queue, const pml_rmsnorm_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rmsnorm, err);
    int64_t rows = a->x.rows, cols = a->x.cols;
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_MAY(&c, a, add, rows, cols, PML_F32);
    PMLI_NEED(&c, a, weight, 1, cols, PML_F32);
    if (a->add.data != NULL)
        PMLI_NEED(&c, a, sum, rows, cols, PML_F32);
    PMLI_NEED(&c, a, y, rows, cols, PML_F32);
    PMLI_NEED(&c, a, rstd, 1, rows, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(rows, pmli_piece_rows(cols)), norm_piece,
                  (void *)a);
    return PML_OK;
}

/* dweight is a sum over tokens. Each of at most NORM_PARTS blocks of tokens makes its own sum in
 * ws, then they are added in order: the same bits for any number of threads. */
enum { NORM_PARTS = 32, NORM_PART_ROWS = 16 };

static int64_t part_rows(int64_t rows)
{
    int64_t n = pmli_div_up(rows, NORM_PARTS);
    return n < NORM_PART_ROWS ? NORM_PART_ROWS : n;
}

size_t pmli_cpu_rmsnorm_bwd_ws(const pml_rmsnorm_bwd_args *a)
{
    if (a->dweight.rows <= 0 || a->x.rows <= 0)
        return 0;
    /* At least as many as there are blocks, and never fewer for more rows: 512 rows make 32 blocks
     * and 513 only 31, but a plan asks once, for the most rows that will come. */
    int64_t parts = pmli_min(pmli_div_up(a->x.rows, NORM_PART_ROWS), NORM_PARTS);
    return (size_t)parts * (size_t)a->x.cols * sizeof(float);
}

/* With g = dy * weight and n = x * rstd:  dx = rstd (g - n mean(g n)) + dres. */
PMLI_CLONES static void norm_bwd_rows(const pml_rmsnorm_bwd_args *a, int64_t first, int64_t last,
                                      float *dweight)
{
    const float *weight = a->weight.data;
    int64_t n = a->x.cols;
    for (int64_t t = first; t < last; t++) {
        const float *x = (const float *)a->x.data + t * a->x.ld;
        const float *dy = (const float *)a->dy.data + t * a->dy.ld;
        float *dx = (float *)a->dx.data + t * a->dx.ld;
        float rstd = ((const float *)a->rstd.data)[t], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < n; i++)
            dot += dy[i] * weight[i] * x[i];
        if (dweight != NULL) /* before dx, which may lie on dy */
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                dweight[i] += dy[i] * x[i] * rstd;
        float back = dot * rstd * rstd * rstd / (float)n;
        if (a->dres.data != NULL) {
            const float *dres = (const float *)a->dres.data + t * a->dres.ld;
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                dx[i] = dy[i] * weight[i] * rstd - x[i] * back + dres[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                dx[i] = dy[i] * weight[i] * rstd - x[i] * back;
        }
        if (a->rounded.data != NULL)
            memcpy((float *)a->rounded.data + t * a->rounded.ld, dx, (size_t)n * sizeof *dx);
    }
}

static void norm_bwd_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_rmsnorm_bwd_args *a = arg;
    int64_t piece = part_rows(a->x.rows);
    float *dweight = NULL;
    if (a->dweight.data != NULL) {
        dweight = (float *)a->ws.data + item * a->x.cols;
        memset(dweight, 0, (size_t)a->x.cols * sizeof(float));
    }
    norm_bwd_rows(a, item * piece, pmli_min((item + 1) * piece, a->x.rows), dweight);
}

PMLI_CLONES static void add_parts(const float *parts, int64_t count, int64_t cols, float *out)
{
    for (int64_t p = 0; p < count; p++)
#pragma omp simd
        for (int64_t i = 0; i < cols; i++)
            out[i] += parts[p * cols + i];
}

pml_status pmli_cpu_rmsnorm_bwd(pml_queue *queue, const pml_rmsnorm_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rmsnorm_bwd, err);
    int64_t rows = a->x.rows, cols = a->x.cols;
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, dy, rows, cols, PML_F32);
    PMLI_NEED(&c, a, weight, 1, cols, PML_F32);
    PMLI_NEED(&c, a, rstd, 1, rows, PML_F32);
    PMLI_MAY(&c, a, dres, rows, cols, PML_F32);
    PMLI_NEED(&c, a, dx, rows, cols, PML_F32);
    PMLI_MAY(&c, a, rounded, rows, cols, PML_F32);
    PMLI_MAY(&c, a, dweight, 1, cols, PML_F32);
    if (a->dweight.data != NULL)
        pmli_need_ws(&c, &a->ws, pmli_cpu_rmsnorm_bwd_ws(a));
    if (c.status != PML_OK || rows == 0)
        return c.status;
    int64_t parts = pmli_div_up(rows, part_rows(rows));
    pmli_pool_run(pmli_pool_of(queue), parts, norm_bwd_piece, (void *)a);
    if (a->dweight.data != NULL)
        add_parts(a->ws.data, parts, cols, a->dweight.data);
    return PML_OK;
}
