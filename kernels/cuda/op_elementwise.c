/* rope: a thread a pack, or an element where packs do not fit. */
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

enum { BLOCK = 256 };

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
    return pmli_cuda_launch(queue, PMLI_rope_f32 + 2 * (unsigned)a->x.dtype + (wide ? 1 : 0), shape,
                            &p, err);
}
