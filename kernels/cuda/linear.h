/* What linear and its backward share. */
#ifndef PMLI_CUDA_LINEAR_H
#define PMLI_CUDA_LINEAR_H

#include <stdbool.h>

#include "operand.h"
#include "pml_op/backend.h"

/* Columns of u: rank for each part with an adapter. */
static inline int64_t pmli_lora_cols(int32_t rank, uint32_t lora_parts)
{
    return (int64_t)rank * __builtin_popcount(lora_parts);
}

/* Columns of y, and rows of the stacked b, that belong to parts with an adapter. */
static inline int64_t pmli_lora_rows(const int32_t *part_cols, int32_t parts, uint32_t lora_parts)
{
    int64_t n = 0;
    for (int p = 0; p < parts && p < PML_LINEAR_MAX_PARTS; p++)
        if (lora_parts >> p & 1)
            n += part_cols[p];
    return n;
}

/* Whether all parts with an adapter have the same scale, and which. */
static inline bool pmli_lora_one_scale(const float *scales, int32_t parts, uint32_t lora_parts,
                                       float *scale)
{
    bool any = false, same = true;
    *scale = 0;
    for (int p = 0; p < parts; p++) {
        if (!(lora_parts >> p & 1))
            continue;
        same = same && (!any || scales[p] == *scale);
        *scale = scales[p];
        any = true;
    }
    return any && same;
}

/* Rows [first, first + rows) of v. */
static inline pml_view pmli_rows_of(pml_view v, int64_t first, int64_t rows)
{
    v.data = (char *)v.data + (size_t)(first * v.ld) * pml_dtype_size(v.dtype);
    v.rows = rows;
    return v;
}

/* Rows of v, where it is given, are long enough for the border. */
static inline void pmli_need_border(pmli_check *c, const char *name, const pml_view *v,
                                    int32_t border)
{
    pmli_need_that(c, border >= 0, "a border of %d columns", border);
    pmli_need_that(c, v->data == NULL || border == 0 || v->ld >= v->cols + border,
                   "operand '%s' has rows of %lld elements, no border of %d", name,
                   (long long)v->ld, border);
}

/* v and db of a layer's backward, without its dx: of dy, b, u, v, db, ws (of at least
 * pmli_linear_back_ws) and the attributes. v is where its result goes, or has no data where nobody
 * wants it. */
size_t pmli_linear_back_ws(const pml_linear_bwd_args *a);
pml_status pmli_linear_back(pml_queue *queue, const pml_linear_bwd_args *a, pml_view v,
                            pml_error *err);

/* Bytes of a piece of workspace: whole 256-byte units. */
static inline size_t pmli_linear_units(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

/* Bytes of x masked by dropout, where there is one. */
static inline size_t pmli_masked_bytes(const pml_view *x, uint32_t lora_parts, float dropout)
{
    return lora_parts != 0 && dropout > 0
               ? pmli_linear_units((size_t)x->rows * (size_t)x->cols * pml_dtype_size(x->dtype))
               : 0;
}

#endif
