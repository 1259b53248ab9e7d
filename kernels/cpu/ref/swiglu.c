/* SwiGLU: h = silu(gate) * up. Shazeer, "GLU Variants Improve Transformer", 2020. And what the
 * adapters of the linear layers beside it want of gate, up and h, each a product of its own.
 *
 *   ws, forward:  | h [T,I] where it is wanted in codes |
 *   ws, backward: | h [T,I] where da wants it and nobody else | dgate_up where it is in codes | */
#include "fp8.h"
#include "gemm.h"
#include "lora.h"
#include "ops.h"
#include "vec.h"

PMLI_CLONES static void swiglu_rows(const pml_swiglu_args *a, int64_t first, int64_t last)
{
    int64_t n = a->h.cols;
    for (int64_t t = first; t < last; t++) {
        const float *gate = (const float *)a->gate_up.data + t * a->gate_up.ld, *up = gate + n;
        float *h = (float *)a->h.data + t * a->h.ld;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            h[i] = gate[i] * pmli_sigmoid(gate[i]) * up[i];
    }
}

static void swiglu_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_swiglu_args *a = arg;
    int64_t piece = pmli_piece_rows(a->h.cols);
    swiglu_rows(a, item * piece, pmli_min((item + 1) * piece, a->h.rows));
}

static size_t floats_of(const pml_view *v)
{
    return (size_t)v->rows * (size_t)v->cols;
}

size_t pmli_cpu_swiglu_ws(const pml_swiglu_args *a)
{
    return a->h_scale.rows > 0 ? floats_of(&a->h) * sizeof(float) : 0;
}

pml_status pmli_cpu_swiglu(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu, err);
    bool codes = a->h_scale.data != NULL;
    if (codes)
        pmli_need_pieces(&c, "h", &a->h, "h_scale", &a->h_scale, PMLI_ANY, PMLI_ANY, 1);
    else
        PMLI_NEED(&c, a, h, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, gate_up, a->h.rows, 2 * a->h.cols, PML_F32);
    pmli_need_pair(&c, "a", &a->a, "u", &a->u);
    PMLI_MAY(&c, a, a, PMLI_ANY, a->h.cols, PML_F32);
    PMLI_MAY(&c, a, u, a->h.rows, a->a.rows, PML_F32);
    pmli_need_blas(&c, "a", &a->a);
    pmli_need_blas(&c, "u", &a->u);
    pmli_need_ws(&c, &a->ws, pmli_cpu_swiglu_ws(a));
    if (c.status != PML_OK)
        return c.status;
    pmli_pool *pool = pmli_pool_of(queue);
    pml_swiglu_args own = *a;
    if (codes)
        own.h = pml_matrix(a->ws.data, a->h.rows, a->h.cols, PML_F32);
    pmli_pool_run(pool, pmli_div_up(a->h.rows, pmli_piece_rows(a->h.cols)), swiglu_piece, &own);
    if (a->u.data != NULL && a->h.rows > 0)
        pmli_gemm(pool, PMLI_NT, a->lora_scale, own.h, a->a, 0, a->u);
    if (codes)
        pmli_fp8_to_pieces(pool, own.h, NULL, 1, a->h, a->h_scale);
    return PML_OK;
}

/* With s = sigmoid(gate):  dgate = dh up s (1 + gate (1 - s)),  dup = dh gate s,  h = gate s up. */
PMLI_CLONES static void swiglu_bwd_rows(const pml_swiglu_bwd_args *a, int64_t first, int64_t last)
{
    int64_t n = a->dh.cols;
    for (int64_t t = first; t < last; t++) {
        const float *dh = (const float *)a->dh.data + t * a->dh.ld;
        const float *gate = (const float *)a->gate_up.data + t * a->gate_up.ld, *up = gate + n;
        float *dgate = (float *)a->dgate_up.data + t * a->dgate_up.ld, *dup = dgate + n;
        float *h = a->h.data != NULL ? (float *)a->h.data + t * a->h.ld : NULL;
        if (h != NULL) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                float g = gate[i], u = up[i], d = dh[i], s = pmli_sigmoid(g);
                dgate[i] = d * u * s * (1.0F + g * (1.0F - s));
                dup[i] = d * g * s;
                h[i] = g * s * u;
            }
            continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float g = gate[i], u = up[i], s = pmli_sigmoid(g);
            dgate[i] = dh[i] * u * s * (1.0F + g * (1.0F - s));
            dup[i] = dh[i] * g * s;
        }
    }
}

static void swiglu_bwd_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_swiglu_bwd_args *a = arg;
    int64_t piece = pmli_piece_rows(a->dh.cols);
    swiglu_bwd_rows(a, item * piece, pmli_min((item + 1) * piece, a->dh.rows));
}

static size_t own_h(const pml_swiglu_bwd_args *a)
{
    return a->da.rows > 0 && a->h.rows == 0 ? floats_of(&a->dh) : 0;
}

size_t pmli_cpu_swiglu_bwd_ws(const pml_swiglu_bwd_args *a)
{
    size_t wide = a->scale.rows > 0 ? floats_of(&a->dgate_up) : 0;
    return (own_h(a) + wide) * sizeof(float);
}

/* v and db of gate and up, da of down; h as it was made. */
static void adapters_beside(pmli_pool *pool, const pml_swiglu_bwd_args *a, pml_view h)
{
    pmli_product products[2 * 2 + 1];
    int n = 0;
    int64_t cols = a->dh.cols;
    for (int part = 0, at = 0; part < 2 && a->db.data != NULL; part++) {
        if (!(a->lora_parts >> part & 1))
            continue;
        pml_view dy = pml_view_columns(a->dgate_up, part * cols, cols);
        products[n++] = (pmli_product){.form = PMLI_NN,
                                       .alpha = a->lora_scale[part],
                                       .a = dy,
                                       .b = pmli_rows(a->b, at * cols, cols),
                                       .c = pml_view_columns(a->v, at * a->rank, a->rank)};
        products[n++] = (pmli_product){.form = PMLI_TN,
                                       .alpha = 1,
                                       .beta = 1,
                                       .a = dy,
                                       .b = pml_view_columns(a->u, at * a->rank, a->rank),
                                       .c = pmli_rows(a->db, at * cols, cols)};
        at++;
    }
    if (a->da.data != NULL)
        products[n++] = (pmli_product){
            .form = PMLI_TN, .alpha = 1, .beta = 1, .a = a->v_down, .b = h, .c = a->da};
    pmli_gemm_all(pool, products, n);
}

static void check_adapters(pmli_check *c, const pml_swiglu_bwd_args *a)
{
    int count = __builtin_popcount(a->lora_parts);
    int64_t rows = a->dh.rows, cols = a->dh.cols;
    pmli_need_that(c, (a->db.data != NULL) == (count > 0) && a->lora_parts >> 2 == 0,
                   "lora_parts is 0x%x, and operand 'db' is %s", (unsigned)a->lora_parts,
                   a->db.data != NULL ? "given" : "absent");
    if (a->db.data != NULL) {
        pmli_need_that(c, a->rank > 0, "rank is %d, must be positive", a->rank);
        PMLI_NEED(c, a, u, rows, (int64_t)a->rank * count, PML_F32);
        PMLI_NEED(c, a, b, cols * count, a->rank, PML_F32);
        PMLI_NEED(c, a, v, rows, (int64_t)a->rank * count, PML_F32);
        PMLI_NEED(c, a, db, cols * count, a->rank, PML_F32);
    }
    if (a->da.data != NULL) {
        PMLI_NEED(c, a, da, PMLI_ANY, cols, PML_F32);
        PMLI_NEED(c, a, v_down, rows, a->da.rows, PML_F32);
    }
    const pml_view *blas[] = {&a->dgate_up, &a->u, &a->b, &a->v, &a->db, &a->v_down, &a->da};
    static const char *const names[] = {"dgate_up", "u", "b", "v", "db", "v_down", "da"};
    for (size_t i = 0; i < sizeof blas / sizeof *blas; i++)
        pmli_need_blas(c, names[i], blas[i]);
}

pml_status pmli_cpu_swiglu_bwd(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu_bwd, err);
    PMLI_NEED(&c, a, dh, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, gate_up, a->dh.rows, 2 * a->dh.cols, PML_F32);
    bool codes = a->scale.data != NULL;
    if (codes) {
        pmli_need_pieces(&c, "dgate_up", &a->dgate_up, "scale", &a->scale, a->dh.rows,
                         2 * a->dh.cols, 2);
        PMLI_NEED(&c, a, w_scale, 1, 2 * a->dh.cols, PML_F32);
    } else {
        PMLI_NEED(&c, a, dgate_up, a->dh.rows, 2 * a->dh.cols, PML_F32);
    }
    PMLI_MAY(&c, a, h, a->dh.rows, a->dh.cols, PML_F32);
    bool adapters = a->db.data != NULL || a->da.data != NULL || a->lora_parts != 0;
    if (adapters)
        check_adapters(&c, a);
    pmli_need_ws(&c, &a->ws, pmli_cpu_swiglu_bwd_ws(a));
    if (c.status != PML_OK)
        return c.status;
    pmli_pool *pool = pmli_pool_of(queue);
    pml_swiglu_bwd_args own = *a;
    if (codes)
        own.dgate_up =
            pml_matrix((float *)a->ws.data + own_h(a), a->dh.rows, 2 * a->dh.cols, PML_F32);
    if (a->da.data != NULL && a->h.data == NULL)
        own.h = pml_matrix(a->ws.data, a->dh.rows, a->dh.cols, PML_F32);
    pmli_pool_run(pool, pmli_div_up(a->dh.rows, pmli_piece_rows(a->dh.cols)), swiglu_bwd_piece,
                  &own);
    if (adapters && a->dh.rows > 0)
        adapters_beside(pool, &own, own.h);
    if (codes)
        pmli_fp8_to_pieces(pool, own.dgate_up, a->w_scale.data, 2, a->dgate_up, a->scale);
    return PML_OK;
}
