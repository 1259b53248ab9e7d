/* What the copy engine of sm_90 is told of a matrix, or of one that is cut along a side: the boxes
 * of it that kernels bring to shared memory and take from there. */
#ifndef PMLI_CUDA_TENSOR_MAP_H
#define PMLI_CUDA_TENSOR_MAP_H

#include "device.h"
#include "device/params.h"

/* Elements of 16 bits, innermost side first. A box's innermost side is 128 or 32 bytes, and its
 * rows lie in shared memory as products want them (swizzled over as much); what is beyond a side
 * reads as zeros and is not written. */
typedef struct pmli_boxes {
    pml_dtype dtype;
    int sides; /* 2 or 3 */
    /* Elements; and elements from one row to the next, from one of the third side to the next. */
    int64_t shape[3], pitch[2];
    unsigned box[3];
    bool far; /* whole 256 bytes of memory come to the L2 cache at once, else 128 */
} pmli_boxes;

/* data: on 16 bytes, as every pitch; `what` is described, for an error. */
pml_status pmli_tensor_map_of(pmli_tensor_map *map, const void *data, const pmli_boxes *boxes,
                              const char *what, pml_error *err);

#endif
