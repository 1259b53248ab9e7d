#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>

/* cuLibraryLoadData came with 12.0, and with it the minor-version compatibility this relies on. */
enum { OLDEST_DRIVER = 12000 };

pmli_driver pmli_cu;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int loaded;

/* Which of our words for failure the driver's words come to. */
static pml_status meaning(CUresult result)
{
    switch (result) {
    case CUDA_SUCCESS:
        return PML_OK;
    case CUDA_ERROR_OUT_OF_MEMORY:
        return PML_NO_MEMORY;
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_INVALID_DEVICE:
        return PML_NOT_FOUND;
    case CUDA_ERROR_DEVICE_UNAVAILABLE:
        return PML_BUSY;
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
    case CUDA_ERROR_NOT_SUPPORTED:
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
        return PML_UNSUPPORTED;
    case CUDA_ERROR_ECC_UNCORRECTABLE: /* from here on the context is lost, not only the call */
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
        return PML_PEER;
    default:
        return PML_INTERNAL;
    }
}

pml_status pmli_cu_status(CUresult result, const char *what, const char *file, int line,
                          pml_error *err)
{
    if (result == CUDA_SUCCESS)
        return PML_OK;
    const char *name = NULL, *words = NULL;
    pmli_cu.cuGetErrorName(result, &name);
    pmli_cu.cuGetErrorString(result, &words);
    return pml_error_set(err, meaning(result), file, line, "%s: %s (%s)", what,
                         words != NULL ? words : "unknown error", name != NULL ? name : "?");
}

static pml_status load_functions(pml_error *err)
{
    /* Never closed: the driver does not survive being unloaded. */
    void *handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        return PML_FAIL(err, PML_NOT_FOUND,
                        "no NVIDIA driver: %s. On a machine with an NVIDIA GPU install its driver "
                        "(in a container: run it with the GPU passed in)",
                        dlerror());
#define TEXT_OF(f) #f
#define NAME_OF(f) TEXT_OF(f)
#define FIND(f)                                                                                    \
    *(void **)&pmli_cu.f = dlsym(handle, NAME_OF(f));                                              \
    if (pmli_cu.f == NULL)                                                                         \
        return PML_FAIL(err, PML_UNSUPPORTED,                                                      \
                        "the NVIDIA driver is too old: it has no %s; install one for CUDA 12.0 "   \
                        "(525) or newer",                                                          \
                        NAME_OF(f));
    PMLI_DRIVER(FIND)
#undef FIND
    return PML_OK;
}

static pml_status start(pml_error *err)
{
    pml_status status = load_functions(err);
    if (status != PML_OK)
        return status;
    CUresult result = pmli_cu.cuInit(0);
    if (result == CUDA_ERROR_NO_DEVICE)
        return PML_FAIL(err, PML_NOT_FOUND,
                        "the NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES set to nothing, or "
                        "is the GPU not passed into this container?)");
    status = PMLI_CU(result, "starting the NVIDIA driver", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDriverGetVersion(&pmli_cu.version), "driver version", err);
    if (status == PML_OK && pmli_cu.version < OLDEST_DRIVER)
        status =
            PML_FAIL(err, PML_UNSUPPORTED,
                     "the NVIDIA driver serves CUDA %d.%d; 12.0 (driver 525) or newer is needed",
                     pmli_cu.version / 1000, pmli_cu.version % 1000 / 10);
    return status;
}

pml_status pmli_driver_load(pml_error *err)
{
    pthread_mutex_lock(&lock);
    pml_status status = loaded ? PML_OK : start(err);
    loaded = status == PML_OK;
    pthread_mutex_unlock(&lock);
    return status;
}
