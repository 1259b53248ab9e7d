/* Weights and activations in 8 bits (E4M3), a scale for each row. */
#include "fp8.h"

#include <math.h>
#include <string.h>

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

/* The least power of 2^step that is no less than top / 448; step is a power of two. */
static row_scale power_for(float top, uint32_t step)
{
    float over = top * (1 / PML_E4M3_MOST), into, back;
    uint32_t bits;
    if (top < SMALLEST)
        return (row_scale){0, 0};
    if (isinf(top))
        return (row_scale){0, INFINITY}; /* 0 times it is NaN */
    memcpy(&bits, &over, sizeof bits);
    uint32_t exponent =
        ((((bits + 0x7fffff) >> 23) + step) & ~(step - 1)) - 1; /* 127 is that of 1 */
    uint32_t back_bits = exponent << 23, into_bits = (254 - exponent) << 23;
    memcpy(&back, &back_bits, sizeof back);
    memcpy(&into, &into_bits, sizeof into);
    return (row_scale){into, back};
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
    pml_view pieces; /* their scales */
    int64_t part;    /* columns */
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
        row_scale s = power_for(top_of(x, j->factors, cols), 1);
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

enum { STEP = 4 /* a piece's scale is a power of 2^4 */ };

/* A row's pieces one after the other; to codes, or back where y is F32. */
static void piece_rows(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const job *j = arg;
    int64_t end, cols = j->x.cols;
    bool back = j->y.dtype == PML_F32;
    for (int64_t r = first_row(item, cols, j->x.rows, &end); r < end; r++) {
        float *scale = (float *)j->pieces.data + r * j->pieces.ld;
        for (int64_t first = 0, count; first < cols; first += count, scale++) {
            int64_t left = j->part - first % j->part;
            count = left < PML_FP8_PIECE ? left : PML_FP8_PIECE;
            int64_t from = r * j->x.ld + first, to = r * j->y.ld + first;
            if (back) {
                for (int64_t i = 0; i < count; i++)
                    ((float *)j->y.data)[to + i] =
                        j->values[((const uint8_t *)j->x.data)[from + i]] * *scale;
                continue;
            }
            const float *x = (const float *)j->x.data + from;
            const float *by = j->factors != NULL ? j->factors + first : NULL;
            row_scale s = power_for(top_of(x, by, count), STEP);
            for (int64_t i = 0; i < count; i++)
                ((uint8_t *)j->y.data)[to + i] = pml_e4m3_code(times(x[i], by, i) * s.into);
            *scale = s.back;
        }
    }
}

void pmli_fp8_to_pieces(pmli_pool *pool, pml_view x, const float *by, int64_t parts, pml_view codes,
                        pml_view scale)
{
    job j = {.x = x, .y = codes, .factors = by, .pieces = scale, .part = x.cols / parts};
    run(pool, piece_rows, &j);
}

void pmli_fp8_of_pieces(pmli_pool *pool, pml_view codes, pml_view scale, int64_t parts, pml_view y)
{
    job j = {.x = codes, .y = y, .pieces = scale, .part = codes.cols / parts};
    fill_values(j.values);
    run(pool, piece_rows, &j);
}

void pmli_need_pieces(pmli_check *c, const char *name, const pml_view *codes,
                      const char *scale_name, const pml_view *scale, int64_t rows, int64_t cols,
                      int64_t parts)
{
    pmli_need(c, name, codes, rows, cols, PML_U8);
    pmli_need_that(c, codes->cols % parts == 0, "operand '%s' has %lld columns in %lld parts", name,
                   (long long)codes->cols, (long long)parts);
    pmli_need(c, scale_name, scale, codes->rows, parts * pml_fp8_pieces(codes->cols / parts),
              PML_F32);
}

static void turn_rows(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const job *j = arg;
    int64_t end;
    for (int64_t r = first_row(item, j->x.cols, j->x.rows, &end); r < end; r++)
        for (int64_t i = 0; i < j->x.cols; i++)
            ((uint8_t *)j->y.data)[i * j->y.ld + r] = ((const uint8_t *)j->x.data)[r * j->x.ld + i];
}

pml_status pmli_cpu_fp8_turn(pml_queue *queue, const pml_fp8_turn_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_fp8_turn, err);
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_U8);
    PMLI_NEED(&c, a, y, a->x.cols, a->x.rows, PML_U8);
    if (c.status != PML_OK)
        return c.status;
    job j = {.x = a->x, .y = a->y};
    run(pmli_pool_of(queue), turn_rows, &j);
    return PML_OK;
}

static void widen_turned(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const job *j = arg;
    int64_t end;
    for (int64_t r = first_row(item, j->x.cols, j->x.rows, &end); r < end; r++)
        for (int64_t i = 0; i < j->x.cols; i++)
            ((float *)j->y.data)[i * j->y.ld + r] =
                j->values[((const uint8_t *)j->x.data)[r * j->x.ld + i]];
}

void pmli_fp8_widen_turned(pmli_pool *pool, pml_view codes, pml_view y)
{
    job j = {.x = codes, .y = y};
    fill_values(j.values);
    run(pool, widen_turned, &j);
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
