#include "convert.h"

#include <string.h>

#include "vec.h"

static bool is_float(pml_dtype dtype)
{
    return dtype == PML_F32 || dtype == PML_BF16 || dtype == PML_F16;
}

bool pmli_can_convert(pml_dtype from, pml_dtype to)
{
    return (from == to && pml_dtype_size(from) != 0) || (is_float(from) && is_float(to));
}

PMLI_INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

PMLI_INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* BF16 is the upper half of F32: add just under half a unit, and one more when the unit is odd. */
PMLI_INLINE uint16_t bf16_of(float x)
{
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fffU + (bits >> 16 & 1)) >> 16;
    uint32_t quiet = bits >> 16 | 0x40U; /* a NaN must not round up to infinity */
    return (uint16_t)((bits & 0x7fffffffU) > 0x7f800000U ? quiet : rounded);
}

/* F16: 5 exponent bits with bias 15, 10 mantissa bits. */
PMLI_INLINE uint16_t f16_of(float x)
{
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000U, size = bits & 0x7fffffffU;
    if (size >= 0x47800000U) /* 65536 and beyond, infinity, NaN */
        return (uint16_t)(sign | (size > 0x7f800000U ? 0x7e00U : 0x7c00U));
    if (size < 0x38800000U) /* below 2^-14: adding 0.5 rounds to units of 2^-24 in the low bits */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5F) - 0x3f000000U));
    uint32_t rounded = size + 0xfffU + (size >> 13 & 1); /* may carry into the exponent, rightly */
    return (uint16_t)(sign | ((rounded - 0x38000000U) >> 13));
}

PMLI_INLINE float f16_value(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000U) << 16, size = half & 0x7fffU;
    if (size >= 0x7c00U)
        return float_of(sign | 0x7f800000U | (size & 0x3ffU) << 13);
    /* Shifted into place the exponent is 112 too small; the product also normalises subnormals. */
    return float_of(sign | bits_of(float_of(size << 13) * 0x1p112F));
}

PMLI_INLINE float read_one(const void *from, pml_dtype dtype, int64_t i)
{
    switch (dtype) {
    case PML_BF16:
        return float_of((uint32_t)((const uint16_t *)from)[i] << 16);
    case PML_F16:
        return f16_value(((const uint16_t *)from)[i]);
    default:
        return ((const float *)from)[i];
    }
}

PMLI_CLONES void pmli_convert(const void *from, pml_dtype from_dtype, void *to, pml_dtype to_dtype,
                              int64_t n)
{
    if (from_dtype == to_dtype) {
        memcpy(to, from, (size_t)n * pml_dtype_size(to_dtype));
        return;
    }
    if (to_dtype == PML_F32) {
        float *out = to;
        if (from_dtype == PML_BF16)
            for (int64_t i = 0; i < n; i++)
                out[i] = read_one(from, PML_BF16, i);
        else
            for (int64_t i = 0; i < n; i++)
                out[i] = read_one(from, PML_F16, i);
        return;
    }
    uint16_t *out = to;
    if (to_dtype == PML_BF16)
        for (int64_t i = 0; i < n; i++)
            out[i] = bf16_of(read_one(from, from_dtype, i));
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = f16_of(read_one(from, from_dtype, i));
}
