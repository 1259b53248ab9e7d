/* One transformer layer, forward and backward, as the segments put it together. */
#ifndef PML_PLAN_LAYERS_H
#define PML_PLAN_LAYERS_H

#include "build.h"
#include "pml/base/philox.h"

/* The residual stream between two norms: x + add, the sum not yet taken. add may be absent. */
typedef struct pmli_stream {
    int32_t x, add;
} pmli_stream;

/* The gradient that runs down the residual line: `sum` is what layers add to, `d` what products
 * read. The same tensor, but in float16, where sum is float32 and d its rounding. */
typedef struct pmli_residual {
    int32_t sum, d;
} pmli_residual;

/* What a linear layer reads, or the gradient of what it writes; scale: of its pieces where it is in
 * 8 bits already, or absent. */
typedef struct pmli_rows {
    int32_t x, scale;
} pmli_rows;

/* What a layer's forward leaves for its backward. */
typedef struct pmli_saved {
    int32_t h; /* the layer's input: sum of the stream */
    int32_t y1, rstd1, qkv, u_qkv;
    int32_t qk, rstd_qk; /* queries and keys normalised; absent: they stand in qkv. After rope */
    int32_t o, lse, u_o;
    int32_t mid; /* after attention: sum of the stream */
    int32_t y2, rstd2, gate_up, u_gate_up, w_gate_up;
    pmli_rows act;
    int32_t u_down;
} pmli_saved;

/* [tokens, cols] of the segment being built. layer < 0: outside the layers. */
int32_t pmli_activation(pmli_builder *b, int64_t cols, const char *name, int32_t layer);
int32_t pmli_wide_activation(pmli_builder *b, int64_t cols, const char *name); /* F32 */
int32_t pmli_statistic(pmli_builder *b, const char *name);                     /* [1, tokens] F32 */

/* The norm of a stream: y, and rstd [1, tokens] where it is not absent; weight and y are tensors.
 */
void pmli_rmsnorm(pmli_builder *b, int32_t layer, const char *label, pmli_stream in, int32_t weight,
                  int32_t y, int32_t rstd);

/* --- linear layer `which` (pmli_linear_index) of a layer --- */

/* What it reads, with room for its adapters' factors behind it. */
int32_t pmli_input_of(pmli_builder *b, int32_t layer, int which, const char *name);
/* u or v: a column for each of its adapters' rank; absent where it has none. */
int32_t pmli_low_rank_of(pmli_builder *b, int32_t layer, int which, const char *name);
/* y of x; u is kept. u_made: it is there, by the op that made x. Returns the weight that it read.
 */
int32_t pmli_linear_forward(pmli_builder *b, int32_t layer, int which, pmli_rows x, int32_t y,
                            int32_t u, bool u_made);

/* Which of a linear layer's gradients: all; those that do not read its input; those that do; those
 * that swiglu's backward has not made. */
typedef enum pmli_gradients {
    PMLI_ALL = 0,
    PMLI_BEFORE_INPUT,
    PMLI_OF_INPUT,
    PMLI_AFTER_SWIGLU
} pmli_gradients;

/* dx may be absent. v: where it is to stand, if anywhere; made before where this call is one of two
 * or swiglu's backward has been there. */
void pmli_linear_backward(pmli_builder *b, int32_t layer, int which, pmli_gradients part,
                          pmli_rows dy, int32_t x, int32_t u, pml_operand v, int32_t dx);

/* The same as an activation that is not in 8 bits. */
static inline pmli_rows pmli_plain(int32_t x)
{
    return (pmli_rows){x, PMLI_ABSENT};
}

/* --- the middle of the attention block (layers_attention.c) --- */

/* Queries and keys of saved->qkv, each head on its own, into saved->qk. */
void pmli_head_norm(pmli_builder *b, int32_t layer, const pmli_saved *saved);
/* In place on the queries' and keys' columns of qkv. */
void pmli_rope(pmli_builder *b, int32_t layer, int32_t qkv);
/* saved->o and lse. cache: as pmli_layer_forward has it. */
void pmli_attention(pmli_builder *b, int32_t layer, const pmli_saved *saved, int32_t cache);
/* dqkv, the gradient of qkv's output, from that of o's input. */
void pmli_attention_backward(pmli_builder *b, int32_t layer, const pmli_saved *saved, int32_t dout,
                             int32_t dqkv);

/* --- the middle of the MLP (layers_mlp.c) --- */

/* swiglu of saved->gate_up and down; the layer's output. */
int32_t pmli_mlp_end(pmli_builder *b, int32_t layer, pmli_saved *saved);
/* down's backward as far as it does not ask for act. d: gradient of the layer's output; dact: of
 * act, written. Where v of down stands is returned. */
pml_operand pmli_down_backward(pmli_builder *b, int32_t layer, const pmli_saved *saved, int32_t d,
                               int32_t dact);
/* The rest of it, and swiglu's, as dgate_up: in place of saved->gate_up, or in 8 bits where
 * gate_up's backward multiplies it so and makes nothing else of it (input_needed: dx). v of gate_up
 * where it is made on the way, or an absent operand. */
typedef struct pmli_dgate_up {
    pmli_rows rows;
    pml_operand v;
} pmli_dgate_up;
pmli_dgate_up pmli_swiglu_backward(pmli_builder *b, int32_t layer, const pmli_saved *saved,
                                   int32_t d, int32_t dact, pml_operand v_down, bool input_needed);

/* cache: this layer's keys and values from earlier calls, or absent. */
pmli_stream pmli_layer_forward(pmli_builder *b, int32_t layer, pmli_stream in, int32_t cache,
                               pmli_saved *saved);

/* Whether anything in this layer is trained; and the first of its linear layers, in forward order,
 * that has something to train: -1 where a norm has, which wants the gradient of what it makes. */
bool pmli_layer_trained(const pmli_layer *layer);
int pmli_lowest_trained(const pmli_layer *layer);

/* recompute: pml_recompute, what is made again first (saved is changed to it).
 * d: gradient of the layer's output, becomes that of its input, in place. Without input_needed the
 * backward ends at the lowest thing that is trained. */
void pmli_layer_backward(pmli_builder *b, int32_t layer, pmli_saved *saved, int32_t recompute,
                         pmli_residual d, bool input_needed);
/* d.d: gradient of what the final norm puts out. */
void pmli_final_norm_backward(pmli_builder *b, pmli_residual d, int32_t h, int32_t rstd);

#endif
