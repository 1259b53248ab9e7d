/* Borders: room behind the rows of a linear layer's activations and behind and below its weight,
 * in which the low-rank factors stand so that a layer with adapters is one product.
 *
 *            K      border                      N      border
 *        ┌───────┬────┐                     ┌───────┬────┐
 *     T  │   x   │ u  │                  T  │  dy   │ v  │
 *        └───────┴────┘                     └───────┴────┘
 *        ┌───────┬────┐
 *     N  │   w   │ b  │   y  = [x|u] [w|b]^T      inner dimension K + columns
 *        ├───────┼────┘
 * border │   a   │        dx = [dy|v] [w;a]       inner dimension N + columns
 *        └───────┘
 *
 * With several parts b is block diagonal: a part's rows have zeros where another's u stands. */
#ifndef PMLI_CUDA_BORDER_H
#define PMLI_CUDA_BORDER_H

#include "pml_op/backend.h"

enum {
    /* A border is whole multiples of this: rows of 128 bytes more keep what the products gain from
     * aligned rows (16 columns instead cost up to 1.7%), and one more step of their inner loop is
     * 64 deep, so that fewer columns are not cheaper. */
    PMLI_BORDER = 64,
    /* Below so many tokens writing the weight's border costs more than it saves. */
    PMLI_BORDER_TOKENS = 64
};

/* The operands of either op that stand in borders. */
typedef struct pmli_bordered {
    const pml_view *x, *w, *a, *b, *u; /* x: dy in the backward; u may be NULL */
    const int32_t *part_cols;
    int32_t parts, rank, border;
    uint32_t lora_parts;
} pmli_bordered;

/* Columns of the border that products read: those of all adapters, in units that keep inner
 * dimensions aligned; the rest of a unit is zeros. 0: the border is absent, or does not pay. */
int64_t pmli_border_columns(const pmli_bordered *s);

/* Fill w's border with a and b, and x's with u, where it is given, and zeros behind; u may stand
 * there already. */
pml_status pmli_border_fill(pml_queue *queue, const pmli_bordered *s, pml_error *err);

#endif
