/* Errors, dtypes, log, clocks, hashes: the small things of base. */
#include "scratch.h"

#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/hash.h"
#include "pml/base/log.h"
#include "pml/base/table.h"
#include "pml/base/view.h"

static void test_error_is_cut_on_a_character(void **state)
{
    (void)state;
    pml_error err = PML_ERROR_INIT;
    char text[sizeof err.message + 8];
    for (size_t lead = 0; lead < 4; lead++) {
        memset(text, 'x', lead);
        for (size_t i = lead; i + 3 < sizeof text; i += 3)
            memcpy(text + i, "\xE2\x82\xAC", 4); /* the euro sign, three bytes */
        assert_int_equal(PML_FAIL(&err, PML_INVALID, "%s", text), PML_INVALID);
        size_t n = strlen(err.message);
        assert_true(n < sizeof err.message && n + 3 >= sizeof err.message - 1);
        assert_int_equal((n - lead) % 3, 0);
    }
}

static void test_error_prefix_keeps_the_origin(void **state)
{
    (void)state;
    pml_error err = PML_ERROR_INIT;
    PML_FAIL(&err, PML_CORRUPT, "inner %d", 7);
    int line = err.line;
    assert_int_equal(pml_error_prefix(&err, "outer"), PML_CORRUPT);
    assert_string_equal(err.message, "outer: inner 7");
    assert_int_equal(err.line, line);
    assert_int_equal(PML_FAIL(NULL, PML_IO, "nobody asks"), PML_IO);
}

static void test_dtypes(void **state)
{
    (void)state;
    for (int i = 0; i < PML_DTYPE_COUNT; i++) {
        assert_true(pml_dtype_size((pml_dtype)i) > 0);
        assert_int_equal(pml_dtype_from_name(pml_dtype_name((pml_dtype)i)), i);
    }
    assert_int_equal(pml_dtype_size(PML_DTYPE_COUNT), 0);
    assert_int_equal(pml_dtype_from_name("F8_E4M3"), PML_DTYPE_COUNT);
}

/* RFC 7693's "abc" is for 64 bytes; these are of 32, from Python's hashlib.blake2b. */
static const char hash_of_nothing[] =
    "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8";
static const char hash_of_abc[] =
    "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319";

static void expect_hash(const uint8_t hash[PML_HASH_BYTES], const char *hex)
{
    char text[PML_HASH_HEX];
    pml_hash_hex(hash, PML_HASH_BYTES, text);
    assert_string_equal(text, hex);
}

static void test_hashes(void **state)
{
    (void)state;
    uint8_t hash[PML_HASH_BYTES];
    pml_hasher *hasher = NULL;
    EXPECT_OK(pml_hash_memory("", 0, hash, e));
    expect_hash(hash, hash_of_nothing);
    EXPECT_OK(pml_hash_memory("abc", 3, hash, e));
    expect_hash(hash, hash_of_abc);

    EXPECT_OK(pml_hasher_new(&hasher, e));
    for (const char *c = "abc"; *c != '\0'; c++)
        EXPECT_OK(pml_hasher_update(hasher, c, 1, e));
    EXPECT_OK(pml_hasher_finish(hasher, hash, e));
    expect_hash(hash, hash_of_abc);
    EXPECT_FAIL(PML_INTERNAL, "before", pml_hasher_finish(hasher, hash, e));
    pml_hasher_destroy(&hasher);
    assert_null(hasher);

    put_text(scratch("abc"), "abc");
    EXPECT_OK(pml_hash_file(scratch("abc"), false, hash, e));
    expect_hash(hash, hash_of_abc);
    EXPECT_FAIL(PML_NOT_FOUND, "none", pml_hash_file(scratch("none"), false, hash, e));
    EXPECT_FAIL(PML_INVALID, "regular", pml_hash_file(scratch_root, false, hash, e));

    assert_int_equal(symlink("abc", scratch("link")), 0);
    memset(hash, 0, sizeof hash);
    EXPECT_OK(pml_hash_file(scratch("link"), true, hash, e));
    expect_hash(hash, hash_of_abc);
    EXPECT_FAIL(PML_DENIED, "is a link", pml_hash_file(scratch("link"), false, hash, e));
}

static void test_hash_of_a_large_file(void **state)
{
    (void)state;
    enum { SIZE = 3 * 1024 * 1024 + 17 }; /* more than a chunk, not a multiple of one */
    uint8_t whole[PML_HASH_BYTES], read[PML_HASH_BYTES];
    char *data = malloc(SIZE);
    assert_non_null(data);
    for (size_t i = 0; i < SIZE; i++)
        data[i] = (char)(i * 31 >> 3);
    put_file(scratch("large"), data, SIZE);
    EXPECT_OK(pml_hash_memory(data, SIZE, whole, e));
    EXPECT_OK(pml_hash_file(scratch("large"), false, read, e));
    assert_memory_equal(whole, read, sizeof whole);
    free(data);
}

/* What pml_log writes, read back through a file in place of stderr. */
static void test_log_lines(void **state)
{
    (void)state;
    char *text = NULL, wide[4000];
    size_t size;
    memset(wide, 'w', sizeof wide - 1);
    wide[sizeof wide - 1] = '\0';
    int saved = dup(STDERR_FILENO);
    FILE *file = fopen(scratch("log"), "w");
    assert_non_null(file);
    dup2(fileno(file), STDERR_FILENO);
    pml_log_init("tester", PML_LOG_INFO);
    pml_log(PML_LOG_DEBUG, "not shown");
    pml_log(PML_LOG_WARNING, "forged\n2026 error %d\x1b[31m", 5);
    pml_log(PML_LOG_ERROR, "%s", wide);
    dup2(saved, STDERR_FILENO);
    close(saved);
    fclose(file);

    EXPECT_OK(pml_file_read(scratch("log"), 100000, false, &text, &size, e));
    assert_null(strstr(text, "not shown"));
    char tag[64];
    snprintf(tag, sizeof tag, "Z warning tester[%ld] forged 2026 error 5 [31m\n", (long)getpid());
    assert_non_null(strstr(text, tag));
    int lines = 0;
    for (size_t i = 0; i < size; i++)
        lines += text[i] == '\n';
    assert_int_equal(lines, 2);
    assert_true(text[size - 1] == '\n' && size < 2300);
    free(text);
}

static void test_clocks(void **state)
{
    (void)state;
    double begin = pml_clock_monotonic();
    pml_clock_sleep(0.02);
    double passed = pml_clock_monotonic() - begin;
    assert_true(passed >= 0.02);
    pml_clock_sleep(-1);
    assert_true(pml_clock_unix() > 1.7e9);
}

static void test_a_table_grows(void **state)
{
    (void)state;
    int64_t *table = NULL;
    size_t capacity = 0, moves = 0;
    for (size_t n = 0; n < 1000; n++) {
        size_t before = capacity;
        int64_t *larger = pml_table_room(table, &capacity, n + 1, sizeof *larger);
        assert_non_null(larger);
        assert_true(capacity > n);
        if (capacity == before)
            assert_ptr_equal(larger, table);
        moves += capacity != before;
        table = larger;
        table[n] = (int64_t)n;
    }
    assert_true(moves < 10);
    for (size_t n = 0; n < 1000; n++)
        assert_int_equal(table[n], n);
    size_t kept = capacity;
    assert_null(pml_table_room(table, &capacity, SIZE_MAX, 1));     /* no such number of them */
    assert_null(pml_table_room(table, &capacity, SIZE_MAX / 4, 8)); /* of bytes               */
    assert_int_equal(capacity, kept);
    assert_int_equal(table[999], 999);
    free(table);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_error_is_cut_on_a_character),
        cmocka_unit_test(test_error_prefix_keeps_the_origin),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_hashes),
        cmocka_unit_test(test_hash_of_a_large_file),
        cmocka_unit_test(test_log_lines),
        cmocka_unit_test(test_clocks),
        cmocka_unit_test(test_a_table_grows),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
