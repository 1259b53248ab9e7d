/* The CPU's implementation of each op (pml_op/ops.h is the contract), and the sizes of their
 * workspaces. A workspace depends on shapes alone, never on the number of threads, so a plan made
 * without a device holds on any. */
#ifndef PMLI_CPU_OPS_H
#define PMLI_CPU_OPS_H

#include "pml_op/backend.h"

#define PMLI_DECLARE(name, signature, sentence)                                                    \
    pml_status pmli_cpu_##name(pml_queue *queue, const pml_##name##_args *a, pml_error *err);
PML_OPS(PMLI_DECLARE)
#undef PMLI_DECLARE

/* Bytes of workspace that a call takes, by the shapes of its operands. */
size_t pmli_cpu_rmsnorm_bwd_ws(const pml_rmsnorm_bwd_args *a);
size_t pmli_cpu_head_norm_bwd_ws(const pml_head_norm_bwd_args *a);
size_t pmli_cpu_linear_ws(const pml_linear_args *a);
size_t pmli_cpu_linear_bwd_ws(const pml_linear_bwd_args *a);
size_t pmli_cpu_swiglu_ws(const pml_swiglu_args *a);
size_t pmli_cpu_swiglu_bwd_ws(const pml_swiglu_bwd_args *a);
size_t pmli_cpu_head_loss_ws(const pml_head_loss_args *a);

#endif
