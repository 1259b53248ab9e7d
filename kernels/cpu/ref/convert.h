/* Conversion between element types. */
#ifndef PMLI_CPU_CONVERT_H
#define PMLI_CPU_CONVERT_H

#include "pml/base/view.h"

#include <stdbool.h>

/* Any dtype to itself; F32, BF16 and F16 to one another. */
bool pmli_can_convert(pml_dtype from, pml_dtype to);

/* n elements, round to nearest even; a pair that pmli_can_convert allows. */
void pmli_convert(const void *from, pml_dtype from_dtype, void *to, pml_dtype to_dtype, int64_t n);

#endif
