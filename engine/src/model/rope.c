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

/* NTK-aware stretching: the base grows with the length beyond what the model was trained for. */
static float dynamic_theta(const pml_model_spec *spec, int32_t length)
{
    if (length <= spec->max_positions)
        return (float)spec->rope.theta;
    float factor = (float)spec->rope.factor;
    float stretch = factor * (float)length / (float)spec->max_positions - (factor - 1);
    double exponent = (double)spec->head_dim / (spec->head_dim - 2); /* not rounded by torch */
    return (float)spec->rope.theta * (float)pow(stretch, exponent);
}

/* The dimension that makes so many turns over the original length. */
static double turning_dim(const pml_model_spec *spec, double turns)
{
    double length = spec->rope.original_max_positions;
    return spec->head_dim * log(length / (turns * 2 * M_PI)) / (2 * log(spec->rope.theta));
}

/* YaRN: fast dimensions keep their frequency, slow ones are stretched by factor, with a linear
 * ramp from dimension *low to *high between them. Peng et al., 2023, section 3.2. */
static void yarn_ramp(const pml_model_spec *spec, double *low, double *high)
{
    *low = turning_dim(spec, spec->rope.beta_fast);
    *high = turning_dim(spec, spec->rope.beta_slow);
    if (spec->rope.truncate) {
        *low = floor(*low);
        *high = ceil(*high);
    }
    *low = fmax(*low, 0);
    *high = fmin(*high, spec->head_dim - 1);
    if (*low == *high)
        *high += 0.001; /* no division by zero */
}

static float yarn(const pml_model_spec *spec, double low, double high, int32_t i, float power)
{
    float ramp = ((float)i - (float)low) / (float)(high - low);
    float keep = 1.0F - fminf(fmaxf(ramp, 0), 1);
    float slow = 1.0F / ((float)spec->rope.factor * power), fast = 1.0F / power;
    return slow * (1.0F - keep) + fast * keep;
}

void pml_rope_frequencies(const pml_model_spec *spec, int32_t length, float *out)
{
    const pml_rope_spec *rope = &spec->rope;
    float theta = rope->type == PML_ROPE_DYNAMIC ? dynamic_theta(spec, length) : (float)rope->theta;
    double low = 0, high = 0;
    if (rope->type == PML_ROPE_YARN)
        yarn_ramp(spec, &low, &high);
    for (int32_t i = 0; i < spec->head_dim / 2; i++) {
        float power = powf(theta, (float)(2 * i) / (float)spec->head_dim);
        float frequency = 1.0F / power;
        if (rope->type == PML_ROPE_LINEAR)
            frequency /= (float)rope->factor;
        else if (rope->type == PML_ROPE_LLAMA3)
            frequency = llama3(rope, frequency);
        else if (rope->type == PML_ROPE_YARN)
            frequency = yarn(spec, low, high, i, power);
        out[i] = frequency;
    }
}

/* The frequencies stand in the first row, each until its own column is written. */
void pml_rope_table(const pml_model_spec *spec, int32_t positions, int32_t length, float *out)
{
    const pml_rope_spec *rope = &spec->rope;
    int32_t half = spec->head_dim / 2;
    float scale = rope->type == PML_ROPE_YARN ? (float)rope->attention_factor : 1.0F;
    if (positions < 1)
        return;
    pml_rope_frequencies(spec, length, out);
    for (int32_t i = 0; i < half; i++) {
        float frequency = out[i];
        for (int32_t p = 0; p < positions; p++) {
            float angle = (float)p * frequency;
            float *row = out + (int64_t)p * spec->head_dim;
            row[i] = cosf(angle) * scale;
            row[half + i] = sinf(angle) * scale;
        }
    }
}
