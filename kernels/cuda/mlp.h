/* SwiGLU with what the adapters beside it want, by kernels that do both in one pass
 * (device/mlp.cu).
 *
 * For 16-bit operands, ranks 8 and 16, whole eights of columns, and chips with room for the tiles
 * in shared memory (sm_90 and later); what they do not serve, op_swiglu.c does by products. The
 * order of sums depends on shapes and the device's kind only. */
#ifndef PMLI_CUDA_MLP_H
#define PMLI_CUDA_MLP_H

#include <stdbool.h>

#include "pml_op/backend.h"

/* Scratch memory for the partial sums of a call; 0 where the shape is none of the kernels'. */
size_t pmli_mlp_ws(const pml_swiglu_args *a);
size_t pmli_mlp_bwd_ws(const pml_swiglu_bwd_args *a);

/* Whether this device does this call so; it has adapters. */
bool pmli_mlp_serves(const pml_device *device, const pml_swiglu_args *a);
bool pmli_mlp_bwd_serves(const pml_device *device, const pml_swiglu_bwd_args *a);

/* Queue swiglu with u; swiglu_bwd with v, db and da: where the above says so. */
pml_status pmli_mlp(pml_queue *queue, const pml_swiglu_args *a, pml_error *err);
pml_status pmli_mlp_bwd(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err);

/* Once a device is open: how much shared memory the kernels want. */
pml_status pmli_mlp_prepare(pml_device *device, pml_error *err);

#endif
