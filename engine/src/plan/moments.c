/* What the optimizer keeps for the flat buffer, and in which pieces it updates it. */
#include <stdlib.h>

#include "build.h"

enum { BLOCK = PML_ADAMW_8BIT_BLOCK };

static bool in_codes(const pml_train_config *c)
{
    return c->optimizer == PML_OPTIMIZER_ADAMW_8BIT;
}

/* 256 bytes, so that every stacked tensor starts aligned; or a block of moments, so that it starts
 * one. */
int64_t pmli_flat_align(const pml_train_config *config)
{
    return in_codes(config) ? BLOCK : 64;
}

static int64_t blocks_of(int64_t n)
{
    return (n + BLOCK - 1) / BLOCK;
}

size_t pml_program_snapshot_bytes(const pml_program *p, const pml_train_config *c)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < p->n_parameters; i++) {
        int64_t n = p->parameters[i].trained ? p->parameters[i].rows * p->parameters[i].cols : 0;
        bytes += (size_t)n * sizeof(float) + pml_optimizer_bytes(c, n);
    }
    return bytes;
}

size_t pml_optimizer_bytes(const pml_train_config *c, int64_t n)
{
    size_t floats = (size_t)n * sizeof(float);
    if (c->optimizer == PML_OPTIMIZER_SGD)
        return c->momentum > 0 ? floats : 0;
    if (!in_codes(c) || n < PML_8BIT_LEAST)
        return 2 * floats;
    return 2 * ((size_t)n + (size_t)blocks_of(n) * sizeof(float));
}

const pml_range *pml_program_range(const pml_program *p, int64_t at)
{
    for (int32_t low = 0, high = p->n_ranges; low < high;) {
        int32_t middle = low + (high - low) / 2;
        const pml_range *r = &p->ranges[middle];
        if (at >= r->at && at < r->at + r->floats)
            return r;
        if (at < r->at)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

/* Of a tensor that lies in a stack with longer rows, what is between them belongs to it. */
static int64_t span_of(const pml_program *p, const pml_parameter *parameter)
{
    int64_t pitch = parameter->rank == 1 ? parameter->cols : p->tensors[parameter->tensor].cols;
    return (parameter->rows - 1) * pitch + parameter->cols;
}

/* The next tensor, in the range before it where the two can be updated alike: their moments are of
 * one kind, and codes go on at a block's beginning. */
static void add_to_ranges(pmli_builder *b, const pml_parameter *parameter)
{
    pml_program *p = b->program;
    int64_t at = parameter->at, floats = span_of(p, parameter);
    bool codes = parameter->rows * parameter->cols >= PML_8BIT_LEAST;
    bool decay = at < p->decay_floats;
    pml_range *last = p->n_ranges > 0 ? &p->ranges[p->n_ranges - 1] : NULL;
    if (last != NULL && last->codes == codes && last->decay == decay &&
        (!codes || (at - last->at) % BLOCK == 0)) {
        last->floats = at + floats - last->at;
        return;
    }
    p->ranges[p->n_ranges++] =
        (pml_range){.at = at, .floats = floats, .decay = decay, .codes = codes};
}

/* Ranges for every tensor, then their places: codes at multiples of a block, so that a GPU reads
 * them in whole packs. */
static void make_ranges(pmli_builder *b, int64_t *floats, int64_t *codes, int64_t *blocks)
{
    pml_program *p = b->program;
    for (int32_t i = 0; i < p->n_parameters; i++)
        if (p->parameters[i].trained)
            add_to_ranges(b, &p->parameters[i]);
    for (int32_t i = 0; i < p->n_ranges; i++) {
        pml_range *r = &p->ranges[i];
        int64_t rounded = blocks_of(r->floats) * BLOCK;
        r->state = r->codes ? *codes : *floats;
        r->block = r->codes ? *blocks : 0;
        *(r->codes ? codes : floats) += rounded;
        *blocks += r->codes ? rounded / BLOCK : 0;
    }
}

static int32_t keep(pmli_builder *b, pml_dtype dtype, int64_t n, const char *name)
{
    return n == 0 ? PMLI_ABSENT
                  : pmli_persistent(b, pmli_fixed(dtype, 1, n), PML_CAUSE_OPTIMIZER, "%s", name);
}

void pmli_lay_moments(pmli_builder *b)
{
    pml_program *p = b->program;
    const pml_train_config *c = b->config;
    bool sgd = c->optimizer == PML_OPTIMIZER_SGD;
    int64_t floats = p->trained_floats, codes = 0, blocks = 0;
    if (b->status != PML_OK)
        return;
    p->ranges = calloc((size_t)p->n_parameters + 2, sizeof *p->ranges);
    if (p->ranges == NULL) {
        b->status = PML_FAIL(b->err, PML_NO_MEMORY, "no host memory for the step program");
        return;
    }
    if (in_codes(c)) {
        floats = 0;
        make_ranges(b, &floats, &codes, &blocks);
    } else { /* with decay, and without */
        const int64_t ends[] = {p->decay_floats, p->trained_floats};
        for (int i = 0; i < 2; i++) {
            int64_t first = i == 0 ? 0 : ends[0];
            if (ends[i] > first)
                p->ranges[p->n_ranges++] = (pml_range){
                    .at = first, .floats = ends[i] - first, .state = first, .decay = i == 0};
        }
    }
    p->exp_avg = p->exp_avg_sq = PMLI_ABSENT;
    if (!sgd || c->momentum > 0) /* SGD has one buffer with momentum, else none */
        p->exp_avg = keep(b, PML_F32, floats, sgd ? "momentum buffer" : "exp_avg");
    if (!sgd)
        p->exp_avg_sq = keep(b, PML_F32, floats, "exp_avg_sq");
    p->exp_avg_largest = keep(b, PML_F32, blocks, "exp_avg, largest of blocks");
    p->exp_avg_sq_largest = keep(b, PML_F32, blocks, "exp_avg_sq, largest of blocks");
    p->exp_avg_codes = keep(b, PML_U8, codes, "exp_avg, codes");
    p->exp_avg_sq_codes = keep(b, PML_U8, codes, "exp_avg_sq, codes");
}
