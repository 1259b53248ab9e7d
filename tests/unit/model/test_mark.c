#include "scratch.h"

#include <sys/stat.h>

#include "pml/model/mark.h"
#include "pml/model/safetensors.h"

enum { ELEMENTS = 4096 }; /* of 4 bytes: four pages a tensor */

static const char *folder_of(const char *name, const char *config)
{
    static char paths[4][256];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", scratch_root, name);
    mkdir(path, 0700); /* there already when it is written anew */
    char file[300];
    snprintf(file, sizeof file, "%s/config.json", path);
    put_file(file, config, strlen(config));
    return path;
}

/* Tensors a and b in `file` of the folder; element `at` of b is another one (-1: none is). */
static void put_weights(const char *folder, const char *file, bool a, bool b, int at)
{
    static float values[ELEMENTS];
    const int64_t shape[] = {ELEMENTS};
    char path[300];
    pml_safetensors_writer *w = NULL;
    snprintf(path, sizeof path, "%s/%s", folder, file);
    EXPECT_OK(pml_safetensors_writer_new(path, 0600, &w, e));
    if (a)
        EXPECT_OK(pml_safetensors_writer_add(w, "a", PML_F32, shape, 1, e));
    if (b)
        EXPECT_OK(pml_safetensors_writer_add(w, "b", PML_F32, shape, 1, e));
    for (int which = 0; which < 2; which++) {
        for (int i = 0; i < ELEMENTS; i++)
            values[i] = (float)(which * ELEMENTS + i) + (which == 1 && i == at ? 0.5f : 0);
        if (which == 0 ? a : b)
            EXPECT_OK(pml_safetensors_writer_write(w, values, sizeof values, e));
    }
    EXPECT_OK(pml_safetensors_writer_finish(w, e));
    pml_safetensors_writer_destroy(&w);
}

static const char *mark_of(const char *folder)
{
    static char marks[4][PML_MARK_HEX];
    static unsigned next;
    char *mark = marks[next++ % 4];
    EXPECT_OK(pml_model_mark(folder, mark, e));
    return mark;
}

static void test_a_copy_is_the_same(void **state)
{
    (void)state;
    const char *one = folder_of("one", "{}"), *copy = folder_of("copy", "{}");
    put_weights(one, "model.safetensors", true, true, -1);
    put_weights(copy, "model.safetensors", true, true, -1);
    assert_string_equal(mark_of(one), mark_of(copy));
}

static void test_shards_are_the_same(void **state)
{
    (void)state;
    const char *one = folder_of("whole", "{}"), *two = folder_of("shards", "{}");
    static const char index[] =
        "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\"}}";
    put_weights(one, "model.safetensors", true, true, -1);
    put_weights(two, "1.safetensors", true, false, -1);
    put_weights(two, "2.safetensors", false, true, -1);
    char path[300];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", two);
    put_file(path, index, sizeof index - 1);
    assert_string_equal(mark_of(one), mark_of(two));
}

static void test_other_weights_are_seen(void **state)
{
    (void)state;
    const char *one = folder_of("first", "{}"), *other = folder_of("other", "{}");
    put_weights(one, "model.safetensors", true, true, -1);
    put_weights(other, "model.safetensors", true, true, 1000);
    assert_string_not_equal(mark_of(one), mark_of(other));
    put_weights(other, "model.safetensors", true, true, 1024); /* behind the first page */
    assert_string_equal(mark_of(one), mark_of(other));
    put_weights(other, "model.safetensors", true, false, -1); /* and one tensor less */
    assert_string_not_equal(mark_of(one), mark_of(other));
}

static void test_another_config_is_seen(void **state)
{
    (void)state;
    const char *one = folder_of("plain", "{}"), *other = folder_of("scaled", "{\"rope\": 2}");
    put_weights(one, "model.safetensors", true, true, -1);
    put_weights(other, "model.safetensors", true, true, -1);
    assert_string_not_equal(mark_of(one), mark_of(other));
}

static void test_what_is_missing_is_told(void **state)
{
    (void)state;
    char mark[PML_MARK_HEX];
    const char *none = folder_of("none", "{}");
    EXPECT_FAIL(PML_NOT_FOUND, "model.safetensors", pml_model_mark(none, mark, e));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_copy_is_the_same),
        cmocka_unit_test(test_shards_are_the_same),
        cmocka_unit_test(test_other_weights_are_seen),
        cmocka_unit_test(test_another_config_is_seen),
        cmocka_unit_test(test_what_is_missing_is_told),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
