/* What codes of few bits mean: to every backend, and to the reader of quantised folders. NF4 is of
 * Dettmers et al., QLoRA, 2023; the 8-bit map of Dettmers, 8-Bit Approximations for Parallelism in
 * Deep Learning, 2016. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pml_op/ops.h"

/* Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E). */
const float pml_nf4_values[PML_NF4_VALUES] = {-1.0F,
                                              -0.6961928009986877F,
                                              -0.5250730514526367F,
                                              -0.39491748809814453F,
                                              -0.28444138169288635F,
                                              -0.18477343022823334F,
                                              -0.09105003625154495F,
                                              0.0F,
                                              0.07958029955625534F,
                                              0.16093020141124725F,
                                              0.24611230194568634F,
                                              0.33791524171829224F,
                                              0.44070982933044434F,
                                              0.5626170039176941F,
                                              0.7229568362236023F,
                                              1.0F};

enum { DECADES = 7 };

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Decade i has 2^i means of neighbours on a line from 0.1 to 1, of either sign, or twice as many of
 * one; and there are 0 and 1. The line is as torch.linspace makes it: from both ends, one rounding
 * a point. */
void pml_dynamic_map(bool is_signed, float map[PML_DYNAMIC_CODES])
{
    static const float decades[DECADES] = {1e-6F, 1e-5F, 1e-4F, 1e-3F, 1e-2F, 1e-1F, 1.0F};
    int count = 0;
    for (int decade = 0; decade < DECADES; decade++) {
        int points = (is_signed ? 1 << decade : 2 << decade) + 1;
        float step = (1.0F - 0.1F) / (float)(points - 1), last = 0;
        for (int i = 0; i < points; i++) {
            float at = i < points / 2 ? fmaf(step, (float)i, 0.1F)
                                      : fmaf(-step, (float)(points - 1 - i), 1.0F);
            if (i > 0) {
                float value = decades[decade] * ((last + at) / 2.0F);
                map[count++] = value;
                if (is_signed)
                    map[count++] = -value;
            }
            last = at;
        }
    }
    map[count++] = 0;
    map[count++] = 1;
    qsort(map, PML_DYNAMIC_CODES, sizeof *map, ascending);
}

/* ---- E4M3 ---- */

enum { E4M3_FRACTION = 3, F32_FRACTION = 23, E4M3_BIAS = 7, F32_BIAS = 127, E4M3_NAN = 0x7f };

float pml_e4m3_value(uint8_t code)
{
    int exponent = code >> E4M3_FRACTION & 15, fraction = code & 7;
    float magnitude = exponent == 0
                          ? ldexpf((float)fraction, 1 - E4M3_BIAS - E4M3_FRACTION)
                          : ldexpf((float)(8 + fraction), exponent - E4M3_BIAS - E4M3_FRACTION);
    if ((code & E4M3_NAN) == E4M3_NAN)
        return NAN;
    return (code & 0x80) != 0 ? -magnitude : magnitude;
}

/* In whole numbers, since the bits must be those of every machine: a normal number's fraction is
 * cut behind its third bit, which carries into the exponent by itself; below 2^-6 steps are 2^-9.
 */
uint8_t pml_e4m3_code(float x)
{
    uint32_t bits, sign;
    if (x != x)
        return E4M3_NAN;
    memcpy(&bits, &x, sizeof bits);
    sign = bits >> 24 & 0x80;
    float magnitude = fabsf(x);
    if (magnitude >= PML_E4M3_MOST)
        return (uint8_t)(sign | (E4M3_NAN - 1));
    if (magnitude < 0x1p-6F)
        return (uint8_t)(sign | (uint32_t)nearbyintf(magnitude * 0x1p9F));
    const int cut = F32_FRACTION - E4M3_FRACTION;
    bits = (bits & 0x7fffffffU) + ((1U << (cut - 1)) - 1) + (bits >> cut & 1);
    return (uint8_t)(sign | ((bits >> cut) - ((F32_BIAS - E4M3_BIAS) << E4M3_FRACTION)));
}
