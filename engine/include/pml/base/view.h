/* View: where a matrix lies in memory. The one way tensors are handed to ops.
 *
 *   data ──►  r0: [ c0 c1 … c(cols-1) | border … ]      ld elements from row to row
 *             r1: [ c0 c1 … c(cols-1) | border … ]
 *
 * Row-major, at most two dimensions: language-model work is [tokens, features] or
 * [outputs, inputs]; a vector is one row (rows = 1). ld >= cols; what lies between cols and ld
 * belongs to somebody else (a neighbouring slice of a fused buffer, or a LoRA border).
 * A view owns nothing. data may be a device address: only the backend it came from reads it.
 * data == NULL means "operand not given". */
#ifndef PML_BASE_VIEW_H
#define PML_BASE_VIEW_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pml_dtype {
    PML_F32 = 0,
    PML_BF16,
    PML_F16,
    PML_F64,
    PML_I32,
    PML_I64,
    PML_U8,
    PML_DTYPE_COUNT
} pml_dtype;

typedef struct pml_view {
    void *data;
    int64_t rows;
    int64_t cols;
    int64_t ld; /* elements between the starts of two rows */
    pml_dtype dtype;
} pml_view;

/* Bytes of one element; 0 for an unknown dtype. */
size_t pml_dtype_size(pml_dtype dtype);

/* The name safetensors uses: "F32", "BF16", …; "?" for an unknown dtype. */
const char *pml_dtype_name(pml_dtype dtype);

/* Inverse of pml_dtype_name; PML_DTYPE_COUNT when the name is not one of ours. */
pml_dtype pml_dtype_from_name(const char *name);

/* A view without a border (ld = cols). */
static inline pml_view pml_matrix(void *data, int64_t rows, int64_t cols, pml_dtype dtype)
{
    pml_view v = {data, rows, cols, cols, dtype};
    return v;
}

static inline pml_view pml_vector(void *data, int64_t n, pml_dtype dtype)
{
    return pml_matrix(data, 1, n, dtype);
}

/* The columns [first, first + cols) of v: same rows, same ld. */
pml_view pml_view_columns(pml_view v, int64_t first, int64_t cols);

#ifdef __cplusplus
}
#endif
#endif
