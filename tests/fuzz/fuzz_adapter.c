/* adapter_config.json. What is accepted names projections that exist and a rank that is one. */
#include <math.h>

#include "fuzz.h"
#include "pml/model/adapter.h"

unsigned fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pml_error err = {0};
    pml_adapter_config config;
    if (pml_adapter_config_parse((const char *)data, size, "adapter_config.json", &config, &err) !=
        PML_OK) {
        FUZZ_EXPECT(err.message[0] != '\0');
        return 0;
    }
    fuzz_accepted++;
    FUZZ_EXPECT(config.rank > 0 && isfinite(config.alpha));
    FUZZ_EXPECT(config.dropout >= 0 && config.dropout <= 1);
    FUZZ_EXPECT((config.targets & ~(uint32_t)PML_TARGET_ALL_LINEAR) == 0);
    FUZZ_EXPECT(config.saved >> PML_SAVED_COUNT == 0);
    FUZZ_EXPECT(config.n_layers >= 0);
    FUZZ_EXPECT(config.n_ranks >= 0 && config.n_ranks <= PML_ADAPTER_PATTERNS);
    for (int32_t i = 0; i < config.n_ranks; i++)
        FUZZ_EXPECT(config.ranks[i].value >= 1 && config.ranks[i].key[0] != '\0');
    FUZZ_EXPECT(config.n_alphas >= 0 && config.n_alphas <= PML_ADAPTER_PATTERNS);
    return 0;
}
