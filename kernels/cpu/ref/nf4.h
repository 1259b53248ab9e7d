/* The two tables of NF4, for other backends. */
#ifndef PMLI_CPU_NF4_H
#define PMLI_CPU_NF4_H

enum { PMLI_NF4_MAP = 256 };

/* Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E). */
extern const float pmli_nf4_values[16];

/* What the 8-bit codes of magnitudes mean. */
void pmli_nf4_map(float map[PMLI_NF4_MAP]);

#endif
