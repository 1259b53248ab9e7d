/* How fast a file in the page cache comes onto a GPU, beside what its link can do.
 *
 *   bench_gpu_upload FILE [--piece MiB, 256] [--rows BYTES] [--mapped]
 *
 * FILE is uploaded three times from its begin to its end, as weights are, a piece at a time over
 * the same device memory, none waited for before the last. In the first time are the threads and
 * the page-locked memory that a process takes for it. --rows: pieces are rows of so many bytes, 128
 * bytes further apart on the device than in the file, as weights with a border are. --mapped: from
 * a mapping of the file, as from any memory, in place of the file itself. The link: the best of
 * five copies of 1 GiB from page-locked memory. Prints GB/s, and by how much the process's memory
 * grew.
 *
 * Then what was the machine's in it: how many pages the kernel put into its active list in each
 * pass (whoever reads a page for the second time has it put there, under one lock for all threads;
 * in a tmpfs writing it is the first), and how fast one thread fills memory that nobody had. */
#include <dlfcn.h>
#include <fcntl.h>
#include <getopt.h>
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
    size_t piece, size, row;
    const char *mapped; /* NULL: not */
    pml_file_at file;
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

enum { BORDER = 128 };

static void upload(bench *b, size_t at, size_t n)
{
    const pml_file_at from = {b->file.fd, at, b->file.path};
    if (b->mapped != NULL)
        MUST(b->backend->upload(b->queue, b->place, b->mapped + at, n, err));
    else if (b->row > 0)
        MUST(b->backend->upload_file(b->queue, b->place, b->row + BORDER, &from, b->row, n / b->row,
                                     err));
    else
        MUST(b->backend->upload_file(b->queue, b->place, n, &from, n, 1, err));
}

static double upload_rate(bench *b)
{
    double begin = pml_clock_monotonic();
    for (size_t at = 0; at < b->size; at += b->piece)
        upload(b, at, b->size - at < b->piece ? b->size - at : b->piece);
    MUST(b->backend->sync(b->queue, err));
    return (double)b->size / (pml_clock_monotonic() - begin);
}

static void open_file(bench *b, bool map)
{
    struct stat about;
    b->file.fd = open(b->file.path, O_RDONLY | O_CLOEXEC);
    if (b->file.fd < 0 || fstat(b->file.fd, &about) != 0 || about.st_size == 0) {
        perror(b->file.path);
        exit(EXIT_FAILURE);
    }
    b->size = (size_t)about.st_size;
    void *mapped = map ? mmap(NULL, b->size, PROT_READ, MAP_PRIVATE, b->file.fd, 0) : NULL;
    if (mapped == MAP_FAILED) {
        perror(b->file.path);
        exit(EXIT_FAILURE);
    }
    b->mapped = mapped;
}

/* MiB of this process that are in memory. */
static double resident(void)
{
    long all = 0, here = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f == NULL || fscanf(f, "%ld %ld", &all, &here) != 2)
        here = -1;
    if (f != NULL)
        fclose(f);
    return (double)here * (double)sysconf(_SC_PAGESIZE) / (1 << 20);
}

/* Thousands of pages that the kernel has made active since it began, -1 where it does not say. */
static double activated(void)
{
    unsigned long long pages = 0;
    char line[128];
    bool found = false;
    FILE *f = fopen("/proc/vmstat", "re");
    while (f != NULL && !found && fgets(line, sizeof line, f) != NULL)
        found = sscanf(line, "pgactivate %llu", &pages) == 1;
    if (f != NULL)
        fclose(f);
    return found ? 1e-3 * (double)pages : -1;
}

/* Bytes a second of fresh memory, in the pages that the kernel gives by itself. */
static double fresh_rate(void)
{
    enum { BYTES = 256 << 20 };
    double begin = pml_clock_monotonic();
    char *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        perror("bench_gpu_upload: 256 MiB");
        exit(EXIT_FAILURE);
    }
    memset(memory, 1, BYTES);
    double seconds = pml_clock_monotonic() - begin;
    munmap(memory, BYTES);
    return BYTES / seconds;
}

static bool read_options(int argc, char **argv, bench *b, bool *map)
{
    static const struct option known[] = {{"piece", required_argument, NULL, 'p'},
                                          {"rows", required_argument, NULL, 'r'},
                                          {"mapped", no_argument, NULL, 'm'},
                                          {NULL, 0, NULL, 0}};
    for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        if (c == 'p')
            b->piece = atoi(optarg) > 0 ? (size_t)atoi(optarg) << 20 : 0;
        else if (c == 'r')
            b->row = atoi(optarg) > 0 ? (size_t)atoi(optarg) : SIZE_MAX;
        else if (c == 'm')
            *map = true;
        else
            return false;
    }
    b->file.path = argv[optind];
    return optind == argc - 1 && b->piece > 0 && b->row <= b->piece; /* a piece has a row */
}

int main(int argc, char **argv)
{
    bool map = false;
    bench b = {.piece = (size_t)256 << 20};
    const pml_device_options open = {.index = 0};
    if (!read_options(argc, argv, &b, &map)) {
        fputs("bench_gpu_upload FILE [--piece MiB] [--rows BYTES] [--mapped]\n", stderr);
        return EXIT_FAILURE;
    }
    open_file(&b, map);
    if (b.row > 0) { /* whole rows */
        b.piece = b.piece / b.row * b.row;
        b.size = b.size / b.row * b.row;
    }
    MUST(pml_backend_cuda(&b.backend, err));
    MUST(b.backend->open(&open, &b.device, err));
    double before = resident();
    MUST(b.backend->queue_new(b.device, &b.queue, err)); /* its lanes take their memory now */
    size_t most = b.row > 0 ? b.piece / b.row * (b.row + BORDER) : b.piece;
    size_t room = most > GIB ? most : GIB;
    MUST(b.backend->alloc(b.device, room, &b.place, err));
    double rate[3], active[3];
    for (int i = 0; i < 3; i++) {
        double begin = activated();
        rate[i] = upload_rate(&b);
        active[i] = begin < 0 ? -1 : activated() - begin;
    }
    double grown = resident() - before, link = link_rate(&b);
    printf("%.1f GiB in pieces of %zu MiB%s%s: %.1f GB/s, again %.1f, %.1f; the link %.1f GB/s: "
           "%.0f, %.0f, %.0f %% of it; %.0f MiB more in memory\n",
           (double)b.size / GIB, b.piece >> 20, map ? ", mapped" : "", b.row > 0 ? ", in rows" : "",
           rate[0] * 1e-9, rate[1] * 1e-9, rate[2] * 1e-9, link * 1e-9, 100 * rate[0] / link,
           100 * rate[1] / link, 100 * rate[2] / link, grown);
    printf("thousands of pages made active: %.0f, %.0f, %.0f; the file has %.0f thousand; "
           "one thread fills fresh memory at %.1f GB/s\n",
           active[0], active[1], active[2], 1e-3 * (double)b.size / (double)sysconf(_SC_PAGESIZE),
           fresh_rate() * 1e-9);
    b.backend->free(b.device, &b.place, room);
    b.backend->queue_destroy(&b.queue);
    b.backend->close(&b.device);
    if (map)
        munmap((void *)(uintptr_t)b.mapped, b.size);
    close(b.file.fd);
    return EXIT_SUCCESS;
}
