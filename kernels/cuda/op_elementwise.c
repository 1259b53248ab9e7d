/* rope: a thread a pack, or an element where packs do not fit. Its transpose with v and db of the
 * linear layer before: in one pass where low_rank.h serves, else rope and then what that layer's
 * backward would do. */
#include "device.h"
#include "device/params.h"
#include "linear.h"
#include "low_rank.h"
#include "operand.h"
#include "ops.h"

enum { BLOCK = 256 };

/* v and db as the linear layer's backward would make them. */
static pml_linear_bwd_args beside(const pml_rope_args *a)
{
    pml_linear_bwd_args linear = {.dy = a->x,
                                  .b = a->b,
                                  .u = a->u,
                                  .db = a->db,
                                  .ws = a->ws,
                                  .parts = a->parts,
                                  .lora_parts = a->lora_parts,
                                  .rank = a->rank};
    for (int p = 0; p < PML_LINEAR_MAX_PARTS; p++) {
        linear.part_cols[p] = a->part_cols[p];
        linear.lora_scale[p] = a->lora_scale[p];
    }
    return linear;
}

size_t pmli_cuda_rope_ws(const pml_rope_args *a)
{
    const pml_linear_bwd_args linear = beside(a);
    return a->db.rows > 0 ? pmli_linear_back_ws(&linear) : 0;
}

static void check_adapters(pmli_check *c, const pml_rope_args *a)
{
    pmli_need_that(c, a->parts >= 1 && a->parts <= PML_LINEAR_MAX_PARTS, "%d parts", a->parts);
    if (c->status != PML_OK)
        return;
    int64_t outputs = 0, columns = pmli_lora_cols(a->rank, a->lora_parts);
    int64_t rows = pmli_lora_rows(a->part_cols, a->parts, a->lora_parts);
    for (int p = 0; p < a->parts; p++)
        outputs += a->part_cols[p];
    pmli_need_that(c, outputs == a->x.cols, "parts of %lld columns, operand 'x' has %lld",
                   (long long)outputs, (long long)a->x.cols);
    bool adapters = a->rank > 0 && a->lora_parts != 0 && a->lora_parts >> a->parts == 0;
    pmli_need_that(c, a->inverse && adapters,
                   "operand 'db' needs the inverse, and adapters (%#x of %d parts) of a rank (%d)",
                   a->lora_parts, a->parts, a->rank);
    pmli_need_as(c, "u", &a->u, a->x.rows, columns, a->x.dtype);
    pmli_need_as(c, "b", &a->b, rows, a->rank, a->x.dtype);
    pmli_need_as(c, "v", &a->v, a->x.rows, columns, a->x.dtype);
    PMLI_NEED(c, a, db, rows, a->rank, PML_F32);
    pmli_need_ws(c, &a->ws, pmli_cuda_rope_ws(a));
}

static pml_status turn(pml_queue *queue, const pml_rope_args *a, pml_error *err)
{
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

static pml_status turn_for_adapters(pml_queue *queue, const pml_rope_args *a, pml_error *err)
{
    const pml_linear_bwd_args linear = beside(a);
    const pmli_turn by = {a->pos.data, a->table.data, a->heads, a->head_dim};
    if (pmli_low_rank_serves(queue->device, &linear, &a->v) && pmli_low_rank_turns(&linear, &by))
        return pmli_low_rank(queue, &linear, &a->v, &by, a->ws.data, err);
    pml_status status = turn(queue, a, err);
    return status == PML_OK ? pmli_linear_back(queue, &linear, a->v, err) : status;
}

pml_status pmli_cuda_rope(pml_queue *queue, const pml_rope_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rope, err);
    int64_t turned = (int64_t)a->heads * a->head_dim;
    pmli_need_that(&c, a->heads > 0 && a->head_dim > 0 && a->head_dim % 2 == 0,
                   "%d heads of %d, must be positive and even", a->heads, a->head_dim);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, a->db.data != NULL ? PMLI_ANY : turned);
    pmli_need_that(&c, a->x.cols >= turned,
                   "operand 'x' has %lld columns, %d heads of %d have more", (long long)a->x.cols,
                   a->heads, a->head_dim);
    pmli_need_float(&c, "x", &a->x);
    PMLI_NEED(&c, a, pos, 1, a->x.rows, PML_I32);
    PMLI_NEED(&c, a, table, PMLI_ANY, a->head_dim, PML_F32);
    pmli_need_that(&c, a->table.ld == a->head_dim, "operand 'table' must have no border");
    if (a->db.data != NULL)
        check_adapters(&c, a);
    if (c.status != PML_OK || a->x.rows == 0)
        return c.status;
    return a->db.data != NULL ? turn_for_adapters(queue, a, err) : turn(queue, a, err);
}
