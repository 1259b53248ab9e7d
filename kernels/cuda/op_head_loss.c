/* Vocabulary head and cross-entropy: the logits of `chunk` labelled rows exist at a time, in the
 * operands' dtype, and turn in place into their gradient.
 *
 *   ws: | products' own | logits [chunk,V] | x of the chunk's rows [chunk,H] |
 *
 * dx of a chunk takes the place of its x, after dw has read that. */
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"
#include "rows.h"

enum { UNIT = 256, THREADS = 1024, SHORT_THREADS = 128, LOSS_PACK = 16, LOGITS_A_PACK = 8 };

static int64_t chunk_rows(const pml_head_loss_args *a)
{
    return a->chunk < a->rows.cols ? a->chunk : a->rows.cols;
}

/* Rows of logits begin on 16 bytes. */
static int64_t logits_ld(const pml_head_loss_args *a)
{
    return (a->w.rows + LOGITS_A_PACK - 1) / LOGITS_A_PACK * LOGITS_A_PACK;
}

static size_t in_units(size_t bytes)
{
    return (bytes + UNIT - 1) / UNIT * UNIT;
}

size_t pmli_cuda_head_loss_ws(const pml_head_loss_args *a)
{
    size_t rows = (size_t)chunk_rows(a), size = pml_dtype_size(a->x.dtype);
    return PMLI_GEMM_WORKSPACE + in_units(rows * (size_t)logits_ld(a) * size) +
           in_units(rows * (size_t)a->x.cols * size);
}

static pml_status check(const pml_head_loss_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_head_loss, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "x", &a->x);
    pmli_need_as(&c, "w", &a->w, PMLI_ANY, a->x.cols, a->x.dtype);
    PMLI_NEED(&c, a, rows, 1, PMLI_ANY, PML_I32);
    PMLI_NEED(&c, a, labels, 1, a->rows.cols, PML_I32);
    PMLI_MAY(&c, a, scale, 1, 1, PML_F32);
    PMLI_NEED(&c, a, loss, 1, a->rows.cols, PML_F32);
    if (a->dx.data != NULL)
        pmli_need_as(&c, "dx", &a->dx, a->x.rows, a->x.cols, a->x.dtype);
    PMLI_MAY(&c, a, dw, a->w.rows, a->w.cols, PML_F32);
    pmli_need_that(&c, a->chunk > 0, "chunk is %d, must be positive", a->chunk);
    pmli_need_that(&c, a->w.rows > 0 && a->w.rows < INT32_MAX, "no vocabulary, or 2^31 words");
    pmli_need_ws(&c, &a->ws, pmli_cuda_head_loss_ws(a));
    return c.status;
}

static pmli_gemm product(const pml_head_loss_args *a, const pml_view *x, const pml_view *y,
                         const pml_view *out)
{
    return (pmli_gemm){.a = x->data,
                       .b = y->data,
                       .c = out->data,
                       .m = out->rows,
                       .n = out->cols,
                       .lda = x->ld,
                       .ldb = y->ld,
                       .ldc = out->ld,
                       .in = x->dtype,
                       .out = out->dtype,
                       .alpha = 1,
                       .workspace = a->ws.data,
                       .workspace_size = PMLI_GEMM_WORKSPACE};
}

/* Packs of a row that a block may hold: two such blocks fit a processor, so that one reads while
 * the other writes. */
static int64_t share_most(const pml_device *device)
{
    int64_t packs = (device->shared_all / 2 - LOSS_BESIDE) / LOSS_PACK;
    return packs < LOSS_SHARE ? packs : LOSS_SHARE;
}

pml_status pmli_cuda_head_loss_prepare(pml_device *d, pml_error *err)
{
    static const pmli_kernel users[] = {PMLI_cross_entropy_held_bf16, PMLI_cross_entropy_held_f16};
    return d->code >= 90 ? pmli_cuda_allow_shared(d, users, sizeof users / sizeof *users,
                                                  (int)share_most(d) * LOSS_PACK,
                                                  "shared memory for the loss", err)
                         : PML_OK;
}

/* Blocks that hold a row together; 0: it is read twice. */
static int64_t holders(const pml_device *device, const pml_view *logits)
{
    if (device->code < 90 || logits->dtype == PML_F32)
        return 0;
    int64_t packs = logits->ld / LOGITS_A_PACK, most = share_most(device);
    int64_t blocks = (packs + most - 1) / most;
    return blocks <= LOSS_BLOCKS ? blocks : 0;
}

static pml_status launch_held(pml_queue *queue, pmli_cross_entropy_params *p, pml_dtype dtype,
                              int64_t blocks, pml_error *err)
{
    int64_t packs = p->ld / LOGITS_A_PACK, share = (packs + blocks - 1) / blocks;
    pmli_launch shape = {.grid_x = (unsigned)(p->count * blocks),
                         .grid_y = 1,
                         .block_x = LOSS_THREADS,
                         .block_y = 1,
                         .shared = (unsigned)share * LOSS_PACK,
                         .cluster = (unsigned)blocks};
    pmli_kernel kernel =
        dtype == PML_BF16 ? PMLI_cross_entropy_held_bf16 : PMLI_cross_entropy_held_f16;
    return pmli_cuda_launch(queue, kernel, shape, p, err);
}

static pml_status cross_entropy(pml_queue *queue, const pml_head_loss_args *a, int64_t first,
                                const pml_view *logits, pml_error *err)
{
    pmli_cross_entropy_params p = {.logits = logits->data,
                                   .rows = (const int *)a->rows.data + first,
                                   .labels = (const int *)a->labels.data + first,
                                   .scale = a->scale.data,
                                   .loss = (float *)a->loss.data + first,
                                   .count = logits->rows,
                                   .vocab = logits->cols,
                                   .ld = logits->ld,
                                   .grad = a->dx.data != NULL || a->dw.data != NULL};
    int64_t blocks = holders(queue->device, logits);
    if (blocks > 0)
        return launch_held(queue, &p, a->x.dtype, blocks, err);
    unsigned threads = logits->cols < 8 * THREADS ? SHORT_THREADS : THREADS;
    pmli_launch shape = {
        .grid_x = (unsigned)logits->rows, .grid_y = 1, .block_x = threads, .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_cross_entropy_f32 + (unsigned)a->x.dtype, shape, &p, err);
}

/* Labelled rows [first, first + n). */
static pml_status run_chunk(pml_queue *queue, const pml_head_loss_args *a, int64_t first, int64_t n,
                            pml_error *err)
{
    const int32_t *rows = (const int32_t *)a->rows.data + first;
    size_t size = pml_dtype_size(a->x.dtype), most = (size_t)chunk_rows(a);
    char *at = (char *)a->ws.data + PMLI_GEMM_WORKSPACE;
    pml_view logits = {at, n, a->w.rows, logits_ld(a), a->x.dtype};
    at += in_units(most * (size_t)logits.ld * size);
    pml_view x = pml_matrix(at, n, a->x.cols, a->x.dtype);

    pml_status status = pmli_cuda_move_rows(queue, (pmli_move){a->x, x, rows, NULL, n}, err);
    pmli_gemm g = product(a, &x, &a->w, &logits);
    g.k = x.cols;
    g.transpose_b = true;
    if (status == PML_OK)
        status = pmli_gemm_run(queue, &g, err);
    if (status == PML_OK)
        status = cross_entropy(queue, a, first, &logits, err);
    if (status == PML_OK && a->dw.data != NULL) { /* dw += dlogits^T x */
        g = product(a, &logits, &x, &a->dw);
        g.k = n;
        g.transpose_a = true;
        g.beta = 1;
        status = pmli_gemm_run(queue, &g, err);
    }
    if (status == PML_OK && a->dx.data != NULL) {
        g = product(a, &logits, &a->w, &x);
        g.k = a->w.rows;
        status = pmli_gemm_run(queue, &g, err);
        if (status == PML_OK)
            status = pmli_cuda_move_rows(queue, (pmli_move){x, a->dx, NULL, rows, n}, err);
    }
    return status;
}

pml_status pmli_cuda_head_loss(pml_queue *queue, const pml_head_loss_args *a, pml_error *err)
{
    pml_status status = check(a, err);
    if (status == PML_OK && a->dx.data != NULL && a->dx.rows > 0)
        status = pmli_cuda_clear(queue, &a->dx, err);
    for (int64_t first = 0; status == PML_OK && first < a->rows.cols; first += a->chunk) {
        int64_t left = a->rows.cols - first;
        status = run_chunk(queue, a, first, left < a->chunk ? left : a->chunk, err);
    }
    return status;
}
