/* Timed choices on disk: what is kept is found by the next process, and what is damaged is not. */
#include "scratch.h"

#include <sys/stat.h>
#include <unistd.h>

#include "cuda/choices.c"

static pmli_choice some(int n)
{
    pmli_choice c;
    for (int i = 0; i < PMLI_CHOICE_KEY; i++)
        c.key[i] = i * 1000 + n - 3;
    for (int i = 0; i < PMLI_CHOICE_WORDS; i++)
        c.algorithm[i] = UINT64_MAX / (uint64_t)(n + i + 1);
    return c;
}

static void expect(const pmli_choices *choices, int n, bool there)
{
    pmli_choice c = some(n);
    const uint64_t *found = pmli_choices_find(choices, c.key);
    if (!there)
        assert_null(found);
    else
        assert_memory_equal(found, c.algorithm, sizeof c.algorithm);
}

static pmli_choices *opened(const char *name, const char *device)
{
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s/%s/cuda", scratch_root, name);
    pmli_choices *choices = pmli_choices_new(folder, device, 13000, 130100);
    assert_non_null(choices);
    return choices;
}

static void keep(pmli_choices *choices, int n)
{
    pmli_choice c = some(n);
    pmli_choices_keep(choices, &c);
}

static void found_by_the_next_process(void **state)
{
    (void)state;
    pmli_choices *first = opened("next", "NVIDIA H200"), *beside = opened("next", "NVIDIA H200");
    expect(first, 1, false);
    keep(first, 1);
    keep(beside, 2); /* two processes, one file */
    keep(first, 3);
    expect(first, 1, true);
    expect(first, 2, false);
    pmli_choices *next = opened("next", "NVIDIA H200"), *other = opened("next", "NVIDIA A100");
    for (int n = 1; n <= 3; n++) {
        expect(next, n, true);
        expect(other, n, false);
    }
    pmli_choices_destroy(&first);
    pmli_choices_destroy(&beside);
    pmli_choices_destroy(&next);
    pmli_choices_destroy(&other);
    assert_null(first);
}

static void the_last_word_counts(void **state)
{
    (void)state;
    pmli_choices *choices = opened("last", "GPU");
    pmli_choice c = some(1);
    c.algorithm[0] = 7;
    pmli_choices_keep(choices, &c);
    keep(choices, 1);
    expect(choices, 1, true);
    pmli_choices_destroy(&choices);
}

/* Each byte of the second of three lines is changed, cut off, or made a line's end. */
static void damage_is_left_out(void **state)
{
    (void)state;
    pmli_choices *choices = opened("damage", "GPU");
    for (int n = 1; n <= 3; n++)
        keep(choices, n);
    char path[PATH_MAX], whole[3 * LINE];
    snprintf(path, sizeof path, "%s", choices->path);
    pmli_choices_destroy(&choices);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_int_equal(fread(whole, 1, sizeof whole, file), sizeof whole);
    assert_int_equal(fgetc(file), EOF);
    fclose(file);
    static const char put[] = {'0', 'f', 'z', '\n', '\0'};
    for (size_t at = LINE; at < 2 * LINE; at += 5)
        for (size_t p = 0; p < sizeof put; p++) {
            char changed[3 * LINE];
            memcpy(changed, whole, sizeof whole);
            if (changed[at] == put[p])
                continue;
            changed[at] = put[p];
            file = fopen(path, "w");
            assert_int_equal(fwrite(changed, 1, sizeof changed, file), sizeof changed);
            fclose(file);
            choices = opened("damage", "GPU");
            expect(choices, 1, true);
            assert_true(choices->count <= 2); /* never the second, never a third of its making */
            expect(choices, 2, false);
            pmli_choices_destroy(&choices);
        }
}

static void torn_and_foreign_files(void **state)
{
    (void)state;
    pmli_choices *choices = opened("torn", "GPU");
    keep(choices, 1);
    keep(choices, 2);
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", choices->path);
    pmli_choices_destroy(&choices);
    assert_int_equal(truncate(path, LINE + 40), 0);
    choices = opened("torn", "GPU");
    expect(choices, 1, true);
    expect(choices, 2, false);
    pmli_choices_destroy(&choices);
    FILE *file = fopen(path, "w");
    for (int i = 0; i < 9000; i++)
        fputc(i * 7 % 251, file);
    fclose(file);
    choices = opened("torn", "GPU");
    assert_int_equal(choices->count, 0);
    pmli_choices_destroy(&choices);
}

/* What a link leads to is neither read nor written; a pipe is not waited for. */
static void a_link_or_a_pipe_is_no_file_of_ours(void **state)
{
    (void)state;
    pmli_choices *choices = opened("linked", "GPU");
    keep(choices, 1);
    char path[PATH_MAX], moved[PATH_MAX + 8];
    snprintf(path, sizeof path, "%s", choices->path);
    snprintf(moved, sizeof moved, "%s.moved", path);
    pmli_choices_destroy(&choices);
    assert_int_equal(rename(path, moved), 0);
    for (int pipe = 0; pipe < 2; pipe++) {
        assert_int_equal(pipe ? mkfifo(path, 0600) : symlink(moved, path), 0);
        choices = opened("linked", "GPU");
        assert_int_equal(choices->count, 0);
        keep(choices, 2); /* said in the log */
        pmli_choices_destroy(&choices);
        assert_int_equal(unlink(path), 0);
    }
    struct stat info;
    assert_int_equal(stat(moved, &info), 0);
    assert_int_equal(info.st_size, LINE);
}

static void no_folder_is_no_failure(void **state)
{
    (void)state;
    pmli_choices *choices = pmli_choices_new("/dev/null/nowhere", "GPU", 13000, 1);
    assert_non_null(choices);
    keep(choices, 1); /* said in the log */
    expect(choices, 1, true);
    pmli_choices_destroy(&choices);
    char folder[PATH_MAX + 1];
    memset(folder, 'x', sizeof folder);
    folder[sizeof folder - 1] = '\0';
    const char *const nowhere[] = {folder, NULL}; /* too long a name, and none */
    for (int i = 0; i < 2; i++) {
        choices = pmli_choices_new(nowhere[i], "GPU", 13000, 1);
        assert_non_null(choices);
        keep(choices, 1);
        expect(choices, 1, true);
        assert_string_equal(choices->path, "");
        pmli_choices_destroy(&choices);
    }
}

/* The nearest with more in one place, whatever came first, and nothing else different. */
static void near_is_more_in_one_place(void **state)
{
    (void)state;
    pmli_choices *choices = opened("near", "GPU");
    static const int64_t there[] = {4096, 8192, 6144, 2048, 6144, 16384};
    for (int i = 0; i < 6; i++) {
        pmli_choice c = some(1);
        c.key[2] = there[i];
        c.algorithm[0] = (uint64_t)i;
        pmli_choices_keep(choices, &c);
    }
    static const struct {
        int64_t wanted, most;
        int found; /* -1: nothing */
    } cases[] = {
        {5000, 10000, 4}, /* the last word about 6144 */
        {6143, 10000, 4}, {6144, 10000, 1}, {3000, 6000, 0},
        {4096, 6143, -1}, {4096, 6144, 4},  {1024, 2047, -1},
        {1024, 2048, 3},  {8192, 16384, 5}, {16384, INT64_MAX, -1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pmli_choice c = some(1);
        c.key[2] = cases[i].wanted;
        const uint64_t *near = pmli_choices_near(choices, c.key, 2, cases[i].most);
        if (cases[i].found < 0)
            assert_null(near);
        else
            assert_int_equal(near[0], cases[i].found);
    }
    for (int place = 0; place < PMLI_CHOICE_KEY; place++) {
        pmli_choice c = some(1);
        c.key[2] = 5000;
        c.key[place]--;
        const uint64_t *near = pmli_choices_near(choices, c.key, 2, 10000);
        assert_true((near != NULL) == (place == 2));
        c = some(1);
        c.key[2] = 5000;
        assert_null(pmli_choices_near(choices, c.key, place == 2 ? 0 : place, INT64_MAX));
    }
    pmli_choices_destroy(&choices);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(found_by_the_next_process),
        cmocka_unit_test(the_last_word_counts),
        cmocka_unit_test(damage_is_left_out),
        cmocka_unit_test(torn_and_foreign_files),
        cmocka_unit_test(no_folder_is_no_failure),
        cmocka_unit_test(near_is_more_in_one_place),
        cmocka_unit_test(a_link_or_a_pipe_is_no_file_of_ours),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
