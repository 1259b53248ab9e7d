/* The CPU backend: device, queue, memory, and the table of ops. */
#include "pml_op/backend.h"

#include <cblas.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "gemm.h"
#include "memory.h"
#include "ops.h"
#include "pml/base/clock.h"
#include "pml_op/cpu.h"
#include "split.h"

enum { THREADS_MAX = 1024 };

static int allowed_cores(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 1; /* more cores than a cpu_set_t counts: the caller names a number */
    return CPU_COUNT(&set);
}

static pml_status cpu_open(const pml_device_options *options, pml_device **out, pml_error *err)
{
    *out = NULL;
    int threads = options->threads == 0 ? allowed_cores() : options->threads;
    if (threads < 1 || threads > THREADS_MAX)
        return PML_FAIL(err, PML_INVALID, "threads is %d, must be 1 to %d, or 0 for all cores",
                        threads, THREADS_MAX);
    pml_device *device = calloc(1, sizeof *device);
    if (device == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a CPU device");
    device->tile = pmli_tile_pick();
    pml_status status = pmli_pool_new(threads, &device->pool, err);
    if (status != PML_OK) {
        free(device);
        return status;
    }
    openblas_set_num_threads(1); /* the threads are ours; each call of BLAS stays on its own */
    *out = device;
    return PML_OK;
}

static void cpu_close(pml_device **device)
{
    if (*device == NULL)
        return;
    pmli_pool_destroy(&(*device)->pool);
    free(*device);
    *device = NULL;
}

static void processor_name(char *name, size_t size)
{
    snprintf(name, size, "CPU");
    FILE *file = fopen("/proc/cpuinfo", "re");
    if (file == NULL)
        return;
    char line[256];
    while (fgets(line, sizeof line, file) != NULL) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || colon == NULL)
            continue;
        line[strcspn(line, "\n")] = '\0';
        snprintf(name, size, "%s", colon + 1 + strspn(colon + 1, " \t"));
        break;
    }
    fclose(file);
}

/* The configuration begins "OpenBLAS 0.3.21 …"; the rest repeats build options. */
static void blas_name(char *name, size_t size)
{
    char library[32] = "", version[32] = "";
    if (sscanf(openblas_get_config(), "%31s %31s", library, version) != 2)
        snprintf(library, sizeof library, "OpenBLAS");
    snprintf(name, size, "%s %s %s", library, version, openblas_get_corename());
}

static pml_status cpu_info(pml_device *device, pml_device_info *info, pml_error *err)
{
    memset(info, 0, sizeof *info);
    processor_name(info->name, sizeof info->name);
    blas_name(info->libraries, sizeof info->libraries);
    bool all = pmli_gemm_on_unit(pmli_pool_threads(device->pool), PML_F32);
    snprintf(info->instructions, sizeof info->instructions, "%s%s", pmli_instructions(),
             all ? pmli_split_name() : "");
    snprintf(info->narrow, sizeof info->narrow, "%s", all ? "" : pmli_split_name());
    info->threads = pmli_pool_threads(device->pool);
    return pml_cpu_memory(&info->memory_total, &info->memory_free, err);
}

/* The kernel promises more than there is and kills whoever comes to fetch it; so a block that does
 * not fit now is refused here. */
static pml_status cpu_alloc(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    *base = NULL;
    size_t total, free;
    pml_status status = pml_cpu_memory(&total, &free, err);
    if (status != PML_OK)
        return status;
    if (bytes > free)
        return PML_FAIL(err, PML_NO_MEMORY, "%zu MiB were asked for, %zu MiB are free", bytes >> 20,
                        free >> 20);
    return pmli_memory_map(device->pool, bytes, base, err);
}

static void cpu_free(pml_device *device, void **base, size_t bytes)
{
    (void)device;
    pmli_memory_unmap(base, bytes);
}

static pml_status cpu_queue_new(pml_device *device, pml_queue **out, pml_error *err)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a queue");
    (*out)->device = device;
    return PML_OK;
}

static void cpu_queue_destroy(pml_queue **queue)
{
    free(*queue);
    *queue = NULL;
}

static pml_status cpu_transfer(pml_queue *queue, void *to, const void *from, size_t bytes,
                               pml_error *err)
{
    (void)queue;
    if (bytes > 0 && (to == NULL || from == NULL))
        return PML_FAIL(err, PML_INVALID, "a transfer of %zu bytes has no %s", bytes,
                        to == NULL ? "destination" : "source");
    if (bytes > 0)
        memmove(to, from, bytes);
    return PML_OK;
}

/* Rows of a file on their way, some of them a piece of work. */
typedef struct reading {
    const pml_file_at *from;
    char *to;
    size_t pitch, width, rows, at_once;
    atomic_flag failed; /* whoever sets it writes `trouble` */
    pml_error trouble;
} reading;

static void read_some(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    reading *r = arg;
    pml_error err = PML_ERROR_INIT;
    pml_status status = PML_OK;
    const size_t begin = (size_t)item * r->at_once, left = r->rows - begin;
    const size_t end = begin + (left < r->at_once ? left : r->at_once);
    const size_t step = r->pitch == r->width ? end - begin : 1; /* rows of one read */
    for (size_t row = begin; status == PML_OK && row < end; row += step) {
        const pml_file_at place = {r->from->fd, r->from->at + row * r->width, r->from->path};
        status = pml_file_at_read(&place, r->to + row * r->pitch, step * r->width, &err);
    }
    if (status != PML_OK && !atomic_flag_test_and_set(&r->failed))
        r->trouble = err;
}

/* Read before it returns, straight into place, by all threads: one copies from the page cache at a
 * fraction of what memory takes. Rows without a gap are one run of bytes. */
static pml_status cpu_upload_file(pml_queue *queue, void *to, size_t pitch, const pml_file_at *from,
                                  size_t width, size_t rows, pml_error *err)
{
    enum { PIECE = 512 << 10 };
    if (width == 0 || rows == 0)
        return PML_OK;
    if (pitch == width || rows == 1) {
        rows *= width;
        pitch = width = 1;
    }
    reading r = {.from = from,
                 .to = to,
                 .pitch = pitch,
                 .width = width,
                 .rows = rows,
                 .at_once = (PIECE + width - 1) / width,
                 .failed = ATOMIC_FLAG_INIT,
                 .trouble = PML_ERROR_INIT};
    pmli_pool_run(pmli_pool_of(queue), (int64_t)((rows + r.at_once - 1) / r.at_once), read_some,
                  &r);
    if (r.trouble.code != PML_OK && err != NULL)
        *err = r.trouble;
    return r.trouble.code;
}

static pml_status cpu_sync(pml_queue *queue, pml_error *err)
{
    (void)queue;
    (void)err;
    return PML_OK;
}

/* Ops run before they return: a mark is the time of day. */
static pml_status cpu_mark(pml_queue *queue, int index, pml_error *err)
{
    if (index < 0 || index >= PML_MARKS)
        return PML_FAIL(err, PML_INVALID, "mark %d: there are %d", index, PML_MARKS);
    queue->marks[index] = pml_clock_monotonic();
    return PML_OK;
}

static pml_status cpu_passed(pml_queue *queue, int index, pml_error *err)
{
    (void)queue;
    return index >= 0 && index < PML_MARKS
               ? PML_OK
               : PML_FAIL(err, PML_INVALID, "mark %d: there are %d", index, PML_MARKS);
}

static pml_status cpu_between(pml_queue *queue, int from, int to, double *seconds, pml_error *err)
{
    if (from < 0 || from >= PML_MARKS || to < 0 || to >= PML_MARKS)
        return PML_FAIL(err, PML_INVALID, "marks %d and %d: there are %d", from, to, PML_MARKS);
    *seconds = queue->marks[to] - queue->marks[from];
    return PML_OK;
}

static pml_status cpu_devices(int *count, pml_error *err)
{
    (void)err;
    *count = 1;
    return PML_OK;
}

static pml_status cpu_dtypes_of(int index, unsigned *dtypes, pml_error *err)
{
    (void)index, (void)err;
    *dtypes = 1U << PML_F32 | 1U << PML_U8;
    return PML_OK;
}

static size_t cpu_workspace(pml_device *device, pml_op op, const pml_op_args *args)
{
    (void)device;
    switch (op) {
    case PML_OP_rmsnorm_bwd:
        return pmli_cpu_rmsnorm_bwd_ws(&args->rmsnorm_bwd);
    case PML_OP_head_norm_bwd:
        return pmli_cpu_head_norm_bwd_ws(&args->head_norm_bwd);
    case PML_OP_linear:
        return pmli_cpu_linear_ws(&args->linear);
    case PML_OP_linear_bwd:
        return pmli_cpu_linear_bwd_ws(&args->linear_bwd);
    case PML_OP_swiglu:
        return pmli_cpu_swiglu_ws(&args->swiglu);
    case PML_OP_swiglu_bwd:
        return pmli_cpu_swiglu_bwd_ws(&args->swiglu_bwd);
    case PML_OP_head_loss:
        return pmli_cpu_head_loss_ws(&args->head_loss);
    default:
        return 0;
    }
}

static void cpu_ahead(pml_queue *queue, const void *data, size_t bytes)
{
    pmli_pool_ahead(pmli_pool_of(queue), data, bytes);
}

#define pmli_cpu_allreduce              NULL /* the collective's */
#define SLOT(name, signature, sentence) .name = pmli_cpu_##name,

static const pml_backend backend = {
    .abi = PML_BACKEND_ABI,
    .name = "cpu",
    .dtypes = 1U << PML_F32,
    .frozen = 1U << PML_BF16,
    .drops_out = true,
    .devices = cpu_devices,
    .dtypes_of = cpu_dtypes_of,
    .open = cpu_open,
    .close = cpu_close,
    .info = cpu_info,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .host_alloc = cpu_alloc,
    .host_free = cpu_free,
    .queue_new = cpu_queue_new,
    .queue_destroy = cpu_queue_destroy,
    .upload = cpu_transfer,
    .download = cpu_transfer,
    .sync = cpu_sync,
    .upload_file = cpu_upload_file,
    .uploaded = cpu_sync,
    .mark = cpu_mark,
    .passed = cpu_passed,
    .between = cpu_between,
    .workspace = cpu_workspace,
    .ahead = cpu_ahead,
    .op = {PML_OPS(SLOT)},
};

const pml_backend *pml_backend_cpu(void)
{
    return &backend;
}
