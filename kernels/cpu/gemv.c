#include "gemv.h"

#include "ref/vec.h"

/* Sums of a row that run side by side hide the latency of additions; what follows a row is fetched
 * ahead of time, because the processor's own prefetching loses its stride there. */
enum { LANES = 8, SUMS = 8, BLOCK = SUMS * LANES, LINE = 16, AHEAD = 1024 };

typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi" /* the vectors never cross a call: all is inlined */

PMLI_INLINE float dot(const float *w, const float *x, int64_t k)
{
    lanes sum[SUMS];
    int64_t l = 0;
#pragma GCC unroll 8
    for (int s = 0; s < SUMS; s++)
        sum[s] = (lanes){0};
    for (; l + BLOCK <= k; l += BLOCK) {
#pragma GCC unroll 8
        for (int s = 0; s < SUMS; s++) {
            if (s % (LINE / LANES) == 0)
                __builtin_prefetch(w + l + AHEAD + s * LANES, 0, 3);
            sum[s] += *(const lanes *)(w + l + s * LANES) * *(const lanes *)(x + l + s * LANES);
        }
    }
#pragma GCC unroll 8
    for (int s = 1; s < SUMS; s++)
        sum[0] += sum[s];
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += sum[0][i];
    for (; l < k; l++)
        total += w[l] * x[l];
    return total;
}

PMLI_CLONES void pmli_gemv(const float *w, int64_t ld, int64_t n, int64_t k, const float *x,
                           float alpha, bool add, float *y)
{
    for (int64_t i = 0; i < n; i++) {
        float sum = alpha * dot(w + i * ld, x, k);
        y[i] = add ? y[i] + sum : sum;
    }
}

#pragma GCC diagnostic pop
