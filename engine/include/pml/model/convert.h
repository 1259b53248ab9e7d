/* Conversion of stored elements to float32, exact for every dtype that is narrower, and back. */
#ifndef PML_MODEL_CONVERT_H
#define PML_MODEL_CONVERT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pml/base/error.h"
#include "pml/base/view.h"

/* bfloat16 is the upper half of a float32. */
static inline float pml_bf16_to_f32(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* IEEE binary16, subnormals, infinities and NaN included. */
float pml_f16_to_f32(uint16_t bits);

/* n elements of dtype F32, BF16, F16 or F64 (rounded to nearest) from `from`, which needs no
 * alignment, to float32. PML_UNSUPPORTED names any other dtype. No overlap. */
pml_status pml_convert_to_f32(const void *from, pml_dtype dtype, size_t n, float *to,
                              pml_error *err);

/* n floats to F32, BF16 or F16, to nearest even. PML_UNSUPPORTED names any other dtype. */
pml_status pml_convert_from_f32(const float *from, size_t n, void *to, pml_dtype dtype,
                                pml_error *err);

#endif
