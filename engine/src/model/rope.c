/* Angles of the rotary embedding, in float32 step by step as transformers computes them, so that
 * the table agrees with its cos and sin to the last bit or the one before. */
#include <math.h>

#include "pml/model/spec.h"

/* Llama 3.1's change of the slow frequencies (transformers' rope_type "llama3"): wavelengths
 * longer than original/low are stretched by factor, those shorter than original/high stay, and
 * between them the two are blended linearly. */
static float llama3(const pml_rope_spec *rope, float frequency)
{
    float original = (float)rope->original_max_positions;
    float low = (float)rope->low_freq_factor, high = (float)rope->high_freq_factor;
    float factor = (float)rope->factor;
    float wavelength = (float)(2 * M_PI) / frequency;
    if (wavelength > original / low)
        return frequency / factor;
    if (wavelength < original / high)
        return frequency;
    float smooth = (original / wavelength - low) / (high - low);
    return (1 - smooth) * frequency / factor + smooth * frequency;
}

void pml_rope_table(const pml_model_spec *spec, int32_t positions, float *out)
{
    int32_t half = spec->head_dim / 2;
    for (int32_t i = 0; i < half; i++) {
        float exponent = (float)(2 * i) / (float)spec->head_dim;
        float frequency = 1.0F / powf((float)spec->rope.theta, exponent);
        if (spec->rope.type == PML_ROPE_LLAMA3)
            frequency = llama3(&spec->rope, frequency);
        for (int32_t p = 0; p < positions; p++) {
            float angle = (float)p * frequency;
            float *row = out + (int64_t)p * spec->head_dim;
            row[i] = cosf(angle);
            row[half + i] = sinf(angle);
        }
    }
}
