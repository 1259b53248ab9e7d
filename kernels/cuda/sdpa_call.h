/* An attention op turned into a call of cuDNN: when it may be, what room it needs, and what has to
 * happen around it. */
#ifndef PMLI_CUDA_SDPA_CALL_H
#define PMLI_CUDA_SDPA_CALL_H

#include "device.h"
#include "device/params.h"

/* Room in ws beside what our own kernels want; 0 where cuDNN is not asked, by shape alone. */
size_t pmli_sdpa_ws(pml_dtype dtype, int64_t tokens, int64_t slots, int64_t longest, int64_t heads,
                    int64_t head_dim, bool backward);

/* Put attention on the queue by cuDNN. *done = false where it has to be done otherwise. p as for
 * our own kernels; equal: every document has `longest` rows; ws of ws_bytes, 256-byte aligned. */
pml_status pmli_sdpa_forward(pml_queue *queue, const pmli_attention_params *p, pml_dtype dtype,
                             int64_t longest, bool equal, void *ws, size_t ws_bytes, bool *done,
                             pml_error *err);
pml_status pmli_sdpa_backward(pml_queue *queue, const pmli_attention_params *p, pml_dtype dtype,
                              int64_t longest, bool equal, void *ws, size_t ws_bytes, bool *done,
                              pml_error *err);

#endif
