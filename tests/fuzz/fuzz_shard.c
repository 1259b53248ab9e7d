/* A token shard. What is accepted has rows inside the file and ids inside the vocabulary. */
#include "fuzz.h"
#include "pml/data/shard.h"

unsigned fuzz_accepted;

enum { VOCAB = 64 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[32];
    int fd = fuzz_file(data, size, path);
    pml_error err = {0};
    pml_shard *shard = NULL;
    if (pml_shard_open(path, VOCAB, &shard, &err) == PML_OK) {
        int64_t total = 0;
        fuzz_accepted++;
        for (int64_t row = 0; row < pml_shard_rows(shard); row++) {
            const int32_t *ids, *labels;
            int32_t n = pml_shard_row(shard, row, &ids, &labels);
            for (int32_t t = 0; t < n; t++) {
                FUZZ_EXPECT(ids[t] >= 0 && ids[t] < VOCAB);
                FUZZ_EXPECT(labels[t] == -100 || (labels[t] >= 0 && labels[t] < VOCAB));
            }
            total += n;
        }
        FUZZ_EXPECT(total == pml_shard_tokens(shard));
        pml_shard_close(&shard);
    }
    close(fd);
    return 0;
}
