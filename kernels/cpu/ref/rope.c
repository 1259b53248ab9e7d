/* Rotary position embedding, halves layout. Su et al., "RoFormer", 2021. */
#include "rope.h"

#include "check.h"
#include "device.h"
#include "ops.h"
#include "vec.h"

PMLI_CLONES void pmli_rope_rows(const pml_rope_args *a, int64_t first, int64_t last)
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
    pmli_rope_rows(a, item * piece, pmli_min((item + 1) * piece, a->x.rows));
}

pml_status pmli_cpu_rope(pml_queue *queue, const pml_rope_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_rope, err);
    pmli_need_that(&c, a->heads > 0 && a->head_dim > 0 && a->head_dim % 2 == 0,
                   "heads (%d) must be positive and head_dim (%d) positive and even", a->heads,
                   a->head_dim);
    PMLI_NEED(&c, a, x, PMLI_ANY, (int64_t)a->heads * a->head_dim, PML_F32);
    PMLI_NEED(&c, a, pos, 1, a->x.rows, PML_I32);
    PMLI_NEED(&c, a, table, PMLI_ANY, a->head_dim, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(a->x.rows, pmli_piece_rows(a->x.cols)),
                  rope_piece, (void *)a);
    return PML_OK;
}
