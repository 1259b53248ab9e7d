#include "alloc.h"

#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *old);

enum kind { ALLOCATIONS, FREES, MAPS, KINDS };
enum { TRACES = 24, DEPTH = 16 };

/* Only the counted thread writes these while it counts. */
static __thread bool counting, inside;
static long counts[KINDS];
static struct {
    void *frames[DEPTH];
    int n;
} traces[TRACES];
static int n_traces;

/* backtrace loads its library at its first call, which allocates: done before anybody counts. */
__attribute__((constructor)) static void start(void)
{
    void *frames[2];
    backtrace(frames, 2);
}

static void count(enum kind kind)
{
    if (!counting || inside)
        return;
    inside = true;
    int keep = errno;
    counts[kind]++;
    if (n_traces < TRACES) {
        traces[n_traces].n = backtrace(traces[n_traces].frames, DEPTH);
        n_traces++;
    }
    errno = keep;
    inside = false;
}

void alloc_begin(void)
{
    counting = true;
}

void alloc_end(void)
{
    counting = false;
}

int alloc_write(const char *path)
{
    char line[128];
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return -1;
    int n = snprintf(line, sizeof line, "allocations %ld frees %ld maps %ld\n", counts[ALLOCATIONS],
                     counts[FREES], counts[MAPS]);
    bool ok = write(fd, line, (size_t)n) == n;
    for (int i = 0; ok && i < n_traces; i++) {
        backtrace_symbols_fd(traces[i].frames, traces[i].n, fd);
        ok = write(fd, "\n", 1) == 1;
    }
    return close(fd) == 0 && ok ? 0 : -1;
}

/* ---- the calls ---- */

void *malloc(size_t size)
{
    count(ALLOCATIONS);
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    count(ALLOCATIONS);
    return __libc_calloc(n, size);
}

void *realloc(void *old, size_t size)
{
    count(ALLOCATIONS);
    return __libc_realloc(old, size);
}

void *reallocarray(void *old, size_t n, size_t size)
{
    size_t bytes;
    count(ALLOCATIONS);
    if (__builtin_mul_overflow(n, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return __libc_realloc(old, bytes);
}

void *memalign(size_t alignment, size_t size)
{
    count(ALLOCATIONS);
    return __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    count(ALLOCATIONS);
    return __libc_memalign(alignment, size);
}

int posix_memalign(void **out, size_t alignment, size_t size)
{
    count(ALLOCATIONS);
    if (alignment < sizeof(void *) || (alignment & (alignment - 1)) != 0)
        return EINVAL;
    void *memory = __libc_memalign(alignment, size);
    if (memory == NULL)
        return ENOMEM;
    *out = memory;
    return 0;
}

void free(void *old)
{
    if (old != NULL)
        count(FREES);
    __libc_free(old);
}

static void *map(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    count(MAPS);
    return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    return map(at, size, protection, flags, fd, offset);
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset)
{
    return map(at, size, protection, flags, fd, offset);
}

int munmap(void *at, size_t size)
{
    count(MAPS);
    return (int)syscall(SYS_munmap, at, size);
}

void *mremap(void *old, size_t old_size, size_t size, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    void *at = (flags & MREMAP_FIXED) != 0 ? va_arg(args, void *) : NULL;
    va_end(args);
    count(MAPS);
    return (void *)syscall(SYS_mremap, old, old_size, size, flags, at);
}
