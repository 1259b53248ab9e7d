#include "pml/data/sampler.h"

#include <stdlib.h>
#include <string.h>

#include "pml/base/philox.h"
#include "pml/data/packing.h"

enum { NO_LABEL = -100, MAX_LENGTH_LIMIT = 1 << 24, MEASURED_AT_ONCE = 1 << 14 };

/* Of bins that are rows, longer first; the place in the permutation decides between equals. */
typedef struct placed {
    int64_t bin, place;
    int32_t length;
} placed;

/* Rows by bin:
 *
 *   order      [ b3 b0 b2 b1 ]            this epoch's bins
 *   bin_first  [ 0    2 3    6 … ]        n_bins + 1
 *   bin_rows   [ r0 r4 | r1 | r2 r3 r5 … ]
 *
 * Without packing bin i is row i. */
struct pml_sampler {
    const pml_shard *shard;
    pml_sampler_options options;
    int64_t n_rows, n_bins, rows_cut;
    int32_t *length; /* [rows] tokens after cutting */
    int32_t *learns; /* [rows] labels whose predecessor is in the row too */
    int64_t *bin_first, *bin_rows;
    int64_t *order;
    placed *placed;               /* [rows] scratch of group_by_length */
    int32_t grouped_accumulation; /* as it began: tuning it may not change an epoch's order */
    int64_t order_epoch;          /* whose order is in `order`, -1 = none yet */
    int32_t max_tokens, max_docs, max_labels, max_doc;
    int32_t *ids, *positions, *cu_seqlens, *label_rows, *labels; /* room for the bounds */
    int64_t *places;
    int32_t *row_labels; /* of the row being laid down, [max_doc] */
};

/* ---- construction ---- */

static pml_status check_options(const pml_sampler_options *o, pml_error *err)
{
    if (o->batch_size < 1 || o->accumulation < 1)
        return PML_FAIL(err, PML_INVALID, "batch size %d and accumulation %d must be at least 1",
                        (int)o->batch_size, (int)o->accumulation);
    if (o->world < 1 || o->rank < 0 || o->rank >= o->world)
        return PML_FAIL(err, PML_INVALID, "rank %d of %d workers", (int)o->rank, (int)o->world);
    if (o->group_by_length && (o->packing || !o->shuffle))
        return PML_FAIL(err, PML_INVALID, "group_by_length needs rows as they are, shuffled");
    if (o->max_length < 1 || o->max_length > MAX_LENGTH_LIMIT)
        return PML_FAIL(err, PML_INVALID, "max_length is %d, it must be from 1 to %d",
                        (int)o->max_length, MAX_LENGTH_LIMIT);
    return PML_OK;
}

static void *room_for(int64_t n, size_t element)
{
    return calloc(n > 0 ? (size_t)n : 1, element);
}

/* Labels of a stretch of the shard, which its rows are passed in order with. */
typedef struct stretch {
    int32_t *labels;
    int64_t first, n, room;
} stretch;

/* The labels of a row's first n tokens. */
static pml_status labels_of(const pml_shard *shard, int64_t row, int32_t n, stretch *s,
                            const int32_t **labels, pml_error *err)
{
    const int64_t at = pml_shard_offset(shard, row);
    pml_status status = PML_OK;
    if (at + n > s->first + s->n) {
        const int64_t left = pml_shard_tokens(shard) - at;
        s->first = at;
        s->n = left < s->room ? left : s->room;
        status = pml_shard_read(shard, at, s->n, NULL, s->labels, err);
    }
    *labels = s->labels + (at - s->first);
    return status;
}

/* What each row has to learn, added to *total. */
static pml_status count_labels(pml_sampler *s, int64_t *total, pml_error *err)
{
    stretch read = {.room = s->max_doc > MEASURED_AT_ONCE ? s->max_doc : MEASURED_AT_ONCE};
    read.labels = room_for(read.room, sizeof *read.labels);
    if (read.labels == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for %lld labels", (long long)read.room);
    pml_status status = PML_OK;
    for (int64_t row = 0; status == PML_OK && row < s->n_rows; row++) {
        const int32_t *labels;
        status = labels_of(s->shard, row, s->length[row], &read, &labels, err);
        for (int32_t i = 1; status == PML_OK && i < s->length[row]; i++)
            s->learns[row] += labels[i] != NO_LABEL;
        *total += s->learns[row];
    }
    free(read.labels);
    return status;
}

/* One pass over the shard: lengths after cutting, and what each row has to learn. */
static pml_status measure_rows(pml_sampler *s, pml_error *err)
{
    int64_t total = 0;
    for (int64_t row = 0; row < s->n_rows; row++) {
        int32_t n = pml_shard_length(s->shard, row);
        if (n > s->options.max_length) {
            n = s->options.max_length;
            s->rows_cut++;
        }
        s->length[row] = n;
        if (n > s->max_doc)
            s->max_doc = n;
    }
    pml_status status = count_labels(s, &total, err);
    if (status != PML_OK)
        return status;
    if (total == 0)
        return PML_FAIL(err, PML_INVALID,
                        "no row of the data has a label: there is nothing to learn (all labels are "
                        "-100, beyond max_length = %d, or on a row's first token)",
                        (int)s->options.max_length);
    return PML_OK;
}

/* bin_of_row -> bin_first, bin_rows: rows of a bin in file order. */
static void group_rows(pml_sampler *s, const int64_t *bin_of_row)
{
    for (int64_t row = 0; row < s->n_rows; row++)
        s->bin_first[bin_of_row[row] + 1]++;
    for (int64_t bin = 0; bin < s->n_bins; bin++)
        s->bin_first[bin + 1] += s->bin_first[bin];
    /* order is free until the first epoch: it counts how full each bin is. */
    for (int64_t row = 0; row < s->n_rows; row++) {
        int64_t bin = bin_of_row[row];
        s->bin_rows[s->bin_first[bin] + s->order[bin]++] = row;
    }
}

static pml_status make_bins(pml_sampler *s, pml_error *err)
{
    int64_t *bin_of_row = room_for(s->n_rows, sizeof *bin_of_row);
    if (bin_of_row == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for %lld rows", (long long)s->n_rows);
    pml_status status = PML_OK;
    if (s->options.packing) {
        status = pml_pack(s->length, s->n_rows, s->options.max_length, bin_of_row, &s->n_bins, err);
    } else {
        s->n_bins = s->n_rows;
        for (int64_t row = 0; row < s->n_rows; row++)
            bin_of_row[row] = row;
    }
    if (status == PML_OK)
        group_rows(s, bin_of_row);
    free(bin_of_row);
    return status;
}

typedef struct amount {
    int64_t tokens, docs, labels;
} amount;

static amount bin_amount(const pml_sampler *s, int64_t bin)
{
    amount a = {0, s->bin_first[bin + 1] - s->bin_first[bin], 0};
    for (int64_t i = s->bin_first[bin]; i < s->bin_first[bin + 1]; i++) {
        a.tokens += s->length[s->bin_rows[i]];
        a.labels += s->learns[s->bin_rows[i]];
    }
    return a;
}

static int descending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* What the `take` greatest of n values add up to. */
static int64_t sum_of_greatest(int64_t *values, int64_t n, int64_t take)
{
    int64_t sum = 0;
    qsort(values, (size_t)n, sizeof *values, descending);
    for (int64_t i = 0; i < n && i < take; i++)
        sum += values[i];
    return sum;
}

/* Shuffled: any bins may meet, so the greatest of each kind. In file order: only neighbours do. */
static pml_status find_greatest(const pml_sampler *s, amount *greatest, pml_error *err)
{
    int64_t batch = s->options.batch_size;
    *greatest = (amount){0, 0, 0};
    if (!s->options.shuffle) {
        for (int64_t first = 0; first < s->n_bins; first += batch) {
            amount sum = {0, 0, 0};
            for (int64_t bin = first; bin < s->n_bins && bin < first + batch; bin++) {
                amount a = bin_amount(s, bin);
                sum = (amount){sum.tokens + a.tokens, sum.docs + a.docs, sum.labels + a.labels};
            }
            greatest->tokens = sum.tokens > greatest->tokens ? sum.tokens : greatest->tokens;
            greatest->docs = sum.docs > greatest->docs ? sum.docs : greatest->docs;
            greatest->labels = sum.labels > greatest->labels ? sum.labels : greatest->labels;
        }
        return PML_OK;
    }
    int64_t *values = room_for(s->n_bins, sizeof *values);
    if (values == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for %lld rows", (long long)s->n_bins);
    for (int64_t bin = 0; bin < s->n_bins; bin++)
        values[bin] = bin_amount(s, bin).tokens;
    greatest->tokens = sum_of_greatest(values, s->n_bins, batch);
    for (int64_t bin = 0; bin < s->n_bins; bin++)
        values[bin] = bin_amount(s, bin).docs;
    greatest->docs = sum_of_greatest(values, s->n_bins, batch);
    for (int64_t bin = 0; bin < s->n_bins; bin++)
        values[bin] = bin_amount(s, bin).labels;
    greatest->labels = sum_of_greatest(values, s->n_bins, batch);
    free(values);
    return PML_OK;
}

static pml_status make_buffers(pml_sampler *s, pml_error *err)
{
    amount greatest;
    pml_status status = find_greatest(s, &greatest, err);
    if (status != PML_OK)
        return status;
    if (greatest.tokens >= INT32_MAX)
        return PML_FAIL(err, PML_INVALID,
                        "a micro-batch of %d rows would have %lld tokens, more than fits; lower "
                        "per_device_train_batch_size or max_length",
                        (int)s->options.batch_size, (long long)greatest.tokens);
    s->max_tokens = (int32_t)greatest.tokens;
    s->max_docs = (int32_t)greatest.docs;
    s->max_labels = (int32_t)greatest.labels;
    s->ids = room_for(s->max_tokens, sizeof *s->ids);
    s->positions = room_for(s->max_tokens, sizeof *s->positions);
    s->places = room_for(s->max_tokens, sizeof *s->places);
    s->cu_seqlens = room_for((int64_t)s->max_docs + 1, sizeof *s->cu_seqlens);
    s->label_rows = room_for(s->max_labels, sizeof *s->label_rows);
    s->labels = room_for(s->max_labels, sizeof *s->labels);
    s->row_labels = room_for(s->max_doc, sizeof *s->row_labels);
    if (s->ids == NULL || s->positions == NULL || s->cu_seqlens == NULL || s->label_rows == NULL ||
        s->labels == NULL || s->places == NULL || s->row_labels == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a micro-batch of %d tokens",
                        (int)s->max_tokens);
    return PML_OK;
}

pml_status pml_sampler_new(const pml_shard *shard, const pml_sampler_options *options,
                           pml_sampler **sampler, pml_error *err)
{
    pml_status status = check_options(options, err);
    if (status != PML_OK)
        return status;
    pml_sampler *s = calloc(1, sizeof *s);
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a sampler");
    s->shard = shard;
    s->options = *options;
    s->grouped_accumulation = options->accumulation;
    s->order_epoch = -1;
    s->n_rows = pml_shard_rows(shard);
    s->length = room_for(s->n_rows, sizeof *s->length);
    s->learns = room_for(s->n_rows, sizeof *s->learns);
    s->bin_first = room_for(s->n_rows + 1, sizeof *s->bin_first);
    s->bin_rows = room_for(s->n_rows, sizeof *s->bin_rows);
    s->order = room_for(s->n_rows, sizeof *s->order);
    s->placed = room_for(options->group_by_length ? s->n_rows : 0, sizeof *s->placed);
    if (s->length == NULL || s->learns == NULL || s->bin_first == NULL || s->bin_rows == NULL ||
        s->order == NULL || s->placed == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory for %lld rows", (long long)s->n_rows);
    if (status == PML_OK)
        status = measure_rows(s, err);
    if (status == PML_OK)
        status = make_bins(s, err);
    if (status == PML_OK)
        status = make_buffers(s, err);
    if (status != PML_OK) {
        pml_sampler_destroy(&s);
        return status;
    }
    *sampler = s;
    return PML_OK;
}

void pml_sampler_destroy(pml_sampler **sampler)
{
    pml_sampler *s = *sampler;
    if (s == NULL)
        return;
    free(s->length);
    free(s->learns);
    free(s->bin_first);
    free(s->bin_rows);
    free(s->order);
    free(s->placed);
    free(s->ids);
    free(s->positions);
    free(s->cu_seqlens);
    free(s->label_rows);
    free(s->labels);
    free(s->places);
    free(s->row_labels);
    free(s);
    *sampler = NULL;
}

/* ---- counts ---- */

static int64_t micros_per_epoch(const pml_sampler *s)
{
    return (s->n_bins + s->options.batch_size - 1) / s->options.batch_size;
}

/* Micro-batches that one step takes over all ranks. */
static int64_t micros_per_step(const pml_sampler *s)
{
    return (int64_t)s->options.accumulation * s->options.world;
}

int64_t pml_sampler_steps_per_epoch(const pml_sampler *sampler)
{
    int64_t step = micros_per_step(sampler);
    return (micros_per_epoch(sampler) + step - 1) / step;
}

int64_t pml_sampler_rows(const pml_sampler *sampler)
{
    return sampler->n_bins;
}

int64_t pml_sampler_rows_cut(const pml_sampler *sampler)
{
    return sampler->rows_cut;
}

void pml_sampler_bounds(const pml_sampler *sampler, int32_t *tokens, int32_t *docs, int32_t *labels)
{
    *tokens = sampler->max_tokens;
    *docs = sampler->max_docs;
    *labels = sampler->max_labels;
}

int32_t pml_sampler_max_doc(const pml_sampler *sampler)
{
    return sampler->max_doc;
}

/* ---- drawing ---- */

/* Bits 64..127 of a * b: a uniform 64-bit word becomes a number below b. The bias is b / 2^64. */
static uint64_t multiply_high(uint64_t a, uint64_t b)
{
    __extension__ typedef unsigned __int128 wide;
    return (uint64_t)((wide)a * b >> 64);
}

static int longer_first(const void *left, const void *right)
{
    const placed *a = left, *b = right;
    if (a->length != b->length)
        return a->length < b->length ? 1 : -1;
    return (a->place > b->place) - (a->place < b->place);
}

/* As transformers' get_length_grouped_indices: runs of `many` steps' rows, fewer where there would
 * be under four of them. */
static void group_by_length(pml_sampler *s)
{
    enum { MANY = 50 };
    int64_t step = (int64_t)s->options.batch_size * s->grouped_accumulation;
    int64_t many = s->n_bins / (step * 4);
    many = many > MANY ? MANY : many < 1 ? 1 : many;
    int64_t longest = 0;
    for (int64_t first = 0; first < s->n_bins; first += many * step) {
        int64_t n = s->n_bins - first < many * step ? s->n_bins - first : many * step;
        for (int64_t i = 0; i < n; i++)
            s->placed[i] = (placed){s->order[first + i], i, s->length[s->order[first + i]]};
        qsort(s->placed, (size_t)n, sizeof *s->placed, longer_first);
        for (int64_t i = 0; i < n; i++)
            s->order[first + i] = s->placed[i].bin;
        if (s->length[s->order[first]] > s->length[s->order[longest]])
            longest = first;
    }
    int64_t first = s->order[0];
    s->order[0] = s->order[longest];
    s->order[longest] = first;
}

/* Fisher and Yates, with a number for each place that depends on (seed, epoch, place) only. */
static void set_order(pml_sampler *s, int64_t epoch)
{
    if (s->order_epoch == epoch)
        return;
    for (int64_t i = 0; i < s->n_bins; i++)
        s->order[i] = i;
    for (int64_t i = s->n_bins - 1; i > 0 && s->options.shuffle; i--) {
        pml_philox r =
            pml_philox_at(s->options.seed, (uint64_t)epoch, PML_PURPOSE_SHUFFLE, (uint64_t)i);
        uint64_t word = (uint64_t)r.word[1] << 32 | r.word[0];
        int64_t j = (int64_t)multiply_high(word, (uint64_t)i + 1);
        int64_t swapped = s->order[i];
        s->order[i] = s->order[j];
        s->order[j] = swapped;
    }
    if (s->options.group_by_length)
        group_by_length(s);
    s->order_epoch = epoch;
}

/* First and last + 1 bin (places in order) of this rank's micro-batch `index`; none beyond the end.
 */
static void micro_range(const pml_sampler *s, pml_cursor cursor, int32_t index, int64_t *first,
                        int64_t *last)
{
    int64_t micro = cursor.micro + (int64_t)index * s->options.world + s->options.rank;
    *first = *last = 0;
    if (micro >= micros_per_epoch(s))
        return;
    *first = micro * s->options.batch_size;
    *last = *first + s->options.batch_size;
    if (*last > s->n_bins)
        *last = s->n_bins;
}

/* The epoch is one 32-bit word of Philox's counter. */
static bool is_inside(const pml_sampler *s, pml_cursor cursor)
{
    return cursor.epoch >= 0 && cursor.epoch < INT32_MAX && cursor.micro >= 0 &&
           cursor.micro < micros_per_epoch(s);
}

int32_t pml_sampler_micros(const pml_sampler *sampler, pml_cursor cursor)
{
    if (!is_inside(sampler, cursor))
        return 0;
    int64_t left = micros_per_epoch(sampler) - cursor.micro - sampler->options.rank;
    int64_t world = sampler->options.world;
    int64_t mine = left <= 0 ? 0 : (left + world - 1) / world;
    return mine < sampler->options.accumulation ? (int32_t)mine : sampler->options.accumulation;
}

static pml_status put_row(pml_sampler *s, int64_t row, pml_batch *b, pml_error *err)
{
    const int32_t *labels = s->row_labels;
    const int32_t n = s->length[row], at = b->n_tokens;
    const int64_t place = pml_shard_offset(s->shard, row);
    pml_status status = pml_shard_read(s->shard, place, n, s->ids + at, s->row_labels, err);
    if (status != PML_OK)
        return status;
    for (int32_t i = 0; i < n; i++) {
        s->positions[at + i] = i;
        s->places[at + i] = place + i;
    }
    for (int32_t i = 0; i + 1 < n; i++) {
        if (labels[i + 1] == NO_LABEL)
            continue;
        s->label_rows[b->n_labels] = at + i;
        s->labels[b->n_labels++] = labels[i + 1];
    }
    b->n_tokens += n;
    s->cu_seqlens[++b->n_docs] = b->n_tokens;
    if (n > b->max_doc)
        b->max_doc = n;
    return PML_OK;
}

pml_status pml_sampler_batch(pml_sampler *sampler, pml_cursor cursor, int32_t index,
                             pml_batch *batch, pml_error *err)
{
    pml_sampler *s = sampler;
    if (!is_inside(s, cursor))
        return PML_FAIL(err, PML_INVALID,
                        "the data has %lld micro-batches an epoch, none at epoch %lld, micro-batch "
                        "%lld",
                        (long long)micros_per_epoch(s), (long long)cursor.epoch,
                        (long long)cursor.micro);
    if (index < 0 || index >= s->options.accumulation)
        return PML_FAIL(err, PML_INVALID, "micro-batch %d of %d", (int)index,
                        (int)s->options.accumulation);
    set_order(s, cursor.epoch);
    *batch = (pml_batch){.ids = s->ids,
                         .positions = s->positions,
                         .cu_seqlens = s->cu_seqlens,
                         .label_rows = s->label_rows,
                         .labels = s->labels,
                         .places = s->places};
    s->cu_seqlens[0] = 0;
    int64_t first, last;
    micro_range(s, cursor, index, &first, &last);
    pml_status status = PML_OK;
    for (int64_t place = first; place < last; place++) {
        int64_t bin = s->order[place];
        for (int64_t i = s->bin_first[bin]; status == PML_OK && i < s->bin_first[bin + 1]; i++)
            status = put_row(s, s->bin_rows[i], batch, err);
    }
    return status;
}

pml_share pml_sampler_share(pml_sampler *sampler, pml_cursor cursor)
{
    pml_share total = {0};
    int32_t micros = pml_sampler_micros(sampler, cursor);
    if (micros > 0)
        set_order(sampler, cursor.epoch);
    for (int32_t index = 0; index < micros; index++) {
        int64_t first, last;
        micro_range(sampler, cursor, index, &first, &last);
        for (int64_t place = first; place < last; place++) {
            amount a = bin_amount(sampler, sampler->order[place]);
            total.labels += a.labels;
            total.tokens += a.tokens;
        }
    }
    return total;
}

pml_cursor pml_sampler_next(const pml_sampler *sampler, pml_cursor cursor)
{
    if (!is_inside(sampler, cursor))
        return cursor;
    cursor.micro += micros_per_step(sampler);
    if (cursor.micro >= micros_per_epoch(sampler))
        cursor = (pml_cursor){cursor.epoch + 1, 0};
    return cursor;
}

pml_status pml_sampler_set_accumulation(pml_sampler *sampler, int32_t accumulation, pml_error *err)
{
    pml_sampler_options changed = sampler->options;
    changed.accumulation = accumulation;
    pml_status status = check_options(&changed, err);
    if (status == PML_OK)
        sampler->options = changed;
    return status;
}
