#include "pack.h"

#include "widen.h"

enum { LANES = PMLI_LANES, STRIPE = 16 };

typedef pmli_lanes lanes;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi" /* the vectors never cross a call: all is inlined */

PMLI_INLINE void straight(const pml_view *b, float alpha, int64_t width, float *panel,
                          const bool narrow)
{
    for (int64_t l = 0; l < b->rows; l++)
        for (int64_t j = 0; j < b->cols; j += LANES) {
            lanes right;
            pmli_take_lanes(b->data, l * b->ld + j, narrow, &right);
            *(lanes *)(panel + l * width + j) = alpha * right;
        }
}

PMLI_CLONES void pmli_pack_straight(pml_view b, float alpha, int64_t width, float *panel)
{
    if (b.dtype == PML_BF16)
        straight(&b, alpha, width, panel, true);
    else
        straight(&b, alpha, width, panel, false);
}

/* Eight rows of eight: neighbours change places in pairs, then pairs, then halves. */
PMLI_INLINE void transpose(lanes r[LANES])
{
    lanes s[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 2) {
        s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < LANES; i += 4) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            lanes a = s[i + h], b = s[i + 2 + h];
            r[i + 2 * h] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            r[i + 2 * h + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 2; i++) {
        lanes a = r[i], b = r[i + 4];
        r[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Sixteen rows side by side, so that what is written are whole lines, and as many streams are read
 * as a processor fetches ahead of. */
PMLI_INLINE void across(const pml_view *b, float alpha, int64_t width, float *panel,
                        const bool narrow)
{
    const int64_t n = b->rows, k = b->cols, ld = b->ld;
    for (int64_t j = 0; j < n; j += STRIPE) {
        int64_t l = 0;
        for (; l + LANES <= k; l += LANES) {
#pragma GCC unroll 2
            for (int64_t half = j; half < j + STRIPE; half += LANES) {
                lanes r[LANES];
#pragma GCC unroll 8
                for (int i = 0; i < LANES; i++)
                    pmli_take_lanes(b->data, (half + i) * ld + l, narrow, &r[i]);
                transpose(r);
#pragma GCC unroll 8
                for (int i = 0; i < LANES; i++)
                    *(lanes *)(panel + (l + i) * width + half) = alpha * r[i];
            }
        }
        for (; l < k; l++)
            for (int64_t i = j; i < j + STRIPE; i++)
                panel[l * width + i] = alpha * pmli_take_one(b->data, i * ld + l, narrow);
    }
}

PMLI_CLONES void pmli_pack_across(pml_view b, float alpha, int64_t width, float *panel)
{
    if (b.dtype == PML_BF16)
        across(&b, alpha, width, panel, true);
    else
        across(&b, alpha, width, panel, false);
}

#pragma GCC diagnostic pop
