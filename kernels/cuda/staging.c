#include "staging.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What was fastest on an H200's PCIe 5 link: 53 GB/s of 55 (four lanes 40, 64 MiB pieces 25). */
enum { LANES_MOST = 8, SLOTS = 2, PIECE = 4 << 20 };

typedef struct lane {
    pmli_staging *staging;
    pthread_t thread;
    CUstream stream;
    CUevent free[SLOTS]; /* the piece has left */
    char *piece[SLOTS];
    CUevent last;
    bool took_part; /* in the upload that ends */
} lane;

struct pmli_staging {
    CUcontext context;
    CUevent before; /* on the caller's stream */
    lane lanes[LANES_MOST];
    int made, running; /* lanes with their things, and those of them with a thread */

    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint64_t upload; /* counts them: a lane that has not seen this number has work */
    int busy;
    bool over;
    CUresult result; /* the first that was not good */

    const char *from;
    CUdeviceptr to;
    size_t bytes;
    atomic_size_t next;
};

/* Its share of the upload. */
static CUresult carry(lane *l)
{
    pmli_staging *s = l->staging;
    CUresult r = pmli_cu.cuStreamWaitEvent(l->stream, s->before, 0);
    l->took_part = false;
    for (int slot = 0; r == CUDA_SUCCESS; slot = (slot + 1) % SLOTS) {
        size_t at = atomic_fetch_add_explicit(&s->next, PIECE, memory_order_relaxed);
        if (at >= s->bytes)
            break;
        size_t n = s->bytes - at < PIECE ? s->bytes - at : PIECE;
        r = pmli_cu.cuEventSynchronize(l->free[slot]);
        if (r != CUDA_SUCCESS)
            break;
        memcpy(l->piece[slot], s->from + at, n);
        r = pmli_cu.cuMemcpyHtoDAsync(s->to + at, l->piece[slot], n, l->stream);
        if (r == CUDA_SUCCESS)
            r = pmli_cu.cuEventRecord(l->free[slot], l->stream);
        l->took_part = true;
    }
    return r == CUDA_SUCCESS && l->took_part ? pmli_cu.cuEventRecord(l->last, l->stream) : r;
}

static void *serve(void *argument)
{
    lane *l = argument;
    pmli_staging *s = l->staging;
    uint64_t seen = 0;
    CUresult entered = pmli_cu.cuCtxSetCurrent(s->context);
    pthread_mutex_lock(&s->mutex);
    for (;;) {
        while (!s->over && s->upload == seen)
            pthread_cond_wait(&s->changed, &s->mutex);
        if (s->over)
            break;
        seen = s->upload;
        pthread_mutex_unlock(&s->mutex);
        CUresult r = entered == CUDA_SUCCESS ? carry(l) : entered;
        pthread_mutex_lock(&s->mutex);
        if (s->result == CUDA_SUCCESS)
            s->result = r;
        if (--s->busy == 0)
            pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

/* Who waits for a piece sleeps: the cores are for those who fill one, and for cuDNN's compiler. */
static CUresult make_lane(lane *l)
{
    CUresult r = pmli_cu.cuStreamCreate(&l->stream, CU_STREAM_NON_BLOCKING);
    for (int i = 0; r == CUDA_SUCCESS && i < SLOTS; i++) {
        r = pmli_cu.cuMemHostAlloc((void **)&l->piece[i], PIECE, 0);
        if (r == CUDA_SUCCESS)
            r = pmli_cu.cuEventCreate(&l->free[i],
                                      CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC);
    }
    return r == CUDA_SUCCESS ? pmli_cu.cuEventCreate(&l->last, CU_EVENT_DISABLE_TIMING) : r;
}

static void end_lane(lane *l)
{
    if (l->stream != NULL) {
        pmli_cu.cuStreamSynchronize(l->stream); /* pieces may still be on their way */
        pmli_cu.cuStreamDestroy(l->stream);
    }
    for (int i = 0; i < SLOTS; i++) {
        if (l->free[i] != NULL)
            pmli_cu.cuEventDestroy(l->free[i]);
        if (l->piece[i] != NULL)
            pmli_cu.cuMemFreeHost(l->piece[i]);
    }
    if (l->last != NULL)
        pmli_cu.cuEventDestroy(l->last);
}

static int lanes_here(void)
{
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return cores < LANES_MOST ? cores : LANES_MOST;
}

pml_status pmli_staging_new(CUcontext context, pmli_staging **staging, pml_error *err)
{
    pmli_staging *s = calloc(1, sizeof *s);
    *staging = NULL;
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to stage uploads");
    s->context = context;
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    pml_status status = PMLI_CU(pmli_cu.cuEventCreate(&s->before, CU_EVENT_DISABLE_TIMING),
                                "making what uploads wait for", err);
    for (int i = 0, n = lanes_here(); status == PML_OK && i < n; i++) {
        lane *l = &s->lanes[s->made++];
        l->staging = s;
        status = PMLI_CU(make_lane(l), "pinning memory for uploads", err);
        if (status == PML_OK && pthread_create(&l->thread, NULL, serve, l) != 0)
            status = PML_FAIL(err, PML_NO_MEMORY, "cannot start a thread that stages uploads");
        s->running += status == PML_OK;
    }
    if (status != PML_OK)
        pmli_staging_destroy(&s);
    *staging = s;
    return status;
}

void pmli_staging_destroy(pmli_staging **staging)
{
    pmli_staging *s = *staging;
    *staging = NULL;
    if (s == NULL)
        return;
    pthread_mutex_lock(&s->mutex);
    s->over = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    for (int i = 0; i < s->running; i++)
        pthread_join(s->lanes[i].thread, NULL);
    for (int i = 0; i < s->made; i++)
        end_lane(&s->lanes[i]);
    if (s->before != NULL)
        pmli_cu.cuEventDestroy(s->before);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->mutex);
    free(s);
}

pml_status pmli_staging_upload(pmli_staging *s, CUstream stream, void *to, const void *from,
                               size_t bytes, pml_error *err)
{
    pml_status status =
        PMLI_CU(pmli_cu.cuEventRecord(s->before, stream), "marking an upload's begin", err);
    if (status != PML_OK)
        return status;
    pthread_mutex_lock(&s->mutex);
    s->from = from;
    s->to = (CUdeviceptr)(uintptr_t)to;
    s->bytes = bytes;
    atomic_store_explicit(&s->next, 0, memory_order_relaxed);
    s->result = CUDA_SUCCESS;
    s->busy = s->running;
    s->upload++;
    pthread_cond_broadcast(&s->changed);
    while (s->busy > 0)
        pthread_cond_wait(&s->changed, &s->mutex);
    CUresult result = s->result;
    pthread_mutex_unlock(&s->mutex);
    for (int i = 0; result == CUDA_SUCCESS && i < s->running; i++)
        if (s->lanes[i].took_part)
            result = pmli_cu.cuStreamWaitEvent(stream, s->lanes[i].last, 0);
    return PMLI_CU(result, "copying to the GPU", err);
}
