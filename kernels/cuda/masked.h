/* What dropout makes of a linear layer's adapters, by kernels that draw the masks of what they
 * read:
 *
 *   u_p = s_p (m_p x) a_p^T;   da_p += v_p^T (m_p x)  and  dx += m_p (v_p a_p)  in one pass
 *
 * by one launch for parts of rank 8 and 16, by one a part for 24 and 32. For 16-bit operands, on
 * chips with room for it in shared memory (sm_80 and later). Elsewhere dropout.h's kernel writes
 * masked copies, which products read. The order of sums depends on shapes and the device's kind
 * only.
 */
#ifndef PMLI_CUDA_MASKED_H
#define PMLI_CUDA_MASKED_H

#include <stdbool.h>

#include "pml_op/backend.h"

/* Whether this device makes u [T,R] of a call with dropout so. */
bool pmli_masked_serves_down(const pml_device *device, const pml_linear_args *a, const pml_view *u);
pml_status pmli_masked_down(pml_queue *queue, const pml_linear_args *a, const pml_view *u,
                            pml_error *err);

/* Scratch memory for the partial sums of da; 0 where the shape is none of the kernel's. */
size_t pmli_masked_back_ws(const pml_linear_bwd_args *a);

/* Whether this device makes da and adds to dx so, each where it is wanted; v [T,R] is made. */
bool pmli_masked_serves_back(const pml_device *device, const pml_linear_bwd_args *a,
                             const pml_view *v);
pml_status pmli_masked_back(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                            void *ws, pml_error *err);

/* Once a device is open: how much shared memory the kernels want. */
pml_status pmli_masked_prepare(pml_device *device, pml_error *err);

#endif
