/* RMSNorm, forward and backward. */
#include "columns.h"
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

/* Threads of a row in the kernel that takes rows as they come, and the most a block can have. */
enum {
    ANY_ROW_THREADS = 256,
    MOST_THREADS = 1024,
    WARP = 32,
    BLOCK = 256,
    GRID_LIMIT = 0x7fffffff
};

/* A long row has a block to itself, of whole warps. Short ones share a block: a warp each, or a
 * part of one that is a power of two. */
static pmli_launch shape_for(int64_t rows, int64_t threads)
{
    unsigned x = 1;
    while (x < WARP && x < threads)
        x *= 2;
    if (threads > WARP)
        x = (unsigned)((threads + WARP - 1) / WARP * WARP);
    unsigned y = x <= WARP ? BLOCK / x : 1;
    return (pmli_launch){
        .grid_x = (unsigned)((rows + y - 1) / y), .grid_y = 1, .block_x = x, .block_y = y};
}

/* Two packs a thread where a row is long enough: two loads on their way for each operand. Beyond
 * 256 threads four; the longest row the registers hold is 4 * 1024 packs. */
static int packs_a_thread(int64_t packs)
{
    return packs <= 128 ? 1 : packs <= 2 * 256 ? 2 : packs <= 4 * MOST_THREADS ? 4 : 0;
}

/* The four forms of one dtype's kernel follow each other: any row, 1, 2 and 4 packs a thread. */
typedef struct row_form {
    unsigned kernel;
    int64_t threads; /* for a row */
} row_form;

static row_form form_for(int64_t cols, int64_t packs, int each)
{
    if (each == 0)
        return (row_form){0, cols < ANY_ROW_THREADS ? cols : ANY_ROW_THREADS};
    return (row_form){each == 4 ? 3 : (unsigned)each, (packs + each - 1) / each};
}

pml_status pmli_cuda_rmsnorm(pml_queue *queue, const pml_rmsnorm_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rmsnorm, err);
    int64_t rows = a->x.rows, cols = a->x.cols;
    pml_dtype dtype = a->x.dtype;
    bool adds = a->add.data != NULL;
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "x", &a->x);
    if (adds) {
        pmli_need_as(&c, "add", &a->add, rows, cols, dtype);
        pmli_need_as(&c, "sum", &a->sum, rows, cols, dtype);
    }
    pmli_need_as(&c, "weight", &a->weight, 1, cols, dtype);
    pmli_need_as(&c, "y", &a->y, rows, cols, dtype);
    PMLI_NEED(&c, a, rstd, 1, rows, PML_F32);
    pmli_need_that(&c, rows <= GRID_LIMIT, "more than 2^31 - 1 rows");
    if (c.status != PML_OK || rows == 0 || cols == 0)
        return c.status;

    pmli_rmsnorm_params p = {.x = a->x.data,
                             .add = a->add.data,
                             .weight = a->weight.data,
                             .sum = adds ? a->sum.data : NULL,
                             .y = a->y.data,
                             .rstd = a->rstd.data,
                             .rows = rows,
                             .cols = cols,
                             .ld_x = a->x.ld,
                             .ld_add = a->add.ld,
                             .ld_sum = a->sum.ld,
                             .ld_y = a->y.ld,
                             .eps = a->eps};
    pmli_kernel kernel = dtype == PML_F32    ? PMLI_rmsnorm_f32
                         : dtype == PML_BF16 ? PMLI_rmsnorm_bf16
                                             : PMLI_rmsnorm_f16;
    bool whole = pmli_in_units_of(&a->x, 16) && pmli_in_units_of(&a->y, 16) &&
                 pmli_in_units_of(&a->weight, 16) &&
                 (!adds || (pmli_in_units_of(&a->add, 16) && pmli_in_units_of(&a->sum, 16)));
    int64_t packs = cols * (int64_t)pml_dtype_size(dtype) / 16;
    row_form form = form_for(cols, whole ? packs : 0, whole ? packs_a_thread(packs) : 0);
    return pmli_cuda_launch(queue, kernel + form.kernel, shape_for(rows, form.threads), &p, err);
}

/* Three operands wait in registers where the forward has two: four packs of each only for rows that
 * fit in no other way. */
static int packs_a_thread_bwd(int64_t packs)
{
    return packs <= 128 ? 1 : packs <= 2 * MOST_THREADS ? 2 : packs <= 4 * MOST_THREADS ? 4 : 0;
}

size_t pmli_cuda_rmsnorm_bwd_ws(const pml_rmsnorm_bwd_args *a)
{
    return a->dweight.rows > 0 ? pmli_cuda_columns_ws(a->x.cols) : 0;
}

pml_status pmli_cuda_rmsnorm_bwd(pml_queue *queue, const pml_rmsnorm_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rmsnorm_bwd, err);
    int64_t rows = a->x.rows, cols = a->x.cols;
    pml_dtype dtype = a->x.dtype;
    bool adds = a->dres.data != NULL, wide_sums = dtype == PML_F16 && a->dx.dtype == PML_F32;
    pml_dtype sums = wide_sums ? PML_F32 : dtype;
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "x", &a->x);
    pmli_need_as(&c, "dy", &a->dy, rows, cols, dtype);
    pmli_need_as(&c, "weight", &a->weight, 1, cols, dtype);
    PMLI_NEED(&c, a, rstd, 1, rows, PML_F32);
    if (adds)
        pmli_need_as(&c, "dres", &a->dres, rows, cols, sums);
    pmli_need_as(&c, "dx", &a->dx, rows, cols, sums);
    if (a->rounded.data != NULL)
        pmli_need_as(&c, "rounded", &a->rounded, rows, cols, dtype);
    PMLI_MAY(&c, a, dweight, 1, cols, PML_F32);
    if (a->dweight.data != NULL)
        pmli_need_ws(&c, &a->ws, pmli_cuda_columns_ws(cols));
    pmli_need_that(&c, rows <= GRID_LIMIT, "more than 2^31 - 1 rows");
    if (c.status != PML_OK || rows == 0 || cols == 0)
        return c.status;

    if (a->dweight.data != NULL) { /* before dx, which may lie on dy */
        pml_status status =
            pmli_cuda_columns(queue, &a->dy, &a->x, a->rstd.data, a->dweight.data, a->ws.data, err);
        if (status != PML_OK)
            return status;
    }
    pmli_rmsnorm_bwd_params p = {.dy = a->dy.data,
                                 .x = a->x.data,
                                 .weight = a->weight.data,
                                 .dres = a->dres.data,
                                 .rstd = a->rstd.data,
                                 .dx = a->dx.data,
                                 .rounded = a->rounded.data,
                                 .rows = rows,
                                 .cols = cols,
                                 .ld_dy = a->dy.ld,
                                 .ld_x = a->x.ld,
                                 .ld_dres = a->dres.ld,
                                 .ld_dx = a->dx.ld,
                                 .ld_rounded = a->rounded.ld};
    pmli_kernel kernel = wide_sums           ? PMLI_rmsnorm_bwd_f16_to_f32
                         : dtype == PML_F32  ? PMLI_rmsnorm_bwd_f32
                         : dtype == PML_BF16 ? PMLI_rmsnorm_bwd_bf16
                                             : PMLI_rmsnorm_bwd_f16;
    size_t unit = wide_sums ? 32 : 16; /* a pack of sums is as many elements */
    bool whole = pmli_in_units_of(&a->x, 16) && pmli_in_units_of(&a->dy, 16) &&
                 pmli_in_units_of(&a->weight, 16) && pmli_in_units_of(&a->dx, unit) &&
                 (!adds || pmli_in_units_of(&a->dres, unit)) &&
                 (a->rounded.data == NULL || pmli_in_units_of(&a->rounded, 16));
    int64_t packs = cols * (int64_t)pml_dtype_size(dtype) / 16;
    row_form form = form_for(cols, whole ? packs : 0, whole ? packs_a_thread_bwd(packs) : 0);
    return pmli_cuda_launch(queue, kernel + form.kernel, shape_for(rows, form.threads), &p, err);
}
