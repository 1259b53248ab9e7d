/* config.json. What is accepted has sizes that a planner can compute with. */
#include "fuzz.h"
#include "pml/model/spec.h"

unsigned fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pml_error err = {0};
    pml_model_spec spec;
    if (pml_model_spec_parse((const char *)data, size, "config.json", &spec, &err) != PML_OK) {
        FUZZ_EXPECT(err.message[0] != '\0');
        return 0;
    }
    fuzz_accepted++;
    FUZZ_EXPECT(pml_model_parameters(&spec) > 0);
    return 0;
}
