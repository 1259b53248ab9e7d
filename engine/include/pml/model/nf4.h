/* Weights that bitsandbytes has quantised to NF4, as they lie in a model folder:
 *
 *   X.weight                                 U8 [ceil(n/2), 1]   codes
 *   X.weight.absmax                          U8 [blocks]         of 64 elements
 *   X.weight.nested_absmax                   F32 [groups]        of 256 blocks
 *   X.weight.quant_map, .nested_quant_map    F32                 the two maps, the same in every
 * file X.weight.quant_state.bitsandbytes__nf4   U8                  JSON: shape, block sizes,
 * offset */
#ifndef PML_MODEL_NF4_H
#define PML_MODEL_NF4_H

#include <stdbool.h>

#include "pml/model/safetensors.h"

typedef struct pml_nf4_stored {
    const pml_stored *codes, *absmax, *nested;
    float offset;
} pml_nf4_stored;

/* Whether the folder holds this weight quantised. */
bool pml_nf4_is_stored(const pml_safetensors *file, const char *weight);

/* Whether a folder of such weights must hold this one so: the layers' projections. */
bool pml_nf4_is_expected(const char *weight);

/* Find the parts of such a weight of shape [rows, cols]. PML_UNSUPPORTED names what differs from
 * NF4 with double quantisation in blocks of 64 and 256, a weight that was left whole too;
 * PML_CORRUPT what does not fit together. */
pml_status pml_nf4_find(const pml_safetensors *file, const char *weight, int64_t rows, int64_t cols,
                        pml_nf4_stored *found, pml_error *err);

/* Shape and type that such a weight had before it was quantised, as its quant_state says. */
pml_status pml_nf4_original(const pml_safetensors *file, const char *weight, int64_t *rows,
                            int64_t *cols, pml_dtype *dtype, pml_error *err);

/* Whether `name` is one of the tensors beside the codes of a quantised weight. */
bool pml_nf4_is_part(const pml_safetensors *file, const char *name);

#endif
