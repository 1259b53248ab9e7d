/* rope, swiglu, swiglu_bwd: a thread a pack, or an element where packs do not fit. */
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

enum { BLOCK = 256, GRID_LIMIT = 0x7fffffff };

/* The kernel for a dtype, and its wide form behind it. */
static pmli_kernel form(pmli_kernel first, pml_dtype dtype, bool wide)
{
    return first + 2 * (unsigned)dtype + (wide ? 1 : 0);
}

pml_status pmli_cuda_rope(pml_queue *queue, const pml_rope_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rope, err);
    pmli_need_that(&c, a->heads > 0 && a->head_dim > 0 && a->head_dim % 2 == 0,
                   "%d heads of %d, must be positive and even", a->heads, a->head_dim);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, (int64_t)a->heads * a->head_dim);
    pmli_need_float(&c, "x", &a->x);
    PMLI_NEED(&c, a, pos, 1, a->x.rows, PML_I32);
    PMLI_NEED(&c, a, table, PMLI_ANY, a->head_dim, PML_F32);
    pmli_need_that(&c, a->table.ld == a->head_dim, "operand 'table' must have no border");
    if (c.status != PML_OK || a->x.rows == 0)
        return c.status;
    int half = a->head_dim / 2, pack = (int)(16 / pml_dtype_size(a->x.dtype));
    bool wide = pmli_in_units_of(&a->x, 16) && half % pack == 0;
    int64_t items = a->x.rows * a->heads * (wide ? half / pack : half);
    pmli_rope_params p = {.x = a->x.data,
                          .pos = a->pos.data,
                          .table = a->table.data,
                          .tokens = a->x.rows,
                          .ld_x = a->x.ld,
                          .heads = a->heads,
                          .half = half,
                          .sign = a->inverse ? -1.0F : 1.0F};
    pmli_launch shape = {.grid_x = (unsigned)((items + BLOCK - 1) / BLOCK),
                         .grid_y = 1,
                         .block_x = BLOCK,
                         .block_y = 1};
    return pmli_cuda_launch(queue, form(PMLI_rope_f32, a->x.dtype, wide), shape, &p, err);
}

/* A block stays in one row. */
static pml_status launch_swiglu(pml_queue *queue, pmli_kernel first, pml_dtype dtype, bool wide,
                                pmli_swiglu_params *p, pml_error *err)
{
    int64_t packs = wide ? p->cols * (int64_t)pml_dtype_size(dtype) / 16 : p->cols;
    unsigned block = BLOCK;
    while (block > 32 && block / 2 >= packs)
        block /= 2;
    p->blocks_a_row = (unsigned)((packs + block - 1) / block);
    if (p->rows > GRID_LIMIT / (int64_t)p->blocks_a_row)
        return PML_FAIL(err, PML_INVALID, "swiglu: more rows than a grid has blocks");
    pmli_launch shape = {
        .grid_x = (unsigned)p->rows * p->blocks_a_row, .grid_y = 1, .block_x = block, .block_y = 1};
    return pmli_cuda_launch(queue, form(first, dtype, wide), shape, p, err);
}

/* Both halves of a row begin on a pack. */
static bool halves_in_packs(const pml_view *gate_up)
{
    pml_view half = pml_view_columns(*gate_up, 0, gate_up->cols / 2);
    return pmli_in_units_of(&half, 16);
}

pml_status pmli_cuda_swiglu(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu, err);
    pmli_need_any(&c, "h", &a->h, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "h", &a->h);
    pmli_need_as(&c, "gate_up", &a->gate_up, a->h.rows, 2 * a->h.cols, a->h.dtype);
    if (c.status != PML_OK || a->h.rows == 0 || a->h.cols == 0)
        return c.status;
    bool wide = halves_in_packs(&a->gate_up) && pmli_in_units_of(&a->h, 16);
    pmli_swiglu_params p = {.gate_up = a->gate_up.data,
                            .h = a->h.data,
                            .rows = a->h.rows,
                            .cols = a->h.cols,
                            .ld_gate_up = a->gate_up.ld,
                            .ld_h = a->h.ld};
    return launch_swiglu(queue, PMLI_swiglu_f32, a->h.dtype, wide, &p, err);
}

pml_status pmli_cuda_swiglu_bwd(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu_bwd, err);
    pmli_need_any(&c, "dh", &a->dh, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "dh", &a->dh);
    pmli_need_as(&c, "gate_up", &a->gate_up, a->dh.rows, 2 * a->dh.cols, a->dh.dtype);
    pmli_need_as(&c, "dgate_up", &a->dgate_up, a->dh.rows, 2 * a->dh.cols, a->dh.dtype);
    if (a->h.data != NULL)
        pmli_need_as(&c, "h", &a->h, a->dh.rows, a->dh.cols, a->dh.dtype);
    if (c.status != PML_OK || a->dh.rows == 0 || a->dh.cols == 0)
        return c.status;
    bool wide = halves_in_packs(&a->gate_up) && halves_in_packs(&a->dgate_up) &&
                pmli_in_units_of(&a->dh, 16) && (a->h.data == NULL || pmli_in_units_of(&a->h, 16));
    pmli_swiglu_params p = {.gate_up = a->gate_up.data,
                            .dh = a->dh.data,
                            .y = a->dgate_up.data,
                            .h = a->h.data,
                            .rows = a->dh.rows,
                            .cols = a->dh.cols,
                            .ld_gate_up = a->gate_up.ld,
                            .ld_dh = a->dh.ld,
                            .ld_y = a->dgate_up.ld,
                            .ld_h = a->h.ld};
    return launch_swiglu(queue, PMLI_swiglu_bwd_f32, a->dh.dtype, wide, &p, err);
}
