/* How fast a file in the page cache comes onto a GPU, beside what its link can do.
 *
 *   bench_gpu_upload FILE [MiB a piece, 256] [--forget]
 *
 * FILE is mapped and uploaded twice from its begin to its end, as weights are, a piece at a time
 * over the same device memory; the first time its pages are not yet this process's. With --forget
 * each piece's pages are given back behind it, as loading does. The link: the best of five copies
 * of 1 GiB from pinned memory. Prints GB/s. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml_op/backend.h"

enum { GIB = 1 << 30 };

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error must = PML_ERROR_INIT, *err = &must;                                             \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "bench_gpu_upload: %s\n", must.message);                               \
            exit(EXIT_FAILURE);                                                                    \
        }                                                                                          \
    } while (0)

typedef struct bench {
    const pml_backend *backend;
    pml_device *device;
    pml_queue *queue;
    void *place;
    size_t piece, size;
    const char *file;
    bool forgets;
} bench;

static void *function(const char *name)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *found = driver ? dlsym(driver, name) : NULL;
    if (found == NULL) {
        fprintf(stderr, "bench_gpu_upload: the driver has no %s\n", name);
        exit(EXIT_FAILURE);
    }
    return found;
}

static void must_be(int result, const char *what)
{
    if (result != 0) {
        fprintf(stderr, "bench_gpu_upload: %s: CUDA error %d\n", what, result);
        exit(EXIT_FAILURE);
    }
}

/* The backend has made its context this thread's. */
static double link_rate(const bench *b)
{
    int (*alloc)(void **, size_t, unsigned), (*copy)(uint64_t, const void *, size_t);
    int (*release)(void *);
    *(void **)&alloc = function("cuMemHostAlloc");
    *(void **)&copy = function("cuMemcpyHtoD_v2");
    *(void **)&release = function("cuMemFreeHost");
    void *pinned = NULL;
    double best = 0;
    must_be(alloc(&pinned, GIB, 0), "pinning 1 GiB");
    memset(pinned, 1, GIB);
    for (int i = 0; i < 5; i++) {
        double begin = pml_clock_monotonic();
        must_be(copy((uintptr_t)b->place, pinned, GIB), "copying from pinned memory");
        double rate = GIB / (pml_clock_monotonic() - begin);
        best = rate > best ? rate : best;
    }
    must_be(release(pinned), "giving pinned memory back");
    return best;
}

static double upload_rate(bench *b)
{
    double begin = pml_clock_monotonic();
    for (size_t at = 0; at < b->size; at += b->piece) {
        size_t n = b->size - at < b->piece ? b->size - at : b->piece;
        MUST(b->backend->upload(b->queue, b->place, b->file + at, n, err));
        if (b->forgets)
            madvise((void *)(uintptr_t)b->file, b->size, MADV_DONTNEED);
    }
    MUST(b->backend->sync(b->queue, err));
    return (double)b->size / (pml_clock_monotonic() - begin);
}

static void map(bench *b, const char *path)
{
    struct stat about;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &about) != 0 || about.st_size == 0) {
        perror(path);
        exit(EXIT_FAILURE);
    }
    b->size = (size_t)about.st_size;
    b->file = mmap(NULL, b->size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (b->file == MAP_FAILED) {
        perror(path);
        exit(EXIT_FAILURE);
    }
    close(fd);
}

int main(int argc, char **argv)
{
    bench b = {.piece = (size_t)(argc > 2 && argv[2][0] != '-' ? atoi(argv[2]) : 256) << 20,
               .forgets = argc > 2 && strcmp(argv[argc - 1], "--forget") == 0};
    const pml_device_options open = {.index = 0};
    if (argc < 2 || b.piece == 0) {
        fputs("bench_gpu_upload FILE [MiB a piece] [--forget]\n", stderr);
        return EXIT_FAILURE;
    }
    map(&b, argv[1]);
    MUST(pml_backend_cuda(&b.backend, err));
    MUST(b.backend->open(&open, &b.device, err));
    MUST(b.backend->queue_new(b.device, &b.queue, err));
    size_t room = b.piece > GIB ? b.piece : GIB;
    MUST(b.backend->alloc(b.device, room, &b.place, err));
    MUST(b.backend->upload(b.queue, b.place, b.file, b.piece < b.size ? b.piece : b.size, err));
    MUST(b.backend->sync(b.queue, err));
    double first = upload_rate(&b), again = upload_rate(&b), link = link_rate(&b);
    printf(
        "%.1f GiB in pieces of %zu MiB%s: %.1f GB/s, again %.1f; the link %.1f GB/s: %.0f %% and "
        "%.0f %% of it\n",
        (double)b.size / GIB, b.piece >> 20, b.forgets ? ", forgotten behind" : "", first * 1e-9,
        again * 1e-9, link * 1e-9, 100 * first / link, 100 * again / link);
    b.backend->free(b.device, &b.place, room);
    b.backend->queue_destroy(&b.queue);
    b.backend->close(&b.device);
    munmap((void *)(uintptr_t)b.file, b.size);
    return EXIT_SUCCESS;
}
