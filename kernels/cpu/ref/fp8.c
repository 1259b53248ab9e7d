/* Weights and activations in 8 bits (E4M3), a scale for each row. */
#include "fp8.h"

#include <math.h>

#include "gemm.h"
#include "ops.h"
#include "vec.h"

#define SMALLEST 0x1p-100F /* below it rows are zeros */
#define APART    0x1p-8F   /* of the largest of a weight's rows: the least that a row counts as */

/* A row's two factors: what its numbers are multiplied by, and what their codes are worth. */
typedef struct row_scale {
    float into, back;
} row_scale;

static float times(float x, const float *by, int64_t i)
{
    return by != NULL ? x * by[i] : x;
}

static float top_of(const float *x, const float *by, int64_t n)
{
    float top = 0;
    for (int64_t i = 0; i < n; i++) { /* a NaN loses */
        float magnitude = fabsf(times(x[i], by, i));
        top = magnitude > top ? magnitude : top;
    }
    return top;
}

static row_scale scale_of(float top)
{
    if (top < SMALLEST)
        return (row_scale){0, 0};
    return (row_scale){PML_E4M3_MOST / top, top / PML_E4M3_MOST};
}

/* What all codes mean: to look a number up is cheaper than to make it. */
static void fill_values(float values[256])
{
    for (int code = 0; code < 256; code++)
        values[code] = pml_e4m3_value((uint8_t)code);
}

typedef struct job {
    pml_view x, y;
    const float *factors; /* by, or scale */
    float *scale;         /* first each row's top */
    float largest;
    float values[256];
} job;

static int64_t first_row(int64_t item, int64_t cols, int64_t rows, int64_t *end)
{
    int64_t piece = pmli_piece_rows(cols);
    *end = pmli_min((item + 1) * piece, rows);
    return item * piece;
}

static void run(pmli_pool *pool, void (*task)(void *, int64_t, void *), job *j)
{
    pmli_pool_run(pool, pmli_div_up(j->x.rows, pmli_piece_rows(j->x.cols)), task, j);
}

static void round_rows(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const job *j = arg;
    int64_t end, cols = j->x.cols;
    for (int64_t r = first_row(item, cols, j->x.rows, &end); r < end; r++) {
        const float *x = (const float *)j->x.data + r * j->x.ld;
        float *y = (float *)j->y.data + r * j->y.ld;
        row_scale s = scale_of(top_of(x, j->factors, cols));
        for (int64_t i = 0; i < cols; i++)
            y[i] = j->values[pml_e4m3_code(times(x[i], j->factors, i) * s.into)] * s.back;
    }
}

void pmli_fp8_rounded(pmli_pool *pool, pml_view x, const float *by, pml_view y)
{
    job j = {.x = x, .y = y, .factors = by};
    fill_values(j.values);
    run(pool, round_rows, &j);
}

static void widen_rows(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const job *j = arg;
    int64_t end, cols = j->x.cols;
    for (int64_t r = first_row(item, cols, j->x.rows, &end); r < end; r++) {
        const uint8_t *codes = (const uint8_t *)j->x.data + r * j->x.ld;
        float *y = (float *)j->y.data + r * j->y.ld;
        float scale = j->factors != NULL ? j->factors[r] : 1;
        for (int64_t i = 0; i < cols; i++)
            y[i] = j->values[codes[i]] * scale;
    }
}

void pmli_fp8_widen(pmli_pool *pool, pml_view codes, const float *scale, pml_view y)
{
    job j = {.x = codes, .y = y, .factors = scale};
    fill_values(j.values);
    run(pool, widen_rows, &j);
}

static void find_tops(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const job *j = arg;
    int64_t end, cols = j->x.cols;
    for (int64_t r = first_row(item, cols, j->x.rows, &end); r < end; r++)
        j->scale[r] = top_of((const float *)j->x.data + r * j->x.ld, NULL, cols);
}

static void quantise_rows(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const job *j = arg;
    int64_t end, cols = j->x.cols;
    for (int64_t r = first_row(item, cols, j->x.rows, &end); r < end; r++) {
        const float *x = (const float *)j->x.data + r * j->x.ld;
        uint8_t *codes = (uint8_t *)j->y.data + r * j->y.ld;
        float least = j->largest * APART, top = j->scale[r];
        row_scale s = scale_of(top > least ? top : least);
        for (int64_t i = 0; i < cols; i++)
            codes[i] = pml_e4m3_code(x[i] * s.into);
        j->scale[r] = j->largest < SMALLEST ? 1 : s.back;
    }
}

pml_status pmli_cpu_fp8_quantise(pml_queue *queue, const pml_fp8_quantise_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_fp8_quantise, err);
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, codes, a->x.rows, a->x.cols, PML_U8);
    PMLI_NEED(&c, a, scale, 1, a->x.rows, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    job j = {.x = a->x, .y = a->codes, .scale = a->scale.data};
    run(pmli_pool_of(queue), find_tops, &j);
    for (int64_t r = 0; r < a->x.rows; r++)
        j.largest = j.scale[r] > j.largest ? j.scale[r] : j.largest;
    run(pmli_pool_of(queue), quantise_rows, &j);
    return PML_OK;
}

void pmli_need_stored(pmli_check *c, const pml_view *w, const pml_view *w_scale, int64_t rows,
                      int64_t cols)
{
    if (w_scale->data == NULL) {
        pmli_need_weight(c, "w", w, rows, cols);
        return;
    }
    pmli_need(c, "w", w, rows, cols, PML_U8);
    pmli_need(c, "w_scale", w_scale, 1, w->rows, PML_F32);
}
