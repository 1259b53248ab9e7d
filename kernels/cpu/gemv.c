#include "gemv.h"

#include "simd/tile.h"
#include "widen.h"

/* Sums of a row that run side by side hide the latency of additions; what follows a row is fetched
 * ahead of time, because the processor's own prefetching loses its stride there. */
enum { LANES = PMLI_LANES, SUMS = 8, BLOCK = SUMS * LANES, LINE = 16, AHEAD = 4096 };

typedef pmli_lanes lanes;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi" /* the vectors never cross a call: all is inlined */

PMLI_INLINE void fetch_ahead(const void *w, int64_t at, const bool narrow)
{
    __builtin_prefetch((const char *)w + at * (narrow ? 2 : 4) + AHEAD, 0, 3);
}

/* What whole blocks of a row come to, and where they end. */
PMLI_INLINE int64_t blocks(const void *w, const float *x, int64_t k, const bool narrow, lanes *out)
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
                fetch_ahead(w, l + s * LANES, narrow);
            lanes left;
            pmli_take_lanes(w, l + s * LANES, narrow, &left);
            sum[s] += left * *(const lanes *)(x + l + s * LANES);
        }
    }
#pragma GCC unroll 8
    for (int s = 1; s < SUMS; s++)
        sum[0] += sum[s];
    *out = sum[0];
    return l;
}

#if defined(__x86_64__)
/* For AVX-512, two sums side by side in a register: half the instructions, which are what a row
 * waits for where one core reads 30 GB/s and more. Compilers use the whole width for vectors of
 * that size only, and for AVX2 they widen such a vector one number after the other. */
enum { WIDE = 2 * LANES };

typedef float wide __attribute__((vector_size(WIDE * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(WIDE * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(WIDE * 2), aligned(2), may_alias));

PMLI_INLINE void take_wide(const void *w, int64_t at, const bool narrow, wide *out)
{
    if (narrow)
        *out = (wide)(__builtin_convertvector(*(const halves *)((const uint16_t *)w + at), words)
                      << 16);
    else
        *out = *(const wide *)((const float *)w + at);
}

/* The same additions in the same order as in blocks. */
PMLI_INLINE int64_t wide_blocks(const void *w, const float *x, int64_t k, const bool narrow,
                                lanes *out)
{
    const int64_t line = narrow ? 2 * LINE : LINE;
    wide sum[SUMS / 2];
    int64_t l = 0;
#pragma GCC unroll 4
    for (int s = 0; s < SUMS / 2; s++)
        sum[s] = (wide){0};
    for (; l + BLOCK <= k; l += BLOCK) {
#pragma GCC unroll 4
        for (int s = 0; s < SUMS / 2; s++) {
            if (s * WIDE % line == 0)
                fetch_ahead(w, l + s * WIDE, narrow);
            wide left;
            take_wide(w, l + s * WIDE, narrow, &left);
            sum[s] += left * *(const wide *)(x + l + s * WIDE);
        }
    }
    *out = (lanes){0};
#pragma GCC unroll 4
    for (int s = 0; s < SUMS / 2; s++) {
        *out += __builtin_shufflevector(sum[s], sum[s], 0, 1, 2, 3, 4, 5, 6, 7);
        *out += __builtin_shufflevector(sum[s], sum[s], 8, 9, 10, 11, 12, 13, 14, 15);
    }
    return l;
}
#endif

typedef int64_t blocks_fn(const void *w, const float *x, int64_t k, const bool narrow, lanes *out);

PMLI_INLINE float dot(const void *w, const float *x, int64_t k, const bool narrow,
                      blocks_fn *const whole)
{
    lanes sum;
    int64_t l = whole(w, x, k, narrow, &sum);
    /* The rest in vectors too: one by one, compilers fuse a multiplication with its addition in one
     * of the two forms and not in the other. */
    for (; l + LANES <= k; l += LANES) {
        lanes left;
        pmli_take_lanes(w, l, narrow, &left);
        sum += left * *(const lanes *)(x + l);
    }
    if (l < k) {
        lanes left = {0}, right = {0};
        for (int i = 0; i < k - l; i++) {
            left[i] = pmli_take_one(w, l + i, narrow);
            right[i] = x[l + i];
        }
        sum += left * right;
    }
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += sum[i];
    return total;
}

PMLI_INLINE void rows(const pml_view *w, const float *x, float alpha, bool add, float *y,
                      const bool narrow, blocks_fn *const whole)
{
    for (int64_t i = 0; i < w->rows; i++) {
        const char *row = (const char *)w->data + i * w->ld * (narrow ? 2 : 4);
        float sum = alpha * dot(row, x, w->cols, narrow, whole);
        y[i] = add ? y[i] + sum : sum;
    }
}

PMLI_CLONES static void any_rows(const pml_view *w, const float *x, float alpha, bool add, float *y)
{
    if (w->dtype == PML_BF16)
        rows(w, x, alpha, add, y, true, blocks);
    else
        rows(w, x, alpha, add, y, false, blocks);
}

#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v4"))) static void wide_rows(const pml_view *w, const float *x,
                                                                float alpha, bool add, float *y)
{
    if (w->dtype == PML_BF16)
        rows(w, x, alpha, add, y, true, wide_blocks);
    else
        rows(w, x, alpha, add, y, false, wide_blocks);
}
#endif

void pmli_gemv(pml_view w, const float *x, float alpha, bool add, float *y)
{
#if defined(__x86_64__)
    if (pmli_has_avx512()) {
        wide_rows(&w, x, alpha, add, y);
        return;
    }
#endif
    any_rows(&w, x, alpha, add, y);
}

#pragma GCC diagnostic pop
