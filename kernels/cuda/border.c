#include "border.h"

#include "device.h"
#include "device/params.h"
#include "linear.h"
#include "operand.h"

enum { BLOCK = 256, UNIT = 8 };

int64_t pmli_border_columns(const pmli_bordered *s)
{
    int64_t used = pmli_lora_cols(s->rank, s->lora_parts),
            columns = (used + UNIT - 1) / UNIT * UNIT;
    return s->x->rows >= PMLI_BORDER_TOKENS && columns <= s->border ? columns : 0;
}

/* Where each adapter's part lies in w. */
static void find_rows(const pmli_bordered *s, pmli_border_params *p)
{
    long long row = 0;
    for (int part = 0; part < s->parts; row += s->part_cols[part++]) {
        if (!(s->lora_parts >> part & 1))
            continue;
        p->first[p->adapters] = row;
        p->end[p->adapters++] = row + s->part_cols[part];
    }
}

/* 16 bytes at a time: every row of every operand begins on them, and so does every adapter's block
 * of columns. */
static bool in_packs(const pmli_border_params *p, pml_dtype dtype)
{
    size_t size = pml_dtype_size(dtype);
    uintptr_t addresses =
        (uintptr_t)p->a | (uintptr_t)p->b | (uintptr_t)p->u | (uintptr_t)p->w | (uintptr_t)p->x;
    long long lengths = p->k | p->ld_a | p->ld_b | p->ld_w | p->ld_x | p->rank;
    lengths |= p->u != NULL ? p->ld_u : 0;
    return addresses % 16 == 0 && (size_t)lengths * size % 16 == 0;
}

pml_status pmli_border_fill(pml_queue *queue, const pmli_bordered *s, pml_error *err)
{
    pml_dtype dtype = s->w->dtype;
    pml_view beside = pml_view_columns(*s->x, s->x->cols, 0);
    pmli_border_params p = {.a = s->a->data,
                            .b = s->b->data,
                            .u = s->u != NULL ? s->u->data : NULL,
                            .w = s->w->data,
                            .x = beside.data,
                            .n = s->w->rows,
                            .k = s->w->cols,
                            .tokens = s->u != NULL ? s->x->rows : 0,
                            .ld_a = s->a->ld,
                            .ld_b = s->b->ld,
                            .ld_u = s->u != NULL ? s->u->ld : 0,
                            .ld_w = s->w->ld,
                            .ld_x = beside.ld,
                            .columns = (int)pmli_border_columns(s),
                            .rank = s->rank};
    find_rows(s, &p);
    bool wide = in_packs(&p, dtype);
    int64_t pack = wide ? (int64_t)(16 / pml_dtype_size(dtype)) : 1;
    int64_t items = (p.n + p.tokens) * (p.columns / pack) + p.columns * (p.k / pack);
    pmli_launch shape = {.grid_x = (unsigned)((items + BLOCK - 1) / BLOCK),
                         .grid_y = 1,
                         .block_x = BLOCK,
                         .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_border_f32 + 2 * (unsigned)dtype + (wide ? 1 : 0), shape,
                            &p, err);
}
