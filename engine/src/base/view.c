#include "pml/base/view.h"

#include <string.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[PML_DTYPE_COUNT] = {
    [PML_F32] = {"F32", 4}, [PML_BF16] = {"BF16", 2}, [PML_F16] = {"F16", 2},
    [PML_F64] = {"F64", 8}, [PML_I32] = {"I32", 4},   [PML_I64] = {"I64", 8},
    [PML_U8] = {"U8", 1},
};

size_t pml_dtype_size(pml_dtype dtype)
{
    return (unsigned)dtype < PML_DTYPE_COUNT ? dtypes[dtype].size : 0;
}

const char *pml_dtype_name(pml_dtype dtype)
{
    return (unsigned)dtype < PML_DTYPE_COUNT ? dtypes[dtype].name : "?";
}

pml_dtype pml_dtype_from_name(const char *name)
{
    for (int i = 0; i < PML_DTYPE_COUNT; i++)
        if (strcmp(dtypes[i].name, name) == 0)
            return (pml_dtype)i;
    return PML_DTYPE_COUNT;
}

pml_view pml_view_columns(pml_view v, int64_t first, int64_t cols)
{
    if (v.data != NULL)
        v.data = (unsigned char *)v.data + (size_t)first * pml_dtype_size(v.dtype);
    v.cols = cols;
    return v;
}
