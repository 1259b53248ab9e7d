/* Loaded into pml-coordinator: the PML_NOMEM-th allocation that its own code asks for is refused,
 * once; what libraries ask for is not (libzmq ends the process without memory, which counts as its
 * death). How many there were, and whether one was refused, is written to the file PML_NOMEM_MARK
 * at the end. */
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *old, size_t size);

static uintptr_t begin, end; /* of the program's code */
static long wanted;
static atomic_long seen;
static atomic_bool refused_one;

static int find_program(struct dl_phdr_info *info, size_t size, void *user)
{
    (void)size;
    (void)user;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type != PT_LOAD || (p->p_flags & PF_X) == 0)
            continue;
        begin = info->dlpi_addr + p->p_vaddr;
        end = begin + p->p_memsz;
    }
    return 1; /* the first is the program itself */
}

__attribute__((constructor)) static void start(void)
{
    const char *number = getenv("PML_NOMEM");
    if (number == NULL || strcmp(program_invocation_short_name, "pml-coordinator") != 0)
        return;
    wanted = atol(number);
    dl_iterate_phdr(find_program, NULL);
}

__attribute__((destructor)) static void tell(void)
{
    const char *path = getenv("PML_NOMEM_MARK");
    char text[64];
    if (begin == 0 || path == NULL)
        return;
    int n = snprintf(text, sizeof text, "%ld %d\n", atomic_load(&seen), atomic_load(&refused_one));
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd >= 0 && write(fd, text, (size_t)n) == n)
        close(fd);
}

static bool refused(const void *caller)
{
    uintptr_t at = (uintptr_t)caller;
    if (at < begin || at >= end || atomic_fetch_add(&seen, 1) + 1 != wanted)
        return false;
    atomic_store(&refused_one, true);
    errno = ENOMEM;
    return true;
}

void *malloc(size_t size)
{
    return refused(__builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    return refused(__builtin_return_address(0)) ? NULL : __libc_calloc(n, size);
}

void *realloc(void *old, size_t size)
{
    return refused(__builtin_return_address(0)) ? NULL : __libc_realloc(old, size);
}

void *reallocarray(void *old, size_t n, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes) || refused(__builtin_return_address(0)))
        return NULL;
    return __libc_realloc(old, bytes);
}
