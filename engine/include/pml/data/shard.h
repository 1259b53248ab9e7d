/* Token shard: tokenised rows in one safetensors file, written by pantheraml.data.prepare.
 *
 *   input_ids  I32 [tokens]     all rows end to end
 *   labels     I32 [tokens]     -100 = no loss; same position as the id it belongs to (not shifted)
 *   offsets    I64 [rows + 1]   where each row begins; first 0, ascending, last = tokens
 *   metadata: {"format": "pml-shard-1", "max_id": "…", "source": "…"}
 *
 * Tokens are read when they are asked for: files may be larger than memory, and one that is cut
 * short meanwhile is an error that names file and byte. */
#ifndef PML_DATA_SHARD_H
#define PML_DATA_SHARD_H

#include <stdint.h>

#include "pml/base/error.h"

typedef struct pml_shard pml_shard;

/* Whether the file is what was written, by the line of b2sum -l 256 in `path`.b2sum that was made
 * with it. PML_CORRUPT names what is damaged or missing, and what to do. */
pml_status pml_shard_verify(const char *path, pml_error *err);

/* Every offset is checked, and every id against vocab, before the first row is given out;
 * PML_INVALID names the row of an id >= vocab or < 0, PML_CORRUPT a damaged file. */
pml_status pml_shard_open(const char *path, int32_t vocab, pml_shard **shard, pml_error *err);
void pml_shard_close(pml_shard **shard);

/* Rows, and tokens of all of them. */
int64_t pml_shard_rows(const pml_shard *shard);
int64_t pml_shard_tokens(const pml_shard *shard);

/* Tokens of row i. */
int32_t pml_shard_length(const pml_shard *shard, int64_t row);

/* Tokens before row i. */
int64_t pml_shard_offset(const pml_shard *shard, int64_t row);

/* Tokens [first, first + n) of the shard, across rows: ids and labels [n], either NULL where it is
 * not wanted. Errors as pml_file_at_read. */
pml_status pml_shard_read(const pml_shard *shard, int64_t first, int64_t n, int32_t *ids,
                          int32_t *labels, pml_error *err);

#endif
