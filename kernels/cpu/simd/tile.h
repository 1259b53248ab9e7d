/* Small matrix product: for the tiles of attention, where packing would cost more than the product,
 * and for blocks of large products, whose factors gemm.c has packed. C[m,n] = A[m,k] B[k,n], or +=
 * with add.
 *
 *   A's element (i,l) lies at a[i*row + l*col], so A may be a transposed view;
 *   B and C have contiguous rows of n floats, ldb and ldc apart; n is a multiple of 16. */
#ifndef PMLI_CPU_TILE_H
#define PMLI_CPU_TILE_H

#include <stdbool.h>
#include <stdint.h>

enum { PMLI_TILE_COLS = 16, PMLI_PANEL_COLS = 32 /* the widest panel */ };

typedef void pmli_tile_fn(int64_t m, int64_t n, int64_t k, const float *a, int64_t row, int64_t col,
                          const float *b, int64_t ldb, float *c, int64_t ldc, bool add);

/* The one for this machine: AVX-512, AVX2 with FMA, or plain. */
pmli_tile_fn *pmli_tile_pick(void);

/* Columns of C that it keeps in registers, so the best width of a panel of B; 0 where the machine
 * has no vectors of ours, and OpenBLAS' own kernels are better. */
int pmli_tile_width(void);

/* For a cost: what is left of `rows` beside whole tiles goes in fours, and then a two and a one,
 * which count as a four: so many of its rows are missing. */
int64_t pmli_tile_waste(int64_t rows);

/* Whether the processor has what x86-64-v4 is. */
bool pmli_has_avx512(void);

/* "avx512", "avx2" or the architecture: also which clones of PMLI_CLONES functions run here. */
const char *pmli_instructions(void);

#endif
