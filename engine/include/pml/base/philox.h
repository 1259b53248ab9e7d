/* Philox 4x32-10: random numbers as a pure function of (key, counter), so that nothing depends on
 * timing or on who asks first. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011. */
#ifndef PML_BASE_PHILOX_H
#define PML_BASE_PHILOX_H

#include <stdint.h>

/* What a stream of numbers is for: part of the counter, so that streams never meet. */
typedef enum pml_purpose {
    PML_PURPOSE_SHUFFLE = 1,
    PML_PURPOSE_LORA_INIT,
    PML_PURPOSE_SAMPLE,
    PML_PURPOSE_DROPOUT = 1 << 16 /* + layer * 8 + linear */
} pml_purpose;

typedef struct pml_philox {
    uint32_t word[4];
} pml_philox;

/* Four 32-bit words for (seed, step, purpose, index): key = seed; counter = index's 64 bits,
 * the low 32 bits of step, purpose. */
pml_philox pml_philox_at(uint64_t seed, uint64_t step, uint32_t purpose, uint64_t index);

/* Uniform in [0, 1): the top 24 bits of a word, exact in float. */
static inline float pml_uniform(uint32_t word)
{
    return (float)(word >> 8) * 0x1p-24F;
}

/* Dropout takes 16 bits of such words for an element, low half before high: eight elements have a
 * call's four words. An element is kept where its number is no less than this, for a dropout in
 * [0, 1); one above 0 drops at least 2^-16 of all and keeps as many. */
static inline uint32_t pml_dropout_least(float dropout)
{
    float least = dropout * 65536.0F + 0.5F;
    if (dropout <= 0)
        return 0;
    return least < 1 ? 1 : least > 65535 ? 65535 : (uint32_t)least;
}

/* What a kept element is multiplied by, so that the sum of many is what it was. */
static inline float pml_dropout_keep(uint32_t least)
{
    return 65536.0F / (float)(65536 - least);
}

#endif
