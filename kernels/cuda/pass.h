/* A linear layer's adapters' gradients by one pass over dy, which the copy engine brings:
 *
 *   v = s dy b and db += dy^T u     for ranks 8 and 16
 *
 * For 16-bit operands and machine code for sm_90a. Where a call is not served low_rank.h's kernel
 * is asked, then cuBLASLt. The order of sums depends on shapes and the device's kind only. */
#ifndef PMLI_CUDA_PASS_H
#define PMLI_CUDA_PASS_H

#include <stdbool.h>

#include "pml_op/backend.h"

/* Scratch memory of a call; 0 where the shape is not for it. */
size_t pmli_pass_ws(const pml_linear_bwd_args *a);

/* Whether this device does v and db so; v is where that result is wanted. */
bool pmli_pass_serves_back(const pml_device *device, const pml_linear_bwd_args *a,
                           const pml_view *v);

/* Queue v = s dy b and db += dy^T u; ws as pmli_pass_ws has it. */
pml_status pmli_pass_back(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                          void *ws, pml_error *err);

/* Once a device is open: how much shared memory the kernels want. */
pml_status pmli_pass_prepare(pml_device *device, pml_error *err);

#endif
