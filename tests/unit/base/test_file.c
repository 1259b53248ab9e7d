#include "scratch.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <dirent.h>

#include "pml/base/file_at.h"

static int entries(const char *folder)
{
    int n = 0;
    DIR *d = opendir(folder);
    assert_non_null(d);
    for (struct dirent *entry; (entry = readdir(d)) != NULL;)
        n += entry->d_name[0] != '.';
    closedir(d);
    return n;
}

static void expect_content(const char *path, const char *text)
{
    char *data = NULL;
    size_t size = 0;
    EXPECT_OK(pml_file_read(path, 1000, false, &data, &size, e));
    assert_int_equal(size, strlen(text));
    assert_string_equal(data, text); /* the NUL after the end too */
    free(data);
}

static void test_write_replaces_whole(void **state)
{
    (void)state;
    struct stat info;
    EXPECT_OK(pml_folder_make(scratch("w"), e));
    mode_t mask = umask(0077);
    EXPECT_OK(pml_file_write(scratch("w/a"), "first", 5, 0644, e));
    umask(mask);
    assert_int_equal(stat(scratch("w/a"), &info), 0);
    assert_int_equal(info.st_mode & 07777, 0644);
    EXPECT_OK(pml_file_write(scratch("w/a"), "2nd", 3, 0600, e));
    expect_content(scratch("w/a"), "2nd");
    assert_int_equal(stat(scratch("w/a"), &info), 0);
    assert_int_equal(info.st_mode & 07777, 0600);
    assert_int_equal(entries(scratch("w")), 1);
}

static void test_write_in_pieces(void **state)
{
    (void)state;
    pml_atomic_file *file = NULL;
    EXPECT_OK(pml_folder_make(scratch("p"), e));
    EXPECT_OK(pml_file_write(scratch("p/a"), "old", 3, 0600, e));

    EXPECT_OK(pml_atomic_file_new(scratch("p/a"), 0600, &file, e));
    EXPECT_OK(pml_atomic_file_write(file, "ne", 2, e));
    expect_content(scratch("p/a"), "old");
    EXPECT_OK(pml_atomic_file_write(file, "w", 1, e));
    EXPECT_OK(pml_atomic_file_commit(file, e));
    expect_content(scratch("p/a"), "new");
    pml_atomic_file_destroy(&file);
    assert_null(file);
    pml_atomic_file_destroy(&file); /* of nothing is nothing */

    EXPECT_OK(pml_atomic_file_new(scratch("p/a"), 0600, &file, e));
    EXPECT_OK(pml_atomic_file_write(file, "lost", 4, e));
    pml_atomic_file_destroy(&file);
    expect_content(scratch("p/a"), "new");
    assert_int_equal(entries(scratch("p")), 1);
}

static void test_write_does_not_follow_a_link(void **state)
{
    (void)state;
    put_text(scratch("target"), "safe");
    assert_int_equal(symlink("target", scratch("link")), 0);
    EXPECT_OK(pml_file_write(scratch("link"), "new", 3, 0600, e));
    expect_content(scratch("target"), "safe");
    expect_content(scratch("link"), "new");
}

static void test_write_names_what_fails(void **state)
{
    (void)state;
    EXPECT_FAIL(PML_IO, "nowhere", pml_file_write(scratch("nowhere/a"), "x", 1, 0600, e));
    EXPECT_OK(pml_folder_make(scratch("isdir/full"), e));
    EXPECT_FAIL(PML_IO, "isdir", pml_file_write(scratch("isdir"), "x", 1, 0600, e));
    assert_int_equal(entries(scratch("isdir")), 1);
    int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    assert_true(full >= 0);
    EXPECT_FAIL(PML_IO, "No space left", pml_file_write_all(full, "x", 1, "/dev/full", e));
    close(full);
}

static void test_read_limits(void **state)
{
    (void)state;
    char *data = NULL;
    size_t size = 0;
    put_text(scratch("ten"), "0123456789");
    EXPECT_OK(pml_file_read(scratch("ten"), 10, false, &data, &size, e));
    assert_int_equal(size, 10);
    free(data);
    EXPECT_FAIL(PML_INVALID, "larger than 9",
                pml_file_read(scratch("ten"), 9, false, &data, &size, e));
    EXPECT_FAIL(PML_NOT_FOUND, "none", pml_file_read(scratch("none"), 9, false, &data, &size, e));
    EXPECT_FAIL(PML_INVALID, "regular", pml_file_read(scratch_root, 9, false, &data, &size, e));
    put_text(scratch("empty"), "");
    EXPECT_OK(pml_file_read(scratch("empty"), 0, false, &data, &size, e));
    assert_int_equal(size, 0);
    assert_string_equal(data, "");
    free(data);
    /* One whose size is not known before. */
    EXPECT_OK(pml_file_read("/proc/self/status", 1 << 20, false, &data, &size, e));
    assert_true(size > 100);
    free(data);
    EXPECT_FAIL(PML_INVALID, "larger than 50",
                pml_file_read("/proc/self/status", 50, false, &data, &size, e));
}

static void test_read_links_and_pipes(void **state)
{
    (void)state;
    char *data = NULL;
    size_t size = 0;
    put_text(scratch("there"), "yes");
    assert_int_equal(symlink("there", scratch("soft")), 0);
    EXPECT_FAIL(PML_DENIED, "soft is a link",
                pml_file_read(scratch("soft"), 9, false, &data, &size, e));
    EXPECT_OK(pml_file_read(scratch("soft"), 9, true, &data, &size, e));
    assert_string_equal(data, "yes");
    free(data);
    assert_int_equal(mkfifo(scratch("pipe"), 0600), 0);
    EXPECT_FAIL(PML_INVALID, "regular", pml_file_read(scratch("pipe"), 9, false, &data, &size, e));
}

static void test_folder_make(void **state)
{
    (void)state;
    struct stat info;
    EXPECT_OK(pml_folder_make(scratch("a/b//c/"), e));
    assert_int_equal(stat(scratch("a/b/c"), &info), 0);
    assert_int_equal(info.st_mode & 07777, 0700);
    EXPECT_OK(pml_folder_make(scratch("a/b/c"), e));
    put_text(scratch("a/file"), "");
    EXPECT_FAIL(PML_INVALID, "not a folder", pml_folder_make(scratch("a/file"), e));
    EXPECT_FAIL(PML_INVALID, "a/file exists", pml_folder_make(scratch("a/file/x"), e));
    EXPECT_FAIL(PML_INVALID, "no name", pml_folder_make("", e));
    EXPECT_FAIL(PML_NOT_FOUND, "absent", pml_folder_sync(scratch("absent"), e));
}

static void test_tree_remove_stays_inside(void **state)
{
    (void)state;
    EXPECT_OK(pml_folder_make(scratch("outside"), e));
    put_text(scratch("outside/keep"), "keep");
    EXPECT_OK(pml_folder_make(scratch("root/tree/x/y"), e));
    put_text(scratch("root/tree/x/file"), "");
    assert_int_equal(symlink(scratch("outside"), scratch("root/tree/x/y/way-out")), 0);
    assert_int_equal(symlink(scratch("outside"), scratch("root/door")), 0);

    const char *root = scratch("root");
    static const char *const refused[] = {
        "", ".", "..", "../outside", "tree/../../outside", "/tmp", "tree//x", "tree/"};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        EXPECT_FAIL(PML_INVALID, "not a name below", pml_tree_remove(root, refused[i], e));
    EXPECT_FAIL(PML_IO, "cannot enter", pml_tree_remove(root, "door/keep", e));
    EXPECT_OK(pml_tree_remove(root, "tree", e));
    EXPECT_OK(pml_tree_remove(root, "door", e));
    assert_int_equal(entries(root), 0);
    EXPECT_OK(pml_tree_remove(root, "tree", e)); /* gone already */
    EXPECT_OK(pml_tree_remove(root, "no/such/thing", e));
    expect_content(scratch("outside/keep"), "keep");
}

static void test_tree_remove_of_a_deep_tree_ends(void **state)
{
    (void)state;
    char path[1024];
    int n = snprintf(path, sizeof path, "%s/deep", scratch_root);
    for (int i = 0; i < 80; i++)
        n += snprintf(path + n, sizeof path - (size_t)n, "/d");
    EXPECT_OK(pml_folder_make(path, e));
    EXPECT_FAIL(PML_INVALID, "levels", pml_tree_remove(scratch_root, "deep", e));
    /* The part below is removed by its own name, then the rest is shallow enough. */
    path[strlen(scratch_root) + strlen("/deep") + (size_t)40 * 2] = '\0';
    EXPECT_OK(pml_tree_remove(scratch_root, path + strlen(scratch_root) + 1, e));
    EXPECT_OK(pml_tree_remove(scratch_root, "deep", e));
}

static void test_paths(void **state)
{
    (void)state;
    char out[16];
    EXPECT_OK(pml_path_join(out, sizeof out, "a", "b", e));
    assert_string_equal(out, "a/b");
    EXPECT_OK(pml_path_join(out, sizeof out, "a/", "b", e));
    assert_string_equal(out, "a/b");
    EXPECT_OK(pml_path_join(out, sizeof out, "", "b", e));
    assert_string_equal(out, "b");
    EXPECT_OK(pml_path_join(out, sizeof out, "a", "/b", e));
    assert_string_equal(out, "/b");
    EXPECT_OK(pml_path_join(out, sizeof out, "1234567", "1234567", e));
    EXPECT_FAIL(PML_INVALID, "longer", pml_path_join(out, sizeof out, "12345678", "1234567", e));
    static const char *const folders[][2] = {{"a/b", "a"}, {"a", "."},    {"/a", "/"},
                                             {"/", "/"},   {"a//b", "a"}, {"", "."},
                                             {"a/", "a"},  {"/a/b", "/a"}};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        EXPECT_OK(pml_path_folder(out, sizeof out, folders[i][0], e));
        assert_string_equal(out, folders[i][1]);
    }
    assert_string_equal(pml_path_name("a/b.c"), "b.c");
    assert_string_equal(pml_path_name("b.c"), "b.c");
    assert_true(pml_path_is_below("a/..b/c.d"));
    assert_false(pml_path_is_below("a/../b"));
}

static void test_read_at(void **state)
{
    (void)state;
    char to[8] = "";
    put_text(scratch("at"), "0123456789");
    const char *path = scratch("at");
    int fd = open(path, O_RDONLY | O_CLOEXEC), shut = open(path, O_WRONLY | O_CLOEXEC);
    assert_true(fd >= 0 && shut >= 0);
    pml_file_at place = {fd, 3, path};
    EXPECT_OK(pml_file_at_read(&place, to, 4, e));
    assert_string_equal(to, "3456");
    EXPECT_OK(pml_file_at_read(&place, to, 2, e)); /* from the same place */
    assert_string_equal(to, "3456");
    EXPECT_FAIL(PML_CORRUPT, "at has no byte 10, and 1 were", pml_file_at_read(&place, to, 8, e));
    place.at = 1000;
    EXPECT_OK(pml_file_at_read(&place, to, 0, e));
    EXPECT_FAIL(PML_CORRUPT, "1000", pml_file_at_read(&place, to, 1, e));
    place.at = UINT64_MAX - 1; /* beyond all files: no loop, and not from the begin again */
    EXPECT_FAIL(PML_IO, "18446744073709551614", pml_file_at_read(&place, to, 4, e));
    place = (pml_file_at){shut, 3, path};
    EXPECT_FAIL(PML_IO, "at at byte 3: Bad file", pml_file_at_read(&place, to, 4, e));
    close(fd);
    close(shut);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_write_replaces_whole),
        cmocka_unit_test(test_write_in_pieces),
        cmocka_unit_test(test_write_does_not_follow_a_link),
        cmocka_unit_test(test_write_names_what_fails),
        cmocka_unit_test(test_read_limits),
        cmocka_unit_test(test_read_links_and_pipes),
        cmocka_unit_test(test_folder_make),
        cmocka_unit_test(test_tree_remove_stays_inside),
        cmocka_unit_test(test_tree_remove_of_a_deep_tree_ends),
        cmocka_unit_test(test_paths),
        cmocka_unit_test(test_read_at),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
