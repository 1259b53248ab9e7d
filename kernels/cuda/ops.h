#ifndef PMLI_CUDA_OPS_H
#define PMLI_CUDA_OPS_H

#include "pml_op/backend.h"

/* The GPU's implementation of each op it has; pml_op/ops.h is the contract. */
pml_status pmli_cuda_embed(pml_queue *queue, const pml_embed_args *a, pml_error *err);
pml_status pmli_cuda_rmsnorm(pml_queue *queue, const pml_rmsnorm_args *a, pml_error *err);
pml_status pmli_cuda_linear(pml_queue *queue, const pml_linear_args *a, pml_error *err);
pml_status pmli_cuda_fill(pml_queue *queue, const pml_fill_args *a, pml_error *err);
pml_status pmli_cuda_copy(pml_queue *queue, const pml_copy_args *a, pml_error *err);
pml_status pmli_cuda_gather_rows(pml_queue *queue, const pml_gather_rows_args *a, pml_error *err);
pml_status pmli_cuda_scatter_rows(pml_queue *queue, const pml_scatter_rows_args *a, pml_error *err);
pml_status pmli_cuda_embed_bwd(pml_queue *queue, const pml_embed_bwd_args *a, pml_error *err);
pml_status pmli_cuda_rmsnorm_bwd(pml_queue *queue, const pml_rmsnorm_bwd_args *a, pml_error *err);
pml_status pmli_cuda_linear_bwd(pml_queue *queue, const pml_linear_bwd_args *a, pml_error *err);
pml_status pmli_cuda_rope(pml_queue *queue, const pml_rope_args *a, pml_error *err);
pml_status pmli_cuda_attention(pml_queue *queue, const pml_attention_args *a, pml_error *err);
pml_status pmli_cuda_attention_bwd(pml_queue *queue, const pml_attention_bwd_args *a,
                                   pml_error *err);
pml_status pmli_cuda_swiglu(pml_queue *queue, const pml_swiglu_args *a, pml_error *err);
pml_status pmli_cuda_swiglu_bwd(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err);
pml_status pmli_cuda_head_loss(pml_queue *queue, const pml_head_loss_args *a, pml_error *err);
pml_status pmli_cuda_sum(pml_queue *queue, const pml_sum_args *a, pml_error *err);
pml_status pmli_cuda_sumsq(pml_queue *queue, const pml_sumsq_args *a, pml_error *err);
pml_status pmli_cuda_clip_scale(pml_queue *queue, const pml_clip_scale_args *a, pml_error *err);
pml_status pmli_cuda_adamw(pml_queue *queue, const pml_adamw_args *a, pml_error *err);
pml_status pmli_cuda_adamw_8bit(pml_queue *queue, const pml_adamw_8bit_args *a, pml_error *err);
pml_status pmli_cuda_sgd(pml_queue *queue, const pml_sgd_args *a, pml_error *err);
pml_status pmli_cuda_head_norm(pml_queue *queue, const pml_head_norm_args *a, pml_error *err);
pml_status pmli_cuda_head_norm_bwd(pml_queue *queue, const pml_head_norm_bwd_args *a,
                                   pml_error *err);
pml_status pmli_cuda_nf4_dequantise(pml_queue *queue, const pml_nf4_dequantise_args *a,
                                    pml_error *err);
pml_status pmli_cuda_nf4_quantise(pml_queue *queue, const pml_nf4_quantise_args *a, pml_error *err);
pml_status pmli_cuda_offload(pml_queue *queue, const pml_offload_args *a, pml_error *err);
pml_status pmli_cuda_fetch(pml_queue *queue, const pml_fetch_args *a, pml_error *err);
pml_status pmli_cuda_await(pml_queue *queue, const pml_await_args *a, pml_error *err);
pml_status pmli_cuda_fp8_quantise(pml_queue *queue, const pml_fp8_quantise_args *a, pml_error *err);
pml_status pmli_cuda_fp8_turn(pml_queue *queue, const pml_fp8_turn_args *a, pml_error *err);

/* Depends on shapes alone, so that a plan made without a device holds on any. */
size_t pmli_cuda_linear_ws(const pml_linear_args *a);
size_t pmli_cuda_linear_bwd_ws(const pml_linear_bwd_args *a);
size_t pmli_cuda_embed_bwd_ws(const pml_embed_bwd_args *a);
size_t pmli_cuda_swiglu_ws(const pml_swiglu_args *a);
size_t pmli_cuda_swiglu_bwd_ws(const pml_swiglu_bwd_args *a);
size_t pmli_cuda_rmsnorm_bwd_ws(const pml_rmsnorm_bwd_args *a);
size_t pmli_cuda_head_norm_bwd_ws(const pml_head_norm_bwd_args *a);
size_t pmli_cuda_attention_ws(const pml_attention_args *a);
size_t pmli_cuda_attention_bwd_ws(const pml_attention_bwd_args *a);
size_t pmli_cuda_head_loss_ws(const pml_head_loss_args *a);
size_t pmli_cuda_sum_ws(const pml_view *x);
size_t pmli_cuda_nf4_quantise_ws(const pml_nf4_quantise_args *a);
size_t pmli_cuda_fp8_quantise_ws(void);

/* Once a device is open: what attention's and the norm's kernels need to be told. */
pml_status pmli_cuda_attention_prepare(pml_device *device, pml_error *err);
pml_status pmli_cuda_head_loss_prepare(pml_device *device, pml_error *err);
pml_status pmli_cuda_rmsnorm_prepare(pml_device *device, pml_error *err);

#endif
