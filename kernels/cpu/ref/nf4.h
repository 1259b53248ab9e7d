/* What other backends share of NF4: the checks of its operands. */
#ifndef PMLI_CPU_NF4_H
#define PMLI_CPU_NF4_H

#include "cpu/check.h"
#include "pml_op/ops.h"

/* A quantisation's operands but for x's dtype and the workspace, which are the backend's to check.
 */
void pmli_nf4_check_stored(pmli_check *c, const pml_nf4_quantise_args *a);

/* The parts of a dequantisation add up to y and to the codes; y itself is the backend's to check.
 */
void pmli_nf4_check_parts(pmli_check *c, const pml_nf4_dequantise_args *a);

#endif
