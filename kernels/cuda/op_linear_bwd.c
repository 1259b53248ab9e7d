/* Gradients of a linear layer. With s_p = lora_scale[p]:
 *
 *   v_p = s_p dy_p b_p;   dx = dy w + v a;   da += v^T x;   db_p += dy_p^T u_p
 *
 * With dropout, m_p the mask of a part:  dx = dy w + sum m_p (v_p a_p);  da_p += v_p^T (m_p x).
 *
 * Where there are borders (border.h), v stands in dy's and dx = [dy|v] [w;a] is one product; with
 * dropout there is no such product. v may have been made before, or be handed on.
 *
 * v and db come from one kernel where one serves (pass.h, low_rank.h). v is in ws where it is
 * neither given nor in a border.
 *
 *   ws: | products', or our kernels' | v [T,R] | masked x, then masked v a: [T,K], or masked.h's |
 *       | the bias's partial sums | fp8's |
 *
 * Gradients of parameters are summed in float32 by the products themselves (c += a b). */
#include "border.h"
#include "columns.h"
#include "device.h"
#include "dropout.h"
#include "fp8.h"
#include "linear.h"
#include "low_rank.h"
#include "masked.h"
#include "operand.h"
#include "ops.h"
#include "pass.h"

static size_t v_bytes(const pml_linear_bwd_args *a)
{
    if (a->lora_parts == 0 || a->v.rows > 0)
        return 0;
    return pmli_linear_units((size_t)a->dy.rows * (size_t)pmli_lora_cols(a->rank, a->lora_parts) *
                             pml_dtype_size(a->dy.dtype));
}

/* x may be absent: it is as wide as a. Also without a device, so that it is for either way. */
static size_t masked_bytes(const pml_linear_bwd_args *a)
{
    pml_view x = {.rows = a->dy.rows, .cols = a->a.cols, .dtype = a->dy.dtype};
    size_t copy = pmli_masked_bytes(&x, a->lora_parts, a->lora_dropout);
    size_t parts = pmli_linear_units(pmli_masked_back_ws(a));
    return copy > parts ? copy : parts;
}

/* The first piece: what cuBLASLt's products and our own kernels work in, one after the other. Also
 * without a device, so that it is for each of them. */
size_t pmli_linear_back_ws(const pml_linear_bwd_args *a)
{
    size_t low_rank = pmli_linear_units(pmli_low_rank_ws(a));
    size_t pass = pmli_linear_units(pmli_pass_ws(a)), own = low_rank > pass ? low_rank : pass;
    return own > PMLI_GEMM_WORKSPACE ? own : PMLI_GEMM_WORKSPACE;
}

size_t pmli_cuda_linear_bwd_ws(const pml_linear_bwd_args *a)
{
    size_t bias = a->dbias.rows > 0 ? pmli_cuda_columns_ws(a->dy.cols) : 0;
    return pmli_linear_back_ws(a) + v_bytes(a) + masked_bytes(a) + pmli_linear_units(bias) +
           pmli_fp8_bwd_ws(a);
}

/* Of all operands in 16 or 32 bits, also where dy is none of them: there is dx then. */
static pml_dtype dtype_of(const pml_linear_bwd_args *a)
{
    return a->dy_scale.data != NULL ? a->dx.dtype : a->dy.dtype;
}

/* dy in codes: nothing but dx can be made of it. */
static void check_made(pmli_check *c, const pml_linear_bwd_args *a)
{
    pmli_need_as(c, "dy", &a->dy, PMLI_ANY, PMLI_ANY, PML_U8);
    pmli_need_any(c, "dx", &a->dx, a->dy.rows, PMLI_ANY);
    pmli_need_float(c, "dx", &a->dx);
    for (int p = 1; c->status == PML_OK && p < a->parts; p++)
        pmli_need_that(c, a->part_cols[p] == a->part_cols[0],
                       "operand 'dy' is in codes, its parts %d and %d columns wide",
                       a->part_cols[0], a->part_cols[p]);
    pmli_fp8_need_pieces(c, "dy", &a->dy, "dy_scale", &a->dy_scale, a->parts);
    pmli_need_that(c, a->dy.ld >= a->dy.cols + a->border, "operand 'dy' has no border of %d",
                   a->border);
    bool made = a->lora_parts == 0 || (a->kept & PML_V_MADE) != 0;
    pmli_need_that(c,
                   a->w_scale.data != NULL && made && a->lora_dropout == 0 && a->db.data == NULL &&
                       a->dbias.data == NULL,
                   "operand 'dy_scale' needs w in 8 bits, v made, no dropout, db or dbias");
}

static void check_lora(pmli_check *c, const pml_linear_bwd_args *a, int64_t inputs)
{
    int64_t columns = pmli_lora_cols(a->rank, a->lora_parts);
    int64_t rows = pmli_lora_rows(a->part_cols, a->parts, a->lora_parts);
    pmli_need_that(c, a->rank > 0 && a->lora_parts >> a->parts == 0,
                   "rank %d with adapters on parts %#x of %d", a->rank, a->lora_parts, a->parts);
    pml_dtype dtype = dtype_of(a);
    pmli_need_as(c, "a", &a->a, columns, inputs, dtype);
    pmli_need_as(c, "b", &a->b, rows, a->rank, dtype);
    PMLI_MAY(c, a, da, columns, inputs, PML_F32);
    PMLI_MAY(c, a, db, rows, a->rank, PML_F32);
    if (a->db.data != NULL)
        pmli_need_as(c, "u", &a->u, a->dy.rows, columns, a->dy.dtype);
    if (a->v.data != NULL || (a->kept & PML_V_MADE) != 0)
        pmli_need_as(c, "v", &a->v, a->dy.rows, columns, dtype);
    pmli_need_dropout(c, &(pmli_dropout){&a->rng, &a->places, 0, a->lora_dropout}, a->dy.rows);
    if (a->w_scale.data == NULL)
        pmli_need_border(c, "dy", &a->dy, a->border);
    pmli_need_border(c, "w", &a->w, a->border);
}

static pml_status check(const pml_linear_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_linear_bwd, err);
    int64_t outputs = 0;
    pmli_need_that(&c, a->parts >= 1 && a->parts <= PML_LINEAR_MAX_PARTS, "%d parts", a->parts);
    for (int p = 0; c.status == PML_OK && p < a->parts; p++)
        outputs += a->part_cols[p];
    bool codes = a->w_scale.data != NULL; /* turned round */
    int64_t inputs = a->x.data != NULL ? a->x.cols : codes ? a->w.rows : a->w.cols;
    pmli_need_any(&c, "dy", &a->dy, PMLI_ANY, outputs);
    if (a->dy_scale.data != NULL)
        check_made(&c, a);
    else
        pmli_need_float(&c, "dy", &a->dy);
    pml_dtype dtype = dtype_of(a);
    if (a->x.data != NULL || a->dw.data != NULL || a->da.data != NULL)
        pmli_need_as(&c, "x", &a->x, a->dy.rows, PMLI_ANY, dtype);
    if (a->dx.data != NULL) {
        pmli_need_as(&c, "dx", &a->dx, a->dy.rows, inputs, dtype);
        if (a->w_scale.data == NULL)
            pmli_need_as(&c, "w", &a->w, outputs, inputs, dtype);
    }
    if (codes)
        pmli_need_as(&c, "w_scale", &a->w_scale, 1, outputs, PML_F32);
    if (codes && a->dx.data != NULL)
        pmli_fp8_need(&c, &a->w, inputs, outputs);
    pmli_need_that(&c, a->w_scale.data == NULL || a->dw.data == NULL,
                   "operand 'dw': a weight of 8 bits is not trained");
    PMLI_MAY(&c, a, dw, outputs, inputs, PML_F32);
    PMLI_MAY(&c, a, dbias, 1, outputs, PML_F32);
    if (a->lora_parts != 0)
        check_lora(&c, a, inputs);
    else
        pmli_need_that(&c, a->da.data == NULL && a->db.data == NULL,
                       "operands 'da' and 'db' need an adapter, lora_parts is 0");
    pmli_need_ws(&c, &a->ws, pmli_cuda_linear_bwd_ws(a));
    pmli_need_that(&c, inputs > 0, "operand 'x' has no columns");
    return c.status;
}

/* out = alpha x y + beta out, or with x taken transposed. */
static pml_status multiply(pml_queue *queue, const pml_linear_bwd_args *a, float alpha, pml_view x,
                           bool transposed, pml_view y, float beta, pml_view out, pml_error *err)
{
    pmli_gemm g = {.a = x.data,
                   .b = y.data,
                   .c = out.data,
                   .m = out.rows,
                   .n = out.cols,
                   .k = y.rows,
                   .lda = x.ld,
                   .ldb = y.ld,
                   .ldc = out.ld,
                   .transpose_a = transposed,
                   .in = x.dtype,
                   .out = out.dtype,
                   .alpha = alpha,
                   .beta = beta,
                   .workspace = a->ws.data,
                   .workspace_size = PMLI_GEMM_WORKSPACE};
    return pmli_gemm_run(queue, &g, err);
}

/* v of every part with an adapter and db, each where it is wanted, by products. */
static pml_status back_by_products(pml_queue *queue, const pml_linear_bwd_args *a, pml_view v,
                                   pml_error *err)
{
    pml_status status = PML_OK;
    int64_t y_col = 0, u_col = 0, b_row = 0;
    for (int p = 0; status == PML_OK && p < a->parts; y_col += a->part_cols[p++]) {
        if (!(a->lora_parts >> p & 1))
            continue;
        int64_t cols = a->part_cols[p];
        pml_view dy = pml_view_columns(a->dy, y_col, cols);
        if (v.data != NULL)
            status =
                multiply(queue, a, a->lora_scale[p], dy, false, pmli_rows_of(a->b, b_row, cols), 0,
                         pml_view_columns(v, u_col, a->rank), err);
        if (status == PML_OK && a->db.data != NULL)
            status = multiply(queue, a, 1, dy, true, pml_view_columns(a->u, u_col, a->rank), 1,
                              pmli_rows_of(a->db, b_row, cols), err);
        u_col += a->rank;
        b_row += cols;
    }
    return status;
}

pml_status pmli_linear_back(pml_queue *queue, const pml_linear_bwd_args *a, pml_view v,
                            pml_error *err)
{
    if (pmli_pass_serves_back(queue->device, a, &v))
        return pmli_pass_back(queue, a, &v, a->ws.data, err);
    return pmli_low_rank_serves(queue->device, a, &v) ? pmli_low_rank(queue, a, &v, a->ws.data, err)
                                                      : back_by_products(queue, a, v, err);
}

/* Where v stands, or is to: where it is given, in dy's border, or in the workspace. */
static pml_view place_of_v(const pml_linear_bwd_args *a, int64_t columns, void *ws)
{
    int64_t cols = pmli_lora_cols(a->rank, a->lora_parts);
    if (a->v.data != NULL)
        return a->v;
    return columns > 0 ? pml_view_columns(a->dy, a->dy.cols, cols)
                       : pml_matrix(ws, a->dy.rows, cols, a->dy.dtype);
}

/* v, db, and the borders with them in it where dx is to read them. */
static pml_status back_to_borders(pml_queue *queue, const pml_linear_bwd_args *a, pml_view v,
                                  const pmli_bordered *s, int64_t columns, pml_error *err)
{
    bool made = (a->kept & PML_V_MADE) != 0;
    bool wanted = !made && (a->dx.data != NULL || a->da.data != NULL || a->v.data != NULL);
    pml_status status = PML_OK;
    if (wanted || a->db.data != NULL)
        status = pmli_linear_back(queue, a, wanted ? v : (pml_view){0}, err);
    if (columns == 0)
        return status;
    pml_view beside = pml_view_columns(a->dy, a->dy.cols, v.cols);
    bool there = v.data == beside.data && columns == v.cols; /* no zeros behind it */
    pmli_bordered fill = *s;
    fill.u = there ? NULL : &v;
    if (status == PML_OK && (!there || (a->kept & PML_BORDER_OF_W) == 0))
        status = pmli_border_fill(queue, &fill, err);
    return status;
}

/* dx as one product: w's border is filled, dy's holds v. */
static pml_status dx_by_borders(pml_queue *queue, const pml_linear_bwd_args *a, int64_t columns,
                                pml_error *err)
{
    pml_view dy = pml_view_columns(a->dy, 0, a->dy.cols + columns), w = a->w;
    w.rows += columns;
    return multiply(queue, a, 1, dy, false, w, 0, a->dx, err);
}

static pml_status dx_apart(pml_queue *queue, const pml_linear_bwd_args *a, pml_view v,
                           pml_error *err)
{
    bool adds = a->lora_parts != 0 && a->lora_dropout == 0; /* v a, without masks */
    pml_status status;
    if (a->w_scale.data != NULL) {
        bool beside = adds && pmli_fp8_takes(&v, a->border);
        char *room = (char *)a->ws.data + pmli_cuda_linear_bwd_ws(a) - pmli_fp8_bwd_ws(a);
        status = pmli_fp8_linear_bwd(queue, a, beside ? &v : NULL, room, err);
        adds = adds && !beside;
    } else {
        status = multiply(queue, a, 1, a->dy, false, a->w, 0, a->dx, err);
    }
    if (status == PML_OK && adds)
        status = multiply(queue, a, 1, v, false, a->a, 1, a->dx, err);
    return status;
}

/* What v gives to dx and da, part by part under its mask. */
static pml_status back_through_masks(pml_queue *queue, const pml_linear_bwd_args *a, pml_view v,
                                     void *masked, pml_error *err)
{
    if (pmli_masked_serves_back(queue->device, a, &v))
        return pmli_masked_back(queue, a, &v, masked, err);
    pml_status status = PML_OK;
    pml_view x = pml_matrix(masked, a->dy.rows, a->a.cols, a->dy.dtype);
    int64_t at = 0;
    for (int p = 0; status == PML_OK && p < a->parts; p++) {
        if (!(a->lora_parts >> p & 1))
            continue;
        pmli_dropout d = {&a->rng, &a->places, a->lora_purpose + (uint32_t)p, a->lora_dropout};
        pml_view v_p = pml_view_columns(v, at, a->rank);
        if (a->da.data != NULL) {
            status = pmli_cuda_dropout(queue, &d, &a->x, false, &x, err);
            if (status == PML_OK)
                status =
                    multiply(queue, a, 1, v_p, true, x, 1, pmli_rows_of(a->da, at, a->rank), err);
        }
        if (status == PML_OK && a->dx.data != NULL) {
            status = multiply(queue, a, 1, v_p, false, pmli_rows_of(a->a, at, a->rank), 0, x, err);
            if (status == PML_OK)
                status = pmli_cuda_dropout(queue, &d, &x, true, &a->dx, err);
        }
        at += a->rank;
    }
    return status;
}

pml_status pmli_cuda_linear_bwd(pml_queue *queue, const pml_linear_bwd_args *a, pml_error *err)
{
    pml_status status = check(a, err);
    if (status != PML_OK || a->dy.rows == 0)
        return status;
    char *behind = (char *)a->ws.data + pmli_linear_back_ws(a);
    bool lora = a->lora_parts != 0, drops = lora && a->lora_dropout > 0;
    const pmli_bordered s = {&a->dy,       &a->w,    &a->a,   &a->b,     NULL,
                             a->part_cols, a->parts, a->rank, a->border, a->lora_parts};
    bool bordered = lora && !drops && a->dx.data != NULL && a->w_scale.data == NULL;
    int64_t columns = bordered ? pmli_border_columns(&s) : 0;
    pml_view v = {0};
    if (lora) {
        v = place_of_v(a, columns, behind);
        behind += v_bytes(a);
        status = back_to_borders(queue, a, v, &s, columns, err);
    }
    if (status == PML_OK && a->dx.data != NULL)
        status = columns > 0 ? dx_by_borders(queue, a, columns, err) : dx_apart(queue, a, v, err);
    if (status == PML_OK && drops) {
        status = back_through_masks(queue, a, v, behind, err);
        behind += masked_bytes(a);
    }
    if (status == PML_OK && a->da.data != NULL && !drops)
        status = multiply(queue, a, 1, v, true, a->x, 1, a->da, err);
    if (status == PML_OK && a->dw.data != NULL)
        status = multiply(queue, a, 1, a->dy, true, a->x, 1, a->dw, err);
    if (status == PML_OK && a->dbias.data != NULL)
        status = pmli_cuda_columns(queue, &a->dy, NULL, NULL, a->dbias.data, behind, err);
    return status;
}
