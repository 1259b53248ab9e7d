/* Checks of an op's operands. The first failure is kept, later checks do nothing, so an op states
 * all it needs in a row and looks at the status once:
 *
 *     pmli_check c = pmli_check_begin(PML_OP_swiglu, err);
 *     PMLI_NEED(&c, a, gate_up, PMLI_ANY, PMLI_ANY, PML_F32);
 *     PMLI_NEED(&c, a, h, a->gate_up.rows, a->gate_up.cols / 2, PML_F32);
 *     if (c.status != PML_OK)
 *         return c.status;
 */
#ifndef PMLI_CPU_CHECK_H
#define PMLI_CPU_CHECK_H

#include "pml_op/ops.h"

#include <stdbool.h>

typedef struct pmli_check {
    pml_op op;
    pml_error *err;
    pml_status status;
} pmli_check;

enum { PMLI_ANY = -1 };

/* The checks of one call; the first that fails stays in status. */
pmli_check pmli_check_begin(pml_op op, pml_error *err);

/* Present, of this shape (PMLI_ANY: any) and dtype, its layout one that can be addressed. */
void pmli_need(pmli_check *c, const char *name, const pml_view *v, int64_t rows, int64_t cols,
               pml_dtype dtype);

/* Like pmli_need without an opinion on the dtype. */
void pmli_need_any(pmli_check *c, const char *name, const pml_view *v, int64_t rows, int64_t cols);

/* A weight that is not trained here: F32, or BF16, which is widened as it is read. */
void pmli_need_weight(pmli_check *c, const char *name, const pml_view *v, int64_t rows,
                      int64_t cols);

/* Small enough for the int that BLAS counts in. */
void pmli_need_blas(pmli_check *c, const char *name, const pml_view *v);

/* Both, or neither, of two operands that only make sense together. */
void pmli_need_pair(pmli_check *c, const char *name, const pml_view *v, const char *other,
                    const pml_view *w);

/* Positions and angles by which attention's backward turns dq and dk back: both or neither. */
void pmli_need_turn(pmli_check *c, const pml_attention_bwd_args *a);

/* The scratch memory that workspace() asked for. */
void pmli_need_ws(pmli_check *c, const pml_view *ws, size_t bytes);

/* Anything else; the text says what must hold. */
void pmli_need_that(pmli_check *c, bool holds, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define PMLI_NEED(c, a, field, rows, cols, dtype)                                                  \
    pmli_need((c), #field, &(a)->field, (rows), (cols), (dtype))
#define PMLI_MAY(c, a, field, rows, cols, dtype)                                                   \
    do {                                                                                           \
        if ((a)->field.data != NULL)                                                               \
            PMLI_NEED((c), (a), field, (rows), (cols), (dtype));                                   \
    } while (0)

#endif
