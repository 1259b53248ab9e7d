/* What every op asks about its operands, beside the checks it shares with the CPU. */
#ifndef PMLI_CUDA_OPERAND_H
#define PMLI_CUDA_OPERAND_H

#include "cpu/check.h"

/* a / b rounded up, a >= 0, b > 0. */
static inline int64_t pmli_div_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* F32, BF16 or F16: what the GPU computes on. */
static inline bool pmli_is_float(pml_dtype dtype)
{
    return dtype == PML_F32 || dtype == PML_BF16 || dtype == PML_F16;
}

/* Present, of this shape and of a dtype that other operands have. */
static inline void pmli_need_as(pmli_check *c, const char *name, const pml_view *v, int64_t rows,
                                int64_t cols, pml_dtype dtype)
{
    pmli_need_any(c, name, v, rows, cols);
    pmli_need_that(c, v->dtype == dtype, "operand '%s' is %s, must be %s here", name,
                   pml_dtype_name(v->dtype), pml_dtype_name(dtype));
}

static inline void pmli_need_float(pmli_check *c, const char *name, const pml_view *v)
{
    pmli_need_that(c, pmli_is_float(v->dtype), "operand '%s' is %s, must be F32, BF16 or F16", name,
                   pml_dtype_name(v->dtype));
}

/* Where an update writes parameters a second time, in a dtype to compute with: F32 when nowhere. */
static inline pml_dtype pmli_need_copy(pmli_check *c, const pml_view *p, const pml_view *copy)
{
    if (copy->data == NULL)
        return PML_F32;
    pmli_need_any(c, "copy", copy, 1, p->cols);
    pmli_need_float(c, "copy", copy);
    return copy->dtype;
}

/* Whether every row of a view begins on a multiple of `bytes`, and the place behind the last. */
static inline bool pmli_rows_begin_on(const pml_view *v, size_t bytes)
{
    return ((uintptr_t)v->data | (size_t)v->ld * pml_dtype_size(v->dtype)) % bytes == 0;
}

/* Whether every row of a view begins on a multiple of `bytes` and is whole units of it. */
static inline bool pmli_in_units_of(const pml_view *v, size_t bytes)
{
    size_t size = pml_dtype_size(v->dtype), bits = (uintptr_t)v->data | (size_t)v->cols * size;
    if (v->rows > 1)
        bits |= (size_t)v->ld * size;
    return bits % bytes == 0;
}

/* The same of packs that have as many elements as 16 bytes of another dtype. */
static inline bool pmli_in_packs_of(const pml_view *v, pml_dtype dtype)
{
    return pmli_in_units_of(v, 16 / pml_dtype_size(dtype) * pml_dtype_size(v->dtype));
}

#endif
