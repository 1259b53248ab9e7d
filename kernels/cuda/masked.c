#include "masked.h"

#include "pml/base/philox.h"

#include "columns.h"
#include "device.h"
#include "device/params.h"
#include "linear.h"
#include "operand.h"

enum {
    RANKS = 16,              /* of a group */
    PIECE = 8,               /* what a rank is whole pieces of */
    PAIR = 2,                /* groups of one part, under one mask, that a launch has */
    ONE = 3,                 /* where the kernel for such a pair stands in a row of them */
    MOST_COLUMNS = 160 << 10 /* of all blocks of the backward: bounds the partial sums of da */
};

/* What both directions ask of an adapter with dropout. More ranks than a pair has are cheaper by
 * products that read a masked copy, once for all of them. */
static bool fits(pml_dtype dtype, int64_t rows, const pml_view *a, int32_t rank, float dropout)
{
    return (dtype == PML_BF16 || dtype == PML_F16) && dropout > 0 && rank % PIECE == 0 &&
           rank <= PAIR * RANKS && a->cols > 0 && a->cols % PIECE == 0 &&
           rows <= INT32_MAX - MASKED_ROWS && a->rows * a->ld <= INT32_MAX;
}

/* Rows that can be told apart by 32 bits, a tile's of them, and begin on 16 bytes. */
static bool in_reach(const pml_view *v)
{
    return pmli_rows_begin_on(v, 16) && v->ld <= UINT32_MAX / (2 * MASKED_ROWS);
}

/* A way through the parts with an adapter. */
typedef struct walk {
    int32_t parts, rank;
    uint32_t lora_parts, purpose;
    const float *scale;
    int part, row; /* where the next one's ranks begin, of a's rows */
} walk;

/* The groups of the next launch: of at most `most` parts, each under its mask, or two of one part.
 * Returns how many; 0: none is left. */
static int take_groups(walk *w, int most, pmli_masked_params *p)
{
    bool pair = w->rank > RANKS;
    int groups = 0;
    for (; w->part < w->parts && groups < (pair ? 1 : most); w->part++) {
        if (!(w->lora_parts >> w->part & 1))
            continue;
        for (int at = 0; at < w->rank; at += RANKS, groups++) {
            p->first[groups] = w->row + at;
            p->ranks[groups] = w->rank - at < RANKS ? w->rank - at : RANKS;
            p->purpose[groups] = w->purpose + (uint32_t)w->part;
            p->scale[groups] = w->scale[w->part] * p->keep;
        }
        w->row += w->rank;
    }
    return groups;
}

/* Which of a row of kernels has such groups. */
static int kernel_of(int groups, int32_t rank)
{
    return rank > RANKS && groups == PAIR ? ONE : groups - 1;
}

static void set_mask(pmli_masked_params *p, const pml_view *rng, const pml_view *places,
                     float dropout)
{
    uint32_t least = pml_dropout_least(dropout);
    p->rng = rng->data;
    p->places = places->data;
    p->least = least << 16;
    p->keep = pml_dropout_keep(least);
}

/* Every block that is launched has its room: on GPUs with 99 KiB but one of three groups, which are
 * not made there, on those with 163 and with 227 all. */
_Static_assert(MASKED_SHARED(2, true, 86) <= 99 << 10 && MASKED_SHARED(1, true, 86) <= 99 << 10 &&
                   MASKED_SHARED(2, false, 86) <= 99 << 10,
               "shared memory");
_Static_assert(MASKED_SHARED(3, true, 80) <= 163 << 10 && MASKED_SHARED(1, true, 80) <= 163 << 10 &&
                   MASKED_SHARED(2, false, 80) <= 163 << 10,
               "shared memory");
_Static_assert(MASKED_SHARED(3, true, 90) <= 227 << 10 && MASKED_SHARED(1, true, 90) <= 227 << 10 &&
                   MASKED_SHARED(2, false, 90) <= 227 << 10,
               "shared memory");
_Static_assert(MASKED_DOWN_SHARED <= 99 << 10 &&
                   MASKED_DOWN_SHARED >= MASKED_THREADS / 32 * MASKED_ROWS * MASKED_GROUPS * RANKS *
                                             (int)sizeof(float),
               "room for strips, and for sums");

/* Parts that a launch of the backward has. */
static int most_parts(const pml_device *d, bool both)
{
    return !both                                                           ? 1
           : MASKED_SHARED(MASKED_GROUPS, true, d->code) <= d->shared_most ? MASKED_GROUPS
                                                                           : PAIR;
}

/* Whether this is a GPU of such a kind that the asserts above speak of. */
static bool has_room(const pml_device *d)
{
    return d->code >= 80 && MASKED_DOWN_SHARED <= d->shared_most &&
           MASKED_SHARED(1, true, d->code) <= d->shared_most &&
           MASKED_SHARED(PAIR, true, d->code) <= d->shared_most &&
           MASKED_SHARED(PAIR, false, d->code) <= d->shared_most;
}

bool pmli_masked_serves_down(const pml_device *device, const pml_linear_args *a, const pml_view *u)
{
    return has_room(device) && fits(a->x.dtype, a->x.rows, &a->a, a->rank, a->lora_dropout) &&
           in_reach(&a->x) && pmli_rows_begin_on(&a->a, 16) && pmli_rows_begin_on(u, 4);
}

pml_status pmli_masked_down(pml_queue *queue, const pml_linear_args *a, const pml_view *u,
                            pml_error *err)
{
    static const pmli_kernel kernels[2] = {PMLI_masked_down_1_bf16, PMLI_masked_down_1_f16};
    pmli_masked_params p = {.x = a->x.data,
                            .a = a->a.data,
                            .u = u->data,
                            .rows = (int)a->x.rows,
                            .cols = (int)a->x.cols,
                            .ld_x = a->x.ld,
                            .ld_a = (int)a->a.ld,
                            .ld_u = u->ld};
    set_mask(&p, &a->rng, &a->places, a->lora_dropout);
    pmli_launch shape = {.grid_x = (unsigned)pmli_div_up(p.rows, MASKED_ROWS),
                         .grid_y = 1,
                         .block_x = MASKED_THREADS,
                         .block_y = 1,
                         .shared = MASKED_DOWN_SHARED};
    walk w = {.parts = a->parts,
              .rank = a->rank,
              .lora_parts = a->lora_parts,
              .purpose = a->lora_purpose,
              .scale = a->lora_scale};
    int groups;
    pml_status status = PML_OK;
    while (status == PML_OK && (groups = take_groups(&w, MASKED_GROUPS, &p)) > 0) {
        unsigned kernel = kernels[a->x.dtype == PML_F16] + (unsigned)kernel_of(groups, a->rank);
        status = pmli_cuda_launch(queue, (pmli_kernel)kernel, shape, &p, err);
    }
    return status;
}

/* Columns that a block of the backward has. */
static int64_t block_columns(int groups, bool both, int code)
{
    return MASKED_BACK_THREADS(groups, both, code) / 32 * MASKED_STRIP;
}

/* Blocks that share the rows of so many columns, at the most. */
static int64_t most_ranges(const pml_linear_bwd_args *a, int64_t columns)
{
    int64_t most = MOST_COLUMNS / (pmli_div_up(a->a.cols, columns) * columns);
    int64_t tiles = pmli_div_up(a->dy.rows, MASKED_ROWS);
    most = most > tiles ? tiles : most;
    return most > 1 ? most : 1;
}

size_t pmli_masked_back_ws(const pml_linear_bwd_args *a)
{
    if (a->lora_parts == 0 || !fits(a->dy.dtype, a->dy.rows, &a->a, a->rank, a->lora_dropout))
        return 0;
    int64_t ranges = most_ranges(a, block_columns(PAIR, true, 0)); /* the narrowest: most of them */
    return sizeof(float) * (size_t)(ranges * MASKED_GROUPS * RANKS * a->a.cols);
}

bool pmli_masked_serves_back(const pml_device *device, const pml_linear_bwd_args *a,
                             const pml_view *v)
{
    return has_room(device) && fits(a->dy.dtype, a->dy.rows, &a->a, a->rank, a->lora_dropout) &&
           in_reach(&a->x) && in_reach(&a->dx) && pmli_rows_begin_on(&a->a, 16) &&
           pmli_rows_begin_on(v, 16) && (a->da.data == NULL || a->da.ld == a->da.cols);
}

/* Allow what kernel k of a row of both dtypes' wants. */
static pml_status allow(pml_device *d, pmli_kernel bf16, pmli_kernel f16, unsigned k, int bytes,
                        pml_error *err)
{
    const pmli_kernel users[] = {(pmli_kernel)(bf16 + k), (pmli_kernel)(f16 + k)};
    return pmli_cuda_allow_shared(d, users, 2, bytes, "shared memory for masked products", err);
}

pml_status pmli_masked_prepare(pml_device *d, pml_error *err)
{
    static const int groups_of[] = {1, 2, 3, PAIR};
    pml_status status = PML_OK;
    if (!has_room(d))
        return PML_OK;
    for (unsigned k = 0; status == PML_OK && k <= ONE; k++) {
        int bytes = MASKED_SHARED(groups_of[k], true, d->code);
        status =
            allow(d, PMLI_masked_down_1_bf16, PMLI_masked_down_1_f16, k, MASKED_DOWN_SHARED, err);
        if (status == PML_OK && groups_of[k] <= most_parts(d, true))
            status = allow(d, PMLI_masked_both_1_bf16, PMLI_masked_both_1_f16, k, bytes, err);
    }
    for (unsigned k = 0; status == PML_OK && k < 2; k++) {
        int bytes = MASKED_SHARED(k == 0 ? 1 : PAIR, false, d->code);
        status = allow(d, PMLI_masked_dx_1_bf16, PMLI_masked_dx_1_f16, k, bytes, err);
        if (status == PML_OK)
            status = allow(d, PMLI_masked_da_1_bf16, PMLI_masked_da_1_f16, k, bytes, err);
    }
    return status;
}

/* The kernel for what is wanted; of one direction alone there are but those for one mask. */
static pmli_kernel back_kernel(const pml_linear_bwd_args *a, int groups)
{
    static const pmli_kernel first[3][2] = {{PMLI_masked_both_1_bf16, PMLI_masked_both_1_f16},
                                            {PMLI_masked_dx_1_bf16, PMLI_masked_dx_1_f16},
                                            {PMLI_masked_da_1_bf16, PMLI_masked_da_1_f16}};
    int wants = a->da.data == NULL ? 1 : a->dx.data == NULL ? 2 : 0;
    unsigned kernel = wants == 0 ? (unsigned)kernel_of(groups, a->rank) : (unsigned)groups - 1;
    return (pmli_kernel)(first[wants][a->dy.dtype == PML_F16] + kernel);
}

pml_status pmli_masked_back(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                            void *ws, pml_error *err)
{
    if (a->da.data == NULL && a->dx.data == NULL)
        return PML_OK;
    bool both = a->da.data != NULL && a->dx.data != NULL;
    pmli_masked_params p = {.x = a->x.data,
                            .a = a->a.data,
                            .v = v->data,
                            .dx = a->dx.data,
                            .parts = ws,
                            .rows = (int)a->dy.rows,
                            .cols = (int)a->a.cols,
                            .ld_x = a->x.ld,
                            .ld_a = (int)a->a.ld,
                            .ld_v = v->ld,
                            .ld_dx = a->dx.ld};
    set_mask(&p, &a->rng, &a->places, a->lora_dropout);
    walk w = {.parts = a->parts,
              .rank = a->rank,
              .lora_parts = a->lora_parts,
              .purpose = a->lora_purpose,
              .scale = a->lora_scale};
    const pml_device *device = queue->device;
    int groups, code = device->code;
    pml_status status = PML_OK;
    while (status == PML_OK && (groups = take_groups(&w, most_parts(device, both), &p)) > 0) {
        int64_t columns = block_columns(groups, both, code), across = pmli_div_up(p.cols, columns);
        int64_t most = most_ranges(a, columns), blocks = device->processors * (both ? 1 : 2);
        int64_t ranges = blocks / across > most ? most : blocks / across;
        pmli_launch shape = {.grid_x = (unsigned)across,
                             .grid_y = (unsigned)(ranges > 1 ? ranges : 1),
                             .block_x = (unsigned)MASKED_BACK_THREADS(groups, both, code),
                             .block_y = 1,
                             .shared = (unsigned)MASKED_SHARED(groups, both, code)};
        status = pmli_cuda_launch(queue, back_kernel(a, groups), shape, &p, err);
        int first = p.first[0], ranks = p.first[groups - 1] + p.ranks[groups - 1] - first;
        float *da = (float *)a->da.data + (int64_t)first * p.cols;
        if (status == PML_OK && a->da.data != NULL)
            status =
                pmli_cuda_add_parts(queue, ws, shape.grid_y, (int64_t)ranks * p.cols, &da, 1, err);
    }
    return status;
}
