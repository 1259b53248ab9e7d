/* Linear layer of up to three parts with LoRA branches. Hu et al., "LoRA", 2021.
 *
 *   ws: | u [T,R] when nobody keeps it | the masked input [T,K] when there is dropout |
 *       | x [T,K] as 8 bits leave it, w [N,K] when w is stored in 8 bits              | */
#include "fp8.h"
#include "gemm.h"
#include "lora.h"
#include "ops.h"
#include "vec.h"

static size_t floats(int64_t rows, int64_t cols)
{
    return rows > 0 && cols > 0 ? (size_t)rows * (size_t)cols : 0;
}

static size_t lora_floats(const pml_linear_args *a)
{
    if (a->lora_parts == 0)
        return 0;
    pmli_lora lora = PMLI_LORA_OF(a);
    size_t own_u = a->u.rows > 0 ? 0 : floats(a->x.rows, pmli_lora_width(&lora));
    size_t masked = a->lora_dropout > 0 ? floats(a->x.rows, a->x.cols) : 0;
    return own_u + masked;
}

size_t pmli_cpu_linear_ws(const pml_linear_args *a)
{
    size_t wide = 0;
    if (a->w_scale.rows > 0)
        wide = floats(a->x.rows, a->x.cols) + floats(a->w.rows, a->w.cols);
    return (lora_floats(a) + wide) * sizeof(float);
}

/* The factors of the frozen product: x and w, or what 8 bits leave of them. */
static void factors(pmli_pool *pool, const pml_linear_args *a, pml_view *x, pml_view *w)
{
    *x = a->x, *w = a->w;
    if (a->w_scale.data == NULL)
        return;
    float *behind = (float *)a->ws.data + lora_floats(a);
    *x = pml_matrix(behind, a->x.rows, a->x.cols, PML_F32);
    *w = pml_matrix(behind + floats(x->rows, x->cols), a->w.rows, a->w.cols, PML_F32);
    if (a->x_scale.data != NULL)
        pmli_fp8_of_pieces(pool, a->x, a->x_scale, 1, *x);
    else
        pmli_fp8_rounded(pool, a->x, NULL, *x);
    pmli_fp8_widen(pool, a->w, a->w_scale.data, *w);
}

static void bias_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_linear_args *a = arg;
    int64_t piece = pmli_piece_rows(a->y.cols), last = pmli_min((item + 1) * piece, a->y.rows);
    for (int64_t t = item * piece; t < last; t++)
        memcpy((float *)a->y.data + t * a->y.ld, a->bias.data, (size_t)a->y.cols * sizeof(float));
}

/* u of every adapter; where it lies is returned. */
static pml_view lora_inputs(pmli_pool *pool, const pml_linear_args *a, const pmli_lora *lora,
                            const pmli_adapter *adapters, int count)
{
    int64_t rows = a->x.rows;
    float *ws = a->ws.data;
    pml_view u = a->u;
    if (u.data == NULL) {
        u = pml_matrix(ws, rows, pmli_lora_width(lora), PML_F32);
        ws += floats(u.rows, u.cols);
    }
    if (a->u_made)
        return u;
    if (lora->dropout == 0 && pmli_one_scale(lora, adapters, count)) {
        pmli_gemm(pool, PMLI_NT, lora->scale[adapters[0].part], a->x, a->a, 0, u);
        return u;
    }
    for (int i = 0; i < count; i++) {
        const pmli_adapter *at = &adapters[i];
        pml_view in = a->x;
        if (lora->dropout > 0) {
            in = pml_matrix(ws, rows, a->x.cols, PML_F32);
            pmli_lora_mask(pool, lora, at->part, &a->rng, &a->places, a->x, false, in);
        }
        pmli_gemm(pool, PMLI_NT, lora->scale[at->part], in, pmli_rows(a->a, at->u_col, lora->rank),
                  0, pml_view_columns(u, at->u_col, lora->rank));
    }
    return u;
}

/* Each part with its adapter in one product; y is then written once. x and w are the factors of the
 * frozen product. */
static void lora_parts(pmli_pool *pool, const pml_linear_args *a, const pmli_lora *lora, float beta,
                       pml_view x, pml_view w)
{
    pmli_adapter adapters[PML_LINEAR_MAX_PARTS];
    pmli_product products[PML_LINEAR_MAX_PARTS];
    int count = pmli_adapters(lora, adapters);
    pml_view u = lora_inputs(pool, a, lora, adapters, count);
    int64_t col = 0;
    for (int part = 0, next = 0; part < lora->parts; part++) {
        int64_t cols = lora->part_cols[part];
        pmli_product *p = &products[part];
        *p = (pmli_product){.form = PMLI_NT,
                            .alpha = 1,
                            .beta = beta,
                            .a = x,
                            .b = pmli_rows(w, col, cols),
                            .c = pml_view_columns(a->y, col, cols)};
        if (next < count && adapters[next].part == part) {
            const pmli_adapter *at = &adapters[next++];
            p->a2 = pml_view_columns(u, at->u_col, lora->rank);
            p->b2 = pmli_rows(a->b, at->b_row, cols);
        }
        col += cols;
    }
    pmli_gemm_all(pool, products, lora->parts);
}

pml_status pmli_cpu_linear(pml_queue *queue, const pml_linear_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_linear, err);
    pmli_lora lora = PMLI_LORA_OF(a);
    if (a->x_scale.data != NULL) {
        pmli_need_pieces(&c, "x", &a->x, "x_scale", &a->x_scale, PMLI_ANY, PMLI_ANY, 1);
        pmli_need_that(&c, a->w_scale.data != NULL && (a->lora_parts == 0 || a->u_made),
                       "operand 'x_scale' needs w in 8 bits, and u made");
    } else {
        PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    }
    pmli_need_stored(&c, &a->w, &a->w_scale, PMLI_ANY, a->x.cols);
    PMLI_NEED(&c, a, y, a->x.rows, a->w.rows, PML_F32);
    PMLI_MAY(&c, a, bias, 1, a->w.rows, PML_F32);
    pmli_lora_check(&c, &lora, a->w.rows, a->x.cols, &a->a, &a->b, &a->rng, &a->places, a->x.rows);
    pmli_need_blas(&c, "x", &a->x);
    pmli_need_blas(&c, "w", &a->w);
    pmli_need_blas(&c, "y", &a->y);
    if (a->lora_parts != 0)
        PMLI_MAY(&c, a, u, a->x.rows, pmli_lora_width(&lora), PML_F32);
    pmli_need_that(&c, a->u.data != NULL || !a->u_made, "operand 'u' is made, and not given");
    if (pmli_cpu_linear_ws(a) > 0)
        pmli_need_ws(&c, &a->ws, pmli_cpu_linear_ws(a));
    if (c.status != PML_OK)
        return c.status;
    pmli_pool *pool = pmli_pool_of(queue);
    if (a->bias.data != NULL)
        pmli_pool_run(pool, pmli_div_up(a->y.rows, pmli_piece_rows(a->y.cols)), bias_piece,
                      (void *)a);
    float beta = a->bias.data != NULL ? 1 : 0;
    pml_view x, w;
    factors(pool, a, &x, &w);
    if (a->lora_parts != 0)
        lora_parts(pool, a, &lora, beta, x, w);
    else
        pmli_gemm(pool, PMLI_NT, 1, x, w, beta, a->y);
    return PML_OK;
}
