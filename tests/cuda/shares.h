/* What pmli_gemm_hopper starts for a product, told by a device and a driver that are played. */
#ifndef TESTS_CUDA_SHARES_H
#define TESTS_CUDA_SHARES_H

#include <stdbool.h>
#include <stdint.h>

#include "params.h"

typedef struct shares_kernel {
    pmli_gemm_hopper_params params;
    unsigned blocks, cluster;
    bool early;
} shares_kernel;

typedef struct shares_device {
    int processors, clusters; /* of eight, at once */
    int driver;               /* 12030: CUDA 12.3 */
} shares_device;

/* c [m,n] = a [m,k] b. How many kernels, one or two; negative: an error. */
int shares_of(const shares_device *device, int64_t m, int64_t n, int64_t k, shares_kernel all[2]);

/* Whether such a product is a candidate there. */
bool shares_serve(const shares_device *device, int64_t m, int64_t n, int64_t k);

#endif
