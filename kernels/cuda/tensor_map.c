#include "tensor_map.h"

_Static_assert(sizeof(pmli_tensor_map) == sizeof(CUtensorMap), "as the driver has it");
_Static_assert(_Alignof(pmli_tensor_map) >= 64, "as the driver wants it");

pml_status pmli_tensor_map_of(pmli_tensor_map *map, const void *data, const pmli_boxes *b,
                              const char *what, pml_error *err)
{
    const CUtensorMapDataType dtype =
        b->dtype == PML_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUtensorMapSwizzle lies =
        b->box[0] * 2 == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B;
    const CUtensorMapL2promotion reach =
        b->far ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    cuuint64_t shape[3], pitch[2];
    const cuuint32_t step[] = {1, 1, 1};
    for (int i = 0; i < b->sides; i++)
        shape[i] = (cuuint64_t)b->shape[i];
    for (int i = 0; i + 1 < b->sides; i++)
        pitch[i] = (cuuint64_t)b->pitch[i] * 2;
    return PMLI_CU(pmli_cu.cuTensorMapEncodeTiled((CUtensorMap *)map, dtype, (cuuint32_t)b->sides,
                                                  (void *)data, shape, pitch, b->box, step,
                                                  CU_TENSOR_MAP_INTERLEAVE_NONE, lies, reach,
                                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                   what, err);
}
