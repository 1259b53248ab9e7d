/* Copies of a product's right factor into panels, for the tile to read (../gemm.h).
 *
 *   panel: k rows of `width` floats, width a multiple of 16;
 *   B's columns [0, n) of it, n a multiple of 16, n <= width; the rest is left as it is.
 *   b is F32, or BF16 that becomes F32 on its way. */
#ifndef PMLI_CPU_PACK_H
#define PMLI_CPU_PACK_H

#include "pml/base/view.h"

/* panel[l*width + j] = alpha b[l,j], of b [k,n]. */
void pmli_pack_straight(pml_view b, float alpha, int64_t width, float *panel);

/* panel[l*width + j] = alpha b[j,l], of b [n,k]. */
void pmli_pack_across(pml_view b, float alpha, int64_t width, float *panel);

#endif
