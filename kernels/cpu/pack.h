/* Copies of a product's right factor into panels, for the tile to read (../gemm.h).
 *
 *   panel: k rows of `width` floats, width a multiple of 16;
 *   B's columns [0, n) of it, n a multiple of 16, n <= width; the rest is left as it is. */
#ifndef PMLI_CPU_PACK_H
#define PMLI_CPU_PACK_H

#include <stdint.h>

/* panel[l*width + j] = alpha b[l*ld + j]: rows [0, k) of B[k,n]. */
void pmli_pack_straight(const float *b, int64_t ld, int64_t k, int64_t n, float alpha,
                        int64_t width, float *panel);

/* panel[l*width + j] = alpha b[j*ld + l], of B[n,k]. */
void pmli_pack_across(const float *b, int64_t ld, int64_t k, int64_t n, float alpha, int64_t width,
                      float *panel);

#endif
