#include "mlp.h"

#include "device.h"
#include "device/params.h"
#include "linear.h"

enum {
    BLOCK = 512,
    SUM_BLOCK = 256,
    MOST_BLOCKS = 256,     /* of one call: bounds the partial sums over rows */
    MOST_TOKENS = 1 << 26, /* whose sums are counted in 32 bits */
    TILE = MLP_ROWS * MLP_COLUMNS * 2,
    FACTOR = MLP_ROWS * MLP_RANK * 2,
    SUMS = MLP_ROWS * MLP_RANK * (int)sizeof(float), /* of a tile's columns by one group of warps */
    SHARED = MLP_STAGES * 2 * TILE + 2 * 8 * SUMS,
    BACK_SHARED = MLP_BACK_STAGES * 3 * (TILE + FACTOR) + 2 * 4 * 2 * SUMS,
    ARRAYS = 3
};

static int64_t column_tiles(int64_t cols)
{
    return pmli_div_up(cols, MLP_COLUMNS);
}

static bool fits_rank(int64_t rank)
{
    return rank == 8 || rank == 16;
}

static bool fits(pml_dtype dtype, int64_t tokens, int64_t cols)
{
    return (dtype == PML_BF16 || dtype == PML_F16) && cols % 8 == 0 &&
           column_tiles(cols) <= MOST_BLOCKS && tokens <= MOST_TOKENS;
}

static bool forward_fits(const pml_swiglu_args *a)
{
    return a->u.rows > 0 && fits(a->gate_up.dtype, a->h.rows, a->h.cols) && fits_rank(a->u.cols);
}

static bool backward_fits(const pml_swiglu_bwd_args *a)
{
    return fits(a->dh.dtype, a->dh.rows, a->dh.cols) && (a->db.rows == 0 || fits_rank(a->rank)) &&
           (a->da.rows == 0 || fits_rank(a->da.rows));
}

/* Of sums over columns: every column tile's, for each token. */
static size_t token_floats(int64_t tokens, int64_t cols)
{
    return (size_t)(column_tiles(cols) * tokens) * MLP_RANK;
}

size_t pmli_mlp_ws(const pml_swiglu_args *a)
{
    return forward_fits(a) ? sizeof(float) * token_floats(a->h.rows, a->h.cols) : 0;
}

size_t pmli_mlp_bwd_ws(const pml_swiglu_bwd_args *a)
{
    size_t rows = (size_t)MOST_BLOCKS * MLP_RANK * ARRAYS * MLP_COLUMNS;
    return backward_fits(a) ? sizeof(float) * (2 * token_floats(a->dh.rows, a->dh.cols) + rows) : 0;
}

/* Every row begins on 16 bytes, or the operand is absent. */
static bool in_packs(const pml_view *v)
{
    return v->data == NULL || pmli_rows_begin_on(v, 16);
}

/* Pairs of elements: what is read or written two at a time. */
static bool in_pairs(const pml_view *v)
{
    return v->data == NULL || pmli_rows_begin_on(v, 4);
}

bool pmli_mlp_serves(const pml_device *device, const pml_swiglu_args *a)
{
    return forward_fits(a) && SHARED <= device->shared_most && device->code >= 80 &&
           in_packs(&a->gate_up) && in_packs(&a->h) && in_pairs(&a->a) && in_pairs(&a->u);
}

bool pmli_mlp_bwd_serves(const pml_device *device, const pml_swiglu_bwd_args *a)
{
    bool codes = a->scale.data != NULL; /* of which h is not written beside */
    return backward_fits(a) && !(codes && a->h.data != NULL) &&
           BACK_SHARED <= device->shared_most && device->code >= 80 && in_packs(&a->gate_up) &&
           in_packs(&a->dgate_up) && in_packs(&a->dh) && in_packs(&a->h) && in_packs(&a->u) &&
           in_packs(&a->v_down) && in_packs(&a->db) && in_packs(&a->da) && in_pairs(&a->v);
}

pml_status pmli_mlp_prepare(pml_device *d, pml_error *err)
{
    static const struct {
        pmli_kernel kernel;
        int shared;
    } users[] = {{PMLI_mlp_bf16, SHARED},
                 {PMLI_mlp_f16, SHARED},
                 {PMLI_mlp_codes_bf16, SHARED},
                 {PMLI_mlp_codes_f16, SHARED},
                 {PMLI_mlp_bwd_bf16, BACK_SHARED},
                 {PMLI_mlp_bwd_f16, BACK_SHARED},
                 {PMLI_mlp_bwd_codes_bf16, BACK_SHARED},
                 {PMLI_mlp_bwd_codes_f16, BACK_SHARED}};
    pml_status status = PML_OK;
    for (size_t i = 0; status == PML_OK && i < sizeof users / sizeof *users; i++)
        if (users[i].shared <= d->shared_most)
            status = pmli_cuda_allow_shared(d, &users[i].kernel, 1, users[i].shared,
                                            "shared memory for an MLP's adapters", err);
    return status;
}

/* Into how many ranges the rows go: a block fills a processor, so what counts is how often all of
 * them are filled times what each does, in row tiles; its beginning and end cost about two. */
static int64_t ranges(const pml_device *device, int64_t columns, int64_t rows)
{
    int64_t best = 1, least = 0;
    for (int64_t n = 1; n <= rows && n * columns <= MOST_BLOCKS; n++) {
        int64_t cost = pmli_div_up(n * columns, device->processors) * (pmli_div_up(rows, n) + 2);
        if (n == 1 || cost < least) {
            least = cost;
            best = n;
        }
    }
    return best;
}

static pmli_launch grid(const pml_queue *queue, int64_t tokens, int64_t cols, unsigned shared)
{
    int64_t columns = column_tiles(cols);
    int64_t n = ranges(queue->device, columns, pmli_div_up(tokens, MLP_ROWS));
    return (pmli_launch){.grid_x = (unsigned)columns,
                         .grid_y = (unsigned)n,
                         .block_x = BLOCK,
                         .block_y = 1,
                         .shared = shared};
}

static pmli_launch items(int64_t count)
{
    return (pmli_launch){.grid_x = (unsigned)pmli_div_up(count, SUM_BLOCK),
                         .grid_y = 1,
                         .block_x = SUM_BLOCK,
                         .block_y = 1};
}

pml_status pmli_mlp(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    bool bf16 = a->gate_up.dtype == PML_BF16, codes = a->h.dtype == PML_U8;
    pmli_mlp_params p = {.gate_up = a->gate_up.data,
                         .a = a->a.data,
                         .h = a->h.data,
                         .u = a->u.data,
                         .parts = a->ws.data,
                         .pieces = a->h_scale.data,
                         .tokens = a->h.rows,
                         .cols = a->h.cols,
                         .ld_gate_up = a->gate_up.ld,
                         .ld_a = a->a.ld,
                         .ld_h = a->h.ld,
                         .ld_u = a->u.ld,
                         .ld_pieces = a->h_scale.ld,
                         .rank = (int)a->u.cols,
                         .tiles = (int)column_tiles(a->h.cols),
                         .scale = a->lora_scale};
    pmli_kernel kernel = (codes ? PMLI_mlp_codes_bf16 : PMLI_mlp_bf16) + (bf16 ? 0 : 1);
    pml_status status =
        pmli_cuda_launch(queue, kernel, grid(queue, p.tokens, p.cols, SHARED), &p, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, bf16 ? PMLI_mlp_sum_bf16 : PMLI_mlp_sum_f16,
                                  items(p.tokens * (p.rank / 4)), &p, err);
    return status;
}

/* v + columns, as far as it is given. */
static void *columns_on(const pml_view *v, int64_t columns)
{
    return (char *)v->data + (size_t)columns * pml_dtype_size(v->dtype);
}

/* Gate's and up's share of the operands: columns of u and v, rows of b and db. */
static void find_parts(const pml_swiglu_bwd_args *a, pmli_mlp_bwd_params *p)
{
    int64_t column = 0, row = 0;
    for (int part = 0; part < 2 && a->db.data != NULL; part++) {
        if (!(a->lora_parts >> part & 1))
            continue;
        p->factor[part] = columns_on(&a->u, column);
        p->ld_factor[part] = a->u.ld;
        p->rank[part] = a->rank;
        p->b[part] = columns_on(&a->b, row * a->b.ld);
        p->v[part] = columns_on(&a->v, column);
        p->db[part] = columns_on(&a->db, row * a->db.ld);
        p->scale[part] = a->lora_scale[part];
        column += a->rank;
        row += a->dh.cols;
    }
    if (a->da.data == NULL)
        return;
    p->factor[2] = a->v_down.data;
    p->ld_factor[2] = a->v_down.ld;
    p->rank[2] = (int)a->da.rows;
}

pml_status pmli_mlp_bwd(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
    bool bf16 = a->dh.dtype == PML_BF16, codes = a->dgate_up.dtype == PML_U8;
    pmli_mlp_bwd_params p = {.gate_up = a->gate_up.data,
                             .dh = a->dh.data,
                             .by = a->w_scale.data,
                             .dgate_up = a->dgate_up.data,
                             .h = a->h.data,
                             .da = a->da.data,
                             .v_parts = a->ws.data,
                             .row_parts =
                                 (float *)a->ws.data + 2 * token_floats(a->dh.rows, a->dh.cols),
                             .pieces = a->scale.data,
                             .tokens = a->dh.rows,
                             .cols = a->dh.cols,
                             .ld_gate_up = a->gate_up.ld,
                             .ld_dh = a->dh.ld,
                             .ld_dgate_up = a->dgate_up.ld,
                             .ld_h = a->h.ld,
                             .ld_b = a->b.ld,
                             .ld_v = a->v.ld,
                             .ld_db = a->db.ld,
                             .ld_da = a->da.ld,
                             .ld_pieces = a->scale.ld,
                             .tiles = (int)column_tiles(a->dh.cols)};
    find_parts(a, &p);
    pmli_launch shape = grid(queue, p.tokens, p.cols, BACK_SHARED);
    p.parts = (int)shape.grid_y;
    pmli_kernel kernel = (codes ? PMLI_mlp_bwd_codes_bf16 : PMLI_mlp_bwd_bf16) + (bf16 ? 0 : 1);
    pml_status status = pmli_cuda_launch(queue, kernel, shape, &p, err);
    int64_t sums = (p.tokens + p.cols) * (p.rank[0] / 4 + p.rank[1] / 4) + p.cols / 4 * p.rank[2];
    if (status == PML_OK && sums > 0)
        status = pmli_cuda_launch(queue, bf16 ? PMLI_mlp_bwd_sum_bf16 : PMLI_mlp_bwd_sum_f16,
                                  items(sums), &p, err);
    return status;
}
