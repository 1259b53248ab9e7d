#include "few_rows.h"

#include "device.h"
#include "device/params.h"
#include "linear.h"

enum { MOST_ROWS = 8, WARP = 32, AT_A_TIME = 2 /* rows of w that a warp has: few_rows.cu */ };

bool pmli_few_rows_serves(const pml_linear_args *a)
{
    bool narrow = a->x.dtype == PML_BF16 || a->x.dtype == PML_F16;
    return narrow && a->w_scale.data == NULL && a->x.rows <= MOST_ROWS && a->lora_dropout == 0 &&
           pmli_in_units_of(&a->x, 16) && pmli_in_units_of(&a->w, 16) &&
           (a->lora_parts == 0 || pmli_in_units_of(&a->a, 16));
}

/* Where each adapter's part lies in y. */
static void find_parts(const pml_linear_args *a, pmli_few_rows_params *p)
{
    long long row = 0;
    for (int part = 0; part < a->parts; row += a->part_cols[part++]) {
        if (!(a->lora_parts >> part & 1))
            continue;
        p->first[p->adapters] = row;
        p->scale[p->adapters] = a->lora_scale[part];
        p->end[p->adapters++] = row + a->part_cols[part];
    }
}

enum { FORMS = 4 }; /* for 1, 2, 4 or 8 rows; float16's stand behind bfloat16's */
_Static_assert((int)PMLI_few_u_f16_1 == (int)PMLI_few_u_bf16_1 + FORMS &&
                   (int)PMLI_few_y_f16_1 == (int)PMLI_few_y_bf16_1 + FORMS,
               "kernels in images.h");

/* The kernel's form for so many rows. */
static pmli_kernel form(pmli_kernel first, const pml_view *x)
{
    unsigned of_rows = x->rows > 4 ? 3 : x->rows > 2 ? 2 : x->rows > 1 ? 1 : 0;
    return first + (x->dtype == PML_F16 ? FORMS : 0) + of_rows;
}

pml_status pmli_few_rows(pml_queue *queue, const pml_linear_args *a, const pml_view *u,
                         pml_error *err)
{
    pmli_few_rows_params p = {.x = a->x.data,
                              .w = a->w.data,
                              .bias = a->bias.data,
                              .a = a->a.data,
                              .b = a->b.data,
                              .u = u->data,
                              .y = a->y.data,
                              .k = a->x.cols,
                              .n = a->w.rows,
                              .ld_x = a->x.ld,
                              .ld_w = a->w.ld,
                              .ld_a = a->a.ld,
                              .ld_b = a->b.ld,
                              .ld_u = u->ld,
                              .ld_y = a->y.ld,
                              .rows = (int)a->x.rows,
                              .rank = a->rank};
    find_parts(a, &p);
    pml_status status = PML_OK;
    pmli_launch shape = {.grid_x = (unsigned)pmli_lora_cols(a->rank, a->lora_parts),
                         .grid_y = 1,
                         .block_x = FEW_ROWS_THREADS,
                         .block_y = 1};
    if (p.adapters > 0)
        status = pmli_cuda_launch(queue, form(PMLI_few_u_bf16_1, &a->x), shape, &p, err);
    const int64_t a_block = FEW_ROWS_THREADS / WARP * AT_A_TIME;
    shape.grid_x = (unsigned)((p.n + a_block - 1) / a_block);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, form(PMLI_few_y_bf16_1, &a->x), shape, &p, err);
    return status;
}
