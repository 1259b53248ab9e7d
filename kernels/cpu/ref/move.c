/* Moving and filling memory: fill, copy, gather_rows, scatter_rows. */
#include "check.h"
#include "convert.h"
#include "device.h"
#include "ops.h"
#include "vec.h"

static void *element_at(const pml_view *v, int64_t row, int64_t col)
{
    return (char *)v->data + (size_t)(row * v->ld + col) * pml_dtype_size(v->dtype);
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

/* Pieces of work are blocks of short rows, or of a long row's columns: a flat buffer is one row. */
typedef struct block {
    int64_t row, last_row, col, cols;
} block;

enum { BLOCK_COLS = 1 << 16 };

static int64_t blocks(int64_t rows, int64_t cols)
{
    return pmli_div_up(rows, pmli_piece_rows(cols)) * pmli_div_up(cols, BLOCK_COLS);
}

static block block_at(int64_t item, int64_t rows, int64_t cols)
{
    int64_t across = pmli_div_up(cols, BLOCK_COLS), height = pmli_piece_rows(cols);
    block b = {.row = item / across * height, .col = item % across * BLOCK_COLS};
    b.last_row = pmli_min(b.row + height, rows);
    b.cols = pmli_min(BLOCK_COLS, cols - b.col);
    return b;
}

typedef struct fill_job {
    pml_view y;
    bool zero;
    _Alignas(8) unsigned char element[8];
} fill_job;

static void fill_block(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const fill_job *job = arg;
    size_t size = pml_dtype_size(job->y.dtype);
    block b = block_at(item, job->y.rows, job->y.cols);
    for (int64_t row = b.row; row < b.last_row; row++) {
        char *out = element_at(&job->y, row, b.col);
        int64_t n = b.cols;
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
    if (c.status != PML_OK)
        return c.status;
    static const unsigned char zeros[sizeof job.element];
    job.zero = memcmp(job.element, zeros, sizeof zeros) == 0;
    pmli_pool_run(pmli_pool_of(queue), blocks(a->y.rows, a->y.cols), fill_block, &job);
    return PML_OK;
}

/* copy, gather_rows and scatter_rows are one thing: row to[i] of y = row from[i] of x, where an
 * absent index means i itself. */
typedef struct move_job {
    pml_view x, y;
    const int32_t *from, *to;
    int64_t rows;
} move_job;

static void move_block(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const move_job *job = arg;
    block b = block_at(item, job->rows, job->x.cols);
    for (int64_t i = b.row; i < b.last_row; i++) {
        int64_t from = job->from != NULL ? job->from[i] : i, to = job->to != NULL ? job->to[i] : i;
        if (to >= 0)
            pmli_convert(element_at(&job->x, from, b.col), job->x.dtype,
                         element_at(&job->y, to, b.col), job->y.dtype, b.cols);
    }
}

static void move(pml_queue *queue, move_job *job)
{
    pmli_pool_run(pmli_pool_of(queue), blocks(job->rows, job->x.cols), move_block, job);
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

/* The device's memory is the host's: a copy, done when it returns. */
static pml_status carry(pml_queue *queue, pml_op op, const pml_view *x, const pml_view *y,
                        pml_error *err)
{
    pmli_check c = pmli_check_begin(op, err);
    pmli_need_any(&c, "x", x, PMLI_ANY, PMLI_ANY);
    pmli_need_any(&c, "y", y, x->rows, x->cols);
    pmli_need_that(&c, x->dtype == y->dtype, "operand 'y' is %s, must be %s as 'x' is",
                   pml_dtype_name(y->dtype), pml_dtype_name(x->dtype));
    if (c.status != PML_OK)
        return c.status;
    move(queue, &(move_job){*x, *y, NULL, NULL, x->rows});
    return PML_OK;
}

pml_status pmli_cpu_offload(pml_queue *queue, const pml_offload_args *a, pml_error *err)
{
    return carry(queue, PML_OP_offload, &a->x, &a->y, err);
}

pml_status pmli_cpu_fetch(pml_queue *queue, const pml_fetch_args *a, pml_error *err)
{
    return carry(queue, PML_OP_fetch, &a->x, &a->y, err);
}

pml_status pmli_cpu_await(pml_queue *queue, const pml_await_args *a, pml_error *err)
{
    (void)queue;
    pmli_check c = pmli_check_begin(PML_OP_await, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    return c.status;
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
