/* Gradients of a linear layer. With v_p = lora_scale[p] dy_p b_p:
 *
 *   ws: | v [T,R] when there are adapters and it is not given | one masked [T,K] when there is
 * dropout | dy [T,N] as 8 bits leave it, the codes of w [N,K] as numbers when w is in 8 bits | */
#include "fp8.h"
#include "gemm.h"
#include "lora.h"
#include "ops.h"
#include "vec.h"

static size_t floats(int64_t rows, int64_t cols)
{
    return rows > 0 && cols > 0 ? (size_t)rows * (size_t)cols : 0;
}

static size_t lora_floats(const pml_linear_bwd_args *a)
{
    if (a->lora_parts == 0)
        return 0;
    pmli_lora lora = PMLI_LORA_OF(a);
    size_t masked = a->lora_dropout > 0 ? floats(a->dy.rows, a->a.cols) : 0;
    size_t own_v = a->v.rows > 0 ? 0 : floats(a->dy.rows, pmli_lora_width(&lora));
    return own_v + masked;
}

static bool in_8_bits(const pml_linear_bwd_args *a)
{
    return a->w_scale.rows > 0 && a->dx.rows > 0;
}

size_t pmli_cpu_linear_bwd_ws(const pml_linear_bwd_args *a)
{
    size_t wide = 0;
    if (in_8_bits(a))
        wide = floats(a->dy.rows, a->dy.cols) + floats(a->w.rows, a->w.cols);
    return (lora_floats(a) + wide) * sizeof(float);
}

/* The factors of dx = dy w: these, or what 8 bits leave of them, the weight's scales in dy. */
static void factors(pmli_pool *pool, const pml_linear_bwd_args *a, pml_view *dy, pml_view *w)
{
    *dy = a->dy, *w = a->w;
    if (!in_8_bits(a))
        return;
    float *behind = (float *)a->ws.data + lora_floats(a);
    *dy = pml_matrix(behind, a->dy.rows, a->dy.cols, PML_F32);
    *w = pml_matrix(behind + floats(dy->rows, dy->cols), a->w.cols, a->w.rows, PML_F32);
    if (a->dy_scale.data != NULL)
        pmli_fp8_of_pieces(pool, a->dy, a->dy_scale, a->parts, *dy);
    else
        pmli_fp8_rounded(pool, a->dy, a->w_scale.data, *dy);
    pmli_fp8_widen_turned(pool, a->w, *w);
}

/* dbias: pieces are columns, each summed over all tokens in order, in float64 because there are
 * thousands of them. */
enum { BIAS_COLUMNS = 32 };

PMLI_CLONES static void bias_columns(const pml_view *dy, int64_t first, int64_t cols, float *dbias)
{
    double sum[BIAS_COLUMNS] = {0};
    for (int64_t t = 0; t < dy->rows; t++) {
        const float *row = (const float *)dy->data + t * dy->ld + first;
        for (int64_t i = 0; i < cols; i++)
            sum[i] += row[i];
    }
    for (int64_t i = 0; i < cols; i++)
        dbias[first + i] += (float)sum[i];
}

static void bias_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_linear_bwd_args *a = arg;
    int64_t first = item * BIAS_COLUMNS;
    bias_columns(&a->dy, first, pmli_min(BIAS_COLUMNS, a->dy.cols - first), a->dbias.data);
}

/* dx, and da. x reached the branch through the dropout mask, when there is
 * one, and so does the gradient on its way back. */
static void branch_input(pmli_pool *pool, const pml_linear_bwd_args *a, const pmli_lora *lora,
                         pml_view v, const pmli_adapter *adapters, int count)
{
    pml_view dy, w;
    factors(pool, a, &dy, &w);
    if (lora->dropout == 0) {
        pmli_product products[2];
        int n = 0;
        if (a->dx.data != NULL)
            products[n++] = (pmli_product){
                .form = PMLI_NN, .alpha = 1, .a = dy, .b = w, .a2 = v, .b2 = a->a, .c = a->dx};
        if (a->da.data != NULL)
            products[n++] = (pmli_product){
                .form = PMLI_TN, .alpha = 1, .beta = 1, .a = v, .b = a->x, .c = a->da};
        pmli_gemm_all(pool, products, n);
        return;
    }
    if (a->dx.data != NULL)
        pmli_gemm(pool, PMLI_NN, 1, dy, w, 0, a->dx);
    pml_view masked =
        pml_matrix((float *)a->ws.data + (a->v.data == NULL ? floats(v.rows, v.cols) : 0), v.rows,
                   a->a.cols, PML_F32);
    for (int i = 0; i < count; i++) {
        const pmli_adapter *at = &adapters[i];
        pml_view part_v = pml_view_columns(v, at->u_col, lora->rank);
        if (a->dx.data != NULL) {
            pmli_gemm(pool, PMLI_NN, 1, part_v, pmli_rows(a->a, at->u_col, lora->rank), 0, masked);
            pmli_lora_mask(pool, lora, at->part, &a->rng, &a->places, masked, true, a->dx);
        }
        if (a->da.data != NULL) {
            pmli_lora_mask(pool, lora, at->part, &a->rng, &a->places, a->x, false, masked);
            pmli_gemm(pool, PMLI_TN, 1, part_v, masked, 1, pmli_rows(a->da, at->u_col, lora->rank));
        }
    }
}

/* v and db, none of which needs another. */
static void lora_branch(pmli_pool *pool, const pml_linear_bwd_args *a, const pmli_lora *lora)
{
    pmli_adapter adapters[PML_LINEAR_MAX_PARTS];
    pmli_product products[2 * PML_LINEAR_MAX_PARTS];
    int count = pmli_adapters(lora, adapters), n = 0;
    bool makes_v = (a->kept & PML_V_MADE) == 0 &&
                   (a->dx.data != NULL || a->da.data != NULL || a->v.data != NULL);
    pml_view v = a->v.data != NULL
                     ? a->v
                     : pml_matrix(a->ws.data, a->dy.rows, pmli_lora_width(lora), PML_F32);
    for (int i = 0; i < count; i++) {
        const pmli_adapter *at = &adapters[i];
        pml_view part_dy = pml_view_columns(a->dy, at->y_col, at->cols);
        if (makes_v)
            products[n++] = (pmli_product){.form = PMLI_NN,
                                           .alpha = lora->scale[at->part],
                                           .a = part_dy,
                                           .b = pmli_rows(a->b, at->b_row, at->cols),
                                           .c = pml_view_columns(v, at->u_col, lora->rank)};
        if (a->db.data != NULL)
            products[n++] = (pmli_product){.form = PMLI_TN,
                                           .alpha = 1,
                                           .beta = 1,
                                           .a = part_dy,
                                           .b = pml_view_columns(a->u, at->u_col, lora->rank),
                                           .c = pmli_rows(a->db, at->b_row, at->cols)};
    }
    pmli_gemm_all(pool, products, n);
    branch_input(pool, a, lora, v, adapters, count);
}

/* dy in codes: nothing but dx can be made of it. */
static void check_made(pmli_check *c, const pml_linear_bwd_args *a)
{
    int parts = a->parts < 1 ? 1 : a->parts;
    pmli_need_pieces(c, "dy", &a->dy, "dy_scale", &a->dy_scale, PMLI_ANY, PMLI_ANY, parts);
    for (int p = 1; p < a->parts && p < PML_LINEAR_MAX_PARTS; p++)
        pmli_need_that(c, a->part_cols[p] == a->part_cols[0],
                       "operand 'dy' is in codes, its parts %d and %d columns wide",
                       a->part_cols[0], a->part_cols[p]);
    bool made = a->lora_parts == 0 || (a->kept & PML_V_MADE) != 0;
    pmli_need_that(c,
                   a->w_scale.data != NULL && made && a->lora_dropout == 0 && a->db.data == NULL &&
                       a->dbias.data == NULL,
                   "operand 'dy_scale' needs w in 8 bits, v made, no dropout, db or dbias");
}

static void need_w(pmli_check *c, const pml_linear_bwd_args *a, int64_t n, int64_t k)
{
    if (a->w_scale.data == NULL) {
        pmli_need_weight(c, "w", &a->w, n, k);
        return;
    }
    PMLI_NEED(c, a, w, k, n, PML_U8);
    PMLI_NEED(c, a, w_scale, 1, n, PML_F32);
}

static pml_status check(const pml_linear_bwd_args *a, const pmli_lora *lora, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_linear_bwd, err);
    /* x is needed by dw and da alone; without it w tells how wide it is. */
    int64_t rows = a->dy.rows, n = a->dy.cols;
    bool codes = a->w_scale.data != NULL; /* turned round */
    int64_t k = a->x.data != NULL   ? a->x.cols
                : a->w.data != NULL ? (codes ? a->w.rows : a->w.cols)
                                    : PMLI_ANY;
    if (a->dy_scale.data != NULL)
        check_made(&c, a);
    else
        PMLI_NEED(&c, a, dy, PMLI_ANY, PMLI_ANY, PML_F32);
    if (a->dw.data != NULL || a->da.data != NULL)
        PMLI_NEED(&c, a, x, rows, PMLI_ANY, PML_F32);
    PMLI_MAY(&c, a, x, rows, PMLI_ANY, PML_F32);
    if (a->dx.data != NULL) {
        PMLI_NEED(&c, a, dx, rows, k, PML_F32);
        need_w(&c, a, n, k);
    }
    if (a->w.data != NULL)
        need_w(&c, a, n, k);
    pmli_need_that(&c, a->w_scale.data == NULL || a->dw.data == NULL,
                   "operand 'dw': a weight of 8 bits is not trained");
    PMLI_MAY(&c, a, dw, n, k, PML_F32);
    PMLI_MAY(&c, a, dbias, 1, n, PML_F32);
    pmli_lora_check(&c, lora, n, k, &a->a, &a->b, &a->rng, &a->places, rows);
    PMLI_MAY(&c, a, da, a->a.rows, a->a.cols, PML_F32);
    PMLI_MAY(&c, a, db, a->b.rows, a->b.cols, PML_F32);
    pmli_need_blas(&c, "x", &a->x);
    pmli_need_blas(&c, "dy", &a->dy);
    pmli_need_blas(&c, "w", &a->w);
    pmli_need_blas(&c, "dx", &a->dx);
    pmli_need_blas(&c, "dw", &a->dw);
    if (pmli_cpu_linear_bwd_ws(a) > 0)
        pmli_need_ws(&c, &a->ws, pmli_cpu_linear_bwd_ws(a));
    if (a->lora_parts == 0) {
        pmli_need_that(&c, a->da.data == NULL && a->db.data == NULL,
                       "operands 'da' and 'db' need an adapter, lora_parts is 0");
        return c.status;
    }
    if (a->db.data != NULL)
        PMLI_NEED(&c, a, u, rows, pmli_lora_width(lora), PML_F32);
    if (a->v.data != NULL || (a->kept & PML_V_MADE) != 0)
        PMLI_NEED(&c, a, v, rows, pmli_lora_width(lora), PML_F32);
    pmli_need_blas(&c, "u", &a->u);
    pmli_need_blas(&c, "v", &a->v);
    pmli_need_blas(&c, "da", &a->da);
    pmli_need_blas(&c, "db", &a->db);
    return c.status;
}

pml_status pmli_cpu_linear_bwd(pml_queue *queue, const pml_linear_bwd_args *a, pml_error *err)
{
    pmli_lora lora = PMLI_LORA_OF(a);
    pml_status status = check(a, &lora, err);
    if (status != PML_OK || a->dy.rows == 0)
        return status;
    pmli_pool *pool = pmli_pool_of(queue);
    pmli_product products[2];
    int n = 0;
    if (a->lora_parts != 0) {
        lora_branch(pool, a, &lora);
    } else if (a->dx.data != NULL) {
        pml_view dy, w;
        factors(pool, a, &dy, &w);
        products[n++] = (pmli_product){.form = PMLI_NN, .alpha = 1, .a = dy, .b = w, .c = a->dx};
    }
    if (a->dw.data != NULL)
        products[n++] = (pmli_product){
            .form = PMLI_TN, .alpha = 1, .beta = 1, .a = a->dy, .b = a->x, .c = a->dw};
    pmli_gemm_all(pool, products, n);
    if (a->dbias.data != NULL)
        pmli_pool_run(pool, pmli_div_up(a->dy.cols, BIAS_COLUMNS), bias_piece, (void *)a);
    return PML_OK;
}
