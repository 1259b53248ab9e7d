/* A matrix times a vector, row by row: what a token of a sample is made of. Bound by reading the
 * matrix, so it reads four rows side by side and each of them once. */
#ifndef PMLI_CPU_GEMV_H
#define PMLI_CPU_GEMV_H

#include <stdbool.h>
#include <stdint.h>

/* y[i] = alpha w_i x, or += with add; w has n rows of k floats, ld apart. An element's sum does not
 * depend on which rows are asked for together. */
void pmli_gemv(const float *w, int64_t ld, int64_t n, int64_t k, const float *x, float alpha,
               bool add, float *y);

#endif
