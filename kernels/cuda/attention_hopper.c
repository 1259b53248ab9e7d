/* Attention's backward on Hopper: who is served, where things lie in ws, and three kernels in turn.
 * A plan, and what is made of each token alone; then all products in one pass, with dq added up in
 * memory, and dq out of its sums: or, where bits must repeat or ws has no room for the sums, a pass
 * for the gradients of queries and one for those of keys and values. */
#include "attention_hopper.h"

#include "operand.h"
#include "tensor_map.h"

enum {
    HEAD = 128,
    THREADS = 256, /* of the kernels around */
    BACKWARD_THREADS = 384,
    HEADS_A_WARP = 4,
    UNIT = 256 /* parts of ws begin on whole ones */
};

pml_status pmli_attention_hopper_prepare(pml_device *d, pml_error *err)
{
    static const pmli_kernel users[] = {PMLI_attend_hopper_bwd, PMLI_attend_hopper_bwd_q,
                                        PMLI_attend_hopper_bwd_kv};
    return pmli_cuda_is_hopper(d)
               ? pmli_cuda_allow_shared(d, users, sizeof users / sizeof *users, HOPPER_SHARED,
                                        "shared memory for attention", err)
               : PML_OK;
}

/* Where the parts of ws begin; without sums, `sums` is where it ends. */
struct layout {
    size_t stats, lists, pieces, queries, sum_tiles, begun, sums, end;
    int64_t most_tiles;
};

static size_t after(size_t at, int64_t count, size_t size)
{
    return (at + (size_t)count * size + UNIT - 1) / UNIT * UNIT;
}

static struct layout lay_out(const pml_attention_bwd_args *a)
{
    int64_t slots = a->cu_q.cols - 1, tokens = a->q.rows, kv = a->kv_heads;
    int64_t positions = HOPPER_ROWS / (a->heads / a->kv_heads);
    struct layout at = {0};
    bool whole = a->equal && a->max_q % positions == 0;
    at.most_tiles = (tokens / positions + (whole ? 0 : slots)) * kv;
    at.lists = after(at.stats, tokens * a->heads, 2 * sizeof(float));
    at.pieces = after(at.lists, HOPPER_BLOCKS + 1, sizeof(int));
    at.queries = after(at.pieces, (tokens / HOPPER_KEYS + slots) * kv, sizeof(pmli_hopper_piece));
    at.sum_tiles =
        after(at.queries, (tokens / (2 * positions) + slots) * kv, sizeof(pmli_hopper_queries));
    at.begun = after(at.sum_tiles, at.most_tiles, sizeof(pmli_hopper_sums));
    at.sums = after(at.begun, at.most_tiles, 2 * sizeof(int));
    at.end = after(at.sums, at.most_tiles, HOPPER_ROWS * HEAD * sizeof(float));
    return at;
}

static bool fits(const pml_attention_bwd_args *a)
{
    int64_t slots = a->cu_q.cols - 1;
    return a->q.dtype == PML_BF16 && a->head_dim == HEAD && a->window <= 0 && a->kv_heads > 0 &&
           a->heads % a->kv_heads == 0 && a->heads % HEADS_A_WARP == 0 &&
           a->heads / a->kv_heads <= HOPPER_ROWS && slots > 0 && slots <= HOPPER_DOCUMENTS &&
           a->max_q > 0 && a->max_q <= HOPPER_LONGEST && a->q.rows > 0;
}

/* Asked for a plan, whose slots are at the most: a batch of fewer than all of them is served. */
size_t pmli_attention_hopper_ws(const pml_attention_bwd_args *a)
{
    pml_attention_bwd_args most = *a;
    if (most.cu_q.cols > HOPPER_DOCUMENTS + 1)
        most.cu_q.cols = HOPPER_DOCUMENTS + 1;
    if (!fits(&most))
        return 0;
    return lay_out(&most).end;
}

/* As the copy engine wants its operands, and the kernels theirs. */
static bool in_packs(const pml_attention_bwd_args *a)
{
    const pml_view *all[] = {&a->q,  &a->k,  &a->v,  &a->dout, &a->o,
                             &a->dq, &a->dk, &a->dv, &a->table};
    bool packs = (uintptr_t)a->ws.data % 16 == 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        packs = packs && pmli_in_units_of(all[i], 16);
    return packs;
}

bool pmli_attention_hopper_serves(const pml_device *d, const pml_attention_bwd_args *a)
{
    return pmli_cuda_is_hopper(d) && fits(a) && (size_t)a->ws.cols >= lay_out(a).sums &&
           a->cu_q.data == a->cu_k.data && a->q.rows == a->k.rows && in_packs(a);
}

/* v [tokens, heads * 128] in boxes of 64 columns of so many heads and tokens. */
static pml_status describe(pmli_tensor_map *map, const pml_view *v, int64_t heads,
                           int64_t box_heads, int64_t box_tokens, pml_error *err)
{
    /* of one row alone the distance to the next says nothing */
    const pmli_boxes boxes = {.dtype = v->dtype,
                              .sides = 3,
                              .shape = {HEAD, heads, v->rows},
                              .pitch = {HEAD, v->rows > 1 ? v->ld : heads * HEAD},
                              .box = {HEAD / 2, (unsigned)box_heads, (unsigned)box_tokens}};
    return pmli_tensor_map_of(map, v->data, &boxes,
                              "describing attention's operands for the copy engine", err);
}

pml_status pmli_attention_hopper_bwd(pml_queue *queue, const pml_attention_bwd_args *a,
                                     pml_error *err)
{
    struct layout at = lay_out(a);
    bool sums = !queue->device->deterministic && (size_t)a->ws.cols >= at.end;
    char *ws = a->ws.data;
    int64_t group = a->heads / a->kv_heads, positions = HOPPER_ROWS / group;
    int blocks =
        queue->device->processors < HOPPER_BLOCKS ? queue->device->processors : HOPPER_BLOCKS;
    pmli_attention_hopper_params p = {.out = a->o.data,
                                      .dout_rows = a->dout.data,
                                      .lse = a->lse.data,
                                      .cu = a->cu_q.data,
                                      .pos = a->pos.data,
                                      .table = a->table.data,
                                      .dq = a->dq.data,
                                      .dk = a->dk.data,
                                      .dv = a->dv.data,
                                      .stats = (float *)(ws + at.stats),
                                      .lists = (int *)(ws + at.lists),
                                      .pieces = (pmli_hopper_piece *)(ws + at.pieces),
                                      .sums = sums ? (float *)(ws + at.sums) : NULL,
                                      .sum_tiles = (pmli_hopper_sums *)(ws + at.sum_tiles),
                                      .begun = (int *)(ws + at.begun),
                                      .queries = (pmli_hopper_queries *)(ws + at.queries),
                                      .most_tiles = at.most_tiles,
                                      .tokens = a->q.rows,
                                      .ld_out = a->o.ld,
                                      .ld_dout = a->dout.ld,
                                      .ld_lse = a->lse.ld,
                                      .ld_dq = a->dq.ld,
                                      .ld_dk = a->dk.ld,
                                      .ld_dv = a->dv.ld,
                                      .slots = (int)a->cu_q.cols - 1,
                                      .heads = a->heads,
                                      .kv_heads = a->kv_heads,
                                      .blocks = blocks,
                                      .scale = a->scale};
    pml_status status = describe(&p.q, &a->q, a->heads, group, positions, err);
    if (status == PML_OK)
        status = describe(&p.dout, &a->dout, a->heads, group, positions, err);
    if (status == PML_OK)
        status = describe(&p.k, &a->k, a->kv_heads, 1, HOPPER_KEYS, err);
    if (status == PML_OK)
        status = describe(&p.v, &a->v, a->kv_heads, 1, HOPPER_KEYS, err);
    int64_t warps = a->q.rows * (a->heads / HEADS_A_WARP), a_block = THREADS / 32;
    pmli_launch begin = {.grid_x = (unsigned)(2 + (warps + a_block - 1) / a_block),
                         .grid_y = 1,
                         .block_x = THREADS,
                         .block_y = 1};
    pmli_launch pass = {.grid_x = (unsigned)blocks,
                        .grid_y = 1,
                        .block_x = BACKWARD_THREADS,
                        .block_y = 1,
                        .shared = HOPPER_SHARED,
                        .together = sums};
    pmli_launch end = {
        .grid_x = (unsigned)at.most_tiles, .grid_y = 1, .block_x = THREADS, .block_y = 1};
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, PMLI_attend_hopper_begin, begin, &p, err);
    if (status == PML_OK)
        status = pmli_cuda_launch(queue, sums ? PMLI_attend_hopper_bwd : PMLI_attend_hopper_bwd_q,
                                  pass, &p, err);
    if (status != PML_OK)
        return status;
    return sums ? pmli_cuda_launch(queue, PMLI_attend_hopper_end, end, &p, err)
                : pmli_cuda_launch(queue, PMLI_attend_hopper_bwd_kv, pass, &p, err);
}
