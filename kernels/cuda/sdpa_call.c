#include "sdpa_call.h"

#include "sdpa.h"

enum { FORWARD_ROOM = 16 << 20, BACKWARD_SPARE = 2 << 20, MOST_ROOM = 768 << 20 };
enum {
    MOST_PADDING = 3, /* rows of a call for each token; and of all calls: */
    MOST_PADDED = 24,
    UNIT = 256,
    FORWARD_ARRAYS = 5,
    BACKWARD_ARRAYS = 9,
    TILE = 32,
    TILE_ROWS = 8
};

static size_t units(size_t bytes)
{
    return (bytes + UNIT - 1) / UNIT * UNIT;
}

/* cuDNN's: dq in float32, dk and dv of every query head, and a sum for each row (measured for cuDNN
 * 9.19: 64.25 MiB a slot of 2048 rows, 32 heads of 128). */
static size_t cudnn_room(int64_t slots, int64_t longest, int64_t heads, int64_t head_dim,
                         bool backward)
{
    if (!backward)
        return FORWARD_ROOM;
    return (size_t)(slots * longest * heads) * (size_t)(8 * head_dim + 4) + BACKWARD_SPARE;
}

/* Whole calls of so many. */
static int64_t in_calls(int64_t slots, int64_t each)
{
    return (slots + each - 1) / each * each;
}

/* ws: | stats [tokens, heads] | lengths [slots] | offsets, arrays x [slots + 1] | cuDNN's |, slots
 * in whole calls. */
static size_t own_room(int64_t tokens, int64_t slots, int64_t heads, bool backward)
{
    size_t arrays = backward ? BACKWARD_ARRAYS : FORWARD_ARRAYS;
    return units((size_t)(tokens * heads) * sizeof(float)) + units((size_t)slots * sizeof(int)) +
           arrays * units((size_t)(slots + 1) * sizeof(long long));
}

static size_t room(int64_t tokens, int64_t slots, int64_t each, int64_t longest, int64_t heads,
                   int64_t head_dim, bool backward)
{
    return own_room(tokens, in_calls(slots, each), heads, backward) +
           cudnn_room(each, longest, heads, head_dim, backward);
}

/* Whether so many documents of `longest` rows are more than it is worth to ask cuDNN for: the work
 * around its kernels is that of all their rows, whether they are there or not. */
static bool too_padded(int64_t tokens, int64_t slots, int64_t longest)
{
    return slots * longest > MOST_PADDED * tokens;
}

static bool of_a_kind(pml_dtype dtype, int64_t head_dim)
{
    return (dtype == PML_BF16 || dtype == PML_F16) && (head_dim == 64 || head_dim == 128);
}

size_t pmli_sdpa_ws(pml_dtype dtype, int64_t tokens, int64_t slots, int64_t longest, int64_t heads,
                    int64_t head_dim, bool backward)
{
    enum { SELDOM_SHORTER = 256 }; /* tokens of a document: few batches have all planned slots */
    int64_t each = 1, next = 1, likely = 1 + tokens / SELDOM_SHORTER;
    likely = likely < slots ? likely : slots;
    if (!of_a_kind(dtype, head_dim) || slots < 1 || longest < 1 ||
        (backward && too_padded(tokens, likely, longest)))
        return 0;
    if (!backward)
        return room(tokens, slots, slots, longest, heads, head_dim, false);
    while (each < slots) {
        next = 2 * each < slots ? 2 * each : slots;
        if (next * longest > MOST_PADDING * tokens ||
            cudnn_room(next, longest, heads, head_dim, true) > MOST_ROOM)
            break;
        each = next;
    }
    return room(tokens, slots, each, longest, heads, head_dim, true);
}

/* Documents of one call. The backward's workspace grows with slots * longest, so many slots (packed
 * short documents) are done in turn, so many at a time as ws has room for: a power of two, and of
 * what a plan has asked for (pmli_sdpa_ws), so that all its batches of as many documents or more
 * have one plan of cuDNN's. Nor more than MOST_ROOM, where another way's room in ws is larger. 0:
 * there is no room for one. */
static int64_t at_once(const pmli_attention_params *p, int64_t longest, size_t ws_bytes,
                       bool backward)
{
    int64_t each = 0, next = backward ? 1 : p->slots;
    while (each < p->slots && room(p->tokens_q, p->slots, next, longest, p->heads, p->head_dim,
                                   backward) <= ws_bytes) {
        each = next;
        next = 2 * each < p->slots ? 2 * each : p->slots;
        if (cudnn_room(next, longest, p->heads, p->head_dim, backward) > MOST_ROOM)
            break;
    }
    return each;
}

/* Where a call's own pieces lie, and the kernels' view of them. */
static void lay_out(const pmli_attention_params *p, const long long *lds, int arrays, char *ws,
                    pmli_sdpa_params *k, pmli_sdpa_call *call)
{
    int64_t slots = in_calls(p->slots, call->shape.slots);
    *k = (pmli_sdpa_params){.cu = p->cu_q,
                            .lse = p->lse,
                            .ld_lse = p->ld_lse,
                            .slots = p->slots,
                            .slots_in_calls = (int)slots,
                            .heads = p->heads,
                            .tokens = p->tokens_q,
                            .arrays = arrays};
    k->stats = (float *)(void *)ws;
    ws += units((size_t)(p->tokens_q * p->heads) * sizeof(float));
    k->lengths = (int *)(void *)ws;
    ws += units((size_t)slots * sizeof(int));
    k->offsets = (long long *)(void *)ws;
    k->ld_offsets = (long long)(units((size_t)(slots + 1) * sizeof(long long)) / 8);
    const void **at[] = {&call->at_q,    &call->at_k,  &call->at_v,  &call->at_o, &call->at_stats,
                         &call->at_dout, &call->at_dq, &call->at_dk, &call->at_dv};
    for (int a = 0; a < arrays; a++) {
        k->ld[a] = lds[a];
        *at[a] = k->offsets + a * k->ld_offsets;
    }
    call->stats = k->stats;
    call->lengths = k->lengths;
    call->workspace = k->offsets + arrays * k->ld_offsets;
}

static bool askable(const pml_queue *queue, const pmli_attention_params *p, pml_dtype dtype)
{
    return queue->device->sdpa != NULL && p->cu_q == p->cu_k && p->tokens_q == p->tokens_k &&
           of_a_kind(dtype, p->head_dim);
}

static pml_status offsets(pml_queue *queue, pmli_sdpa_params *k, pml_error *err)
{
    pmli_launch one = {.grid_x = 1, .grid_y = 1, .block_x = 256, .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_sdpa_offsets, one, k, err);
}

static pml_status by_tiles(pml_queue *queue, pmli_kernel kernel, pmli_sdpa_params *k,
                           pml_error *err)
{
    pmli_launch shape = {.grid_x = (unsigned)((k->tokens + TILE - 1) / TILE),
                         .grid_y = (unsigned)((k->heads + TILE - 1) / TILE),
                         .block_x = TILE,
                         .block_y = TILE_ROWS};
    return pmli_cuda_launch(queue, kernel, shape, k, err);
}

static pmli_sdpa_shape shape_of(const pmli_attention_params *p, pml_dtype dtype, int64_t each,
                                int64_t longest, bool backward)
{
    return (pmli_sdpa_shape){.slots = each,
                             .longest = longest,
                             .heads = p->heads,
                             .kv_heads = p->kv_heads,
                             .head_dim = p->head_dim,
                             .window = p->window,
                             .ld_q = p->ld_q,
                             .ld_k = p->ld_k,
                             .ld_v = p->ld_v,
                             .ld_o = backward ? p->ld_out : p->ld_o,
                             .ld_dout = p->ld_dout,
                             .ld_dq = p->ld_dq,
                             .ld_dk = p->ld_dk,
                             .ld_dv = p->ld_dv,
                             .scale = p->scale,
                             .dtype = (int32_t)dtype,
                             .backward = backward};
}

/* While cuDNN compiles, steps are made by our own kernels: the same but for the order of sums. Not
 * where bits must repeat, nor for a recording, which keeps what it gets. */
static pml_status put(pml_queue *queue, const pmli_sdpa_call *call, bool *done, pml_error *err)
{
    pmli_sdpa *sdpa = queue->device->sdpa;
    bool waits = queue->device->deterministic || queue->recording;
    return queue->preparing ? pmli_sdpa_compile(sdpa, call, done, err)
                            : pmli_sdpa_run(sdpa, queue->stream, call, waits, done, err);
}

/* One call after the other, each with the slots behind the last one's. *done = false where one was
 * not put: our own kernels then do it all. */
static pml_status put_all(pml_queue *queue, const pmli_sdpa_call *first, int64_t slots, bool *done,
                          pml_error *err)
{
    pmli_sdpa_call call = *first;
    const void **at[] = {&call.at_q,    &call.at_k,  &call.at_v,  &call.at_o, &call.at_stats,
                         &call.at_dout, &call.at_dq, &call.at_dk, &call.at_dv};
    int64_t each = call.shape.slots;
    pml_status status = put(queue, &call, done, err);
    for (int64_t s = each; status == PML_OK && *done && s < slots; s += each) {
        call.lengths = (const int *)call.lengths + each;
        for (size_t i = 0; i < sizeof at / sizeof *at; i++)
            if (*at[i] != NULL)
                *at[i] = (const long long *)*at[i] + each;
        status = put(queue, &call, done, err);
    }
    return status;
}

/* Its backward takes statistics of equal documents only as [slots, heads, longest] (before 9.26).
 */
static pml_status packed_stats(pml_queue *queue, const pmli_attention_params *p, int64_t longest,
                               void *to, pml_error *err)
{
    enum { THREADS = 256 };
    pmli_sdpa_params k = {.lse = p->lse,
                          .ld_lse = p->ld_lse,
                          .stats = to,
                          .slots = p->slots,
                          .heads = p->heads,
                          .longest = longest};
    pmli_launch shape = {.grid_x = (unsigned)((longest + THREADS - 1) / THREADS),
                         .grid_y = (unsigned)(p->slots * p->heads),
                         .block_x = THREADS,
                         .block_y = 1};
    return pmli_cuda_launch(queue, PMLI_sdpa_packed, shape, &k, err);
}

/* Equal documents, as many as one call has: there are no rows behind the last one to be cleared,
 * and the forward's statistics lie as our lse does. The backward's stand in ws before cuDNN's own.
 */
static pml_status run_equal(pml_queue *queue, const pmli_attention_params *p, pmli_sdpa_call *call,
                            void *ws, size_t ws_bytes, bool *done, pml_error *err)
{
    enum { MOST_GRID_Y = 65535 };
    int64_t longest = call->shape.longest;
    bool backward = call->shape.backward != 0;
    size_t stats = backward ? units((size_t)(p->tokens_q * p->heads) * sizeof(float)) : 0;
    if (p->slots * p->heads > MOST_GRID_Y || p->slots > call->shape.slots)
        return PML_OK;
    pml_status status = backward ? packed_stats(queue, p, longest, ws, err) : PML_OK;
    call->shape.equal = 1;
    call->shape.ld_stats = backward ? longest : p->ld_lse;
    call->stats = backward ? ws : p->lse;
    call->workspace = (char *)ws + stats;
    call->workspace_size = ws_bytes - stats;
    if (status == PML_OK)
        status = put(queue, call, done, err);
    call->shape.equal = 0;
    call->shape.ld_stats = 0;
    return status;
}

pml_status pmli_sdpa_forward(pml_queue *queue, const pmli_attention_params *p, pml_dtype dtype,
                             int64_t longest, bool equal, void *ws, size_t ws_bytes, bool *done,
                             pml_error *err)
{
    *done = false;
    int64_t each = at_once(p, longest, ws_bytes, false);
    if (!askable(queue, p, dtype) || each == 0)
        return PML_OK;
    const long long lds[FORWARD_ARRAYS] = {p->ld_q, p->ld_k, p->ld_v, p->ld_o, p->heads};
    pmli_sdpa_params k;
    pmli_sdpa_call call = {.shape = shape_of(p, dtype, each, longest, false),
                           .q = p->q,
                           .k = p->k,
                           .v = p->v,
                           .o = p->o};
    pml_status status = PML_OK;
    if (equal)
        status = run_equal(queue, p, &call, ws, ws_bytes, done, err);
    if (status != PML_OK || *done)
        return status;
    lay_out(p, lds, FORWARD_ARRAYS, ws, &k, &call);
    call.workspace_size = ws_bytes - (size_t)((char *)call.workspace - (char *)ws);
    status = offsets(queue, &k, err);
    if (status == PML_OK)
        status = put_all(queue, &call, p->slots, done, err);
    if (status != PML_OK || !*done)
        return status;
    k.clear[0] = p->o;
    k.ld_clear[0] = p->ld_o;
    k.clear_cols[0] = p->heads * p->head_dim;
    return by_tiles(queue, PMLI_sdpa_lse, &k, err);
}

pml_status pmli_sdpa_backward(pml_queue *queue, const pmli_attention_params *p, pml_dtype dtype,
                              int64_t longest, bool equal, void *ws, size_t ws_bytes, bool *done,
                              pml_error *err)
{
    *done = false;
    int64_t each = at_once(p, longest, ws_bytes, true);
    /* cuDNN's own order of sums is not fixed; its fixed one is slower than ours takes memory. */
    if (!askable(queue, p, dtype) || queue->device->deterministic || each == 0 ||
        too_padded(p->tokens_q, p->slots, longest))
        return PML_OK;
    const long long lds[BACKWARD_ARRAYS] = {p->ld_q,    p->ld_k,  p->ld_v,  p->ld_out, p->heads,
                                            p->ld_dout, p->ld_dq, p->ld_dk, p->ld_dv};
    pmli_sdpa_params k;
    pmli_sdpa_call call = {.shape = shape_of(p, dtype, each, longest, true),
                           .q = p->q,
                           .k = p->k,
                           .v = p->v,
                           .o = (void *)(uintptr_t)p->out,
                           .dout = p->dout,
                           .dq = p->dq,
                           .dk = p->dk,
                           .dv = p->dv};
    pml_status status = PML_OK;
    if (equal)
        status = run_equal(queue, p, &call, ws, ws_bytes, done, err);
    if (status != PML_OK || *done)
        return status;
    lay_out(p, lds, BACKWARD_ARRAYS, ws, &k, &call);
    call.workspace_size = ws_bytes - (size_t)((char *)call.workspace - (char *)ws);
    void *const cleared[] = {p->dq, p->dk, p->dv};
    const long long ld_cleared[] = {p->ld_dq, p->ld_dk, p->ld_dv};
    for (int i = 0; i < 3; i++) {
        k.clear[i] = cleared[i];
        k.ld_clear[i] = ld_cleared[i];
        k.clear_cols[i] = (i == 0 ? p->heads : p->kv_heads) * p->head_dim;
    }
    status = offsets(queue, &k, err);
    if (status == PML_OK)
        status = by_tiles(queue, PMLI_sdpa_stats, &k, err);
    return status == PML_OK ? put_all(queue, &call, p->slots, done, err) : status;
}
