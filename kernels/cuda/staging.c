#include "staging.h"

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "pml/base/log.h"

/* Of an H200's PCIe 5 link twelve lanes have 50 to 52 GB/s of 55 whether a core reads 5 GB/s from
 * the page cache or 7, which differs from hour to hour; eight have 38 to 51, four 28. With pieces
 * of 2 MiB it is 47, with 64 MiB 25. */
enum { LANES_MOST = 12, SLOTS = 2, PIECE = 4 << 20, HUGE_PAGE = 2 << 20 };

/* Uploads that may wait to be read: more than lanes can have in hand, so that small ones follow
 * each other without a pause. */
enum { JOBS = 32 };

/* One upload. The place of its piece that begins at byte b of the source: to + b where it has no
 * rows (width 0), else to + b / width * pitch, and each piece is whole rows. */
typedef struct job {
    const char *memory; /* NULL: the file */
    pml_file_at file;
    CUdeviceptr to;
    size_t bytes, unit; /* in all, and of a piece */
    size_t width, pitch;
    size_t next, left; /* not taken from here on; bytes that are not on their way */
    CUevent before;    /* on the caller's stream */
} job;

typedef struct lane {
    pmli_staging *staging;
    pthread_t thread;
    CUstream stream;
    CUevent free[SLOTS]; /* the piece has left */
    char *piece[SLOTS];
    bool pinned[SLOTS];
    CUevent last;
    uint64_t behind; /* it has waited for what stood before this job, counted from 1 */
    bool took_part;  /* since the last finish */
} lane;

struct pmli_staging {
    CUcontext context;
    lane lanes[LANES_MOST];
    int made, running; /* lanes with their things, and those of them with a thread */

    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    job jobs[JOBS];         /* number n, from 0, in place n % JOBS */
    uint64_t added, taking; /* how many there were; the first of them with pieces to take */
    bool over, warned;
    pml_status status; /* the first that was not good */
    pml_error error;
};

/* A part of a job that one lane carries. */
typedef struct piece {
    job *job;
    uint64_t number; /* the job's, from 1 */
    size_t at, bytes;
} piece;

/* The next piece, with the mutex held; false: there is none. Who carries a job's last piece comes
 * here before it lets the mutex go: so `taking` is past a job whose place add() may take. */
static bool take(pmli_staging *s, piece *p)
{
    for (; s->taking < s->added; s->taking++) {
        job *j = &s->jobs[s->taking % JOBS];
        size_t rest = j->bytes - j->next;
        if (rest == 0)
            continue;
        *p = (piece){j, s->taking + 1, j->next, rest < j->unit ? rest : j->unit};
        j->next += p->bytes;
        return true;
    }
    return false;
}

/* Memory in huge pages that is locked afterwards costs a fifth of the driver's own page-locked
 * memory to take, and its first copies a quarter. */
static pml_status need_piece(lane *l, int slot, pml_error *err)
{
    if (l->piece[slot] != NULL)
        return PML_OK;
    char *piece = l->piece[slot] = aligned_alloc(HUGE_PAGE, PIECE);
    if (piece == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no host memory to stage uploads");
    madvise(piece, PIECE, MADV_HUGEPAGE); /* where there are none, small ones serve */
    l->pinned[slot] = pmli_cu.cuMemHostRegister(piece, PIECE, 0) == CUDA_SUCCESS;
    if (l->pinned[slot])
        return PML_OK;
    pthread_mutex_lock(&l->staging->mutex);
    bool told = l->staging->warned;
    l->staging->warned = true;
    pthread_mutex_unlock(&l->staging->mutex);
    if (!told)
        pml_log(PML_LOG_WARNING,
                "the driver gives no page-locked memory: uploads take several times as long");
    return PML_OK;
}

static CUresult copy(const lane *l, int slot, const piece *p)
{
    const job *j = p->job;
    if (j->width == 0)
        return pmli_cu.cuMemcpyHtoDAsync(j->to + p->at, l->piece[slot], p->bytes, l->stream);
    const CUDA_MEMCPY2D rows = {.srcMemoryType = CU_MEMORYTYPE_HOST,
                                .srcHost = l->piece[slot],
                                .srcPitch = j->width,
                                .dstMemoryType = CU_MEMORYTYPE_DEVICE,
                                .dstDevice = j->to + p->at / j->width * j->pitch,
                                .dstPitch = j->pitch,
                                .WidthInBytes = j->width,
                                .Height = p->bytes / j->width};
    return pmli_cu.cuMemcpy2DAsync(&rows, l->stream);
}

static pml_status carry(lane *l, int slot, const piece *p, pml_error *err)
{
    const job *j = p->job;
    pml_status status = need_piece(l, slot, err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuEventSynchronize(l->free[slot]), "waiting for an upload", err);
    if (status == PML_OK && j->memory != NULL) {
        memcpy(l->piece[slot], j->memory + p->at, p->bytes);
    } else if (status == PML_OK) {
        const pml_file_at from = {j->file.fd, j->file.at + p->at, j->file.path};
        status = pml_file_at_read(&from, l->piece[slot], p->bytes, err);
    }
    if (status == PML_OK && l->behind != p->number) {
        status = PMLI_CU(pmli_cu.cuStreamWaitEvent(l->stream, j->before, 0),
                         "putting an upload in order", err);
        l->behind = p->number;
    }
    if (status == PML_OK)
        status = PMLI_CU(copy(l, slot, p), "copying to the GPU", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuEventRecord(l->free[slot], l->stream), "marking a copy", err);
    return status;
}

static void *serve(void *argument)
{
    lane *l = argument;
    pmli_staging *s = l->staging;
    const CUresult entered = pmli_cu.cuCtxSetCurrent(s->context);
    int slot = 0;
    piece p;
    /* While the caller plans and takes its arena. One that is refused is asked for again when it is
     * needed, and then there is somebody to tell. */
    for (int i = 0; entered == CUDA_SUCCESS && i < SLOTS; i++)
        need_piece(l, i, NULL);
    pthread_mutex_lock(&s->mutex);
    while (!s->over) {
        if (!take(s, &p)) {
            pthread_cond_wait(&s->work, &s->mutex);
            continue;
        }
        if (s->status == PML_OK) {
            pml_error error = PML_ERROR_INIT;
            pthread_mutex_unlock(&s->mutex);
            pml_status status = PMLI_CU(entered, "entering the GPU's context", &error);
            if (status == PML_OK)
                status = carry(l, slot, &p, &error);
            slot = (slot + 1) % SLOTS;
            pthread_mutex_lock(&s->mutex);
            l->took_part = true;
            if (status != PML_OK && s->status == PML_OK) {
                s->status = status;
                s->error = error;
            }
        }
        p.job->left -= p.bytes;
        if (p.job->left == 0)
            pthread_cond_broadcast(&s->done);
    }
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

/* Who waits for a piece sleeps: the cores are for those who fill one, and for cuDNN's compiler. */
static CUresult make_lane(lane *l)
{
    CUresult r = pmli_cu.cuStreamCreate(&l->stream, CU_STREAM_NON_BLOCKING);
    for (int i = 0; r == CUDA_SUCCESS && i < SLOTS; i++)
        r = pmli_cu.cuEventCreate(&l->free[i], CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC);
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
        if (l->pinned[i])
            pmli_cu.cuMemHostUnregister(l->piece[i]);
        free(l->piece[i]);
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
    pthread_cond_init(&s->work, NULL);
    pthread_cond_init(&s->done, NULL);
    pml_status status = PML_OK;
    for (int i = 0; status == PML_OK && i < JOBS; i++)
        status = PMLI_CU(pmli_cu.cuEventCreate(&s->jobs[i].before, CU_EVENT_DISABLE_TIMING),
                         "making what uploads wait for", err);
    for (int i = 0, n = lanes_here(); status == PML_OK && i < n; i++) {
        lane *l = &s->lanes[s->made++];
        l->staging = s;
        status = PMLI_CU(make_lane(l), "making what stages uploads", err);
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
    pthread_cond_broadcast(&s->work);
    pthread_mutex_unlock(&s->mutex);
    for (int i = 0; i < s->running; i++)
        pthread_join(s->lanes[i].thread, NULL);
    for (int i = 0; i < s->made; i++)
        end_lane(&s->lanes[i]);
    for (int i = 0; i < JOBS; i++)
        if (s->jobs[i].before != NULL)
            pmli_cu.cuEventDestroy(s->jobs[i].before);
    pthread_cond_destroy(&s->work);
    pthread_cond_destroy(&s->done);
    pthread_mutex_destroy(&s->mutex);
    free(s);
}

/* Into the list, behind what stands on the stream; waits for a place there. */
static pml_status add(pmli_staging *s, CUstream stream, job new, pml_error *err)
{
    if (new.bytes == 0)
        return PML_OK;
    pthread_mutex_lock(&s->mutex);
    job *j = &s->jobs[s->added % JOBS];
    while (j->left > 0)
        pthread_cond_wait(&s->done, &s->mutex);
    new.before = j->before;
    new.left = new.bytes;
    pml_status status =
        PMLI_CU(pmli_cu.cuEventRecord(new.before, stream), "marking an upload's begin", err);
    if (status == PML_OK) {
        *j = new;
        s->added++;
        pthread_cond_broadcast(&s->work);
    }
    pthread_mutex_unlock(&s->mutex);
    return status;
}

pml_status pmli_staging_upload(pmli_staging *s, CUstream stream, void *to, const void *from,
                               size_t bytes, pml_error *err)
{
    const job whole = {
        .memory = from, .to = (CUdeviceptr)(uintptr_t)to, .bytes = bytes, .unit = PIECE};
    pml_status status = add(s, stream, whole, err);
    return status == PML_OK ? pmli_staging_finish(s, stream, err) : status;
}

pml_status pmli_staging_upload_file(pmli_staging *s, CUstream stream, void *to, size_t pitch,
                                    const pml_file_at *from, size_t width, size_t rows,
                                    pml_error *err)
{
    job j = {.file = *from, .to = (CUdeviceptr)(uintptr_t)to, .unit = PIECE};
    if (__builtin_mul_overflow(width, rows, &j.bytes))
        return PML_FAIL(err, PML_INVALID, "%zu rows of %zu bytes are no upload", rows, width);
    if (pitch == width || rows == 1 || width == 0)
        return add(s, stream, j, err);
    if (width <= PIECE) {
        j.width = width;
        j.pitch = pitch;
        j.unit = PIECE / width * width;
        return add(s, stream, j, err);
    }
    pml_status status = PML_OK; /* rows longer than a piece go one by one */
    j.bytes = width;
    for (size_t row = 0; status == PML_OK && row < rows; row++) {
        status = add(s, stream, j, err);
        j.file.at += width;
        j.to += pitch;
    }
    return status;
}

pml_status pmli_staging_finish(pmli_staging *s, CUstream stream, pml_error *err)
{
    bool took_part[LANES_MOST];
    pthread_mutex_lock(&s->mutex);
    for (int i = 0; i < JOBS; i++)
        while (s->jobs[i].left > 0)
            pthread_cond_wait(&s->done, &s->mutex);
    pml_status status = s->status;
    if (status != PML_OK && err != NULL)
        *err = s->error;
    s->status = PML_OK;
    for (int i = 0; i < s->running; i++) {
        took_part[i] = s->lanes[i].took_part;
        s->lanes[i].took_part = false;
    }
    pthread_mutex_unlock(&s->mutex);
    for (int i = 0; i < s->running; i++) {
        CUresult r = CUDA_SUCCESS;
        if (took_part[i])
            r = pmli_cu.cuEventRecord(s->lanes[i].last, s->lanes[i].stream);
        if (took_part[i] && r == CUDA_SUCCESS)
            r = pmli_cu.cuStreamWaitEvent(stream, s->lanes[i].last, 0);
        pml_status ordered = PMLI_CU(r, "putting uploads in order", status == PML_OK ? err : NULL);
        status = status == PML_OK ? ordered : status;
    }
    return status;
}
