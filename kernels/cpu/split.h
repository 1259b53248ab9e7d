/* Products of float32 on a matrix unit that multiplies bfloat16 (Intel's AMX).
 *
 * A float32 has 24 significant bits, a bfloat16 has 8, so x = x1 + x2 + x3 exactly: each part is
 * what is left, rounded to 8 bits; |x2| <= 2^-8 |x|, |x3| <= 2^-16 |x|. Then
 *
 *      a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1) + less than 2^-23 |a b|,
 *
 * six products, each exact in float32, where it is that their sums are rounded: fewer times than in
 * a chain of fused multiplications and additions, so that the whole is no less accurate than that
 * (tests/unit/kernels/test_split.c). Henry, Tang & Heinecke, "Leveraging the bfloat16 Artificial
 * Intelligence Datatype For Higher-Precision Computations", 2019.
 * What is not a number stays none, infinity becomes none; parts below 2^-126 are taken for 0.
 *
 * Layout. A strip is 16 rows of A or 16 columns of B; for every 32 of k it has a cell, which is a
 * tile for each of the three parts, 1024 bytes:
 *
 *      A: 16 rows of 32 k               B: 16 rows of 16 columns of a pair (k, k+1)
 *
 * What a strip lacks of 16 rows or columns, and k of 32, is zeros. Strips are `pitch` bytes apart.
 *
 * A B that is stored in bfloat16 has one part, and its cells one tile: three products in place of
 * six, with the bits of all six, since the others are zeros.
 */
#ifndef PMLI_CPU_SPLIT_H
#define PMLI_CPU_SPLIT_H

#include <stdbool.h>
#include <stdint.h>

#include "pml/base/view.h"

enum { PMLI_STRIP = 16, PMLI_CELL_K = 32, PMLI_PARTS = 3, PMLI_PART_BYTES = 1024 };
enum { PMLI_CELL_BYTES = PMLI_PARTS * PMLI_PART_BYTES };

typedef enum pmli_side { PMLI_LEFT, PMLI_RIGHT } pmli_side;

/* Rows of A, or columns of B, times alpha: x is [n,k] with `along`, [k,n] without. It is F32, or
 * BF16, of which `parts` may be 1 if alpha is. strips: 64-byte aligned, as all of it. */
void pmli_split(pmli_side side, bool along, pml_view x, float alpha, int parts,
                unsigned char *strips, int64_t pitch);

/* C[m,n] = A B, or += with add, `cells` of k deep, B of `parts`; n a multiple of 16, A's strips
 * ceil(m/16). */
typedef void pmli_split_fn(int64_t m, int64_t n, int64_t cells, int parts, const unsigned char *a,
                           int64_t a_pitch, const unsigned char *b, int64_t b_pitch, float *c,
                           int64_t ldc, bool add);

/* The same in plain C: what the unit is defined to compute, for tests. */
pmli_split_fn pmli_split_plain;

/* The unit's product; NULL where there is none, where the kernel does not let this process use it,
 * and with $PANTHERAML_MATRIX "off". With "plain" it is pmli_split_plain everywhere. The
 * environment is read once in a process. */
pmli_split_fn *pmli_split_pick(void);

/* What that adds to the name of the instruction set: "+amx", "+plain" or nothing. */
const char *pmli_split_name(void);

/* The unit itself whatever the environment says, or NULL. */
pmli_split_fn *pmli_split_unit(void);

#endif
