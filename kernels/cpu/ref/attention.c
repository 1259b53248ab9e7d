/* Causal attention within documents, tile by tile (Dao et al., "FlashAttention", 2022): a tile of
 * queries keeps the running maximum m, the sum l and the unnormalised output o while it goes along
 * the keys; a T x T matrix never exists. */
#include "attention.h"

#include <math.h>

#include "ops.h"

void pmli_attention_check(pmli_check *c, int32_t heads, int32_t kv_heads, int32_t head_dim,
                          int32_t window, const pml_view *q, const pml_view *k, const pml_view *v,
                          const pml_view *cu_q, const pml_view *cu_k)
{
    pmli_need_that(c, heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
                   "heads (%d) must be a positive multiple of kv_heads (%d)", heads, kv_heads);
    pmli_need_that(c, head_dim > 0 && head_dim <= PMLI_HEAD_DIM_MAX,
                   "head_dim is %d, must be 1 to %d on the CPU", head_dim, PMLI_HEAD_DIM_MAX);
    pmli_need_that(c, window >= 0, "window is %d, must not be negative", window);
    pmli_need(c, "q", q, PMLI_ANY, (int64_t)heads * head_dim, PML_F32);
    pmli_need(c, "k", k, PMLI_ANY, (int64_t)kv_heads * head_dim, PML_F32);
    pmli_need(c, "v", v, k->rows, k->cols, PML_F32);
    pmli_need(c, "cu_q", cu_q, 1, PMLI_ANY, PML_I32);
    pmli_need(c, "cu_k", cu_k, 1, cu_q->cols, PML_I32);
    pmli_need_that(c, cu_q->cols >= 1, "operand 'cu_q' is empty, needs a bound a document and one");
}

void pmli_tile_scores(const pmli_spot *at, const float *x, int64_t ld, const float *right,
                      float *out)
{
    int64_t width = pmli_round16(at->queries);
    if (!pmli_on_diagonal(at->doc, at->q, at->key, at->keys)) {
        at->tile(at->keys, width, at->dim, x, ld, 1, right, PMLI_BLOCK, out, PMLI_BLOCK, false);
        return;
    }
    for (int64_t j = 0; j < at->keys; j += PMLI_GROUP) {
        int64_t lead = pmli_lead(at->doc, at->q, at->key + j);
        at->tile(pmli_min(PMLI_GROUP, at->keys - j), width - lead, at->dim, x + j * ld, ld, 1,
                 right + lead, PMLI_BLOCK, out + j * PMLI_BLOCK + lead, PMLI_BLOCK, false);
    }
}

void pmli_tile_to_queries(const pmli_spot *at, const float *weights, const float *x, float *out)
{
    if (!pmli_on_diagonal(at->doc, at->q, at->key, at->keys)) {
        at->tile(at->queries, at->wide, at->keys, weights, 1, PMLI_BLOCK, x, at->wide, out,
                 at->wide, true);
        return;
    }
    for (int64_t i = 0; i < at->queries; i += PMLI_GROUP) {
        int64_t seen = at->q + i + PMLI_GROUP + at->doc->shift - at->key;
        if (seen > 0)
            at->tile(pmli_min(PMLI_GROUP, at->queries - i), at->wide, pmli_min(seen, at->keys),
                     weights + i, 1, PMLI_BLOCK, x, at->wide, out + i * at->wide, at->wide, true);
    }
}

void pmli_tile_to_keys(const pmli_spot *at, const float *weights, const float *x, float *out)
{
    if (!pmli_on_diagonal(at->doc, at->q, at->key, at->keys)) {
        at->tile(at->keys, at->wide, at->queries, weights, PMLI_BLOCK, 1, x, at->wide, out,
                 at->wide, false);
        return;
    }
    for (int64_t j = 0; j < at->keys; j += PMLI_GROUP) {
        int64_t lead = pmli_lead(at->doc, at->q, at->key + j);
        at->tile(pmli_min(PMLI_GROUP, at->keys - j), at->wide, at->queries - lead,
                 weights + j * PMLI_BLOCK + lead, PMLI_BLOCK, 1, x + lead * at->wide, at->wide,
                 out + j * at->wide, at->wide, false);
    }
}

typedef struct attention_job {
    const pml_attention_args *a;
    pmli_tile_fn *tile;
} attention_job;

/* A thread's scratch. */
typedef struct attention_tile {
    float scores[PMLI_BLOCK * PMLI_BLOCK];   /* S^T, then P^T */
    float q[PMLI_HEAD_DIM_MAX * PMLI_BLOCK]; /* scale * Q^T   */
    float v[PMLI_BLOCK * PMLI_HEAD_DIM_MAX];
    float o[PMLI_BLOCK * PMLI_HEAD_DIM_MAX];
    float top[PMLI_BLOCK], sum[PMLI_BLOCK], fade[PMLI_BLOCK];
} attention_tile;
_Static_assert(sizeof(attention_tile) <= PMLI_SCRATCH_BYTES, "scratch too small");

/* Scores of keys that a query does not see become -infinity. */
PMLI_CLONES static void hide(float *scores, const pmli_document *doc, int64_t q, int64_t queries,
                             int64_t key, int64_t keys)
{
    for (int64_t j = 0; j < keys; j++) {
        int64_t from, to;
        pmli_visible(doc, q, queries, key + j, &from, &to);
        float *row = scores + j * PMLI_BLOCK;
        for (int64_t i = 0; i < from; i++)
            row[i] = -INFINITY;
        for (int64_t i = to; i < queries; i++)
            row[i] = -INFINITY;
    }
}

/* One block of keys enters the softmax: scores become exp(score - top), sums and the factor `fade`
 * by which what came before shrinks are brought up to date. */
PMLI_CLONES static void soften(attention_tile *s, const pmli_document *doc, int64_t q,
                               int64_t width, int64_t key, int64_t keys)
{
    float top[PMLI_BLOCK], sum[PMLI_BLOCK];
    memcpy(top, s->top, sizeof top);
    for (int64_t j = 0; j < keys; j++) {
        const float *row = s->scores + j * PMLI_BLOCK;
        int64_t lead = pmli_lead(doc, q, key + j / PMLI_GROUP * PMLI_GROUP);
#pragma omp simd
        for (int64_t i = lead; i < width; i++)
            top[i] = row[i] > top[i] ? row[i] : top[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        /* Where no key has been seen yet the top is -infinity, and must not be subtracted. */
        float before = s->top[i];
        s->top[i] = top[i];
        top[i] = top[i] == -INFINITY ? 0.0F : top[i];
        s->fade[i] = pmli_exp(before - top[i]);
        sum[i] = s->sum[i] * s->fade[i];
    }
    for (int64_t j = 0; j < keys; j++) {
        float *row = s->scores + j * PMLI_BLOCK;
        int64_t lead = pmli_lead(doc, q, key + j / PMLI_GROUP * PMLI_GROUP);
#pragma omp simd
        for (int64_t i = lead; i < width; i++) {
            float p = pmli_exp(row[i] - top[i]);
            row[i] = p;
            sum[i] += p;
        }
    }
    memcpy(s->sum, sum, (size_t)width * sizeof(float));
}

PMLI_CLONES static void fade_rows(attention_tile *s, int64_t queries, int64_t width)
{
    for (int64_t i = 0; i < queries; i++)
#pragma omp simd
        for (int64_t c = 0; c < width; c++)
            s->o[i * width + c] *= s->fade[i];
}

/* ---- one query: a token that is sampled ---- */

enum { ROW_KEYS = 1024, AT_A_TIME = 4 };

/* What is known of a query after some of the keys: o is the sum of what they weigh, not divided. */
typedef struct attention_row {
    float scores[ROW_KEYS];
    float o[PMLI_HEAD_DIM_MAX];
    float top, sum;
} attention_row;
_Static_assert(sizeof(attention_row) <= PMLI_SCRATCH_BYTES, "scratch too small");

/* scale q k of n <= AT_A_TIME keys, whose rows are ld apart; the last stands for those that are not
 * there. Side by side they hide the latency of additions. */
PMLI_INLINE void score_keys(const float *q, const float *k, int64_t ld, int64_t n, int64_t dim,
                            float scale, float *out)
{
    const float *k0 = k, *k1 = k + pmli_min(1, n - 1) * ld, *k2 = k + pmli_min(2, n - 1) * ld,
                *k3 = k + (n - 1) * ld;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t c = 0; c < dim; c++) {
        s0 += q[c] * k0[c];
        s1 += q[c] * k1[c];
        s2 += q[c] * k2[c];
        s3 += q[c] * k3[c];
    }
    const float all[AT_A_TIME] = {s0, s1, s2, s3};
    for (int64_t j = 0; j < n; j++)
        out[j] = all[j] * scale;
}

/* o += p v of n <= AT_A_TIME keys. */
PMLI_INLINE void add_values(const float *p, const float *v, int64_t ld, int64_t n, int64_t dim,
                            float *o)
{
    if (n == AT_A_TIME) {
#pragma omp simd
        for (int64_t c = 0; c < dim; c++)
            o[c] += p[0] * v[c] + p[1] * v[ld + c] + p[2] * v[2 * ld + c] + p[3] * v[3 * ld + c];
        return;
    }
    for (int64_t j = 0; j < n; j++)
#pragma omp simd
        for (int64_t c = 0; c < dim; c++)
            o[c] += p[j] * v[j * ld + c];
}

/* `keys` more of them. */
PMLI_CLONES static void attend_keys(attention_row *s, const float *q, const float *k, int64_t k_ld,
                                    const float *v, int64_t v_ld, int64_t keys, int64_t dim,
                                    float scale)
{
    float top = s->top, sum = 0;
    for (int64_t j = 0; j < keys; j += AT_A_TIME)
        score_keys(q, k + j * k_ld, k_ld, pmli_min(AT_A_TIME, keys - j), dim, scale, s->scores + j);
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < keys; j++)
        top = s->scores[j] > top ? s->scores[j] : top;
    const float base = top == -INFINITY ? 0.0F : top, fade = pmli_exp(s->top - base);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < keys; j++) {
        s->scores[j] = pmli_exp(s->scores[j] - base);
        sum += s->scores[j];
    }
    s->sum = s->sum * fade + sum;
    s->top = top;
    for (int64_t c = 0; c < dim; c++)
        s->o[c] *= fade;
    for (int64_t j = 0; j < keys; j += AT_A_TIME)
        add_values(s->scores + j, v + j * v_ld, v_ld, pmli_min(AT_A_TIME, keys - j), dim, s->o);
}

/* The query of a document that has one and more keys, in one head: of a tile 15 parts of 16 would
 * be nothing. Rows that are trained have as many keys as queries, and are not among them: the
 * backward makes their scores again, by tiles. */
static void attend_alone(const pml_attention_args *a, attention_row *s, const pmli_document *doc,
                         int64_t head)
{
    const int64_t row = doc->q0, dim = a->head_dim, kv = head / (a->heads / a->kv_heads) * dim;
    const int64_t end = pmli_end_key(doc, row + 1);
    const float *q = (const float *)a->q.data + row * a->q.ld + head * dim;
    s->top = -INFINITY;
    s->sum = 0;
    memset(s->o, 0, (size_t)dim * sizeof *s->o);
    for (int64_t key = pmli_first_key(doc, row); key < end; key += ROW_KEYS)
        attend_keys(s, q, (const float *)a->k.data + key * a->k.ld + kv, a->k.ld,
                    (const float *)a->v.data + key * a->v.ld + kv, a->v.ld,
                    pmli_min(ROW_KEYS, end - key), dim, a->scale);
    const bool none = s->top == -INFINITY;
    const float inverse = none ? 0.0F : 1.0F / s->sum;
    float *o = (float *)a->o.data + row * a->o.ld + head * dim;
    for (int64_t c = 0; c < dim; c++)
        o[c] = s->o[c] * inverse;
    ((float *)a->lse.data)[head * a->lse.ld + row] = none ? 0.0F : s->top + logf(s->sum);
}

/* ---- many: a tile of them ---- */

/* Queries in rows [first, last) of one document, one head. */
static void attend(const attention_job *job, attention_tile *s, const pmli_document *doc,
                   int64_t head, int64_t first, int64_t last)
{
    const pml_attention_args *a = job->a;
    int64_t dim = a->head_dim, wide = pmli_round16(dim), queries = last - first;
    int64_t width = pmli_round16(queries), kv_head = head / (a->heads / a->kv_heads);
    const float *k = (const float *)a->k.data + kv_head * dim;
    const float *v = (const float *)a->v.data + kv_head * dim;

    pmli_pack_transposed((const float *)a->q.data + first * a->q.ld + head * dim, a->q.ld, queries,
                         dim, a->scale, s->q);
    memset(s->o, 0, (size_t)(queries * wide) * sizeof(float));
    for (int64_t i = 0; i < PMLI_BLOCK; i++) {
        s->top[i] = -INFINITY;
        s->sum[i] = 0;
    }
    int64_t end = pmli_end_key(doc, last);
    for (int64_t key = pmli_first_key(doc, first); key < end; key += PMLI_BLOCK) {
        int64_t keys = pmli_min(PMLI_BLOCK, end - key);
        const pmli_spot at = {doc, job->tile, first, queries, key, keys, dim, wide};
        pmli_tile_scores(&at, k + key * a->k.ld, a->k.ld, s->q, s->scores);
        if (pmli_on_diagonal(doc, first, key, keys) ||
            (doc->window > 0 && key < pmli_first_key(doc, last - 1)))
            hide(s->scores, doc, first, queries, key, keys);
        soften(s, doc, first, width, key, keys);
        fade_rows(s, queries, wide);
        pmli_pack(v + key * a->v.ld, a->v.ld, keys, dim, s->v, wide);
        pmli_tile_to_queries(&at, s->scores, s->v, s->o);
    }
    float *lse = (float *)a->lse.data + head * a->lse.ld;
    for (int64_t i = 0; i < queries; i++) {
        float *o = (float *)a->o.data + (first + i) * a->o.ld + head * dim;
        bool none = s->top[i] == -INFINITY; /* sees no key: as outside every document */
        float inverse = none ? 0.0F : 1.0F / s->sum[i];
        for (int64_t c = 0; c < dim; c++)
            o[c] = s->o[i * wide + c] * inverse;
        lse[first + i] = none ? 0.0F : s->top[i] + logf(s->sum[i]);
    }
}

static void clear(const pml_attention_args *a, int64_t head, int64_t first, int64_t last)
{
    for (int64_t t = first; t < last; t++) {
        memset((float *)a->o.data + t * a->o.ld + head * a->head_dim, 0,
               (size_t)a->head_dim * sizeof(float));
        ((float *)a->lse.data)[head * a->lse.ld + t] = 0;
    }
}

/* The first document that ends after row. */
static int64_t document_of(const int32_t *cu, int64_t documents, int64_t row)
{
    int64_t low = 0, high = documents;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (cu[middle + 1] > row)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* A piece: PMLI_BLOCK rows of q, of one document or of several, in one head. */
static void attention_piece(void *arg, int64_t item, void *scratch)
{
    const attention_job *job = arg;
    const pml_attention_args *a = job->a;
    int64_t head = item % a->heads, row = item / a->heads * PMLI_BLOCK;
    int64_t end = pmli_min(row + PMLI_BLOCK, a->q.rows), documents = a->cu_q.cols - 1;
    const int32_t *cu_q = a->cu_q.data, *cu_k = a->cu_k.data;
    for (int64_t d = document_of(cu_q, documents, row); d < documents && row < end; d++) {
        pmli_document doc = pmli_document_at(cu_q, cu_k, d, a->window);
        int64_t last = pmli_min(doc.q1, end);
        if (doc.q1 - doc.q0 == 1 && doc.k1 - doc.k0 > 1)
            attend_alone(a, scratch, &doc, head);
        else if (last > row)
            attend(job, scratch, &doc, head, row, last);
        row = last > row ? last : row;
    }
    clear(a, head, row, end);
}

/* Multiplications of the scores, and as many again of the values: by what documents have, since the
 * keys of a token that is sampled are all that were planned for. */
static int64_t work_of(const pml_attention_args *a)
{
    const int32_t *q = a->cu_q.data, *k = a->cu_k.data;
    int64_t pairs = 0;
    for (int64_t d = 0; d + 1 < a->cu_q.cols; d++)
        pairs += (int64_t)(q[d + 1] - q[d]) * (k[d + 1] - k[d]);
    return pairs * a->q.cols;
}

pml_status pmli_cpu_attention(pml_queue *queue, const pml_attention_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_attention, err);
    pmli_attention_check(&c, a->heads, a->kv_heads, a->head_dim, a->window, &a->q, &a->k, &a->v,
                         &a->cu_q, &a->cu_k);
    PMLI_NEED(&c, a, o, a->q.rows, a->q.cols, PML_F32);
    PMLI_NEED(&c, a, lse, a->heads, a->q.rows, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    enum { LITTLE = 1 << 13 }; /* a token that is sampled with few before it */
    attention_job job = {a, queue->device->tile};
    const int64_t pieces = pmli_div_up(a->q.rows, PMLI_BLOCK) * a->heads;
    if (work_of(a) < LITTLE)
        pmli_pool_run_here(pmli_pool_of(queue), pieces, attention_piece, &job);
    else
        pmli_pool_run(pmli_pool_of(queue), pieces, attention_piece, &job);
    return PML_OK;
}
