/* Gradients of attention. The probabilities are computed again from q, k and lse, tile by tile:
 *
 *   P = exp(S - lse)     dV += P^T dO     dP = dO V^T     D = rowsum(dO * O)
 *   dS = scale P (dP - D)     dQ += dS K     dK += dS^T Q
 *
 * A piece of work is one document and one key head with all its query heads, so that dk and dv are
 * added up by one thread, in one order; which turns them back through rope, where that is asked. */
#include "attention.h"

#include "ops.h"
#include "rope.h"

typedef struct backward_job {
    const pml_attention_bwd_args *a;
    pmli_tile_fn *tile;
} backward_job;

/* A thread's scratch. */
typedef struct backward_tile {
    float p[PMLI_BLOCK * PMLI_BLOCK];  /* S^T, then P^T   */
    float ds[PMLI_BLOCK * PMLI_BLOCK]; /* dP^T, then dS^T */
    float q[PMLI_BLOCK * PMLI_HEAD_DIM_MAX], q_t[PMLI_HEAD_DIM_MAX * PMLI_BLOCK];
    float dout[PMLI_BLOCK * PMLI_HEAD_DIM_MAX], dout_t[PMLI_HEAD_DIM_MAX * PMLI_BLOCK];
    float k[PMLI_BLOCK * PMLI_HEAD_DIM_MAX], v[PMLI_BLOCK * PMLI_HEAD_DIM_MAX];
    float dq[PMLI_BLOCK * PMLI_HEAD_DIM_MAX], dkv[PMLI_BLOCK * PMLI_HEAD_DIM_MAX];
    float lse[PMLI_BLOCK], delta[PMLI_BLOCK];
} backward_tile;
_Static_assert(sizeof(backward_tile) <= PMLI_SCRATCH_BYTES, "scratch too small");

/* p: scores to probabilities; ds: dP to dS. Hidden pairs become zero in both. */
PMLI_CLONES static void score_gradient(backward_tile *s, const pmli_document *doc, float scale,
                                       int64_t q, int64_t queries, int64_t key, int64_t keys)
{
    for (int64_t j = 0; j < keys; j++) {
        float *p = s->p + j * PMLI_BLOCK, *ds = s->ds + j * PMLI_BLOCK;
        int64_t from, to;
        pmli_visible(doc, q, queries, key + j, &from, &to);
        for (int64_t i = 0; i < from; i++)
            p[i] = ds[i] = 0;
#pragma omp simd
        for (int64_t i = from; i < to; i++) {
            float probability = pmli_exp(p[i] - s->lse[i]);
            p[i] = probability;
            ds[i] = scale * probability * (ds[i] - s->delta[i]);
        }
        for (int64_t i = to; i < queries; i++)
            p[i] = ds[i] = 0;
    }
}

/* A query that sees one key gives it all its weight, whatever the score: dP - D is zero. What
 * rounding leaves of the two sums would be no gradient, yet AdamW would follow it at full rate. */
static void forget_single_keys(backward_tile *s, const pmli_document *doc, int64_t q,
                               int64_t queries, int64_t keys)
{
    int64_t first = doc->k0 - doc->shift - q; /* the query at the document's first key */
    int64_t from = doc->window == 1 ? 0 : first, to = doc->window == 1 ? queries : first + 1;
    if (from < 0 || to > queries)
        return;
    for (int64_t j = 0; j < keys; j++)
        memset(s->ds + j * PMLI_BLOCK + from, 0, (size_t)(to - from) * sizeof(float));
}

PMLI_CLONES static void add_rows(const float *tile, int64_t width, int64_t rows, int64_t cols,
                                 float *out, int64_t ld)
{
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int64_t c = 0; c < cols; c++)
            out[r * ld + c] += tile[r * width + c];
}

/* delta[i] = dout_i . o_i */
PMLI_CLONES static void row_dots(const float *x, int64_t x_ld, const float *y, int64_t y_ld,
                                 int64_t rows, int64_t cols, float *out)
{
    for (int64_t r = 0; r < rows; r++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < cols; c++)
            dot += x[r * x_ld + c] * y[r * y_ld + c];
        out[r] = dot;
    }
}

/* Queries in rows [first, last) of one document, one head: writes their dq, adds to dk and dv. */
static void attend_back(const backward_job *job, backward_tile *s, const pmli_document *doc,
                        int64_t head, int64_t first, int64_t last)
{
    const pml_attention_bwd_args *a = job->a;
    int64_t dim = a->head_dim, wide = pmli_round16(dim), queries = last - first;
    int64_t kv = head / (a->heads / a->kv_heads) * dim;
    const float *q = (const float *)a->q.data + first * a->q.ld + head * dim;
    const float *dout = (const float *)a->dout.data + first * a->dout.ld + head * dim;

    pmli_pack(q, a->q.ld, queries, dim, s->q, wide);
    pmli_pack(dout, a->dout.ld, queries, dim, s->dout, wide);
    pmli_pack_transposed(q, a->q.ld, queries, dim, a->scale, s->q_t);
    pmli_pack_transposed(dout, a->dout.ld, queries, dim, 1, s->dout_t);
    row_dots(dout, a->dout.ld, (const float *)a->o.data + first * a->o.ld + head * dim, a->o.ld,
             queries, dim, s->delta);
    memcpy(s->lse, (const float *)a->lse.data + head * a->lse.ld + first,
           (size_t)queries * sizeof(float));
    memset(s->dq, 0, (size_t)(queries * wide) * sizeof(float));

    int64_t end = pmli_end_key(doc, last);
    for (int64_t key = pmli_first_key(doc, first); key < end; key += PMLI_BLOCK) {
        int64_t keys = pmli_min(PMLI_BLOCK, end - key);
        pmli_pack((const float *)a->k.data + key * a->k.ld + kv, a->k.ld, keys, dim, s->k, wide);
        pmli_pack((const float *)a->v.data + key * a->v.ld + kv, a->v.ld, keys, dim, s->v, wide);
        const pmli_spot at = {doc, job->tile, first, queries, key, keys, dim, wide};
        pmli_tile_scores(&at, s->k, wide, s->q_t, s->p);
        pmli_tile_scores(&at, s->v, wide, s->dout_t, s->ds);
        score_gradient(s, doc, a->scale, first, queries, key, keys);
        forget_single_keys(s, doc, first, queries, keys);
        pmli_tile_to_keys(&at, s->p, s->dout, s->dkv);
        add_rows(s->dkv, wide, keys, dim, (float *)a->dv.data + key * a->dv.ld + kv, a->dv.ld);
        pmli_tile_to_keys(&at, s->ds, s->q, s->dkv);
        add_rows(s->dkv, wide, keys, dim, (float *)a->dk.data + key * a->dk.ld + kv, a->dk.ld);
        pmli_tile_to_queries(&at, s->ds, s->k, s->dq);
    }
    float *dq = (float *)a->dq.data + first * a->dq.ld + head * dim;
    for (int64_t i = 0; i < queries; i++)
        memcpy(dq + i * a->dq.ld, s->dq + i * wide, (size_t)dim * sizeof(float));
}

/* Rows [first, last) of `heads` heads of dq or dk from the column on, as they were before rope. */
static void turn_back(const pml_attention_bwd_args *a, const pml_view *v, int64_t column,
                      int64_t heads, int64_t first, int64_t last)
{
    const pml_rope_args turn = {.x = pml_view_columns(*v, column, heads * a->head_dim),
                                .pos = a->pos,
                                .table = a->table,
                                .heads = (int32_t)heads,
                                .head_dim = a->head_dim,
                                .inverse = 1};
    pmli_rope_rows(&turn, first, last);
}

static void clear(const pml_view *v, int64_t column, int64_t cols, int64_t first, int64_t last)
{
    for (int64_t t = first; t < last; t++)
        memset((float *)v->data + t * v->ld + column, 0, (size_t)cols * sizeof(float));
}

static void backward_piece(void *arg, int64_t item, void *scratch)
{
    const backward_job *job = arg;
    const pml_attention_bwd_args *a = job->a;
    int64_t kv_head = item % a->kv_heads, d = item / a->kv_heads, documents = a->cu_q.cols - 1;
    int64_t group = a->heads / a->kv_heads, dim = a->head_dim;
    const int32_t *cu_q = a->cu_q.data, *cu_k = a->cu_k.data;
    bool rest = d == documents; /* the rows behind the last document */
    pmli_document doc = {cu_q[documents], a->q.rows, cu_k[documents], a->k.rows, 0, 0};
    if (!rest)
        doc = pmli_document_at(cu_q, cu_k, d, a->window);
    clear(&a->dk, kv_head * dim, dim, doc.k0, doc.k1);
    clear(&a->dv, kv_head * dim, dim, doc.k0, doc.k1);
    if (rest) {
        clear(&a->dq, kv_head * group * dim, group * dim, doc.q0, doc.q1);
        return;
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t row = doc.q0; row < doc.q1; row += PMLI_BLOCK)
            attend_back(job, scratch, &doc, head, row, pmli_min(row + PMLI_BLOCK, doc.q1));
    if (a->pos.data == NULL)
        return;
    turn_back(a, &a->dq, kv_head * group * dim, group, doc.q0, doc.q1);
    turn_back(a, &a->dk, kv_head * dim, 1, doc.k0, doc.k1);
}

pml_status pmli_cpu_attention_bwd(pml_queue *queue, const pml_attention_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_attention_bwd, err);
    pmli_attention_check(&c, a->heads, a->kv_heads, a->head_dim, a->window, &a->q, &a->k, &a->v,
                         &a->cu_q, &a->cu_k);
    PMLI_NEED(&c, a, dout, a->q.rows, a->q.cols, PML_F32);
    PMLI_NEED(&c, a, o, a->q.rows, a->q.cols, PML_F32);
    PMLI_NEED(&c, a, lse, a->heads, a->q.rows, PML_F32);
    pmli_need_turn(&c, a);
    PMLI_NEED(&c, a, dq, a->q.rows, a->q.cols, PML_F32);
    PMLI_NEED(&c, a, dk, a->k.rows, a->k.cols, PML_F32);
    PMLI_NEED(&c, a, dv, a->k.rows, a->k.cols, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    backward_job job = {a, queue->device->tile};
    pmli_pool_run(pmli_pool_of(queue), a->cu_q.cols * a->kv_heads, backward_piece, &job);
    return PML_OK;
}
