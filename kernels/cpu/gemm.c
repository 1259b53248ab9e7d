#include "gemm.h"

#include <string.h>

#include "few.h"
#include "pack.h"
#include "simd/tile.h"
#include "split.h"

/* A panel of B, PANEL_K deep, and a few rows of A share the first-level cache; a block of A,
 * BLOCK_ROWS high, lies in the second. */
enum { LINE = 64, PANEL_K = 256, BLOCK_ROWS = 384, PACK_ROWS = 16, MAX_PAIRS = 2 };
enum { WIDE = 1024, MANY_THREADS = 8 };
/* Where there is a matrix unit: columns of C that it takes at a time, cells of a block of A that
 * are split at a time, and products too small for that to pay. */
enum { UNIT_COLS = 2 * PMLI_STRIP, BLOCK_CELLS = 24, UNIT_LEAST = 64 };
/* Of a thread's scratch, in floats: a block of A, and behind it a panel of B. */
enum { OWN_PANEL = (PANEL_K + PMLI_TILE_COLS) * BLOCK_ROWS };
_Static_assert((OWN_PANEL + PANEL_K * PMLI_PANEL_COLS) * 4 <= PMLI_SCRATCH_BYTES, "scratch");

/* Factors of a product; A's rows and B's columns are C's. */
typedef struct pair {
    pml_view a, b;
    float alpha;
    float *panels; /* of B's columns in work, or NULL */
    /* With a matrix unit: parts that B's elements have there, its first cell in a strip, how many
     * cells it has, and how many bytes of B's strip lie before them. */
    int parts;
    int64_t cell, cells, at;
} pair;

typedef struct gemm_job {
    pmli_form form;
    pair pairs[MAX_PAIRS];
    int count;
    bool add;
    pml_view c;
    pmli_tile_fn *tile;
    pmli_split_fn *split;  /* the matrix unit's product, or NULL */
    unsigned char *strips; /* B's, for it */
    int64_t cells, pitch;  /* of a strip; bytes of one of B's */
    int64_t width;         /* of a panel */
    int64_t panels;        /* that C's columns take */
    int64_t rows, columns; /* of C that an item has; columns in panels */
    int64_t down;          /* items below one another */
    bool own;              /* every item packs what it needs of B itself */
    int64_t packs, blocks; /* items of packing, and of the product */
} gemm_job;

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t div_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline int64_t depth(pmli_form form, const pml_view *a)
{
    return pmli_depth(form, a);
}

/* Rows of op(A) and columns of op(B), and stretches of k. */
static pml_view rows_of(pmli_form form, pml_view a, int64_t first, int64_t n)
{
    return form == PMLI_TN ? pml_view_columns(a, first, n) : pmli_rows(a, first, n);
}

static pml_view columns_of(pmli_form form, pml_view b, int64_t first, int64_t n)
{
    return form == PMLI_NT ? pmli_rows(b, first, n) : pml_view_columns(b, first, n);
}

static pml_view stretch_of_a(pmli_form form, pml_view a, int64_t first, int64_t n)
{
    return form == PMLI_TN ? pmli_rows(a, first, n) : pml_view_columns(a, first, n);
}

static pml_view stretch_of_b(pmli_form form, pml_view b, int64_t first, int64_t n)
{
    return form == PMLI_NT ? pml_view_columns(b, first, n) : pmli_rows(b, first, n);
}

/* ---- by OpenBLAS, a piece a thread ---- */

static void blas_piece(void *arg, int64_t item, void *scratch)
{
    const gemm_job *job = arg;
    bool by_rows = job->c.rows >= job->c.cols;
    int64_t step = by_rows ? job->rows : job->columns, first = item * step;
    int64_t n = min64(step, (by_rows ? job->c.rows : job->c.cols) - first);
    pml_view c = by_rows ? pmli_rows(job->c, first, n) : pml_view_columns(job->c, first, n);
    for (int i = 0; i < job->count; i++) {
        const pair *p = &job->pairs[i];
        pml_view a = by_rows ? rows_of(job->form, p->a, first, n) : p->a;
        pml_view b = by_rows ? p->b : columns_of(job->form, p->b, first, n);
        pmli_gemm_here(job->form, p->alpha, a, b, job->add || i > 0 ? 1 : 0, c, scratch);
    }
}

/* The longer side is cut, so that a piece stays near square and packs little. */
static void by_blas(pmli_pool *pool, gemm_job *job)
{
    int64_t threads = pmli_pool_threads(pool);
    job->rows = div_up(job->c.rows, threads);
    job->columns = div_up(div_up(job->c.cols, threads), PMLI_TILE_COLS) * PMLI_TILE_COLS;
    if (job->c.rows >= job->c.cols && job->rows > 0)
        pmli_pool_run(pool, div_up(job->c.rows, job->rows), blas_piece, job);
    else if (job->columns > 0)
        pmli_pool_run(pool, div_up(job->c.cols, job->columns), blas_piece, job);
}

/* ---- by panels ---- */

static int64_t pack_items(const gemm_job *job, const pair *p)
{
    int64_t rows = job->split != NULL ? PMLI_CELL_K : PACK_ROWS;
    return job->form == PMLI_NT ? job->panels : div_up(depth(job->form, &p->a), rows);
}

/* Of B[n,k] a task packs one panel, of B[k,n] PACK_ROWS rows into all of them: either way it reads
 * B along its rows. */
static void pack_item(const gemm_job *job, int64_t item)
{
    const pair *p = job->pairs;
    for (int64_t items; item >= (items = pack_items(job, p)); p++)
        item -= items;
    int64_t k = depth(job->form, &p->a), n = job->c.cols, width = job->width;
    if (job->form == PMLI_NT) {
        int64_t first = item * width;
        pmli_pack_across(pmli_rows(p->b, first, min64(width, n - first)), p->alpha, width,
                         p->panels + first * k);
        return;
    }
    int64_t row = item * PACK_ROWS;
    pml_view rows = pmli_rows(p->b, row, min64(PACK_ROWS, k - row));
    for (int64_t first = 0; first < n; first += width)
        pmli_pack_straight(pml_view_columns(rows, first, min64(width, n - first)), p->alpha, width,
                           p->panels + first * k + row * width);
}

/* Where the tile finds a block of A: in place, or copied where lines a large power of two apart
 * would throw one another out of the cache. */
typedef struct left {
    const float *data;
    int64_t row, col; /* floats between rows, and between steps of k */
} left;

static left take_block(pmli_form form, const pml_view *a, float *room)
{
    enum {
        SAME_SET = 1024
    }; /* floats: lines this far apart share a set of the first-level cache */
    if (form != PMLI_TN && a->ld % SAME_SET != 0)
        return (left){a->data, a->ld, 1};
    int64_t ld = a->cols + (form == PMLI_TN ? 0 : PMLI_TILE_COLS);
    for (int64_t i = 0; i < a->rows; i++)
        memcpy(room + i * ld, (const float *)a->data + i * a->ld, (size_t)a->cols * sizeof(float));
    return form == PMLI_TN ? (left){room, 1, ld} : (left){room, ld, 1};
}

/* One block of C's rows through one pair, k in stretches. */
static void block_rows(const gemm_job *job, const pair *p, bool add, int64_t row, int64_t rows,
                       int64_t first, int64_t last, float *room)
{
    int64_t k = depth(job->form, &p->a), step = div_up(k, div_up(k, PANEL_K));
    pml_view rows_a = rows_of(job->form, p->a, row, rows);
    for (int64_t l = 0; l < k; l += step) {
        int64_t n = min64(step, k - l);
        pml_view a = stretch_of_a(job->form, rows_a, l, n);
        left at = take_block(job->form, &a, room);
        pml_view b = stretch_of_b(job->form, p->b, l, n);
        for (int64_t panel = first; panel < last; panel++) {
            int64_t col = panel * job->width, cols = min64(job->width, job->c.cols - col);
            float *c = (float *)job->c.data + row * job->c.ld + col, *own = room + OWN_PANEL;
            const float *right = job->own ? own : p->panels + col * k + l * job->width;
            if (job->own)
                pmli_pack_straight(pml_view_columns(b, col, cols), p->alpha, job->width, own);
            job->tile(rows, cols, n, at.data, at.row, at.col, right, job->width, c, job->c.ld,
                      add || l > 0);
        }
    }
}

static void block_item(const gemm_job *job, int64_t item, void *scratch)
{
    int64_t row = item % job->down * job->rows, first = item / job->down * job->columns;
    int64_t end = min64(row + job->rows, job->c.rows);
    int64_t last = min64(first + job->columns, job->panels);
    for (int64_t rows; row < end; row += rows) {
        rows = min64(BLOCK_ROWS, end - row);
        for (int i = 0; i < job->count; i++)
            block_rows(job, &job->pairs[i], job->add || i > 0, row, rows, first, last, scratch);
    }
}

/* ---- on a matrix unit ---- */

static void split_item(const gemm_job *job, int64_t item)
{
    const pair *p = job->pairs;
    for (int64_t items; item >= (items = pack_items(job, p)); p++)
        item -= items;
    int64_t k = depth(job->form, &p->a);
    unsigned char *strips = job->strips + p->at;
    if (job->form == PMLI_NT) {
        int64_t first = item * job->width, n = min64(job->width, job->c.cols - first);
        pmli_split(PMLI_RIGHT, true, pmli_rows(p->b, first, n), p->alpha, p->parts,
                   strips + first / PMLI_STRIP * job->pitch, job->pitch);
        return;
    }
    int64_t row = item * PMLI_CELL_K;
    pmli_split(PMLI_RIGHT, false, pmli_rows(p->b, row, min64(PMLI_CELL_K, k - row)), p->alpha,
               p->parts, strips + item * p->parts * PMLI_PART_BYTES, job->pitch);
}

/* Cells [from, from + n) of a block of A's rows, of whichever pairs they are. */
static void split_rows(const gemm_job *job, int64_t row, int64_t rows, int64_t from, int64_t n,
                       unsigned char *room)
{
    for (int i = 0; i < job->count; i++) {
        const pair *p = &job->pairs[i];
        int64_t first = from > p->cell ? from : p->cell, end = min64(from + n, p->cell + p->cells);
        if (first >= end)
            continue;
        int64_t at = (first - p->cell) * PMLI_CELL_K;
        int64_t k = min64((end - first) * PMLI_CELL_K, depth(job->form, &p->a) - at);
        pml_view a = stretch_of_a(job->form, rows_of(job->form, p->a, row, rows), at, k);
        pmli_split(PMLI_LEFT, job->form != PMLI_TN, a, 1, PMLI_PARTS,
                   room + (first - from) * PMLI_CELL_BYTES, n * PMLI_CELL_BYTES);
    }
}

/* Cells from `from` on that are multiplied at a time: those of one pair, or of several whose B has
 * as many parts. Where they are in B's strips, and how many parts that is. */
static int64_t run_of_cells(const gemm_job *job, int64_t from, int64_t *at, int *parts)
{
    const pair *p = job->pairs, *end = p + job->count;
    while (from >= p->cell + p->cells)
        p++;
    *parts = p->parts;
    *at = p->at + (from - p->cell) * p->parts * PMLI_PART_BYTES;
    int64_t last = p->cell + p->cells;
    while (++p < end && p->parts == *parts)
        last = p->cell + p->cells;
    return min64(BLOCK_CELLS, last - from);
}

static void unit_item(const gemm_job *job, int64_t item, void *scratch)
{
    int64_t row = item % job->down * job->rows;
    int64_t col = item / job->down * job->columns * job->width;
    int64_t end = min64(row + job->rows, job->c.rows);
    int64_t cols = min64(job->columns * job->width, job->c.cols - col);
    int64_t deepest = min64(job->cells, BLOCK_CELLS) * PMLI_CELL_BYTES;
    int64_t most = min64(BLOCK_ROWS, PMLI_SCRATCH_BYTES / deepest / 2 * UNIT_COLS);
    for (int64_t rows; row < end; row += rows) {
        rows = min64(most, end - row);
        for (int64_t from = 0, n, at; from < job->cells; from += n) {
            int parts;
            n = run_of_cells(job, from, &at, &parts);
            split_rows(job, row, rows, from, n, scratch);
            job->split(rows, cols, n, parts, scratch, n * PMLI_CELL_BYTES,
                       job->strips + col / PMLI_STRIP * job->pitch + at, job->pitch,
                       (float *)job->c.data + row * job->c.ld + col, job->c.ld,
                       job->add || from > 0);
        }
    }
}

/* ---- the cut ---- */

/* What a cut costs, in multiplications: the items that one thread gets, and of one more item the
 * part that the others wait for where a thread is held up. A float of A or B costs as much as READ
 * multiplications where few threads ask for it, and READ_MANY where many do; one of A that is split
 * for the matrix unit, SPLIT. B's columns are read once by a thread, as its items lie below one
 * another. */
static int64_t cost_of(const gemm_job *job, int64_t rows, int64_t columns, int64_t threads)
{
    enum { READ = 8, READ_MANY = 24, SPLIT = 64, HELD_UP = 4 };
    int64_t read = threads < MANY_THREADS ? READ : READ_MANY, wide = columns * job->width;
    int64_t items = div_up(job->c.rows, rows) * div_up(job->panels, columns);
    int64_t tall = job->split != NULL ? rows : rows + pmli_tile_waste(rows);
    int64_t item = tall * wide + (job->split != NULL ? SPLIT : read) * rows;
    return div_up(items, threads) * item + read * wide + item / HELD_UP;
}

/* Cut C into one piece a thread, or several, so that no thread gets much more than its share, and
 * that they read little. Where A is split it is done anew for each piece: there is one. */
static void cut(gemm_job *job, int64_t threads)
{
    enum { STEP = 4, PIECES = 4 };
    int64_t step = job->split != NULL ? UNIT_COLS : STEP, most = job->split != NULL ? 1 : PIECES;
    int64_t best = INT64_MAX;
    for (int64_t pieces = 1; pieces <= most; pieces *= 2)
        for (int64_t across = 1; across <= min64(threads * pieces, job->panels); across++) {
            int64_t columns = div_up(job->panels, across);
            int64_t down = div_up(threads * pieces, across);
            int64_t rows = div_up(div_up(job->c.rows, down), step) * step;
            int64_t cost = cost_of(job, rows, columns, threads);
            if (cost >= best)
                continue;
            best = cost;
            job->rows = rows;
            job->columns = columns;
        }
    job->down = div_up(job->c.rows, job->rows);
    job->blocks = job->down * div_up(job->panels, job->columns);
}

/* ---- several at a time ---- */

/* Jobs whose panels fit the pool's common memory together. */
typedef struct batch {
    gemm_job *jobs;
    int count, threads;
} batch;

/* Items of the jobs in turn, so that every thread gets its share of each. */
static void pack_task(void *arg, int64_t item, void *scratch)
{
    (void)scratch;
    const batch *all = arg;
    const gemm_job *job = &all->jobs[item % all->count];
    if (item / all->count >= job->packs)
        return;
    if (job->split != NULL)
        split_item(job, item / all->count);
    else
        pack_item(job, item / all->count);
}

/* Items of the product that all threads before `thread` have. */
static int64_t before(const batch *all, int64_t thread)
{
    int64_t items = 0;
    for (int i = 0; i < all->count; i++)
        items += all->jobs[i].blocks * thread / all->threads;
    return items;
}

/* A thread has its share of one job, then of the next: what it reads of B stays in its cache. */
static void block_task(void *arg, int64_t item, void *scratch)
{
    const batch *all = arg;
    int64_t low = 0, high = all->threads; /* before(low) <= item < before(high) */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (before(all, middle) <= item)
            low = middle;
        else
            high = middle;
    }
    const gemm_job *job = all->jobs;
    int64_t at = item - before(all, low);
    for (;; job++) {
        int64_t first = job->blocks * low / all->threads;
        int64_t mine = job->blocks * (low + 1) / all->threads - first;
        if (at < mine) {
            at += first;
            break;
        }
        at -= mine;
    }
    if (job->split != NULL)
        unit_item(job, at, scratch);
    else
        block_item(job, at, scratch);
}

/* Gives a job its place from `at` on; where the next begins is returned. */
static unsigned char *place(gemm_job *job, int threads, unsigned char *at)
{
    job->strips = at;
    job->panels = div_up(job->c.cols, job->width);
    job->packs = job->cells = job->pitch = 0;
    for (int i = 0; i < job->count; i++) {
        pair *p = &job->pairs[i];
        job->packs += job->own ? 0 : pack_items(job, p);
        p->panels = (float *)(void *)at;
        at += job->own || job->split != NULL
                  ? 0
                  : job->panels * job->width * depth(job->form, &p->a) * (int64_t)sizeof(float);
        p->cell = job->cells;
        p->cells = div_up(depth(job->form, &p->a), PMLI_CELL_K);
        p->at = job->pitch;
        job->cells += p->cells;
        job->pitch += p->cells * p->parts * PMLI_PART_BYTES;
    }
    cut(job, threads);
    if (job->split != NULL)
        at += job->panels * (job->width / PMLI_STRIP) * job->pitch;
    return job->strips + div_up(at - job->strips, LINE) * LINE;
}

static void run_jobs(pmli_pool *pool, gemm_job *jobs, int count)
{
    batch all = {jobs, count, pmli_pool_threads(pool)};
    int64_t packs = 0, blocks = 0;
    unsigned char *at = pmli_pool_common(pool);
    for (int i = 0; i < count; i++) {
        at = place(&jobs[i], pmli_pool_threads(pool), at);
        packs = jobs[i].packs > packs ? jobs[i].packs : packs;
        blocks += jobs[i].blocks;
    }
    pmli_pool_run(pool, packs * count, pack_task, &all);
    pmli_pool_run(pool, blocks, block_task, &all);
}

/* All of k, in chunks of what fits `most` floats of depth; a chunk takes the end of one pair and
 * the beginning of the next. */
static void run_columns(pmli_pool *pool, const gemm_job *whole, int64_t most)
{
    gemm_job job = *whole;
    int64_t done = 0, room = most;
    job.count = 0;
    for (int i = 0; i < whole->count; done = 0, i++) {
        const pair *p = &whole->pairs[i];
        for (int64_t k = depth(whole->form, &p->a), n; done < k; done += n) {
            if (room < min64(k - done, PANEL_K)) {
                run_jobs(pool, &job, 1);
                job.add = true;
                job.count = 0;
                room = most;
            }
            n = min64(k - done, room);
            job.pairs[job.count++] = (pair){.a = stretch_of_a(whole->form, p->a, done, n),
                                            .b = stretch_of_b(whole->form, p->b, done, n),
                                            .alpha = p->alpha,
                                            .parts = p->parts};
            room -= div_up(n, PMLI_CELL_K) * PMLI_CELL_K;
        }
    }
    if (job.count > 0)
        run_jobs(pool, &job, 1);
}

static gemm_job columns_job(const gemm_job *whole, int64_t first, int64_t n)
{
    gemm_job job = *whole;
    job.c = pml_view_columns(job.c, first, n);
    for (int i = 0; i < job.count; i++)
        job.pairs[i].b = columns_of(job.form, job.pairs[i].b, first, n);
    return job;
}

/* What a product takes of the common memory: a column of C, and of that a row of k at most. */
typedef struct need {
    int64_t deep, column, row;
} need;

/* Columns of C that leave room for all of k, or at least for a deep stretch; and rows for n
 * columns. */
static int64_t most_columns(const gemm_job *job, const need *of)
{
    if (job->own)
        return job->c.cols;
    return of->deep > WIDE ? WIDE : PMLI_COMMON_BYTES / of->column / job->width * job->width;
}

static int64_t most_depth(const gemm_job *job, int64_t n, const need *of)
{
    if (job->own)
        return of->deep;
    return PMLI_COMMON_BYTES / (div_up(n, job->width) * job->width * of->row) / PMLI_CELL_K *
           PMLI_CELL_K;
}

/* Splitting both factors is more of the work the fewer columns a thread has: many threads are
 * faster without the unit (docs/performance/cpu.md), but for factors that need no splitting. */
bool pmli_gemm_on_unit(int threads, pml_dtype right)
{
    return threads < MANY_THREADS || right == PML_BF16;
}

/* How a product is to be made; columns that panels take are returned. */
static int64_t prepare(gemm_job *job, need *of, int threads)
{
    int64_t tiled = job->c.cols / PMLI_TILE_COLS * PMLI_TILE_COLS;
    *of = (need){0};
    for (int i = 0; i < job->count; i++)
        of->deep += div_up(depth(job->form, &job->pairs[i].a), PMLI_CELL_K) * PMLI_CELL_K;
    job->width = pmli_tile_width();
    of->row = sizeof(float);
    of->column = of->deep * of->row;
    if (of->deep == 0 || job->width == 0 || tiled == 0)
        return 0;
    job->tile = pmli_tile_pick();
    bool unit = pmli_gemm_on_unit(threads, job->pairs[0].b.dtype);
    if (unit && min64(min64(job->c.rows, tiled), of->deep) >= UNIT_LEAST)
        job->split = pmli_split_pick();
    job->own = job->split == NULL && job->form == PMLI_TN;
    if (job->own)
        of->column = 0;
    if (job->split == NULL)
        return tiled;
    job->width = UNIT_COLS;
    of->row = of->column = 0;
    for (int i = 0; i < job->count; i++) {
        pair *p = &job->pairs[i];
        p->parts = p->b.dtype == PML_BF16 && p->alpha == 1 ? 1 : PMLI_PARTS;
        int64_t row = p->parts * (int64_t)sizeof(uint16_t);
        of->row = row > of->row ? row : of->row;
        of->column += div_up(depth(job->form, &p->a), PMLI_CELL_K) * PMLI_CELL_K * row;
    }
    return tiled;
}

/* A product too large for the common memory, or with columns that panels do not take. */
static void run_in_parts(pmli_pool *pool, const gemm_job *job, int64_t tiled, const need *of)
{
    int64_t most = tiled > 0 ? most_columns(job, of) : 0;
    for (int64_t first = 0, n; first < tiled; first += n) {
        n = min64(most, tiled - first);
        gemm_job part = columns_job(job, first, n);
        run_columns(pool, &part, most_depth(job, n, of));
    }
    if (tiled < job->c.cols) {
        gemm_job rest = columns_job(job, tiled, job->c.cols - tiled);
        by_blas(pool, &rest);
    }
}

/* A pair without depth adds nothing; alone it still says that C is to be written. */
static gemm_job job_of(const pmli_product *p)
{
    gemm_job job = {.form = p->form, .count = 1, .add = p->beta != 0, .c = p->c};
    job.pairs[0] = (pair){.a = p->a, .b = p->b, .alpha = p->alpha};
    if (p->a2.data != NULL && depth(p->form, &p->a2) > 0) {
        job.count = depth(p->form, &p->a) > 0 ? 1 : 0;
        job.pairs[job.count++] = (pair){.a = p->a2, .b = p->b2, .alpha = 1};
    }
    return job;
}

void pmli_gemm_all(pmli_pool *pool, const pmli_product *products, int count)
{
    gemm_job ready[PMLI_PRODUCTS];
    int64_t taken = 0;
    int waiting = 0, few = 0;
    while (few < count && products[few].c.rows < PMLI_FEW_ROWS)
        few++;
    if (few == count) {
        pmli_few_all(pool, products, count);
        return;
    }
    for (int i = 0; i < count; i++) {
        if (products[i].c.rows < PMLI_FEW_ROWS) {
            pmli_few_all(pool, &products[i], 1);
            continue;
        }
        gemm_job job = job_of(&products[i]);
        need of;
        int64_t tiled = prepare(&job, &of, pmli_pool_threads(pool));
        int64_t bytes = div_up(job.c.cols, job.width > 0 ? job.width : 1) * job.width * of.column;
        if (tiled < job.c.cols || bytes > PMLI_COMMON_BYTES) {
            run_in_parts(pool, &job, tiled, &of);
            continue;
        }
        if (waiting == PMLI_PRODUCTS || taken + bytes > PMLI_COMMON_BYTES) {
            run_jobs(pool, ready, waiting);
            waiting = 0;
            taken = 0;
        }
        ready[waiting++] = job;
        taken += bytes;
    }
    if (waiting > 0)
        run_jobs(pool, ready, waiting);
}

void pmli_gemm(pmli_pool *pool, pmli_form form, float alpha, pml_view a, pml_view b, float beta,
               pml_view c)
{
    pmli_product one = {.form = form, .alpha = alpha, .a = a, .b = b, .beta = beta, .c = c};
    pmli_gemm_all(pool, &one, 1);
}
