#include "scratch.h"

#include <math.h>

#include "pml/json/json.h"

static pml_json *parsed(const char *text)
{
    pml_json *document = NULL;
    EXPECT_OK(pml_json_parse(text, strlen(text), "t", &pml_json_file_limits, &document, e));
    return document;
}

static void test_fields_by_type_and_range(void **state)
{
    (void)state;
    pml_json *doc = parsed("{\"i\":7,\"f\":2.5,\"w\":3.0,\"b\":true,\"s\":\"text\",\"n\":null,"
                           "\"a\":[1,2],\"o\":{\"x\":-1}}");
    pml_json_at at = pml_json_root(doc, "t");
    int64_t i = -5;
    int32_t small = 0;
    double d = 0;
    bool b = false;
    char s[5];
    const pml_json *value = NULL;
    EXPECT_OK(pml_json_get_int(at, "i", PML_JSON_REQUIRED, 7, 7, &i, e));
    assert_int_equal(i, 7);
    EXPECT_OK(pml_json_get_i32(at, "w", PML_JSON_REQUIRED, 0, 9, &small, e));
    assert_int_equal(small, 3);
    EXPECT_OK(pml_json_get_double(at, "f", PML_JSON_REQUIRED, 0, 9, &d, e));
    assert_true(d == 2.5);
    EXPECT_OK(pml_json_get_bool(at, "b", PML_JSON_REQUIRED, &b, e));
    assert_true(b);
    EXPECT_OK(pml_json_get_string(at, "s", PML_JSON_REQUIRED, s, sizeof s, e));
    assert_string_equal(s, "text");
    EXPECT_OK(pml_json_get_array(at, "a", PML_JSON_REQUIRED, &value, e));
    assert_int_equal(pml_json_length(value), 2);
    EXPECT_OK(pml_json_get_object(at, "o", PML_JSON_REQUIRED, &value, e));
    EXPECT_FAIL(
        PML_INVALID, "t: o.x must be an integer from 0 to 9, it is -1",
        pml_json_get_int((pml_json_at){value, "t", "o"}, "x", PML_JSON_REQUIRED, 0, 9, &i, e));

    /* Optional and absent or null: as it was. Required: missing, by name. */
    i = -5;
    EXPECT_OK(pml_json_get_int(at, "absent", PML_JSON_OPTIONAL, 0, 1, &i, e));
    EXPECT_OK(pml_json_get_int(at, "n", PML_JSON_OPTIONAL, 0, 1, &i, e));
    assert_int_equal(i, -5);
    EXPECT_FAIL(PML_INVALID, "t: n is missing",
                pml_json_get_int(at, "n", PML_JSON_REQUIRED, 0, 9, &i, e));
    EXPECT_OK(pml_json_get_object(at, "absent", PML_JSON_OPTIONAL, &value, e));
    assert_null(value);
    assert_false(pml_json_has(at, "n"));

    EXPECT_FAIL(PML_INVALID, "f must be an integer",
                pml_json_get_int(at, "f", PML_JSON_REQUIRED, 0, 9, &i, e));
    EXPECT_FAIL(PML_INVALID, "i must be an integer from 8 to 9, it is 7",
                pml_json_get_int(at, "i", PML_JSON_REQUIRED, 8, 9, &i, e));
    EXPECT_FAIL(PML_INVALID, "s must be a string of at most 3 bytes, it is \"text\"",
                pml_json_get_string(at, "s", PML_JSON_REQUIRED, s, 4, e));
    EXPECT_FAIL(PML_INVALID, "i must be true or false",
                pml_json_get_bool(at, "i", PML_JSON_REQUIRED, &b, e));
    EXPECT_FAIL(PML_INVALID, "a must be an object, it is [1,2]",
                pml_json_get_object(at, "a", PML_JSON_REQUIRED, &value, e));
    pml_json_destroy(&doc);
    assert_null(doc);
}

static void test_numbers_at_the_edge(void **state)
{
    (void)state;
    pml_json *doc = parsed("{\"lo\":-9223372036854775808,\"hi\":9223372036854775807,"
                           "\"big\":9223372036854775808.0,\"nan\":\"NaN\",\"inf\":\"-Infinity\"}");
    pml_json_at at = pml_json_root(doc, "t");
    int64_t i = 0;
    double d = 0;
    EXPECT_OK(pml_json_get_int(at, "lo", PML_JSON_REQUIRED, INT64_MIN, INT64_MAX, &i, e));
    assert_true(i == INT64_MIN);
    EXPECT_OK(pml_json_get_int(at, "hi", PML_JSON_REQUIRED, INT64_MIN, INT64_MAX, &i, e));
    assert_true(i == INT64_MAX);
    EXPECT_FAIL(PML_INVALID, "big must be an integer",
                pml_json_get_int(at, "big", PML_JSON_REQUIRED, INT64_MIN, INT64_MAX, &i, e));
    EXPECT_OK(pml_json_get_double(at, "nan", PML_JSON_REQUIRED, -INFINITY, INFINITY, &d, e));
    assert_true(isnan(d));
    EXPECT_OK(pml_json_get_double(at, "inf", PML_JSON_REQUIRED, -INFINITY, 0, &d, e));
    assert_true(isinf(d) && d < 0);
    EXPECT_FAIL(PML_INVALID, "nan must be a number",
                pml_json_get_double(at, "nan", PML_JSON_REQUIRED, 0, INFINITY, &d, e));
    EXPECT_FAIL(PML_INVALID, "inf must be a number",
                pml_json_get_double(at, "inf", PML_JSON_REQUIRED, 0, 1, &d, e));
    pml_json_destroy(&doc);
}

static void refuse(const char *text, size_t size, const char *words)
{
    pml_json *document = NULL;
    EXPECT_FAIL(PML_INVALID, words,
                pml_json_parse(text, size, "bad.json", &pml_json_file_limits, &document, e));
    assert_null(document);
}

static void test_refused_texts(void **state)
{
    (void)state;
    static const char *const texts[] = {"",
                                        "{",
                                        "7",
                                        "{} {}",
                                        "{\"a\":1,\"a\":2}",
                                        "{\"a\":\"\\u0000\"}",
                                        "{\"a\":\"\xff\"}",
                                        "{\"a\":9223372036854775808}",
                                        "{\"a\":NaN}",
                                        "{\"a\":1e999}",
                                        "{'a':1}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        refuse(texts[i], strlen(texts[i]), "bad.json");
    refuse("{\"a\":\0001}", 8, "bad.json");

    /* 16 levels are the limit; brackets in strings do not count. */
    char deep[128] = "{\"[[[[[[[[[[[[[[[[[[[[[[\\\"[[[[\":";
    size_t n = strlen(deep);
    memset(deep + n, '[', 15);
    memset(deep + n + 15, ']', 15);
    deep[n + 30] = '}';
    pml_json *doc = parsed(deep);
    pml_json_destroy(&doc);
    refuse("[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]", 34, "deeper than 16");
    pml_json_limits tiny = {10, 2};
    EXPECT_FAIL(PML_INVALID, "more than the 10 allowed",
                pml_json_parse("{\"a\":12345}", 11, "t", &tiny, &doc, e));
}

static void test_order_of_fields(void **state)
{
    (void)state;
    pml_json *doc = parsed("{\"z\":1,\"a\":2,\"m\":3}");
    const char *key, *wanted[] = {"z", "a", "m"};
    const pml_json *value;
    void *cursor = NULL;
    int n = 0;
    while (pml_json_next(doc, &cursor, &key, &value)) {
        int64_t number;
        assert_string_equal(key, wanted[n++]);
        assert_true(pml_json_as_int(value, &number) && number == n);
    }
    assert_int_equal(n, 3);
    pml_json_destroy(&doc);
}

static void test_writer_round_trip(void **state)
{
    (void)state;
    static const double numbers[] = {0.1,  -0.0,          1e300, 5e-324,   1.0 / 3,
                                     16.0, 123456789.125, NAN,   INFINITY, -INFINITY};
    enum { N = sizeof numbers / sizeof *numbers };
    pml_json_writer *writer = NULL;
    char *text = NULL;
    size_t size;
    EXPECT_OK(pml_json_writer_new(&writer, e));
    pml_json_put_int(writer, "i", INT64_MIN);
    pml_json_put_bool(writer, "b", false);
    pml_json_put_null(writer, "n");
    pml_json_put_string(writer, "s", "quote \" and \xE2\x82\xAC \n");
    pml_json_begin_array(writer, "numbers");
    for (int i = 0; i < N; i++)
        pml_json_put_double(writer, NULL, numbers[i]);
    pml_json_end(writer);
    pml_json_begin_object(writer, "o");
    pml_json_begin_object(writer, "left open");
    EXPECT_OK(pml_json_writer_finish(writer, 2, &text, &size, e));
    pml_json_writer_destroy(&writer);
    assert_null(writer);
    assert_int_equal(size, strlen(text));
    assert_true(text[size - 1] == '\n');

    pml_json *doc = parsed(text);
    char s[64];
    int64_t i;
    EXPECT_OK(pml_json_get_string(pml_json_root(doc, "t"), "s", PML_JSON_REQUIRED, s, sizeof s, e));
    assert_string_equal(s, "quote \" and \xE2\x82\xAC \n");
    assert_true(pml_json_as_int(pml_json_field(doc, "i"), &i) && i == INT64_MIN);
    for (int k = 0; k < N; k++) {
        double d;
        assert_true(
            pml_json_as_double(pml_json_item(pml_json_field(doc, "numbers"), (size_t)k), &d));
        assert_true(isnan(numbers[k]) ? isnan(d) : memcmp(&d, &numbers[k], sizeof d) == 0);
    }
    assert_int_equal(pml_json_kind_of(pml_json_field(pml_json_field(doc, "o"), "left open")),
                     PML_JSON_OBJECT);
    pml_json_destroy(&doc);
    free(text);
}

static void test_writer_remembers_its_failure(void **state)
{
    (void)state;
    pml_json_writer *writer = NULL;
    char *text = NULL;
    size_t size;
    EXPECT_OK(pml_json_writer_new(&writer, e));
    pml_json_put_string(writer, "bad", "\xff");
    pml_json_put_int(writer, "good", 1);
    EXPECT_FAIL(PML_INVALID, "bad is not valid UTF-8",
                pml_json_writer_finish(writer, 0, &text, &size, e));
    pml_json_writer_destroy(&writer);

    EXPECT_OK(pml_json_writer_new(&writer, e));
    pml_json_put_int(writer, NULL, 1); /* a field without a name */
    EXPECT_FAIL(PML_INTERNAL, "array item", pml_json_writer_finish(writer, 0, &text, &size, e));
    pml_json_writer_destroy(&writer);

    EXPECT_OK(pml_json_writer_new(&writer, e));
    for (int i = 0; i < 20; i++)
        pml_json_begin_object(writer, "down");
    EXPECT_FAIL(PML_INTERNAL, "down", pml_json_writer_finish(writer, 0, &text, &size, e));
    pml_json_writer_destroy(&writer);
}

static void test_show_is_cut(void **state)
{
    (void)state;
    char out[8];
    pml_json *doc = parsed("{\"a\":\"0123456789\"}");
    assert_string_equal(pml_json_show(pml_json_field(doc, "a"), out, sizeof out), "\"012345");
    assert_string_equal(pml_json_show(NULL, out, sizeof out), "null");
    pml_json_destroy(&doc);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fields_by_type_and_range),
        cmocka_unit_test(test_numbers_at_the_edge),
        cmocka_unit_test(test_refused_texts),
        cmocka_unit_test(test_order_of_fields),
        cmocka_unit_test(test_writer_round_trip),
        cmocka_unit_test(test_writer_remembers_its_failure),
        cmocka_unit_test(test_show_is_cut),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
