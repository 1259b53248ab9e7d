/* cuBLASLt, found at run time like the driver. Only the functions that a matrix product needs. */
#ifndef PMLI_CUDA_CUBLAS_H
#define PMLI_CUDA_CUBLAS_H

#include <cublasLt.h>

#include "pml/base/error.h"

#define PMLI_CUBLAS(X)                                                                             \
    X(cublasLtCreate)                                                                              \
    X(cublasLtDestroy)                                                                             \
    X(cublasLtGetVersion)                                                                          \
    X(cublasLtGetStatusString)                                                                     \
    X(cublasLtMatmul)                                                                              \
    X(cublasLtMatmulDescCreate)                                                                    \
    X(cublasLtMatmulDescDestroy)                                                                   \
    X(cublasLtMatmulDescSetAttribute)                                                              \
    X(cublasLtMatrixLayoutCreate)                                                                  \
    X(cublasLtMatrixLayoutDestroy)                                                                 \
    X(cublasLtMatmulPreferenceCreate)                                                              \
    X(cublasLtMatmulPreferenceDestroy)                                                             \
    X(cublasLtMatmulPreferenceSetAttribute)                                                        \
    X(cublasLtMatmulAlgoCheck)                                                                     \
    X(cublasLtMatmulAlgoGetHeuristic)

typedef struct pmli_cublas {
#define PMLI_MEMBER(f) __typeof__(&f) f;
    PMLI_CUBLAS(PMLI_MEMBER)
#undef PMLI_MEMBER
} pmli_cublas;

extern pmli_cublas pmli_lt;

/* Open the library; the driver must be loaded. May be called again, by any thread. */
pml_status pmli_cublas_load(pml_error *err);

/* What cuBLASLt answered to `what`, as a status: PML_NO_MEMORY, PML_UNSUPPORTED or PML_INTERNAL. */
pml_status pmli_lt_status(cublasStatus_t result, const char *what, const char *file, int line,
                          pml_error *err);

#define PMLI_LT(call, what, err) pmli_lt_status((call), (what), __FILE__, __LINE__, (err))

#endif
