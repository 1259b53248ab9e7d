/* Moving and filling rows: embed, copy, gather_rows, scatter_rows, fill. */
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"
#include "rows.h"

enum { BLOCK = 256, WARP = 32, GRID_Y_LIMIT = 65535 };

/* A block is as wide as a row needs with UNITS_A_THREAD each, a warp at least for rows that have as
 * much, and covers rows with the threads that are left. Kernels step over rows beyond the grid. */
static pmli_launch shape_for(int64_t rows, int64_t units)
{
    int64_t want = (units + UNITS_A_THREAD - 1) / UNITS_A_THREAD;
    if (want < WARP)
        want = units < WARP ? units : WARP;
    unsigned x = 1;
    while (x < BLOCK && x < want)
        x *= 2;
    unsigned y = BLOCK / x;
    int64_t tile = (int64_t)x * UNITS_A_THREAD;
    int64_t across = (units + tile - 1) / tile, down = (rows + y - 1) / y;
    return (pmli_launch){.grid_x = (unsigned)across,
                         .grid_y = (unsigned)(down < GRID_Y_LIMIT ? down : GRID_Y_LIMIT),
                         .block_x = x,
                         .block_y = y};
}

/* The conversion's kernel; its _x4 form is the next one. */
static pmli_kernel conversion(pml_dtype from, pml_dtype to)
{
    if (from == PML_F32)
        return to == PML_BF16 ? PMLI_f32_to_bf16 : PMLI_f32_to_f16;
    if (from == PML_BF16)
        return to == PML_F32 ? PMLI_bf16_to_f32 : PMLI_bf16_to_f16;
    return to == PML_F32 ? PMLI_f16_to_f32 : PMLI_f16_to_bf16;
}

/* Same dtype: bytes in the widest unit that fits both sides. */
static pml_status move_bytes(pml_queue *queue, const pmli_move *m, pml_error *err)
{
    static const pmli_kernel by_width[] = {PMLI_copy_1, PMLI_copy_2, PMLI_copy_4, PMLI_copy_8,
                                           PMLI_copy_16};
    int64_t size = (int64_t)pml_dtype_size(m->x.dtype), width = 16;
    int w = 4;
    while (width > 1 &&
           !(pmli_in_units_of(&m->x, (size_t)width) && pmli_in_units_of(&m->y, (size_t)width)))
        width /= 2, w--;
    pmli_rows_params p = {m->x.data,
                          m->y.data,
                          m->from,
                          m->to,
                          m->rows,
                          m->x.cols * size / width,
                          m->x.ld * size / width,
                          m->y.ld * size / width};
    return pmli_cuda_launch(queue, by_width[w], shape_for(p.rows, p.cols), &p, err);
}

pml_status pmli_cuda_move_rows(pml_queue *queue, pmli_move m, pml_error *err)
{
    if (m.rows == 0 || m.x.cols == 0)
        return PML_OK;
    bool whole = m.from == NULL && m.to == NULL && m.x.ld == m.x.cols && m.y.ld == m.y.cols;
    if (whole) { /* one long row: the widest units and the fullest blocks */
        m.x = pml_vector(m.x.data, m.rows * m.x.cols, m.x.dtype);
        m.y = pml_vector(m.y.data, m.x.cols, m.y.dtype);
        m.rows = 1;
    }
    if (m.x.dtype == m.y.dtype)
        return move_bytes(queue, &m, err);
    bool by_four = pmli_in_units_of(&m.x, 4 * pml_dtype_size(m.x.dtype)) &&
                   pmli_in_units_of(&m.y, 4 * pml_dtype_size(m.y.dtype));
    pmli_rows_params p = {m.x.data, m.y.data, m.from, m.to, m.rows, m.x.cols, m.x.ld, m.y.ld};
    pmli_kernel kernel = conversion(m.x.dtype, m.y.dtype);
    return pmli_cuda_launch(queue, by_four ? kernel + 1 : kernel,
                            shape_for(p.rows, by_four ? p.cols / 4 : p.cols), &p, err);
}

static void need_conversion(pmli_check *c, const char *x_name, const pml_view *x, const pml_view *y)
{
    pmli_need_that(c, x->dtype == y->dtype || (pmli_is_float(x->dtype) && pmli_is_float(y->dtype)),
                   "no conversion from operand '%s' of %s to operand 'y' of %s", x_name,
                   pml_dtype_name(x->dtype), pml_dtype_name(y->dtype));
}

pml_status pmli_cuda_embed(pml_queue *queue, const pml_embed_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_embed, err);
    PMLI_NEED(&c, a, ids, 1, PMLI_ANY, PML_I32);
    pmli_need_any(&c, "table", &a->table, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "table", &a->table);
    pmli_need_any(&c, "y", &a->y, a->ids.cols, a->table.cols);
    need_conversion(&c, "table", &a->table, &a->y);
    if (c.status != PML_OK)
        return c.status;
    return pmli_cuda_move_rows(queue, (pmli_move){a->table, a->y, a->ids.data, NULL, a->ids.cols},
                               err);
}

pml_status pmli_cuda_copy(pml_queue *queue, const pml_copy_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_copy, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    pmli_need_any(&c, "y", &a->y, a->x.rows, a->x.cols);
    need_conversion(&c, "x", &a->x, &a->y);
    if (c.status != PML_OK)
        return c.status;
    return pmli_cuda_move_rows(queue, (pmli_move){a->x, a->y, NULL, NULL, a->x.rows}, err);
}

pml_status pmli_cuda_gather_rows(pml_queue *queue, const pml_gather_rows_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_gather_rows, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    PMLI_NEED(&c, a, index, 1, PMLI_ANY, PML_I32);
    pmli_need_any(&c, "y", &a->y, a->index.cols, a->x.cols);
    need_conversion(&c, "x", &a->x, &a->y);
    if (c.status != PML_OK)
        return c.status;
    return pmli_cuda_move_rows(queue, (pmli_move){a->x, a->y, a->index.data, NULL, a->index.cols},
                               err);
}

pml_status pmli_cuda_scatter_rows(pml_queue *queue, const pml_scatter_rows_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_scatter_rows, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    PMLI_NEED(&c, a, index, 1, a->x.rows, PML_I32);
    pmli_need_any(&c, "y", &a->y, PMLI_ANY, a->x.cols);
    need_conversion(&c, "x", &a->x, &a->y);
    if (c.status != PML_OK)
        return c.status;
    return pmli_cuda_move_rows(queue, (pmli_move){a->x, a->y, NULL, a->index.data, a->index.cols},
                               err);
}

/* Floats take any value; an integer dtype only those it can hold. */
static bool fits(double value, pml_dtype dtype)
{
    if (pmli_is_float(dtype) || dtype == PML_F64)
        return true;
    double low = dtype == PML_U8 ? 0 : dtype == PML_I32 ? INT32_MIN : -0x1p63;
    double end = dtype == PML_U8 ? 256 : dtype == PML_I32 ? 0x1p31 : 0x1p63;
    return value >= low && value < end && value == (double)(int64_t)value;
}

pml_status pmli_cuda_fill(pml_queue *queue, const pml_fill_args *a, pml_error *err)
{
    static const pmli_kernel kernels[PML_DTYPE_COUNT] = {
        [PML_F32] = PMLI_fill_f32, [PML_BF16] = PMLI_fill_bf16, [PML_F16] = PMLI_fill_f16,
        [PML_F64] = PMLI_fill_f64, [PML_I32] = PMLI_fill_i32,   [PML_I64] = PMLI_fill_i64,
        [PML_U8] = PMLI_fill_u8};
    pmli_check c = pmli_check_begin(PML_OP_fill, err);
    pmli_need_any(&c, "y", &a->y, PMLI_ANY, PMLI_ANY);
    if (c.status == PML_OK)
        pmli_need_that(&c, fits(a->value, a->y.dtype),
                       "value %g does not fit operand 'y' of dtype %s", a->value,
                       pml_dtype_name(a->y.dtype));
    if (c.status != PML_OK || a->y.rows == 0 || a->y.cols == 0)
        return c.status;
    pml_view y =
        a->y.ld == a->y.cols ? pml_vector(a->y.data, a->y.rows * a->y.cols, a->y.dtype) : a->y;
    bool wide = pmli_in_units_of(&y, 16);
    int64_t units = wide ? y.cols * (int64_t)pml_dtype_size(y.dtype) / 16 : y.cols;
    pmli_fill_params p = {y.data, y.rows, y.cols, y.ld, a->value};
    pmli_kernel kernel = kernels[y.dtype]; /* its _wide form is the next one */
    return pmli_cuda_launch(queue, wide ? kernel + 1 : kernel, shape_for(y.rows, units), &p, err);
}

pml_status pmli_cuda_clear(pml_queue *queue, const pml_view *v, pml_error *err)
{
    const pml_fill_args zero = {*v, 0};
    return pmli_cuda_fill(queue, &zero, err);
}
