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
