/* Sum: the checksum that a JSON object carries as its last field.
 *
 *   {"seq":7,"type":"step",…,"sum":"0f1e2d3c4b5a6978"}
 *   └──────── what is summed ──┘
 *
 * The 16 hex digits are the first eight bytes of BLAKE2b-256 of everything before the comma. It
 * tells damage (a flipped bit, a lost page), not forgery. The text stays plain JSON: who does not
 * know of sums reads one field more. */
#ifndef PML_JSON_SUM_H
#define PML_JSON_SUM_H

#include <stddef.h>

#include "pml/base/error.h"

enum { PML_SUM_BYTES = 25 }; /* that a sum adds to a text */

/* text: one compact JSON object with at least one field, malloc'ed, NUL-terminated; it is
 * reallocated and *size grows by PML_SUM_BYTES. After a failure both are as they were. */
pml_status pml_sum_add(char **text, size_t *size, pml_error *err);

/* White space after the object is no damage. PML_NOT_FOUND: it carries no sum; PML_CORRUPT: it is
 * not what was written. */
pml_status pml_sum_check(const char *text, size_t size, pml_error *err);

#endif
