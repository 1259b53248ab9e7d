/* A libcublasLt with one plain kernel in it: what the CUDA backend calls of the library and no
 * more, for tests/gpu/sanitize.
 *
 * compute-sanitizer does not see what the library's own kernels write by the copy engine, and
 * racecheck dies inside of them. With this in its place (PML_CUDA_LIBS names its folder) the
 * backend is the same to the byte, and the tool sees every access of every kernel that is ours.
 * Whatever the backend does not use is refused, so that a new use cannot pass as done. */
#include <cublasLt.h>
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "images.h"
#include "product.h"

typedef struct desc {
    cublasOperation_t transpose_a, transpose_b;
    cublasLtEpilogue_t epilogue;
    cublasLtMatmulMatrixScale_t scaling_a, scaling_b;
    const void *bias;
    const float *scale_a, *scale_b;
} desc;

typedef struct layout {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
} layout;

static struct {
    __typeof__(&cuLibraryLoadData) load;
    __typeof__(&cuLibraryGetKernel) kernel;
    __typeof__(&cuLaunchKernel) launch;
} driver;

static CUkernel product;
static pthread_once_t once = PTHREAD_ONCE_INIT;

#define EXPORT __attribute__((visibility("default")))

static void start(void)
{
    CUlibrary library = NULL;
    void *handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); /* the backend has it open */
    if (handle == NULL)
        return;
    *(void **)&driver.load = dlsym(handle, "cuLibraryLoadData");
    *(void **)&driver.kernel = dlsym(handle, "cuLibraryGetKernel");
    *(void **)&driver.launch = dlsym(handle, "cuLaunchKernel");
    if (driver.load == NULL || driver.kernel == NULL || driver.launch == NULL)
        return;
    CUresult result = driver.load(&library, pmli_images[0].data, NULL, NULL, 0, NULL, NULL, 0);
    if (result == CUDA_SUCCESS)
        result = driver.kernel(&product, library, "product");
    if (result != CUDA_SUCCESS)
        fprintf(stderr, "plain cublasLt: its kernel was not loaded (%d)\n", (int)result);
}

EXPORT size_t cublasLtGetVersion(void)
{
    return 130000; /* takes rows' scales */
}

EXPORT const char *cublasLtGetStatusString(cublasStatus_t status)
{
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? "the plain cublasLt has no such product"
                                                 : "the plain cublasLt failed";
}

EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    static char something;
    pthread_once(&once, start);
    *handle = (cublasLtHandle_t)(void *)&something;
    return product != NULL ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}

EXPORT cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    (void)handle;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t give(void *made, void **to)
{
    *to = made;
    return made != NULL ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute,
                                               cudaDataType_t scale)
{
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return give(calloc(1, sizeof(desc)), (void **)d);
}

EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d)
{
    free(d);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t to,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void *value, size_t size)
{
    desc *d = (desc *)to;
    const struct {
        cublasLtMatmulDescAttributes_t attribute;
        void *member;
        size_t size;
    } all[] = {
#define OF(name, member) {CUBLASLT_MATMUL_DESC_##name, &d->member, sizeof d->member}
        OF(TRANSA, transpose_a),      OF(TRANSB, transpose_b),      OF(EPILOGUE, epilogue),
        OF(BIAS_POINTER, bias),       OF(A_SCALE_MODE, scaling_a),  OF(B_SCALE_MODE, scaling_b),
        OF(A_SCALE_POINTER, scale_a), OF(B_SCALE_POINTER, scale_b),
#undef OF
    };
    if (attribute == CUBLASLT_MATMUL_DESC_FAST_ACCUM)
        return CUBLAS_STATUS_SUCCESS; /* a leave, not an order */
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].attribute == attribute && all[i].size == size) {
            memcpy(all[i].member, value, size);
            return CUBLAS_STATUS_SUCCESS;
        }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t ld)
{
    layout *made = calloc(1, sizeof *made);
    if (made != NULL)
        *made = (layout){type, rows, cols, ld};
    return give(made, (void **)l);
}

EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l)
{
    free(l);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p)
{
    return give(calloc(1, 1), (void **)p);
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p)
{
    free(p);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t a,
                                                           const void *value, size_t size)
{
    (void)p, (void)a, (void)value, (void)size; /* one kernel serves every alignment */
    return CUBLAS_STATUS_SUCCESS;
}

static int type_of(cudaDataType type)
{
    return type == CUDA_R_32F       ? PRODUCT_F32
           : type == CUDA_R_16BF    ? PRODUCT_BF16
           : type == CUDA_R_16F     ? PRODUCT_F16
           : type == CUDA_R_8F_E4M3 ? PRODUCT_E4M3
                                    : -1;
}

/* A product that the kernel knows, without its addresses; as the library, 8-bit operands lie along
 * the inner dimension. */
static cublasStatus_t understand(const desc *d, const layout *a, const layout *b, const layout *c,
                                 product_params *p)
{
    bool at = d->transpose_a == CUBLAS_OP_T, bt = d->transpose_b == CUBLAS_OP_T;
    bool scaled = d->scaling_a == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    *p = (product_params){.m = (long long)c->rows,
                          .n = (long long)c->cols,
                          .k = (long long)(at ? a->rows : a->cols),
                          .lda = a->ld,
                          .ldb = b->ld,
                          .ldc = c->ld,
                          .in = type_of(a->type),
                          .out = type_of(c->type),
                          .transpose_a = at,
                          .transpose_b = bt};
    bool fits = (at ? a->cols : a->rows) == c->rows && (bt ? b->rows : b->cols) == c->cols &&
                (bt ? b->cols : b->rows) == (uint64_t)p->k;
    bool lies = a->ld >= (int64_t)a->rows && b->ld >= (int64_t)b->rows && c->ld >= p->m;
    bool known = p->in >= 0 && a->type == b->type && p->out >= 0 && p->out != PRODUCT_E4M3;
    bool along = p->in != PRODUCT_E4M3 || (at && !bt);
    bool as_said = (d->epilogue == 0 || d->epilogue == CUBLASLT_EPILOGUE_BIAS) &&
                   (d->scaling_a == 0 || scaled) && d->scaling_a == d->scaling_b;
    return fits && lies && known && along && as_said ? CUBLAS_STATUS_SUCCESS
                                                     : CUBLAS_STATUS_NOT_SUPPORTED;
}

EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t to,
    cublasLtMatmulPreference_t preference, int most, cublasLtMatmulHeuristicResult_t result[],
    int *count)
{
    product_params p;
    (void)handle, (void)to, (void)preference;
    cublasStatus_t status =
        understand((const desc *)d, (const layout *)a, (const layout *)b, (const layout *)c, &p);
    *count = status == CUBLAS_STATUS_SUCCESS && most > 0 ? 1 : 0;
    if (*count == 1)
        memset(&result[0], 0, sizeof result[0]);
    return status;
}

EXPORT cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t d,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t to,
                                              const cublasLtMatmulAlgo_t *algorithm,
                                              cublasLtMatmulHeuristicResult_t *result)
{
    (void)handle, (void)d, (void)a, (void)b, (void)c, (void)to, (void)algorithm, (void)result;
    return CUBLAS_STATUS_NOT_SUPPORTED; /* what is kept on disk was never this library's */
}

EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t d,
                                     const void *alpha, const void *a, cublasLtMatrixLayout_t la,
                                     const void *b, cublasLtMatrixLayout_t lb, const void *beta,
                                     const void *c, cublasLtMatrixLayout_t lc, void *to,
                                     cublasLtMatrixLayout_t lto,
                                     const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                     size_t workspace_size, cudaStream_t stream)
{
    enum { BLOCK = 256 };
    const desc *said = (const desc *)d;
    product_params p;
    (void)handle, (void)algorithm, (void)workspace, (void)workspace_size;
    cublasStatus_t status =
        understand(said, (const layout *)la, (const layout *)lb, (const layout *)lc, &p);
    if (status != CUBLAS_STATUS_SUCCESS || c != to || lc != lto)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    p.a = a, p.b = b, p.c = to;
    p.alpha = *(const float *)alpha, p.beta = *(const float *)beta;
    p.bias = said->epilogue == CUBLASLT_EPILOGUE_BIAS ? said->bias : NULL;
    if (said->scaling_a != 0)
        p.scale_a = said->scale_a, p.scale_b = said->scale_b;
    void *arguments[] = {&p};
    unsigned blocks = (unsigned)((p.m * p.n + BLOCK - 1) / BLOCK);
    CUresult result = driver.launch((CUfunction)product, blocks, 1, 1, BLOCK, 1, 1, 0,
                                    (CUstream)stream, arguments, NULL);
    return result == CUDA_SUCCESS ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
