/* nf4_quantise: four launches; nf4_dequantise: one for each weight of the stack. */
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
                         .y = a->y.data,
                         .cols = a->y.cols,
                         .ld_y = a->y.ld};
    pmli_dynamic_map(true, p.map);
    memcpy(p.values, pmli_nf4_values, sizeof p.values);
    for (int part = 0; status == PML_OK && part < a->parts; part++, p.offset++) {
        p.count = a->part_rows[part] * a->y.cols;
        p.wide = p.cols % ELEMENTS_A_THREAD == 0 && p.ld_y % ELEMENTS_A_THREAD == 0 &&
                 (uintptr_t)p.codes % 4 == 0 && (uintptr_t)p.y % 16 == 0;
        int64_t threads = (p.count + ELEMENTS_A_THREAD - 1) / ELEMENTS_A_THREAD;
        pmli_launch shape = {.grid_x = (unsigned)((threads + BLOCK - 1) / BLOCK),
                             .grid_y = 1,
                             .block_x = BLOCK,
                             .block_y = 1};
        status = pmli_cuda_launch(queue, PMLI_nf4_f32 + (unsigned)a->y.dtype, shape, &p, err);
        p.codes += pml_nf4_codes(p.count);
        p.absmax += pml_nf4_blocks(p.count);
        p.nested += pml_nf4_nested(p.count);
        p.y = (char *)p.y + (size_t)(a->part_rows[part] * p.ld_y) * pml_dtype_size(a->y.dtype);
    }
    return status;
}

/* ---- quantise ---- */

enum { LANES = 32, LEVELS = 4, GROUP = PML_NF4_NESTED };

/* Rows of 32 magnitudes in an innermost sum, as a power of two: cascade_begin of cpu/ref/nf4.c. */
static int power_of(int64_t blocks)
{
    int log2 = 0;
    while (((int64_t)1 << log2) < blocks / LANES)
        log2++;
    return log2 / LEVELS > 4 ? log2 / LEVELS : 4;
}

static int64_t sums_of(int64_t blocks)
{
    return blocks / LANES >> power_of(blocks);
}

/* Magnitudes in whole rows, then the innermost sums. */
static int64_t rows_of(int64_t blocks)
{
    return blocks / LANES + (blocks % LANES != 0);
}

size_t pmli_cuda_nf4_quantise_ws(const pml_nf4_quantise_args *a)
{
    int64_t blocks = pml_nf4_blocks(a->x.rows * a->x.cols);
    return (size_t)(rows_of(blocks) + sums_of(blocks)) * LANES * sizeof(float);
}

static pml_status check_quantise(const pml_nf4_quantise_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_nf4_quantise, err);
    pmli_need_any(&c, "x", &a->x, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "x", &a->x);
    pmli_nf4_check_stored(&c, a);
    if (c.status != PML_OK)
        return c.status;
    pmli_need_ws(&c, &a->ws, pmli_cuda_nf4_quantise_ws(a));
    pmli_need_that(&c, (uintptr_t)a->ws.data % (LANES * sizeof(float)) == 0,
                   "operand 'ws' is not aligned");
    return c.status;
}

static pmli_launch threads_of(int64_t threads, unsigned block)
{
    return (pmli_launch){.grid_x = (unsigned)((threads + block - 1) / block),
                         .grid_y = 1,
                         .block_x = block,
                         .block_y = 1};
}

pml_status pmli_cuda_nf4_quantise(pml_queue *queue, const pml_nf4_quantise_args *a, pml_error *err)
{
    pml_status status = check_quantise(a, err);
    if (status != PML_OK)
        return status;
    int64_t count = a->x.rows * a->x.cols, blocks = pml_nf4_blocks(count);
    pmli_nf4_quantise_params p = {.x = a->x.data,
                                  .codes = a->codes.data,
                                  .absmax = a->absmax.data,
                                  .nested = a->nested.data,
                                  .offset = a->offset.data,
                                  .magnitudes = a->ws.data,
                                  .partial = (float *)a->ws.data + rows_of(blocks) * LANES,
                                  .count = count,
                                  .blocks = blocks,
                                  .sums = sums_of(blocks),
                                  .power = power_of(blocks),
                                  .grid = a->grid,
                                  .wide = count % ELEMENTS_A_THREAD == 0 &&
                                          (uintptr_t)a->codes.data % 4 == 0 &&
                                          (uintptr_t)a->x.data % 16 == 0};
    pmli_dynamic_map(true, p.map);
    memcpy(p.values, pmli_nf4_values, sizeof p.values);
    int64_t threads = (count + ELEMENTS_A_THREAD - 1) / ELEMENTS_A_THREAD;
    status = pmli_cuda_launch(queue, PMLI_nf4_codes_f32 + (unsigned)a->x.dtype,
                              threads_of(threads, BLOCK), &p, err);
    if (status == PML_OK && p.sums > 0)
        status = pmli_cuda_launch(queue, PMLI_nf4_rows, threads_of(p.sums * LANES, BLOCK), &p, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, PMLI_nf4_mean, threads_of(LANES, LANES), &p, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, PMLI_nf4_scales, threads_of(blocks, GROUP), &p, err);
    return status;
}
