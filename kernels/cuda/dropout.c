#include "dropout.h"

#include "device.h"
#include "device/params.h"

enum { BLOCK = 256, GRID_LIMIT = 0x7fffffff };

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
    int64_t items = x->rows * ((x->cols + 3) / 4), blocks = (items + BLOCK - 1) / BLOCK;
    if (blocks > GRID_LIMIT)
        return PML_FAIL(err, PML_INVALID, "lora_dropout: more elements than a grid has threads");
    pmli_dropout_params p = {.x = x->data,
                             .y = y->data,
                             .rng = d->rng->data,
                             .places = d->places->data,
                             .rows = x->rows,
                             .cols = x->cols,
                             .ld_x = x->ld,
                             .ld_y = y->ld,
                             .purpose = d->purpose,
                             .dropout = d->dropout,
                             .keep = 1.0F / (1.0F - d->dropout),
                             .add = add};
    pmli_launch shape = {.grid_x = (unsigned)blocks, .grid_y = 1, .block_x = BLOCK, .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_dropout_f32 + (unsigned)x->dtype, shape, &p, err);
}
