/* A matrix times a vector, row by row: what a token of a sample is made of. Bound by reading the
 * matrix: each row is read once, one after the other. */
#ifndef PMLI_CPU_GEMV_H
#define PMLI_CPU_GEMV_H

#include <stdbool.h>
#include <stdint.h>

#include "pml/base/view.h"

/* y[i] = alpha w_i x, or += with add; w [n,k] is F32 or BF16, which decides no bit. An element's
 * sum does not depend on which rows are asked for together. */
void pmli_gemv(pml_view w, const float *x, float alpha, bool add, float *y);

#endif
