/* Memory that runs out: the Nth allocation of what is watched is refused, once, and what was
 * allocated and not freed is counted. Linked into a C test, or loaded (LD_PRELOAD) into a program:
 *
 *   a program   by its environment: PML_NOMEM_IN is its name, PML_NOMEM a file of nomem_counts that
 *               all its processes share with who started them, who says there at any time which one
 *               is to be refused
 *   python      by these functions, through ctypes
 *
 * Not with a sanitizer, which has an allocator of its own in this place. */
#ifndef PML_TESTS_NOMEM_H
#define PML_TESTS_NOMEM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct nomem_counts {
    atomic_long wanted;        /* the one to be refused, from 1 on; 0: none */
    atomic_long seen, refused; /* how many there were of each */
} nomem_counts;

/* Watch what code asks for that lies in the object whose path ends so; NULL: whoever asks. What
 * libraries under it ask for is not watched then (libzmq ends the process without memory). Returns
 * whether there is such an object. */
bool nomem_watch(const char *object);
void nomem_watch_nothing(void);

/* Count anew, and refuse number `number` (from 1 on), or that one and all that follow; 0: none. */
void nomem_refuse(long number, bool and_all_that_follow);

long nomem_seen(void);    /* allocations since then */
bool nomem_refused(void); /* whether one was refused */
long nomem_live(void);    /* watched blocks, of all times, that are not freed */

/* Python's own allocators (PyMemAllocatorEx) of memory and of objects are put through here; get and
 * set are PyMem_GetAllocator and PyMem_SetAllocator. */
typedef struct nomem_allocator {
    void *self;
    void *(*malloc)(void *self, size_t size);
    void *(*calloc)(void *self, size_t n, size_t size);
    void *(*realloc)(void *self, void *old, size_t size);
    void (*free)(void *self, void *memory);
} nomem_allocator;

void nomem_python(void (*get)(int domain, nomem_allocator *),
                  void (*set)(int domain, nomem_allocator *));

/* Refuse the Nth that this thread asks Python for from now on, once; 0: none any more. */
void nomem_python_refuse(long number);
bool nomem_python_refused(void); /* since the last number */

#endif
