#include "low_rank.h"

#include "device.h"
#include "device/params.h"
#include "linear.h"
#include "operand.h"

enum {
    BLOCK = 256,
    WARPS = BLOCK / 32,
    MOST_BLOCKS = 512, /* of one call: bounds the partial sums of db */
    SHARED = LOW_RANK_STAGES * (LOW_RANK_COLUMNS + LOW_RANK_RANK) * LOW_RANK_ROWS * 2 +
             2 * WARPS * LOW_RANK_ROWS * LOW_RANK_RANK * (int)sizeof(float)
};

/* Column tiles of all adapters' parts. */
static int64_t column_tiles(const pml_linear_bwd_args *a)
{
    int64_t tiles = 0;
    for (int p = 0; p < a->parts && p < PML_LINEAR_MAX_PARTS; p++)
        if (a->lora_parts >> p & 1)
            tiles += pmli_div_up(a->part_cols[p], LOW_RANK_COLUMNS);
    return tiles;
}

static bool fits(const pml_linear_bwd_args *a)
{
    bool ok = (a->rank == 8 || a->rank == 16) && a->lora_parts != 0 && a->db.rows > 0 &&
              (a->dy.dtype == PML_BF16 || a->dy.dtype == PML_F16) && column_tiles(a) <= MOST_BLOCKS;
    for (int p = 0; ok && p < a->parts; p++)
        ok = a->part_cols[p] % 8 == 0;
    return ok;
}

static size_t v_floats(const pml_linear_bwd_args *a)
{
    return (size_t)(column_tiles(a) * a->dy.rows) * LOW_RANK_RANK;
}

size_t pmli_low_rank_ws(const pml_linear_bwd_args *a)
{
    size_t b_floats = (size_t)MOST_BLOCKS * LOW_RANK_RANK * LOW_RANK_COLUMNS;
    return fits(a) ? sizeof(float) * (v_floats(a) + b_floats) : 0;
}

static bool in_packs(const pml_view *v)
{
    return pmli_rows_begin_on(v, 16);
}

bool pmli_low_rank_serves(const pml_device *device, const pml_linear_bwd_args *a, const pml_view *v)
{
    return fits(a) && a->db.data != NULL && v->data != NULL && SHARED <= device->shared_most &&
           device->code >= 80 && in_packs(&a->dy) && in_packs(&a->u) && in_packs(&a->db) &&
           in_packs(v);
}

pml_status pmli_low_rank_prepare(pml_device *d, pml_error *err)
{
    static const pmli_kernel users[] = {PMLI_low_rank_bf16, PMLI_low_rank_f16};
    return SHARED <= d->shared_most
               ? pmli_cuda_allow_shared(d, users, sizeof users / sizeof *users, SHARED,
                                        "shared memory for low-rank products", err)
               : PML_OK;
}

/* How many blocks share the rows of a column tile: a block fills a processor, so what counts is how
 * often all of them are filled times what each does, in row tiles of about a microsecond; a block's
 * beginning and end cost about four, and every block's sums of db cost what they weigh and, eight
 * at a time, the way to memory. */
static int64_t blocks_a_column(const pml_device *device, int64_t columns, int64_t rows)
{
    int64_t best = 1;
    double least = 0;
    for (int64_t n = 1; n <= rows && n * columns <= MOST_BLOCKS; n++) {
        double cost =
            (double)(pmli_div_up(n * columns, device->processors) * (pmli_div_up(rows, n) + 4)) +
            (double)(n * columns) / 64 + (double)n / 8;
        if (n == 1 || cost < least) {
            least = cost;
            best = n;
        }
    }
    return best;
}

static void find_parts(const pml_linear_bwd_args *a, pmli_low_rank_params *p)
{
    int column = 0;
    long long b_row = 0;
    for (int part = 0; part < a->parts; column += a->part_cols[part++]) {
        if (!(a->lora_parts >> part & 1))
            continue;
        int i = p->adapters++;
        p->column[i] = column;
        p->columns[i] = a->part_cols[part];
        p->b_row[i] = b_row;
        p->scale[i] = a->lora_scale[part];
        p->tile[i + 1] = p->tile[i] + (int)pmli_div_up(a->part_cols[part], LOW_RANK_COLUMNS);
        b_row += a->part_cols[part];
    }
}

pml_status pmli_low_rank(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                         void *ws, pml_error *err)
{
    bool bf16 = a->dy.dtype == PML_BF16;
    pmli_low_rank_params p = {.dy = a->dy.data,
                              .u = a->u.data,
                              .b = a->b.data,
                              .v = v->data,
                              .db = a->db.data,
                              .v_parts = ws,
                              .b_parts = (float *)ws + v_floats(a),
                              .tokens = a->dy.rows,
                              .ld_dy = a->dy.ld,
                              .ld_u = a->u.ld,
                              .ld_b = a->b.ld,
                              .ld_v = v->ld,
                              .ld_db = a->db.ld,
                              .rank = a->rank};
    find_parts(a, &p);
    int64_t columns = p.tile[p.adapters];
    int64_t n = blocks_a_column(queue->device, columns, pmli_div_up(a->dy.rows, LOW_RANK_ROWS));
    p.parts = (int)n;
    pmli_launch shape = {.grid_x = (unsigned)columns,
                         .grid_y = (unsigned)n,
                         .block_x = BLOCK,
                         .block_y = 1,
                         .shared = SHARED};
    pml_status status =
        pmli_cuda_launch(queue, bf16 ? PMLI_low_rank_bf16 : PMLI_low_rank_f16, shape, &p, err);
    int64_t fours =
        p.tokens * p.adapters * (p.rank / 4) + columns * LOW_RANK_COLUMNS * (LOW_RANK_RANK / 4);
    shape = (pmli_launch){
        .grid_x = (unsigned)pmli_div_up(fours, BLOCK), .grid_y = 1, .block_x = BLOCK, .block_y = 1};
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, bf16 ? PMLI_low_rank_sum_bf16 : PMLI_low_rank_sum_f16,
                                  shape, &p, err);
    return status;
}
