#include "nomem.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *memory);

static uintptr_t begin, end = 0; /* of the watched code; nothing is watched before it is set */
static nomem_counts own, *counts = &own;
static atomic_long live;
static atomic_bool for_good;

/* ---- which code ---- */

typedef struct wish {
    const char *object;
    bool found;
} wish;

static int find_object(struct dl_phdr_info *info, size_t size, void *user)
{
    wish *w = user;
    size_t n = strlen(info->dlpi_name), m = strlen(w->object);
    (void)size;
    if (n < m || strcmp(info->dlpi_name + n - m, w->object) != 0)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type != PT_LOAD || (p->p_flags & PF_X) == 0)
            continue;
        begin = info->dlpi_addr + p->p_vaddr;
        end = begin + p->p_memsz;
    }
    w->found = true;
    return 1; /* the program itself is the first, and has no name */
}

bool nomem_watch(const char *object)
{
    wish w = {object, object == NULL};
    begin = 0;
    end = UINTPTR_MAX;
    if (object != NULL)
        dl_iterate_phdr(find_object, &w);
    return w.found;
}

void nomem_watch_nothing(void)
{
    begin = end = 0;
}

void nomem_refuse(long number, bool and_all_that_follow)
{
    atomic_store(&for_good, and_all_that_follow);
    atomic_store(&counts->wanted, number);
    atomic_store(&counts->seen, 0);
    atomic_store(&counts->refused, 0);
}

long nomem_seen(void)
{
    return atomic_load(&counts->seen);
}

bool nomem_refused(void)
{
    return atomic_load(&counts->refused) > 0;
}

long nomem_live(void)
{
    return atomic_load(&live);
}

/* ---- a program, by its environment ---- */

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("PML_NOMEM"), *program = getenv("PML_NOMEM_IN");
    if (path == NULL || program == NULL || strcmp(program_invocation_short_name, program) != 0)
        return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    void *shared = mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared == MAP_FAILED) {
        fprintf(stderr, "PML_NOMEM: %s: %s\n", path, strerror(errno));
        abort();
    }
    close(fd);
    counts = shared;
    nomem_watch("");
}

/* ---- the C library's ---- */

static bool is_watched(const void *caller)
{
    return (uintptr_t)caller >= begin && (uintptr_t)caller < end;
}

static bool is_refused(bool watched)
{
    if (!watched)
        return false;
    long number = atomic_fetch_add(&counts->seen, 1) + 1, first = atomic_load(&counts->wanted);
    if (first == 0 || number < first || (number > first && !atomic_load(&for_good)))
        return false;
    atomic_fetch_add(&counts->refused, 1);
    errno = ENOMEM;
    return true;
}

/* A watched block has its own address, disguised, in the last word that it can use: whoever frees
 * it, from whatever library, it is known again. */
static const size_t mark_size = sizeof(uintptr_t);
static const uintptr_t disguise = (uintptr_t)0x9e3779b97f4a7c15;

static char *mark_of(void *memory)
{
    return (char *)memory + malloc_usable_size(memory) - mark_size;
}

static void *marked(void *memory)
{
    uintptr_t mark = (uintptr_t)memory ^ disguise;
    if (memory == NULL)
        return NULL;
    memcpy(mark_of(memory), &mark, mark_size);
    atomic_fetch_add(&live, 1);
    return memory;
}

static bool unmarked(void *memory)
{
    uintptr_t mark;
    if (memory == NULL || malloc_usable_size(memory) < mark_size)
        return false;
    memcpy(&mark, mark_of(memory), mark_size);
    if (mark != ((uintptr_t)memory ^ disguise))
        return false;
    memset(mark_of(memory), 0, mark_size);
    atomic_fetch_sub(&live, 1);
    return true;
}

static bool with_mark(size_t size, size_t *larger)
{
    bool fits = !__builtin_add_overflow(size, mark_size, larger);
    if (!fits)
        errno = ENOMEM;
    return fits;
}

void *malloc(size_t size)
{
    size_t larger;
    bool watched = is_watched(__builtin_return_address(0));
    if (is_refused(watched))
        return NULL;
    if (!watched)
        return __libc_malloc(size);
    return with_mark(size, &larger) ? marked(__libc_malloc(larger)) : NULL;
}

void *calloc(size_t n, size_t size)
{
    size_t bytes;
    bool watched = is_watched(__builtin_return_address(0));
    if (is_refused(watched))
        return NULL;
    if (!watched)
        return __libc_calloc(n, size);
    if (__builtin_mul_overflow(n, size, &bytes) || !with_mark(bytes, &bytes))
        return NULL;
    return marked(__libc_calloc(1, bytes));
}

static void *resize(void *old, size_t size, bool watched)
{
    size_t larger;
    if (is_refused(watched) || !with_mark(size, &larger))
        return NULL;
    bool was = unmarked(old);
    void *memory = __libc_realloc(old, watched || was ? larger : size);
    if (memory == NULL) {
        if (was)
            marked(old);
        return NULL;
    }
    return watched || was ? marked(memory) : memory;
}

void *realloc(void *old, size_t size)
{
    return resize(old, size, is_watched(__builtin_return_address(0)));
}

void *reallocarray(void *old, size_t n, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return resize(old, bytes, is_watched(__builtin_return_address(0)));
}

void *aligned_alloc(size_t alignment, size_t size)
{
    size_t larger;
    bool watched = is_watched(__builtin_return_address(0));
    if (is_refused(watched))
        return NULL;
    if (!watched)
        return __libc_memalign(alignment, size);
    return with_mark(size, &larger) ? marked(__libc_memalign(alignment, larger)) : NULL;
}

/* What would be the C library's own caller of malloc is ours here. */
char *strdup(const char *text)
{
    size_t size = strlen(text) + 1;
    bool watched = is_watched(__builtin_return_address(0));
    if (is_refused(watched))
        return NULL;
    char *copy = watched ? marked(__libc_malloc(size + mark_size)) : __libc_malloc(size);
    return copy == NULL ? NULL : memcpy(copy, text, size);
}

void free(void *memory)
{
    unmarked(memory);
    __libc_free(memory);
}

/* ---- Python's ---- */

enum { DOMAINS = 3 }; /* raw, memory, objects; the first may be asked without Python's lock */

static nomem_allocator under[DOMAINS];
static _Thread_local long python_left;
static _Thread_local bool python_refused_one;

static bool python_refuses(void)
{
    if (python_left == 0 || --python_left > 0)
        return false;
    python_refused_one = true;
    return true;
}

static void *python_malloc(void *self, size_t size)
{
    nomem_allocator *a = self;
    return python_refuses() ? NULL : a->malloc(a->self, size);
}

static void *python_calloc(void *self, size_t n, size_t size)
{
    nomem_allocator *a = self;
    return python_refuses() ? NULL : a->calloc(a->self, n, size);
}

static void *python_realloc(void *self, void *old, size_t size)
{
    nomem_allocator *a = self;
    return python_refuses() ? NULL : a->realloc(a->self, old, size);
}

static void python_free(void *self, void *memory)
{
    nomem_allocator *a = self;
    a->free(a->self, memory);
}

void nomem_python(void (*get)(int domain, nomem_allocator *),
                  void (*set)(int domain, nomem_allocator *))
{
    for (int domain = 1; domain < DOMAINS; domain++) {
        get(domain, &under[domain]);
        nomem_allocator ours = {&under[domain], python_malloc, python_calloc, python_realloc,
                                python_free};
        set(domain, &ours);
    }
}

void nomem_python_refuse(long number)
{
    python_left = number;
    if (number > 0)
        python_refused_one = false;
}

bool nomem_python_refused(void)
{
    return python_refused_one;
}
