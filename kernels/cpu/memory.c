#include "memory.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pml_op/cpu.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; older C libraries do not know it */
#endif

/* The number after `key` in a file of "key value" lines; an empty key: the file's first word.
 * False when the file or key is not there, or the value no number ("max"). */
static bool read_number(const char *path, const char *key, size_t *value)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return false;
    char line[256];
    size_t length = strlen(key);
    bool found = false;
    while (!found && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, key, length) != 0)
            continue;
        char *start = line + length, *end;
        errno = 0;
        unsigned long long number = strtoull(start, &end, 10);
        found = end != start && errno == 0;
        *value = (size_t)number;
        if (length == 0)
            break;
    }
    fclose(file);
    return found;
}

static void at_most(size_t *value, size_t limit)
{
    if (*value > limit)
        *value = limit;
}

/* Take one control group's limit into account. Page cache that is not in use counts as free. */
static void apply_group(const char *folder, const char *limit_name, const char *usage_name,
                        pmli_memory *memory)
{
    char path[4352];
    size_t limit, usage = 0, cache = 0;
    snprintf(path, sizeof path, "%s/%s", folder, limit_name);
    if (!read_number(path, "", &limit))
        return;
    snprintf(path, sizeof path, "%s/%s", folder, usage_name);
    read_number(path, "", &usage);
    snprintf(path, sizeof path, "%s/memory.stat", folder);
    if (!read_number(path, "total_inactive_file ", &cache))
        read_number(path, "inactive_file ", &cache);
    usage = usage > cache ? usage - cache : 0;
    at_most(&memory->total, limit);
    at_most(&memory->free, limit > usage ? limit - usage : 0);
}

/* From root/group up to root itself: a group is bound by all above it. In a container whose group
 * has another name outside, root is the container's own, and is what counts. */
static void apply_groups(const char *root, const char *group, const char *limit_name,
                         const char *usage_name, pmli_memory *memory)
{
    char folder[4096];
    size_t length = strlen(root);
    int written = snprintf(folder, sizeof folder, "%s%s", root, group);
    if (written < 0 || (size_t)written >= sizeof folder)
        folder[length] = '\0';
    for (;;) {
        apply_group(folder, limit_name, usage_name, memory);
        char *slash = strrchr(folder, '/');
        if (slash == NULL || (size_t)(slash - folder) < length)
            return;
        *slash = '\0';
    }
}

pml_status pmli_memory_read(const char *proc, const char *cgroup, pmli_memory *memory,
                            pml_error *err)
{
    char path[4096], line[4096];
    snprintf(path, sizeof path, "%s/meminfo", proc);
    if (!read_number(path, "MemTotal:", &memory->total) ||
        !read_number(path, "MemAvailable:", &memory->free))
        return PML_FAIL(err, PML_IO, "cannot read MemTotal and MemAvailable from %s", path);
    memory->total *= 1024;
    memory->free *= 1024;

    snprintf(path, sizeof path, "%s/self/cgroup", proc);
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return PML_OK; /* a kernel without control groups */
    while (fgets(line, sizeof line, file) != NULL) {
        /* "0::/path" is version 2, "7:memory:/path" or "4:cpu,memory:/path" version 1 */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL)
            continue;
        *controllers++ = '\0';
        *group++ = '\0';
        if (*controllers == '\0') {
            apply_groups(cgroup, group, "memory.max", "memory.current", memory);
        } else if (strstr(controllers, "memory") != NULL) {
            snprintf(path, sizeof path, "%s/memory", cgroup);
            apply_groups(path, group, "memory.limit_in_bytes", "memory.usage_in_bytes", memory);
        }
    }
    fclose(file);
    return PML_OK;
}

pml_status pml_cpu_memory(size_t *total, size_t *free, pml_error *err)
{
    pmli_memory memory = {0};
    pml_status status = pmli_memory_read("/proc", "/sys/fs/cgroup", &memory, err);
    *total = memory.total;
    *free = memory.free;
    return status;
}

enum { HUGE_PAGE = 2 << 20, PIECE = 8 * HUGE_PAGE };

typedef struct absent {
    char *base;
    size_t bytes;
    _Atomic int trouble; /* errno of a piece that could not be had */
} absent;

static void fetch_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    absent *a = arg;
    char *begin = a->base + (size_t)item * PIECE;
    const size_t left = a->bytes - (size_t)item * PIECE, bytes = left < PIECE ? left : PIECE;
    if (madvise(begin, bytes, MADV_POPULATE_WRITE) == 0)
        return;
    if (errno != EINVAL) {
        atomic_store(&a->trouble, errno);
        return;
    }
    /* Before Linux 5.14: touch each page. */
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t at = 0; at < bytes; at += page)
        ((volatile char *)begin)[at] = 0;
}

static pml_status make_present(pmli_pool *pool, void *base, size_t bytes, pml_error *err)
{
    absent a = {.base = base, .bytes = bytes};
    madvise(base, bytes, MADV_HUGEPAGE); /* a wish: refused where huge pages are off */
    pmli_pool_run(pool, (int64_t)((bytes + PIECE - 1) / PIECE), fetch_piece, &a);
    int trouble = atomic_load(&a.trouble);
    return trouble == 0
               ? PML_OK
               : PML_FAIL(err, PML_NO_MEMORY, "the kernel cannot give %zu MiB of memory: %s",
                          bytes >> 20, strerror(trouble));
}

pml_status pmli_memory_map(pmli_pool *pool, size_t bytes, void **base, pml_error *err)
{
    *base = NULL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), length, mapped;
    /* One huge page more than asked for, so that the block can start on a huge page's boundary. */
    if (__builtin_add_overflow(bytes, page - 1, &length) ||
        __builtin_add_overflow(length &= ~(page - 1), (size_t)HUGE_PAGE, &mapped))
        return PML_FAIL(err, PML_NO_MEMORY, "%zu bytes are more than can be addressed", bytes);
    if (length == 0)
        return PML_FAIL(err, PML_INVALID, "a block of 0 bytes was asked for");
    char *start = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return PML_FAIL(err, PML_NO_MEMORY, "the kernel refused %zu MiB of memory: %s", bytes >> 20,
                        strerror(errno));
    size_t before = (HUGE_PAGE - (uintptr_t)start % HUGE_PAGE) % HUGE_PAGE;
    if (before > 0)
        munmap(start, before);
    if (HUGE_PAGE - before > 0)
        munmap(start + before + length, HUGE_PAGE - before);
    pml_status status = make_present(pool, start + before, length, err);
    if (status != PML_OK)
        munmap(start + before, length);
    else
        *base = start + before;
    return status;
}

void pmli_memory_unmap(void **base, size_t bytes)
{
    if (*base == NULL)
        return;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    munmap(*base, (bytes + page - 1) & ~(page - 1));
    *base = NULL;
}
