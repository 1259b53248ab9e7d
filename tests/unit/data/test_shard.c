#include "shard_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/hash.h"
#include "pml/data/sampler.h"

static void test_rows_as_written(void **state)
{
    (void)state;
    const int32_t lengths[] = {3, 1, 4};
    pml_shard *shard = made_shard("good", lengths, 3);
    int32_t ids[4], labels[4];
    assert_int_equal(pml_shard_rows(shard), 3);
    assert_int_equal(pml_shard_tokens(shard), 8);
    for (int32_t r = 0; r < 3; r++) {
        assert_int_equal(pml_shard_length(shard, r), lengths[r]);
        EXPECT_OK(pml_shard_read(shard, pml_shard_offset(shard, r), lengths[r], ids, labels, e));
        for (int32_t t = 0; t < lengths[r]; t++) {
            assert_int_equal(ids[t], r * 1000 + t);
            assert_int_equal(labels[t], (r + t) % 5 == 4 ? -100 : r * 1000 + t);
        }
    }
    pml_shard_close(&shard);
    assert_null(shard);
    pml_shard_close(&shard);
}

static void test_verify(void **state)
{
    (void)state;
    const int32_t length = 3;
    uint8_t hash[PML_HASH_BYTES];
    char hex[PML_HASH_HEX];
    pml_shard *shard = made_shard("sound", &length, 1);
    pml_shard_close(&shard);
    EXPECT_FAIL(PML_CORRUPT, "b2sum is missing", pml_shard_verify(scratch("sound"), e));
    EXPECT_OK(pml_hash_file(scratch("sound"), false, hash, e));
    pml_hash_hex(hash, sizeof hash, hex);
    put_text(scratch("sound.b2sum"), hex);
    EXPECT_OK(pml_shard_verify(scratch("sound"), e));

    /* A link in its place is refused, though what it leads to is what was written. */
    put_text(scratch("led.b2sum"), hex);
    assert_int_equal(symlink("sound", scratch("led")), 0);
    EXPECT_FAIL(PML_DENIED, "led is a link", pml_shard_verify(scratch("led"), e));

    hex[0] = hex[0] == '0' ? '1' : '0';
    put_text(scratch("sound.b2sum"), hex);
    EXPECT_FAIL(PML_CORRUPT, "not what was written", pml_shard_verify(scratch("sound"), e));
}

static void refuse(pml_status code, const char *words, const int32_t *ids, const int32_t *labels,
                   int64_t tokens, const int64_t *offsets, int64_t rows)
{
    pml_shard *shard = NULL;
    put_shard(scratch("bad"), ids, labels, tokens, offsets, rows);
    EXPECT_FAIL(code, words, pml_shard_open(scratch("bad"), 10, &shard, e));
    EXPECT_FAIL(code, "bad", pml_shard_open(scratch("bad"), 10, &shard, e)); /* names the file */
    assert_null(shard);
}

static void test_refuses_contents(void **state)
{
    (void)state;
    const int32_t good[] = {0, 1, 2, 9}, high[] = {0, 1, 10, 3}, low[] = {0, 1, 2, -1};
    const int32_t label[] = {0, -100, -99, 0}, label_high[] = {0, 1, 2, 10};
    const int64_t at[] = {0, 2, 4}, starts[] = {1, 2, 4}, ends[] = {0, 2, 3}, back[] = {0, 5, 4};
    const int64_t empty[] = {0, 4, 4}, far[] = {0, INT64_MAX, 4}, under[] = {0, -1, 4};
    refuse(PML_INVALID, "row 1 has token id 10 at position 0", high, good, 4, at, 2);
    refuse(PML_INVALID, "row 1 has token id -1 at position 1", low, good, 4, at, 2);
    refuse(PML_INVALID, "row 1 has label -99 at position 0", good, label, 4, at, 2);
    refuse(PML_INVALID, "label 10", good, label_high, 4, at, 2);
    refuse(PML_CORRUPT, "span", good, good, 4, starts, 2);
    refuse(PML_CORRUPT, "span", good, good, 4, ends, 2);
    refuse(PML_CORRUPT, "row 0 ends at token 5", good, good, 4, back, 2);
    refuse(PML_CORRUPT, "row 0 ends", good, good, 4, far, 2);
    refuse(PML_CORRUPT, "row 0 ends at token -1", good, good, 4, under, 2);
    refuse(PML_INVALID, "row 1 has no tokens", good, good, 4, empty, 2);
    refuse(PML_INVALID, "empty", good, good, 0, at, 0);
    refuse(PML_CORRUPT, "offsets is empty", good, good, 4, at, -1);
}

/* A safetensors file that is whole, but no shard. */
static void put_other(const char *format, const char *offsets_name, pml_dtype dtype, int64_t n)
{
    pml_safetensors_writer *w = NULL;
    const char zeros[64] = {0};
    int64_t three = 3;
    EXPECT_OK(pml_safetensors_writer_new(scratch("other"), 0600, &w, e));
    EXPECT_OK(pml_safetensors_writer_metadata(w, "format", format, e));
    EXPECT_OK(pml_safetensors_writer_add(w, offsets_name, PML_I64, (int64_t[]){2}, 1, e));
    EXPECT_OK(pml_safetensors_writer_add(w, "input_ids", PML_I32, &three, 1, e));
    EXPECT_OK(pml_safetensors_writer_add(w, "labels", dtype, &n, 1, e));
    EXPECT_OK(pml_safetensors_writer_write(w, zeros, 28 + (size_t)n * pml_dtype_size(dtype), e));
    EXPECT_OK(pml_safetensors_writer_finish(w, e));
    pml_safetensors_writer_destroy(&w);
}

static void test_refuses_other_files(void **state)
{
    (void)state;
    pml_shard *shard = NULL;
    put_other("pt", "offsets", PML_I32, 3);
    EXPECT_FAIL(PML_CORRUPT, "format pt", pml_shard_open(scratch("other"), 10, &shard, e));
    put_other("pml-shard-1", "starts", PML_I32, 3);
    EXPECT_FAIL(PML_CORRUPT, "without offsets", pml_shard_open(scratch("other"), 10, &shard, e));
    put_other("pml-shard-1", "offsets", PML_I64, 3);
    EXPECT_FAIL(PML_CORRUPT, "labels", pml_shard_open(scratch("other"), 10, &shard, e));
    put_other("pml-shard-1", "offsets", PML_I32, 2);
    EXPECT_FAIL(PML_CORRUPT, "labels", pml_shard_open(scratch("other"), 10, &shard, e));
    EXPECT_FAIL(PML_NOT_FOUND, "none", pml_shard_open(scratch("none"), 10, &shard, e));
    assert_null(shard);
}

/* Data may begin at any byte. */
static void test_reads_misaligned_data(void **state)
{
    (void)state;
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pml-shard-1\"},"
        "\"offsets\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]},"
        "\"input_ids\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[16,20]},"
        "\"labels\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[20,24]}}";
    for (size_t pad = 0; pad < 8; pad++) {
        unsigned char bytes[512] = {0};
        pml_shard *shard = NULL;
        int32_t id = 0, label = 0;
        size_t n = strlen(header) + pad;
        bytes[0] = (unsigned char)n;
        bytes[1] = (unsigned char)(n >> 8);
        memset(bytes + 8, ' ', n);
        memcpy(bytes + 8, header, strlen(header));
        bytes[8 + n + 8] = 1; /* offsets 0, 1 */
        bytes[8 + n + 16] = 7;
        bytes[8 + n + 20] = 9;
        put_file(scratch("pad"), bytes, 8 + n + 24);
        EXPECT_OK(pml_shard_open(scratch("pad"), 10, &shard, e));
        EXPECT_OK(pml_shard_read(shard, 0, 1, &id, &label, e));
        assert_int_equal(id, 7);
        assert_int_equal(label, 9);
        pml_shard_close(&shard);
    }
}

/* Cut short in place after it was opened: what is still there can be drawn, what is not is an error
 * that names the file and the byte. */
static void test_cut_short_while_open(void **state)
{
    (void)state;
    enum { ROWS = 5, LENGTH = 4096 };
    const int32_t lengths[ROWS] = {LENGTH, LENGTH, LENGTH, LENGTH, LENGTH};
    pml_shard *shard = made_shard("cut", lengths, ROWS);
    const pml_sampler_options options = {
        .batch_size = 1, .accumulation = 1, .world = 1, .max_length = LENGTH};
    pml_sampler *sampler = NULL;
    pml_batch batch;
    pml_cursor at = {0, 0};
    char words[64];
    EXPECT_OK(pml_sampler_new(shard, &options, &sampler, e));
    struct stat about;
    assert_int_equal(stat(scratch("cut"), &about), 0);
    const long long end = about.st_size - (long long)(2 * LENGTH * sizeof(int32_t)); /* of row 2 */
    assert_int_equal(truncate(scratch("cut"), end), 0);
    for (int row = 0; row < 3; row++, at = pml_sampler_next(sampler, at)) {
        EXPECT_OK(pml_sampler_batch(sampler, at, 0, &batch, e));
        assert_int_equal(batch.ids[LENGTH - 1], row * 1000 + LENGTH - 1);
    }
    snprintf(words, sizeof words, "cut has no byte %lld", end);
    EXPECT_FAIL(PML_CORRUPT, words, pml_sampler_batch(sampler, at, 0, &batch, e));
    pml_sampler_destroy(&sampler);
    EXPECT_FAIL(PML_CORRUPT, words, pml_sampler_new(shard, &options, &sampler, e));
    pml_shard_close(&shard);
}

/* Behind what is checked at once, too. */
static void test_refuses_contents_far_behind(void **state)
{
    (void)state;
    enum { TOKENS = 40000, ROW_1 = 9999, WRONG = 33000 };
    const int64_t at[] = {0, ROW_1, TOKENS};
    int32_t *good = calloc(TOKENS, sizeof *good), *wrong = calloc(TOKENS, sizeof *wrong);
    assert_true(good != NULL && wrong != NULL);
    wrong[WRONG] = 10;
    refuse(PML_INVALID, "row 1 has token id 10 at position 23001", wrong, good, TOKENS, at, 2);
    refuse(PML_INVALID, "row 1 has label 10 at position 23001", good, wrong, TOKENS, at, 2);
    free(good);
    free(wrong);
}

/* What a sampler has counted, a stretch of the shard at a time, is what is drawn: rows that lie
 * across the end of a stretch, one that is longer than any, and one that is cut. */
static void test_counts_over_many_stretches(void **state)
{
    (void)state;
    enum { ROWS = 7, MOST = 18000 };
    const int32_t lengths[ROWS] = {10000, 6000, 5000, 1, 20000, 17000, 7};
    pml_shard *shard = made_shard("long", lengths, ROWS);
    const pml_sampler_options options = {
        .batch_size = 1, .accumulation = 1, .world = 1, .max_length = MOST};
    pml_sampler *sampler = NULL;
    pml_batch batch;
    pml_cursor at = {0, 0};
    EXPECT_OK(pml_sampler_new(shard, &options, &sampler, e));
    assert_int_equal(pml_sampler_rows_cut(sampler), 1);
    for (int32_t r = 0; r < ROWS; r++, at = pml_sampler_next(sampler, at)) {
        const int32_t n = lengths[r] < MOST ? lengths[r] : MOST;
        int32_t learned = 0;
        for (int32_t t = 1; t < n; t++)
            learned += (r + t) % 5 != 4;
        EXPECT_OK(pml_sampler_batch(sampler, at, 0, &batch, e));
        assert_int_equal(batch.n_tokens, n);
        assert_int_equal(batch.ids[n - 1], r * 1000 + n - 1);
        assert_int_equal(batch.n_labels, learned);
        assert_int_equal(pml_sampler_share(sampler, at).labels, learned);
    }
    pml_sampler_destroy(&sampler);
    pml_shard_close(&shard);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_as_written),
        cmocka_unit_test(test_verify),
        cmocka_unit_test(test_refuses_contents),
        cmocka_unit_test(test_refuses_other_files),
        cmocka_unit_test(test_reads_misaligned_data),
        cmocka_unit_test(test_cut_short_while_open),
        cmocka_unit_test(test_refuses_contents_far_behind),
        cmocka_unit_test(test_counts_over_many_stretches),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
