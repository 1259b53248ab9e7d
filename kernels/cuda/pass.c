#include "pass.h"

#include "device.h"
#include "device/params.h"
#include "linear.h"
#include "operand.h"
#include "tensor_map.h"

enum {
    SIXTEEN = 16, /* columns of u that a box has */
    BOX = 64,     /* columns of x, and rows of u */
    B_ROWS = 256, /* rows of b */
    BACK_COLUMNS = PASS_HALVES * PASS_COLUMNS,
    SUM_BLOCK = 256,
    MOST_BLOCKS = 512 /* of one call: bounds the partial sums of d */
};

static bool is_16_bits(pml_dtype dtype)
{
    return dtype == PML_BF16 || dtype == PML_F16;
}

static int64_t row_tiles(int64_t rows)
{
    return pmli_div_up(rows, PASS_ROWS);
}

/* Column tiles of all adapters' parts of dy. */
static int64_t back_tiles(const pml_linear_bwd_args *a)
{
    int64_t tiles = 0;
    for (int p = 0; p < a->parts && p < PML_LINEAR_MAX_PARTS; p++)
        if (a->lora_parts >> p & 1)
            tiles += pmli_div_up(a->part_cols[p], BACK_COLUMNS);
    return tiles;
}

static bool back_fits(const pml_linear_bwd_args *a)
{
    bool ok = (a->rank == 8 || a->rank == SIXTEEN) && a->lora_parts != 0 && a->db.rows > 0 &&
              is_16_bits(a->dy.dtype) && back_tiles(a) <= MOST_BLOCKS;
    for (int p = 0; ok && p < a->parts; p++)
        ok = a->part_cols[p] % 8 == 0;
    return ok;
}

static size_t v_floats(const pml_linear_bwd_args *a)
{
    return (size_t)(back_tiles(a) * row_tiles(a->dy.rows)) * PASS_ROWS * SIXTEEN;
}

size_t pmli_pass_ws(const pml_linear_bwd_args *a)
{
    size_t d_floats = (size_t)MOST_BLOCKS * BACK_COLUMNS * SIXTEEN;
    return back_fits(a) ? sizeof(float) * (v_floats(a) + d_floats) : 0;
}

static bool in_packs(const pml_view *v)
{
    return pmli_rows_begin_on(v, 16);
}

bool pmli_pass_serves_back(const pml_device *device, const pml_linear_bwd_args *a,
                           const pml_view *v)
{
    return pmli_cuda_is_hopper(device) && back_fits(a) && a->db.data != NULL && v->data != NULL &&
           in_packs(&a->dy) && in_packs(&a->u) && in_packs(&a->b) && in_packs(v);
}

pml_status pmli_pass_prepare(pml_device *d, pml_error *err)
{
    static const pmli_kernel users[] = {PMLI_pass_back_bf16, PMLI_pass_back_f16};
    return pmli_cuda_is_hopper(d)
               ? pmli_cuda_allow_shared(d, users, sizeof users / sizeof *users, PASS_SHARED,
                                        "shared memory for one pass", err)
               : PML_OK;
}

/* How many blocks share the rows of a column tile: a block fills a processor, so what counts is how
 * often all of them are filled times what each does, in row tiles, of which its beginning and end
 * cost about two. Of equals the most blocks. */
static int blocks_a_column(const pml_device *device, int64_t columns, int64_t rows)
{
    int64_t best = 1, least = INT64_MAX;
    for (int64_t n = 1; n <= rows && (n == 1 || n * columns <= MOST_BLOCKS); n++) {
        int64_t cost = pmli_div_up(n * columns, device->processors) * (pmli_div_up(rows, n) + 2);
        if (cost <= least) {
            least = cost;
            best = n;
        }
    }
    return (int)best;
}

/* v in boxes of so many columns and rows. */
static pml_status describe(pmli_tensor_map *map, const pml_view *v, unsigned columns, unsigned rows,
                           pml_error *err)
{
    const pmli_boxes boxes = {.dtype = v->dtype,
                              .sides = 2,
                              .shape = {v->cols, v->rows},
                              .pitch = {v->ld},
                              .box = {columns, rows},
                              .far = true};
    return pmli_tensor_map_of(map, v->data, &boxes, "describing a matrix for the copy engine", err);
}

/* Blocks for the pass, then for its sums, of which a thread has four of the items. */
static pml_status launch(pml_queue *queue, const pmli_kernel kernels[2], pmli_pass_params *p,
                         int64_t items, pml_error *err)
{
    pmli_launch pass = {.grid_x = (unsigned)p->tile[p->adapters],
                        .grid_y = (unsigned)p->groups,
                        .block_x = PASS_THREADS,
                        .block_y = 1,
                        .shared = PASS_SHARED};
    pmli_launch sums = {.grid_x = (unsigned)pmli_div_up(items, 4 * SUM_BLOCK),
                        .grid_y = 1,
                        .block_x = SUM_BLOCK,
                        .block_y = 1,
                        .early = true};
    pml_status status = pmli_cuda_launch(queue, kernels[0], pass, p, err);
    return status == PML_OK ? pmli_cuda_launch(queue, kernels[1], sums, p, err) : status;
}

/* Each adapter's part of dy and of b. */
static pml_status find_parts(const pml_linear_bwd_args *a, pmli_pass_params *p, pml_error *err)
{
    pml_status status = describe(&p->u, &a->u, SIXTEEN, BOX, err);
    int64_t column = 0, b_row = 0;
    for (int part = 0; status == PML_OK && part < a->parts; column += a->part_cols[part++]) {
        if (!(a->lora_parts >> part & 1))
            continue;
        int i = p->adapters++, cols = a->part_cols[part];
        pml_view dy = pml_view_columns(a->dy, column, cols), b = pmli_rows_of(a->b, b_row, cols);
        status = describe(&p->x[i], &dy, BOX, PASS_ROWS, err);
        if (status == PML_OK)
            status = describe(&p->b[i], &b, SIXTEEN, B_ROWS, err);
        p->d_row[i] = b_row;
        p->columns[i] = cols;
        p->scale[i] = a->lora_scale[part];
        p->tile[i + 1] = p->tile[i] + (int)pmli_div_up(cols, BACK_COLUMNS);
        b_row += cols;
    }
    return status;
}

pml_status pmli_pass_back(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                          void *ws, pml_error *err)
{
    static const pmli_kernel kernels[][2] = {{PMLI_pass_back_bf16, PMLI_pass_back_sum_bf16},
                                             {PMLI_pass_back_f16, PMLI_pass_back_sum_f16}};
    int64_t tiles = row_tiles(a->dy.rows), columns = back_tiles(a);
    pmli_pass_params p = {.v = v->data,
                          .d = a->db.data,
                          .v_parts = ws,
                          .d_parts = (float *)ws + v_floats(a),
                          .rows = a->dy.rows,
                          .ld_v = v->ld,
                          .ld_d = a->db.ld,
                          .rank = a->rank,
                          .groups = blocks_a_column(queue->device, columns, tiles)};
    pml_status status = find_parts(a, &p, err);
    int64_t items = (tiles * PASS_ROWS * p.adapters + columns * BACK_COLUMNS) * SIXTEEN;
    return status == PML_OK ? launch(queue, kernels[a->dy.dtype == PML_F16], &p, items, err)
                            : status;
}
