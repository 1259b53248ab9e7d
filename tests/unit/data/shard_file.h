/* A token shard made from a list of row lengths, for tests of the shard and the sampler. */
#ifndef TESTS_SHARD_FILE_H
#define TESTS_SHARD_FILE_H

#include "scratch.h"

#include "pml/data/shard.h"
#include "pml/model/safetensors.h"

enum { SHARD_VOCAB = 1 << 20 };

/* Any three vectors as a shard file, right or wrong. */
static inline void put_shard(const char *path, const int32_t *ids, const int32_t *labels,
                             int64_t tokens, const int64_t *offsets, int64_t rows)
{
    pml_safetensors_writer *w = NULL;
    int64_t ends = rows + 1;
    EXPECT_OK(pml_safetensors_writer_new(path, 0600, &w, e));
    EXPECT_OK(pml_safetensors_writer_metadata(w, "format", "pml-shard-1", e));
    EXPECT_OK(pml_safetensors_writer_add(w, "offsets", PML_I64, &ends, 1, e));
    EXPECT_OK(pml_safetensors_writer_add(w, "input_ids", PML_I32, &tokens, 1, e));
    EXPECT_OK(pml_safetensors_writer_add(w, "labels", PML_I32, &tokens, 1, e));
    EXPECT_OK(pml_safetensors_writer_write(w, offsets, (size_t)ends * sizeof *offsets, e));
    EXPECT_OK(pml_safetensors_writer_write(w, ids, (size_t)tokens * sizeof *ids, e));
    EXPECT_OK(pml_safetensors_writer_write(w, labels, (size_t)tokens * sizeof *labels, e));
    EXPECT_OK(pml_safetensors_writer_finish(w, e));
    pml_safetensors_writer_destroy(&w);
}

/* Row r has lengths[r] tokens; token t of row r has id r * 1000 + t and itself as label, except
 * that a token with (r + t) % 5 == 4 is not learned. */
static inline pml_shard *made_shard(const char *name, const int32_t *lengths, int64_t rows)
{
    int64_t tokens = 0, *offsets = calloc((size_t)rows + 1, sizeof *offsets);
    assert_non_null(offsets);
    for (int64_t r = 0; r < rows; r++)
        offsets[r + 1] = tokens += lengths[r];
    int32_t *ids = calloc((size_t)tokens, sizeof *ids);
    int32_t *labels = calloc((size_t)tokens, sizeof *labels);
    assert_true(ids != NULL && labels != NULL);
    for (int64_t r = 0; r < rows; r++)
        for (int32_t t = 0; t < lengths[r]; t++) {
            ids[offsets[r] + t] = (int32_t)r * 1000 + t;
            labels[offsets[r] + t] = (r + t) % 5 == 4 ? -100 : (int32_t)r * 1000 + t;
        }
    put_shard(scratch(name), ids, labels, tokens, offsets, rows);
    free(ids);
    free(labels);
    free(offsets);
    pml_shard *shard = NULL;
    EXPECT_OK(pml_shard_open(scratch(name), SHARD_VOCAB, &shard, e));
    return shard;
}

#endif
