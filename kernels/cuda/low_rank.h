/* v = s dy b and db += dy^T u of a linear layer's adapters by one kernel that reads dy once.
 *
 * For 16-bit operands, ranks 8 and 16, and chips with room for its tiles in shared memory (sm_90
 * and later), where pass.h does not serve, as it does on sm_90a; elsewhere two products by
 * cuBLASLt, each of which reads all of dy. The order of sums depends on shapes and the device's
 * kind only. */
#ifndef PMLI_CUDA_LOW_RANK_H
#define PMLI_CUDA_LOW_RANK_H

#include <stdbool.h>

#include "pml_op/backend.h"

/* Scratch memory for the partial sums of a call; 0 where the shape is none of the kernel's. */
size_t pmli_low_rank_ws(const pml_linear_bwd_args *a);

/* Whether this device does this call so; v is where its result is wanted. */
bool pmli_low_rank_serves(const pml_device *device, const pml_linear_bwd_args *a,
                          const pml_view *v);

/* Queue v = s dy b [T,R] F32 and, where wanted, db += dy^T u; ws as pmli_low_rank_ws has it. */
pml_status pmli_low_rank(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                         void *ws, pml_error *err);

/* Once a device is open: how much shared memory the kernels want. */
pml_status pmli_low_rank_prepare(pml_device *device, pml_error *err);

#endif
