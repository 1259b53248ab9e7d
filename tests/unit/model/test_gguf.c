#include "scratch.h"

#include <sys/stat.h>
#include <unistd.h>

#include "pml/json/json.h"
#include "pml/model/convert.h"
#include "pml/model/gguf.h"

/* More than is read at once, of any type; multiples of a block. */
enum { ELEMENTS = 5 * 2048 + 96 };

static const pml_gguf_type types[] = {PML_GGUF_F32, PML_GGUF_F16, PML_GGUF_BF16, PML_GGUF_Q8_0};
static const char *const names[] = {"a", "b", "c", "d"};
enum { TYPES = sizeof types / sizeof *types };

/* A number that each of the types has exactly: for Q8_0 the scale is one. */
static float element(int i)
{
    return (float)(i * 7 % 255 - 127);
}

/* Elements as the type stores them; returns the bytes. */
static size_t pack(pml_gguf_type type, unsigned char *out)
{
    static float values[ELEMENTS];
    unsigned char *at = out;
    for (int i = 0; i < ELEMENTS; i++)
        values[i] = element(i);
    if (type == PML_GGUF_F16 || type == PML_GGUF_BF16) {
        EXPECT_OK(pml_convert_from_f32(values, ELEMENTS, out,
                                       type == PML_GGUF_F16 ? PML_F16 : PML_BF16, e));
        return ELEMENTS * 2;
    }
    if (type == PML_GGUF_F32) {
        memcpy(out, values, sizeof values);
        return sizeof values;
    }
    for (int i = 0; i < ELEMENTS; i++) {
        if (i % PML_GGUF_Q8_BLOCK == 0) {
            *at++ = 0x00; /* 1 in float16 */
            *at++ = 0x3C;
        }
        *at++ = (unsigned char)(signed char)values[i];
    }
    return (size_t)(at - out);
}

/* Pairs of which one has more items than a window of the header, and the four tensors. */
static void write_model(const char *path)
{
    enum { ITEMS = 40000 };
    static char text[ITEMS * 8 + 200];
    static unsigned char data[ELEMENTS * sizeof(float)];
    int n =
        snprintf(text, sizeof text, "[{\"key\":\"words\",\"type\":\"strings\",\"value\":[\"0\"");
    for (int i = 1; i < ITEMS; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, ",\"%d\"", i);
    n += snprintf(text + n, sizeof text - (size_t)n,
                  "]},{\"key\":\"after\",\"type\":\"string\",\"value\":\"here\"}]");
    pml_json *pairs = NULL;
    pml_gguf_writer *w = NULL;
    EXPECT_OK(pml_json_parse(text, (size_t)n, "pairs", &pml_json_file_limits, &pairs, e));
    EXPECT_OK(pml_gguf_writer_new(path, 0600, &w, e));
    EXPECT_OK(pml_gguf_writer_pairs(w, pairs, e));
    for (int i = 0; i < TYPES; i++)
        EXPECT_OK(pml_gguf_writer_add(w, names[i], types[i], (uint64_t[]){ELEMENTS}, 1, e));
    for (int i = 0; i < TYPES; i++) {
        size_t bytes = pack(types[i], data);
        EXPECT_OK(pml_gguf_writer_write(w, data, bytes, e));
    }
    EXPECT_OK(pml_gguf_writer_finish(w, e));
    pml_gguf_writer_destroy(&w);
    pml_json_destroy(&pairs);
}

static void test_reads_what_was_written(void **state)
{
    (void)state;
    static float values[ELEMENTS];
    pml_gguf *file = NULL;
    size_t n = 0;
    write_model(scratch("model"));
    EXPECT_OK(pml_gguf_open(scratch("model"), &file, e));
    assert_int_equal(pml_gguf_pairs(file), 2);
    assert_null(pml_gguf_string(file, "words", &n)); /* an array is passed over */
    assert_memory_equal(pml_gguf_string(file, "after", &n), "here", 4);
    assert_int_equal(n, 4);
    assert_int_equal(pml_gguf_count(file), TYPES);
    for (int k = 0; k < TYPES; k++) {
        const pml_gguf_tensor *t = pml_gguf_find(file, names[k]);
        assert_int_equal(t->type, types[k]);
        EXPECT_OK(pml_gguf_to_f32(t, 0, ELEMENTS, values, e));
        for (int i = 0; i < ELEMENTS; i++)
            assert_true(values[i] == element(i));
        EXPECT_OK(pml_gguf_to_f32(t, 2048 + 32, 64, values, e));
        assert_true(values[0] == element(2048 + 32) && values[63] == element(2048 + 95));
        EXPECT_FAIL(PML_INVALID, "no elements", pml_gguf_to_f32(t, ELEMENTS, 32, values, e));
    }
    pml_gguf_close(&file);
    assert_null(file);
    pml_gguf_close(&file);
}

/* While open, in place: an error that names the file and the byte, not a signal. */
static void test_cut_short_while_open(void **state)
{
    (void)state;
    static float values[ELEMENTS];
    pml_gguf *file = NULL;
    char words[64];
    write_model(scratch("cut"));
    EXPECT_OK(pml_gguf_open(scratch("cut"), &file, e));
    const pml_gguf_tensor *last = pml_gguf_find(file, names[TYPES - 1]);
    const long long end = (long long)(last->place.at + last->bytes - 1);
    assert_int_equal(truncate(scratch("cut"), end), 0);
    for (int k = 0; k < TYPES - 1; k++)
        EXPECT_OK(pml_gguf_to_f32(pml_gguf_find(file, names[k]), 0, ELEMENTS, values, e));
    snprintf(words, sizeof words, "cut has no byte %lld", end);
    EXPECT_FAIL(PML_CORRUPT, words, pml_gguf_to_f32(last, 0, ELEMENTS, values, e));
    pml_gguf_close(&file);
}

/* Cut anywhere before it is opened, or another file. */
static void test_refuses_what_is_no_model(void **state)
{
    (void)state;
    pml_gguf *file = NULL;
    struct stat about;
    write_model(scratch("short"));
    assert_int_equal(stat(scratch("short"), &about), 0);
    for (off_t left = about.st_size - PML_GGUF_ALIGN; left > 0; left = left * 7 / 8) {
        assert_int_equal(truncate(scratch("short"), left), 0);
        EXPECT_FAIL(PML_CORRUPT, "short", pml_gguf_open(scratch("short"), &file, e));
        assert_null(file);
    }
    EXPECT_FAIL(PML_NOT_FOUND, "none", pml_gguf_open(scratch("none"), &file, e));
    put_text(scratch("other"), "this is not a model, and has more bytes than its header");
    EXPECT_FAIL(PML_CORRUPT, "no GGUF file", pml_gguf_open(scratch("other"), &file, e));
    EXPECT_FAIL(PML_CORRUPT, "no GGUF file", pml_gguf_open(scratch_root, &file, e));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads_what_was_written),
        cmocka_unit_test(test_cut_short_while_open),
        cmocka_unit_test(test_refuses_what_is_no_model),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
