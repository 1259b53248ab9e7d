#include "cublas.h"

#include <dlfcn.h>
#include <pthread.h>

#include "driver.h"
#include "find_library.h"

pmli_cublas pmli_lt;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int loaded;

static pml_status meaning(cublasStatus_t result)
{
    switch (result) {
    case CUBLAS_STATUS_SUCCESS:
        return PML_OK;
    case CUBLAS_STATUS_ALLOC_FAILED:
        return PML_NO_MEMORY;
    case CUBLAS_STATUS_NOT_SUPPORTED:
    case CUBLAS_STATUS_ARCH_MISMATCH:
        return PML_UNSUPPORTED;
    case CUBLAS_STATUS_EXECUTION_FAILED:
        return PML_PEER;
    default:
        return PML_INTERNAL;
    }
}

pml_status pmli_lt_status(cublasStatus_t result, const char *what, const char *file, int line,
                          pml_error *err)
{
    if (result == CUBLAS_STATUS_SUCCESS)
        return PML_OK;
    return pml_error_set(err, meaning(result), file, line, "%s: %s", what,
                         pmli_lt.cublasLtGetStatusString(result));
}

static pml_status load(pml_error *err)
{
    int driver = pmli_cu.version / 1000;
    int newest = driver < PMLI_NEWEST_CUDA ? driver : PMLI_NEWEST_CUDA;
    void *handle = NULL;
    pml_status status = pmli_open_library(&pmli_cublas_library, newest, &handle, err);
    if (status != PML_OK)
        return status;
#define FIND(f)                                                                                    \
    *(void **)&pmli_lt.f = dlsym(handle, #f);                                                      \
    if (pmli_lt.f == NULL)                                                                         \
        return PML_FAIL(err, PML_UNSUPPORTED,                                                      \
                        "the libcublasLt that was found has no %s; install one of CUDA 12 or 13",  \
                        #f);
    PMLI_CUBLAS(FIND)
#undef FIND
    return PML_OK;
}

pml_status pmli_cublas_load(pml_error *err)
{
    pthread_mutex_lock(&lock);
    pml_status status = loaded ? PML_OK : load(err);
    loaded = status == PML_OK;
    pthread_mutex_unlock(&lock);
    return status;
}
