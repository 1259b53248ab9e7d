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

#endif
