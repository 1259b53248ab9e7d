/* v = s dy b and db += dy^T u of a linear layer's adapters by one kernel that reads dy once; where
 * dy is what rope has to turn back, that in the same pass.
 *
 * For 16-bit operands, ranks 8 and 16, and chips with room for its tiles in shared memory (sm_90
 * and later); elsewhere two products by cuBLASLt, each of which reads all of dy. The order of sums
 * depends on shapes and the device's kind only. */
#ifndef PMLI_CUDA_LOW_RANK_H
#define PMLI_CUDA_LOW_RANK_H

#include <stdbool.h>

#include "pml_op/backend.h"

/* Scratch memory for the partial sums of a call; 0 where the shape is none of the kernel's. */
size_t pmli_low_rank_ws(const pml_linear_bwd_args *a);

/* Whether this device does this call so; v is where its result is wanted. */
bool pmli_low_rank_serves(const pml_device *device, const pml_linear_bwd_args *a,
                          const pml_view *v);

/* rope's transpose on dy's first heads * head_dim columns, in place; pos and table as rope has
 * them. */
typedef struct pmli_turn {
    const int *pos;
    const float *table;
    int heads, head_dim;
} pmli_turn;

/* Whether a call that is served so can have dy turned on the way. */
bool pmli_low_rank_turns(const pml_linear_bwd_args *a, const pmli_turn *turn);

/* Queue v = s dy b and db += dy^T u, of dy turned first where turn is not NULL; ws as
 * pmli_low_rank_ws has it. */
pml_status pmli_low_rank(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                         const pmli_turn *turn, void *ws, pml_error *err);

/* Once a device is open: how much shared memory the kernels want. */
pml_status pmli_low_rank_prepare(pml_device *device, pml_error *err);

#endif
