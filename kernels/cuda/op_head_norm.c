/* head_norm and its backward. */
#include "columns.h"
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

/* As device/head_norm.cu has them; blocks of tokens for the weights' gradients. */
enum { WARPS = 8, THREADS = 256, MOST_HEAD_DIM = 256, PARTS = 256 };

size_t pmli_cuda_head_norm_bwd_ws(const pml_head_norm_bwd_args *a)
{
    return a->dq_weight.rows > 0 ? 2 * PARTS * (size_t)a->head_dim * sizeof(float) : 0;
}

static void check_heads(pmli_check *c, int32_t heads, int32_t kv_heads, int32_t head_dim)
{
    pmli_need_that(c, heads > 0 && kv_heads > 0 && head_dim > 0 && head_dim <= MOST_HEAD_DIM,
                   "%d heads, %d of keys, of %d; must be positive, and at most %d wide", heads,
                   kv_heads, head_dim, MOST_HEAD_DIM);
}

/* Both in x's dtype, or both in F32. */
static void check_weights(pmli_check *c, const pml_view *q, const pml_view *k, int32_t head_dim,
                          pml_dtype dtype)
{
    pml_dtype of = q->dtype == PML_F32 ? PML_F32 : dtype;
    pmli_need_as(c, "q_weight", q, 1, head_dim, of);
    pmli_need_as(c, "k_weight", k, 1, head_dim, of);
}

static pml_status launch(pml_queue *queue, pmli_kernel kernel, pmli_head_norm_params *p,
                         pml_error *err)
{
    pmli_launch shape = {.grid_x = (unsigned)((p->tokens * p->heads + WARPS - 1) / WARPS),
                         .grid_y = 1,
                         .block_x = THREADS,
                         .block_y = 1};
    return pmli_cuda_launch(queue, kernel, shape, p, err);
}

pml_status pmli_cuda_head_norm(pml_queue *queue, const pml_head_norm_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_head_norm, err);
    int32_t heads = a->heads + a->kv_heads;
    check_heads(&c, a->heads, a->kv_heads, a->head_dim);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, (int64_t)heads * a->head_dim);
    pmli_need_float(&c, "x", &a->x);
    check_weights(&c, &a->q_weight, &a->k_weight, a->head_dim, a->x.dtype);
    pmli_need_as(&c, "y", &a->y, a->x.rows, a->x.cols, a->x.dtype);
    PMLI_NEED(&c, a, rstd, a->x.rows, heads, PML_F32);
    if (c.status != PML_OK || a->x.rows == 0)
        return c.status;
    pmli_head_norm_params p = {.x = a->x.data,
                               .q_weight = a->q_weight.data,
                               .k_weight = a->k_weight.data,
                               .y = a->y.data,
                               .rstd = a->rstd.data,
                               .tokens = a->x.rows,
                               .ld_x = a->x.ld,
                               .ld_y = a->y.ld,
                               .ld_rstd = a->rstd.ld,
                               .heads = heads,
                               .queries = a->heads,
                               .head_dim = a->head_dim,
                               .eps = a->eps};
    static const pmli_kernel kernels[2][3] = {
        {PMLI_head_norm_f32, PMLI_head_norm_bf16, PMLI_head_norm_f16},
        {PMLI_head_norm_f32, PMLI_head_norm_trained_bf16, PMLI_head_norm_trained_f16}};
    return launch(queue, kernels[a->q_weight.dtype == PML_F32][a->x.dtype], &p, err);
}

/* Before dx, which may lie on dy. */
static pml_status weight_gradients(pml_queue *queue, const pml_head_norm_bwd_args *a,
                                   pmli_head_norm_params *p, pml_error *err)
{
    p->rows_a_part = (p->tokens + PARTS - 1) / PARTS;
    p->parts = a->ws.data;
    int64_t parts = (p->tokens + p->rows_a_part - 1) / p->rows_a_part;
    pmli_launch shape = {.grid_x = (unsigned)parts, .grid_y = 2, .block_x = THREADS, .block_y = 1};
    pml_status status =
        pmli_cuda_launch(queue, PMLI_head_norm_parts_f32 + (unsigned)a->x.dtype, shape, p, err);
    float *const outputs[] = {a->dq_weight.data, a->dk_weight.data};
    for (int i = 0; status == PML_OK && i < 2; i++)
        status = pmli_cuda_add_parts(queue, p->parts + i * parts * a->head_dim, parts, a->head_dim,
                                     outputs[i], err);
    return status;
}

pml_status pmli_cuda_head_norm_bwd(pml_queue *queue, const pml_head_norm_bwd_args *a,
                                   pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_head_norm_bwd, err);
    int32_t heads = a->heads + a->kv_heads;
    check_heads(&c, a->heads, a->kv_heads, a->head_dim);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, (int64_t)heads * a->head_dim);
    pmli_need_float(&c, "x", &a->x);
    pmli_need_as(&c, "dy", &a->dy, a->x.rows, a->x.cols, a->x.dtype);
    check_weights(&c, &a->q_weight, &a->k_weight, a->head_dim, a->x.dtype);
    PMLI_NEED(&c, a, rstd, a->x.rows, heads, PML_F32);
    pmli_need_as(&c, "dx", &a->dx, a->x.rows, a->x.cols, a->x.dtype);
    PMLI_MAY(&c, a, dq_weight, 1, a->head_dim, PML_F32);
    PMLI_MAY(&c, a, dk_weight, 1, a->head_dim, PML_F32);
    pmli_need_pair(&c, "dq_weight", &a->dq_weight, "dk_weight", &a->dk_weight);
    pmli_need_ws(&c, &a->ws, pmli_cuda_head_norm_bwd_ws(a));
    if (c.status != PML_OK || a->x.rows == 0)
        return c.status;
    pmli_head_norm_params p = {.x = a->x.data,
                               .dy = a->dy.data,
                               .q_weight = a->q_weight.data,
                               .k_weight = a->k_weight.data,
                               .y = a->dx.data,
                               .rstd = a->rstd.data,
                               .tokens = a->x.rows,
                               .ld_x = a->x.ld,
                               .ld_dy = a->dy.ld,
                               .ld_y = a->dx.ld,
                               .ld_rstd = a->rstd.ld,
                               .heads = heads,
                               .queries = a->heads,
                               .head_dim = a->head_dim};
    pml_status status = PML_OK;
    if (a->dq_weight.data != NULL)
        status = weight_gradients(queue, a, &p, err);
    static const pmli_kernel kernels[2][3] = {
        {PMLI_head_norm_bwd_f32, PMLI_head_norm_bwd_bf16, PMLI_head_norm_bwd_f16},
        {PMLI_head_norm_bwd_f32, PMLI_head_norm_bwd_trained_bf16, PMLI_head_norm_bwd_trained_f16}};
    pmli_kernel kernel = kernels[a->q_weight.dtype == PML_F32][a->x.dtype];
    return status == PML_OK ? launch(queue, kernel, &p, err) : status;
}
