/* Staged uploads (kernels/cuda/staging.c) on a driver that this file plays: streams are lists of
 * what was asked for, and nothing of it happens before somebody waits for it. So a pinned piece
 * that is filled again too early, a wait that is missing or one too few shows as wrong bytes.
 *
 * Built and run by test_staging.py. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "staging.h"

enum { STREAMS = 32, OPS = 4096, EVENTS = 128 };

typedef enum { COPY, RECORD, WAIT } kind;
typedef struct op {
    kind kind;
    char *to;
    const char *from;
    size_t bytes;
    int event, stream, upto; /* of a wait: the record that it means */
} op;

/* Never moves or shrinks; `done` of the first `n` have happened. */
static struct stream {
    op ops[OPS];
    int n, done;
} streams[STREAMS];
static struct event {
    int stream, at; /* its last record; stream 0: none */
} events[EVENTS];
static int n_streams = 1, n_events = 1, pinned, pinned_most = 1000, copies, copies_most = 1 << 20;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

pmli_driver pmli_cu;

/* Everything on a stream before place `upto`, and what it waits for. With the mutex held. */
static void run_until(int stream, int upto)
{
    struct stream *s = &streams[stream];
    while (s->done < upto) {
        op *o = &s->ops[s->done];
        if (o->kind == WAIT && o->stream != 0)
            run_until(o->stream, o->upto);
        if (o->kind == COPY)
            memcpy(o->to, o->from, o->bytes);
        s->done++;
    }
}

static CUresult put(CUstream stream, op o)
{
    struct stream *s = &streams[(intptr_t)stream];
    if (s->n == OPS)
        abort();
    s->ops[s->n++] = o;
    return CUDA_SUCCESS;
}

static CUresult set_current(CUcontext context)
{
    return context != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

static CUresult stream_create(CUstream *stream, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&mutex);
    *stream = (CUstream)(intptr_t)n_streams++;
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

static CUresult stream_end(CUstream stream)
{
    (void)stream;
    return CUDA_SUCCESS;
}

static CUresult stream_synchronize(CUstream stream)
{
    pthread_mutex_lock(&mutex);
    run_until((int)(intptr_t)stream, streams[(intptr_t)stream].n);
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

static CUresult event_create(CUevent *event, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&mutex);
    *event = (CUevent)(intptr_t)n_events++;
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

static CUresult event_end(CUevent event)
{
    (void)event;
    return CUDA_SUCCESS;
}

static CUresult event_record(CUevent event, CUstream stream)
{
    pthread_mutex_lock(&mutex);
    put(stream, (op){.kind = RECORD, .event = (int)(intptr_t)event});
    events[(intptr_t)event] = (struct event){(int)(intptr_t)stream, streams[(intptr_t)stream].n};
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

static CUresult event_synchronize(CUevent event)
{
    pthread_mutex_lock(&mutex);
    struct event e = events[(intptr_t)event];
    if (e.stream != 0)
        run_until(e.stream, e.at);
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

static CUresult stream_wait(CUstream stream, CUevent event, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&mutex);
    struct event e = events[(intptr_t)event];
    put(stream, (op){.kind = WAIT, .stream = e.stream, .upto = e.at});
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

static CUresult copy_in(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    pthread_mutex_lock(&mutex);
    bool good = copies++ < copies_most;
    if (good)
        put(stream, (op){.kind = COPY, .to = (char *)(uintptr_t)to, .from = from, .bytes = bytes});
    pthread_mutex_unlock(&mutex);
    return good ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

static CUresult host_alloc(void **memory, size_t bytes, unsigned flags)
{
    (void)flags;
    if (pinned == pinned_most)
        return CUDA_ERROR_OUT_OF_MEMORY;
    pinned++;
    *memory = malloc(bytes);
    return CUDA_SUCCESS;
}

static CUresult host_free(void *memory)
{
    pinned--;
    free(memory);
    return CUDA_SUCCESS;
}

pml_status pmli_cu_status(CUresult result, const char *what, const char *file, int line,
                          pml_error *err)
{
    if (result == CUDA_SUCCESS)
        return PML_OK;
    return pml_error_set(err, result == CUDA_ERROR_OUT_OF_MEMORY ? PML_NO_MEMORY : PML_INTERNAL,
                         file, line, "%s: %d", what, (int)result);
}

/* ---- the checks ---- */

static int failed;

static void check(bool good, const char *what)
{
    printf("%s  %s\n", good ? "ok  " : "FAIL", what);
    failed += !good;
}

static void draw(char *to, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        to[i] = (char)((seed = seed * 1664525U + 1013904223U) >> 24);
}

/* Each upload over the last one, from one buffer that changes as soon as a call returns; the stream
 * copies what came before the next arrives. */
static void uploads_in_order(pmli_staging *staging, CUstream stream)
{
    static const size_t sizes[] = {PMLI_STAGED_LEAST + 3, 70000001, 1, 4 << 20, 33 << 20};
    enum { N = sizeof sizes / sizeof *sizes, MOST = 70000001 };
    char *from = malloc(MOST), *device = malloc(MOST), *kept[N], *want = malloc(MOST);
    pml_error err = PML_ERROR_INIT;
    bool good = true;
    for (int i = 0; i < N; i++) {
        kept[i] = malloc(sizes[i]);
        draw(from, sizes[i], (unsigned)i);
        good = good && pmli_staging_upload(staging, stream, device, from, sizes[i], &err) == PML_OK;
        memset(from, 0x55, sizes[i]);
        copy_in((CUdeviceptr)(uintptr_t)kept[i], device, sizes[i], stream);
    }
    stream_synchronize(stream);
    for (int i = 0; i < N; i++) {
        draw(want, sizes[i], (unsigned)i);
        good = good && memcmp(want, kept[i], sizes[i]) == 0;
        free(kept[i]);
    }
    check(good, "uploads one over the other, each as it was when it was called");
    free(from);
    free(want);
    free(device);
}

static void a_copy_fails(pmli_staging *staging, CUstream stream)
{
    pml_error err = PML_ERROR_INIT;
    char *from = calloc(1, 64 << 20), *device = malloc(64 << 20);
    copies_most = copies + 5;
    pml_status status = pmli_staging_upload(staging, stream, device, from, 64 << 20, &err);
    check(status == PML_INTERNAL && strstr(err.message, "copying") != NULL,
          "a failed copy is told");
    copies_most = 1 << 20;
    status = pmli_staging_upload(staging, stream, device, from, 64 << 20, &err);
    check(status == PML_OK, "and the next upload is a new one");
    stream_synchronize(stream);
    pmli_staging_destroy(&staging);
    free(from);
    free(device);
}

int main(void)
{
    pmli_staging *staging = NULL;
    pml_error err = PML_ERROR_INIT;
    CUstream stream;
    pmli_cu = (pmli_driver){.cuCtxSetCurrent = set_current,
                            .cuStreamCreate = stream_create,
                            .cuStreamDestroy = stream_end,
                            .cuStreamSynchronize = stream_synchronize,
                            .cuStreamWaitEvent = stream_wait,
                            .cuEventCreate = event_create,
                            .cuEventDestroy = event_end,
                            .cuEventRecord = event_record,
                            .cuEventSynchronize = event_synchronize,
                            .cuMemcpyHtoDAsync = copy_in,
                            .cuMemHostAlloc = host_alloc,
                            .cuMemFreeHost = host_free};
    stream_create(&stream, 0);
    pinned_most = 1;
    check(pmli_staging_new((CUcontext)1, &staging, &err) == PML_NO_MEMORY && staging == NULL &&
              pinned == 0,
          "no pinned memory: refused, and nothing is left");
    pinned_most = 1000;
    check(pmli_staging_new((CUcontext)1, &staging, &err) == PML_OK, "lanes and pieces are made");
    uploads_in_order(staging, stream);
    a_copy_fails(staging, stream);
    check(pinned == 0, "all pinned memory is given back");
    return failed > 0;
}
