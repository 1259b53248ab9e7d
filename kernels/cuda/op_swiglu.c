/* SwiGLU, forward and backward: a thread a pack, or an element where packs do not fit; and what the
 * adapters beside it want, in the same pass where the kernels of mlp.h serve, else by products.
 *
 * The backward's products want h of a few hundred rows at a time, so that it needs no place of its
 * own size:
 *
 * Likewise where results are codes of 8 bits and those kernels do not serve: some rows at a time
 * are made in the workspace as they would be, and rounded from there.
 *
 *   ws, forward:   | mlp's |   or  | products' own | h of some rows |
 *   ws, backward:  | mlp's |   or  | products' own, or v's and db's | h, dgate_up of some rows | */
#include "device.h"
#include "device/params.h"
#include "fp8.h"
#include "gemm.h"
#include "linear.h"
#include "mlp.h"
#include "ops.h"

enum { BLOCK = 256, GRID_LIMIT = 0x7fffffff, SOME_BYTES = 16 << 20 };

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
    return pmli_cuda_launch(queue, first + 2 * (unsigned)dtype + (wide ? 1 : 0), shape, p, err);
}

/* Both halves of a row begin on a pack. */
static bool halves_in_packs(const pml_view *gate_up)
{
    pml_view half = pml_view_columns(*gate_up, 0, gate_up->cols / 2);
    return pmli_in_units_of(&half, 16);
}

/* h alone. */
static pml_status forward(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    bool wide = halves_in_packs(&a->gate_up) && pmli_in_units_of(&a->h, 16);
    pmli_swiglu_params p = {.gate_up = a->gate_up.data,
                            .h = a->h.data,
                            .rows = a->h.rows,
                            .cols = a->h.cols,
                            .ld_gate_up = a->gate_up.ld,
                            .ld_h = a->h.ld};
    return launch_swiglu(queue, PMLI_swiglu_f32, a->h.dtype, wide, &p, err);
}

/* dgate_up, and h where it is given. */
static pml_status backward(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
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

/* Rows of so many columns that are in the workspace at a time. */
static int64_t rows_at_once(int64_t all, int64_t cols, pml_dtype dtype)
{
    int64_t rows = SOME_BYTES / (cols * (int64_t)pml_dtype_size(dtype));
    rows = rows < 1 ? 1 : rows;
    return rows < all ? rows : all;
}

static size_t some_bytes(int64_t all, int64_t cols, pml_dtype dtype)
{
    return pmli_linear_units((size_t)(rows_at_once(all, cols, dtype) * cols) *
                             pml_dtype_size(dtype));
}

size_t pmli_cuda_swiglu_ws(const pml_swiglu_args *a)
{
    bool codes = a->h_scale.rows > 0;
    size_t fused = pmli_mlp_ws(a), products = a->u.rows > 0 ? PMLI_GEMM_WORKSPACE : 0;
    if (codes)
        products += some_bytes(a->h.rows, a->h.cols, a->gate_up.dtype);
    return fused > products ? fused : products;
}

/* u = scale h a^T, a product of its own. */
static pml_status multiply_u(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    const pmli_gemm g = {.a = a->h.data,
                         .b = a->a.data,
                         .c = a->u.data,
                         .m = a->u.rows,
                         .n = a->u.cols,
                         .k = a->h.cols,
                         .lda = a->h.ld,
                         .ldb = a->a.ld,
                         .ldc = a->u.ld,
                         .transpose_b = true,
                         .in = a->h.dtype,
                         .out = a->u.dtype,
                         .alpha = a->lora_scale,
                         .workspace = a->ws.data,
                         .workspace_size = PMLI_GEMM_WORKSPACE};
    return pmli_gemm_run(queue, &g, err);
}

/* h in codes, and u, by some rows at a time. */
static pml_status forward_by_rows(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    pml_dtype dtype = a->gate_up.dtype;
    int64_t step = rows_at_once(a->h.rows, a->h.cols, dtype);
    char *room = (char *)a->ws.data + (a->u.data != NULL ? PMLI_GEMM_WORKSPACE : 0);
    pml_status status = PML_OK;
    for (int64_t row = 0; status == PML_OK && row < a->h.rows; row += step) {
        int64_t rows = row + step < a->h.rows ? step : a->h.rows - row;
        pml_swiglu_args some = {.gate_up = pmli_rows_of(a->gate_up, row, rows),
                                .h = pml_matrix(room, rows, a->h.cols, dtype),
                                .a = a->a,
                                .ws = a->ws,
                                .lora_scale = a->lora_scale};
        status = forward(queue, &some, err);
        if (status == PML_OK && a->u.data != NULL) {
            some.u = pmli_rows_of(a->u, row, rows);
            status = multiply_u(queue, &some, err);
        }
        const pmli_fp8_in_pieces p = {.x = some.h,
                                      .codes = pmli_rows_of(a->h, row, rows),
                                      .scale = pmli_rows_of(a->h_scale, row, rows),
                                      .parts = 1};
        if (status == PML_OK)
            status = pmli_fp8_round(queue, &p, err);
    }
    return status;
}

pml_status pmli_cuda_swiglu(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu, err);
    pml_dtype d = a->gate_up.dtype;
    bool codes = a->h_scale.data != NULL;
    pmli_need_any(&c, "gate_up", &a->gate_up, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "gate_up", &a->gate_up);
    pmli_need_as(&c, "h", &a->h, a->gate_up.rows, a->gate_up.cols / 2, codes ? PML_U8 : d);
    pmli_need_any(&c, "gate_up", &a->gate_up, a->h.rows, 2 * a->h.cols);
    if (codes)
        pmli_fp8_need_pieces(&c, "h", &a->h, "h_scale", &a->h_scale, 1);
    pmli_need_pair(&c, "a", &a->a, "u", &a->u);
    if (a->u.data != NULL) {
        pmli_need_as(&c, "u", &a->u, a->h.rows, PMLI_ANY, d);
        pmli_need_as(&c, "a", &a->a, a->u.cols, a->h.cols, d);
    }
    pmli_need_ws(&c, &a->ws, pmli_cuda_swiglu_ws(a));
    if (c.status != PML_OK || a->h.rows == 0 || a->h.cols == 0)
        return c.status;
    if (a->u.data != NULL && pmli_mlp_serves(queue->device, a))
        return pmli_mlp(queue, a, err);
    if (codes)
        return forward_by_rows(queue, a, err);
    pml_status status = forward(queue, a, err);
    if (status == PML_OK && a->u.data != NULL)
        status = multiply_u(queue, a, err);
    return status;
}

/* v and db of gate_up as the linear layer's backward would make them. */
static pml_linear_bwd_args beside(const pml_swiglu_bwd_args *a)
{
    int32_t cols = (int32_t)a->dh.cols;
    return (pml_linear_bwd_args){.dy = a->dgate_up,
                                 .b = a->b,
                                 .u = a->u,
                                 .db = a->db,
                                 .ws = a->ws,
                                 .parts = 2,
                                 .part_cols = {cols, cols},
                                 .lora_parts = a->lora_parts,
                                 .rank = a->rank,
                                 .lora_scale = {a->lora_scale[0], a->lora_scale[1]}};
}

/* What products work in, one after the other. */
static size_t products_ws(const pml_swiglu_bwd_args *a)
{
    const pml_linear_bwd_args linear = beside(a);
    return a->db.rows > 0 ? pmli_linear_back_ws(&linear) : PMLI_GEMM_WORKSPACE;
}

/* Whether some rows at a time are made, and which of their columns the workspace holds: h's where
 * da wants it and nobody else, dgate_up's where that is codes. */
static bool by_rows(const pml_swiglu_bwd_args *a)
{
    return a->scale.rows > 0 || (a->da.rows > 0 && a->h.rows == 0);
}

static int64_t columns_of_rows(const pml_swiglu_bwd_args *a)
{
    return (a->da.rows > 0 && a->h.rows == 0 ? a->dh.cols : 0) +
           (a->scale.rows > 0 ? 2 * a->dh.cols : 0);
}

size_t pmli_cuda_swiglu_bwd_ws(const pml_swiglu_bwd_args *a)
{
    bool adapters = a->db.rows > 0 || a->da.rows > 0;
    size_t fused = adapters ? pmli_mlp_bwd_ws(a) : 0, products = adapters ? products_ws(a) : 0;
    if (by_rows(a))
        products += some_bytes(a->dh.rows, columns_of_rows(a), a->dh.dtype);
    return fused > products ? fused : products;
}

/* da += v_down^T h for some rows. */
static pml_status add_da(pml_queue *queue, const pml_swiglu_bwd_args *a, const pml_view *v,
                         const pml_view *h, pml_error *err)
{
    const pmli_gemm g = {.a = v->data,
                         .b = h->data,
                         .c = a->da.data,
                         .m = a->da.rows,
                         .n = a->da.cols,
                         .k = h->rows,
                         .lda = v->ld,
                         .ldb = h->ld,
                         .ldc = a->da.ld,
                         .transpose_a = true,
                         .in = h->dtype,
                         .out = a->da.dtype,
                         .alpha = 1,
                         .beta = 1,
                         .workspace = a->ws.data,
                         .workspace_size = PMLI_GEMM_WORKSPACE};
    return pmli_gemm_run(queue, &g, err);
}

/* v and db of some rows' dgate_up. */
static pml_status add_db(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
    const pml_linear_bwd_args linear = beside(a);
    return pmli_linear_back(queue, &linear, a->v, err);
}

/* Rows [row, row + rows) of a call, whose dgate_up and h lie in `room` where they have no place of
 * their own in 16 or 32 bits. */
static pml_swiglu_bwd_args some_of(const pml_swiglu_bwd_args *a, int64_t row, int64_t rows,
                                   char *room)
{
    pml_swiglu_bwd_args some = *a;
    pml_view *cut[] = {&some.dh, &some.gate_up, &some.dgate_up, &some.h,
                       &some.u,  &some.v,       &some.v_down,   &some.scale};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++)
        if (cut[i]->data != NULL)
            *cut[i] = pmli_rows_of(*cut[i], row, rows);
    if (a->scale.data != NULL) {
        some.dgate_up = pml_matrix(room, rows, 2 * a->dh.cols, a->dh.dtype);
        room += (size_t)(rows * 2 * a->dh.cols) * pml_dtype_size(a->dh.dtype);
    }
    if (a->da.data != NULL && a->h.data == NULL)
        some.h = pml_matrix(room, rows, a->dh.cols, a->dh.dtype);
    return some;
}

static pml_status backward_by_rows(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
    bool adapters = a->db.data != NULL || a->da.data != NULL, codes = a->scale.data != NULL;
    int64_t step = rows_at_once(a->dh.rows, columns_of_rows(a), a->dh.dtype);
    char *room = (char *)a->ws.data + (adapters ? products_ws(a) : 0);
    pml_status status = PML_OK;
    for (int64_t row = 0; status == PML_OK && row < a->dh.rows; row += step) {
        int64_t rows = row + step < a->dh.rows ? step : a->dh.rows - row;
        const pml_swiglu_bwd_args some = some_of(a, row, rows, room);
        status = backward(queue, &some, err);
        if (status == PML_OK && a->da.data != NULL)
            status = add_da(queue, a, &some.v_down, &some.h, err);
        if (status == PML_OK && codes && a->db.data != NULL)
            status = add_db(queue, &some, err);
        const pmli_fp8_in_pieces p = {.x = some.dgate_up,
                                      .codes = pmli_rows_of(a->dgate_up, row, rows),
                                      .scale = some.scale,
                                      .by = a->w_scale.data,
                                      .parts = 2};
        if (status == PML_OK && codes)
            status = pmli_fp8_round(queue, &p, err);
    }
    return status;
}

static pml_status backward_by_products(pml_queue *queue, const pml_swiglu_bwd_args *a,
                                       pml_error *err)
{
    pml_status status = by_rows(a) ? backward_by_rows(queue, a, err) : backward(queue, a, err);
    if (status == PML_OK && a->da.data != NULL && !by_rows(a))
        status = add_da(queue, a, &a->v_down, &a->h, err);
    if (status == PML_OK && a->db.data != NULL && a->scale.data == NULL)
        status = add_db(queue, a, err);
    return status;
}

static void check_adapters(pmli_check *c, const pml_swiglu_bwd_args *a)
{
    pml_dtype d = a->dh.dtype;
    int64_t tokens = a->dh.rows, columns = pmli_lora_cols(a->rank, a->lora_parts);
    pmli_need_that(c, (a->db.data != NULL) == (a->lora_parts != 0) && a->lora_parts >> 2 == 0,
                   "lora_parts is %#x, and db is %s", a->lora_parts,
                   a->db.data != NULL ? "given" : "absent");
    if (a->db.data != NULL) {
        int64_t rows = a->dh.cols * __builtin_popcount(a->lora_parts);
        pmli_need_that(c, a->rank > 0, "rank is %d, must be positive", a->rank);
        pmli_need_as(c, "u", &a->u, tokens, columns, d);
        pmli_need_as(c, "v", &a->v, tokens, columns, d);
        pmli_need_as(c, "b", &a->b, rows, a->rank, d);
        PMLI_NEED(c, a, db, rows, a->rank, PML_F32);
    }
    if (a->da.data != NULL) {
        PMLI_NEED(c, a, da, PMLI_ANY, a->dh.cols, PML_F32);
        pmli_need_as(c, "v_down", &a->v_down, tokens, a->da.rows, d);
    }
}

pml_status pmli_cuda_swiglu_bwd(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu_bwd, err);
    bool adapters = a->da.data != NULL || a->db.data != NULL || a->lora_parts != 0;
    pmli_need_any(&c, "dh", &a->dh, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "dh", &a->dh);
    pmli_need_as(&c, "gate_up", &a->gate_up, a->dh.rows, 2 * a->dh.cols, a->dh.dtype);
    bool codes = a->scale.data != NULL;
    pmli_need_as(&c, "dgate_up", &a->dgate_up, a->dh.rows, 2 * a->dh.cols,
                 codes ? PML_U8 : a->dh.dtype);
    if (codes) {
        pmli_fp8_need_pieces(&c, "dgate_up", &a->dgate_up, "scale", &a->scale, 2);
        pmli_need_as(&c, "w_scale", &a->w_scale, 1, 2 * a->dh.cols, PML_F32);
        pmli_need_that(&c, (uintptr_t)a->w_scale.data % 16 == 0,
                       "operand 'w_scale' does not begin on 16 bytes");
    }
    if (a->h.data != NULL)
        pmli_need_as(&c, "h", &a->h, a->dh.rows, a->dh.cols, a->dh.dtype);
    if (adapters)
        check_adapters(&c, a);
    pmli_need_ws(&c, &a->ws, pmli_cuda_swiglu_bwd_ws(a));
    if (c.status != PML_OK || a->dh.rows == 0 || a->dh.cols == 0)
        return c.status;
    if (!adapters)
        return codes ? backward_by_rows(queue, a, err) : backward(queue, a, err);
    return pmli_mlp_bwd_serves(queue->device, a) ? pmli_mlp_bwd(queue, a, err)
                                                 : backward_by_products(queue, a, err);
}
