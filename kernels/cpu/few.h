/* Products of so few rows that reading B is what they cost: by OpenBLAS, or for one row by sums of
 * our own (gemv.h), a stretch of B's columns a thread. */
#ifndef PMLI_CPU_FEW_H
#define PMLI_CPU_FEW_H

#include "gemm.h"

enum { PMLI_FEW_ROWS = 8 }; /* from here on panels pay */

/* As pmli_gemm_all, every c of fewer rows than that: all columns of all of them are cut as one, so
 * that each thread gets as much, and are waited for once. */
void pmli_few_all(pmli_pool *pool, const pmli_product *products, int count);

#endif
