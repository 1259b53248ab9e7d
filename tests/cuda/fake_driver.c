/* A libcuda.so.1 that is as the environment says, for what a user reads where it is not enough:
 *
 *   FAKE_CUDA_INIT=100         what cuInit answers
 *   FAKE_CUDA_VERSION=11080    the newest CUDA that it serves
 *   FAKE_CUDA_CAPABILITY=75    of its one GPU
 *   FAKE_CUDA_TOLD=FILE        where CUDA_CACHE_PATH is written as it is when the driver starts
 *
 * It can do nothing else: test_fake_driver.py fills in every other function that the backend looks
 * for with one that answers 0. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>

static int told(const char *name, int otherwise)
{
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : otherwise;
}

CUresult cuInit(unsigned flags)
{
    (void)flags;
    const char *file = getenv("FAKE_CUDA_TOLD"), *kept = getenv("CUDA_CACHE_PATH");
    FILE *out = file != NULL ? fopen(file, "we") : NULL;
    if (out != NULL) {
        fputs(kept != NULL ? kept : "", out);
        fclose(out);
    }
    return (CUresult)told("FAKE_CUDA_INIT", CUDA_SUCCESS);
}

CUresult cuDriverGetVersion(int *version)
{
    *version = told("FAKE_CUDA_VERSION", 13000);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult result, const char **name)
{
    static char text[32];
    snprintf(text, sizeof text, "CUDA_ERROR_%d", (int)result);
    *name = text;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult result, const char **words)
{
    *words = result == CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
                 ? "system has unsupported display driver / cuda driver combination"
                 : "an error";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count)
{
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int capacity, CUdevice device)
{
    (void)device;
    snprintf(name, (size_t)capacity, "Fake GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device)
{
    (void)device;
    int capability = told("FAKE_CUDA_CAPABILITY", 90);
    *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? capability / 10
             : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? capability % 10
                                                                     : 1 << 16;
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t *free, size_t *total)
{
    *total = (size_t)16 << 30;
    *free = (size_t)15 << 30;
    return CUDA_SUCCESS;
}
