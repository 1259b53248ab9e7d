#include "gemm.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cublas.h"
#include "device.h"
#include "gemm_hopper.h"
#include "pml/base/log.h"

/* What decides the algorithm. Compared as bytes, so it is zeroed before it is filled. */
typedef struct key {
    int64_t m, n, k, lda, ldb, ldc;
    size_t workspace_size;
    uint32_t align_a, align_b, align_c, align_bias; /* align_bias = 0: no bias */
    pml_dtype in, out;
    bool transpose_a, transpose_b, accumulates, scales, has_factor;
} key;

typedef struct product {
    key key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
} product;

struct pmli_gemm_cache {
    pthread_mutex_t lock;
    product **products; /* each at its own address: one in use stays where it is */
    size_t count, capacity;
    pmli_choices *choices; /* timed, by this process or another before it; NULL: not kept */
};

pml_status pmli_gemm_cache_new(pmli_choices *choices, pmli_gemm_cache **cache, pml_error *err)
{
    *cache = calloc(1, sizeof **cache);
    if (*cache == NULL) {
        pmli_choices_destroy(&choices);
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the table of matrix products");
    }
    (*cache)->choices = choices;
    pthread_mutex_init(&(*cache)->lock, NULL);
    return PML_OK;
}

static void product_destroy(product *p)
{
    if (p == NULL)
        return;
    if (p->c != NULL)
        pmli_lt.cublasLtMatrixLayoutDestroy(p->c);
    if (p->b != NULL)
        pmli_lt.cublasLtMatrixLayoutDestroy(p->b);
    if (p->a != NULL)
        pmli_lt.cublasLtMatrixLayoutDestroy(p->a);
    if (p->desc != NULL)
        pmli_lt.cublasLtMatmulDescDestroy(p->desc);
    free(p);
}

void pmli_gemm_cache_destroy(pmli_gemm_cache **cache)
{
    if (*cache == NULL)
        return;
    for (size_t i = 0; i < (*cache)->count; i++)
        product_destroy((*cache)->products[i]);
    free((*cache)->products);
    pmli_choices_destroy(&(*cache)->choices);
    pthread_mutex_destroy(&(*cache)->lock);
    free(*cache);
    *cache = NULL;
}

/* The largest power of two up to 256 that divides an address: all that may be promised. */
static uint32_t alignment_of(const void *address)
{
    uintptr_t bits = (uintptr_t)address | 256;
    return (uint32_t)(bits & -bits);
}

static void key_of(key *k, const pmli_gemm *g)
{
    memset(k, 0, sizeof *k);
    k->m = g->m, k->n = g->n, k->k = g->k;
    k->lda = g->lda, k->ldb = g->ldb, k->ldc = g->ldc;
    k->workspace_size = g->workspace_size;
    k->align_a = alignment_of(g->a);
    k->align_b = alignment_of(g->b);
    k->align_c = alignment_of(g->c);
    k->align_bias = g->bias != NULL ? alignment_of(g->bias) : 0;
    k->in = g->in, k->out = g->out;
    k->transpose_a = g->transpose_a, k->transpose_b = g->transpose_b;
    k->accumulates = g->beta != 0;
    k->scales = g->scale_a != NULL;
    k->has_factor = g->alpha != 1;
}

static cudaDataType_t type_of(pml_dtype dtype)
{
    return dtype == PML_BF16  ? CUDA_R_16BF
           : dtype == PML_F16 ? CUDA_R_16F
           : dtype == PML_U8  ? CUDA_R_8F_E4M3
                              : CUDA_R_32F;
}

/* cuBLASLt is column-major: row-major c = a b is its c^T = b^T a^T, so our b is its A. */
static pml_status describe(product *p, pml_error *err)
{
    const key *k = &p->key;
    cublasOperation_t first = k->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t second = k->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    int8_t fast =
        1; /* sums of 8-bit products in the tensor core's own width: gpu.md has the error */
    cublasLtMatmulMatrixScale_t by_rows = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const char *what = "describing a matrix product";
    /* Plain float32 sums; float32 operands are multiplied as such, never rounded to tf32. */
    pml_status status = PMLI_LT(
        pmli_lt.cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), what, err);
#define SET(attribute, value)                                                                      \
    if (status == PML_OK)                                                                          \
    status = PMLI_LT(                                                                              \
        pmli_lt.cublasLtMatmulDescSetAttribute(p->desc, attribute, &(value), sizeof(value)), what, \
        err)
    SET(CUBLASLT_MATMUL_DESC_TRANSA, first);
    SET(CUBLASLT_MATMUL_DESC_TRANSB, second);
    if (k->align_bias != 0) {
        SET(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    }
    if (k->in == PML_U8) {
        SET(CUBLASLT_MATMUL_DESC_FAST_ACCUM, fast);
    }
    if (k->scales) {
        SET(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, by_rows);
        SET(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, by_rows);
    }
#undef SET
#define LAYOUT(member, type, rows, cols, ld)                                                       \
    if (status == PML_OK)                                                                          \
    status = PMLI_LT(pmli_lt.cublasLtMatrixLayoutCreate(&p->member, type_of(type),                 \
                                                        (uint64_t)(rows), (uint64_t)(cols), ld),   \
                     what, err)
    LAYOUT(a, k->in, k->transpose_b ? k->k : k->n, k->transpose_b ? k->n : k->k, k->ldb);
    LAYOUT(b, k->in, k->transpose_a ? k->m : k->k, k->transpose_a ? k->k : k->m, k->lda);
    LAYOUT(c, k->out, k->n, k->m, k->ldc);
#undef LAYOUT
    return status;
}

/* What the shared descriptor is told anew at every call: addresses. */
static pml_status set_addresses(const product *p, const pmli_gemm *g, pml_error *err)
{
    const struct {
        cublasLtMatmulDescAttributes_t attribute;
        const void *address;
    } all[] = {{CUBLASLT_MATMUL_DESC_BIAS_POINTER, g->bias},
               {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, g->scale_b}, /* our b is its A */
               {CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, g->scale_a}};
    pml_status status = PML_OK;
    for (size_t i = 0; status == PML_OK && i < sizeof all / sizeof *all; i++)
        if (all[i].address != NULL)
            status = PMLI_LT(pmli_lt.cublasLtMatmulDescSetAttribute(
                                 p->desc, all[i].attribute, &all[i].address, sizeof all[i].address),
                             "setting an address of a product", err);
    return status;
}

/* The algorithm that is none of cuBLASLt's but our own kernel: in the place of one of its own, so
 * that a choice is kept the same way whosever it is. "our own!" */
static const cublasLtMatmulAlgo_t ours = {.data = {0x216e776f2072756f}};

static bool is_ours(const cublasLtMatmulAlgo_t *algo)
{
    return memcmp(algo, &ours, sizeof ours) == 0;
}

static pml_status multiply(pml_queue *queue, const product *p, const pmli_gemm *g,
                           const cublasLtMatmulAlgo_t *algo, pml_error *err)
{
    if (is_ours(algo))
        return pmli_gemm_hopper(queue, g, err);
    return PMLI_LT(pmli_lt.cublasLtMatmul(queue->device->lt, p->desc, &g->alpha, g->b, p->a, g->a,
                                          p->b, &g->beta, g->c, p->c, g->c, p->c, algo,
                                          g->workspace, g->workspace_size, queue->stream),
                   "matrix product", err);
}

enum { HEURISTIC = 8, CANDIDATES = HEURISTIC + 1, ROUNDS = 3 };

/* One run in ms; 0 where the candidate does not run: one that this library cannot run is none. */
static pml_status time_one(pml_queue *queue, const product *p, const pmli_gemm *g,
                           const cublasLtMatmulAlgo_t *algo, CUevent marks[2], float *took,
                           pml_error *err)
{
    const char *what = "timing a product";
    pml_error why = PML_ERROR_INIT;
    *took = 0;
    pml_status status = PMLI_CU(pmli_cu.cuEventRecord(marks[0], queue->stream), what, err);
    if (status == PML_OK && multiply(queue, p, g, algo, &why) != PML_OK) {
        if (is_ours(algo)) /* which says beforehand what it serves */
            pml_log(PML_LOG_WARNING, "our own kernel is no candidate: %s", why.message);
        return PML_OK;
    }
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuEventRecord(marks[1], queue->stream), what, err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuStreamSynchronize(queue->stream), what, err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuEventElapsedTime(took, marks[0], marks[1]), what, err);
    return status;
}

static size_t span_of(const pmli_gemm *g)
{
    return (size_t)((g->m - 1) * g->ldc + g->n) * pml_dtype_size(g->out);
}

/* The product as it is timed. What is written whole goes where it belongs: the product that follows
 * writes it once more. What is added to is not touched: sums go into the workspace's second half.
 */
static pmli_gemm rehearsal(const pmli_gemm *g)
{
    pmli_gemm r = *g;
    if (g->beta != 0) {
        r.workspace_size = g->workspace_size / 2 / 256 * 256;
        r.c = (char *)g->workspace + r.workspace_size;
    }
    return r;
}

/* The fastest of the candidates on this device, 1-8% better than the heuristic's first on a model's
 * shapes. They take turns: a chip's clock falls while it is at work, and who came first would win.
 */
static pml_status time_candidates(pml_queue *queue, product *p, const pmli_gemm *g,
                                  const cublasLtMatmulAlgo_t *found, int count, pml_error *err)
{
    CUevent marks[2] = {NULL, NULL};
    const pmli_gemm tried = rehearsal(g);
    float least[CANDIDATES] = {0};
    bool runs[CANDIDATES];
    pml_status status = PML_OK;
    for (int i = 0; status == PML_OK && i < 2; i++)
        status =
            PMLI_CU(pmli_cu.cuEventCreate(&marks[i], CU_EVENT_DEFAULT), "timing a product", err);
    for (int i = 0; i < count; i++)
        runs[i] = true;
    for (int turn = 0; turn < ROUNDS * count; turn++) {
        int i = turn % count;
        float took;
        if (status != PML_OK || !runs[i])
            continue;
        status = time_one(queue, p, &tried, &found[i], marks, &took, err);
        runs[i] = took > 0;
        if (turn < count || took < least[i])
            least[i] = took;
    }
    float best = 0;
    for (int i = 0; status == PML_OK && i < count; i++)
        if (runs[i] && (best == 0 || least[i] < best)) {
            best = least[i];
            p->algo = found[i];
        }
    for (int i = 0; i < 2; i++)
        if (marks[i] != NULL)
            pmli_cu.cuEventDestroy(marks[i]);
    return status;
}

static double operations(const key *k)
{
    return 2.0 * (double)k->m * (double)k->n * (double)k->k;
}

/* Whether the choice is a timed one: here and now, or earlier and kept. Only where that is worth
 * its time, and can be had without harm. */
static bool by_time(const pml_queue *queue, const key *k, const pmli_gemm *g)
{
    const double least = 1e9; /* floating-point operations */
    bool has_room = g->beta == 0 || span_of(g) <= g->workspace_size / 2 / 256 * 256;
    return !queue->device->deterministic && has_room && operations(k) >= least;
}

/* What decides a choice, as it stands on disk. */
static void choice_key(const key *k, int64_t words[PMLI_CHOICE_KEY])
{
    int64_t kind = (int64_t)k->in | (int64_t)k->scales << 8 | (int64_t)k->has_factor << 9;
    const int64_t all[PMLI_CHOICE_KEY] = {
        k->m,           k->n,           k->k,           k->lda,
        k->ldb,         k->ldc,         k->align_a,     k->align_b,
        k->align_c,     k->align_bias,  kind,           (int64_t)k->out,
        k->transpose_a, k->transpose_b, k->accumulates, (int64_t)k->workspace_size};
    memcpy(words, all, sizeof all);
}

_Static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(uint64_t) * PMLI_CHOICE_WORDS,
               "an algorithm is kept whole");

enum { M_WORD = 0, K_WORD = 2 }; /* of a choice's key */

/* The choice of the same product with more rows of a, at most twice as many. Rows are tokens, or
 * labelled ones: what differs from batch to batch, so that a size that comes in the midst of a run
 * would have all of its products timed then, for as long as half a step. It goes that way alone: a
 * run's fullest batches, which most are like, have choices of their own, whichever came first. A
 * small product is timed all the same: that takes next to no time, and which is fastest changes
 * sooner where a few blocks more or less fill the chip. */
static const uint64_t *of_more_rows(const pmli_choices *choices, const key *k,
                                    const int64_t words[PMLI_CHOICE_KEY])
{
    const double least = 5e10; /* floating-point operations: 0.1 ms where they are fastest */
    int place = k->transpose_a ? K_WORD : M_WORD;
    return operations(k) >= least ? pmli_choices_near(choices, words, place, 2 * words[place])
                                  : NULL;
}

/* A choice that was timed, for this product or one that it may go by, where who made it says that
 * it can be run. */
static bool recall(pml_queue *queue, product *p, const pmli_gemm *g)
{
    const pmli_choices *choices = queue->device->products->choices;
    int64_t words[PMLI_CHOICE_KEY];
    if (choices == NULL)
        return false;
    choice_key(&p->key, words);
    const uint64_t *kept = pmli_choices_find(choices, words);
    if (kept == NULL)
        kept = of_more_rows(choices, &p->key, words);
    cublasLtMatmulHeuristicResult_t result;
    if (kept == NULL)
        return false;
    memcpy(&p->algo, kept, sizeof p->algo);
    if (is_ours(&p->algo))
        return pmli_gemm_hopper_serves(queue->device, g);
    return pmli_lt.cublasLtMatmulAlgoCheck(queue->device->lt, p->desc, p->a, p->b, p->c, p->c,
                                           &p->algo, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= p->key.workspace_size;
}

static void keep(pml_queue *queue, const product *p)
{
    pmli_choices *choices = queue->device->products->choices;
    pmli_choice choice;
    if (choices == NULL)
        return;
    choice_key(&p->key, choice.key);
    memcpy(choice.algorithm, &p->algo, sizeof choice.algorithm);
    pmli_choices_keep(choices, &choice);
}

/* The heuristic's candidates and our own kernel, the fastest where it may be timed; else the
 * heuristic's first choice, the same one on every machine of a kind; or our own kernel alone, where
 * tests want it. */
static pml_status choose(pml_queue *queue, product *p, const pmli_gemm *g, pml_error *err)
{
    cublasLtHandle_t lt = queue->device->lt;
    const key *k = &p->key;
    bool timed = by_time(queue, k, g);
    bool serves = pmli_gemm_hopper_serves(queue->device, g);
    if (serves && pmli_gemm_hopper_is_wanted()) {
        pml_log(PML_LOG_INFO, "product of %lld x %lld x %lld by our own kernel", (long long)k->m,
                (long long)k->n, (long long)k->k);
        p->algo = ours;
        return PML_OK;
    }
    if (timed && recall(queue, p, g))
        return PML_OK;
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t result[HEURISTIC];
    cublasLtMatmulAlgo_t candidates[CANDIDATES];
    int found = 0;
    const char *what = "choosing an algorithm for a matrix product";
    pml_status status = PMLI_LT(pmli_lt.cublasLtMatmulPreferenceCreate(&preference), what, err);
#define PREFER(attribute, value)                                                                   \
    if (status == PML_OK)                                                                          \
    status = PMLI_LT(pmli_lt.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &(value), \
                                                                  sizeof(value)),                  \
                     what, err)
    PREFER(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, k->workspace_size);
    PREFER(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, k->align_b);
    PREFER(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, k->align_a);
    PREFER(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, k->align_c);
    PREFER(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, k->align_c);
#undef PREFER
    if (status == PML_OK)
        status =
            PMLI_LT(pmli_lt.cublasLtMatmulAlgoGetHeuristic(lt, p->desc, p->a, p->b, p->c, p->c,
                                                           preference, HEURISTIC, result, &found),
                    what, err);
    if (status == PML_OK && found == 0)
        status = PML_FAIL(err, PML_UNSUPPORTED, "cuBLASLt has no algorithm");
    for (int i = 0; status == PML_OK && i < found; i++)
        candidates[i] = result[i].algo;
    if (status == PML_OK)
        p->algo = candidates[0];
    if (status == PML_OK && serves)
        candidates[found++] = ours;
    if (status == PML_OK && found > 1 && timed && !queue->recording) {
        status = time_candidates(queue, p, g, candidates, found, err);
        if (status == PML_OK)
            keep(queue, p);
    }
    if (preference != NULL)
        pmli_lt.cublasLtMatmulPreferenceDestroy(preference);
    return status;
}

static pml_status add(pml_queue *queue, const key *k, const pmli_gemm *g, product **made,
                      pml_error *err)
{
    pmli_gemm_cache *cache = queue->device->products;
    if (cache->count == cache->capacity) {
        size_t capacity = cache->capacity == 0 ? 64 : 2 * cache->capacity;
        product **grown = realloc(cache->products, capacity * sizeof *grown);
        if (grown == NULL)
            return PML_FAIL(err, PML_NO_MEMORY, "no memory for %zu matrix products", capacity);
        cache->products = grown;
        cache->capacity = capacity;
    }
    product *p = calloc(1, sizeof *p);
    if (p == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a matrix product");
    memcpy(&p->key, k, sizeof *k); /* padding too */
    pml_status status = describe(p, err);
    if (status == PML_OK)
        status = set_addresses(p, g, err); /* candidates are timed with them */
    if (status == PML_OK)
        status = choose(queue, p, g, err);
    if (status != PML_OK) {
        product_destroy(p);
        return pml_error_prefix(err, "product of [%lld,%lld] and [%lld,%lld] %s", (long long)k->m,
                                (long long)k->k, (long long)k->k, (long long)k->n,
                                pml_dtype_name(k->in));
    }
    cache->products[cache->count++] = *made = p;
    return PML_OK;
}

/* With the cache's lock held. A model has some dozens of shapes: a walk costs less than a launch.
 */
static pml_status look_up(pml_queue *queue, const pmli_gemm *g, product **p, pml_error *err)
{
    pmli_gemm_cache *cache = queue->device->products;
    key k;
    key_of(&k, g);
    for (size_t i = 0; i < cache->count; i++)
        if (memcmp(&cache->products[i]->key, &k, sizeof k) == 0) {
            *p = cache->products[i];
            return PML_OK;
        }
    return add(queue, &k, g, p, err);
}

bool pmli_gemm_scales_rows(const pml_device *device)
{
    enum { FROM = 120900 };
    return PML_CUDA_ROW_SCALES && device->capability == 90 && pmli_lt.cublasLtGetVersion() >= FROM;
}

pml_status pmli_gemm_run(pml_queue *queue, const pmli_gemm *g, pml_error *err)
{
    pml_device *device = queue->device;
    product *p = NULL;
    /* Held through the call: addresses are written into the shared descriptor. */
    pthread_mutex_lock(&device->products->lock);
    pml_status status = look_up(queue, g, &p, err);
    if (status == PML_OK)
        status = set_addresses(p, g, err);
    if (status == PML_OK)
        status = multiply(queue, p, g, &p->algo, err);
    pthread_mutex_unlock(&device->products->lock);
    return status;
}
