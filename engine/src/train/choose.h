/* Choosing the next token from logits, as transformers' generate does with the same settings:
 *
 *   logits ─► repetition penalty ─► ÷ temperature ─► top-k ─► top-p ─► draw
 *
 * What is left out has the logit -infinity. Fan et al., "Hierarchical neural story generation",
 * 2018 (top-k); Holtzman et al., "The curious case of neural text degeneration", 2020 (top-p);
 * Keskar et al., "CTRL", 2019 (repetition penalty). */
#ifndef PML_TRAIN_CHOOSE_H
#define PML_TRAIN_CHOOSE_H

#include "pml/train/stepper.h"

/* Numbers of scratch that the functions below want. */
size_t pmli_choose_scratch(int32_t vocab);

/* Everything but the draw, in place. said: the n tokens of prompt and answer so far. */
void pmli_process_logits(float *logits, int32_t vocab, const int32_t *said, int32_t n,
                         const pml_generate_options *options, int32_t *scratch);

/* The next token, at position n: the likeliest, or drawn with a number that depends on seed and
 * position only. logits are changed. */
int32_t pmli_choose(float *logits, int32_t vocab, const int32_t *said, int32_t n,
                    const pml_generate_options *options, int32_t *scratch);

/* The likeliest of n tokens; the lowest id wins a tie. */
int32_t pmli_greatest(const float *logits, int32_t n);
/* The same of numbers in 16 bits, as they are; *finite: all of them are. */
int32_t pmli_greatest_narrow(const uint16_t *logits, int32_t n, pml_dtype dtype, bool *finite);

/* Whether the likeliest is asked for and nothing changes the logits before. */
bool pmli_is_greedy(const pml_generate_options *options);

#endif
