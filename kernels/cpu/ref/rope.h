/* Rotary position embedding of some rows, for who has them in hand. */
#ifndef PMLI_CPU_ROPE_H
#define PMLI_CPU_ROPE_H

#include "pml_op/ops.h"

/* Rows [first, last) of a->x, which the op has checked. */
void pmli_rope_rows(const pml_rope_args *a, int64_t first, int64_t last);

#endif
