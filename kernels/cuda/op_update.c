/* sum, sumsq, clip_scale, adamw, sgd. */
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

_Static_assert(PML_HYPER_LR == HYPER_LR && PML_HYPER_ONE_MINUS_BETA1 == HYPER_ONE_MINUS_BETA1 &&
                   PML_HYPER_ONE_MINUS_BETA2 == HYPER_ONE_MINUS_BETA2 &&
                   PML_HYPER_EPS == HYPER_EPS && PML_HYPER_WEIGHT_DECAY == HYPER_WEIGHT_DECAY &&
                   PML_HYPER_BIAS1 == HYPER_BIAS1 && PML_HYPER_BIAS2 == HYPER_BIAS2 &&
                   PML_HYPER_MEAN == HYPER_MEAN && PML_HYPER_MAX_NORM == HYPER_MAX_NORM &&
                   PML_HYPER_GRAD_SCALE == HYPER_GRAD_SCALE &&
                   PML_HYPER_MOMENTUM == HYPER_MOMENTUM && PML_HYPER_NEW_GRAD == HYPER_NEW_GRAD,
               "device/params.h has other places for the hyper-parameters");

/* Blocks that add up a buffer: four of 256 threads on each processor of today's largest chips. Not
 * the device's own number: bits would then depend on it. */
enum { BLOCK = 256, SUM_BLOCKS = 528, ELEMENTS_A_BLOCK = 2048, ADAMW_BLOCKS = 132 * 16 };

static int sum_blocks(int64_t elements)
{
    int64_t n = (elements + ELEMENTS_A_BLOCK - 1) / ELEMENTS_A_BLOCK;
    return n < SUM_BLOCKS ? (int)n : SUM_BLOCKS;
}

size_t pmli_cuda_sum_ws(const pml_view *x)
{
    return (size_t)sum_blocks(x->rows * x->cols) * sizeof(double);
}

static pml_status add_up(pml_queue *queue, pml_op op, pmli_kernel kernel, const pml_sum_args *a,
                         pml_error *err)
{
    pmli_check c = pmli_check_begin(op, err);
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, total, 1, 1, PML_F64);
    pmli_need_ws(&c, &a->ws, pmli_cuda_sum_ws(&a->x));
    pmli_need_that(&c, (uintptr_t)a->ws.data % sizeof(double) == 0, "operand 'ws' is not aligned");
    if (c.status != PML_OK || a->x.rows == 0 || a->x.cols == 0)
        return c.status;
    pmli_sum_params p = {.x = a->x.data,
                         .parts = a->ws.data,
                         .total = a->total.data,
                         .rows = a->x.rows,
                         .cols = a->x.cols,
                         .ld = a->x.rows > 1 ? a->x.ld : a->x.cols,
                         .count = sum_blocks(a->x.rows * a->x.cols)};
    pmli_launch shape = {.grid_x = (unsigned)p.count, .grid_y = 1, .block_x = BLOCK, .block_y = 1};
    pml_status status = pmli_cuda_launch(queue, kernel, shape, &p, err);
    shape.grid_x = 1;
    return status == PML_OK ? pmli_cuda_launch(queue, PMLI_sum_total, shape, &p, err) : status;
}

pml_status pmli_cuda_sum(pml_queue *queue, const pml_sum_args *a, pml_error *err)
{
    return add_up(queue, PML_OP_sum, PMLI_sum_parts, a, err);
}

pml_status pmli_cuda_sumsq(pml_queue *queue, const pml_sumsq_args *a, pml_error *err)
{
    const pml_sum_args same = {a->x, a->total, a->ws};
    return add_up(queue, PML_OP_sumsq, PMLI_sumsq_parts, &same, err);
}

pml_status pmli_cuda_clip_scale(pml_queue *queue, const pml_clip_scale_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_clip_scale, err);
    PMLI_NEED(&c, a, sumsq, 1, 1, PML_F64);
    PMLI_NEED(&c, a, hyper, PMLI_ANY, PML_HYPER_COUNT, PML_F32);
    PMLI_MAY(&c, a, norm, 1, 1, PML_F32);
    PMLI_MAY(&c, a, loss, 1, 1, PML_F64);
    pmli_need_that(&c, a->hyper.rows > 0, "operand 'hyper' must have a row");
    if (c.status != PML_OK)
        return c.status;
    pmli_clip_params p = {.sumsq = a->sumsq.data,
                          .loss = a->loss.data,
                          .hyper = a->hyper.data,
                          .norm = a->norm.data,
                          .groups = a->hyper.rows,
                          .ld = a->hyper.ld};
    pmli_launch one = {.grid_x = 1, .grid_y = 1, .block_x = 1, .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_clip_scale, one, &p, err);
}

pml_status pmli_cuda_adamw(pml_queue *queue, const pml_adamw_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_adamw, err);
    PMLI_NEED(&c, a, p, 1, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, g, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, m, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, v, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, hyper, 1, PML_HYPER_COUNT, PML_F32);
    pml_dtype dtype = pmli_need_copy(&c, &a->p, &a->copy);
    if (c.status != PML_OK || a->p.cols == 0)
        return c.status;
    bool wide = pmli_in_units_of(&a->p, 16) && pmli_in_units_of(&a->g, 16) &&
                pmli_in_units_of(&a->m, 16) && pmli_in_units_of(&a->v, 16) &&
                (a->copy.data == NULL || pmli_in_units_of(&a->copy, 4 * pml_dtype_size(dtype)));
    pmli_adamw_params p = {.p = a->p.data,
                           .m = a->m.data,
                           .v = a->v.data,
                           .g = a->g.data,
                           .hyper = a->hyper.data,
                           .copy = a->copy.data,
                           .count = a->p.cols};
    int64_t blocks = (a->p.cols / (wide ? 4 : 1) + BLOCK - 1) / BLOCK;
    pmli_launch shape = {.grid_x = (unsigned)(blocks < ADAMW_BLOCKS ? blocks : ADAMW_BLOCKS),
                         .grid_y = 1,
                         .block_x = BLOCK,
                         .block_y = 1};
    pmli_kernel kernel = PMLI_adamw_f32 + 2 * (unsigned)dtype + (wide ? 1 : 0);
    return pmli_cuda_launch(queue, kernel, shape, &p, err);
}

pml_status pmli_cuda_sgd(pml_queue *queue, const pml_sgd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_sgd, err);
    PMLI_NEED(&c, a, p, 1, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, g, 1, a->p.cols, PML_F32);
    PMLI_MAY(&c, a, m, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, hyper, 1, PML_HYPER_COUNT, PML_F32);
    pmli_need_that(&c, !a->nesterov || a->m.data != NULL, "nesterov needs operand 'm'");
    pml_dtype dtype = pmli_need_copy(&c, &a->p, &a->copy);
    if (c.status != PML_OK || a->p.cols == 0)
        return c.status;
    pmli_sgd_params p = {.p = a->p.data,
                         .m = a->m.data,
                         .g = a->g.data,
                         .hyper = a->hyper.data,
                         .copy = a->copy.data,
                         .count = a->p.cols,
                         .nesterov = a->nesterov};
    int64_t blocks = (a->p.cols + BLOCK - 1) / BLOCK;
    pmli_launch shape = {.grid_x = (unsigned)(blocks < ADAMW_BLOCKS ? blocks : ADAMW_BLOCKS),
                         .grid_y = 1,
                         .block_x = BLOCK,
                         .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_sgd_f32 + (unsigned)dtype, shape, &p, err);
}
