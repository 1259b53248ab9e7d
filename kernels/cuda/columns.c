#include "columns.h"

#include "device.h"
#include "device/params.h"

/* Blocks of rows, each summed by itself: enough of them to fill a GPU from a few hundred columns
 * on. */
enum { PARTS = 64, BLOCK = 256, ADD_COLUMNS = 32, ADD_BLOCK = 32 * ADD_COLUMNS };

size_t pmli_cuda_columns_ws(int64_t cols)
{
    return PARTS * (size_t)cols * sizeof(float);
}

pml_status pmli_cuda_columns(pml_queue *queue, const pml_view *x, const pml_view *y,
                             const float *rstd, float *out, void *ws, pml_error *err)
{
    int64_t each = (x->rows + PARTS - 1) / PARTS, parts = (x->rows + each - 1) / each;
    unsigned across = (unsigned)((x->cols + BLOCK - 1) / BLOCK);
    pmli_columns_params p = {.x = x->data,
                             .y = y != NULL ? y->data : NULL,
                             .rstd = rstd,
                             .parts = ws,
                             .rows = x->rows,
                             .cols = x->cols,
                             .ld_x = x->ld,
                             .ld_y = y != NULL ? y->ld : 0,
                             .rows_a_part = each};
    pmli_launch shape = {
        .grid_x = across, .grid_y = (unsigned)parts, .block_x = BLOCK, .block_y = 1};
    static const pmli_kernel kernels[2][3] = {
        {PMLI_column_parts_f32, PMLI_column_parts_bf16, PMLI_column_parts_f16},
        {PMLI_column_parts_f32, PMLI_column_parts_bf16_by_f32, PMLI_column_parts_f16_by_f32}};
    pmli_kernel kernel = kernels[y != NULL && y->dtype != x->dtype][x->dtype];
    pml_status status = pmli_cuda_launch(queue, kernel, shape, &p, err);
    if (status != PML_OK)
        return status;
    return pmli_cuda_add_parts(queue, ws, parts, x->cols, &out, 1, err);
}

pml_status pmli_cuda_add_parts(pml_queue *queue, const float *parts, int64_t count, int64_t cols,
                               float *const out[], int sets, pml_error *err)
{
    pmli_add_parts_params p = {parts, {out[0], out[sets - 1]}, count, cols};
    pmli_launch shape = {.grid_x = (unsigned)((cols + ADD_COLUMNS - 1) / ADD_COLUMNS),
                         .grid_y = (unsigned)sets,
                         .block_x = ADD_BLOCK,
                         .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_add_parts, shape, &p, err);
}
