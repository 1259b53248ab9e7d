/* Attention's backward by device/attention_hopper_*.cu: sm_90a, bfloat16, heads of 128, causal.
 * Sums have a fixed order but for dq's, which have one where the device is deterministic. */
#ifndef PMLI_CUDA_ATTENTION_HOPPER_H
#define PMLI_CUDA_ATTENTION_HOPPER_H

#include "device.h"
#include "device/params.h"

/* Once a device is open: the shared memory that the kernel asks for. */
pml_status pmli_attention_hopper_prepare(pml_device *device, pml_error *err);

/* Bytes of ws that it likes to work in (for dq's sums in float32 most of them: it serves without,
 * by two passes); 0 where it does not serve, by dtype and shape alone. */
size_t pmli_attention_hopper_ws(const pml_attention_bwd_args *a);

/* Whether it serves on this device. */
bool pmli_attention_hopper_serves(const pml_device *device, const pml_attention_bwd_args *a);

/* Put it on the queue. What pmli_attention_hopper_serves says yes to. */
pml_status pmli_attention_hopper_bwd(pml_queue *queue, const pml_attention_bwd_args *a,
                                     pml_error *err);

#endif
