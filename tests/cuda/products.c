/* Which algorithm a product goes by, and what it costs to find out (kernels/cuda/gemm.c), on a
 * driver and a cuBLASLt that this file plays: launches are counted, and take as long as is said
 * here, and so is our own kernel. Every way of a product is looked for in a table of choices that
 * comes from disk.
 *
 * Built and run by test_products.py: products FOLDER, an empty one. */
#include <stdio.h>

#include "gemm.c"

enum { PLAYED = 8, ROUNDS_OF_ALL = PLAYED * ROUNDS, OWN = 99 };

pmli_cublas pmli_lt;
pmli_driver pmli_cu;

static int launches, asked, checked, fastest, last_tried, last_ran, refused = -1;
static size_t wanted_workspace;
static bool own_serves, own_is_wanted, own_fails;

pml_status pmli_lt_status(cublasStatus_t result, const char *what, const char *file, int line,
                          pml_error *err)
{
    return result == CUBLAS_STATUS_SUCCESS ? PML_OK
                                           : pml_error_set(err, PML_INTERNAL, file, line, what);
}

pml_status pmli_cu_status(CUresult result, const char *what, const char *file, int line,
                          pml_error *err)
{
    return result == CUDA_SUCCESS ? PML_OK : pml_error_set(err, PML_INTERNAL, file, line, what);
}

/* ---- cuBLASLt: algorithm i has i as its first word ---- */

static cublasStatus_t make(void **made)
{
    *made = malloc(1);
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t describe_product(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                       cudaDataType_t scale)
{
    (void)compute, (void)scale;
    return make((void **)desc);
}

static cublasStatus_t end_product(cublasLtMatmulDesc_t desc)
{
    free(desc);
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t set_of_product(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t what,
                                     const void *value, size_t bytes)
{
    (void)desc, (void)what, (void)value, (void)bytes;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t describe_matrix(cublasLtMatrixLayout_t *layout, cudaDataType_t type,
                                      uint64_t rows, uint64_t cols, int64_t ld)
{
    (void)type, (void)rows, (void)cols, (void)ld;
    return make((void **)layout);
}

static cublasStatus_t end_matrix(cublasLtMatrixLayout_t layout)
{
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t prefer(cublasLtMatmulPreference_t *preference)
{
    return make((void **)preference);
}

static cublasStatus_t end_preference(cublasLtMatmulPreference_t preference)
{
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t set_preference(cublasLtMatmulPreference_t preference,
                                     cublasLtMatmulPreferenceAttributes_t what, const void *value,
                                     size_t bytes)
{
    (void)preference, (void)what, (void)value, (void)bytes;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t propose(cublasLtHandle_t lt, cublasLtMatmulDesc_t desc,
                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                              cublasLtMatmulPreference_t preference, int most,
                              cublasLtMatmulHeuristicResult_t *result, int *found)
{
    (void)lt, (void)desc, (void)a, (void)b, (void)c, (void)d, (void)preference;
    asked++;
    *found = most < PLAYED ? most : PLAYED;
    memset(result, 0, sizeof *result * (size_t)*found);
    for (int i = 0; i < *found; i++)
        result[i].algo.data[0] = (uint64_t)i;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t may_run(cublasLtHandle_t lt, cublasLtMatmulDesc_t desc,
                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t *algo,
                              cublasLtMatmulHeuristicResult_t *result)
{
    (void)lt, (void)desc, (void)a, (void)b, (void)c, (void)d;
    checked++;
    *result = (cublasLtMatmulHeuristicResult_t){.workspaceSize = wanted_workspace};
    return (int)algo->data[0] == refused ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t run_it(cublasLtHandle_t lt, cublasLtMatmulDesc_t desc, const void *alpha,
                             const void *a, cublasLtMatrixLayout_t at, const void *b,
                             cublasLtMatrixLayout_t bt, const void *beta, const void *c,
                             cublasLtMatrixLayout_t ct, void *d, cublasLtMatrixLayout_t dt,
                             const cublasLtMatmulAlgo_t *algo, void *workspace, size_t bytes,
                             cudaStream_t stream)
{
    (void)lt, (void)desc, (void)alpha, (void)a, (void)at, (void)b, (void)bt, (void)beta, (void)c;
    (void)ct, (void)d, (void)dt, (void)workspace, (void)bytes, (void)stream;
    launches++;
    last_tried = last_ran = (int)algo->data[0];
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- our own kernel ---- */

bool pmli_gemm_hopper_serves(const pml_device *device, const pmli_gemm *gemm)
{
    (void)device, (void)gemm;
    return own_serves;
}

bool pmli_gemm_hopper_is_wanted(void)
{
    return own_is_wanted;
}

pml_status pmli_gemm_hopper(pml_queue *queue, const pmli_gemm *gemm, pml_error *err)
{
    (void)queue, (void)gemm;
    if (own_fails)
        return PML_FAIL(err, PML_INTERNAL, "played");
    launches++;
    last_tried = last_ran = OWN;
    return PML_OK;
}

/* ---- the driver's clock ---- */

static CUresult event_create(CUevent *event, unsigned flags)
{
    (void)flags;
    *event = (CUevent)(uintptr_t)1;
    return CUDA_SUCCESS;
}

static CUresult event_destroy(CUevent event)
{
    (void)event;
    return CUDA_SUCCESS;
}

static CUresult event_record(CUevent event, CUstream stream)
{
    (void)event, (void)stream;
    return CUDA_SUCCESS;
}

static CUresult wait(CUstream stream)
{
    (void)stream;
    return CUDA_SUCCESS;
}

static CUresult elapsed(float *ms, CUevent from, CUevent to)
{
    (void)from, (void)to;
    *ms = last_tried == fastest ? 1 : 2;
    return CUDA_SUCCESS;
}

static void play(void)
{
    pmli_lt = (pmli_cublas){.cublasLtMatmulDescCreate = describe_product,
                            .cublasLtMatmulDescDestroy = end_product,
                            .cublasLtMatmulDescSetAttribute = set_of_product,
                            .cublasLtMatrixLayoutCreate = describe_matrix,
                            .cublasLtMatrixLayoutDestroy = end_matrix,
                            .cublasLtMatmulPreferenceCreate = prefer,
                            .cublasLtMatmulPreferenceDestroy = end_preference,
                            .cublasLtMatmulPreferenceSetAttribute = set_preference,
                            .cublasLtMatmulAlgoGetHeuristic = propose,
                            .cublasLtMatmulAlgoCheck = may_run,
                            .cublasLtMatmul = run_it};
    pmli_cu = (pmli_driver){.cuEventCreate = event_create,
                            .cuEventDestroy = event_destroy,
                            .cuEventRecord = event_record,
                            .cuEventElapsedTime = elapsed,
                            .cuStreamSynchronize = wait};
}

/* ---- a process: a device, its products, the choices of a folder ---- */

typedef struct process {
    pml_device device;
    pml_queue queue;
} process;

static int failed;

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("FAIL %s:%d: %s\n", __func__, __LINE__, #condition);                            \
            failed++;                                                                              \
        }                                                                                          \
    } while (0)

static void begin(process *p, const char *folder, bool deterministic)
{
    pml_error err = PML_ERROR_INIT;
    *p = (process){.device = {.deterministic = deterministic}};
    p->queue.device = &p->device;
    pmli_choices *choices = deterministic ? NULL : pmli_choices_new(folder, "GPU", 13000, 1);
    EXPECT(pmli_gemm_cache_new(choices, &p->device.products, &err) == PML_OK);
    refused = -1;
    wanted_workspace = 0;
}

static void end(process *p)
{
    pmli_gemm_cache_destroy(&p->device.products);
}

/* y of a linear layer for so many tokens: 2 * 4096 * 4096 operations each, 5e10 for 1,491 of them.
 */
static pmli_gemm layer(int64_t tokens)
{
    static char operand[256] __attribute__((aligned(256)));
    return (pmli_gemm){.a = operand,
                       .b = operand,
                       .c = operand,
                       .m = tokens,
                       .n = 4096,
                       .k = 4096,
                       .lda = 4096,
                       .ldb = 4096,
                       .ldc = 4096,
                       .transpose_b = true,
                       .in = PML_BF16,
                       .out = PML_BF16,
                       .alpha = 1,
                       .workspace = operand,
                       .workspace_size = PMLI_GEMM_WORKSPACE};
}

/* The gradient of a weight [1024,1024] by so many tokens, added to what is there. */
static pmli_gemm gradient(int64_t tokens)
{
    pmli_gemm g = layer(1024);
    g.n = 1024, g.k = tokens;
    g.lda = g.ldb = g.ldc = 1024;
    g.transpose_a = true, g.transpose_b = false;
    g.out = PML_F32;
    g.beta = 1;
    return g;
}

/* Launches beside the product's own, which comes last. */
static int run_with(process *p, pmli_gemm g, int fast)
{
    pml_error err = PML_ERROR_INIT;
    launches = asked = checked = 0;
    fastest = fast;
    EXPECT(pmli_gemm_run(&p->queue, &g, &err) == PML_OK);
    return launches - 1;
}

static void nearest_of_more_rows(const char *folder)
{
    process p;
    begin(&p, folder, false);
    EXPECT(run_with(&p, layer(8192), 5) == ROUNDS_OF_ALL && last_ran == 5);
    EXPECT(run_with(&p, layer(8192), 6) == 0 && last_ran == 5 && asked == 0 && checked == 0);
    /* Up to half of its rows: nothing is timed, and nobody asked for candidates. */
    EXPECT(run_with(&p, layer(7680), 6) == 0 && last_ran == 5 && asked == 0 && checked == 1);
    EXPECT(run_with(&p, layer(7680), 6) == 0 && last_ran == 5 && checked == 0);
    EXPECT(run_with(&p, layer(4096), 6) == 0 && last_ran == 5);
    /* Of fewer (7680 went by another one's choice and has none to give) and of more it is timed by
     * itself; then the nearest counts. */
    EXPECT(run_with(&p, layer(4095), 6) == ROUNDS_OF_ALL && last_ran == 6);
    EXPECT(run_with(&p, layer(8193), 4) == ROUNDS_OF_ALL && last_ran == 4);
    EXPECT(run_with(&p, layer(4094), 1) == 0 && last_ran == 6);
    EXPECT(run_with(&p, layer(4097), 1) == 0 && last_ran == 5);
    end(&p);
}

static void the_next_process_has_what_was_timed(const char *folder)
{
    process p;
    begin(&p, folder, false);
    EXPECT(run_with(&p, layer(7680), 2) == 0 && last_ran == 5); /* before 8192 has come */
    EXPECT(run_with(&p, layer(8192), 2) == 0 && last_ran == 5);
    EXPECT(run_with(&p, layer(4095), 2) == 0 && last_ran == 6);
    refused = 6; /* as another version of the library might; */
    EXPECT(run_with(&p, layer(4000), 2) == ROUNDS_OF_ALL && last_ran == 2);
    refused = -1;
    wanted_workspace = PMLI_GEMM_WORKSPACE + 1; /* or want more than there is */
    EXPECT(run_with(&p, layer(7424), 7) == ROUNDS_OF_ALL && last_ran == 7);
    end(&p);
}

static void rows_of_a_gradient(const char *folder)
{
    process p;
    begin(&p, folder, false);
    EXPECT(run_with(&p, gradient(65536), 3) == ROUNDS_OF_ALL && last_ran == 3);
    EXPECT(run_with(&p, gradient(40000), 1) == 0 && last_ran == 3);
    EXPECT(run_with(&p, gradient(32767), 1) == ROUNDS_OF_ALL && last_ran == 1);
    end(&p);
}

static void another_product_is_timed(const char *folder)
{
    process p;
    begin(&p, folder, false);
    for (int other = 0; other < 7; other++) {
        pmli_gemm g = layer(7000);
        g.n += other == 0 ? 8 : 0;
        g.k += other == 1 ? 8 : 0;
        g.lda += other == 2 ? 8 : 0;
        g.out = other == 3 ? PML_F32 : PML_BF16;
        g.bias = other == 4 ? g.a : NULL;
        g.b = (const char *)g.b + (other == 5 ? 16 : 0);
        g.workspace_size /= other == 6 ? 2 : 1;
        EXPECT(run_with(&p, g, 1) == ROUNDS_OF_ALL && last_ran == 1);
    }
    end(&p);
}

static void a_small_one_is_timed(void)
{
    process p;
    begin(&p, NULL, false); /* nowhere kept */
    EXPECT(run_with(&p, layer(1600), 5) == ROUNDS_OF_ALL && last_ran == 5);
    EXPECT(run_with(&p, layer(1500), 6) == 0 && last_ran == 5);
    EXPECT(run_with(&p, layer(1490), 6) == ROUNDS_OF_ALL && last_ran == 6);
    EXPECT(run_with(&p, layer(29), 6) == 0 && last_ran == 0); /* too small for either */
    end(&p);
}

static void our_own_kernel_is_one_of_them(const char *folder)
{
    process p;
    pmli_gemm wide = layer(6000), wider = layer(6000);
    wide.n = 8192, wider.n = 9216;
    begin(&p, folder, false);
    own_serves = true;
    EXPECT(run_with(&p, wide, OWN) == ROUNDS_OF_ALL + ROUNDS && last_ran == OWN);
    EXPECT(run_with(&p, wide, 4) == 0 && last_ran == OWN);
    EXPECT(run_with(&p, wider, 4) == ROUNDS_OF_ALL + ROUNDS && last_ran == 4);
    wide.m = 5000; /* goes by it, and cuBLASLt is not asked */
    EXPECT(run_with(&p, wide, 4) == 0 && last_ran == OWN && checked == 0);
    pmli_gemm scaled = layer(6000); /* the same but for a factor is another product */
    scaled.n = 8192, scaled.alpha = 0.5F;
    EXPECT(run_with(&p, scaled, 2) == ROUNDS_OF_ALL + ROUNDS && last_ran == 2);
    end(&p);
    begin(&p, folder, false);
    wide.m = 6000;
    EXPECT(run_with(&p, wide, 4) == 0 && last_ran == OWN && asked == 0);
    end(&p);
    begin(&p, folder, false);
    own_serves = false; /* as with another build, that has no such kernel */
    EXPECT(run_with(&p, wide, 3) == ROUNDS_OF_ALL && last_ran == 3);
    end(&p);
}

/* Nor does a run fail by it. */
static void our_own_kernel_fails(void)
{
    process p;
    begin(&p, NULL, false);
    own_serves = own_fails = true;
    EXPECT(run_with(&p, layer(8192), 5) == ROUNDS_OF_ALL && last_ran == 5);
    own_serves = own_fails = false;
    end(&p);
}

/* Without a trial, by a device that times nothing, too. */
static void our_own_kernel_alone(const char *folder)
{
    process p;
    begin(&p, folder, true);
    own_serves = own_is_wanted = true;
    EXPECT(run_with(&p, layer(8192), 5) == 0 && last_ran == OWN && asked == 0);
    end(&p);
    begin(&p, folder, false);
    own_serves = false;
    EXPECT(run_with(&p, layer(8192), 5) == 0 && last_ran == 5);
    own_is_wanted = false;
    end(&p);
}

/* Nor does it read what is kept: the same bits on every machine of a kind. */
static void a_deterministic_device_takes_the_first(const char *folder)
{
    process p;
    begin(&p, folder, true);
    EXPECT(run_with(&p, layer(8192), 5) == 0 && last_ran == 0 && checked == 0);
    EXPECT(run_with(&p, layer(7680), 5) == 0 && last_ran == 0 && checked == 0);
    end(&p);
}

/* Lines of the one file in the folder: each product that was timed, and no other. */
static int lines_of(const char *folder)
{
    char path[4200];
    int lines = 0;
    snprintf(path, sizeof path, "%s/products-2-GPU-13000-1.txt", folder);
    FILE *file = fopen(path, "r");
    for (int c; file != NULL && (c = fgetc(file)) != EOF;)
        lines += c == '\n';
    if (file != NULL)
        fclose(file);
    return lines;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return EXIT_FAILURE;
    play();
    nearest_of_more_rows(argv[1]);
    EXPECT(lines_of(argv[1]) == 3);
    the_next_process_has_what_was_timed(argv[1]);
    EXPECT(lines_of(argv[1]) == 5);
    rows_of_a_gradient(argv[1]);
    EXPECT(lines_of(argv[1]) == 7);
    another_product_is_timed(argv[1]);
    EXPECT(lines_of(argv[1]) == 14);
    a_small_one_is_timed();
    a_deterministic_device_takes_the_first(argv[1]);
    EXPECT(lines_of(argv[1]) == 14);
    our_own_kernel_is_one_of_them(argv[1]);
    EXPECT(lines_of(argv[1]) == 18);
    our_own_kernel_fails();
    our_own_kernel_alone(argv[1]);
    EXPECT(lines_of(argv[1]) == 18);
    puts(failed == 0 ? "all as they should be" : "");
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
