/* Batch: rows of tokens laid end to end, ready to be uploaded. No padding between documents.
 *
 *   ids        [ d0 d0 d0 d1 d1 d2 d2 d2 d2 ]   n_tokens
 *   positions  [ 0  1  2  0  1  0  1  2  3  ]
 *   places     [ 7  8  9 20 21  0  1  2  3  ]   where each token stands in the shard, its own for
 *                                               ever: what dropout's masks are drawn by
 *   cu_seqlens [ 0        3     5           9 ]  n_docs + 1
 *   label_rows: the token rows whose NEXT token is learned; labels: that next token's id.  n_labels
 *
 * Labels are shifted here, once, so that nothing downstream shifts: a row's last token and a token
 * whose successor is -100 have none. */
#ifndef PML_DATA_BATCH_H
#define PML_DATA_BATCH_H

#include <stdint.h>

#include "pml/base/error.h"

typedef struct pml_batch {
    int32_t n_tokens, n_docs, n_labels;
    int32_t max_doc; /* tokens of the longest document */
    const int32_t *ids, *positions, *cu_seqlens, *label_rows, *labels;
    const int64_t *places; /* NULL: nobody asks (no dropout) */
} pml_batch;

/* Every index inside its bounds: 0 <= id < vocab, positions < max_positions (length of
 * the planned table of angles), cu ascending from 0 to
 * n_tokens, label rows distinct and ascending. Names the first offence. */
pml_status pml_batch_check(const pml_batch *batch, int32_t vocab, int32_t max_positions,
                           pml_error *err);

#endif
