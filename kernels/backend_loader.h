/* What a backend in its own shared object exports, and its loader looks up by name. */
#ifndef PMLI_BACKEND_LOADER_H
#define PMLI_BACKEND_LOADER_H

#include "pml_op/backend.h"

/* The backend, once there is a driver, a device and the libraries it needs; else PML_NOT_FOUND or
 * PML_UNSUPPORTED and what to do about it. abi: the caller's PML_BACKEND_ABI, looked at before
 * anything else. The object is never unloaded: errors point to names in it. */
typedef pml_status pml_backend_entry(unsigned abi, const pml_backend **backend, pml_error *err);

#define PML_CUDA_ENTRY      pml_cuda_backend
#define PML_CUDA_ENTRY_NAME "pml_cuda_backend"
#define PML_CUDA_OBJECT     "pml_cuda.so"

#endif
