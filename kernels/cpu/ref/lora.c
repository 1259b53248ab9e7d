#include "lora.h"

#include "pml/base/philox.h"

#include "vec.h"

int pmli_adapters(const pmli_lora *lora, pmli_adapter out[PML_LINEAR_MAX_PARTS])
{
    int count = 0;
    pmli_adapter next = {0};
    for (int p = 0; p < lora->parts; p++) {
        next.part = p;
        next.cols = lora->part_cols[p];
        if (lora->lora_parts >> p & 1) {
            out[count++] = next;
            next.b_row += next.cols;
            next.u_col += lora->rank;
        }
        next.y_col += next.cols;
    }
    return count;
}

int64_t pmli_lora_width(const pmli_lora *lora)
{
    return (int64_t)lora->rank * __builtin_popcount(lora->lora_parts);
}

void pmli_lora_check(pmli_check *c, const pmli_lora *lora, int64_t cols, int64_t k,
                     const pml_view *a, const pml_view *b, const pml_view *rng,
                     const pml_view *places, int64_t rows)
{
    pmli_need_that(c, lora->parts >= 1 && lora->parts <= PML_LINEAR_MAX_PARTS,
                   "parts is %d, must be 1 to %d", lora->parts, PML_LINEAR_MAX_PARTS);
    if (c->status != PML_OK)
        return;
    int64_t sum = 0, adapted = 0;
    for (int p = 0; p < lora->parts; p++) {
        pmli_need_that(c, lora->part_cols[p] > 0, "part_cols[%d] is %d, must be positive", p,
                       lora->part_cols[p]);
        sum += lora->part_cols[p];
        adapted += lora->lora_parts >> p & 1 ? lora->part_cols[p] : 0;
    }
    pmli_need_that(c, sum == cols, "part_cols add up to %lld, the layer has %lld columns",
                   (long long)sum, (long long)cols);
    pmli_need_that(c, lora->lora_parts >> lora->parts == 0,
                   "lora_parts 0x%x names a part beyond the %d there are",
                   (unsigned)lora->lora_parts, lora->parts);
    if (lora->lora_parts == 0) {
        pmli_need_that(c, a->data == NULL, "operand 'a' is given but lora_parts is 0");
        pmli_need_that(c, b->data == NULL, "operand 'b' is given but lora_parts is 0");
        return;
    }
    pmli_need_that(c, lora->rank > 0, "rank is %d, must be positive", lora->rank);
    pmli_need_that(c, lora->dropout >= 0 && lora->dropout < 1,
                   "lora_dropout is %g, must be in [0, 1)", (double)lora->dropout);
    pmli_need(c, "a", a, pmli_lora_width(lora), k, PML_F32);
    pmli_need(c, "b", b, adapted, lora->rank, PML_F32);
    pmli_need_blas(c, "a", a);
    pmli_need_blas(c, "b", b);
    if (lora->dropout > 0) {
        pmli_need(c, "rng", rng, 1, 2, PML_I64);
        pmli_need(c, "places", places, 1, rows, PML_I64);
    }
}

bool pmli_one_scale(const pmli_lora *lora, const pmli_adapter *adapters, int count)
{
    for (int i = 1; i < count; i++)
        if (lora->scale[adapters[i].part] != lora->scale[adapters[0].part])
            return false;
    return true;
}

typedef struct mask_job {
    uint64_t seed, step;
    const int64_t *places;
    uint32_t purpose;
    uint32_t least;
    float keep;
    bool add;
    pml_view x, y;
} mask_job;

/* At most eight elements: the halves of four words, low before high. */
static void mask_eight(const mask_job *job, pml_philox random, int64_t n, const float *x, float *y)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t half = random.word[i / 2] >> (i % 2 * 16) & 0xffff;
        float masked = half >= job->least ? x[i] * job->keep : 0.0F;
        y[i] = job->add ? y[i] + masked : masked;
    }
}

static void mask_piece(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const mask_job *job = arg;
    int64_t cols = job->x.cols, piece = pmli_piece_rows(cols);
    int64_t last = pmli_min((item + 1) * piece, job->x.rows);
    for (int64_t t = item * piece; t < last; t++) {
        const float *x = (const float *)job->x.data + t * job->x.ld;
        float *y = (float *)job->y.data + t * job->y.ld;
        uint64_t first = (uint64_t)job->places[t] * (uint64_t)pmli_div_up(cols, 8);
        for (int64_t i = 0; i < cols; i += 8) {
            pml_philox random =
                pml_philox_at(job->seed, job->step, job->purpose, first + (uint64_t)i / 8);
            mask_eight(job, random, pmli_min(8, cols - i), x + i, y + i);
        }
    }
}

void pmli_lora_mask(pmli_pool *pool, const pmli_lora *lora, int part, const pml_view *rng,
                    const pml_view *places, pml_view x, bool add, pml_view y)
{
    const int64_t *state = rng->data;
    uint32_t least = pml_dropout_least(lora->dropout);
    mask_job job = {(uint64_t)state[0],
                    (uint64_t)state[1],
                    places->data,
                    lora->purpose + (uint32_t)part,
                    least,
                    pml_dropout_keep(least),
                    add,
                    x,
                    y};
    pmli_pool_run(pool, pmli_div_up(x.rows, pmli_piece_rows(x.cols)), mask_piece, &job);
}
