/* Sums of a whole buffer, in float64. */
#include "check.h"
#include "device.h"
#include "ops.h"
#include "vec.h"

/* At most REDUCE_PARTS runs of rows (or of one row's columns) are summed apart and added in order,
 * whatever the number of threads. */
enum { REDUCE_PARTS = 256, REDUCE_LEAST = 4096 };

typedef struct reduce_job {
    const pml_view *x;
    bool square, by_rows;
    int64_t piece;
    double parts[REDUCE_PARTS];
} reduce_job;

PMLI_INLINE double sum_row(const float *x, int64_t n, bool square)
{
    double sum = 0;
    if (square) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++)
            sum += (double)x[i] * x[i];
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++)
            sum += x[i];
    }
    return sum;
}

PMLI_CLONES static double sum_block(const float *x, int64_t rows, int64_t cols, int64_t ld,
                                    bool square)
{
    double sum = 0;
    for (int64_t r = 0; r < rows; r++)
        sum += sum_row(x + r * ld, cols, square);
    return sum;
}

static void reduce_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    reduce_job *job = arg;
    const pml_view *x = job->x;
    int64_t first = item * job->piece;
    int64_t n = pmli_min(job->piece, (job->by_rows ? x->rows : x->cols) - first);
    job->parts[item] =
        job->by_rows
            ? sum_block((const float *)x->data + first * x->ld, n, x->cols, x->ld, job->square)
            : sum_block((const float *)x->data + first, x->rows, n, x->ld, job->square);
}

static void reduce(pml_queue *queue, const pml_view *x, bool square, double *total)
{
    reduce_job job = {.x = x, .square = square, .by_rows = x->rows > 1};
    int64_t length = job.by_rows ? x->rows : x->cols, other = job.by_rows ? x->cols : x->rows;
    if (length == 0 || other == 0)
        return;
    int64_t least = pmli_div_up(REDUCE_LEAST, other);
    job.piece = pmli_div_up(length, REDUCE_PARTS);
    if (job.piece < least)
        job.piece = least;
    int64_t parts = pmli_div_up(length, job.piece);
    pmli_pool_run(pmli_pool_of(queue), parts, reduce_piece, &job);
    double sum = 0;
    for (int64_t p = 0; p < parts; p++)
        sum += job.parts[p];
    *total += sum;
}

pml_status pmli_cpu_sum(pml_queue *queue, const pml_sum_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_sum, err);
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, total, 1, 1, PML_F64);
    if (c.status == PML_OK)
        reduce(queue, &a->x, false, a->total.data);
    return c.status;
}

pml_status pmli_cpu_sumsq(pml_queue *queue, const pml_sumsq_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_sumsq, err);
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, total, 1, 1, PML_F64);
    if (c.status == PML_OK)
        reduce(queue, &a->x, true, a->total.data);
    return c.status;
}
