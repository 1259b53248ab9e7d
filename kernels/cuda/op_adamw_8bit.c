/* adamw_8bit: a warp a block of 256 elements. */
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

enum { THREADS = 384, BLOCKS_A_GROUP = THREADS / 32, GROUPS = 132 * 2 };

pml_status pmli_cuda_adamw_8bit(pml_queue *queue, const pml_adamw_8bit_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_adamw_8bit, err);
    int64_t blocks = (a->p.cols + PML_ADAMW_8BIT_BLOCK - 1) / PML_ADAMW_8BIT_BLOCK;
    PMLI_NEED(&c, a, p, 1, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, g, 1, a->p.cols, PML_F32);
    PMLI_NEED(&c, a, m, 1, a->p.cols, PML_U8);
    PMLI_NEED(&c, a, v, 1, a->p.cols, PML_U8);
    PMLI_NEED(&c, a, m_largest, 1, blocks, PML_F32);
    PMLI_NEED(&c, a, v_largest, 1, blocks, PML_F32);
    PMLI_NEED(&c, a, hyper, 1, PML_HYPER_COUNT, PML_F32);
    pml_dtype dtype = pmli_need_copy(&c, &a->p, &a->copy);
    if (c.status != PML_OK || a->p.cols == 0)
        return c.status;
    pmli_adamw_8bit_params p = {.p = a->p.data,
                                .m_largest = a->m_largest.data,
                                .v_largest = a->v_largest.data,
                                .m = a->m.data,
                                .v = a->v.data,
                                .g = a->g.data,
                                .hyper = a->hyper.data,
                                .copy = a->copy.data,
                                .count = a->p.cols};
    p.wide = (uintptr_t)p.p % 16 == 0 && (uintptr_t)p.g % 16 == 0 && (uintptr_t)p.m % 4 == 0 &&
             (uintptr_t)p.v % 4 == 0 && (uintptr_t)p.copy % (4 * pml_dtype_size(dtype)) == 0;
    pml_dynamic_map(true, p.m_map);
    pml_dynamic_map(false, p.v_map);
    int64_t groups = (a->m_largest.cols + BLOCKS_A_GROUP - 1) / BLOCKS_A_GROUP;
    pmli_launch shape = {.grid_x = (unsigned)(groups < GROUPS ? groups : GROUPS),
                         .grid_y = 1,
                         .block_x = THREADS,
                         .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_adamw_8bit_f32 + (unsigned)dtype, shape, &p, err);
}
