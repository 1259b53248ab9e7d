#include "border.h"
#include "device.h"
#include "device/params.h"
#include "fp8.h"
#include "linear.h"
#include "operand.h"
#include "ops.h"

enum { WARP = 32, BLOCK = 256, BLOCK_MOST = 512 };

static pmli_launch grid(int64_t x, int64_t y, int64_t block)
{
    return (pmli_launch){
        .grid_x = (unsigned)x, .grid_y = (unsigned)y, .block_x = (unsigned)block, .block_y = 1};
}

/* ---- a weight, once ---- */

/* Adapters, as columns of u and rows of a are theirs, one after the other; and of a stacked b rows
 * [first, end), which belong to the layer's outputs from first + shift on. */
typedef struct adapters {
    int64_t first[3], end[3], shift[3];
    int count, rank;
} adapters;

/* Of a stacked a: `rank` rows each. */
static adapters adapters_of(int32_t rank, uint32_t lora_parts)
{
    adapters all = {.count = __builtin_popcount(lora_parts), .rank = rank};
    for (int i = 0; i < all.count; i++) {
        all.first[i] = (int64_t)i * rank;
        all.end[i] = all.first[i] + rank;
    }
    return all;
}

static pml_status find_largest(pml_queue *queue, const pml_view *x, const float *over,
                               const adapters *all, float *parts, pml_error *err)
{
    pmli_fp8_largest_params p = {
        .x = x->data, .over = over, .parts = parts, .cols = x->cols, .ld = x->ld};
    for (int i = 0; i < all->count; i++) {
        p.first[i] = all->first[i];
        p.end[i] = all->end[i];
        p.shift[i] = all->shift[i];
    }
    return pmli_cuda_launch(queue, PMLI_fp8_largest_f32 + (unsigned)x->dtype,
                            grid(FP8_PARTS, all->count, BLOCK), &p, err);
}

size_t pmli_cuda_fp8_quantise_ws(void)
{
    return FP8_PARTS * sizeof(float);
}

pml_status pmli_cuda_fp8_quantise(pml_queue *queue, const pml_fp8_quantise_args *a, pml_error *err)
{
    int capability = queue->device->capability;
    if (capability < PMLI_FIRST_WITH_E4M3)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "quant=\"fp8\" needs a GPU of compute capability %d.%d or later, %s has "
                        "%d.%d; use quant=\"nf4\"",
                        PMLI_FIRST_WITH_E4M3 / 10, PMLI_FIRST_WITH_E4M3 % 10, queue->device->name,
                        capability / 10, capability % 10);
    pmli_check c = pmli_check_begin(PML_OP_fp8_quantise, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "x", &a->x);
    pmli_need_as(&c, "codes", &a->codes, a->x.rows, a->x.cols, PML_U8);
    pmli_need_as(&c, "scale", &a->scale, 1, a->x.rows, PML_F32);
    pmli_need_ws(&c, &a->ws, pmli_cuda_fp8_quantise_ws());
    if (c.status != PML_OK || a->x.rows == 0)
        return c.status;
    pmli_fp8_weight_params p = {.x = a->x.data,
                                .parts = a->ws.data,
                                .codes = a->codes.data,
                                .scale = a->scale.data,
                                .cols = a->x.cols,
                                .ld_x = a->x.ld,
                                .ld_codes = a->codes.ld};
    const adapters whole = {.count = 1, .end = {a->x.rows}};
    pml_status status = find_largest(queue, &a->x, NULL, &whole, a->ws.data, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, PMLI_fp8_weight_f32 + (unsigned)a->x.dtype,
                                  grid(a->x.rows, 1, BLOCK), &p, err);
    return status;
}

pml_status pmli_cuda_fp8_turn(pml_queue *queue, const pml_fp8_turn_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_fp8_turn, err);
    pmli_need_as(&c, "x", &a->x, PMLI_ANY, PMLI_ANY, PML_U8);
    pmli_need_as(&c, "y", &a->y, a->x.cols, a->x.rows, PML_U8);
    const pml_view *both[] = {&a->x, &a->y};
    for (int i = 0; i < 2; i++)
        pmli_need_that(&c,
                       (both[i]->rows | both[i]->cols | both[i]->ld) % PML_FP8_UNIT == 0 &&
                           (uintptr_t)both[i]->data % PML_FP8_UNIT == 0,
                       "operand '%s' is not in units of %d", i == 0 ? "x" : "y", PML_FP8_UNIT);
    if (c.status != PML_OK || a->x.rows == 0 || a->x.cols == 0)
        return c.status;
    pmli_fp8_transpose_params p = {.w = a->x.data,
                                   .to = a->y.data,
                                   .rows = a->x.rows,
                                   .cols = a->x.cols,
                                   .ld_w = a->x.ld,
                                   .ld_to = a->y.ld};
    return pmli_cuda_launch(
        queue, PMLI_fp8_transpose,
        grid(pmli_div_up(p.cols, FP8_TILE), pmli_div_up(p.rows, FP8_TILE), BLOCK), &p, err);
}

/* ---- products ---- */

void pmli_fp8_need(pmli_check *c, const pml_view *w, int64_t rows, int64_t cols)
{
    pmli_need_as(c, "w", w, rows, cols, PML_U8);
    pmli_need_that(
        c, (rows | cols | w->ld) % PML_FP8_UNIT == 0 && (uintptr_t)w->data % PML_FP8_UNIT == 0,
        "operand 'w' is [%lld,%lld], %lld apart; 8-bit products come in units of %d",
        (long long)rows, (long long)cols, (long long)w->ld, PML_FP8_UNIT);
}

void pmli_fp8_need_pieces(pmli_check *c, const char *name, const pml_view *codes,
                          const char *scale_name, const pml_view *scale, int64_t parts)
{
    pmli_need_that(c, parts > 0, "operand '%s' has %lld parts", name, (long long)parts);
    if (parts <= 0)
        return;
    int64_t part = codes->cols / parts;
    pmli_need_any(c, name, codes, PMLI_ANY, parts * part);
    pmli_need_as(c, scale_name, scale, codes->rows, parts * pml_fp8_pieces(part), PML_F32);
    pmli_need_that(c,
                   part % PML_FP8_UNIT == 0 && codes->ld % PML_FP8_UNIT == 0 &&
                       (uintptr_t)codes->data % PML_FP8_UNIT == 0,
                   "operand '%s' has parts of %lld columns, rows %lld apart; codes come in units "
                   "of %d",
                   name, (long long)part, (long long)codes->ld, PML_FP8_UNIT);
}

pml_status pmli_fp8_round(pml_queue *queue, const pmli_fp8_in_pieces *p, pml_error *err)
{
    _Static_assert(FP8_PIECE == PML_FP8_PIECE, "device/params.h and pml_op/ops.h disagree");
    pmli_fp8_rows_params r = {.x = p->x.data,
                              .by = p->by,
                              .codes = p->codes.data,
                              .pieces = p->scale.data,
                              .rows = p->x.rows,
                              .cols = p->x.cols,
                              .part_cols = p->x.cols / p->parts,
                              .ld_x = p->x.ld,
                              .ld_codes = p->codes.ld,
                              .ld_pieces = p->scale.ld,
                              .pieces_a_row = (int)p->scale.cols};
    return pmli_cuda_launch(queue, PMLI_fp8_pieces_f32 + (unsigned)p->x.dtype,
                            grid(pmli_div_up(r.rows * r.pieces_a_row, BLOCK / WARP), 1, BLOCK), &r,
                            err);
}

/* Columns of the border that u's take, in units that products come in. */
static int64_t border_columns(int64_t u_cols)
{
    return pmli_div_up(PML_FP8_COLUMNS * u_cols, PML_FP8_UNIT) * PML_FP8_UNIT;
}

bool pmli_fp8_takes(const pml_view *u, int32_t border)
{
    return u->rows >= PMLI_BORDER_TOKENS && border_columns(u->cols) <= border;
}

/* Codes of a product's left factor [rows,cols] with its border, where they are not made already; a
 * scale a row; the parts of what the right border's adapters have for largest, and their factors.
 */
static size_t factor_bytes(const pml_view *x, int32_t border)
{
    size_t codes = x->dtype == PML_U8 ? 0 : (size_t)x->rows * (size_t)(x->cols + border);
    return pmli_linear_units(codes) + pmli_linear_units((size_t)x->rows * sizeof(float)) +
           pmli_linear_units((FP8_PARTS + 1) * PML_LINEAR_MAX_PARTS * sizeof(float));
}

/* Scales of the weight turned round. */
static size_t ones_bytes(const pml_linear_bwd_args *a)
{
    return pmli_linear_units((size_t)a->dx.cols * sizeof(float));
}

size_t pmli_fp8_ws(const pml_linear_args *a)
{
    return a->w_scale.rows > 0 ? factor_bytes(&a->x, a->border) : 0;
}

size_t pmli_fp8_bwd_ws(const pml_linear_bwd_args *a)
{
    bool there = a->w_scale.rows > 0 && a->dx.rows > 0;
    return there ? factor_bytes(&a->dy, a->border) + ones_bytes(a) : 0;
}

/* One 8-bit product: out [T,n] = x [T,k] w [n,k]^T, and with u, what stands in the borders. */
typedef struct product {
    pml_view x;        /* in 16 or 32 bits; or codes in pieces */
    pml_view pieces;   /* their scales */
    int64_t stacked;   /* parts of its columns, each of which begins a piece */
    const float *by;   /* factors of its columns, before it is rounded; may be NULL */
    const pml_view *u; /* may be NULL; `rank` columns each adapter */
    int32_t rank;
    unsigned char *w; /* codes, w_ld from row to row */
    int64_t w_ld;
    const float *w_scale; /* of w's rows */
    float *ones;          /* they, where they are to be written: 1 each; or NULL */
    pml_view out, bias;   /* bias may be absent */
    unsigned char *codes; /* of x, ld from row to row, behind them u's */
    int64_t ld;
    float *scale, *parts, *factors;
    void *ws; /* PMLI_GEMM_WORKSPACE */
} product;

/* Where codes, scale and parts lie: factor_bytes of room. */
static void lay_out(product *p, void *room, int32_t border)
{
    bool made = p->x.dtype == PML_U8;
    p->ld = made ? p->x.ld : p->x.cols + border;
    p->codes = made ? p->x.data : room;
    char *behind = (char *)room + (made ? 0 : pmli_linear_units((size_t)(p->x.rows * p->ld)));
    p->scale = (float *)(void *)behind;
    behind += pmli_linear_units((size_t)p->x.rows * sizeof(float));
    p->parts = (float *)(void *)behind;
    p->factors = p->parts + FP8_PARTS * PML_LINEAR_MAX_PARTS;
}

static pml_status quantise(pml_queue *queue, const product *p, pml_error *err)
{
    const pml_view *x = &p->x;
    pmli_fp8_rows_params r = {.x = x->data,
                              .by = p->by,
                              .factors = p->factors,
                              .codes = p->codes,
                              .scale = p->scale,
                              .ones = p->ones,
                              .pieces = p->pieces.data,
                              .rows = x->rows,
                              .cols = x->cols,
                              .part_cols = x->cols / p->stacked,
                              .ld_x = x->ld,
                              .ld_codes = p->ld,
                              .ld_pieces = p->pieces.ld,
                              .pieces_a_row = (int)p->pieces.cols,
                              .count_ones = p->ones != NULL ? (int)p->out.cols : 0};
    if (p->u != NULL) {
        r.u = p->u->data;
        r.ld_u = p->u->ld;
        r.u_cols = (int)p->u->cols;
        r.u_rank = p->rank;
        r.border = (int)border_columns(p->u->cols);
    }
    if (x->dtype == PML_U8) /* u is as wide as what the product makes */
        return pmli_cuda_launch(queue, PMLI_fp8_level_f32 + (unsigned)p->out.dtype,
                                grid(pmli_div_up(x->rows, BLOCK / WARP), 1, BLOCK), &r, err);
    int64_t pack = (int64_t)(16 / pml_dtype_size(x->dtype)), packs = pmli_div_up(x->cols, pack);
    bool wide = pmli_in_units_of(x, 16) && (uintptr_t)p->by % 16 == 0 &&
                packs <= (int64_t)FP8_HELD * BLOCK_MOST;
    int64_t threads = pmli_div_up(pmli_div_up(packs, FP8_HELD), WARP) * WARP;
    threads = !wide ? BLOCK : threads < FP8_PARTS ? FP8_PARTS : threads;
    return pmli_cuda_launch(queue, PMLI_fp8_rows_f32 + 2 * (unsigned)x->dtype + (wide ? 1 : 0),
                            grid(x->rows, 1, threads), &r, err);
}

/* x, a stacked b or a, into the border of w: see pmli_fp8_border_params. */
static pml_status fill_border(pml_queue *queue, const product *p, const pml_view *x,
                              const float *over, const adapters *all, pml_error *err)
{
    pmli_fp8_border_params b = {.x = x->data,
                                .over = over,
                                .parts = p->parts,
                                .factors = p->factors,
                                .codes = p->w,
                                .rows = p->out.cols,
                                .cols = p->x.cols,
                                .ld = x->ld,
                                .ld_codes = p->w_ld,
                                .u_cols = (int)p->u->cols,
                                .border = (int)border_columns(p->u->cols),
                                .adapters = all->count,
                                .rank = all->rank};
    for (int i = 0; i < all->count; i++) {
        b.first[i] = all->first[i] + all->shift[i];
        b.end[i] = all->end[i] + all->shift[i];
        b.shift[i] = all->shift[i];
    }
    pml_status status = find_largest(queue, x, over, all, p->parts, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(
            queue, PMLI_fp8_border_f32 + (unsigned)x->dtype,
            grid(pmli_div_up(b.rows, BLOCK), pmli_div_up(b.border, FP8_BESIDE), BLOCK), &b, err);
    return status;
}

/* Where cuBLASLt multiplied codes alone. */
static pml_status apply_scales(pml_queue *queue, const product *p, pml_error *err)
{
    enum { GRID_Y = 65535 };
    pml_status status = PML_OK;
    for (int64_t first = 0; status == PML_OK && first < p->out.rows; first += GRID_Y) {
        int64_t rows = p->out.rows - first < GRID_Y ? p->out.rows - first : GRID_Y;
        pmli_fp8_scales_params s = {.y = pmli_rows_of(p->out, first, rows).data,
                                    .row = p->scale + first,
                                    .column = p->w_scale,
                                    .bias = p->bias.data,
                                    .rows = rows,
                                    .cols = p->out.cols,
                                    .ld = p->out.ld};
        status = pmli_cuda_launch(queue, PMLI_fp8_scales_f32 + (unsigned)p->out.dtype,
                                  grid(pmli_div_up(s.cols, BLOCK), rows, BLOCK), &s, err);
    }
    return status;
}

static pml_status multiply(pml_queue *queue, const product *p, pml_error *err)
{
    bool scaled = pmli_gemm_scales_rows(queue->device) && p->out.dtype != PML_F32;
    pmli_gemm g = {.a = p->codes,
                   .b = p->w,
                   .c = p->out.data,
                   .bias = scaled ? p->bias.data : NULL,
                   .m = p->x.rows,
                   .n = p->out.cols,
                   .k = p->x.cols + (p->u != NULL ? border_columns(p->u->cols) : 0),
                   .lda = p->ld,
                   .ldb = p->w_ld,
                   .ldc = p->out.ld,
                   .scale_a = scaled ? p->scale : NULL,
                   .scale_b = scaled ? p->w_scale : NULL,
                   .transpose_b = true,
                   .in = PML_U8,
                   .out = p->out.dtype,
                   .alpha = scaled ? 1 : 1.0F / (1 << FP8_DOWN),
                   .workspace = p->ws,
                   .workspace_size = PMLI_GEMM_WORKSPACE};
    pml_status status = quantise(queue, p, err);
    if (status == PML_OK)
        status = pmli_gemm_run(queue, &g, err);
    if (status == PML_OK && !scaled)
        status = apply_scales(queue, p, err);
    return status;
}

/* Of a stacked b. */
static adapters outputs_of(const pml_linear_args *a)
{
    adapters all = {.rank = a->rank};
    int64_t row = 0, at = 0;
    for (int part = 0; part < a->parts; row += a->part_cols[part++]) {
        if (!(a->lora_parts >> part & 1))
            continue;
        all.first[all.count] = at;
        all.shift[all.count] = row - at;
        all.end[all.count++] = at += a->part_cols[part];
    }
    return all;
}

pml_status pmli_fp8_linear(pml_queue *queue, const pml_linear_args *a, const pml_view *u, void *ws,
                           pml_error *err)
{
    product p = {.x = a->x,
                 .pieces = a->x_scale,
                 .stacked = 1,
                 .u = u,
                 .rank = a->rank,
                 .w = a->w.data,
                 .w_ld = a->w.ld,
                 .w_scale = a->w_scale.data,
                 .out = a->y,
                 .bias = a->bias,
                 .ws = a->ws.data};
    lay_out(&p, ws, a->border);
    pml_status status = PML_OK;
    if (u != NULL) {
        const adapters all = outputs_of(a);
        status = fill_border(queue, &p, &a->b, p.w_scale, &all, err);
    }
    return status == PML_OK ? multiply(queue, &p, err) : status;
}

pml_status pmli_fp8_linear_bwd(pml_queue *queue, const pml_linear_bwd_args *a, const pml_view *v,
                               void *ws, pml_error *err)
{
    product p = {.x = a->dy,
                 .pieces = a->dy_scale,
                 .stacked = a->parts,
                 .by = a->w_scale.data,
                 .u = v,
                 .rank = a->rank,
                 .w = a->w.data,
                 .w_ld = a->w.ld,
                 .w_scale = ws,
                 .ones = ws,
                 .out = a->dx,
                 .ws = a->ws.data};
    lay_out(&p, (char *)ws + ones_bytes(a), a->border);
    pml_status status = PML_OK;
    const adapters all = adapters_of(a->rank, a->lora_parts);
    if (v != NULL)
        status = fill_border(queue, &p, &a->a, NULL, &all, err);
    return status == PML_OK ? multiply(queue, &p, err) : status;
}
