/* One transformer layer, forward and backward, as the segments put it together. */
#ifndef PML_PLAN_LAYERS_H
#define PML_PLAN_LAYERS_H

#include "build.h"
#include "pml/base/philox.h"

/* The residual stream between two norms: x + add, the sum not yet taken. add may be absent. */
typedef struct pmli_stream {
    int32_t x, add;
} pmli_stream;

/* What a layer's forward leaves for its backward. */
typedef struct pmli_saved {
    int32_t h; /* the layer's input: sum of the stream */
    int32_t y1, rstd1, qkv, u_qkv;
    int32_t qk, rstd_qk; /* queries and keys normalised; absent: they stand in qkv. After rope */
    int32_t o, lse, u_o;
    int32_t mid; /* after attention: sum of the stream */
    int32_t y2, rstd2, gate_up, u_gate_up, w_gate_up;
    int32_t act, u_down;
} pmli_saved;

/* [tokens, cols] of the segment being built. layer < 0: outside the layers. */
int32_t pmli_activation(pmli_builder *b, int64_t cols, const char *name, int32_t layer);
int32_t pmli_statistic(pmli_builder *b, const char *name); /* [1, tokens] F32 */

/* The norm of a stream: y, and rstd [1, tokens] where it is not absent; weight and y are tensors.
 */
void pmli_rmsnorm(pmli_builder *b, int32_t layer, const char *label, pmli_stream in, int32_t weight,
                  int32_t y, int32_t rstd);

/* cache: this layer's keys and values from earlier calls, or absent. */
pmli_stream pmli_layer_forward(pmli_builder *b, int32_t layer, pmli_stream in, int32_t cache,
                               pmli_saved *saved);

/* Whether anything in this layer is trained. */
bool pmli_layer_trained(const pmli_layer *layer);

/* recompute: pml_recompute, what is made again first (saved is changed to it).
 * d: gradient of the layer's output, becomes that of its input, in place. Without input_needed the
 * backward ends at the lowest thing that is trained. */
void pmli_layer_backward(pmli_builder *b, int32_t layer, pmli_saved *saved, int32_t recompute,
                         int32_t d, bool input_needed);
void pmli_final_norm_backward(pmli_builder *b, int32_t d, int32_t h, int32_t rstd);

#endif
