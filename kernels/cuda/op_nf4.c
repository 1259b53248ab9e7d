/* nf4_dequantise: one launch for each weight of the stack. */
#include <string.h>

#include "cpu/ref/nf4.h"
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

enum { BLOCK = 256, ELEMENTS_A_THREAD = 8 };

static pml_status check(const pml_nf4_dequantise_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_nf4_dequantise, err);
    pmli_need_any(&c, "y", &a->y, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "y", &a->y);
    pmli_nf4_check_parts(&c, a);
    return c.status;
}

pml_status pmli_cuda_nf4_dequantise(pml_queue *queue, const pml_nf4_dequantise_args *a,
                                    pml_error *err)
{
    pml_status status = check(a, err);
    pmli_nf4_params p = {.codes = a->codes.data,
                         .absmax = a->absmax.data,
                         .nested = a->nested.data,
                         .offset = a->offset.data,
                         .y = a->y.data};
    pmli_nf4_map(p.map);
    memcpy(p.values, pmli_nf4_values, sizeof p.values);
    for (int part = 0; status == PML_OK && part < a->parts; part++, p.offset++) {
        p.count = a->part_rows[part] * a->y.cols;
        p.wide = p.count % ELEMENTS_A_THREAD == 0 && (uintptr_t)p.codes % 4 == 0 &&
                 (uintptr_t)p.y % 16 == 0;
        int64_t threads = (p.count + ELEMENTS_A_THREAD - 1) / ELEMENTS_A_THREAD;
        pmli_launch shape = {.grid_x = (unsigned)((threads + BLOCK - 1) / BLOCK),
                             .grid_y = 1,
                             .block_x = BLOCK,
                             .block_y = 1};
        status = pmli_cuda_launch(queue, PMLI_nf4_f32 + (unsigned)a->y.dtype, shape, &p, err);
        p.codes += pml_nf4_codes(p.count);
        p.absmax += pml_nf4_blocks(p.count);
        p.nested += pml_nf4_nested(p.count);
        p.y = (char *)p.y + (size_t)p.count * pml_dtype_size(a->y.dtype);
    }
    return status;
}
