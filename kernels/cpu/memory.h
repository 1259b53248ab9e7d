/* Memory of this machine as this process may use it. */
#ifndef PMLI_CPU_MEMORY_H
#define PMLI_CPU_MEMORY_H

#include <stddef.h>

#include "pml/base/error.h"
#include "pool.h"

typedef struct pmli_memory {
    size_t total; /* of the machine, or the tightest control group's limit */
    size_t free;  /* what can be taken without swapping or being killed    */
} pmli_memory;

/* proc and cgroup: "/proc" and "/sys/fs/cgroup", other folders in tests. Understands control groups
 * of version 2 (memory.max of the process's group and all groups above it) and version 1. */
pml_status pmli_memory_read(const char *proc, const char *cgroup, pmli_memory *memory,
                            pml_error *err);

/* A private mapping of its own, 256-byte aligned (2 MiB where it is that large), every page
 * present: the kernel clears them on the pool's threads, each some. PML_NO_MEMORY when it refuses
 * the mapping, or the pages. */
pml_status pmli_memory_map(pmli_pool *pool, size_t bytes, void **base, pml_error *err);
void pmli_memory_unmap(void **base, size_t bytes);

#endif
