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

/* Before anything else, so that a driver without some function is told by its version. */
static pml_status check_version(void *handle, pml_error *err)
{
    CUresult (*get)(int *);
    *(void **)&get = dlsym(handle, "cuDriverGetVersion");
    if (get == NULL || get(&pmli_cu.version) != CUDA_SUCCESS)
        return PML_FAIL(err, PML_UNSUPPORTED, "libcuda.so.1 does not say which CUDA it serves");
    if (pmli_cu.version >= OLDEST_DRIVER)
        return PML_OK;
    return PML_FAIL(err, PML_UNSUPPORTED,
                    "the NVIDIA driver is too old: it serves CUDA %d.%d, and 12.0 (driver 525) or "
                    "newer is needed. It is the machine's, also for a container",
                    pmli_cu.version / 1000, pmli_cu.version % 1000 / 10);
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
    pml_status status = check_version(handle, err);
    if (status != PML_OK)
        return status;
#define TEXT_OF(f) #f
#define NAME_OF(f) TEXT_OF(f)
#define FIND(f)                                                                                    \
    *(void **)&pmli_cu.f = dlsym(handle, NAME_OF(f));                                              \
    if (pmli_cu.f == NULL)                                                                         \
        return PML_FAIL(                                                                           \
            err, PML_UNSUPPORTED,                                                                  \
            "the NVIDIA driver for CUDA %d.%d has no %s: is libcuda.so.1 the driver's "            \
            "own?",                                                                                \
            pmli_cu.version / 1000, pmli_cu.version % 1000 / 10, NAME_OF(f));
    PMLI_DRIVER(FIND)
#undef FIND
    return PML_OK;
}

/* What helps where the driver is there and does not start. */
static const char *advice_for(CUresult result)
{
    switch (result) {
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
        return "the driver's library and its kernel module are of two versions, as after an "
               "update: restart the machine (in a container: is its libcuda.so.1 the machine's?)";
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
        return "CUDA's compatibility package (cuda-compat) stands before the driver's own library "
               "and does not serve this GPU: take its folder out of LD_LIBRARY_PATH";
    case CUDA_ERROR_SYSTEM_NOT_READY:
        return "on a machine whose GPUs are joined by switches start nvidia-fabricmanager first";
    case CUDA_ERROR_DEVICE_UNAVAILABLE:
        return "another process has the GPU for itself (nvidia-smi shows it and the compute mode)";
    default:
        return "does nvidia-smi run here? If not, restart the driver or the machine";
    }
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
    if (result == CUDA_SUCCESS)
        return PML_OK;
    const char *name = NULL, *words = NULL;
    pmli_cu.cuGetErrorName(result, &name);
    pmli_cu.cuGetErrorString(result, &words);
    return PML_FAIL(err, PML_UNSUPPORTED, "the NVIDIA driver does not start: %s (%s); %s",
                    words != NULL ? words : "unknown error", name != NULL ? name : "?",
                    advice_for(result));
}

pml_status pmli_driver_load(pml_error *err)
{
    pthread_mutex_lock(&lock);
    pml_status status = loaded ? PML_OK : start(err);
    loaded = status == PML_OK;
    pthread_mutex_unlock(&lock);
    return status;
}
