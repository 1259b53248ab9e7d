/* embed_bwd: tokens are sorted by their ids, then every row that has some is added to once.
 *
 *   ws:  | parts: two rows of float32 a window of tokens | keys: 8 bytes a token | sorted: 4 | */
#include "device.h"
#include "device/params.h"
#include "operand.h"
#include "ops.h"

enum { BLOCK = 256, GRID_Y_LIMIT = 65535, GRID_LIMIT = 0x7fffffff };

static int64_t parts_ld(int64_t cols)
{
    return pmli_div_up(cols, 4) * 4;
}

size_t pmli_cuda_embed_bwd_ws(const pml_embed_bwd_args *a)
{
    int64_t windows = pmli_div_up(a->ids.cols, EMBED_WINDOW);
    return 2 * (size_t)windows * (size_t)parts_ld(a->dy.cols) * sizeof(float) +
           (size_t)a->ids.cols * (sizeof(unsigned long long) + sizeof(unsigned));
}

static pml_status launch(pml_queue *queue, pmli_kernel kernel, int64_t blocks, unsigned x,
                         unsigned y, pmli_embed_bwd_params *p, pml_error *err)
{
    pmli_launch shape = {.grid_x = (unsigned)blocks, .grid_y = 1, .block_x = x, .block_y = y};
    return pmli_cuda_launch(queue, kernel, shape, p, err);
}

/* What runs left behind that do not end in their window. */
static pml_status add_parts(pml_queue *queue, bool wide, pmli_embed_bwd_params *p, pml_error *err)
{
    int64_t windows = pmli_div_up(p->tokens, EMBED_WINDOW);
    int64_t across = pmli_div_up(p->cols, wide ? 4 * BLOCK : BLOCK);
    if (windows < 2)
        return PML_OK;
    pmli_launch shape = {.grid_x = (unsigned)(windows - 1),
                         .grid_y = (unsigned)(across < GRID_Y_LIMIT ? across : GRID_Y_LIMIT),
                         .block_x = BLOCK,
                         .block_y = 1};
    return pmli_cuda_launch(queue, wide ? PMLI_embed_parts_wide : PMLI_embed_parts, shape, p, err);
}

pml_status pmli_cuda_embed_bwd(pml_queue *queue, const pml_embed_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_embed_bwd, err);
    PMLI_NEED(&c, a, ids, 1, PMLI_ANY, PML_I32);
    pmli_need_any(&c, "dy", &a->dy, a->ids.cols, PMLI_ANY);
    pmli_need_float(&c, "dy", &a->dy);
    PMLI_NEED(&c, a, dtable, PMLI_ANY, a->dy.cols, PML_F32);
    pmli_need_that(&c, a->ids.cols <= GRID_LIMIT, "more than 2^31 - 1 tokens");
    pmli_need_that(&c, a->dtable.rows < EMBED_IDS, "2^22 or more rows of 'dtable'");
    if (a->ids.cols > 0)
        pmli_need_ws(&c, &a->ws, pmli_cuda_embed_bwd_ws(a));
    pmli_need_that(&c, (uintptr_t)a->ws.data % 16 == 0, "operand 'ws' is not aligned");
    if (c.status != PML_OK || a->ids.cols == 0 || a->dy.cols == 0)
        return c.status;
    int64_t tokens = a->ids.cols;
    pmli_embed_bwd_params p = {.ids = a->ids.data,
                               .dy = a->dy.data,
                               .dtable = a->dtable.data,
                               .parts = a->ws.data,
                               .tokens = tokens,
                               .cols = a->dy.cols,
                               .ld_dy = a->dy.ld,
                               .ld_dtable = a->dtable.ld,
                               .ld_parts = parts_ld(a->dy.cols)};
    p.keys = (unsigned long long *)(p.parts + 2 * pmli_div_up(tokens, EMBED_WINDOW) * p.ld_parts);
    p.sorted = (unsigned *)(p.keys + tokens);
    bool wide = pmli_in_units_of(&a->dy, 4 * pml_dtype_size(a->dy.dtype)) &&
                pmli_in_units_of(&a->dtable, 16);
    pml_status status =
        launch(queue, PMLI_embed_sort, pmli_div_up(tokens, EMBED_CHUNK), EMBED_CHUNK, 1, &p, err);
    if (status == PML_OK)
        status = launch(queue, PMLI_embed_rank, pmli_div_up(tokens, EMBED_RANK_KEYS),
                        EMBED_RANK_KEYS, EMBED_RANK_CHUNKS, &p, err);
    pmli_kernel kernel = PMLI_embed_bwd_f32 + 2 * (unsigned)a->dy.dtype + (wide ? 1 : 0);
    if (status == PML_OK)
        status = launch(queue, kernel, tokens, BLOCK, 1, &p, err);
    if (status == PML_OK)
        status = add_parts(queue, wide, &p, err);
    return status;
}
