/* The CUDA driver, found at run time: no CUDA library is linked, so this object loads anywhere.
 *
 * pmli_cu holds one pointer for each driver function the backend uses, under the driver's own
 * names. It is filled once by pmli_driver_load and read-only afterwards. */
#ifndef PMLI_CUDA_DRIVER_H
#define PMLI_CUDA_DRIVER_H

#include <cuda.h>

#include "pml/base/error.h"

/* cuda.h maps some of these to versioned names by macro; the table follows it. */
#define PMLI_DRIVER(X)                                                                             \
    X(cuInit)                                                                                      \
    X(cuDriverGetVersion)                                                                          \
    X(cuGetErrorName)                                                                              \
    X(cuGetErrorString)                                                                            \
    X(cuDeviceGet)                                                                                 \
    X(cuDeviceGetCount)                                                                            \
    X(cuDeviceGetName)                                                                             \
    X(cuDeviceGetAttribute)                                                                        \
    X(cuDeviceGetPCIBusId)                                                                         \
    X(cuDeviceGetUuid_v2)                                                                          \
    X(cuDeviceTotalMem)                                                                            \
    X(cuDevicePrimaryCtxRetain)                                                                    \
    X(cuDevicePrimaryCtxRelease)                                                                   \
    X(cuCtxSetCurrent)                                                                             \
    X(cuMemGetInfo)                                                                                \
    X(cuMemAlloc)                                                                                  \
    X(cuMemFree)                                                                                   \
    X(cuMemHostAlloc)                                                                              \
    X(cuMemFreeHost)                                                                               \
    X(cuMemHostRegister)                                                                           \
    X(cuMemHostUnregister)                                                                         \
    X(cuMemcpyHtoDAsync)                                                                           \
    X(cuMemcpyDtoHAsync)                                                                           \
    X(cuMemcpy2DAsync)                                                                             \
    X(cuEventCreate)                                                                               \
    X(cuEventRecord)                                                                               \
    X(cuEventSynchronize)                                                                          \
    X(cuEventElapsedTime)                                                                          \
    X(cuEventDestroy)                                                                              \
    X(cuStreamCreate)                                                                              \
    X(cuStreamDestroy)                                                                             \
    X(cuStreamSynchronize)                                                                         \
    X(cuStreamWaitEvent)                                                                           \
    X(cuStreamBeginCapture)                                                                        \
    X(cuStreamEndCapture)                                                                          \
    X(cuGraphGetNodes)                                                                             \
    X(cuGraphInstantiateWithFlags)                                                                 \
    X(cuGraphUpload)                                                                               \
    X(cuGraphLaunch)                                                                               \
    X(cuGraphDestroy)                                                                              \
    X(cuGraphExecDestroy)                                                                          \
    X(cuLibraryLoadData)                                                                           \
    X(cuLibraryGetKernel)                                                                          \
    X(cuLibraryUnload)                                                                             \
    X(cuFuncSetAttribute)                                                                          \
    X(cuKernelGetFunction)                                                                         \
    X(cuOccupancyMaxActiveClusters)                                                                \
    X(cuTensorMapEncodeTiled)                                                                      \
    X(cuLaunchKernelEx)

typedef struct pmli_driver {
#define PMLI_MEMBER(f) __typeof__(&f) f;
    PMLI_DRIVER(PMLI_MEMBER)
#undef PMLI_MEMBER
    int version; /* newest CUDA the driver serves: 13000 is 13.0 */
} pmli_driver;

extern pmli_driver pmli_cu;

/* Open the driver and start it. May be called again, by any thread. PML_NOT_FOUND without a
 * driver or a device, PML_UNSUPPORTED with a driver that is too old; the message says what to do.
 */
pml_status pmli_driver_load(pml_error *err);

/* PML_OK, or err with the driver's own words after `what`, which names the intention. */
pml_status pmli_cu_status(CUresult result, const char *what, const char *file, int line,
                          pml_error *err);

#define PMLI_CU(call, what, err) pmli_cu_status((call), (what), __FILE__, __LINE__, (err))

#endif
