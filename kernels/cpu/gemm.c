#include "gemm.h"

#include <cblas.h>
#include <stdbool.h>
#include <string.h>

typedef struct gemm_job {
    pmli_form form;
    float alpha, beta;
    pml_view a, b, c;
    bool by_rows;  /* pieces are rows of C, else columns */
    int64_t piece; /* how many of them a piece has */
} gemm_job;

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* One row of C: a product of a matrix and a vector, which gemm would first pack. */
static void gemv(pmli_form form, float alpha, pml_view a, pml_view b, float beta, pml_view c)
{
    if (beta == 0)
        memset(c.data, 0, (size_t)c.cols * sizeof(float)); /* 0 * NaN must not survive */
    cblas_sgemv(CblasRowMajor, form == PMLI_NT ? CblasNoTrans : CblasTrans, (int)b.rows,
                (int)b.cols, alpha, b.data, (int)b.ld, a.data, form == PMLI_TN ? (int)a.ld : 1,
                beta, c.data, 1);
}

void pmli_gemm_here(pmli_form form, float alpha, pml_view a, pml_view b, float beta, pml_view c)
{
    int64_t k = form == PMLI_TN ? a.rows : a.cols;
    if (c.rows == 0 || c.cols == 0)
        return;
    if (c.rows == 1 && k > 0) {
        gemv(form, alpha, a, b, beta, c);
        return;
    }
    cblas_sgemm(CblasRowMajor, form == PMLI_TN ? CblasTrans : CblasNoTrans,
                form == PMLI_NT ? CblasTrans : CblasNoTrans, (int)c.rows, (int)c.cols, (int)k,
                alpha, a.data, (int)a.ld, b.data, (int)b.ld, beta, c.data, (int)c.ld);
}

static void gemm_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const gemm_job *job = arg;
    pml_view a = job->a, b = job->b, c = job->c;
    int64_t first = item * job->piece;
    if (job->by_rows) {
        int64_t n = min64(job->piece, c.rows - first);
        c = pmli_rows(c, first, n);
        a = job->form == PMLI_TN ? pml_view_columns(a, first, n) : pmli_rows(a, first, n);
    } else {
        int64_t n = min64(job->piece, c.cols - first);
        c = pml_view_columns(c, first, n);
        b = job->form == PMLI_NT ? pmli_rows(b, first, n) : pml_view_columns(b, first, n);
    }
    pmli_gemm_here(job->form, job->alpha, a, b, job->beta, c);
}

void pmli_gemm(pmli_pool *pool, pmli_form form, float alpha, pml_view a, pml_view b, float beta,
               pml_view c)
{
    /* The longer side is cut, so that a piece stays near square and packs little. Multiples of 48
     * are whole register tiles in all of OpenBLAS' kernels (16x4, 8x8, 6x16). */
    gemm_job job = {form, alpha, beta, a, b, c, c.rows >= c.cols, 0};
    int64_t length = job.by_rows ? c.rows : c.cols;
    int64_t threads = pmli_pool_threads(pool);
    job.piece = (length + threads - 1) / threads;
    job.piece = (job.piece + 47) / 48 * 48;
    if (job.piece > 0)
        pmli_pool_run(pool, (length + job.piece - 1) / job.piece, gemm_piece, &job);
}
