/* Vocabulary head and cross-entropy together: the logits of `chunk` labelled rows exist at a time,
 * and turn in place into their gradient.
 *
 *   ws: | logits [chunk,V] | x of the chunk's rows [chunk,H] | their dx [chunk,H] | slots [chunk]
 * I32 | */
#include <math.h>

#include "check.h"
#include "device.h"
#include "gemm.h"
#include "ops.h"
#include "vec.h"

static int64_t chunk_rows(const pml_head_loss_args *a)
{
    return pmli_min(a->chunk, a->rows.cols);
}

size_t pmli_cpu_head_loss_ws(const pml_head_loss_args *a)
{
    int64_t rows = chunk_rows(a);
    if (rows <= 0)
        return 0;
    return (size_t)rows * ((size_t)a->w.rows + 2 * (size_t)a->x.cols + 1) * sizeof(float);
}

/* The rows in work: `count` of them, slots[i] telling which labelled row the i-th is. */
typedef struct head_chunk {
    const pml_head_loss_args *a;
    pml_view logits, x, dx;
    int32_t *slots;
    int64_t count;
    int64_t piece; /* rows a task takes */
    float scale;
} head_chunk;

/* loss of one row; with grad, logits becomes scale * (softmax - onehot). */
PMLI_CLONES static float cross_entropy(float *logits, int64_t n, int32_t label, bool grad,
                                       float scale)
{
    float top = -INFINITY, sum = 0, at_label = logits[label];
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++)
        top = logits[i] > top ? logits[i] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        float e = pmli_exp(logits[i] - top);
        logits[i] = e;
        sum += e;
    }
    if (grad) {
        float factor = scale / sum;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            logits[i] *= factor;
        logits[label] -= scale;
    }
    return logf(sum) + (top - at_label);
}

static void gather_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const head_chunk *k = arg;
    int64_t hidden = k->x.cols, last = pmli_min((item + 1) * k->piece, k->count);
    const int32_t *rows = k->a->rows.data;
    for (int64_t i = item * k->piece; i < last; i++)
        memcpy((float *)k->x.data + i * hidden,
               (const float *)k->a->x.data + rows[k->slots[i]] * k->a->x.ld,
               (size_t)hidden * sizeof(float));
}

static void loss_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const head_chunk *k = arg;
    const pml_head_loss_args *a = k->a;
    const int32_t *labels = a->labels.data;
    bool grad = a->dx.data != NULL || a->dw.data != NULL;
    int64_t last = pmli_min((item + 1) * k->piece, k->count);
    for (int64_t i = item * k->piece; i < last; i++)
        ((float *)a->loss.data)[k->slots[i]] =
            cross_entropy((float *)k->logits.data + i * k->logits.ld, k->logits.cols,
                          labels[k->slots[i]], grad, k->scale);
}

static void scatter_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const head_chunk *k = arg;
    int64_t hidden = k->x.cols, last = pmli_min((item + 1) * k->piece, k->count);
    const int32_t *rows = k->a->rows.data;
    for (int64_t i = item * k->piece; i < last; i++)
        memcpy((float *)k->a->dx.data + rows[k->slots[i]] * k->a->dx.ld,
               (const float *)k->dx.data + i * hidden, (size_t)hidden * sizeof(float));
}

/* The rows in work from x to loss, and to dx and dw where those are wanted. */
static void run_chunk(pmli_pool *pool, head_chunk *k)
{
    const pml_head_loss_args *a = k->a;
    k->piece = pmli_div_up(k->count, pmli_pool_threads(pool));
    int64_t pieces = pmli_div_up(k->count, k->piece);
    pml_view logits = pmli_rows(k->logits, 0, k->count), x = pmli_rows(k->x, 0, k->count);
    pmli_pool_run(pool, pieces, gather_piece, k);
    pmli_gemm(pool, PMLI_NT, 1, x, a->w, 0, logits);
    pmli_pool_run(pool, pieces, loss_piece, k);
    if (a->dx.data != NULL) {
        pmli_gemm(pool, PMLI_NN, 1, logits, a->w, 0, pmli_rows(k->dx, 0, k->count));
        pmli_pool_run(pool, pieces, scatter_piece, k);
    }
    if (a->dw.data != NULL)
        pmli_gemm(pool, PMLI_TN, 1, logits, x, 1, a->dw);
}

/* Fill slots with the next labelled rows from `from` on; returns where the chunk after begins. */
static int64_t next_chunk(const pml_head_loss_args *a, int64_t from, int64_t most, head_chunk *k)
{
    const int32_t *rows = a->rows.data;
    k->count = 0;
    for (; from < a->rows.cols && k->count < most; from++) {
        if (rows[from] >= 0)
            k->slots[k->count++] = (int32_t)from;
        else
            ((float *)a->loss.data)[from] = 0;
    }
    return from;
}

static void zero_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_view *v = arg;
    int64_t piece = pmli_piece_rows(v->cols), last = pmli_min((item + 1) * piece, v->rows);
    for (int64_t t = item * piece; t < last; t++)
        memset((float *)v->data + t * v->ld, 0, (size_t)v->cols * sizeof(float));
}

static pml_status check(const pml_head_loss_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_head_loss, err);
    PMLI_NEED(&c, a, x, PMLI_ANY, PMLI_ANY, PML_F32);
    pmli_need_weight(&c, "w", &a->w, PMLI_ANY, a->x.cols);
    PMLI_NEED(&c, a, rows, 1, PMLI_ANY, PML_I32);
    PMLI_NEED(&c, a, labels, 1, a->rows.cols, PML_I32);
    PMLI_MAY(&c, a, scale, 1, 1, PML_F32);
    PMLI_NEED(&c, a, loss, 1, a->rows.cols, PML_F32);
    PMLI_MAY(&c, a, dx, a->x.rows, a->x.cols, PML_F32);
    PMLI_MAY(&c, a, dw, a->w.rows, a->w.cols, PML_F32);
    pmli_need_blas(&c, "x", &a->x);
    pmli_need_blas(&c, "w", &a->w);
    pmli_need_blas(&c, "rows", &a->rows);
    pmli_need_blas(&c, "dw", &a->dw);
    pmli_need_that(&c, a->chunk > 0, "chunk is %d, must be positive", a->chunk);
    pmli_need_ws(&c, &a->ws, pmli_cpu_head_loss_ws(a));
    return c.status;
}

pml_status pmli_cpu_head_loss(pml_queue *queue, const pml_head_loss_args *a, pml_error *err)
{
    pml_status status = check(a, err);
    if (status != PML_OK)
        return status;
    pmli_pool *pool = pmli_pool_of(queue);
    int64_t most = chunk_rows(a), vocab = a->w.rows, hidden = a->x.cols;
    float *ws = a->ws.data;
    head_chunk k = {.a = a};
    k.scale = a->scale.data != NULL ? *(const float *)a->scale.data : 1.0F;
    k.logits = pml_matrix(ws, most, vocab, PML_F32);
    k.x = pml_matrix(ws + most * vocab, most, hidden, PML_F32);
    k.dx = pml_matrix(ws + most * (vocab + hidden), most, hidden, PML_F32);
    k.slots = (int32_t *)(void *)(ws + most * (vocab + 2 * hidden));

    if (a->dx.data != NULL)
        pmli_pool_run(pool, pmli_div_up(a->dx.rows, pmli_piece_rows(hidden)), zero_piece,
                      (void *)&a->dx);
    for (int64_t from = 0; from < a->rows.cols;) {
        from = next_chunk(a, from, most, &k);
        if (k.count == 0)
            continue;
        run_chunk(pool, &k);
    }
    return PML_OK;
}
