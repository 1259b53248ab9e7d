/* Rotary position embedding, halves layout. Su et al., "RoFormer", 2021. And what the adapters of
 * the linear layer before it want of the gradient, each a product of its own. */
#include "check.h"
#include "device.h"
#include "gemm.h"
#include "lora.h"
#include "ops.h"
#include "vec.h"

PMLI_CLONES static void rope_rows(const pml_rope_args *a, int64_t first, int64_t last)
{
    const int32_t *pos = a->pos.data;
    int64_t half = a->head_dim / 2;
    float sign = a->inverse ? -1.0F : 1.0F;
    for (int64_t t = first; t < last; t++) {
        const float *cosine = (const float *)a->table.data + pos[t] * a->table.ld;
        const float *sine = cosine + half;
        float *x = (float *)a->x.data + t * a->x.ld;
        for (int32_t h = 0; h < a->heads; h++, x += a->head_dim)
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float s = sign * sine[i], low = x[i], high = x[half + i];
                x[i] = low * cosine[i] - high * s;
                x[half + i] = high * cosine[i] + low * s;
            }
    }
}

static void rope_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_rope_args *a = arg;
    int64_t piece = pmli_piece_rows(a->x.cols);
    rope_rows(a, item * piece, pmli_min((item + 1) * piece, a->x.rows));
}

static pmli_lora lora_of(const pml_rope_args *a)
{
    return (pmli_lora){.parts = a->parts,
                       .part_cols = a->part_cols,
                       .lora_parts = a->lora_parts,
                       .rank = a->rank,
                       .scale = a->lora_scale};
}

static void check_adapters(pmli_check *c, const pml_rope_args *a)
{
    const pmli_lora lora = lora_of(a);
    int64_t rows;
    pmli_need_that(c, a->inverse && a->lora_parts != 0 && a->rank > 0,
                   "operand 'db' needs the inverse, adapters and a rank");
    pmli_lora_check_parts(c, &lora, a->x.cols, &rows);
    if (c->status != PML_OK)
        return;
    PMLI_NEED(c, a, u, a->x.rows, pmli_lora_width(&lora), PML_F32);
    PMLI_NEED(c, a, b, rows, a->rank, PML_F32);
    PMLI_NEED(c, a, v, a->x.rows, pmli_lora_width(&lora), PML_F32);
    PMLI_NEED(c, a, db, rows, a->rank, PML_F32);
    const pml_view *blas[] = {&a->x, &a->u, &a->b, &a->v, &a->db};
    static const char *const names[] = {"x", "u", "b", "v", "db"};
    for (size_t i = 0; i < sizeof blas / sizeof *blas; i++)
        pmli_need_blas(c, names[i], blas[i]);
}

pml_status pmli_cpu_rope(pml_queue *queue, const pml_rope_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rope, err);
    pmli_need_that(&c, a->heads > 0 && a->head_dim > 0 && a->head_dim % 2 == 0,
                   "heads (%d) must be positive and head_dim (%d) positive and even", a->heads,
                   a->head_dim);
    bool adapters = a->db.data != NULL;
    int64_t turned = (int64_t)a->heads * a->head_dim;
    PMLI_NEED(&c, a, x, PMLI_ANY, adapters ? PMLI_ANY : turned, PML_F32);
    pmli_need_that(&c, a->x.cols >= turned,
                   "operand 'x' has %lld columns, %d heads of %d have more", (long long)a->x.cols,
                   a->heads, a->head_dim);
    PMLI_NEED(&c, a, pos, 1, a->x.rows, PML_I32);
    PMLI_NEED(&c, a, table, PMLI_ANY, a->head_dim, PML_F32);
    if (adapters)
        check_adapters(&c, a);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool *pool = pmli_pool_of(queue);
    pmli_pool_run(pool, pmli_div_up(a->x.rows, pmli_piece_rows(a->x.cols)), rope_piece, (void *)a);
    const pmli_lora lora = lora_of(a);
    if (adapters && a->x.rows > 0)
        pmli_lora_back(pool, &lora, a->x, a->b, a->u, a->v, a->db);
    return PML_OK;
}
