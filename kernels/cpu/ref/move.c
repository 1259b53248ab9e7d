/* Moving and filling memory: fill, copy, gather_rows, scatter_rows. */
#include "check.h"
#include "convert.h"
#include "device.h"
#include "ops.h"
#include "vec.h"

static void *row_of(const pml_view *v, int64_t row)
{
    return (char *)v->data + (size_t)(row * v->ld) * pml_dtype_size(v->dtype);
}

/* One element of fill's value in the view's dtype; false when the dtype cannot hold it. */
static bool fill_element(double value, pml_dtype dtype, void *out)
{
    float f = (float)value;
    if (dtype == PML_F32 || dtype == PML_BF16 || dtype == PML_F16) {
        pmli_convert(&f, PML_F32, out, dtype, 1);
        return true;
    }
    if (dtype == PML_F64) {
        memcpy(out, &value, sizeof value);
        return true;
    }
    double low = dtype == PML_U8 ? 0 : dtype == PML_I32 ? INT32_MIN : -0x1p63;
    double end = dtype == PML_U8 ? 256 : dtype == PML_I32 ? 0x1p31 : 0x1p63;
    if (!(value >= low && value < end) || value != (double)(int64_t)value)
        return false;
    int64_t wide = (int64_t)value;
    int32_t narrow = (int32_t)wide;
    uint8_t byte = (uint8_t)wide;
    memcpy(out,
           dtype == PML_U8    ? (void *)&byte
           : dtype == PML_I32 ? (void *)&narrow
                              : &wide,
           pml_dtype_size(dtype));
    return true;
}

typedef struct fill_job {
    pml_view y;
    bool zero;
    unsigned char element[8];
    int64_t piece, pieces_per_row;
} fill_job;

enum { FILL_PIECE = 1 << 16 };

static void fill_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const fill_job *job = arg;
    size_t size = pml_dtype_size(job->y.dtype);
    int64_t first = item % job->pieces_per_row * FILL_PIECE;
    int64_t n = pmli_min(FILL_PIECE, job->y.cols - first);
    int64_t row = item / job->pieces_per_row * job->piece;
    for (int64_t last = pmli_min(row + job->piece, job->y.rows); row < last; row++) {
        char *out = (char *)row_of(&job->y, row) + (size_t)first * size;
        if (job->zero)
            memset(out, 0, (size_t)n * size);
        else
            for (int64_t i = 0; i < n; i++)
                memcpy(out + (size_t)i * size, job->element, size);
    }
}

pml_status pmli_cpu_fill(pml_queue *queue, const pml_fill_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_fill, err);
    fill_job job = {.y = a->y};
    pmli_need_any(&c, "y", &a->y, PMLI_ANY, PMLI_ANY);
    if (c.status == PML_OK)
        pmli_need_that(&c, fill_element(a->value, a->y.dtype, job.element),
                       "value %g does not fit operand 'y' of dtype %s", a->value,
                       pml_dtype_name(a->y.dtype));
    if (c.status != PML_OK || a->y.cols == 0)
        return c.status;
    static const unsigned char zeros[sizeof job.element];
    job.zero = memcmp(job.element, zeros, sizeof zeros) == 0;
    job.piece = pmli_piece_rows(a->y.cols);
    job.pieces_per_row = pmli_div_up(a->y.cols, FILL_PIECE);
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(a->y.rows, job.piece) * job.pieces_per_row,
                  fill_piece, &job);
    return PML_OK;
}

/* copy, gather_rows and scatter_rows are one thing: row to[i] of y = row from[i] of x, where an
 * absent index means i itself. */
typedef struct move_job {
    pml_view x, y;
    const int32_t *from, *to;
    int64_t rows;
} move_job;

static void move_rows(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const move_job *job = arg;
    int64_t piece = pmli_piece_rows(job->x.cols), last = pmli_min((item + 1) * piece, job->rows);
    for (int64_t i = item * piece; i < last; i++) {
        int64_t from = job->from != NULL ? job->from[i] : i, to = job->to != NULL ? job->to[i] : i;
        if (to >= 0)
            pmli_convert(row_of(&job->x, from), job->x.dtype, row_of(&job->y, to), job->y.dtype,
                         job->x.cols);
    }
}

static void move(pml_queue *queue, move_job *job)
{
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(job->rows, pmli_piece_rows(job->x.cols)),
                  move_rows, job);
}

static void need_conversion(pmli_check *c, const pml_view *x, const pml_view *y)
{
    pmli_need_that(c, pmli_can_convert(x->dtype, y->dtype),
                   "no conversion from operand 'x' of %s to operand 'y' of %s",
                   pml_dtype_name(x->dtype), pml_dtype_name(y->dtype));
}

pml_status pmli_cpu_copy(pml_queue *queue, const pml_copy_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_copy, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    pmli_need_any(&c, "y", &a->y, a->x.rows, a->x.cols);
    need_conversion(&c, &a->x, &a->y);
    if (c.status != PML_OK)
        return c.status;
    move(queue, &(move_job){a->x, a->y, NULL, NULL, a->x.rows});
    return PML_OK;
}

pml_status pmli_cpu_gather_rows(pml_queue *queue, const pml_gather_rows_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_gather_rows, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    PMLI_NEED(&c, a, index, 1, PMLI_ANY, PML_I32);
    pmli_need_any(&c, "y", &a->y, a->index.cols, a->x.cols);
    need_conversion(&c, &a->x, &a->y);
    if (c.status != PML_OK)
        return c.status;
    move(queue, &(move_job){a->x, a->y, a->index.data, NULL, a->index.cols});
    return PML_OK;
}

pml_status pmli_cpu_scatter_rows(pml_queue *queue, const pml_scatter_rows_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_scatter_rows, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    PMLI_NEED(&c, a, index, 1, a->x.rows, PML_I32);
    pmli_need_any(&c, "y", &a->y, PMLI_ANY, a->x.cols);
    need_conversion(&c, &a->x, &a->y);
    if (c.status != PML_OK)
        return c.status;
    move(queue, &(move_job){a->x, a->y, NULL, a->index.data, a->index.cols});
    return PML_OK;
}
