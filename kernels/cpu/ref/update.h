/* What the optimizers' updates share. */
#ifndef PMLI_CPU_UPDATE_H
#define PMLI_CPU_UPDATE_H

#include "cpu/check.h"

/* An update's copy is absent, or as long as p and of a dtype that float32 can be rounded to. */
void pmli_check_copy(pmli_check *c, const pml_view *p, const pml_view *copy);

/* Whether clip_scale found that nothing is to be updated. */
bool pmli_is_skipped(const pml_view *hyper);

#endif
