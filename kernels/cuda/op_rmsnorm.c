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

/* Absent, or in packs as those of such a dtype. */
static bool packs_or_absent(const pml_view *v, pml_dtype dtype)
{
    return v->data == NULL || pmli_in_packs_of(v, dtype);
}

/* Both in the dtype of y and dy, or the weight in F32, or both. Returns which, as the kernels are
 * listed: 0, 1, 2. */
static int check_begins(pmli_check *c, const pml_view *x, const pml_view *weight, pml_dtype dtype)
{
    pmli_need_any(c, "x", x, PMLI_ANY, PMLI_ANY);
    pmli_need_that(c, x->dtype == dtype || x->dtype == PML_F32, "x in %s beside %s",
                   pml_dtype_name(x->dtype), pml_dtype_name(dtype));
    pmli_need_as(c, "weight", weight, 1, x->cols,
                 x->dtype == PML_F32 || weight->dtype == PML_F32 ? PML_F32 : dtype);
    return x->dtype != dtype ? 2 : weight->dtype != dtype;
}

pml_status pmli_cuda_rmsnorm(pml_queue *queue, const pml_rmsnorm_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rmsnorm, err);
    int64_t rows = a->x.rows, cols = a->x.cols;
    pml_dtype dtype = a->y.dtype;
    bool adds = a->add.data != NULL;
    pmli_need_any(&c, "y", &a->y, rows, cols);
    pmli_need_float(&c, "y", &a->y);
    int which = check_begins(&c, &a->x, &a->weight, dtype);
    if (adds) {
        pmli_need_as(&c, "add", &a->add, rows, cols, dtype);
        pmli_need_as(&c, "sum", &a->sum, rows, cols, dtype);
    }
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
    static const pmli_kernel kernels[3][3] = {
        {PMLI_rmsnorm_f32, PMLI_rmsnorm_bf16, PMLI_rmsnorm_f16},
        {PMLI_rmsnorm_f32, PMLI_rmsnorm_trained_bf16, PMLI_rmsnorm_trained_f16},
        {PMLI_rmsnorm_f32, PMLI_rmsnorm_begins_bf16, PMLI_rmsnorm_begins_f16}};
    pmli_kernel kernel = kernels[which][dtype];
    pml_dtype of = a->x.dtype; /* the widest of the rows, so its packs are the 16-byte ones */
    bool whole = pmli_in_packs_of(&a->x, of) && pmli_in_packs_of(&a->y, of) &&
                 pmli_in_packs_of(&a->weight, of) &&
                 (!adds || (pmli_in_packs_of(&a->add, of) && pmli_in_packs_of(&a->sum, of)));
    int64_t packs = cols * (int64_t)pml_dtype_size(of) / 16;
    row_form form = form_for(cols, whole ? packs : 0, whole ? packs_a_thread(packs) : 0);
    return pmli_cuda_launch(queue, kernel + form.kernel, shape_for(rows, form.threads), &p, err);
}

/* Three operands wait in registers where the forward has two: four packs of each only for rows that
 * fit in no other way. */
static int packs_a_thread_bwd(int64_t packs)
{
    return packs <= 128 ? 1 : packs <= 2 * MOST_THREADS ? 2 : packs <= 4 * MOST_THREADS ? 4 : 0;
}

/* ---- the weight's gradient in the same pass: blocks that stay, and a part of it from each ---- */

/* As many blocks as today's largest chips hold of 64 registers a thread. Not the device's own
 * number: bits would then depend on it. STAYING_STATIC: shared memory that such a block has beside
 * the rows that wait. */
enum {
    STAYING_THREADS = 1024,
    PROCESSORS = 132,
    STAYING_BLOCK = 512,
    STAYING_STATIC = 10 << 10,
    SHARED_UNASKED = 48 << 10
};

/* A thread a pack of the row, whole warps; rows of a block. */
static unsigned staying_across(int64_t packs)
{
    return (unsigned)((packs + WARP - 1) / WARP * WARP);
}

static unsigned staying_rows(unsigned across)
{
    return across <= STAYING_BLOCK / 2 ? STAYING_BLOCK / across : 1;
}

static int64_t most_blocks(unsigned across)
{
    unsigned threads = across * staying_rows(across), resident = STAYING_THREADS / threads;
    return (int64_t)PROCESSORS * (resident > 0 ? resident : 1);
}

/* Bytes of shared memory for the rows that wait: dy, and x and the sums, two packs of each that is
 * wider. */
static int waiting_bytes(int64_t packs, bool wide_x, bool wide_sums)
{
    unsigned across = staying_across(packs), threads = across * staying_rows(across);
    int of_place = 3 + wide_x + wide_sums;
    int places = of_place == 3 ? RMSNORM_PLACES : RMSNORM_PLACES_WIDE;
    return (int)threads * 16 * of_place * places;
}

/* By what x is in and which dtype dy has; the last are those with sums in F32. */
static const pmli_kernel staying[2][4] = {
    {PMLI_rmsnorm_bwd_weight_f32, PMLI_rmsnorm_bwd_weight_bf16, PMLI_rmsnorm_bwd_weight_f16,
     PMLI_rmsnorm_bwd_weight_f16_to_f32},
    {PMLI_rmsnorm_bwd_weight_f32, PMLI_rmsnorm_bwd_weight_begins_bf16,
     PMLI_rmsnorm_bwd_weight_begins_f16, PMLI_rmsnorm_bwd_weight_begins_f16_to_f32}};

pml_status pmli_cuda_rmsnorm_prepare(pml_device *d, pml_error *err)
{
    int most = d->shared_most - STAYING_STATIC;
    return most > SHARED_UNASKED
               ? pmli_cuda_allow_shared(d, staying[0], sizeof staying / sizeof **staying, most,
                                        "shared memory for a norm's rows", err)
               : PML_OK;
}

/* Packs of a row of this dtype. */
static int64_t packs_of(const pml_rmsnorm_bwd_args *a, pml_dtype dtype)
{
    return a->x.cols * (int64_t)pml_dtype_size(dtype) / 16;
}

static bool may_stay(const pml_rmsnorm_bwd_args *a)
{
    int64_t bytes = a->x.cols * (int64_t)pml_dtype_size(a->dy.dtype);
    return bytes > 0 && bytes % 16 == 0 && bytes / 16 <= MOST_THREADS;
}

size_t pmli_cuda_rmsnorm_bwd_ws(const pml_rmsnorm_bwd_args *a)
{
    size_t columns = pmli_cuda_columns_ws(a->x.cols), parts = 0;
    if (a->dweight.rows == 0)
        return 0;
    if (may_stay(a))
        parts = (size_t)most_blocks(staying_across(packs_of(a, a->dy.dtype))) * (size_t)a->x.cols *
                sizeof(float);
    return parts > columns ? parts : columns;
}

/* Every block comes to as many rows as any other, but for the last ones. */
static pml_status run_staying(pml_queue *queue, pmli_kernel kernel, int64_t packs, int waiting,
                              pmli_rmsnorm_bwd_params *p, float *dweight, pml_error *err)
{
    unsigned across = staying_across(packs), rows = staying_rows(across);
    int64_t groups = (p->rows + rows - 1) / rows, most = most_blocks(across);
    int64_t turns = (groups + most - 1) / most, blocks = (groups + turns - 1) / turns;
    pmli_launch shape = {.grid_x = (unsigned)blocks,
                         .grid_y = 1,
                         .block_x = across,
                         .block_y = rows,
                         .shared = (unsigned)waiting};
    pml_status status = pmli_cuda_launch(queue, kernel, shape, p, err);
    if (status != PML_OK)
        return status;
    return pmli_cuda_add_parts(queue, p->parts, blocks, p->cols, &dweight, 1, err);
}

/* Returns what check_begins does. */
static int check_bwd(pmli_check *c, const pml_rmsnorm_bwd_args *a, pml_dtype sums)
{
    int64_t rows = a->x.rows, cols = a->x.cols;
    pml_dtype dtype = a->dy.dtype;
    pmli_need_any(c, "dy", &a->dy, rows, cols);
    pmli_need_float(c, "dy", &a->dy);
    int which = check_begins(c, &a->x, &a->weight, dtype);
    PMLI_NEED(c, a, rstd, 1, rows, PML_F32);
    if (a->dres.data != NULL)
        pmli_need_as(c, "dres", &a->dres, rows, cols, sums);
    pmli_need_as(c, "dx", &a->dx, rows, cols, sums);
    if (a->rounded.data != NULL)
        pmli_need_as(c, "rounded", &a->rounded, rows, cols, dtype);
    PMLI_MAY(c, a, dweight, 1, cols, PML_F32);
    if (a->dweight.data != NULL) {
        pmli_need_ws(c, &a->ws, pmli_cuda_rmsnorm_bwd_ws(a));
        pmli_need_that(c, a->weight.dtype == PML_F32, "a gradient of operand 'weight' of %s",
                       pml_dtype_name(a->weight.dtype));
    }
    pmli_need_that(c, rows <= GRID_LIMIT, "more than 2^31 - 1 rows");
    return which;
}

/* Every row of every operand in packs as those of such a dtype. */
static bool rows_in_packs(const pml_rmsnorm_bwd_args *a, pml_dtype of)
{
    return pmli_in_packs_of(&a->x, of) && pmli_in_packs_of(&a->dy, of) &&
           pmli_in_packs_of(&a->weight, of) && pmli_in_packs_of(&a->dx, of) &&
           packs_or_absent(&a->dres, of) && packs_or_absent(&a->rounded, of);
}

pml_status pmli_cuda_rmsnorm_bwd(pml_queue *queue, const pml_rmsnorm_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rmsnorm_bwd, err);
    int64_t rows = a->x.rows, cols = a->x.cols;
    pml_dtype dtype = a->dy.dtype, of = a->x.dtype;
    bool wide_sums = dtype == PML_F16 && a->dx.dtype == PML_F32;
    int which = check_bwd(&c, a, wide_sums ? PML_F32 : dtype);
    if (c.status != PML_OK || rows == 0 || cols == 0)
        return c.status;

    pmli_rmsnorm_bwd_params p = {.dy = a->dy.data,
                                 .x = a->x.data,
                                 .weight = a->weight.data,
                                 .dres = a->dres.data,
                                 .rstd = a->rstd.data,
                                 .dx = a->dx.data,
                                 .rounded = a->rounded.data,
                                 .parts = a->ws.data,
                                 .rows = rows,
                                 .cols = cols,
                                 .ld_dy = a->dy.ld,
                                 .ld_x = a->x.ld,
                                 .ld_dres = a->dres.ld,
                                 .ld_dx = a->dx.ld,
                                 .ld_rounded = a->rounded.ld};
    bool whole = rows_in_packs(a, of), stay = may_stay(a) && rows_in_packs(a, dtype);
    int64_t packs = packs_of(a, of), staying_packs = packs_of(a, dtype);
    int waiting = stay ? waiting_bytes(staying_packs, which == 2, wide_sums) : 0;
    if (a->dweight.data != NULL && stay && (uintptr_t)a->ws.data % 16 == 0 &&
        waiting <= queue->device->shared_most - STAYING_STATIC)
        return run_staying(queue, staying[which == 2][wide_sums ? 3 : (int)dtype], staying_packs,
                           waiting, &p, a->dweight.data, err);
    if (a->dweight.data != NULL) { /* before dx, which may lie on dy */
        pml_status status =
            pmli_cuda_columns(queue, &a->dy, &a->x, a->rstd.data, a->dweight.data, a->ws.data, err);
        if (status != PML_OK)
            return status;
    }
    static const pmli_kernel kernels[3][4] = {
        {PMLI_rmsnorm_bwd_f32, PMLI_rmsnorm_bwd_bf16, PMLI_rmsnorm_bwd_f16,
         PMLI_rmsnorm_bwd_f16_to_f32},
        {PMLI_rmsnorm_bwd_f32, PMLI_rmsnorm_bwd_trained_bf16, PMLI_rmsnorm_bwd_trained_f16,
         PMLI_rmsnorm_bwd_trained_f16_to_f32},
        {PMLI_rmsnorm_bwd_f32, PMLI_rmsnorm_bwd_begins_bf16, PMLI_rmsnorm_bwd_begins_f16,
         PMLI_rmsnorm_bwd_begins_f16_to_f32}};
    pmli_kernel kernel = kernels[which][wide_sums ? 3 : (int)dtype];
    row_form form = form_for(cols, whole ? packs : 0, whole ? packs_a_thread_bwd(packs) : 0);
    return pmli_cuda_launch(queue, kernel + form.kernel, shape_for(rows, form.threads), &p, err);
}
