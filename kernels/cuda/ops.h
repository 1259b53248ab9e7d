/* The GPU's implementation of each op it has (pml_op/ops.h is the contract). */
#ifndef PMLI_CUDA_OPS_H
#define PMLI_CUDA_OPS_H

#include "pml_op/backend.h"

pml_status pmli_cuda_embed(pml_queue *queue, const pml_embed_args *a, pml_error *err);
pml_status pmli_cuda_rmsnorm(pml_queue *queue, const pml_rmsnorm_args *a, pml_error *err);
pml_status pmli_cuda_linear(pml_queue *queue, const pml_linear_args *a, pml_error *err);
pml_status pmli_cuda_fill(pml_queue *queue, const pml_fill_args *a, pml_error *err);
pml_status pmli_cuda_copy(pml_queue *queue, const pml_copy_args *a, pml_error *err);
pml_status pmli_cuda_gather_rows(pml_queue *queue, const pml_gather_rows_args *a, pml_error *err);
pml_status pmli_cuda_scatter_rows(pml_queue *queue, const pml_scatter_rows_args *a, pml_error *err);

/* Depends on shapes alone, so that a plan made without a device holds on any. */
size_t pmli_cuda_linear_ws(const pml_linear_args *a);

#endif
