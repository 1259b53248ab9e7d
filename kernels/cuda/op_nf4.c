/* nf4_quantise: four launches; nf4_dequantise: one, a row of the grid for each weight of the stack.
 */
#include <string.h>

#include "cpu/ref/nf4.h"
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

enum {
    BLOCK = 256,
    UNIT = 8, /* elements that a thread reads or writes at once */
    LANES = 32
};

static pmli_launch grid_of(int64_t count, int64_t a_block)
{
    return (pmli_launch){.grid_x = (unsigned)((count + a_block - 1) / a_block),
                         .grid_y = 1,
                         .block_x = BLOCK,
                         .block_y = 1};
}

static pml_status check(const pml_nf4_dequantise_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_nf4_dequantise, err);
    pmli_need_any(&c, "y", &a->y, PMLI_ANY, PMLI_ANY);
    pmli_need_float(&c, "y", &a->y);
    pmli_nf4_check_parts(&c, a);
    return c.status;
}

/* So that i / divisor == (i * magic >> 32) >> shift for all i < 2^31; divisor is 2 to 2^31
 * (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994, theorem 4.2,
 * for numbers of 31 bits, which leave magic = ceil(2^(31+s) / divisor), 2^(s-1) < divisor <= 2^s,
 * 32). */
static void divide_by(int64_t divisor, unsigned *magic, unsigned *shift)
{
    unsigned s = 1;
    while ((int64_t)1 << s < divisor)
        s++;
    *magic = (unsigned)((((uint64_t)1 << (31 + s)) + (uint64_t)divisor - 1) / (uint64_t)divisor);
    *shift = s - 1;
}

pml_status pmli_cuda_nf4_dequantise(pml_queue *queue, const pml_nf4_dequantise_args *a,
                                    pml_error *err)
{
    pml_status status = check(a, err);
    if (status != PML_OK)
        return status;
    pmli_nf4_params p = {.cols = a->y.cols, .ld_y = a->y.ld};
    int64_t codes = 0, blocks = 0, nested = 0, row = 0, most = 0;
    bool whole = p.cols % UNIT == 0 && p.cols > UNIT && p.ld_y % UNIT == 0;
    if (whole)
        divide_by(p.cols / UNIT, &p.magic, &p.shift);
    for (int i = 0; i < a->parts; i++) {
        int64_t count = a->part_rows[i] * a->y.cols;
        p.part[i].codes = (const unsigned char *)a->codes.data + codes;
        p.part[i].absmax = (const unsigned char *)a->absmax.data + blocks;
        p.part[i].nested = (const float *)a->nested.data + nested;
        p.part[i].offset = (const float *)a->offset.data + i;
        p.part[i].y = (char *)a->y.data + (size_t)(row * p.ld_y) * pml_dtype_size(a->y.dtype);
        p.part[i].count = count;
        if (whole && count / UNIT <= INT32_MAX && (uintptr_t)p.part[i].codes % 4 == 0 &&
            (uintptr_t)p.part[i].y % 16 == 0)
            p.part[i].tiles = (unsigned)(count / NF4_TILE);
        codes += pml_nf4_codes(count);
        blocks += pml_nf4_blocks(count);
        nested += pml_nf4_nested(count);
        row += a->part_rows[i];
        most = count > most ? count : most;
    }
    memcpy(p.values, pml_nf4_values, sizeof p.values);
    pmli_launch shape = grid_of(most, BLOCK / LANES * NF4_TILE);
    shape.grid_y = (unsigned)a->parts;
    return pmli_cuda_launch(queue, PMLI_nf4_f32 + (unsigned)a->y.dtype, shape, &p, err);
}

/* ---- quantise ---- */

enum { LEVELS = 4, GROUP = PML_NF4_NESTED };
_Static_assert((int)GROUP == (int)BLOCK, "nf4_scales has a thread for each magnitude of a group");

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
                                  .wide = count % UNIT == 0 && (uintptr_t)a->codes.data % 4 == 0 &&
                                          (uintptr_t)a->x.data % 16 == 0};
    memcpy(p.values, pml_nf4_values, sizeof p.values);
    const pmli_launch one_warp = {.grid_x = 1, .grid_y = 1, .block_x = LANES, .block_y = 1};
    status = pmli_cuda_launch(queue, PMLI_nf4_codes_f32 + (unsigned)a->x.dtype,
                              grid_of(count, BLOCK * UNIT), &p, err);
    if (status == PML_OK && p.sums > 0)
        status = pmli_cuda_launch(queue, PMLI_nf4_rows, grid_of(p.sums * LANES, BLOCK), &p, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, PMLI_nf4_mean, one_warp, &p, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, PMLI_nf4_scales, grid_of(blocks, GROUP), &p, err);
    return status;
}
