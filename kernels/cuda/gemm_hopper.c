#include "gemm_hopper.h"

#include <stdlib.h>

#include "device.h"
#include "operand.h"
#include "pml/base/log.h"
#include "tensor_map.h"

enum {
    EIGHT = GEMM_DOWN * GEMM_ACROSS,           /* blocks of a cluster that has a unit at once */
    TURNS = EIGHT / GEMM_TWO,                  /* that a unit takes a cluster of two */
    HALF_TURNS = TURNS * GEMM_TWO / GEMM_DOWN, /* and its first rows of tiles */
    UNIT_ROWS = GEMM_DOWN * GEMM_ROWS,
    UNIT_COLUMNS = GEMM_ACROSS * GEMM_COLUMNS,
    /* Units of a band: what all processors are at is then nearly square, and reads the least of a
     * and b. Bands of 1024 and 4096 rows took about 1 % longer. */
    BAND = 2048 / UNIT_ROWS,
    PACK = 8,           /* elements of 16 bytes */
    MOST_UNITS = 0xffff /* the kernels multiply two such numbers in 32 bits */
};

bool pmli_gemm_hopper_is_wanted(void)
{
    const char *wish = getenv("PML_CUDA_OWN_PRODUCTS");
    return wish != NULL && wish[0] == '1';
}

/* As many clusters of eight as find their places at once. None where the driver does not say: this
 * kernel is then no candidate. */
static int count_clusters(const pml_device *d)
{
    CUlaunchAttribute cluster = {.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                                 .value.clusterDim = {EIGHT, 1, 1}};
    const CUlaunchConfig config = {.gridDimX = EIGHT,
                                   .gridDimY = 1,
                                   .gridDimZ = 1,
                                   .blockDimX = GEMM_THREADS,
                                   .blockDimY = 1,
                                   .blockDimZ = 1,
                                   .sharedMemBytes = GEMM_SHARED,
                                   .attrs = &cluster,
                                   .numAttrs = 1};
    pml_error why = PML_ERROR_INIT;
    int count = 0, most = d->processors / EIGHT;
    if (PMLI_CU(pmli_cu.cuOccupancyMaxActiveClusters(
                    &count, d->kernels[PMLI_gemm_hopper_eight_nt_bf16], &config),
                "counting clusters of eight blocks", &why) != PML_OK) {
        pml_log(PML_LOG_WARNING, "products by our own kernel are left out: %s", why.message);
        return 0;
    }
    return count < most ? count : most;
}

pml_status pmli_gemm_hopper_prepare(pml_device *d, pml_error *err)
{
    static const pmli_kernel users[] = {
        PMLI_gemm_hopper_eight_nt_bf16, PMLI_gemm_hopper_eight_nt_f16,
        PMLI_gemm_hopper_eight_nn_bf16, PMLI_gemm_hopper_eight_nn_f16,
        PMLI_gemm_hopper_two_nt_bf16,   PMLI_gemm_hopper_two_nt_f16,
        PMLI_gemm_hopper_two_nn_bf16,   PMLI_gemm_hopper_two_nn_f16};
    if (!pmli_cuda_is_hopper(d))
        return PML_OK;
    pml_status status = pmli_cuda_allow_shared(d, users, sizeof users / sizeof *users, GEMM_SHARED,
                                               "shared memory for products", err);
    d->clusters = status == PML_OK ? count_clusters(d) : 0;
    return status;
}

/* Clusters of two for the processors that those of eight leave. */
static int pairs(const pml_device *d)
{
    return pmli_cuda_begins_early() ? (d->processors - d->clusters * EIGHT) / GEMM_TWO : 0;
}

static bool in_packs(const void *data, int64_t ld)
{
    return (uintptr_t)data % 16 == 0 && ld % PACK == 0;
}

bool pmli_gemm_hopper_serves(const pml_device *d, const pmli_gemm *g)
{
    bool fits = (g->in == PML_BF16 || g->in == PML_F16) && g->out == g->in && !g->transpose_a &&
                g->alpha == 1 && g->beta == 0 && g->bias == NULL && g->scale_a == NULL &&
                g->n % PACK == 0 && g->m <= INT32_MAX / 2 && g->n <= INT32_MAX / 2 &&
                g->k <= INT32_MAX / 2 && in_packs(g->a, g->lda) && in_packs(g->b, g->ldb) &&
                in_packs(g->c, g->ldc);
    int64_t units = pmli_div_up(g->m, UNIT_ROWS) * pmli_div_up(g->n, UNIT_COLUMNS);
    int64_t tiles = pmli_div_up(g->m, GEMM_ROWS) * pmli_div_up(g->n, GEMM_COLUMNS);
    return pmli_cuda_is_hopper(d) && d->clusters > 0 && fits && units <= MOST_UNITS &&
           (tiles >= d->processors || pmli_gemm_hopper_is_wanted());
}

/* A matrix in boxes of 64 columns and so many rows. */
static pml_status describe(pmli_tensor_map *map, const void *data, pml_dtype dtype, int64_t rows,
                           int64_t columns, int64_t ld, unsigned box, pml_error *err)
{
    const pmli_boxes boxes = {.dtype = dtype,
                              .sides = 2,
                              .shape = {columns, rows},
                              .pitch = {ld},
                              .box = {64, box},
                              .far = true};
    return pmli_tensor_map_of(map, data, &boxes, "describing a product for the copy engine", err);
}

/* For clusters of `down` x `across` blocks, each of which brings its share of a stage. */
static pml_status describe_all(pmli_gemm_hopper_params *p, const pmli_gemm *g, unsigned down,
                               unsigned across, pml_error *err)
{
    pml_status status = describe(&p->a, g->a, g->in, g->m, g->k, g->lda, GEMM_ROWS / across, err);
    if (status == PML_OK)
        status = g->transpose_b
                     ? describe(&p->b, g->b, g->in, g->n, g->k, g->ldb, GEMM_COLUMNS / down, err)
                     : describe(&p->b, g->b, g->in, g->k, g->n, g->ldb, GEMM_STEP, err);
    if (status == PML_OK)
        status = describe(&p->c, g->c, g->out, g->m, g->n, g->ldc, 64, err);
    return status;
}

/* Rounds of clusters of eight in which those of two (`twos` of them) are done with what remains,
 * and with halves. */
static int64_t rounds(int64_t units, int64_t halves, int64_t eights, int64_t twos)
{
    int64_t first = HALF_TURNS * halves; /* turns */
    int64_t n = pmli_div_up(TURNS * units + first, TURNS * eights + twos);
    while (n * twos < first || n * eights + (n * twos - first) / TURNS < units)
        n++;
    return n;
}

/* Who makes which units: all processors are done at the same time, or nearly. Where two rows of
 * tiles or fewer remain below whole units, a cluster of eight would multiply as many of zeros. */
static void share_out(pmli_gemm_hopper_params *p, int64_t m, int64_t eights, int64_t twos)
{
    int64_t remain = m % UNIT_ROWS, whole = m / UNIT_ROWS * p->units_n;
    int64_t units = pmli_div_up(m, UNIT_ROWS) * p->units_n, halves = 0;
    int64_t n = rounds(units, 0, eights, twos);
    if (remain > 0 && remain <= GEMM_TWO * GEMM_ROWS && twos > 0 && whole > 0) {
        int64_t with_halves = rounds(whole, p->units_n, eights, twos);
        if (with_halves <= n) {
            n = with_halves;
            units = whole;
            halves = p->units_n;
        }
    }
    p->units_m = (int)(units / p->units_n);
    p->eights = (int)(n * eights < units ? n * eights : units);
    p->twos = (int)units - p->eights;
    p->halves = (int)halves;
}

pml_status pmli_gemm_hopper(pml_queue *queue, const pmli_gemm *g, pml_error *err)
{
    static const pmli_kernel kernels[2][2][2] = {
        {{PMLI_gemm_hopper_eight_nn_bf16, PMLI_gemm_hopper_eight_nn_f16},
         {PMLI_gemm_hopper_eight_nt_bf16, PMLI_gemm_hopper_eight_nt_f16}},
        {{PMLI_gemm_hopper_two_nn_bf16, PMLI_gemm_hopper_two_nn_f16},
         {PMLI_gemm_hopper_two_nt_bf16, PMLI_gemm_hopper_two_nt_f16}}};
    const pml_device *d = queue->device;
    const int twos = pairs(d), is_f16 = g->in == PML_F16;
    const int steps = (int)pmli_div_up(g->k, GEMM_STEP);
    pmli_gemm_hopper_params p = {.steps = steps < GEMM_LEAST ? GEMM_LEAST : steps,
                                 .units_n = (int)pmli_div_up(g->n, UNIT_COLUMNS),
                                 .band = BAND};
    share_out(&p, g->m, d->clusters, twos);
    /* What is beyond k reads as zeros: those steps need no products. */
    p.last = steps < GEMM_LEAST ? 1 : (int)pmli_div_up(g->k - (steps - 1) * GEMM_STEP, 16);
    pmli_launch eight = {.grid_x = (unsigned)(d->clusters * EIGHT),
                         .grid_y = 1,
                         .block_x = GEMM_THREADS,
                         .block_y = 1,
                         .shared = GEMM_SHARED,
                         .cluster = EIGHT};
    pmli_launch two = {.grid_x = (unsigned)(twos * GEMM_TWO),
                       .grid_y = 1,
                       .block_x = GEMM_THREADS,
                       .block_y = 1,
                       .shared = GEMM_SHARED,
                       .cluster = GEMM_TWO,
                       .early = true};
    pml_status status = describe_all(&p, g, GEMM_DOWN, GEMM_ACROSS, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, kernels[0][g->transpose_b][is_f16], eight, &p, err);
    if (status != PML_OK || p.twos + p.halves == 0)
        return status;
    status = describe_all(&p, g, GEMM_TWO, 1, err);
    return status == PML_OK
               ? pmli_cuda_launch(queue, kernels[1][g->transpose_b][is_f16], two, &p, err)
               : status;
}
