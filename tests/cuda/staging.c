/* Staged uploads (kernels/cuda/staging.c) on a driver that this file plays: streams are lists of
 * what was asked for, and nothing of it happens before somebody waits for it. So a pinned piece
 * that is filled again too early, a wait that is missing or one too few shows as wrong bytes.
 *
 * Built and run by test_staging.py. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pml/base/log.h"
#include "staging.h"

enum { STREAMS = 32, OPS = 8192, EVENTS = 160 };

typedef enum { COPY, RECORD, WAIT } kind;
typedef struct op {
    kind kind;
    char *to;
    const char *from;
    size_t bytes, width, pitch; /* width 0: no rows */
    int event, stream, upto;    /* of a wait: the record that it means */
} op;

/* Never moves or shrinks; `done` of the first `n` have happened. */
static struct stream {
    op ops[OPS];
    int n, done;
} streams[STREAMS];
static struct event {
    int stream, at; /* its last record; stream 0: none */
} events[EVENTS];
static int n_streams = 1, n_events = 1, pinned, pinned_top, pinned_most = 1000, copies,
           copies_most = 1 << 20;
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
        if (o->kind == COPY && o->width == 0)
            memcpy(o->to, o->from, o->bytes);
        for (size_t at = 0; o->kind == COPY && o->width > 0 && at < o->bytes; at += o->width)
            memcpy(o->to + at / o->width * o->pitch, o->from + at, o->width);
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

static CUresult copy_rows(const CUDA_MEMCPY2D *c, CUstream stream)
{
    pthread_mutex_lock(&mutex);
    bool good = c->srcPitch == c->WidthInBytes && copies++ < copies_most;
    if (good)
        put(stream, (op){.kind = COPY,
                         .to = (char *)(uintptr_t)c->dstDevice,
                         .from = c->srcHost,
                         .bytes = c->Height * c->WidthInBytes,
                         .width = c->WidthInBytes,
                         .pitch = c->dstPitch});
    pthread_mutex_unlock(&mutex);
    return good ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

static int asked; /* for pinned memory */

static CUresult host_register(void *memory, size_t bytes, unsigned flags)
{
    pthread_mutex_lock(&mutex);
    asked++;
    bool good = pinned < pinned_most && memory != NULL && bytes == 4 << 20 && flags == 0;
    pinned += good;
    pinned_top = pinned > pinned_top ? pinned : pinned_top;
    pthread_mutex_unlock(&mutex);
    return good ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult host_unregister(void *memory)
{
    pinned -= memory != NULL;
    return CUDA_SUCCESS;
}

static int warnings;

void pml_log(pml_log_level level, const char *format, ...)
{
    (void)format;
    warnings += level == PML_LOG_WARNING;
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

static void draw(char *to, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i += sizeof seed) {
        seed = seed * 6364136223846793005U + 1442695040888963407U;
        memcpy(to + i, &seed, n - i < sizeof seed ? n - i : sizeof seed);
    }
}

/* Each upload over the last one, from one buffer that changes as soon as a call returns; the stream
 * copies what came before the next arrives. */
static void uploads_in_order(pmli_staging *staging, CUstream stream)
{
    static const size_t sizes[] = {PMLI_STAGED_LEAST + 3, 24000001, 1, 4 << 20, 17 << 20};
    enum { N = sizeof sizes / sizeof *sizes, MOST = 24000001 };
    char *from = malloc(MOST), *device = malloc(MOST), *kept[N], *want = malloc(MOST);
    pml_error err = PML_ERROR_INIT;
    bool good = true;
    for (int i = 0; i < N; i++) {
        kept[i] = malloc(sizes[i]);
        draw(from, sizes[i], (uint64_t)i);
        good = good && pmli_staging_upload(staging, stream, device, from, sizes[i], &err) == PML_OK;
        memset(from, 0x55, sizes[i]);
        copy_in((CUdeviceptr)(uintptr_t)kept[i], device, sizes[i], stream);
    }
    stream_synchronize(stream);
    for (int i = 0; i < N; i++) {
        draw(want, sizes[i], (uint64_t)i);
        good = good && memcmp(want, kept[i], sizes[i]) == 0;
        free(kept[i]);
    }
    check(good, "uploads one over the other, each as it was when it was called");
    free(from);
    free(want);
    free(device);
}

/* A file of random bytes, longer than what follows reads from it. */
enum { FILE_BYTES = 20 << 20 };
static char *content;

static pml_file_at make_file(void)
{
    content = malloc(FILE_BYTES);
    draw(content, FILE_BYTES, 99);
    int fd = memfd_create("weights", MFD_CLOEXEC);
    if (fd < 0 || write(fd, content, FILE_BYTES) != FILE_BYTES)
        abort();
    return (pml_file_at){fd, 0, "weights"};
}

/* Many at once, small and large, nobody waiting; rows that end up apart, rows longer than a piece;
 * then what stands behind them reads all of it, and before them what was there. */
static void files_side_by_side(pmli_staging *staging, CUstream stream, pml_file_at file)
{
    enum { SMALL = 100, BYTES = 5001, ROWS = 1000, WIDTH = 5003, PITCH = 5100, WIDE = 5 << 20 };
    pml_error err = PML_ERROR_INIT;
    size_t size = (size_t)SMALL * BYTES + (size_t)ROWS * PITCH + 3 * (WIDE + 64);
    char *device = calloc(2, size), *want = device + size, *old = malloc(size),
         *kept = calloc(1, size);
    copy_in((CUdeviceptr)(uintptr_t)old, device, size, stream);
    bool good = true;
    size_t to = 0;
    for (size_t i = 0; i < SMALL; i++, to += BYTES) {
        file.at = i * 7919;
        memcpy(want + to, content + file.at, BYTES);
        good = good && pmli_staging_upload_file(staging, stream, device + to, BYTES, &file, BYTES,
                                                1, &err) == PML_OK;
    }
    const size_t widths[] = {WIDTH, WIDE}, pitches[] = {PITCH, WIDE + 64}, rows[] = {ROWS, 3};
    for (size_t i = 0; i < 2; to += pitches[i] * rows[i], i++) {
        file.at = 17 + i;
        for (size_t row = 0; row < rows[i]; row++)
            memcpy(want + to + row * pitches[i], content + file.at + row * widths[i], widths[i]);
        good = good && pmli_staging_upload_file(staging, stream, device + to, pitches[i], &file,
                                                widths[i], rows[i], &err) == PML_OK;
    }
    good = good && pmli_staging_finish(staging, stream, &err) == PML_OK;
    copy_in((CUdeviceptr)(uintptr_t)kept, device, size, stream);
    stream_synchronize(stream);
    check(good && memcmp(kept, want, size) == 0, "files side by side, in rows, too");
    memset(device, 0, size);
    check(memcmp(old, device, size) == 0, "behind what stood on the stream");
    check(pmli_staging_upload_file(staging, stream, device, 1, &file, SIZE_MAX / 2, 3, &err) ==
              PML_INVALID,
          "a size beyond all sizes is refused");
    free(device);
    free(old);
    free(kept);
}

/* A file that ends too early: told by the next wait, once, whatever came behind it. */
static void a_file_is_cut(pmli_staging *staging, CUstream stream, pml_file_at file)
{
    pml_error err = PML_ERROR_INIT;
    char *device = malloc(FILE_BYTES);
    if (ftruncate(file.fd, FILE_BYTES - 1000) != 0)
        abort();
    pmli_staging_upload_file(staging, stream, device, 1, &file, FILE_BYTES, 1, &err);
    for (int i = 0; i < 5; i++)
        pmli_staging_upload_file(staging, stream, device, 1, &file, 100, 1, &err);
    pml_status status = pmli_staging_finish(staging, stream, &err);
    check(status == PML_CORRUPT && err.code == PML_CORRUPT &&
              strstr(err.message, "weights has no byte 20970520") != NULL,
          "a file that is cut short is told, with the place");
    check(pmli_staging_finish(staging, stream, &err) == PML_OK, "once");
    file.at = 3;
    status = pmli_staging_upload_file(staging, stream, device, 1, &file, 1 << 20, 1, &err);
    if (status == PML_OK)
        status = pmli_staging_finish(staging, stream, &err);
    stream_synchronize(stream);
    check(status == PML_OK && memcmp(device, content + 3, 1 << 20) == 0,
          "and the next upload is a new one");
    free(device);
}

/* Where 32 bits do not reach, and from a file that has nothing but a hole before. */
static void far_in_a_file(pmli_staging *staging, CUstream stream)
{
    enum { BYTES = 5 << 20 };
    pml_error err = PML_ERROR_INIT;
    pml_file_at file = {memfd_create("far", MFD_CLOEXEC), ((uint64_t)5 << 30) + 7, "far"};
    char *device = malloc(BYTES);
    if (file.fd < 0 || pwrite(file.fd, content, BYTES, (off_t)file.at) != BYTES)
        abort();
    pml_status status =
        pmli_staging_upload_file(staging, stream, device, BYTES, &file, BYTES, 1, &err);
    if (status == PML_OK)
        status = pmli_staging_finish(staging, stream, &err);
    stream_synchronize(stream);
    check(status == PML_OK && memcmp(device, content, BYTES) == 0, "5 GiB from a file's begin");
    close(file.fd);
    free(device);
}

/* Two that cannot be read, among many: one of the errors, once, and all lanes go on. */
static void two_files_fail(pmli_staging *staging, CUstream stream, pml_file_at file)
{
    enum { BYTES = 1 << 20 };
    const pml_file_at closed = {-1, 0, "closed"}, ended = {file.fd, FILE_BYTES, "ended"};
    pml_error err = PML_ERROR_INIT;
    char *device = malloc(3 * BYTES);
    for (int i = 0; i < 12; i++) {
        const pml_file_at *from = i == 4 ? &closed : i == 5 ? &ended : &file;
        pmli_staging_upload_file(staging, stream, device, BYTES, from, BYTES, 1, &err);
    }
    pml_status status = pmli_staging_finish(staging, stream, &err);
    const char *told = status == PML_IO ? "closed at byte 0" : "ended has no byte";
    check((status == PML_IO || status == PML_CORRUPT) && strstr(err.message, told) != NULL,
          "of two files that cannot be read one is told");
    bool good = pmli_staging_finish(staging, stream, &err) == PML_OK;
    for (int i = 0; i < 3; i++)
        good = pmli_staging_upload_file(staging, stream, device + (size_t)i * BYTES, BYTES, &file,
                                        BYTES, 1, &err) == PML_OK &&
               good;
    good = pmli_staging_finish(staging, stream, &err) == PML_OK && good;
    stream_synchronize(stream);
    for (int i = 0; i < 3; i++)
        good = good && memcmp(device + (size_t)i * BYTES, content + file.at, BYTES) == 0;
    check(good, "and what comes after them is whole");
    free(device);
}

static void a_copy_fails(pmli_staging *staging, CUstream stream)
{
    pml_error err = PML_ERROR_INIT;
    char *from = calloc(1, 24 << 20), *device = malloc(24 << 20);
    copies_most = copies + 3;
    pml_status status = pmli_staging_upload(staging, stream, device, from, 24 << 20, &err);
    check(status == PML_INTERNAL && strstr(err.message, "copying") != NULL,
          "a failed copy is told");
    copies_most = 1 << 20;
    status = pmli_staging_upload(staging, stream, device, from, 24 << 20, &err);
    check(status == PML_OK, "and the next upload is a new one");
    stream_synchronize(stream);
    free(from);
    free(device);
}

/* Each lane's two pieces, before there is an upload. */
static void pieces_are_taken(void)
{
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1, now = 0;
    const int wanted = 2 * (cores < 12 ? cores : 12);
    for (int i = 0; i < 60000 && now < wanted; i++) {
        pthread_mutex_lock(&mutex);
        now = asked;
        pthread_mutex_unlock(&mutex);
        usleep(1000);
    }
    check(now == wanted, "pieces are asked for before there is an upload");
}

/* All of it with so much pinned memory. */
static void with_pinned(int most, CUstream stream)
{
    pmli_staging *staging = NULL;
    pml_error err = PML_ERROR_INIT;
    pml_file_at file = make_file();
    pinned_most = most;
    pinned_top = 0;
    asked = 0;
    if (pmli_staging_new((CUcontext)1, &staging, &err) != PML_OK)
        abort();
    pieces_are_taken();
    uploads_in_order(staging, stream);
    files_side_by_side(staging, stream, file);
    a_file_is_cut(staging, stream, file);
    far_in_a_file(staging, stream);
    two_files_fail(staging, stream, file);
    a_copy_fails(staging, stream);
    for (int i = 0; i < 20; i++)
        pmli_staging_upload_file(staging, stream, content, 1, &file, 1 << 20, 1, &err);
    pmli_staging_destroy(&staging); /* whatever is under way */
    check(pinned == 0 && pinned_top <= 24, "all pinned memory is given back, at most 96 MiB");
    close(file.fd);
    free(content);
}

int main(void)
{
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
                            .cuMemcpy2DAsync = copy_rows,
                            .cuMemHostRegister = host_register,
                            .cuMemHostUnregister = host_unregister};
    stream_create(&stream, 0);
    with_pinned(1000, stream);
    check(warnings == 0, "without a warning");
    with_pinned(1, stream);
    check(warnings == 1, "ordinary memory serves where the driver gives no other, which is told");
    return failed > 0;
}
