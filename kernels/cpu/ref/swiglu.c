/* SwiGLU: h = silu(gate) * up. Shazeer, "GLU Variants Improve Transformer", 2020. */
#include "check.h"
#include "device.h"
#include "ops.h"
#include "vec.h"

PMLI_CLONES static void swiglu_rows(const pml_swiglu_args *a, int64_t first, int64_t last)
{
    int64_t n = a->h.cols;
    for (int64_t t = first; t < last; t++) {
        const float *gate = (const float *)a->gate_up.data + t * a->gate_up.ld, *up = gate + n;
        float *h = (float *)a->h.data + t * a->h.ld;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            h[i] = gate[i] * pmli_sigmoid(gate[i]) * up[i];
    }
}

static void swiglu_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_swiglu_args *a = arg;
    int64_t piece = pmli_piece_rows(a->h.cols);
    swiglu_rows(a, item * piece, pmli_min((item + 1) * piece, a->h.rows));
}

pml_status pmli_cpu_swiglu(pml_queue *queue, const pml_swiglu_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu, err);
    PMLI_NEED(&c, a, h, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, gate_up, a->h.rows, 2 * a->h.cols, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(a->h.rows, pmli_piece_rows(a->h.cols)),
                  swiglu_piece, (void *)a);
    return PML_OK;
}

/* With s = sigmoid(gate):  dgate = dh up s (1 + gate (1 - s)),  dup = dh gate s,  h = gate s up. */
PMLI_CLONES static void swiglu_bwd_rows(const pml_swiglu_bwd_args *a, int64_t first, int64_t last)
{
    int64_t n = a->dh.cols;
    for (int64_t t = first; t < last; t++) {
        const float *dh = (const float *)a->dh.data + t * a->dh.ld;
        const float *gate = (const float *)a->gate_up.data + t * a->gate_up.ld, *up = gate + n;
        float *dgate = (float *)a->dgate_up.data + t * a->dgate_up.ld, *dup = dgate + n;
        float *h = a->h.data != NULL ? (float *)a->h.data + t * a->h.ld : NULL;
        if (h != NULL) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                float g = gate[i], u = up[i], d = dh[i], s = pmli_sigmoid(g);
                dgate[i] = d * u * s * (1.0F + g * (1.0F - s));
                dup[i] = d * g * s;
                h[i] = g * s * u;
            }
            continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float g = gate[i], u = up[i], s = pmli_sigmoid(g);
            dgate[i] = dh[i] * u * s * (1.0F + g * (1.0F - s));
            dup[i] = dh[i] * g * s;
        }
    }
}

static void swiglu_bwd_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const pml_swiglu_bwd_args *a = arg;
    int64_t piece = pmli_piece_rows(a->dh.cols);
    swiglu_bwd_rows(a, item * piece, pmli_min((item + 1) * piece, a->dh.rows));
}

pml_status pmli_cpu_swiglu_bwd(pml_queue *queue, const pml_swiglu_bwd_args *a, pml_error *err)
{
    pmli_check c = pmli_check_begin(PML_OP_swiglu_bwd, err);
    PMLI_NEED(&c, a, dh, PMLI_ANY, PMLI_ANY, PML_F32);
    PMLI_NEED(&c, a, gate_up, a->dh.rows, 2 * a->dh.cols, PML_F32);
    PMLI_NEED(&c, a, dgate_up, a->dh.rows, 2 * a->dh.cols, PML_F32);
    PMLI_MAY(&c, a, h, a->dh.rows, a->dh.cols, PML_F32);
    if (c.status != PML_OK)
        return c.status;
    pmli_pool_run(pmli_pool_of(queue), pmli_div_up(a->dh.rows, pmli_piece_rows(a->dh.cols)),
                  swiglu_bwd_piece, (void *)a);
    return PML_OK;
}
