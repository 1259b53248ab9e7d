/* Products by OpenBLAS on one thread, of factors that may have to be widened first. */
#include <cblas.h>
#include <string.h>

#include "gemm.h"
#include "gemv.h"
#include "ref/convert.h"

/* One row of C: a product of a matrix and a vector, which gemm would first pack. */
static void gemv(pmli_form form, float alpha, pml_view a, pml_view b, float beta, pml_view c)
{
    if (form == PMLI_NT) {
        pmli_gemv(b, a.data, alpha, beta != 0, c.data);
        return;
    }
    if (beta == 0)
        memset(c.data, 0, (size_t)c.cols * sizeof(float)); /* 0 * NaN must not survive */
    cblas_sgemv(CblasRowMajor, CblasTrans, (int)b.rows, (int)b.cols, alpha, b.data, (int)b.ld,
                a.data, form == PMLI_TN ? (int)a.ld : 1, beta, c.data, 1);
}

/* All F32. */
static void product(pmli_form form, float alpha, pml_view a, pml_view b, float beta, pml_view c)
{
    int64_t k = pmli_depth(form, &a);
    if (c.rows == 1 && k > 0) {
        gemv(form, alpha, a, b, beta, c);
        return;
    }
    cblas_sgemm(CblasRowMajor, form == PMLI_TN ? CblasTrans : CblasNoTrans,
                form == PMLI_NT ? CblasTrans : CblasNoTrans, (int)c.rows, (int)c.cols, (int)k,
                alpha, a.data, (int)a.ld, b.data, (int)b.ld, beta, c.data, (int)c.ld);
}

static pml_view widened(pml_view v, float *room)
{
    if (v.dtype == PML_F32)
        return v;
    for (int64_t i = 0; i < v.rows; i++)
        pmli_convert((const uint16_t *)v.data + i * v.ld, v.dtype, room + i * v.cols, PML_F32,
                     v.cols);
    return pml_matrix(room, v.rows, v.cols, PML_F32);
}

/* As many rows of B at a time as the scratch holds. F32 is cut in the same way, so that the result
 * does not tell how B is stored. */
void pmli_gemm_here(pmli_form form, float alpha, pml_view a, pml_view b, float beta, pml_view c,
                    void *scratch)
{
    if (c.rows == 0 || c.cols == 0)
        return;
    bool vector = form == PMLI_NT && c.rows == 1; /* widens as it reads */
    if (form == PMLI_TN || pmli_depth(form, &a) == 0 || vector) {
        product(form, alpha, a, b, beta, c);
        return;
    }
    int64_t step = PMLI_NARROW_COLS / b.cols > 1 ? PMLI_NARROW_COLS / b.cols : 1;
    for (int64_t first = 0, n; first < b.rows; first += n) {
        n = b.rows - first < step ? b.rows - first : step;
        pml_view part = widened(pmli_rows(b, first, n), scratch);
        if (form == PMLI_NT)
            product(form, alpha, a, part, beta, pml_view_columns(c, first, n));
        else
            product(form, alpha, pml_view_columns(a, first, n), part, first > 0 ? 1 : beta, c);
    }
}
