/* Paths as text. */
#ifndef PML_BASE_PATH_H
#define PML_BASE_PATH_H

#include <stdbool.h>
#include <stddef.h>

#include "pml/base/error.h"

/* out = a "/" b, with one slash between them; b alone when a is "" or b is absolute.
 * PML_INVALID when it does not fit into capacity. out may not be a or b. */
pml_status pml_path_join(char *out, size_t capacity, const char *a, const char *b, pml_error *err);

/* The folder part ("." when there is none, "/" for the root), into out. */
pml_status pml_path_folder(char *out, size_t capacity, const char *path, pml_error *err);

/* The part after the last slash; points into path. */
const char *pml_path_name(const char *path);

/* Whether path is relative, not empty, and has no empty, "." or ".." component: so that joined to a
 * folder it stays below it. */
bool pml_path_is_below(const char *path);

#endif
