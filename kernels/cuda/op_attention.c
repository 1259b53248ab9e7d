/* Attention: its backward by the kernels for Hopper (attention_hopper.c) where they serve; by cuDNN
 * where it is and has room; by our own kernels on tensor cores where dtype, head width and chip
 * allow; else a warp a row. The first turn dq and dk back through rope as they write them, behind
 * the others rope's own kernel does. */
#include "attention_hopper.h"
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"
#include "sdpa_call.h"

/* As device/attention_*.cu has them. */
enum {
    TILE = 128,
    FWD_THREADS = 128,
    BWD_THREADS = 256,
    STEP = 64,
    ANY_ROWS = 8,
    ANY_THREADS = 256,
    MOST_HEAD_DIM = 256
};

static int fwd_shared(int head_dim)
{
    return (TILE + 4 * STEP) * head_dim * 2;
}

static int bwd_shared(int head_dim)
{
    return (2 * TILE + 4 * STEP) * head_dim * 2 + 4 * STEP * (int)sizeof(float);
}

/* The tensor-core kernels of a head width, bfloat16 first; none: PMLI_KERNEL_COUNT. */
static pmli_kernel tiles(pml_dtype dtype, int head_dim, pmli_kernel of_64, pmli_kernel of_128)
{
    pmli_kernel first = head_dim == 64 ? of_64 : of_128;
    return first + (dtype == PML_F16 ? 1 : 0);
}

pml_status pmli_cuda_attention_prepare(pml_device *d, pml_error *err)
{
    static const struct {
        pmli_kernel kernel;
        int head_dim;
        bool backward;
    } users[] = {{PMLI_attend_64_bf16, 64, false},         {PMLI_attend_64_f16, 64, false},
                 {PMLI_attend_128_bf16, 128, false},       {PMLI_attend_128_f16, 128, false},
                 {PMLI_attend_bwd_kv_64_bf16, 64, true},   {PMLI_attend_bwd_kv_64_f16, 64, true},
                 {PMLI_attend_bwd_q_64_bf16, 64, true},    {PMLI_attend_bwd_q_64_f16, 64, true},
                 {PMLI_attend_bwd_kv_128_bf16, 128, true}, {PMLI_attend_bwd_kv_128_f16, 128, true},
                 {PMLI_attend_bwd_q_128_bf16, 128, true},  {PMLI_attend_bwd_q_128_f16, 128, true}};
    pml_status status = PML_OK;
    for (size_t i = 0; status == PML_OK && i < sizeof users / sizeof *users; i++) {
        int bytes =
            users[i].backward ? bwd_shared(users[i].head_dim) : fwd_shared(users[i].head_dim);
        if (bytes <= d->shared_most) /* else it is not chosen */
            status = pmli_cuda_allow_shared(d, &users[i].kernel, 1, bytes,
                                            "shared memory for attention", err);
    }
    return status == PML_OK ? pmli_attention_hopper_prepare(d, err) : status;
}

static bool in_tiles(const pml_device *d, pml_dtype dtype, int head_dim, int shared)
{
    bool computes = dtype == PML_F16 || (dtype == PML_BF16 && d->code >= 80);
    return computes && (head_dim == 64 || head_dim == 128) && shared <= d->shared_most;
}

static void check_shapes(pmli_check *c, const pml_attention_args *a)
{
    pmli_need_that(c,
                   a->heads > 0 && a->kv_heads > 0 && a->heads % a->kv_heads == 0 &&
                       a->head_dim > 0 && a->head_dim <= MOST_HEAD_DIM,
                   "%d heads, %d of keys, of %d; must divide, and at most %d wide", a->heads,
                   a->kv_heads, a->head_dim, MOST_HEAD_DIM);
    int64_t q = (int64_t)a->heads * a->head_dim, kv = (int64_t)a->kv_heads * a->head_dim;
    pml_dtype dtype = a->q.dtype;
    pmli_need_any(c, "q", &a->q, PMLI_ANY, q);
    pmli_need_float(c, "q", &a->q);
    pmli_need_as(c, "k", &a->k, PMLI_ANY, kv, dtype);
    pmli_need_as(c, "v", &a->v, a->k.rows, kv, dtype);
    PMLI_NEED(c, a, cu_q, 1, PMLI_ANY, PML_I32);
    PMLI_NEED(c, a, cu_k, 1, a->cu_q.cols, PML_I32);
    pmli_need_as(c, "o", &a->o, a->q.rows, q, dtype);
    PMLI_NEED(c, a, lse, a->heads, a->q.rows, PML_F32);
    pmli_need_that(c, a->cu_q.cols >= 2, "operand 'cu_q' has no document");
    pmli_need_that(c, a->q.rows < INT32_MAX - TILE && a->k.rows < INT32_MAX - TILE,
                   "2^31 or more rows");
    pmli_need_that(c, !a->equal || a->q.rows == (a->cu_q.cols - 1) * a->max_q,
                   "%lld rows are not equal documents of %d", (long long)a->q.rows, a->max_q);
}

static pmli_attention_params params_of(const pml_attention_args *a)
{
    return (pmli_attention_params){.q = a->q.data,
                                   .k = a->k.data,
                                   .v = a->v.data,
                                   .cu_q = a->cu_q.data,
                                   .cu_k = a->cu_k.data,
                                   .o = a->o.data,
                                   .lse = a->lse.data,
                                   .tokens_q = a->q.rows,
                                   .tokens_k = a->k.rows,
                                   .ld_q = a->q.ld,
                                   .ld_k = a->k.ld,
                                   .ld_v = a->v.ld,
                                   .ld_o = a->o.ld,
                                   .ld_lse = a->lse.ld,
                                   .slots = (int)a->cu_q.cols - 1,
                                   .heads = a->heads,
                                   .kv_heads = a->kv_heads,
                                   .head_dim = a->head_dim,
                                   .window = a->window,
                                   .scale = a->scale};
}

/* A document's last tile may be partly filled, and so may that of the rows behind all documents. */
static unsigned tiles_at_most(int64_t rows, int slots)
{
    return (unsigned)(rows / TILE + slots + 1);
}

static pml_status launch_any(pml_queue *queue, pmli_kernel first, pml_dtype dtype, int64_t rows,
                             int heads, pmli_attention_params *p, pml_error *err)
{
    pmli_launch shape = {.grid_x = (unsigned)((rows + ANY_ROWS - 1) / ANY_ROWS),
                         .grid_y = (unsigned)heads,
                         .block_x = ANY_THREADS,
                         .block_y = 1};
    return rows == 0 ? PML_OK : pmli_cuda_launch(queue, first + (unsigned)dtype, shape, p, err);
}

/* Fewer rows than a tile's warp has: a generated token. A block a row and head then reads the keys
 * once. */
enum { FEW_ROWS = 16 };

size_t pmli_cuda_attention_ws(const pml_attention_args *a)
{
    return pmli_sdpa_ws(a->q.dtype, a->q.rows, a->cu_q.cols - 1, a->max_q, a->heads, a->head_dim,
                        false);
}

pml_status pmli_cuda_attention(pml_queue *queue, const pml_attention_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_attention, err);
    check_shapes(&c, a);
    if (c.status != PML_OK || a->q.rows == 0)
        return c.status;
    pmli_attention_params p = params_of(a);
    pml_dtype dtype = a->q.dtype;
    bool tiled = a->q.rows > FEW_ROWS &&
                 in_tiles(queue->device, dtype, a->head_dim, fwd_shared(a->head_dim)) &&
                 pmli_in_units_of(&a->q, 16) && pmli_in_units_of(&a->k, 16) &&
                 pmli_in_units_of(&a->v, 16) && pmli_in_units_of(&a->o, 16);
    if (tiled && a->ws.data != NULL) {
        bool done;
        pml_status status = pmli_sdpa_forward(queue, &p, dtype, a->max_q, a->equal != 0, a->ws.data,
                                              (size_t)a->ws.cols, &done, err);
        if (status != PML_OK || done)
            return status;
    }
    if (a->q.rows <= FEW_ROWS) {
        const pmli_launch few = {.grid_x = (unsigned)a->q.rows,
                                 .grid_y = (unsigned)a->heads,
                                 .block_x = ANY_THREADS,
                                 .block_y = 1};
        return pmli_cuda_launch(queue, PMLI_attend_few_f32 + (unsigned)dtype, few, &p, err);
    }
    if (!tiled)
        return launch_any(queue, PMLI_attend_f32, dtype, a->q.rows, a->heads, &p, err);
    pmli_launch shape = {.grid_x = tiles_at_most(a->q.rows, p.slots),
                         .grid_y = (unsigned)a->heads,
                         .block_x = FWD_THREADS,
                         .block_y = 1,
                         .shared = (unsigned)fwd_shared(a->head_dim)};
    return pmli_cuda_launch(queue,
                            tiles(dtype, a->head_dim, PMLI_attend_64_bf16, PMLI_attend_128_bf16),
                            shape, &p, err);
}

size_t pmli_cuda_attention_bwd_ws(const pml_attention_bwd_args *a)
{
    size_t dots = (size_t)a->heads * (size_t)a->q.rows * sizeof(float);
    size_t cudnn = pmli_sdpa_ws(a->q.dtype, a->q.rows, a->cu_q.cols - 1, a->max_q, a->heads,
                                a->head_dim, true);
    size_t hopper = pmli_attention_hopper_ws(a);
    size_t most = cudnn > dots ? cudnn : dots;
    return hopper > most ? hopper : most;
}

/* What the backward shares with the forward, to be checked alike. */
static pml_attention_args forward_of(const pml_attention_bwd_args *a)
{
    return (pml_attention_args){.q = a->q,
                                .k = a->k,
                                .v = a->v,
                                .cu_q = a->cu_q,
                                .cu_k = a->cu_k,
                                .o = a->o,
                                .lse = a->lse,
                                .heads = a->heads,
                                .kv_heads = a->kv_heads,
                                .head_dim = a->head_dim,
                                .window = a->window,
                                .max_q = a->max_q,
                                .equal = a->equal,
                                .scale = a->scale};
}

static pml_status launch_tiles_bwd(pml_queue *queue, const pml_attention_bwd_args *a,
                                   pmli_attention_params *p, pml_error *err)
{
    pml_dtype dtype = a->q.dtype;
    pmli_launch shape = {.grid_x = tiles_at_most(a->k.rows, p->slots),
                         .grid_y = (unsigned)a->kv_heads,
                         .block_x = BWD_THREADS,
                         .block_y = 1,
                         .shared = (unsigned)bwd_shared(a->head_dim)};
    pml_status status = pmli_cuda_launch(
        queue, tiles(dtype, a->head_dim, PMLI_attend_bwd_kv_64_bf16, PMLI_attend_bwd_kv_128_bf16),
        shape, p, err);
    shape.grid_x = tiles_at_most(a->q.rows, p->slots);
    shape.grid_y = (unsigned)a->heads;
    if (status == PML_OK)
        status = pmli_cuda_launch(
            queue, tiles(dtype, a->head_dim, PMLI_attend_bwd_q_64_bf16, PMLI_attend_bwd_q_128_bf16),
            shape, p, err);
    return status;
}

/* dq, dk and dv by whatever serves but the kernels for Hopper; not turned back. */
static pml_status backward_elsewhere(pml_queue *queue, const pml_attention_bwd_args *a,
                                     const pml_attention_args *forward, pml_error *err)
{
    pml_dtype dtype = a->q.dtype;
    pmli_attention_params p = params_of(forward);
    p.o = NULL;
    p.out = a->o.data, p.ld_out = a->o.ld;
    p.dout = a->dout.data, p.ld_dout = a->dout.ld;
    p.dq = a->dq.data, p.ld_dq = a->dq.ld;
    p.dk = a->dk.data, p.ld_dk = a->dk.ld;
    p.dv = a->dv.data, p.ld_dv = a->dv.ld;
    p.dots = a->ws.data;
    const pml_view *all[] = {&a->q, &a->k, &a->v, &a->dout, &a->dq, &a->dk, &a->dv};
    bool tiled = in_tiles(queue->device, dtype, a->head_dim, bwd_shared(a->head_dim));
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        tiled = tiled && pmli_in_units_of(all[i], 16);
    pml_status status = PML_OK;
    bool done = false;
    if (tiled && a->q.rows > FEW_ROWS)
        status = pmli_sdpa_backward(queue, &p, dtype, a->max_q, a->equal != 0, a->ws.data,
                                    (size_t)a->ws.cols, &done, err);
    if (status != PML_OK || done)
        return status;
    status = launch_any(queue, PMLI_attend_dots_f32, dtype, a->q.rows, a->heads, &p, err);
    if (status != PML_OK)
        return status;
    if (tiled)
        return launch_tiles_bwd(queue, a, &p, err);
    status = launch_any(queue, PMLI_attend_bwd_q_f32, dtype, a->q.rows, a->heads, &p, err);
    return status == PML_OK
               ? launch_any(queue, PMLI_attend_bwd_kv_f32, dtype, a->k.rows, a->kv_heads, &p, err)
               : status;
}

/* dq and dk as they were before rope; at once where they lie side by side in one buffer's rows. */
static pml_status turn_back(pml_queue *queue, const pml_attention_bwd_args *a, pml_error *err)
{
    pml_rope_args turn = {.x = a->dq,
                          .pos = a->pos,
                          .table = a->table,
                          .heads = a->heads,
                          .head_dim = a->head_dim,
                          .inverse = 1};
    const char *behind =
        (const char *)a->dq.data + a->dq.cols * (int64_t)pml_dtype_size(a->dq.dtype);
    bool neighbours =
        a->dk.data == behind && a->dk.ld == a->dq.ld && a->dq.ld >= a->dq.cols + a->dk.cols;
    if (neighbours) {
        turn.x.cols += a->dk.cols;
        turn.heads += a->kv_heads;
    }
    pml_status status = pmli_cuda_rope(queue, &turn, err);
    if (status != PML_OK || neighbours)
        return status;
    turn.x = a->dk;
    turn.heads = a->kv_heads;
    return pmli_cuda_rope(queue, &turn, err);
}

static void check_backward(pmli_check *c, const pml_attention_bwd_args *a)
{
    pml_dtype dtype = a->q.dtype;
    pmli_need_as(c, "dout", &a->dout, a->q.rows, a->q.cols, dtype);
    pmli_need_turn(c, a);
    pmli_need_that(c, a->pos.data == NULL || a->table.ld == a->head_dim,
                   "operand 'table' must have no border");
    pmli_need_as(c, "dq", &a->dq, a->q.rows, a->q.cols, dtype);
    pmli_need_as(c, "dk", &a->dk, a->k.rows, a->k.cols, dtype);
    pmli_need_as(c, "dv", &a->dv, a->v.rows, a->v.cols, dtype);
    pmli_need_ws(c, &a->ws, (size_t)a->heads * (size_t)a->q.rows * sizeof(float));
}

pml_status pmli_cuda_attention_bwd(pml_queue *queue, const pml_attention_bwd_args *a,
                                   pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_attention_bwd, err);
    const pml_attention_args forward = forward_of(a);
    check_shapes(&c, &forward);
    check_backward(&c, a);
    if (c.status != PML_OK)
        return c.status;
    if (pmli_attention_hopper_serves(queue->device, a))
        return pmli_attention_hopper_bwd(queue, a, err);
    pml_status status = backward_elsewhere(queue, a, &forward, err);
    return status == PML_OK && a->pos.data != NULL ? turn_back(queue, a, err) : status;
}
