/* Embedding: rows of a table, and their gradient. */
#include "check.h"
#include "convert.h"
#include "device.h"
#include "gemm.h"
#include "ops.h"
#include "vec.h"

static void embed_rows(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_embed_args *a = arg;
    int64_t piece = pmli_piece_rows(a->y.cols), last = pmli_min((item + 1) * piece, a->y.rows);
    const int32_t *ids = a->ids.data;
    for (int64_t t = item * piece; t < last; t++)
        pmli_convert(pmli_rows(a->table, ids[t], 1).data, a->table.dtype,
                     (float *)a->y.data + t * a->y.ld, PML_F32, a->y.cols);
}

pml_status pmli_cpu_embed(pml_queue *queue, const pml_embed_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_embed, err);
    PMLI_NEED(&c, a, ids, 1, PMLI_ANY, PML_I32);
    pmli_need_weight(&c, "table", &a->table, PMLI_ANY, PMLI_ANY);
    PMLI_NEED(&c, a, y, a->ids.cols, a->table.cols, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(a->y.rows, pmli_piece_rows(a->y.cols)),
                  embed_rows, (void *)a);
    return PML_OK;
}

/* Tokens share rows, so the work is cut by columns: each piece adds all tokens in order. */
enum { EMBED_COLUMNS = 64 };

PMLI_CLONES static void embed_add(const pml_embed_bwd_args *a, int64_t first, int64_t cols)
{
    const int32_t *ids = a->ids.data;
    for (int64_t t = 0; t < a->dy.rows; t++) {
        const float *dy = (const float *)a->dy.data + t * a->dy.ld + first;
        float *row = (float *)a->dtable.data + ids[t] * a->dtable.ld + first;
#pragma omp simd
        for (int64_t i = 0; i < cols; i++)
            row[i] += dy[i];
    }
}

static void embed_columns(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_embed_bwd_args *a = arg;
    int64_t first = item * EMBED_COLUMNS;
    embed_add(a, first, pmli_min(EMBED_COLUMNS, a->dy.cols - first));
}

pml_status pmli_cpu_embed_bwd(pml_queue *queue, const pml_embed_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_embed_bwd, err);
    PMLI_NEED(&c, a, ids, 1, PMLI_ANY, PML_I32);
    PMLI_NEED(&c, a, dy, a->ids.cols, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, dtable, PMLI_ANY, a->dy.cols, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(a->dy.cols, EMBED_COLUMNS), embed_columns,
                  (void *)a);
    return PML_OK;
}
