/* bfloat16 read as float32: its bits are the upper half, so the value is the same. For loops that
 * work in vectors of eight, compiled as vec.h has it. */
#ifndef PMLI_CPU_WIDEN_H
#define PMLI_CPU_WIDEN_H

#include <stdbool.h>

#include "ref/vec.h"

enum { PMLI_LANES = 8 };

typedef float pmli_lanes __attribute__((vector_size(PMLI_LANES * 4), aligned(4), may_alias));
typedef uint32_t pmli_words __attribute__((vector_size(PMLI_LANES * 4), aligned(4), may_alias));
typedef uint16_t pmli_halves __attribute__((vector_size(PMLI_LANES * 2), aligned(2), may_alias));

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi" /* the vectors never cross a call: all is inlined */

/* Elements [at, at + 8) of x, which is BF16 with `narrow` (a constant, where it is inlined), or
 * F32.
 */
PMLI_INLINE void pmli_take_lanes(const void *x, int64_t at, const bool narrow, pmli_lanes *out)
{
    if (narrow)
        *out = (pmli_lanes)(__builtin_convertvector(
                                *(const pmli_halves *)((const uint16_t *)x + at), pmli_words)
                            << 16);
    else
        *out = *(const pmli_lanes *)((const float *)x + at);
}

#pragma GCC diagnostic pop

/* The same of one element. */
PMLI_INLINE float pmli_take_one(const void *x, int64_t at, const bool narrow)
{
    if (!narrow)
        return ((const float *)x)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#endif
