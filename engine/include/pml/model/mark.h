/* The mark of a model folder: by which a run knows again what it was trained over. */
#ifndef PML_MODEL_MARK_H
#define PML_MODEL_MARK_H

#include "pml/base/error.h"

enum { PML_MARK_BYTES = 16, PML_MARK_HEX = 2 * PML_MARK_BYTES + 1 };

/* A hash over config.json, and over name, dtype, shape and first 4 KiB of each tensor, as hex
 * digits with a NUL. It stays where the folder is copied, fetched again or divided into other
 * shards, and is read in milliseconds; a change that leaves the beginning of every tensor alone is
 * not seen.
 *
 * Errors as pml_safetensors_open_folder and pml_stored_read. */
pml_status pml_model_mark(const char *folder, char mark[PML_MARK_HEX], pml_error *err);

#endif
