/* Copies to and from page-locked host memory beside the kernels: a second stream that forks from
 * the queue's and joins it again.
 *
 *   stream   ──kernel──fork──kernel──kernel──────────await──kernel──►
 *                       └──────┐                  ┌──┘
 *   copies             ────────offload──offload──join──►
 *
 * While the queue records, the fork brings `copies` into the recording and the join is an edge of
 * the graph, so that a replay overlaps as the ops did. The copies run in the order in which they
 * were asked for: one engine each way is all that a link can use. */
#include "device.h"
#include "operand.h"
#include "ops.h"

static pml_status make_copies(pml_queue *q, pml_error *err)
{
    pml_status status = PML_OK;
    if (q->join != NULL) /* the last of the three */
        return PML_OK;
    if (q->copies == NULL)
        status = PMLI_CU(pmli_cu.cuStreamCreate(&q->copies, CU_STREAM_NON_BLOCKING),
                         "making a stream for copies", err);
    if (status == PML_OK && q->fork == NULL)
        status = PMLI_CU(pmli_cu.cuEventCreate(&q->fork, CU_EVENT_DISABLE_TIMING),
                         "making an event", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuEventCreate(&q->join, CU_EVENT_DISABLE_TIMING),
                         "making an event", err);
    return status;
}

void pmli_cuda_copies_destroy(pml_queue *q)
{
    if (q->join != NULL)
        pmli_cu.cuEventDestroy(q->join);
    if (q->fork != NULL)
        pmli_cu.cuEventDestroy(q->fork);
    if (q->copies != NULL)
        pmli_cu.cuStreamDestroy(q->copies);
}

/* The copies to come begin when what the queue holds now is done. */
static pml_status fork_copies(pml_queue *q, pml_error *err)
{
    pml_status status = make_copies(q, err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuEventRecord(q->fork, q->stream), "forking a copy", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuStreamWaitEvent(q->copies, q->fork, 0), "forking a copy", err);
    return status;
}

static pml_status copy(pml_queue *q, const pml_view *x, const pml_view *y, bool to_host,
                       pml_error *err)
{
    const size_t size = pml_dtype_size(x->dtype), rows = (size_t)x->rows;
    const size_t width = (size_t)x->cols * size;
    if (x->ld == x->cols && y->ld == y->cols) {
        CUdeviceptr device = (CUdeviceptr)(uintptr_t)(to_host ? x->data : y->data);
        return to_host
                   ? PMLI_CU(pmli_cu.cuMemcpyDtoHAsync(y->data, device, rows * width, q->copies),
                             "copying to the host", err)
                   : PMLI_CU(pmli_cu.cuMemcpyHtoDAsync(device, x->data, rows * width, q->copies),
                             "copying from the host", err);
    }
    CUDA_MEMCPY2D c = {.srcMemoryType = to_host ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST,
                       .dstMemoryType = to_host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE,
                       .srcPitch = (size_t)x->ld * size,
                       .dstPitch = (size_t)y->ld * size,
                       .WidthInBytes = width,
                       .Height = rows};
    if (to_host) {
        c.srcDevice = (CUdeviceptr)(uintptr_t)x->data;
        c.dstHost = y->data;
    } else {
        c.srcHost = x->data;
        c.dstDevice = (CUdeviceptr)(uintptr_t)y->data;
    }
    return PMLI_CU(pmli_cu.cuMemcpy2DAsync(&c, q->copies), "copying rows to or from the host", err);
}

static pml_status carry(pml_queue *queue, pml_op op, const pml_view *x, const pml_view *y,
                        pml_error *err)
{
    pmli_check c = pmli_check_begin(op, err);
    pmli_need_any(&c, "x", x, PMLI_ANY, PMLI_ANY);
    pmli_need_as(&c, "y", y, x->rows, x->cols, x->dtype);
    if (c.status != PML_OK || x->rows == 0 || x->cols == 0)
        return c.status;
    pml_status status = fork_copies(queue, err);
    if (status == PML_OK)
        status = copy(queue, x, y, op == PML_OP_offload, err);
    queue->under_way = queue->under_way || status == PML_OK;
    return status;
}

pml_status pmli_cuda_offload(pml_queue *queue, const pml_offload_args *a, pml_error *err)
{
    return carry(queue, PML_OP_offload, &a->x, &a->y, err);
}

pml_status pmli_cuda_fetch(pml_queue *queue, const pml_fetch_args *a, pml_error *err)
{
    return carry(queue, PML_OP_fetch, &a->x, &a->y, err);
}

/* One join serves all copies before it, so that the awaits after the first find nothing to do. */
pml_status pmli_cuda_await(pml_queue *queue, const pml_await_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_await, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    if (c.status != PML_OK || !queue->under_way)
        return c.status;
    pml_status status =
        PMLI_CU(pmli_cu.cuEventRecord(queue->join, queue->copies), "joining copies", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuStreamWaitEvent(queue->stream, queue->join, 0), "joining copies",
                         err);
    queue->under_way = status != PML_OK;
    return status;
}
