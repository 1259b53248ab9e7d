/* What other backends share of NF4: its two tables, and the checks of its operands. */
#ifndef PMLI_CPU_NF4_H
#define PMLI_CPU_NF4_H

#include "cpu/check.h"
#include "pml_op/ops.h"

enum { PMLI_NF4_MAP = 256 };

/* Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E). */
extern const float pmli_nf4_values[16];

/* What 8-bit codes mean, ascending from -1 (exclusive) or 0 to 1: of nf4's magnitudes (signed) and
 * of 8-bit moments. Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2016. */
void pmli_dynamic_map(bool is_signed, float map[PMLI_NF4_MAP]);

/* A quantisation's operands but for x's dtype and the workspace, which are the backend's to check.
 */
void pmli_nf4_check_stored(pmli_check *c, const pml_nf4_quantise_args *a);

/* The parts of a dequantisation add up to y and to the codes; y itself is the backend's to check.
 */
void pmli_nf4_check_parts(pmli_check *c, const pml_nf4_dequantise_args *a);

#endif
