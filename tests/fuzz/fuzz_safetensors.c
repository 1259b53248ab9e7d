/* A safetensors file. What is accepted has every byte of every tensor inside the file. */
#include "fuzz.h"
#include "pml/model/safetensors.h"

unsigned fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[32];
    int fd = fuzz_file(data, size, path);
    pml_error err = {0};
    pml_safetensors *file = NULL;
    if (pml_safetensors_open(path, &file, &err) == PML_OK) {
        size_t total = 0;
        fuzz_accepted++;
        for (size_t i = 0; i < pml_safetensors_count(file); i++) {
            const pml_stored *t = pml_safetensors_at(file, i);
            FUZZ_EXPECT(pml_safetensors_find(file, t->name) != NULL);
            char last;
            FUZZ_EXPECT(t->bytes == 0 ||
                        pml_stored_read(t, t->bytes - 1, 1, &last, &err) == PML_OK);
            total += t->bytes;
        }
        FUZZ_EXPECT(total < size);
        pml_safetensors_close(&file);
    }
    close(fd);
    return 0;
}
