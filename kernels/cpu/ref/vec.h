/* What the loops of the CPU ops share: how they are compiled, and exp.
 *
 * PMLI_CLONES puts a function into the object three times, for AVX-512, AVX2 and any x86-64, and
 * the loader picks one. The loops are plain C; `#pragma omp simd` tells the compiler what it may
 * not find out (views do not overlap except element on element; a sum may be made in lanes). Which
 * clone runs decides bits, and pml_backend.info says which it is. */
#ifndef PMLI_CPU_VEC_H
#define PMLI_CPU_VEC_H

#include <stdint.h>
#include <string.h>

/* Sanitizers instrument the resolver functions that clones need, which then run before the
 * sanitizer has started: PML_NO_CLONES is defined for such builds. */
#if defined(__x86_64__) && !defined(PML_NO_CLONES)
#define PMLI_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PMLI_CLONES
#endif

/* For helpers of cloned functions: only what is inlined is compiled for the clone's target. */
#define PMLI_INLINE static inline __attribute__((always_inline))

/* e^x within 1.2 ulp for -87.3 <= x <= 88.3; 0 below, infinity above, NaN for NaN.
 * x = n ln2 + r with |r| <= ln2/2; e^r by its series to r^7, whose rest is below a tenth of an ulp;
 * ln2 in two parts, the first with so few bits that n * part is exact (Cody and Waite, 1980). */
PMLI_INLINE float pmli_exp(float x)
{
    const float log2e = 1.44269504F, ln2_high = 0x1.62e4p-1F, ln2_low = 0x1.7f7d1cp-20F;
    const float magic = 0x1.8p23F; /* adding it rounds to an integer in the low mantissa bits */
    float bound = x < -88.0F ? -88.0F : x; /* comparisons that leave a NaN alone */
    bound = bound > 89.0F ? 89.0F : bound;
    float shifted = bound * log2e + magic;
    float n = shifted - magic;
    float r = bound - n * ln2_high;
    r = r - n * ln2_low;
    float p = 1.0F / 5040;
    p = p * r + 1.0F / 720;
    p = p * r + 1.0F / 120;
    p = p * r + 1.0F / 24;
    p = p * r + 1.0F / 6;
    p = p * r + 0.5F;
    p = p * r + 1.0F;
    p = p * r + 1.0F;
    uint32_t field;
    memcpy(&field, &shifted, sizeof field);
    field = (field + 127) << 23; /* 2^n from its exponent field; n = -127 gives 0, 128 infinity */
    float power;
    memcpy(&power, &field, sizeof power);
    return x < -87.3F ? 0.0F : p * power;
}

PMLI_INLINE float pmli_sigmoid(float x)
{
    return 1.0F / (1.0F + pmli_exp(-x));
}

static inline int64_t pmli_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t pmli_div_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Rows of `cols` elements that make a piece of elementwise work: some 64 KiB, so that taking a
 * piece costs nothing beside doing it. */
static inline int64_t pmli_piece_rows(int64_t cols)
{
    return cols >= 16384 ? 1 : 16384 / (cols > 0 ? cols : 1);
}

#endif
