/* A queue is a stream. What is recorded on it becomes a graph that the driver replays as one. */
#include <stdlib.h>

#include "device.h"

/* What a graph takes on the device. Driver 580 on an H200, 26 graphs of 700 to 6,000 nodes: 2.5 to
 * 4.3 KiB a node, in whole units (docs/performance/gpu.md). */
enum { NODE_BYTES = 3584, GRAPH_UNIT = 2 << 20 };

pml_status pmli_cuda_queue_new(pml_device *device, pml_queue **queue, pml_error *err)
{
    *queue = NULL;
    pml_queue *q = calloc(1, sizeof *q);
    if (q == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a queue");
    q->device = device;
    pml_status status = pmli_cuda_enter(device, err);
    /* Non-blocking: in the primary context others may use the default stream, which would wait for
     * this one and make it wait. */
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuStreamCreate(&q->stream, CU_STREAM_NON_BLOCKING),
                         "making a queue", err);
    if (status == PML_OK) /* weights come soon */
        status = pmli_staging_new(device->context, &q->staging, err);
    if (status != PML_OK)
        pmli_cuda_queue_destroy(&q);
    *queue = q;
    return status;
}

void pmli_cuda_queue_destroy(pml_queue **queue)
{
    if (*queue == NULL)
        return;
    if ((*queue)->stream != NULL) {
        pmli_cu.cuCtxSetCurrent((*queue)->device->context);
        for (int i = 0; i < PML_MARKS; i++)
            if ((*queue)->marks[i] != NULL)
                pmli_cu.cuEventDestroy((*queue)->marks[i]);
        pmli_staging_destroy(&(*queue)->staging);
        pmli_cuda_copies_destroy(*queue);
        pmli_cu.cuStreamDestroy((*queue)->stream);
    }
    free(*queue);
    *queue = NULL;
}

/* For what the host waits for or takes part in: not while the queue only takes notes. */
static pml_status enter_running(pml_queue *queue, const char *what, pml_error *err)
{
    if (queue->recording)
        return PML_FAIL(err, PML_BUSY, "%s cannot be recorded into a graph", what);
    return pmli_cuda_enter(queue->device, err);
}

pml_status pmli_cuda_upload(pml_queue *queue, void *to, const void *from, size_t bytes,
                            pml_error *err)
{
    pml_status status = enter_running(queue, "an upload", err);
    if (status != PML_OK || bytes == 0)
        return status;
    if (bytes < PMLI_STAGED_LEAST)
        return PMLI_CU(
            pmli_cu.cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)to, from, bytes, queue->stream),
            "copying to the GPU", err);
    return pmli_staging_upload(queue->staging, queue->stream, to, from, bytes, err);
}

pml_status pmli_cuda_upload_file(pml_queue *queue, void *to, size_t pitch, const pml_file_at *from,
                                 size_t width, size_t rows, pml_error *err)
{
    pml_status status = enter_running(queue, "an upload", err);
    return status == PML_OK ? pmli_staging_upload_file(queue->staging, queue->stream, to, pitch,
                                                       from, width, rows, err)
                            : status;
}

pml_status pmli_cuda_uploaded(pml_queue *queue, pml_error *err)
{
    pml_status status = enter_running(queue, "an upload", err);
    return status == PML_OK ? pmli_staging_finish(queue->staging, queue->stream, err) : status;
}

pml_status pmli_cuda_download(pml_queue *queue, void *to, const void *from, size_t bytes,
                              pml_error *err)
{
    pml_status status = enter_running(queue, "a download", err);
    if (status != PML_OK || bytes == 0)
        return status;
    return PMLI_CU(
        pmli_cu.cuMemcpyDtoHAsync(to, (CUdeviceptr)(uintptr_t)from, bytes, queue->stream),
        "copying from the GPU", err);
}

pml_status pmli_cuda_sync(pml_queue *queue, pml_error *err)
{
    pml_status status = enter_running(queue, "a wait", err);
    if (status != PML_OK)
        return status;
    status = pmli_staging_finish(queue->staging, queue->stream, err);
    pml_status waited = PMLI_CU(pmli_cu.cuStreamSynchronize(queue->stream), "waiting for the GPU",
                                status == PML_OK ? err : NULL);
    return status == PML_OK ? waited : status;
}

pml_status pmli_cuda_graph_begin(pml_queue *queue, pml_error *err)
{
    pml_status status = enter_running(queue, "a recording", err);
    /* Thread-local: what other threads of this process do (another queue's sync, say) is theirs. */
    if (status == PML_OK)
        status = PMLI_CU(
            pmli_cu.cuStreamBeginCapture(queue->stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
            "beginning to record", err);
    queue->recording = status == PML_OK;
    return status;
}

static pml_status instantiate(pml_queue *queue, CUgraph nodes, pml_graph **graph, pml_error *err)
{
    pml_graph *g = calloc(1, sizeof *g);
    if (g == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a graph");
    g->device = queue->device;
    pml_status status = PMLI_CU(pmli_cu.cuGraphInstantiateWithFlags(&g->exec, nodes, 0),
                                "making a graph of what was recorded", err);
    /* Now, so that the first replay is not slower than the others. */
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuGraphUpload(g->exec, queue->stream), "uploading a graph", err);
    if (status != PML_OK)
        pmli_cuda_graph_destroy(&g);
    *graph = g;
    return status;
}

pml_status pmli_cuda_graph_end(pml_queue *queue, size_t room, pml_graph **graph, size_t *bytes,
                               pml_error *err)
{
    *graph = NULL;
    *bytes = 0;
    if (!queue->recording)
        return PML_FAIL(err, PML_INVALID, "nothing is being recorded on this queue");
    pml_status status = pmli_cuda_enter(queue->device, err);
    if (status != PML_OK)
        return status;
    CUgraph nodes = NULL;
    queue->recording = false;
    status = PMLI_CU(pmli_cu.cuStreamEndCapture(queue->stream, &nodes), "ending a recording", err);
    size_t count = 0;
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuGraphGetNodes(nodes, NULL, &count), "counting what was recorded",
                         err);
    if (status == PML_OK)
        *bytes = GRAPH_UNIT + count * NODE_BYTES;
    if (status == PML_OK && *bytes <= room)
        status = instantiate(queue, nodes, graph, err);
    if (nodes != NULL)
        pmli_cu.cuGraphDestroy(nodes);
    return status;
}

pml_status pmli_cuda_graph_launch(pml_queue *queue, pml_graph *graph, pml_error *err)
{
    pml_status status = enter_running(queue, "a graph", err);
    if (status != PML_OK)
        return status;
    return PMLI_CU(pmli_cu.cuGraphLaunch(graph->exec, queue->stream), "replaying a graph", err);
}

void pmli_cuda_graph_destroy(pml_graph **graph)
{
    if (*graph == NULL)
        return;
    if ((*graph)->exec != NULL) {
        pmli_cu.cuCtxSetCurrent((*graph)->device->context);
        pmli_cu.cuGraphExecDestroy((*graph)->exec);
    }
    free(*graph);
    *graph = NULL;
}

pml_status pmli_cuda_mark(pml_queue *queue, int index, pml_error *err)
{
    pml_status status = enter_running(queue, "a mark", err);
    if (status == PML_OK && (index < 0 || index >= PML_MARKS))
        return PML_FAIL(err, PML_INVALID, "mark %d: there are %d", index, PML_MARKS);
    if (status == PML_OK && queue->marks[index] == NULL)
        status = PMLI_CU(pmli_cu.cuEventCreate(&queue->marks[index], CU_EVENT_DEFAULT),
                         "making a mark", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuEventRecord(queue->marks[index], queue->stream),
                         "marking a moment", err);
    return status;
}

pml_status pmli_cuda_passed(pml_queue *queue, int index, pml_error *err)
{
    if (index < 0 || index >= PML_MARKS || queue->marks[index] == NULL)
        return PML_FAIL(err, PML_INVALID, "mark %d has not been made", index);
    pml_status status = enter_running(queue, "a wait", err);
    if (status == PML_OK)
        status = pmli_staging_finish(queue->staging, queue->stream, err);
    if (status == PML_OK)
        status =
            PMLI_CU(pmli_cu.cuEventSynchronize(queue->marks[index]), "waiting for the GPU", err);
    return status;
}

pml_status pmli_cuda_between(pml_queue *queue, int from, int to, double *seconds, pml_error *err)
{
    float milliseconds = 0;
    if (from < 0 || from >= PML_MARKS || to < 0 || to >= PML_MARKS || queue->marks[from] == NULL ||
        queue->marks[to] == NULL)
        return PML_FAIL(err, PML_INVALID, "marks %d and %d have not both been made", from, to);
    pml_status status = pmli_cuda_enter(queue->device, err);
    if (status == PML_OK)
        status =
            PMLI_CU(pmli_cu.cuEventElapsedTime(&milliseconds, queue->marks[from], queue->marks[to]),
                    "time between two marks", err);
    *seconds = 1e-3 * (double)milliseconds;
    return status;
}

bool pmli_cuda_begins_early(void)
{
    return pmli_cu.version >= 12030;
}

pml_status pmli_cuda_launch(pml_queue *queue, pmli_kernel kernel, pmli_launch shape, void *params,
                            pml_error *err)
{
    void *arguments[] = {params};
    CUlaunchAttribute attributes[3];
    unsigned count = 0;
    if (shape.cluster > 0)
        attributes[count++] = (CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                                                  .value.clusterDim = {shape.cluster, 1, 1}};
    if (shape.early && pmli_cuda_begins_early())
        attributes[count++] =
            (CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                .value.programmaticStreamSerializationAllowed = 1};
    if (shape.together)
        attributes[count++] =
            (CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE, .value.cooperative = 1};
    const CUlaunchConfig config = {.gridDimX = shape.grid_x,
                                   .gridDimY = shape.grid_y,
                                   .gridDimZ = 1,
                                   .blockDimX = shape.block_x,
                                   .blockDimY = shape.block_y,
                                   .blockDimZ = 1,
                                   .sharedMemBytes = shape.shared,
                                   .hStream = queue->stream,
                                   .attrs = attributes,
                                   .numAttrs = count};
    if (queue->preparing)
        return PML_OK;
    return PMLI_CU(
        pmli_cu.cuLaunchKernelEx(&config, queue->device->kernels[kernel], arguments, NULL),
        "starting a kernel", err);
}
