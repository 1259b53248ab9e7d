#include "dropout.h"

#include "pml/base/philox.h"

#include "device.h"
#include "device/params.h"

/* PACKS: as device/dropout.cu has them, a thread. */
enum { BLOCK = 256, PACKS = 2, WARP = 32, GRID_LIMIT = 0x7fffffff };

void pmli_need_dropout(pmli_check *c, const pmli_dropout *d, int64_t rows)
{
    pmli_need_that(c, d->dropout >= 0 && d->dropout < 1, "lora_dropout is %g, must be in [0, 1)",
                   (double)d->dropout);
    if (d->dropout > 0) {
        pmli_need_as(c, "rng", d->rng, 1, 2, PML_I64);
        pmli_need_as(c, "places", d->places, 1, rows, PML_I64);
    }
}

pml_status pmli_cuda_dropout(pml_queue *queue, const pmli_dropout *d, const pml_view *x, bool add,
                             const pml_view *y, pml_error *err)
{
    bool wide = pmli_in_units_of(x, 16) && pmli_in_units_of(y, 16) && x->cols % 8 == 0;
    int64_t packs = x->cols * (int64_t)pml_dtype_size(x->dtype) / 16;
    int64_t threads = (packs / PACKS + WARP) / WARP * WARP; /* of a row */
    threads = wide && threads < BLOCK ? threads : BLOCK;
    int64_t a_row = (packs + threads * PACKS - 1) / (threads * PACKS);
    int64_t items = x->rows * ((x->cols + 7) / 8), blocks = (items + BLOCK - 1) / BLOCK;
    if (wide)
        blocks = x->rows * a_row;
    if (blocks > GRID_LIMIT)
        return PML_FAIL(err, PML_INVALID, "lora_dropout: more elements than a grid has threads");
    uint32_t least = pml_dropout_least(d->dropout);
    pmli_dropout_params p = {.x = x->data,
                             .y = y->data,
                             .rng = d->rng->data,
                             .places = d->places->data,
                             .rows = x->rows,
                             .cols = x->cols,
                             .ld_x = x->ld,
                             .ld_y = y->ld,
                             .purpose = d->purpose,
                             .least = least << 16,
                             .blocks_a_row = (unsigned)a_row,
                             .keep = pml_dropout_keep(least),
                             .add = add};
    pmli_launch shape = {
        .grid_x = (unsigned)blocks, .grid_y = 1, .block_x = (unsigned)threads, .block_y = 1};
    pmli_kernel kernel = PMLI_dropout_f32 + 2 * (unsigned)x->dtype + wide;
    return pmli_cuda_launch(queue, kernel, shape, &p, err);
}
