/* Linear layers by cuBLASLt.
 *
 * With an adapter there are two ways:
 *
 *   separate   u = s x a^T;  y = x w^T (+ bias);  y_p += u_p b_p^T for each part p
 *   bordered   u = s x a^T;  u, b into the borders of x, w;  y = [x|u] [w|b]^T (+ bias)
 *
 * The second moves y once instead of two to four times; it is taken where there are borders
 * (border.h). With dropout each part has its own mask, which one kernel draws as it reads x
 * (masked.h), or by which a masked x is made in the workspace. Where u is made already, the first
 * product is not there. Over a weight in 8 bits there is a border of another kind (fp8.h).
 *
 *   ws: | products' own | u [T,R] where it is not kept | masked x [T,K] | fp8's | */
#include "border.h"
#include "device.h"
#include "dropout.h"
#include "few_rows.h"
#include "fp8.h"
#include "linear.h"
#include "masked.h"
#include "operand.h"
#include "ops.h"

static int64_t lora_cols(const pml_linear_args *a)
{
    return pmli_lora_cols(a->rank, a->lora_parts);
}

static int64_t lora_rows(const pml_linear_args *a)
{
    return pmli_lora_rows(a->part_cols, a->parts, a->lora_parts);
}

static size_t u_bytes(const pml_linear_args *a)
{
    return pmli_linear_units((size_t)a->x.rows * (size_t)lora_cols(a) * pml_dtype_size(a->y.dtype));
}

size_t pmli_cuda_linear_ws(const pml_linear_args *a)
{
    bool own_u = a->lora_parts != 0 && a->u.rows == 0;
    return PMLI_GEMM_WORKSPACE + (own_u ? u_bytes(a) : 0) +
           pmli_masked_bytes(&a->x, a->lora_parts, a->lora_dropout) + pmli_fp8_ws(a);
}

static void check_lora(pmli_check *c, const pml_linear_args *a)
{
    pmli_need_that(c, a->rank > 0 && a->lora_parts >> a->parts == 0,
                   "rank %d with adapters on parts %#x of %d", a->rank, a->lora_parts, a->parts);
    pmli_need_as(c, "a", &a->a, lora_cols(a), a->x.cols, a->y.dtype);
    pmli_need_as(c, "b", &a->b, lora_rows(a), a->rank, a->y.dtype);
    if (a->u.data != NULL || a->u_made)
        pmli_need_as(c, "u", &a->u, a->x.rows, lora_cols(a), a->y.dtype);
    pmli_need_dropout(c, &(pmli_dropout){&a->rng, &a->places, 0, a->lora_dropout}, a->x.rows);
    if (a->w_scale.data == NULL)
        pmli_need_border(c, "x", &a->x, a->border);
    pmli_need_border(c, "w", &a->w, a->border);
}

/* x in codes: nothing but the product with a weight in codes can read it. */
static void check_made(pmli_check *c, const pml_linear_args *a)
{
    pmli_fp8_need_pieces(c, "x", &a->x, "x_scale", &a->x_scale, 1);
    pmli_need_that(c, a->x.ld >= a->x.cols + a->border, "operand 'x' has no border of %d",
                   a->border);
    pmli_need_that(c, a->w_scale.data != NULL && (a->lora_parts == 0 || a->u_made),
                   "operand 'x_scale' needs w in 8 bits, and u made");
}

static pml_status check(const pml_linear_args *a, bool lora, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_linear, err);
    int64_t outputs = 0;
    pmli_need_that(&c, a->parts >= 1 && a->parts <= PML_LINEAR_MAX_PARTS, "%d parts", a->parts);
    for (int p = 0; c.status == PML_OK && p < a->parts; p++) {
        pmli_need_that(&c, a->part_cols[p] > 0, "part %d has %d columns", p, a->part_cols[p]);
        outputs += a->part_cols[p];
    }
    bool made = a->x_scale.data != NULL;
    pmli_need_as(&c, "x", &a->x, PMLI_ANY, PMLI_ANY, made ? PML_U8 : a->y.dtype);
    pmli_need_float(&c, "y", &a->y);
    if (made)
        check_made(&c, a);
    if (a->w_scale.data != NULL)
        pmli_need_as(&c, "w_scale", &a->w_scale, 1, outputs, PML_F32);
    if (a->w_scale.data != NULL)
        pmli_fp8_need(&c, &a->w, outputs, a->x.cols);
    else
        pmli_need_as(&c, "w", &a->w, outputs, a->x.cols, a->y.dtype);
    if (a->bias.data != NULL)
        pmli_need_as(&c, "bias", &a->bias, 1, outputs, a->y.dtype);
    pmli_need_any(&c, "y", &a->y, a->x.rows, outputs);
    if (lora)
        check_lora(&c, a);
    pmli_need_ws(&c, &a->ws, pmli_cuda_linear_ws(a));
    pmli_need_that(&c, a->x.cols > 0, "operand 'x' has no columns");
    return c.status;
}

/* c = alpha x w^T + beta c, for views. */
static pmli_gemm product(const pml_view *x, const pml_view *w, const pml_view *y,
                         const pml_linear_args *a)
{
    return (pmli_gemm){.a = x->data,
                       .b = w->data,
                       .c = y->data,
                       .m = x->rows,
                       .n = w->rows,
                       .k = x->cols,
                       .lda = x->ld,
                       .ldb = w->ld,
                       .ldc = y->ld,
                       .transpose_b = true,
                       .in = x->dtype,
                       .out = y->dtype,
                       .alpha = 1,
                       .workspace = a->ws.data,
                       .workspace_size = PMLI_GEMM_WORKSPACE};
}

/* u, one product for all parts where they share a scale and the same x. masked: room for x. */
static pml_status down(pml_queue *queue, const pml_linear_args *a, const pml_view *u, void *masked,
                       pml_error *err)
{
    float scale;
    bool drops = a->lora_dropout > 0;
    if (drops && pmli_masked_serves_down(queue->device, a, u))
        return pmli_masked_down(queue, a, u, err);
    pml_view x = drops ? pml_matrix(masked, a->x.rows, a->x.cols, a->x.dtype) : a->x;
    if (!drops && pmli_lora_one_scale(a->lora_scale, a->parts, a->lora_parts, &scale)) {
        pmli_gemm g = product(&a->x, &a->a, u, a);
        g.alpha = scale;
        return pmli_gemm_run(queue, &g, err);
    }
    pml_status status = PML_OK;
    int64_t at = 0;
    for (int p = 0; status == PML_OK && p < a->parts; p++) {
        if (!(a->lora_parts >> p & 1))
            continue;
        pml_view a_p = pmli_rows_of(a->a, at, a->rank), u_p = pml_view_columns(*u, at, a->rank);
        pmli_gemm g = product(&x, &a_p, &u_p, a);
        g.alpha = a->lora_scale[p];
        pmli_dropout d = {&a->rng, &a->places, a->lora_purpose + (uint32_t)p, a->lora_dropout};
        if (drops)
            status = pmli_cuda_dropout(queue, &d, &a->x, false, &x, err);
        if (status == PML_OK)
            status = pmli_gemm_run(queue, &g, err);
        at += a->rank;
    }
    return status;
}

static pml_status frozen(pml_queue *queue, const pml_linear_args *a, int64_t border, pml_error *err)
{
    pmli_gemm g = product(&a->x, &a->w, &a->y, a);
    g.k += border;
    g.bias = a->bias.data;
    return pmli_gemm_run(queue, &g, err);
}

static pml_status up(pml_queue *queue, const pml_linear_args *a, const pml_view *u, pml_error *err)
{
    int64_t y_col = 0, u_col = 0, b_row = 0;
    for (int p = 0; p < a->parts; y_col += a->part_cols[p++]) {
        if (!(a->lora_parts >> p & 1))
            continue;
        pml_view u_p = pml_view_columns(*u, u_col, a->rank);
        pml_view y_p = pml_view_columns(a->y, y_col, a->part_cols[p]);
        pml_view b_p = pmli_rows_of(a->b, b_row, a->part_cols[p]);
        pmli_gemm g = product(&u_p, &b_p, &y_p, a);
        g.beta = 1;
        pml_status status = pmli_gemm_run(queue, &g, err);
        if (status != PML_OK)
            return status;
        u_col += a->rank;
        b_row += a->part_cols[p];
    }
    return PML_OK;
}

/* Over a weight in 8 bits; u absent: without adapters. */
static pml_status in_8_bits(pml_queue *queue, const pml_linear_args *a, const pml_view *u,
                            pml_error *err)
{
    bool beside = u != NULL && pmli_fp8_takes(u, a->border);
    char *room = (char *)a->ws.data + pmli_cuda_linear_ws(a) - pmli_fp8_ws(a);
    pml_status status = pmli_fp8_linear(queue, a, beside ? u : NULL, room, err);
    return status == PML_OK && u != NULL && !beside ? up(queue, a, u, err) : status;
}

pml_status pmli_cuda_linear(pml_queue *queue, const pml_linear_args *a, pml_error *err)
{
    bool lora = a->lora_parts != 0, few = pmli_few_rows_serves(a);
    pml_status status = check(a, lora, err);
    if (status != PML_OK || a->x.rows == 0)
        return status;
    bool narrow = a->w_scale.data != NULL;
    if (!lora)
        return narrow ? in_8_bits(queue, a, NULL, err)
               : few  ? pmli_few_rows(queue, a, &a->u, err)
                      : frozen(queue, a, 0, err);

    pml_view u = a->u;
    char *behind = (char *)a->ws.data + PMLI_GEMM_WORKSPACE;
    if (u.data == NULL) {
        u = pml_matrix(behind, a->x.rows, lora_cols(a), a->x.dtype);
        behind += u_bytes(a);
    }
    if (few)
        return pmli_few_rows(queue, a, &u, err);
    const pmli_bordered s = {&a->x,        &a->w,    &a->a,   &a->b,     &u,
                             a->part_cols, a->parts, a->rank, a->border, a->lora_parts};
    int64_t columns = pmli_border_columns(&s);
    if (!a->u_made)
        status = down(queue, a, &u, behind, err);
    if (narrow)
        return status == PML_OK ? in_8_bits(queue, a, &u, err) : status;
    if (status == PML_OK && columns > 0)
        status = pmli_border_fill(queue, &s, err);
    if (status == PML_OK)
        status = frozen(queue, a, columns, err);
    if (status == PML_OK && columns == 0)
        status = up(queue, a, &u, err);
    return status;
}
