#include "check.h"

#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>

#include "gemm.h"

pmli_check pmli_check_begin(pml_op op, pml_error *err)
{
    return (pmli_check){op, err, PML_OK};
}

void pmli_need_that(pmli_check *c, bool holds, const char *format, ...)
{
    if (holds || c->status != PML_OK)
        return;
    char text[300];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    c->status = PML_FAIL(c->err, PML_INVALID, "%s: %s", pml_op_describe(c->op)->name, text);
}

/* "[rows,cols]" with * for any. */
static const char *shape_text(char *out, size_t size, int64_t rows, int64_t cols)
{
    char r[24] = "*", k[24] = "*";
    if (rows >= 0)
        snprintf(r, sizeof r, "%" PRId64, rows);
    if (cols >= 0)
        snprintf(k, sizeof k, "%" PRId64, cols);
    snprintf(out, size, "[%s,%s]", r, k);
    return out;
}

/* The words are made where they are needed: some 40 operands a layer are looked at, and of a token
 * that is sampled all of that is one thread's. */
static void need_shape(pmli_check *c, const char *name, const pml_view *v, int64_t rows,
                       int64_t cols)
{
    if ((rows < 0 || v->rows == rows) && (cols < 0 || v->cols == cols) && v->rows >= 0 &&
        v->cols >= 0)
        return;
    char want[64];
    pmli_need_that(c, false, "operand '%s' is [%" PRId64 ",%" PRId64 "], must be %s", name, v->rows,
                   v->cols, shape_text(want, sizeof want, rows, cols));
}

void pmli_need_any(pmli_check *c, const char *name, const pml_view *v, int64_t rows, int64_t cols)
{
    size_t size = pml_dtype_size(v->dtype);
    pmli_need_that(c, v->data != NULL, "operand '%s' is missing", name);
    pmli_need_that(c, size != 0, "operand '%s' has no known dtype (%d)", name, (int)v->dtype);
    need_shape(c, name, v, rows, cols);
    int64_t bytes;
    pmli_need_that(c,
                   v->ld >= v->cols && !__builtin_mul_overflow(v->rows, v->ld, &bytes) &&
                       !__builtin_mul_overflow(bytes, (int64_t)size, &bytes),
                   "operand '%s' has ld %" PRId64 " for [%" PRId64 ",%" PRId64
                   "]; ld must be at least cols, and the whole addressable",
                   name, v->ld, v->rows, v->cols);
    pmli_need_that(c, size == 0 || (uintptr_t)v->data % size == 0,
                   "operand '%s' is not aligned to its dtype %s", name, pml_dtype_name(v->dtype));
}

void pmli_need(pmli_check *c, const char *name, const pml_view *v, int64_t rows, int64_t cols,
               pml_dtype dtype)
{
    pmli_need_any(c, name, v, rows, cols);
    pmli_need_that(c, v->dtype == dtype, "operand '%s' is %s, must be %s on the CPU", name,
                   pml_dtype_name(v->dtype), pml_dtype_name(dtype));
}

void pmli_need_weight(pmli_check *c, const char *name, const pml_view *v, int64_t rows,
                      int64_t cols)
{
    bool narrow = v->dtype == PML_BF16;
    pmli_need_any(c, name, v, rows, cols);
    pmli_need_that(c, narrow || v->dtype == PML_F32,
                   "operand '%s' is %s, must be F32 or BF16 on the CPU", name,
                   pml_dtype_name(v->dtype));
    pmli_need_that(c, !narrow || v->cols <= PMLI_NARROW_COLS,
                   "operand '%s' has rows of %" PRId64 " BF16, at most %d can be widened", name,
                   v->cols, (int)PMLI_NARROW_COLS);
}

void pmli_need_blas(pmli_check *c, const char *name, const pml_view *v)
{
    pmli_need_that(c, v->rows <= INT_MAX && v->ld <= INT_MAX,
                   "operand '%s' has 2^31 or more rows or columns, more than BLAS can count", name);
}

void pmli_need_pair(pmli_check *c, const char *name, const pml_view *v, const char *other,
                    const pml_view *w)
{
    pmli_need_that(c, (v->data == NULL) == (w->data == NULL),
                   "operands '%s' and '%s' must be given together", name, other);
}

void pmli_need_turn(pmli_check *c, const pml_attention_bwd_args *a)
{
    pmli_need_pair(c, "pos", &a->pos, "table", &a->table);
    PMLI_MAY(c, a, pos, 1, a->q.rows, PML_I32);
    PMLI_MAY(c, a, table, PMLI_ANY, a->head_dim, PML_F32);
    pmli_need_that(c, a->pos.data == NULL || (a->q.rows == a->k.rows && a->head_dim % 2 == 0),
                   "operand 'pos' with %lld queries, %lld keys, heads of %d; must be as many, and "
                   "even",
                   (long long)a->q.rows, (long long)a->k.rows, a->head_dim);
}

void pmli_need_ws(pmli_check *c, const pml_view *ws, size_t bytes)
{
    if (bytes == 0)
        return;
    pmli_need(c, "ws", ws, 1, PMLI_ANY, PML_U8);
    pmli_need_that(c, (uintptr_t)ws->data % sizeof(float) == 0, "operand 'ws' is not aligned");
    pmli_need_that(c, (size_t)ws->cols >= bytes, "operand 'ws' has %" PRId64 " bytes, needs %zu",
                   ws->cols, bytes);
}
