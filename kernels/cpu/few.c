#include "few.h"

#include "simd/tile.h"

/* Elements of B that a piece has: no more than MOST, so that a thread that is held up does not hold
 * up the others; nor than a part of a thread's share, as cores of a shared host are not equally
 * fast, down to SMALL, which is read in the time that a piece takes to pass to another thread some
 * ten times over. Multiplications of a product below LEAST would be done before another thread has
 * come. */
enum { MOST = 1 << 16, SMALL = 1 << 13, PARTS = 8, LEAST = 1 << 14 };

typedef struct few_job {
    const pmli_product *products;
    int count;
    int64_t unit, units, items; /* columns are cut in multiples of `unit` */
} few_job;

static int64_t div_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static pml_view columns_of(pmli_form form, pml_view b, int64_t first, int64_t n)
{
    return form == PMLI_NT ? pmli_rows(b, first, n) : pml_view_columns(b, first, n);
}

static void multiply(const pmli_product *p, int64_t first, int64_t n, void *scratch)
{
    pml_view c = pml_view_columns(p->c, first, n);
    pmli_gemm_here(p->form, p->alpha, p->a, columns_of(p->form, p->b, first, n), p->beta, c,
                   scratch);
    if (p->a2.data != NULL)
        pmli_gemm_here(p->form, 1, p->a2, columns_of(p->form, p->b2, first, n), 1, c, scratch);
}

static void piece(void *arg, int64_t item, void *scratch)
{
    const few_job *job = arg;
    const int64_t begin = job->units * item / job->items,
                  end = job->units * (item + 1) / job->items;
    int64_t at = 0;
    for (int i = 0; i < job->count; i++) {
        const pmli_product *p = &job->products[i];
        const int64_t units = div_up(p->c.cols, job->unit);
        const int64_t from = begin > at ? begin - at : 0, to = min64(end - at, units);
        if (from < to) {
            const int64_t first = from * job->unit;
            multiply(p, first, min64(to * job->unit, p->c.cols) - first, scratch);
        }
        at += units;
    }
}

void pmli_few_all(pmli_pool *pool, const pmli_product *products, int count)
{
    few_job job = {.products = products, .count = count, .unit = 1};
    int64_t read = 0, work = 0;
    for (int i = 0; i < count; i++)
        if (products[i].c.rows > 1) /* of a product of OpenBLAS' */
            job.unit = PMLI_TILE_COLS;
    for (int i = 0; i < count; i++) {
        const pmli_product *p = &products[i];
        const int64_t deep =
            pmli_depth(p->form, &p->a) + (p->a2.data != NULL ? pmli_depth(p->form, &p->a2) : 0);
        job.units += div_up(p->c.cols, job.unit);
        read += p->c.cols * deep;
        work += p->c.cols * deep * p->c.rows;
    }
    const int64_t threads = pmli_pool_threads(pool), parts = min64(read / (threads * SMALL), PARTS);
    const int64_t least = div_up(read, threads * MOST);
    job.items = threads * (parts > least ? parts : least);
    if (job.items <= threads)
        job.items = min64(threads, div_up(work, LEAST));
    job.items = min64(job.items > 1 ? job.items : 1, job.units);
    pmli_pool_run(pool, job.items, piece, &job);
}
