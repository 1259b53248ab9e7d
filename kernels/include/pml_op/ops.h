/* The op table: every operation a step is made of, once.
 *
 * An op is coarse (a whole linear layer with its LoRA branch, a whole attention) and has no
 * state: all it reads and writes is named by the views in its argument struct. Every backend
 * implements the same contracts; kernels/cpu/ref is the oracle that the others answer to.
 *
 * Rules that hold for every argument struct:
 *   - the operands come first, each a pml_view, in the order of the signature in PML_OPS;
 *     then the attributes. So program code can treat operands as an array (pml_op_views).
 *   - `ws` is scratch memory the backend asked for (backend.workspace); its content before and
 *     after the op means nothing. rows = 1, cols = bytes, dtype U8; absent when none is needed.
 *   - rows of activations are tokens. The views of one call agree on how many there are; a fixed
 *     capacity with fewer live tokens is expressed by the caller through rows.
 *   - T tokens, H hidden size, D document slots, L labelled rows, V vocabulary.
 *   - arithmetic is at least float32, whatever the dtype of the operands; sums over tokens are
 *     made in an order that depends on shapes and thread count only, never on timing.
 *   - an op checks shapes and dtypes and answers PML_INVALID / PML_UNSUPPORTED with the operand's
 *     name; it never reads outside a view. Index contents (token ids, positions, rows,
 *     document bounds) have been checked on the host before upload (pml_batch_check).
 *   - operands may share memory only where the contract says so.
 */
#ifndef PML_OP_OPS_H
#define PML_OP_OPS_H

#include <stdbool.h>
#include <stddef.h>

#include "pml/base/error.h"
#include "pml/base/view.h"

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, signature, sentence)
 * Signature, one letter an operand: I in, O out, U updated (read and written), W workspace;
 * lower case: may be absent. The sentence explains the op to a student. */
#define PML_OPS(X)                                                                                 \
    X(embed, "IIO", "Looks up each token's row in the embedding table.")                           \
    X(embed_bwd, "IIUw",                                                                           \
      "Adds each token's gradient to its row of the embedding table's gradient.")                  \
    X(rmsnorm, "IiIoOO", "Adds the residual and scales each row to unit root mean square.")        \
    X(rmsnorm_bwd, "IIIIiOouw",                                                                    \
      "Gradient of rmsnorm, added to the one arriving along the residual.")                        \
    X(head_norm, "IIIOO", "Scales each head's query and key to unit root mean square.")            \
    X(head_norm_bwd, "IIIIIOuuw", "Gradient of head_norm.")                                        \
    X(linear, "IIiiiiiiOuiw", "y = x W^T + bias, plus the low-rank LoRA branch (s x A^T) B^T.")    \
    X(linear_bwd, "Iiiiiiiiiouuuuuiw",                                                             \
      "Gradients of linear with respect to its input and what is trained.")                        \
    X(rope, "UII", "Rotates queries and keys by an angle that grows with the position.")           \
    X(attention, "IIIIIOOw", "Each token gathers values of earlier tokens of its own document.")   \
    X(attention_bwd, "IIIIIIIIiiOOOw", "Gradients of attention, with the scores computed again.")  \
    X(swiglu, "IOioow", "h = silu(gate) * up.")                                                    \
    X(swiglu_bwd, "IIOoiiouiuiow", "Gradient of swiglu with respect to gate and up.")              \
    X(head_loss, "IIIIiOouw",                                                                      \
      "Vocabulary logits and cross-entropy, chunk by chunk, for labelled rows only.")              \
    X(sum, "IUw", "Adds all elements to one float64.")                                             \
    X(sumsq, "IUw", "Adds the squares of all elements to one float64.")                            \
    X(fill, "O", "Writes one value everywhere.")                                                   \
    X(copy, "IO", "Copies rows, changing the dtype where asked.")                                  \
    X(gather_rows, "IIO", "Picks rows by index.")                                                  \
    X(scatter_rows, "IIU", "Writes rows to the places an index names.")                            \
    X(clip_scale, "IUoi",                                                                          \
      "From the sum of squares, the factor that brings gradients to mean and limit.")              \
    X(adamw, "UIUUIo", "One AdamW update of a flat range of parameters.")                          \
    X(adamw_8bit, "UIUUUUIo", "AdamW with its moments in 8 bits, a scale for every 256 of them.")  \
    X(sgd, "UIuIo", "One step against the gradient, with momentum where there is some.")           \
    X(nf4_quantise, "IOOOOw", "Stores a weight in 4 bits a number, and the scales in 8.")          \
    X(nf4_dequantise, "IIIIO",                                                                     \
      "Makes a 4-bit weight float32 again, for the product that follows.")                         \
    X(offload, "IO", "Copies rows to the host's memory, beside the ops that follow.")              \
    X(fetch, "IO", "Brings rows back from the host's memory, beside the ops that follow.")         \
    X(await, "U", "Waits until the copies to and from the host's memory have arrived.")            \
    X(fp8_quantise, "IOOw", "Stores a weight in 8 bits a number, each row with its scale.")        \
    X(fp8_turn, "IO", "Turns an 8-bit weight round, as the product of the backward reads it.")     \
    X(allreduce, "U", "Sums a buffer over all workers; run by the collective, not the backend.")

typedef enum pml_op {
#define PML_OP_ENUM(name, signature, sentence) PML_OP_##name,
    PML_OPS(PML_OP_ENUM) PML_OP_COUNT
#undef PML_OP_ENUM
} pml_op;

enum { PML_OP_MAX_VIEWS = 17, PML_LINEAR_MAX_PARTS = 3 };

/* y[t,:] = table[ids[t],:].   ids [1,T] I32; table [V,H]; y [T,H], in the table's dtype or another
 * of floats. */
typedef struct pml_embed_args {
    pml_view ids, table, y;
} pml_embed_args;

/* dtable[ids[t],:] += dy[t,:].  dy [T,H]; dtable [V,H] F32. A row's tokens are added in an order
 * that depends on ids alone. */
typedef struct pml_embed_bwd_args {
    pml_view ids, dy, dtable, ws;
} pml_embed_bwd_args;

/* sum = x + add (or x where add is absent);  rstd = 1/sqrt(mean(sum^2) + eps);
 * y = sum * rstd * weight.   x, add, sum, y [T,H]; rstd [1,T] F32; weight [1,H], in y's dtype or in
 * F32: one that is trained is near 1, where numbers of 16 bits are further apart than many steps.
 * x may be in F32, too, with a weight in F32: rows of a table that is trained, whose rounding would
 * stand still for as many steps. sum may be the same memory as add or, in its dtype, x, and is left
 * out when add is absent. The residual add is fused because together they read x once instead of
 * twice; the op is bound by memory: 2 reads + 2 writes of T*H. */
typedef struct pml_rmsnorm_args {
    pml_view x, add, weight, sum, y, rstd;
    float eps;
} pml_rmsnorm_args;

/* dx = d(rmsnorm)/d(sum) applied to dy, + dres.   x is the forward's sum, in dy's dtype or, with a
 * weight in F32, in F32.
 * dx may be the same memory as dres or dy. dweight [1,H] F32, which needs a weight in F32, is added
 * to.
 * Where dy is F16, dres and dx may be F32 (a gradient that all layers add to outgrows F16's range);
 * rounded [T,H], where given, receives dx in dy's dtype, for products to read, and may be the same
 * memory as dy. */
typedef struct pml_rmsnorm_bwd_args {
    pml_view dy, x, weight, rstd, dres, dx, rounded, dweight, ws;
} pml_rmsnorm_bwd_args;

/* Each head of queries and keys on its own:  rstd = 1/sqrt(mean(x_h^2) + eps),
 * y_h = x_h * rstd * weight, with q_weight for the first `heads`, k_weight for the kv_heads after
 * them.  x, y [T, (heads+kv_heads)*head_dim]; weights [1,head_dim], both in x's dtype or both F32;
 * rstd [T, heads+kv_heads] F32.
 */
typedef struct pml_head_norm_args {
    pml_view x, q_weight, k_weight, y, rstd;
    int32_t heads, kv_heads, head_dim;
    float eps;
} pml_head_norm_args;

/* dx = d(head_norm)/dx applied to dy; may be the same memory as dy. dq_weight, dk_weight
 * [1,head_dim] F32 are added to, both or neither given. */
typedef struct pml_head_norm_bwd_args {
    pml_view dy, x, q_weight, k_weight, rstd, dx, dq_weight, dk_weight, ws;
    int32_t heads, kv_heads, head_dim;
} pml_head_norm_bwd_args;

/* A linear layer made of up to three parts that share one input (q,k,v or gate,up), their weights
 * stacked row on row:
 *
 *      w [N,K] = | w_0 [N_0,K] |      a [R,K] = | a_p |  one block of `rank` rows for each part p
 *                | w_1 [N_1,K] |                | ... |  whose bit is set in lora_parts, in order;
 *                | w_2 [N_2,K] |                         R = rank * (bits set)
 *
 *      b [Nb,rank]: the b_p of those parts stacked, Nb = the sum of their N_p.
 *
 * y_p = x w_p^T + bias_p + u_p b_p^T,   u_p = lora_scale[p] * x a_p^T.   x [T,K]; y [T,N];
 * bias [1,N]; u [T,R] is kept for the backward (absent: the backend may use ws); with u_made it is
 * read, made before by who had x in hand (swiglu).
 * u carries the scale, so that with u behind x and b behind w the whole layer is one product
 * [x|u] [w|b]^T. border > 0 gives room for that: so many columns behind every row of x and w, and
 * as many rows (as long as w's) below w, are the op's to write; what they hold before and after
 * means nothing, and no other operand lies there.
 * lora_dropout > 0 masks the x that enters the LoRA branch: element (t,c) of part p's input is
 * multiplied by pml_dropout_keep(least) where number c % 8 of 16 bits of
 *
 *      pml_philox_at(rng.seed, rng.step, lora_purpose + p, places[t] * ceil(K/8) + c / 8)
 *
 * is >= least = pml_dropout_least(lora_dropout), and by 0 elsewhere. rng [1,2] I64 = seed, step;
 * places [1,T] I64: which token of the data t is. So a token's mask is the same wherever it lies:
 * packed or not, in whichever micro-batch, on whichever worker, and when it is computed again.
 * w_scale [1,N] F32: w is U8 and holds what fp8_quantise made of the weight. Then x enters the
 * product with w, and only that one, in 8 bits, too, each token's row with its own scale: the least
 * power of two that is no less than top / 448, or a larger one where a backend needs it, under
 * which all codes but the smallest mean the same. So what a token gets does not depend on those
 * around it. border is then room behind the rows of w alone.
 * x_scale [T,P] F32: x is U8 and holds such codes already, in pieces (below), made by who had x in
 * hand (swiglu); it has a border, too. u, where there is an adapter, is made then. A backend may
 * bring a row's pieces to one scale, where they lie: what x and x_scale hold after means nothing.
 */
typedef struct pml_linear_args {
    pml_view x, w, w_scale, bias, a, b, rng, places, y, u, x_scale, ws;
    int32_t parts;                           /* 1..3 */
    int32_t part_cols[PML_LINEAR_MAX_PARTS]; /* N_p, sum = N */
    uint32_t lora_parts;                     /* bit p: part p has an adapter */
    int32_t rank;
    float lora_scale[PML_LINEAR_MAX_PARTS]; /* of the parts that have an adapter */
    float lora_dropout;
    uint32_t lora_purpose;
    int32_t border;
    int32_t u_made;
} pml_linear_args;

/* Given dy [T,N]:
 *   v_p = lora_scale[p] * dy_p b_p                  [T,R], written where somebody else wants it
 *   dx (written) = dy w + v a                       [T,K], absent where nobody needs it
 *   dw += dy^T x    dbias += sum_t dy               absent when frozen
 *   da += v^T x     db_p += dy_p^T u_p              absent when no adapter
 * dw, dbias, da, db are F32. u is the forward's. A frozen weight never costs a dw product; x is
 * needed by dw and da only: who has x again only after dx asks in two calls, and hands v from one
 * to the other. border > 0: as in the forward, behind dy and w, and below w; so that
 * dx = [dy|v] [w;a] can be one product; v may lie in dy's border, from its first column on. kept
 * says what is there, as many rows long, since an earlier op made it from the same operands.
 * w_scale: as in the forward, with no dw; then dx = round(dy w_scale) codes + v a, where dy's
 * columns are multiplied by the weight's scales, in float32, before its rows are rounded to 8 bits.
 * w are the codes turned round, [K,N] (fp8_turn), with the border behind its rows; absent with dx.
 * dy_scale: dy is U8 and holds that already, the weight's scales in it, in pieces of each part, all
 * of which are as wide; all else as in the forward. Then there is no db and no dbias, and v, where
 * there is an adapter, is made. */
enum {
    PML_BORDER_OF_W = 1, /* a and b in w's border, by the forward: not needed again */
    PML_V_MADE = 2,      /* v, which is given: it is read */
};
typedef struct pml_linear_bwd_args {
    pml_view dy, x, w, w_scale, a, b, u, rng, places, dx, dw, dbias, da, db, v, dy_scale, ws;
    int32_t parts;
    int32_t part_cols[PML_LINEAR_MAX_PARTS];
    uint32_t lora_parts;
    int32_t rank;
    float lora_scale[PML_LINEAR_MAX_PARTS]; /* of the parts that have an adapter */
    float lora_dropout;
    uint32_t lora_purpose;
    int32_t border;
    uint32_t kept; /* PML_BORDER_OF_W, PML_V_MADE */
} pml_linear_bwd_args;

/* Rotary position embedding in place, halves layout (as transformers): for every head of x and
 * i < head_dim/2, with c = table[pos, i], s = table[pos, head_dim/2 + i]:
 *   (x_i, x_{i+hd/2}) -> (x_i c - x_{i+hd/2} s,  x_{i+hd/2} c + x_i s)
 * x [T, heads*head_dim] (queries and keys side by side: the front of a fused q,k,v buffer);
 * pos [1,T] I32; table [P, head_dim] F32, attention scaling (yarn) folded in.
 * inverse: the transpose, for the backward, where attention_bwd is not given pos and table.
 * Su et al., RoFormer, 2021. */
typedef struct pml_rope_args {
    pml_view x, pos, table;
    int32_t heads, head_dim;
    int32_t inverse;
} pml_rope_args;

/* Causal attention within documents, without a T x T matrix (Dao et al., FlashAttention, 2022):
 * query i of document d sees the keys j of d with  j <= i + (len_k - len_q)  and, when
 * window > 0, j > i + (len_k - len_q) - window.  Query head h uses key head h / (heads / kv_heads).
 *   q [Tq, heads*head_dim]; k, v [Tk, kv_heads*head_dim]; cu_q, cu_k [1, D+1] I32, first 0,
 *   not descending; slots may be empty. o like q; lse [heads, Tq] F32 = log sum exp of the scaled
 *   scores. Rows of q outside every document get o = 0 and lse = 0. Training passes the same cu
 *   twice; sampling passes cached keys. */
typedef struct pml_attention_args {
    pml_view q, k, v, cu_q, cu_k, o, lse, ws;
    int32_t heads, kv_heads, head_dim;
    int32_t window; /* 0: none */
    int32_t max_q;  /* no document has more queries than this */
    int32_t equal;  /* each has as many, and cu_q says nothing new: there may be a faster way */
    float scale;
} pml_attention_args;

/* dq, dk, dv written (not added), zero outside every document. Same shapes as q, k, v. o and lse
 * are those of the forward of the same q, k, v. The dq of a query that sees one key is zero: in the
 * CPU reference exactly, elsewhere to rounding.
 * pos [1,T] I32 and table [P, head_dim] F32, both or neither, as rope has them: q and k were turned
 * by them, and dq and dk are the gradients of what was there before: turned back by the same
 * angles, before they are rounded where a backend has them in hand. Only where q and k have the
 * same rows, all T; pos names a row of the table for those outside every document as well, whose
 * gradients stay zero. */
typedef struct pml_attention_bwd_args {
    pml_view dout, q, k, v, o, lse, cu_q, cu_k, pos, table, dq, dk, dv, ws;
    int32_t heads, kv_heads, head_dim;
    int32_t window;
    int32_t max_q;
    int32_t equal;
    float scale;
} pml_attention_bwd_args;

/* gate_up [T, 2I] = gate | up;  h [T,I] = gate * sigmoid(gate) * up.
 * Shazeer, "GLU variants improve transformer", 2020.
 * a [R,I] and u [T,R], both or neither: u = lora_scale * h a^T, what the linear layer that h goes
 * to wants first (its u; no dropout), made while h is in hand.
 * h_scale [T,P] F32: h is U8, and in pieces of 8 bits (below) as that layer multiplies it; u is
 * made of h before that. */
typedef struct pml_swiglu_args {
    pml_view gate_up, h, a, u, h_scale, ws;
    float lora_scale;
} pml_swiglu_args;

/* dgate_up [T,2I]; may be the same memory as gate_up. h, where given, is what swiglu made of
 * gate_up, bit for bit; may be the same memory as dh. So h need not be kept from the forward on: to
 * write it here costs one pass over it, where kept it would be the largest of all activations but
 * gate_up.
 * What the linear layers on both sides want of their adapters while dgate, dup and h are in hand,
 * so that none of them is read a second time for it: db given: v and db of gate_up, as linear_bwd
 * has them for dy = dgate_up, of two parts of I columns each. u [T,R], v [T,R] (may lie behind
 * dgate_up's rows), b, db [Nb,rank]. da given: da += v_down^T h, the next layer's (no dropout).
 * v_down [T,Rd], da [Rd,I] F32. scale [T,2P] F32: dgate_up is U8, and in pieces of 8 bits as that
 * layer's backward multiplies it, times w_scale [1,2I] first; the pieces of dgate before those of
 * dup. It is then not gate_up's memory, and v lies elsewhere. v, db are made of dgate and dup
 * before that. */
typedef struct pml_swiglu_bwd_args {
    pml_view dh, gate_up, dgate_up, h, u, b, v, db, v_down, da, w_scale, scale, ws;
    uint32_t lora_parts; /* bit 0: gate has an adapter, bit 1: up; 0 without db */
    int32_t rank;
    float lora_scale[2];
} pml_swiglu_bwd_args;

/* For each labelled row r: logits = x[rows[r],:] w^T,
 * loss[r] = logsumexp(logits) - logits[label[r]].
 * With dx: dx[rows[r],:] = scale * (softmax - onehot) w, all other rows 0 (dx is written whole);
 * with dw: dw += scale * (softmax - onehot)^T x.  The gradient is of the SUM of losses: the mean
 * over the global batch is taken once, in clip_scale, when every worker's count is known.
 * x [T,H]; w [V,H]; rows, labels [1,L] I32; scale [1,1] F32 (absent = 1; the loss scale);
 * loss [1,L] F32; dw F32. Only `chunk` rows of logits exist at a time. rows < 0: empty slot,
 * loss 0. Rows are distinct. */
typedef struct pml_head_loss_args {
    pml_view x, w, rows, labels, scale, loss, dx, dw, ws;
    int32_t chunk;
} pml_head_loss_args;

/* total[0] += sum of x's elements, in index order blocks.  x any shape F32; total [1,1] F64. */
typedef struct pml_sum_args {
    pml_view x, total, ws;
} pml_sum_args;

/* total[0] += sum of squares of x's elements. */
typedef struct pml_sumsq_args {
    pml_view x, total, ws;
} pml_sumsq_args;

typedef struct pml_fill_args {
    pml_view y;
    double value;
} pml_fill_args;

/* y = x, same shape, dtypes may differ (round to nearest even). */
typedef struct pml_copy_args {
    pml_view x, y;
} pml_copy_args;

/* y[i,:] = x[index[i],:].   index [1,n] I32. */
typedef struct pml_gather_rows_args {
    pml_view x, index, y;
} pml_gather_rows_args;

/* y[index[i],:] = x[i,:].   index [1,n] I32, distinct; index < 0: skipped. */
typedef struct pml_scatter_rows_args {
    pml_view x, index, y;
} pml_scatter_rows_args;

/* What changes from step to step and is read on the device, so that a captured graph stays valid.
 * A [1, PML_HYPER_COUNT] F32 view uploaded once a step; one for each parameter group. */
typedef enum pml_hyper {
    PML_HYPER_LR = 0,
    PML_HYPER_ONE_MINUS_BETA1, /* 1 - beta, not beta: 1 - 0.999f is 1.3e-5 off from 0.001f, */
    PML_HYPER_ONE_MINUS_BETA2, /* while 1 - 0.001f is 0.999f exactly                        */
    PML_HYPER_EPS,
    PML_HYPER_WEIGHT_DECAY,
    PML_HYPER_BIAS1,      /* 1 - beta1^t */
    PML_HYPER_BIAS2,      /* 1 - beta2^t */
    PML_HYPER_MEAN,       /* 1 / labelled tokens of the global batch (and / loss scale) */
    PML_HYPER_MAX_NORM,   /* clipping limit; <= 0: none */
    PML_HYPER_GRAD_SCALE, /* written by clip_scale, read by adamw and sgd; NaN: no update */
    PML_HYPER_MOMENTUM,   /* of sgd */
    PML_HYPER_NEW_GRAD,   /* 1 - dampening; 1 in the first update, as torch begins its buffer */
    PML_HYPER_COUNT
} pml_hyper;

/* norm = sqrt(sumsq) * MEAN;  GRAD_SCALE = MEAN * min(1, MAX_NORM / (norm + 1e-6)) as
 * torch.nn.utils.clip_grad_norm_.  hyper [groups, PML_HYPER_COUNT] F32: MEAN and MAX_NORM of row 0
 * are read, GRAD_SCALE of every row written. norm [1,1] F32 receives the norm before clipping. A
 * norm that is not finite, or a loss [1,1] F64 that is not, makes GRAD_SCALE a NaN: adamw,
 * adamw_8bit and sgd then leave all their operands as they are, so that a step is skipped without
 * asking the host.
 */
typedef struct pml_clip_scale_args {
    pml_view sumsq, hyper, norm, loss;
} pml_clip_scale_args;

/* torch.optim.AdamW (Loshchilov & Hutter, 2019), g = grad * GRAD_SCALE (NaN: nothing is written):
 *   p *= 1 - LR*WEIGHT_DECAY;  m = m + (g - m)(1-beta1);  v = beta2 v + (1-beta2) g^2
 *   p -= LR/BIAS1 * m / (sqrt(v)/sqrt(BIAS2) + EPS)
 * p, g, m, v [1,n] F32, hyper one row; copy [1,n], when given, receives p in its own dtype. */
typedef struct pml_adamw_args {
    pml_view p, g, m, v, hyper, copy;
} pml_adamw_args;

/* AdamW with moments of 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
 * 2022), as bitsandbytes has them: blocks of 256 elements, the last may be shorter. A moment is
 *
 *   map[code] * largest[block]      map: pml_dynamic_map, of either sign for m, from 0 up for v
 *
 * and is made float32, updated as adamw updates it, and stored anew: largest = the block's largest
 * magnitude, code = the nearest of map to moment * (1 / largest), the lower of two equally near;
 * all 0 where largest is below FLT_MIN. An m that is negative never gets the code of 0, but the one
 * below. Each product is rounded by itself or fused where ref/adamw_8bit.c says so: the bits of the
 * CPU reference are those of every backend. p, g [1,n] F32; m, v [1,n] U8; m_largest, v_largest [1,
 * ceil(n/256)] F32; copy as in adamw. Codes may be anything where largest is 0. */
enum { PML_ADAMW_8BIT_BLOCK = 256 };

typedef struct pml_adamw_8bit_args {
    pml_view p, g, m, v, m_largest, v_largest, hyper, copy;
} pml_adamw_8bit_args;

/* torch.optim.SGD (Sutskever et al., "On the importance of initialization and momentum", 2013),
 * g = grad * GRAD_SCALE + WEIGHT_DECAY * p:
 *   m = MOMENTUM m + NEW_GRAD g;   d = nesterov ? g + MOMENTUM m : m   (without m: d = g)
 *   p -= LR d
 * p, g, m [1,n] F32, hyper one row; copy as in adamw. */
typedef struct pml_sgd_args {
    pml_view p, g, m, hyper, copy;
    int32_t nesterov; /* needs m */
} pml_sgd_args;

/* NF4 with double quantisation (Dettmers et al., QLoRA, 2023), in bitsandbytes' layout. The n
 * elements of x, row after row, in blocks of 64: each is the nearest of 16 values times its block's
 * largest magnitude, two to a byte, the first in the high half. Those magnitudes, less their mean,
 * are stored likewise, in 8 bits and blocks of 256.
 *
 *   value = nf4[code] * (dynamic[absmax[b]] * nested[b/256] + offset)
 *
 * x [N,K] without border, n = N*K; codes [1, ceil(n/2)] U8; absmax [1, B] U8, B = ceil(n/64);
 * nested [1, ceil(B/256)] F32; offset [1,1] F32, the mean. grid > 0: a magnitude is first rounded
 * to that many steps over [-1, 1], as bitsandbytes does on the CPU (65535); 0: not, as it does on
 * CUDA.
 */
typedef struct pml_nf4_quantise_args {
    pml_view x, codes, absmax, nested, offset, ws;
    int32_t grid;
} pml_nf4_quantise_args;

enum { PML_NF4_BLOCK = 64, PML_NF4_NESTED = 256, PML_NF4_GRID = 65535 };
enum { PML_NF4_VALUES = 16, PML_DYNAMIC_CODES = 256 };

/* What the codes of elements mean; and 8-bit codes, ascending from -1 (exclusive) or 0 to 1: of
 * their blocks' magnitudes (signed), and of 8-bit moments. */
extern const float pml_nf4_values[PML_NF4_VALUES];
void pml_dynamic_map(bool is_signed, float map[PML_DYNAMIC_CODES]);

/* y [N,K] without border, of up to three weights of K columns stacked row on row, each quantised by
 * itself: what belongs to them lies end to end in codes, absmax and nested; offset [1,parts]. The
 * multiplications and the addition are rounded one by one. */
typedef struct pml_nf4_dequantise_args {
    pml_view codes, absmax, nested, offset, y;
    int32_t parts;
    int32_t part_rows[PML_LINEAR_MAX_PARTS]; /* sum = N */
} pml_nf4_dequantise_args;

/* Row by row to 8 bits: value = e4m3(code) * scale, with top = the row's largest magnitude, but no
 * less than 2^-8 of the largest of all rows',
 *
 *   scale = top / 448;   code = the E4M3 nearest to x * (448 / top), ties to even.
 *
 * E4M3 (Micikevicius et al., "FP8 formats for deep learning", 2022): 4 bits of exponent, 3 of
 * fraction, no infinity; 0x7f is NaN. So no two scales are further apart than that, which what
 * is added to the product in the same scales counts on (kernels/cuda/fp8.h). A weight whose top is
 * below 2^-100 is zeros with scales of 1; where there is an infinity all is NaN, and a NaN is the
 * one element that it is. x [N,K]; codes [N,K] U8; scale [1,N] F32. The bits are the same on every
 * backend. */
typedef struct pml_fp8_quantise_args {
    pml_view x, codes, scale, ws;
} pml_fp8_quantise_args;

/* y [K,N] = x [N,K]^T, of codes: products of 8 bits want both factors' rows along the sum. */
typedef struct pml_fp8_turn_args {
    pml_view x, y;
} pml_fp8_turn_args;

/* Rows in 8 bits in pieces of so many columns, of which the last may be short, so that who makes a
 * few columns of many rows at a time can round them: a scale each, the least power of 2^4 that is
 * no less than top / 448. So most of a row's pieces have the same one. Where top is below 2^-100 it
 * is 0. [T,N] has [T,P] scales, P = pml_fp8_pieces(N). */
enum { PML_FP8_PIECE = 256 };
static inline int64_t pml_fp8_pieces(int64_t n)
{
    return n / PML_FP8_PIECE + (n % PML_FP8_PIECE != 0);
}

/* Products of 8-bit numbers come in whole units of so many rows and columns of a weight. */
enum { PML_FP8_UNIT = 16 };
/* What the border of a weight in 8 bits must have for each of u's columns. */
enum { PML_FP8_COLUMNS = 3 };
#define PML_E4M3_MOST 448.0F

/* What a code means, and the code of a number of at most PML_E4M3_MOST in magnitude; what is beyond
 * gets the last one. */
float pml_e4m3_value(uint8_t code);
uint8_t pml_e4m3_code(float x);

/* Lengths of codes, absmax and nested for a weight of n elements. */
static inline int64_t pml_nf4_codes(int64_t n)
{
    return n / 2 + n % 2;
}

static inline int64_t pml_nf4_blocks(int64_t n)
{
    return n / PML_NF4_BLOCK + (n % PML_NF4_BLOCK != 0);
}

static inline int64_t pml_nf4_nested(int64_t n)
{
    int64_t blocks = pml_nf4_blocks(n);
    return blocks / PML_NF4_NESTED + (blocks % PML_NF4_NESTED != 0);
}

/* y = x beside the ops that follow it on the queue: y lies in a block of the backend's host_alloc.
 * Ops before it are done with x; those after it may read x, and neither write x nor touch y before
 * an await. Same shape and dtype. */
typedef struct pml_offload_args {
    pml_view x, y;
} pml_offload_args;

/* The same the other way: x lies in such a block, y in the arena. */
typedef struct pml_fetch_args {
    pml_view x, y;
} pml_fetch_args;

/* Every offload and fetch put on the queue before it is done for the ops after it. x names the
 * device's side of one of them, so that its place is nobody else's until then. A recording is ended
 * with all of them awaited. */
typedef struct pml_await_args {
    pml_view x;
} pml_await_args;

/* x [1,n] F32 or F64, summed over ranks in rank order. */
typedef struct pml_allreduce_args {
    pml_view x;
} pml_allreduce_args;

typedef union pml_op_args {
#define PML_OP_MEMBER(name, signature, sentence) pml_##name##_args name;
    PML_OPS(PML_OP_MEMBER)
#undef PML_OP_MEMBER
} pml_op_args;

typedef struct pml_op_info {
    const char *name;
    const char *signature; /* one letter an operand, see PML_OPS */
    const char *sentence;
    const char *const *operands; /* operand names, n_views of them */
    int n_views;
} pml_op_info;

/* Static description of an op; NULL for a value outside the enum. */
const pml_op_info *pml_op_describe(pml_op op);

/* Where an operand stands among its op's views: PML_OPERAND(linear, w) is 1. */
#define PML_OPERAND(op, name) ((int)(offsetof(pml_##op##_args, name) / sizeof(pml_view)))

/* The operands of args as an array of pml_op_describe(op)->n_views views. */
static inline pml_view *pml_op_views(pml_op_args *args)
{
    return (pml_view *)(void *)args;
}

#ifdef __cplusplus
}
#endif
#endif
