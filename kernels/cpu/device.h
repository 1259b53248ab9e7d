/* Inside of the CPU backend: what a device and a queue are. */
#ifndef PMLI_CPU_DEVICE_H
#define PMLI_CPU_DEVICE_H

#include "pml_op/backend.h"

#include "pool.h"
#include "simd/tile.h"

struct pml_device {
    pmli_pool *pool;
    pmli_tile_fn *tile; /* small matrix product for this machine's instruction set */
};

struct pml_queue {
    pml_device *device;
    double marks[PML_MARKS]; /* seconds of the monotonic clock */
};

static inline pmli_pool *pmli_pool_of(const pml_queue *queue)
{
    return queue->device->pool;
}

#endif
