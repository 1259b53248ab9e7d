/* NF4: 4-bit NormalFloat weights with doubly quantised scales, bit for bit as bitsandbytes stores
 * and reads them (Dettmers et al., QLoRA, 2023). */
#include <math.h>

#include "check.h"
#include "device.h"
#include "gemm.h"
#include "nf4.h"
#include "ops.h"
#include "vec.h"

/* The index of the nearest of `n` ascending values; a tie takes the lower. */
static int nearest(const float *values, int n, float x)
{
    int low = 0, high = n - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if ((values[middle] + values[middle + 1]) / 2.0F < x)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static float largest(const float *x, int64_t n)
{
    float top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++)
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    return top;
}

/* bitsandbytes bounds the magnitude of a last, partial block from below, and only of that one. */
static float block_absmax(const float *x, int64_t n)
{
    float top = largest(x, n);
    return n < PML_NF4_BLOCK && top < 1e-38F ? 1e-38F : top;
}

/* ---- the mean of all magnitudes ---- */

/* torch's mean of a float32 vector, in the order in which its AVX2 kernel adds on one thread: 4
 * vectors of 8 lanes side by side, carried up through 4 levels. Any order would do for training;
 * this one gives the bits of bitsandbytes where that is defined at all (its own mean differs in the
 * last bit between AVX2, AVX-512, CUDA and, beyond 32768 blocks, numbers of threads). */
enum { LANES = 8, SIDES = 4, LEVELS = 4, ROW = LANES * SIDES };

typedef struct cascade {
    float level[LEVELS][ROW];
    int64_t rows, done;
    int power;
} cascade;

static void cascade_begin(cascade *c, int64_t values)
{
    memset(c, 0, sizeof *c);
    c->rows = values / ROW;
    int log2 = 0; /* rounded up */
    while (((int64_t)1 << log2) < c->rows)
        log2++;
    c->power = log2 / LEVELS > 4 ? log2 / LEVELS : 4;
}

static void cascade_row(cascade *c, const float *row)
{
    for (int i = 0; i < ROW; i++)
        c->level[0][i] += row[i];
    c->done++;
    int64_t step = (int64_t)1 << c->power;
    if (c->done % step != 0)
        return;
    for (int j = 1; j < LEVELS; j++) {
        for (int i = 0; i < ROW; i++) {
            c->level[j][i] += c->level[j - 1][i];
            c->level[j - 1][i] = 0;
        }
        if ((c->done & ((step - 1) << (j * c->power))) != 0)
            break;
    }
}

/* rest: the values that fill no row. */
static float cascade_end(cascade *c, const float *rest, int64_t n)
{
    float total = 0;
    int64_t whole = n / LANES * LANES;
    for (int j = 1; j < LEVELS; j++)
        for (int i = 0; i < ROW; i++)
            c->level[0][i] += c->level[j][i];
    for (int64_t i = 0; i < whole; i++)
        c->level[0][i % LANES] += rest[i];
    for (int side = 1; side < SIDES; side++)
        for (int i = 0; i < LANES; i++)
            c->level[0][i] += c->level[0][side * LANES + i];
    for (int64_t i = whole; i < n; i++)
        total += rest[i];
    for (int i = 0; i < LANES; i++)
        total += c->level[0][i];
    return total;
}

static float mean_absmax(const float *x, int64_t n)
{
    int64_t blocks = pml_nf4_blocks(n);
    cascade sum;
    float row[ROW];
    int filled = 0;
    cascade_begin(&sum, blocks);
    for (int64_t b = 0; b < blocks; b++) {
        row[filled++] =
            block_absmax(x + b * PML_NF4_BLOCK, pmli_min(PML_NF4_BLOCK, n - b * PML_NF4_BLOCK));
        if (filled == ROW) {
            cascade_row(&sum, row);
            filled = 0;
        }
    }
    return cascade_end(&sum, row, filled) / (float)blocks;
}

/* ---- quantise ---- */

typedef struct quantise_job {
    const pml_nf4_quantise_args *a;
    int64_t n;
    float offset, map[PML_DYNAMIC_CODES];
} quantise_job;

/* A partial block is divided, a whole one multiplied by the inverse: as bitsandbytes does. */
static void quantise_block(const float *x, int64_t n, float absmax, uint8_t *codes)
{
    float inverse = 1.0F / (absmax < 1e-38F ? 1e-38F : absmax);
    for (int64_t i = 0; i < n; i += 2) {
        int pair[2] = {7, 7};
        for (int64_t k = 0; k < 2 && i + k < n; k++) {
            float scaled = n < PML_NF4_BLOCK ? x[i + k] / absmax : x[i + k] * inverse;
            pair[k] = nearest(pml_nf4_values, PML_NF4_VALUES, scaled);
        }
        codes[i / 2] = (uint8_t)(pair[0] << 4 | pair[1]);
    }
}

static uint8_t absmax_code(const quantise_job *job, float absmax, float inverse)
{
    float x = (absmax - job->offset) * inverse;
    int32_t grid = job->a->grid;
    x = x < -1.0F ? -1.0F : x > 1.0F ? 1.0F : x;
    if (grid > 0) {
        float index = floorf(fmaf((x + 1.0F) * 0.5F, (float)grid, 0.5F));
        x = -1.0F + 2.0F * index / (float)grid;
    }
    return (uint8_t)nearest(job->map, PML_DYNAMIC_CODES, x);
}

/* 256 blocks, whose magnitudes share one scale. */
static void quantise_group(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const quantise_job *job = arg;
    const pml_nf4_quantise_args *a = job->a;
    float absmax[PML_NF4_NESTED], scale = 0;
    int64_t first = item * PML_NF4_NESTED;
    int64_t blocks = pmli_min(PML_NF4_NESTED, pml_nf4_blocks(job->n) - first);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t at = (first + b) * PML_NF4_BLOCK, n = pmli_min(PML_NF4_BLOCK, job->n - at);
        const float *x = (const float *)a->x.data + at;
        absmax[b] = block_absmax(x, n);
        scale = fmaxf(scale, fabsf(absmax[b] - job->offset));
        quantise_block(x, n, absmax[b], (uint8_t *)a->codes.data + at / 2);
    }
    float inverse = scale > 0 ? 1.0F / scale : 0;
    for (int64_t b = 0; b < blocks; b++)
        ((uint8_t *)a->absmax.data)[first + b] =
            scale > 0 ? absmax_code(job, absmax[b], inverse) : 0;
    ((float *)a->nested.data)[item] = scale;
}

void pmli_nf4_check_stored(pmli_check *c, const pml_nf4_quantise_args *a)
{
    pmli_need_that(c, a->x.ld == a->x.cols && a->x.rows > 0 && a->x.cols > 0,
                   "operand 'x' must have elements and no border");
    if (c->status != PML_OK)
        return;
    int64_t n = a->x.rows * a->x.cols;
    PMLI_NEED(c, a, codes, 1, pml_nf4_codes(n), PML_U8);
    PMLI_NEED(c, a, absmax, 1, pml_nf4_blocks(n), PML_U8);
    PMLI_NEED(c, a, nested, 1, pml_nf4_nested(n), PML_F32);
    PMLI_NEED(c, a, offset, 1, 1, PML_F32);
    pmli_need_that(c, a->grid >= 0, "grid is %d, must not be negative", a->grid);
}

pml_status pmli_cpu_nf4_quantise(pml_queue *queue, const pml_nf4_quantise_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_nf4_quantise, err);
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    pmli_nf4_check_stored(&c, a);
    if (c.status != PML_OK)
        return c.status;
    int64_t n = a->x.rows * a->x.cols;
    quantise_job job = {.a = a, .n = n, .offset = mean_absmax(a->x.data, n)};
    pml_dynamic_map(true, job.map);
    *(float *)a->offset.data = job.offset;
    pmli_pool_run(pmli_pool_of(queue), pml_nf4_nested(n), quantise_group, &job);
    return PML_OK;
}

/* ---- dequantise ---- */

/* One weight of the stack, as pointers to its own. */
typedef struct dequantise_job {
    const uint8_t *codes, *absmax;
    const float *nested;
    float offset, *y;
    int64_t n;
    float map[PML_DYNAMIC_CODES];
} dequantise_job;

PMLI_CLONES static void dequantise_block(const uint8_t *codes, int64_t n, float absmax, float *y)
{
    float values[PML_NF4_VALUES];
    for (int i = 0; i < PML_NF4_VALUES; i++)
        values[i] = pml_nf4_values[i] * absmax;
    for (int64_t i = 0; i < n / 2; i++) {
        y[2 * i] = values[codes[i] >> 4];
        y[2 * i + 1] = values[codes[i] & 15];
    }
    if (n % 2 != 0)
        y[n - 1] = values[codes[n / 2] >> 4];
}

static void dequantise_group(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const dequantise_job *job = arg;
    int64_t first = item * PML_NF4_NESTED, last = first + PML_NF4_NESTED;
    last = pmli_min(last, pml_nf4_blocks(job->n));
    for (int64_t b = first; b < last; b++) {
        float scale = job->map[job->absmax[b]] * job->nested[item];
        dequantise_block(job->codes + b * (PML_NF4_BLOCK / 2),
                         pmli_min(PML_NF4_BLOCK, job->n - b * PML_NF4_BLOCK), scale + job->offset,
                         job->y + b * PML_NF4_BLOCK);
    }
}

void pmli_nf4_check_parts(pmli_check *c, const pml_nf4_dequantise_args *a)
{
    pmli_need_that(c, a->y.cols > 0, "operand 'y' has no columns");
    pmli_need_that(c, a->parts >= 1 && a->parts <= PML_LINEAR_MAX_PARTS,
                   "parts is %d, must be 1 to %d", a->parts, PML_LINEAR_MAX_PARTS);
    if (c->status != PML_OK)
        return;
    int64_t rows = 0, codes = 0, blocks = 0, nested = 0;
    for (int p = 0; p < a->parts; p++) {
        int64_t n = a->part_rows[p] * a->y.cols;
        pmli_need_that(c, a->part_rows[p] > 0, "part_rows[%d] is %d, must be positive", p,
                       a->part_rows[p]);
        rows += a->part_rows[p];
        codes += pml_nf4_codes(n);
        blocks += pml_nf4_blocks(n);
        nested += pml_nf4_nested(n);
    }
    pmli_need_that(c, rows == a->y.rows, "part_rows add up to %lld, operand 'y' has %lld rows",
                   (long long)rows, (long long)a->y.rows);
    PMLI_NEED(c, a, codes, 1, codes, PML_U8);
    PMLI_NEED(c, a, absmax, 1, blocks, PML_U8);
    PMLI_NEED(c, a, nested, 1, nested, PML_F32);
    PMLI_NEED(c, a, offset, 1, a->parts, PML_F32);
}

static pml_status check_dequantise(const pml_nf4_dequantise_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_nf4_dequantise, err);
    PMLI_NEED(&c, a, y, PMLI_ANY, PMLI_ANY, PML_F32);
    pmli_need_that(&c, a->y.ld == a->y.cols, "operand 'y' must have no border");
    pmli_nf4_check_parts(&c, a);
    return c.status;
}

pml_status pmli_cpu_nf4_dequantise(pml_queue *queue, const pml_nf4_dequantise_args *a,
                                   pml_error *err)
{
    pml_status status = check_dequantise(a, err);
    if (status != PML_OK)
        return status;
    dequantise_job job = {
        .codes = a->codes.data, .absmax = a->absmax.data, .nested = a->nested.data, .y = a->y.data};
    pml_dynamic_map(true, job.map);
    for (int p = 0; p < a->parts; p++) {
        job.n = a->part_rows[p] * a->y.cols;
        job.offset = ((const float *)a->offset.data)[p];
        pmli_pool_run(pmli_pool_of(queue), pml_nf4_nested(job.n), dequantise_group, &job);
        job.codes += pml_nf4_codes(job.n);
        job.absmax += pml_nf4_blocks(job.n);
        job.nested += pml_nf4_nested(job.n);
        job.y += job.n;
    }
    return PML_OK;
}
