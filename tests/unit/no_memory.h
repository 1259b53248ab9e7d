/* Memory that runs out: the k-th allocation refused. Include it in one file of a test, which then
 * has these in the place of the C library's. Under a sanitizer, which has an allocator of its own
 * there, NO_MEMORY_WATCHED is not defined. */
#ifndef PML_TESTS_NO_MEMORY_H
#define PML_TESTS_NO_MEMORY_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define NO_MEMORY_WATCHED 1

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *memory);

static bool watching; /* only while the code under test runs */
static long allowed, live;

static bool refused(void)
{
    if (!watching || allowed-- > 0)
        return false;
    errno = ENOMEM;
    return true;
}

static void *counted(void *memory)
{
    live += watching && memory != NULL;
    return memory;
}

void *malloc(size_t size)
{
    return refused() ? NULL : counted(__libc_malloc(size));
}

void *calloc(size_t n, size_t size)
{
    return refused() ? NULL : counted(__libc_calloc(n, size));
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return refused() ? NULL : counted(__libc_memalign(alignment, size));
}

void *realloc(void *old, size_t size)
{
    if (refused())
        return NULL;
    void *memory = __libc_realloc(old, size);
    return old == NULL ? counted(memory) : memory;
}

void free(void *memory)
{
    live -= watching && memory != NULL;
    __libc_free(memory);
}

#endif
#endif
