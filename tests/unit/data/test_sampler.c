#include "shard_file.h"

#include "pml/base/philox.h"
#include "pml/data/packing.h"
#include "pml/data/sampler.h"

enum { N_ROWS = 137, MAX_LENGTH = 40 };

static pml_shard *shard; /* N_ROWS rows of 1..60 tokens */
static int32_t lengths[N_ROWS];

static int setup(void **state)
{
    if (scratch_setup(state) != 0)
        return -1;
    for (int r = 0; r < N_ROWS; r++)
        lengths[r] = 1 + (int32_t)(pml_philox_at(1, 0, 0, (uint64_t)r).word[0] % 60);
    shard = made_shard("rows", lengths, N_ROWS);
    return 0;
}

static int teardown(void **state)
{
    pml_shard_close(&shard);
    return scratch_teardown(state);
}

static int32_t cut(int32_t length)
{
    return length < MAX_LENGTH ? length : MAX_LENGTH;
}

static pml_sampler *sampler_of(pml_sampler_options options)
{
    pml_sampler *sampler = NULL;
    EXPECT_OK(pml_sampler_new(shard, &options, &sampler, e));
    return sampler;
}

/* Everything a batch must be, from the rows its ids name. Adds to seen[row]. Returns its rows. */
static int check_content(const pml_batch *b, int seen[N_ROWS])
{
    int32_t label = 0, longest = 0;
    EXPECT_OK(pml_batch_check(b, SHARD_VOCAB, MAX_LENGTH, e));
    for (int32_t d = 0; d < b->n_docs; d++) {
        int32_t at = b->cu_seqlens[d], n = b->cu_seqlens[d + 1] - at, row = b->ids[at] / 1000;
        assert_int_equal(n, cut(lengths[row]));
        seen[row]++;
        longest = n > longest ? n : longest;
        for (int32_t t = 0; t < n; t++) {
            assert_int_equal(b->ids[at + t], row * 1000 + t);
            assert_int_equal(b->positions[at + t], t);
            if (t + 1 < n && (row + t + 1) % 5 != 4) {
                assert_true(label < b->n_labels);
                assert_int_equal(b->label_rows[label], at + t);
                assert_int_equal(b->labels[label], row * 1000 + t + 1);
                label++;
            }
        }
    }
    assert_int_equal(label, b->n_labels);
    assert_int_equal(longest, b->max_doc);
    return b->n_docs;
}

/* One epoch of all ranks: each row once, counts that agree, bounds that hold. */
static void check_epoch(pml_sampler_options options, int64_t epoch)
{
    int seen[N_ROWS] = {0};
    for (options.rank = 0; options.rank < options.world; options.rank++) {
        pml_sampler *s = sampler_of(options);
        int32_t tokens, docs, labels;
        int64_t steps = 0;
        pml_sampler_bounds(s, &tokens, &docs, &labels);
        for (pml_cursor at = {epoch, 0}; at.epoch == epoch; at = pml_sampler_next(s, at), steps++) {
            int64_t labels_drawn = 0, tokens_drawn = 0;
            int32_t micros = pml_sampler_micros(s, at);
            for (int32_t i = 0; i < options.accumulation; i++) {
                pml_batch batch;
                EXPECT_OK(pml_sampler_batch(s, at, i, &batch, e));
                assert_true((batch.n_tokens > 0) == (i < micros));
                assert_true(batch.n_tokens <= tokens && batch.n_docs <= docs);
                assert_true(batch.n_labels <= labels && batch.max_doc <= pml_sampler_max_doc(s));
                if (!options.packing)
                    assert_true(batch.n_docs <= options.batch_size);
                check_content(&batch, seen);
                labels_drawn += batch.n_labels;
                tokens_drawn += batch.n_tokens;
            }
            assert_int_equal(labels_drawn, pml_sampler_share(s, at).labels);
            assert_int_equal(tokens_drawn, pml_sampler_share(s, at).tokens);
        }
        assert_int_equal(steps, pml_sampler_steps_per_epoch(s));
        pml_sampler_destroy(&s);
        assert_null(s);
    }
    for (int r = 0; r < N_ROWS; r++)
        assert_int_equal(seen[r], 1);
}

static void test_every_row_once_an_epoch(void **state)
{
    (void)state;
    static const int32_t shapes[][3] = {/* batch, accumulation, world */
                                        {1, 1, 1},
                                        {4, 1, 1},
                                        {4, 3, 2},
                                        {7, 2, 3},
                                        {200, 2, 2}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int mode = 0; mode < 4; mode++)
            for (int64_t epoch = 0; epoch < 2; epoch++)
                check_epoch((pml_sampler_options){.batch_size = shapes[i][0],
                                                  .accumulation = shapes[i][1],
                                                  .world = shapes[i][2],
                                                  .max_length = MAX_LENGTH,
                                                  .packing = mode & 1,
                                                  .shuffle = mode & 2,
                                                  .seed = 42},
                            epoch);
}

static const pml_sampler_options plain = {
    .batch_size = 4, .accumulation = 2, .world = 1, .max_length = MAX_LENGTH, .seed = 42};

/* The file's order, as a Trainer without a random sampler draws it. */
static void test_file_order(void **state)
{
    (void)state;
    pml_sampler *s = sampler_of(plain);
    int32_t row = 0;
    assert_int_equal(pml_sampler_rows(s), N_ROWS);
    assert_int_equal(pml_sampler_steps_per_epoch(s), 18); /* 35 micro-batches */
    for (pml_cursor at = {0, 0}; at.epoch == 0; at = pml_sampler_next(s, at))
        for (int32_t i = 0; i < pml_sampler_micros(s, at); i++) {
            pml_batch batch;
            EXPECT_OK(pml_sampler_batch(s, at, i, &batch, e));
            assert_int_equal(batch.n_docs, row + 4 <= N_ROWS ? 4 : N_ROWS - row);
            for (int32_t d = 0; d < batch.n_docs; d++)
                assert_int_equal(batch.ids[batch.cu_seqlens[d]] / 1000, row++);
        }
    assert_int_equal(row, N_ROWS);
    pml_sampler_destroy(&s);
}

/* First row of each micro-batch of an epoch, a fingerprint of its order. */
static int fingerprint(pml_sampler *s, int64_t epoch, int32_t *first)
{
    int n = 0;
    for (pml_cursor at = {epoch, 0}; at.epoch == epoch; at = pml_sampler_next(s, at))
        for (int32_t i = 0; i < pml_sampler_micros(s, at); i++) {
            pml_batch batch;
            EXPECT_OK(pml_sampler_batch(s, at, i, &batch, e));
            first[n++] = batch.ids[0] / 1000;
        }
    return n;
}

static void test_order_depends_on_seed_and_epoch_only(void **state)
{
    (void)state;
    pml_sampler_options options = plain;
    int32_t a[64], b[64];
    options.shuffle = true;
    pml_sampler *s = sampler_of(options), *again = sampler_of(options);
    options.seed = 43;
    pml_sampler *other = sampler_of(options);
    size_t bytes = (size_t)fingerprint(s, 3, a) * sizeof *a;
    fingerprint(again, 9, b); /* another history before */
    fingerprint(again, 3, b);
    assert_memory_equal(a, b, bytes);
    fingerprint(s, 4, b);
    assert_memory_not_equal(a, b, bytes);
    fingerprint(other, 3, b);
    assert_memory_not_equal(a, b, bytes);

    /* Pinned: a resumed run of an older version must see the same rows. */
    static const int32_t pinned[] = {54, 61, 67, 98, 50, 103, 101, 33, 87, 8, 34, 118};
    fingerprint(s, 0, a);
    assert_memory_equal(a, pinned, sizeof pinned);
    pml_sampler_destroy(&s);
    pml_sampler_destroy(&again);
    pml_sampler_destroy(&other);
}

/* Where each row lands is about uniform: 400 shuffles, mean place within 5 deviations. */
static void test_shuffle_is_fair(void **state)
{
    (void)state;
    pml_sampler_options options = plain;
    double place[N_ROWS] = {0};
    enum { EPOCHS = 400 };
    options.shuffle = true;
    options.batch_size = options.accumulation = 1;
    pml_sampler *s = sampler_of(options);
    for (int64_t epoch = 0; epoch < EPOCHS; epoch++) {
        pml_cursor at = {epoch, 0};
        for (int i = 0; i < N_ROWS; i++, at = pml_sampler_next(s, at)) {
            pml_batch batch;
            EXPECT_OK(pml_sampler_batch(s, at, 0, &batch, e));
            place[batch.ids[0] / 1000] += (double)i / EPOCHS;
        }
    }
    /* variance of one uniform place (n^2 - 1) / 12 = 1564; of the mean of 400: 3.9 */
    for (int r = 0; r < N_ROWS; r++)
        assert_true(place[r] > 68 - 5 * 1.98 && place[r] < 68 + 5 * 1.98);
    pml_sampler_destroy(&s);
}

/* Rank r's micro-batch a of 3 workers is micro-batch a * 3 + r of one that accumulates three times
 * as many. */
static void test_ranks_share_one_step(void **state)
{
    (void)state;
    pml_sampler_options options = plain;
    options.shuffle = options.packing = true;
    options.accumulation = 6;
    pml_sampler *one = sampler_of(options);
    options.accumulation = 2;
    options.world = 3;
    for (options.rank = 0; options.rank < 3; options.rank++) {
        pml_sampler *s = sampler_of(options);
        assert_int_equal(pml_sampler_steps_per_epoch(s), pml_sampler_steps_per_epoch(one));
        for (pml_cursor at = {0, 0}; at.epoch == 0; at = pml_sampler_next(s, at))
            for (int32_t i = 0; i < 2; i++) {
                pml_batch mine, whole;
                EXPECT_OK(pml_sampler_batch(s, at, i, &mine, e));
                EXPECT_OK(pml_sampler_batch(one, at, i * 3 + options.rank, &whole, e));
                assert_int_equal(mine.n_tokens, whole.n_tokens);
                assert_memory_equal(mine.ids, whole.ids, (size_t)mine.n_tokens * sizeof *mine.ids);
            }
        pml_sampler_destroy(&s);
    }
    pml_sampler_destroy(&one);
}

static void test_accumulation_changes_within_an_epoch(void **state)
{
    (void)state;
    int seen[N_ROWS] = {0}, steps = 0;
    pml_sampler_options options = plain;
    options.shuffle = true;
    pml_sampler *s = sampler_of(options);
    for (pml_cursor at = {0, 0}; at.epoch == 0; at = pml_sampler_next(s, at)) {
        EXPECT_OK(pml_sampler_set_accumulation(s, 1 + steps++ % 4, e));
        for (int32_t i = 0; i < pml_sampler_micros(s, at); i++) {
            pml_batch batch;
            EXPECT_OK(pml_sampler_batch(s, at, i, &batch, e));
            check_content(&batch, seen);
        }
    }
    for (int r = 0; r < N_ROWS; r++)
        assert_int_equal(seen[r], 1);
    EXPECT_FAIL(PML_INVALID, "accumulation 0", pml_sampler_set_accumulation(s, 0, e));
    pml_sampler_destroy(&s);
}

static void test_bounds_are_reached_in_file_order(void **state)
{
    (void)state;
    pml_sampler *s = sampler_of(plain);
    int32_t tokens, docs, labels, most_tokens = 0, most_labels = 0, rows_cut = 0;
    pml_sampler_bounds(s, &tokens, &docs, &labels);
    for (pml_cursor at = {0, 0}; at.epoch == 0; at = pml_sampler_next(s, at))
        for (int32_t i = 0; i < pml_sampler_micros(s, at); i++) {
            pml_batch batch;
            EXPECT_OK(pml_sampler_batch(s, at, i, &batch, e));
            most_tokens = batch.n_tokens > most_tokens ? batch.n_tokens : most_tokens;
            most_labels = batch.n_labels > most_labels ? batch.n_labels : most_labels;
        }
    assert_int_equal(tokens, most_tokens);
    assert_int_equal(labels, most_labels);
    assert_int_equal(docs, 4);
    assert_int_equal(pml_sampler_max_doc(s), MAX_LENGTH);
    for (int r = 0; r < N_ROWS; r++)
        rows_cut += lengths[r] > MAX_LENGTH;
    assert_true(rows_cut > 0);
    assert_int_equal(pml_sampler_rows_cut(s), rows_cut);
    pml_sampler_destroy(&s);
}

/* ---- packing ---- */

static int descending(const void *a, const void *b)
{
    return *(const int32_t *)b - *(const int32_t *)a;
}

/* Best fit decreasing by trying every bin. How many bins. */
static int64_t bins_by_trying(const int32_t *rows, int n, int32_t capacity)
{
    int32_t *sorted = malloc((size_t)n * sizeof *sorted), *room = calloc((size_t)n, sizeof *room);
    assert_true(sorted != NULL && room != NULL);
    memcpy(sorted, rows, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, descending);
    int bins = 0;
    for (int i = 0; i < n; i++) {
        int best = -1;
        for (int b = 0; b < bins; b++)
            if (room[b] >= sorted[i] && (best < 0 || room[b] < room[best]))
                best = b;
        if (best < 0) {
            best = bins++;
            room[best] = capacity;
        }
        room[best] -= sorted[i];
    }
    free(sorted);
    free(room);
    return bins;
}

static void test_packing_is_best_fit_decreasing(void **state)
{
    (void)state;
    static const int32_t capacities[] = {1, 3, 63, 64, 65, 300, 4096, 5000};
    for (size_t c = 0; c < sizeof capacities / sizeof *capacities; c++) {
        int32_t rows[300], capacity = capacities[c];
        pml_sampler *s = NULL;
        for (int r = 0; r < 300; r++)
            rows[r] = 1 + (int32_t)(pml_philox_at(7, c, 0, (uint64_t)r).word[0] %
                                    (uint32_t)(capacity < 900 ? capacity : 900));
        rows[0] = capacity < 900 ? capacity : 900;
        rows[1] = capacity > 1 ? 2 : 1; /* something to learn */
        pml_shard *packed = made_shard("packed", rows, 300);
        pml_sampler_options options = {.batch_size = 1,
                                       .accumulation = 1,
                                       .world = 1,
                                       .max_length = capacity,
                                       .packing = true};
        if (capacity == 1) {
            EXPECT_FAIL(PML_INVALID, "nothing to learn", pml_sampler_new(packed, &options, &s, e));
            pml_shard_close(&packed);
            continue;
        }
        EXPECT_OK(pml_sampler_new(packed, &options, &s, e));
        assert_int_equal(pml_sampler_rows(s), bins_by_trying(rows, 300, capacity));
        int32_t previous = -1;
        for (pml_cursor at = {0, 0}; at.epoch == 0; at = pml_sampler_next(s, at)) {
            pml_batch batch;
            EXPECT_OK(pml_sampler_batch(s, at, 0, &batch, e));
            assert_true(batch.n_tokens <= capacity);
            assert_true(batch.ids[0] / 1000 > previous); /* bins by their first row */
            previous = batch.ids[0] / 1000;
            for (int32_t d = 1; d < batch.n_docs; d++) /* rows of a bin in file order */
                assert_true(batch.ids[batch.cu_seqlens[d]] > batch.ids[batch.cu_seqlens[d - 1]]);
        }
        pml_sampler_destroy(&s);
        pml_shard_close(&packed);
    }
}

/* Lengths as texts have them: many short ones, few long ones. */
static int32_t text_length(int64_t row, int32_t capacity)
{
    pml_philox r = pml_philox_at(11, 0, 0, (uint64_t)row);
    double u = (r.word[0] + 0.5) / 4294967296.0;
    double length = 40 / (u + 0.005); /* 40 to 8,000, half of them below 80 */
    return length < capacity ? (int32_t)length : capacity;
}

static void test_packing_in_windows(void **state)
{
    (void)state;
    enum { N = 2 * PML_PACK_WINDOW + 777, CAPACITY = 2048 };
    int32_t *length = malloc(N * sizeof *length);
    int64_t *bin = malloc(N * sizeof *bin), bins = 0, total = 0;
    assert_true(length != NULL && bin != NULL);
    for (int64_t row = 0; row < N; row++)
        total += length[row] = text_length(row, CAPACITY);
    EXPECT_OK(pml_pack(length, N, CAPACITY, bin, &bins, e));
    int32_t *filled = calloc((size_t)bins, sizeof *filled);
    int64_t *window = malloc((size_t)bins * sizeof *window), last = -1;
    assert_true(filled != NULL && window != NULL);
    for (int64_t row = 0; row < N; row++) {
        assert_true(bin[row] >= 0 && bin[row] < bins);
        if (filled[bin[row]] == 0) {
            assert_int_equal(bin[row], last + 1); /* numbered by their first rows */
            last = bin[row];
            window[last] = row / PML_PACK_WINDOW;
        }
        assert_int_equal(window[bin[row]], row / PML_PACK_WINDOW);
        filled[bin[row]] += length[row];
        assert_true(filled[bin[row]] <= CAPACITY);
    }
    assert_int_equal(last + 1, bins);
    assert_true((double)total / ((double)bins * CAPACITY) > 0.995);
    free(length);
    free(bin);
    free(filled);
    free(window);
}

/* ---- refusals ---- */

static void test_nothing_to_learn(void **state)
{
    (void)state;
    const int32_t ids[] = {1, 2, 3, 4};
    const int32_t none[] = {-100, -100, -100, -100}, first[] = {1, -100, 3, -100};
    const int64_t at[] = {0, 2, 4};
    pml_sampler_options options = plain;
    const int32_t *const cases[] = {none, first};
    for (int i = 0; i < 2; i++) {
        pml_shard *empty = NULL;
        pml_sampler *s = NULL;
        put_shard(scratch("none"), ids, cases[i], 4, at, 2);
        EXPECT_OK(pml_shard_open(scratch("none"), 10, &empty, e));
        EXPECT_FAIL(PML_INVALID, "nothing to learn", pml_sampler_new(empty, &options, &s, e));
        assert_null(s);
        pml_shard_close(&empty);
    }
    pml_sampler *s = NULL;
    options.max_length = 1; /* labels are there, but cut away */
    EXPECT_FAIL(PML_INVALID, "max_length = 1", pml_sampler_new(shard, &options, &s, e));
}

static void test_options_and_cursors_outside(void **state)
{
    (void)state;
    static const pml_sampler_options bad[] = {
        {.batch_size = 0, .accumulation = 1, .world = 1, .max_length = 9},
        {.batch_size = 1, .accumulation = 0, .world = 1, .max_length = 9},
        {.batch_size = 1, .accumulation = 1, .world = 0, .max_length = 9},
        {.batch_size = 1, .accumulation = 1, .world = 2, .rank = 2, .max_length = 9},
        {.batch_size = 1, .accumulation = 1, .world = 2, .rank = -1, .max_length = 9},
        {.batch_size = 1, .accumulation = 1, .world = 1, .max_length = 0},
        {.batch_size = 1, .accumulation = 1, .world = 1, .max_length = INT32_MAX},
    };
    pml_sampler *s = NULL;
    pml_batch batch;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(pml_sampler_new(shard, &bad[i], &s, NULL), PML_INVALID);
    s = sampler_of(plain);
    static const pml_cursor outside[] = {{-1, 0},        {0, -1},        {0, 35},
                                         {INT64_MAX, 0}, {0, INT64_MAX}, {INT64_MIN, INT64_MIN}};
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++) {
        EXPECT_FAIL(PML_INVALID, "35 micro-batches",
                    pml_sampler_batch(s, outside[i], 0, &batch, e));
        assert_int_equal(pml_sampler_micros(s, outside[i]), 0);
        assert_int_equal(pml_sampler_share(s, outside[i]).tokens, 0);
        pml_cursor next = pml_sampler_next(s, outside[i]);
        assert_true(next.epoch == outside[i].epoch && next.micro == outside[i].micro);
    }
    EXPECT_FAIL(PML_INVALID, "micro-batch 2 of 2",
                pml_sampler_batch(s, (pml_cursor){0, 0}, 2, &batch, e));
    EXPECT_FAIL(PML_INVALID, "micro-batch -1",
                pml_sampler_batch(s, (pml_cursor){0, 0}, -1, &batch, e));
    pml_sampler_destroy(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_row_once_an_epoch),
        cmocka_unit_test(test_file_order),
        cmocka_unit_test(test_order_depends_on_seed_and_epoch_only),
        cmocka_unit_test(test_shuffle_is_fair),
        cmocka_unit_test(test_ranks_share_one_step),
        cmocka_unit_test(test_accumulation_changes_within_an_epoch),
        cmocka_unit_test(test_bounds_are_reached_in_file_order),
        cmocka_unit_test(test_packing_is_best_fit_decreasing),
        cmocka_unit_test(test_packing_in_windows),
        cmocka_unit_test(test_nothing_to_learn),
        cmocka_unit_test(test_options_and_cursors_outside),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
