/* What attention and its backward share: how documents, heads and tiles lie.
 *
 * Scores are kept transposed, keys down and queries across:
 *
 *        S^T [keys, PMLI_BLOCK]      row j: the scores of key j for each query of the tile
 *
 * so the softmax of a query runs down a column and every step of it is a vector operation over
 * queries, and the products need no transposed copy of K or V. Tiles in scratch have rows padded to
 * a multiple of 16 floats. */
#ifndef PMLI_CPU_ATTENTION_H
#define PMLI_CPU_ATTENTION_H

#include "check.h"
#include "device.h"
#include "vec.h"

enum { PMLI_BLOCK = 64, PMLI_HEAD_DIM_MAX = 256 };

static inline int64_t pmli_round16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

/* Document d: queries [q0, q1) and keys [k0, k1) of the packed rows. The query in row r sees the
 * keys j with  max(k0, r + shift - window + 1) <= j <= min(k1 - 1, r + shift). */
typedef struct pmli_document {
    int64_t q0, q1, k0, k1, shift, window;
} pmli_document;

static inline pmli_document pmli_document_at(const int32_t *cu_q, const int32_t *cu_k, int64_t d,
                                             int64_t window)
{
    pmli_document doc = {cu_q[d], cu_q[d + 1], cu_k[d], cu_k[d + 1], 0, window};
    doc.shift = doc.k1 - doc.q1; /* the last query stands at the last key */
    return doc;
}

/* First and one past the last key that any query of rows [first, last) sees. */
static inline int64_t pmli_first_key(const pmli_document *doc, int64_t first)
{
    int64_t key = doc->window > 0 ? first + doc->shift - doc->window + 1 : doc->k0;
    return key > doc->k0 ? key : doc->k0;
}

static inline int64_t pmli_end_key(const pmli_document *doc, int64_t last)
{
    return pmli_min(doc->k1, last + doc->shift);
}

/* Queries of the tile starting at row q that see key j: those numbered [*from, *to). */
PMLI_INLINE void pmli_visible(const pmli_document *doc, int64_t q, int64_t queries, int64_t key,
                              int64_t *from, int64_t *to)
{
    int64_t low = key - doc->shift - q, high = doc->window > 0 ? low + doc->window : queries;
    *from = low < 0 ? 0 : low > queries ? queries : low;
    *to = high < 0 ? 0 : high > queries ? queries : high;
}

/* A tile that the diagonal crosses is computed in groups of PMLI_GROUP keys or queries, so that of
 * the half that nobody sees most is left out:
 *
 *      queries →
 *   k  ############      a group of keys starts at the first group of queries that sees one of
 * them; e  ....########      what lies before, and is not computed, is never read y  ........####
 *
 * The queries of the tile at row q before those, for the group that key stands in. */
enum { PMLI_GROUP = 16 };
PMLI_INLINE int64_t pmli_lead(const pmli_document *doc, int64_t q, int64_t key)
{
    int64_t low = key - doc->shift - q;
    return low <= 0 ? 0 : low / PMLI_GROUP * PMLI_GROUP;
}

static inline bool pmli_on_diagonal(const pmli_document *doc, int64_t q, int64_t key, int64_t keys)
{
    return key + keys - 1 > q + doc->shift;
}

/* Where a tile lies: `queries` rows from q on, `keys` rows from key on; dim columns padded to wide.
 */
typedef struct pmli_spot {
    const pmli_document *doc;
    pmli_tile_fn *tile;
    int64_t q, queries, key, keys, dim, wide;
} pmli_spot;

/* out [keys, PMLI_BLOCK] = x right, x [keys, dim] with rows ld apart, right [dim, PMLI_BLOCK]. */
void pmli_tile_scores(const pmli_spot *at, const float *x, int64_t ld, const float *right,
                      float *out);
/* out [queries, wide] += weights^T x, weights [keys, PMLI_BLOCK], x [keys, wide]. */
void pmli_tile_to_queries(const pmli_spot *at, const float *weights, const float *x, float *out);
/* out [keys, wide] = weights x, x [queries, wide]. */
void pmli_tile_to_keys(const pmli_spot *at, const float *weights, const float *x, float *out);

/* out [rows, width] = x [rows, cols] with zeros to the right. */
PMLI_INLINE void pmli_pack(const float *x, int64_t ld, int64_t rows, int64_t cols, float *out,
                           int64_t width)
{
    for (int64_t r = 0; r < rows; r++) {
        memcpy(out + r * width, x + r * ld, (size_t)cols * sizeof(float));
        memset(out + r * width + cols, 0, (size_t)(width - cols) * sizeof(float));
    }
}

/* out [cols, PMLI_BLOCK] = scale * x^T with zeros to the right, up to a multiple of 16. */
PMLI_INLINE void pmli_pack_transposed(const float *x, int64_t ld, int64_t rows, int64_t cols,
                                      float scale, float *out)
{
    for (int64_t c = 0; c < cols; c++) {
        float *row = out + c * PMLI_BLOCK;
        if (rows % 16 != 0) /* a size that is known: of a sampled token all but one are zeros */
            memset(row + rows / 16 * 16, 0, 16 * sizeof(float));
        for (int64_t r = 0; r < rows; r++)
            row[r] = scale * x[r * ld + c];
    }
}

/* The attributes and the shapes both ops share; rows of q, k against the document bounds' slots. */
void pmli_attention_check(pmli_check *c, int32_t heads, int32_t kv_heads, int32_t head_dim,
                          int32_t window, const pml_view *q, const pml_view *k, const pml_view *v,
                          const pml_view *cu_q, const pml_view *cu_k);

#endif
