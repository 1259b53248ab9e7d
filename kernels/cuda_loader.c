/* Finding the CUDA backend: a shared object of its own, so that a program without a GPU carries
 * nothing of it and one with a GPU needs no other build. */
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend_loader.h"

static pml_status open_object(const char *path, const pml_backend **backend, pml_error *err)
{
    /* Never closed: a driver that has started does not survive it. */
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        return PML_FAIL(err, PML_NOT_FOUND, "the CUDA backend does not open: %s", dlerror());
    pml_backend_entry *entry;
    *(void **)&entry = dlsym(handle, PML_CUDA_ENTRY_NAME);
    if (entry == NULL)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s is no CUDA backend: it has no %s", path,
                        PML_CUDA_ENTRY_NAME);
    pml_status status = entry(PML_BACKEND_ABI, backend, err);
    if (status != PML_OK)
        return status;
    if (*backend == NULL || (*backend)->abi != PML_BACKEND_ABI) {
        *backend = NULL;
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "%s speaks another version of the op table than this program's %d; they "
                        "must come from the same build",
                        path, PML_BACKEND_ABI);
    }
    return PML_OK;
}

/* path: of a program or shared object, PATH_MAX long; becomes the backend's beside it, or in its
 * folder's bin/ (the extension lies above the programs). Whether that exists. */
static int beside(char *path)
{
    static const char *const places[] = {PML_CUDA_OBJECT, "bin/" PML_CUDA_OBJECT};
    char *slash = strrchr(path, '/');
    for (int i = 0; slash != NULL && i < 2; i++) {
        if (slash + 1 + strlen(places[i]) >= path + PATH_MAX)
            return 0;
        strcpy(slash + 1, places[i]);
        if (access(path, F_OK) == 0)
            return 1;
    }
    return 0;
}

pml_status pml_backend_cuda(const pml_backend **backend, pml_error *err)
{
    int count;
    pml_status status = pml_backend_cuda_to_plan(backend, err);
    if (status == PML_OK)
        status = (*backend)->devices(&count, err);
    if (status != PML_OK)
        *backend = NULL;
    return status;
}

pml_status pml_backend_cuda_to_plan(const pml_backend **backend, pml_error *err)
{
    *backend = NULL;
    const char *named = getenv("PML_CUDA_BACKEND");
    if (named != NULL && named[0] != '\0')
        return open_object(named, backend, err);

    static const char here;
    char path[PATH_MAX];
    Dl_info us;
    if (dladdr(&here, &us) != 0 && realpath(us.dli_fname, path) != NULL && beside(path))
        return open_object(path, backend, err);
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    path[n > 0 ? n : 0] = '\0';
    if (n > 0 && beside(path))
        return open_object(path, backend, err);
    return PML_FAIL(err, PML_NOT_FOUND,
                    "this installation has no CUDA backend: " PML_CUDA_OBJECT
                    " is not beside the program. Build it (tools/cuda/build) or name its path "
                    "in PML_CUDA_BACKEND");
}

pml_status pml_backend_named(const char *device, bool to_plan, const pml_backend **backend,
                             int *index, pml_error *err)
{
    *backend = NULL;
    *index = 0;
    if (strcmp(device, "cpu") == 0) {
        *backend = pml_backend_cpu();
        return PML_OK;
    }
    if (strncmp(device, "cuda", 4) == 0 && (device[4] == ':' || device[4] == '\0')) {
        char *end = (char *)(uintptr_t)device + strlen(device);
        long number = device[4] == ':' ? strtol(device + 5, &end, 10) : 0;
        if (*end == '\0' && number >= 0 && number < 1024 && device[strlen(device) - 1] != ':') {
            *index = (int)number;
            return to_plan ? pml_backend_cuda_to_plan(backend, err)
                           : pml_backend_cuda(backend, err);
        }
    }
    return PML_FAIL(err, PML_INVALID, "'%s' is no device: there are \"cpu\" and \"cuda:0\"",
                    device);
}
