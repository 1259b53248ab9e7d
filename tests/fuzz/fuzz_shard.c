/* A token shard. What is accepted has rows inside the file and ids inside the vocabulary, and an
 * epoch drawn from it has every row once, packed or not. */
#include "fuzz.h"
#include "pml/data/sampler.h"
#include "pml/data/shard.h"

unsigned fuzz_accepted;

enum { VOCAB = 64 };

static void check_rows(const pml_shard *shard)
{
    int64_t total = 0;
    for (int64_t row = 0; row < pml_shard_rows(shard); row++) {
        int32_t n = pml_shard_length(shard, row);
        for (int32_t t = 0; t < n; t++) {
            int32_t id, label;
            pml_error err = {0};
            FUZZ_EXPECT(pml_shard_read(shard, pml_shard_offset(shard, row) + t, 1, &id, &label,
                                       &err) == PML_OK);
            FUZZ_EXPECT(id >= 0 && id < VOCAB);
            FUZZ_EXPECT(label == -100 || (label >= 0 && label < VOCAB));
        }
        total += n;
    }
    FUZZ_EXPECT(total == pml_shard_tokens(shard));
}

/* One epoch; how a row is cut is the last byte of the input. */
static void draw(const pml_shard *shard, int32_t max_length, bool packing)
{
    pml_error err = {0};
    pml_sampler *sampler = NULL;
    const pml_sampler_options options = {.batch_size = 2,
                                         .accumulation = 1,
                                         .world = 1,
                                         .max_length = max_length,
                                         .packing = packing,
                                         .shuffle = true};
    if (pml_sampler_new(shard, &options, &sampler, &err) != PML_OK)
        return; /* nothing to learn */
    int64_t docs = 0;
    for (pml_cursor at = {0, 0}; at.epoch == 0; at = pml_sampler_next(sampler, at)) {
        pml_batch batch;
        FUZZ_EXPECT(pml_sampler_batch(sampler, at, 0, &batch, &err) == PML_OK);
        FUZZ_EXPECT(pml_batch_check(&batch, VOCAB, max_length, &err) == PML_OK);
        docs += batch.n_docs;
    }
    FUZZ_EXPECT(docs == pml_shard_rows(shard));
    pml_sampler_destroy(&sampler);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[32];
    int fd = fuzz_file(data, size, path);
    pml_error err = {0};
    pml_shard *shard = NULL;
    if (pml_shard_open(path, VOCAB, &shard, &err) == PML_OK) {
        fuzz_accepted++;
        check_rows(shard);
        draw(shard, 1 + data[size - 1] % 16, true);
        draw(shard, 1 + data[size - 1] % 16, false);
        pml_shard_close(&shard);
    }
    close(fd);
    return 0;
}
