#include "gemv.h"

#include "widen.h"

/* Sums of a row that run side by side hide the latency of additions; what follows a row is fetched
 * ahead of time, because the processor's own prefetching loses its stride there. */
enum { LANES = PMLI_LANES, SUMS = 8, BLOCK = SUMS * LANES, LINE = 16, AHEAD = 4096 };

typedef pmli_lanes lanes;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi" /* the vectors never cross a call: all is inlined */

PMLI_INLINE float dot(const void *w, const float *x, int64_t k, const bool narrow)
{
    const int64_t line = narrow ? 2 * LINE : LINE;
    lanes sum[SUMS];
    int64_t l = 0;
#pragma GCC unroll 8
    for (int s = 0; s < SUMS; s++)
        sum[s] = (lanes){0};
    for (; l + BLOCK <= k; l += BLOCK) {
#pragma GCC unroll 8
        for (int s = 0; s < SUMS; s++) {
            if (s * LANES % line == 0)
                __builtin_prefetch((const char *)w + (l + s * LANES) * (narrow ? 2 : 4) + AHEAD, 0,
                                   3);
            lanes left;
            pmli_take_lanes(w, l + s * LANES, narrow, &left);
            sum[s] += left * *(const lanes *)(x + l + s * LANES);
        }
    }
#pragma GCC unroll 8
    for (int s = 1; s < SUMS; s++)
        sum[0] += sum[s];
    /* The rest in vectors too: one by one, compilers fuse a multiplication with its addition in one
     * of the two forms and not in the other. */
    for (; l + LANES <= k; l += LANES) {
        lanes left;
        pmli_take_lanes(w, l, narrow, &left);
        sum[0] += left * *(const lanes *)(x + l);
    }
    if (l < k) {
        lanes left = {0}, right = {0};
        for (int i = 0; i < k - l; i++) {
            left[i] = pmli_take_one(w, l + i, narrow);
            right[i] = x[l + i];
        }
        sum[0] += left * right;
    }
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += sum[0][i];
    return total;
}

PMLI_INLINE void rows(const pml_view *w, const float *x, float alpha, bool add, float *y,
                      const bool narrow)
{
    for (int64_t i = 0; i < w->rows; i++) {
        const char *row = (const char *)w->data + i * w->ld * (narrow ? 2 : 4);
        float sum = alpha * dot(row, x, w->cols, narrow);
        y[i] = add ? y[i] + sum : sum;
    }
}

PMLI_CLONES void pmli_gemv(pml_view w, const float *x, float alpha, bool add, float *y)
{
    if (w.dtype == PML_BF16)
        rows(&w, x, alpha, add, y, true);
    else
        rows(&w, x, alpha, add, y, false);
}

#pragma GCC diagnostic pop
