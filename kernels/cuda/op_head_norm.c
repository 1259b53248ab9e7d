/* head_norm and its backward. */
#include "columns.h"
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

/* As device/head_norm.cu has them; PARTS: blocks that make a part of the weights' gradients, as
 * many as today's largest chips hold of them. */
enum {
    WARP = 32,
    WARPS = 8,
    THREADS = 256,
    MOST_HEAD_DIM = 256,
    PARTS = 132 * 4,
    MOST_STAYING_HEADS = PARTS * (THREADS / WARP)
};

size_t pmli_cuda_head_norm_bwd_ws(const pml_head_norm_bwd_args *a)
{
    return a->dq_weight.rows > 0 ? 2 * PARTS * (size_t)a->head_dim * sizeof(float) : 0;
}

/* Blocks of about THREADS threads side by side for all heads of a token, so many tokens under way
 * in each; p has what the kernels need of it. */
static pmli_launch wide_shape(pmli_head_norm_params *p, pml_dtype dtype, int tokens)
{
    int packs = p->head_dim * (int)pml_dtype_size(dtype) / 16;
    p->lanes = 1;
    while (p->lanes < packs && p->lanes < WARP)
        p->lanes *= 2;
    int room = THREADS / p->lanes, blocks = (p->heads + room - 1) / room;
    p->heads_a_block = (p->heads + blocks - 1) / blocks;
    int threads = (p->heads_a_block * p->lanes + WARP - 1) / WARP * WARP;
    return (pmli_launch){.grid_x = (unsigned)((p->tokens + tokens - 1) / tokens),
                         .grid_y = (unsigned)blocks,
                         .block_x = (unsigned)threads,
                         .block_y = 1};
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

/* Heads and weights of whole packs as those of the rows' dtype. */
static bool heads_in_packs(const pml_view *q_weight, const pml_view *k_weight, pml_dtype dtype)
{
    return pmli_in_packs_of(q_weight, dtype) && pmli_in_packs_of(k_weight, dtype);
}

/* wide: in the form that follows, for heads of whole packs. */
static pml_status launch(pml_queue *queue, pmli_kernel kernel, bool wide, int tokens,
                         pml_dtype dtype, pmli_head_norm_params *p, pml_error *err)
{
    if (wide)
        return pmli_cuda_launch(queue, kernel + 1, wide_shape(p, dtype, tokens), p, err);
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
    pml_dtype dtype = a->x.dtype;
    bool wide = heads_in_packs(&a->q_weight, &a->k_weight, dtype) && pmli_in_units_of(&a->x, 16) &&
                pmli_in_units_of(&a->y, 16);
    return launch(queue, kernels[a->q_weight.dtype == PML_F32][dtype], wide, HEAD_NORM_TOKENS,
                  dtype, &p, err);
}

static pml_status add_gradients(pml_queue *queue, const pml_head_norm_bwd_args *a, int64_t parts,
                                pml_error *err)
{
    float *const outputs[] = {a->dq_weight.data, a->dk_weight.data};
    return pmli_cuda_add_parts(queue, a->ws.data, parts, a->head_dim, outputs, 2, err);
}

/* dx and the weights' gradients in one pass. Every block comes to as many tokens as any other, but
 * for the last ones. */
static pml_status run_staying(pml_queue *queue, const pml_head_norm_bwd_args *a,
                              pmli_head_norm_params *p, pml_error *err)
{
    pmli_launch shape = wide_shape(p, a->x.dtype, HEAD_NORM_BACK_TOKENS);
    unsigned most = PARTS / shape.grid_y, turns = (shape.grid_x + most - 1) / most;
    shape.grid_x = (shape.grid_x + turns - 1) / turns;
    pmli_kernel kernel = PMLI_head_norm_bwd_weight_f32 + (unsigned)a->x.dtype;
    pml_status status = pmli_cuda_launch(queue, kernel, shape, p, err);
    int64_t blocks = (int64_t)shape.grid_x * shape.grid_y;
    return status == PML_OK ? add_gradients(queue, a, blocks, err) : status;
}

/* Before dx, which may lie on dy. */
static pml_status weight_gradients(pml_queue *queue, const pml_head_norm_bwd_args *a,
                                   pmli_head_norm_params *p, pml_error *err)
{
    p->rows_a_part = (p->tokens + PARTS - 1) / PARTS;
    int64_t parts = (p->tokens + p->rows_a_part - 1) / p->rows_a_part;
    pmli_launch shape = {.grid_x = (unsigned)parts, .grid_y = 2, .block_x = THREADS, .block_y = 1};
    pml_status status =
        pmli_cuda_launch(queue, PMLI_head_norm_parts_f32 + (unsigned)a->x.dtype, shape, p, err);
    return status == PML_OK ? add_gradients(queue, a, parts, err) : status;
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
                               .head_dim = a->head_dim,
                               .parts = a->ws.data};
    pml_status status = PML_OK;
    pml_dtype dtype = a->x.dtype;
    bool trains = a->dq_weight.data != NULL, trained = a->q_weight.dtype == PML_F32;
    bool wide = heads_in_packs(&a->q_weight, &a->k_weight, dtype) && pmli_in_units_of(&a->x, 16) &&
                pmli_in_units_of(&a->dy, 16) && pmli_in_units_of(&a->dx, 16);
    if (wide && trains && trained && heads <= MOST_STAYING_HEADS)
        return run_staying(queue, a, &p, err);
    if (trains)
        status = weight_gradients(queue, a, &p, err);
    static const pmli_kernel kernels[2][3] = {
        {PMLI_head_norm_bwd_f32, PMLI_head_norm_bwd_bf16, PMLI_head_norm_bwd_f16},
        {PMLI_head_norm_bwd_f32, PMLI_head_norm_bwd_trained_bf16, PMLI_head_norm_bwd_trained_f16}};
    return status == PML_OK
               ? launch(queue, kernels[trained][dtype], wide, HEAD_NORM_BACK_TOKENS, dtype, &p, err)
               : status;
}
