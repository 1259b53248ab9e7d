/* A backend object from another build, for test_cuda_loader: its op table has another number. */
#include "backend_loader.h"

static const pml_backend from_another_build = {.abi = PML_BACKEND_ABI + 1, .name = "fake"};

pml_backend_entry PML_CUDA_ENTRY;

pml_status PML_CUDA_ENTRY(unsigned abi, const pml_backend **backend, pml_error *err)
{
    (void)err;
    *backend = abi == PML_BACKEND_ABI ? &from_another_build : NULL;
    return PML_OK;
}
