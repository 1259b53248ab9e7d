/* Sampler: which rows make up which micro-batch, as a pure function of (options, cursor).
 *
 * Rows come from a token shard (pml/data/shard.h). With packing, rows are first laid into bins of
 * max_length tokens (best fit decreasing, rows kept whole, one document a row); a bin then counts
 * as a row. Each epoch has its own order: Philox(seed, epoch) permutation, or the file's order with
 * shuffle = false. With group_by_length the permutation is cut into runs of up to 50 steps, each
 * sorted by length, the longest row of the epoch first (transformers' LengthGroupedSampler): a
 * micro-batch has rows of about one length, and what does not fit in memory comes first.
 *
 *   epoch:  | micro 0 | micro 1 | micro 2 | …      micro = batch_size rows; the last may be smaller
 *
 *   the step at a cursor, accumulation index a, rank r:   micro  cursor.micro + a * world + r
 *
 * as Hugging Face's Trainer: a step does not cross an epoch's end, the last step of an epoch may
 * have fewer micro-batches, a rank beyond the end gets an empty batch (n_tokens = 0).
 *
 * A row without anything to learn still takes its place, as it does there. */
#ifndef PML_DATA_SAMPLER_H
#define PML_DATA_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "pml/data/batch.h"
#include "pml/data/shard.h"

typedef struct pml_sampler pml_sampler;

typedef struct pml_sampler_options {
    int32_t batch_size; /* rows (or bins) a micro-batch */
    int32_t accumulation;
    int32_t world, rank;
    int32_t max_length; /* rows longer than this are cut (counted in rows_cut) */
    bool packing, shuffle, group_by_length;
    uint64_t seed;
} pml_sampler_options;

/* Where training stands in the data: the next step to be drawn. Saved in checkpoints. It counts
 * micro-batches, not steps, so that accumulation (or the number of workers) can change within an
 * epoch and no row is skipped or seen twice. */
typedef struct pml_cursor {
    int64_t epoch;
    int64_t micro; /* micro-batches of this epoch already drawn, over all ranks */
} pml_cursor;

/* shard must outlive the sampler. PML_INVALID when no row has a label. */
pml_status pml_sampler_new(const pml_shard *shard, const pml_sampler_options *options,
                           pml_sampler **sampler, pml_error *err);
void pml_sampler_destroy(pml_sampler **sampler);

/* With the accumulation in force now. */
int64_t pml_sampler_steps_per_epoch(const pml_sampler *sampler);
int64_t pml_sampler_rows(const pml_sampler *sampler); /* rows or bins of an epoch */
int64_t pml_sampler_rows_cut(const pml_sampler *sampler);

/* Greatest tokens, documents and labels of any micro-batch, each on its own: what the plan must
 * have room for. */
void pml_sampler_bounds(const pml_sampler *sampler, int32_t *tokens, int32_t *docs,
                        int32_t *labels);

/* Tokens of the longest document after cutting. */
int32_t pml_sampler_max_doc(const pml_sampler *sampler);

/* Micro-batches of this rank in the step at cursor (fewer at an epoch's end; 0 for a cursor that is
 * not in the data, which pml_sampler_batch refuses with PML_INVALID). */
int32_t pml_sampler_micros(const pml_sampler *sampler, pml_cursor cursor);

/* Micro-batch `index` (0-based) of the step at cursor for this rank. The batch points into the
 * sampler's own buffers, valid until the next call. Never allocates. Errors as pml_file_at_read,
 * too: rows are read here. */
pml_status pml_sampler_batch(pml_sampler *sampler, pml_cursor cursor, int32_t index,
                             pml_batch *batch, pml_error *err);

/* What this rank has in the step at cursor, its share of the header collective, without drawing it.
 */
typedef struct pml_share {
    int64_t labels, tokens; /* labelled ones, and all of them */
} pml_share;
pml_share pml_sampler_share(pml_sampler *sampler, pml_cursor cursor);

/* The cursor after the step at `cursor`, drawn with the accumulation in force now. */
pml_cursor pml_sampler_next(const pml_sampler *sampler, pml_cursor cursor);

/* Accumulation may be tuned while running; takes effect at the next step drawn. */
pml_status pml_sampler_set_accumulation(pml_sampler *sampler, int32_t accumulation, pml_error *err);

#endif
