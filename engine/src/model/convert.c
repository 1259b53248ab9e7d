#include "pml/model/convert.h"

float pml_f16_to_f32(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000U) << 16;
    uint32_t exponent = (bits >> 10) & 31U, fraction = bits & 1023U;
    uint32_t wide;
    if (exponent == 31) { /* infinity, NaN: the payload stays at the top */
        wide = sign | 0x7F800000U | fraction << 13;
    } else if (exponent != 0) {
        wide = sign | (exponent + 127 - 15) << 23 | fraction << 13;
    } else { /* zero and subnormals: fraction * 2^-24, exact in float32 */
        float magnitude = (float)fraction * 0x1p-24F;
        return sign != 0 ? -magnitude : magnitude;
    }
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static void widen_bf16(const unsigned char *from, size_t n, float *to)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, sizeof bits);
        to[i] = pml_bf16_to_f32(bits);
    }
}

static void widen_f16(const unsigned char *from, size_t n, float *to)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, sizeof bits);
        to[i] = pml_f16_to_f32(bits);
    }
}

static void round_f64(const unsigned char *from, size_t n, float *to)
{
    for (size_t i = 0; i < n; i++) {
        double value;
        memcpy(&value, from + 8 * i, sizeof value);
        to[i] = (float)value;
    }
}

pml_status pml_convert_to_f32(const void *from, pml_dtype dtype, size_t n, float *to,
                              pml_error *err)
{
    if (n == 0)
        return PML_OK;
    switch (dtype) {
    case PML_F32:
        memcpy(to, from, n * sizeof *to);
        return PML_OK;
    case PML_BF16:
        widen_bf16(from, n, to);
        return PML_OK;
    case PML_F16:
        widen_f16(from, n, to);
        return PML_OK;
    case PML_F64:
        round_f64(from, n, to);
        return PML_OK;
    default:
        return PML_FAIL(err, PML_UNSUPPORTED, "dtype %s cannot be read as weights",
                        pml_dtype_name(dtype));
    }
}

/* Adding just under half a unit of what remains rounds to nearest, one more when that is odd. */
static uint16_t bf16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U) /* a NaN must not round up to infinity */
        return (uint16_t)(bits >> 16 | 0x40U);
    return (uint16_t)((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

static uint16_t f16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000U, size = bits & 0x7FFFFFFFU;
    if (size >= 0x47800000U) /* 65536 and beyond, infinity, NaN */
        return (uint16_t)(sign | (size > 0x7F800000U ? 0x7E00U : 0x7C00U));
    if (size < 0x38800000U) { /* below 2^-14: adding 0.5 rounds to units of 2^-24 */
        float shifted;
        memcpy(&shifted, &size, sizeof shifted);
        shifted += 0.5F;
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3F000000U));
    }
    return (uint16_t)(sign | ((size + 0xFFFU + (size >> 13 & 1U) - 0x38000000U) >> 13));
}

pml_status pml_convert_from_f32(const float *from, size_t n, void *to, pml_dtype dtype,
                                pml_error *err)
{
    uint16_t *half = to;
    switch (dtype) {
    case PML_F32:
        memcpy(to, from, n * sizeof *from);
        return PML_OK;
    case PML_BF16:
        for (size_t i = 0; i < n; i++)
            half[i] = bf16_of(from[i]);
        return PML_OK;
    case PML_F16:
        for (size_t i = 0; i < n; i++)
            half[i] = f16_of(from[i]);
        return PML_OK;
    default:
        return PML_FAIL(err, PML_UNSUPPORTED, "weights cannot be held in dtype %s",
                        pml_dtype_name(dtype));
    }
}
