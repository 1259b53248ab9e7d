/* Folders that are held: what a link in them leads to is neither read nor written. */
#include "scratch.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/hold.h"

/*  run/inside/file   run/way -> outside   run/inside/link -> outside/secret   outside/secret */
static pml_hold *held_run(void)
{
    pml_hold *hold = NULL;
    EXPECT_OK(pml_tree_remove(scratch_root, "run", e));
    EXPECT_OK(pml_tree_remove(scratch_root, "outside", e));
    EXPECT_OK(pml_folder_make(scratch("run/inside"), e));
    EXPECT_OK(pml_folder_make(scratch("outside/below"), e));
    put_text(scratch("run/inside/file"), "ours");
    put_text(scratch("outside/secret"), "theirs");
    assert_int_equal(symlink("../outside", scratch("run/way")), 0);
    assert_int_equal(symlink("../../outside/secret", scratch("run/inside/link")), 0);
    EXPECT_OK(pml_hold_new(scratch("run"), &hold, e));
    return hold;
}

static int names_in(const char *path)
{
    struct dirent **list = NULL;
    int n = 0;
    EXPECT_OK(pml_folder_list(path, &list, NULL, alphasort, &n, e));
    for (int i = 0; i < n; i++)
        free(list[i]);
    free(list);
    return n - 2; /* . and .. */
}

static void a_link_on_the_way_is_refused(void **state)
{
    (void)state;
    static const char words[] = "run/way is a link, which is not followed here";
    pml_hold *hold = held_run();
    char path[512];
    snprintf(path, sizeof path, "%s", scratch("run/way/secret"));
    char *data = NULL;
    struct dirent **list = NULL;
    size_t size = 0;
    uint8_t hash[PML_HASH_BYTES];
    int fd = -1, n = 0;
    EXPECT_FAIL(PML_DENIED, words, pml_file_read(path, 100, true, &data, &size, e));
    EXPECT_FAIL(PML_DENIED, words, pml_hash_file(path, true, hash, e));
    EXPECT_FAIL(PML_DENIED, words, pml_open(path, O_RDONLY, &fd, e));
    EXPECT_FAIL(PML_DENIED, words,
                pml_file_open_regular(scratch("run"), "way/secret", O_RDWR, &fd, e));
    EXPECT_FAIL(PML_DENIED, words, pml_file_write(path, "x", 1, 0600, e));
    EXPECT_FAIL(PML_DENIED, "run/way is a link", pml_folder_make(scratch("run/way"), e));
    EXPECT_FAIL(PML_DENIED, "run/way is a link", pml_folder_make(scratch("run/way/new/er"), e));
    EXPECT_FAIL(PML_DENIED, words, pml_folder_sync(scratch("run/way/below"), e));
    EXPECT_FAIL(PML_DENIED, words, pml_folder_list(scratch("run/way"), &list, NULL, NULL, &n, e));
    EXPECT_FAIL(PML_DENIED, words, pml_tree_remove(scratch("run/way"), "secret", e));
    EXPECT_FAIL(PML_DENIED, words,
                pml_rename(scratch("run/inside/file"), scratch("run/way/file"), 0, e));
    EXPECT_FAIL(PML_DENIED, words, pml_rename(path, scratch("run/inside/taken"), 0, e));
    assert_int_equal(pml_folder_bytes(scratch("run/way")), 0);
    assert_false(pml_is_there(path));
    assert_int_equal(fd, -1);
    pml_hold_destroy(&hold);
    assert_int_equal(names_in(scratch("outside")), 2);
    EXPECT_OK(pml_file_read(scratch("outside/secret"), 100, false, &data, &size, e));
    assert_string_equal(data, "theirs");
    free(data);
}

static void a_link_in_the_place_is_refused(void **state)
{
    (void)state;
    static const char words[] = "run/inside/link is a link, which is not followed here: remove it";
    pml_hold *hold = held_run();
    char path[512];
    snprintf(path, sizeof path, "%s", scratch("run/inside/link"));
    char *data = NULL;
    size_t size = 0;
    uint8_t hash[PML_HASH_BYTES];
    int fd = -1;
    EXPECT_FAIL(PML_DENIED, words, pml_file_read(path, 100, true, &data, &size, e));
    EXPECT_FAIL(PML_DENIED, words, pml_hash_file(path, true, hash, e));
    EXPECT_FAIL(PML_DENIED, words, pml_open(path, O_WRONLY | O_TRUNC, &fd, e));
    assert_true(pml_is_there(path));
    /* A write takes the link's place, and what it led to stays. */
    EXPECT_OK(pml_file_write(path, "new", 3, 0600, e));
    EXPECT_OK(pml_file_read(path, 100, false, &data, &size, e));
    assert_string_equal(data, "new");
    free(data);
    EXPECT_OK(pml_file_read(scratch("outside/secret"), 100, false, &data, &size, e));
    assert_string_equal(data, "theirs");
    free(data);
    pml_hold_destroy(&hold);
}

/* Between its beginning and its end somebody puts a link where the file's folder was. */
static void who_swaps_a_folder_leads_nowhere(void **state)
{
    (void)state;
    pml_hold *hold = held_run();
    pml_atomic_file *file = NULL;
    char *data = NULL;
    size_t size = 0;
    EXPECT_OK(pml_atomic_file_new(scratch("run/inside/made"), 0600, &file, e));
    EXPECT_OK(pml_atomic_file_write(file, "ours", 4, e));
    assert_int_equal(rename(scratch("run/inside"), scratch("run/moved")), 0);
    assert_int_equal(symlink("../outside", scratch("run/inside")), 0);
    EXPECT_FAIL(PML_DENIED, "run/inside is a link", pml_atomic_file_commit(file, e));
    pml_atomic_file_destroy(&file);
    assert_int_equal(names_in(scratch("outside")), 2);
    EXPECT_OK(pml_file_read(scratch("run/moved/made"), 100, false, &data, &size, e));
    assert_string_equal(data, "ours");
    free(data);
    pml_hold_destroy(&hold);
}

/* A run goes on when its folder is removed, and saves into what it makes there anew. */
static void a_folder_made_anew_is_held(void **state)
{
    (void)state;
    pml_hold *hold = held_run();
    EXPECT_OK(pml_tree_remove(scratch_root, "run", e));
    EXPECT_FAIL(PML_IO, "run/inside/made",
                pml_file_write(scratch("run/inside/made"), "x", 1, 0600, e));
    EXPECT_OK(pml_folder_make(scratch("run/inside"), e));
    EXPECT_OK(pml_file_write(scratch("run/inside/made"), "x", 1, 0600, e));
    assert_int_equal(symlink("../outside", scratch("run/way")), 0);
    EXPECT_FAIL(PML_DENIED, "run/way is a link",
                pml_file_write(scratch("run/way/made"), "x", 1, 0600, e));
    EXPECT_OK(pml_tree_remove(scratch_root, "run", e));
    assert_int_equal(symlink("outside", scratch("run")), 0);
    EXPECT_FAIL(PML_DENIED, "run is a link",
                pml_file_write(scratch("run/below/made"), "x", 1, 0600, e));
    pml_hold_destroy(&hold);
    assert_int_equal(names_in(scratch("outside/below")), 0);
    assert_int_equal(unlink(scratch("run")), 0);
}

/* A run's folder is removed, and the next run of that name is begun: it is not the first one's. */
static void anothers_folder_is_not_held(void **state)
{
    (void)state;
    pml_hold *hold = held_run();
    char where[512];
    EXPECT_OK(pml_hold_where(scratch("run"), where, sizeof where, e));
    assert_string_equal(where, scratch("run"));
    EXPECT_OK(pml_tree_remove(scratch_root, "run", e));
    EXPECT_FAIL(PML_NOT_FOUND, "run was removed",
                pml_hold_where(scratch("run"), where, sizeof where, e));
    assert_int_equal(mkdir(scratch("run"), 0700), 0);
    EXPECT_FAIL(PML_IO, "another folder of that name",
                pml_folder_make(scratch("run/checkpoints"), e));
    EXPECT_FAIL(PML_IO, "another folder of that name",
                pml_file_write(scratch("run/made"), "x", 1, 0600, e));
    assert_int_equal(names_in(scratch("run")), 0);
    EXPECT_FAIL(PML_NOT_FOUND, "run was removed",
                pml_hold_where(scratch("run"), where, sizeof where, e));
    pml_hold_destroy(&hold);
}

static void expect_there(const char *name, bool there)
{
    if (pml_is_there(scratch(name)) != there)
        fail_msg("%s is %sthere", name, there ? "not " : "");
}

/* Somebody moves a run's folder, and perhaps makes another where it was: the run is in the first.
 */
static void a_moved_folder_is_still_held(void **state)
{
    (void)state;
    pml_hold *hold = held_run();
    EXPECT_OK(pml_tree_remove(scratch_root, "elsewhere", e));
    assert_int_equal(rename(scratch("run"), scratch("elsewhere")), 0);
    EXPECT_OK(pml_file_write(scratch("run/made"), "x", 1, 0600, e)); /* it syncs its folder */
    EXPECT_OK(pml_folder_make(scratch("run/new/er"), e));
    EXPECT_OK(pml_folder_sync(scratch("run"), e));
    expect_there("elsewhere/made", true);
    expect_there("elsewhere/new/er", true);
    char where[512];
    EXPECT_OK(pml_hold_where(scratch("run"), where, sizeof where, e));
    assert_string_equal(where, scratch("elsewhere"));
    assert_int_equal(access(scratch("run"), F_OK), -1);

    assert_int_equal(mkdir(scratch("run"), 0700), 0);
    int fd = open(scratch("run"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(mkdirat(fd, "made", 0700), 0);
    assert_int_equal(names_in(scratch("run")), 4); /* inside, way, made, new */
    EXPECT_OK(pml_tree_remove(scratch("run"), "made", e));
    expect_there("elsewhere/made", false);
    assert_int_equal(faccessat(fd, "made", F_OK, 0), 0);
    EXPECT_OK(pml_folder_sync(scratch("run"), e));
    EXPECT_FAIL(PML_INVALID, "run: it is a folder",
                pml_file_write(scratch("run"), "x", 1, 0600, e));
    close(fd);
    pml_hold_destroy(&hold);
    EXPECT_OK(pml_tree_remove(scratch_root, "elsewhere", e));
}

static void a_slash_at_its_end_changes_nothing(void **state)
{
    (void)state;
    pml_hold *hold = held_run(), *slashed = NULL;
    pml_hold_destroy(&hold);
    char path[400];
    snprintf(path, sizeof path, "%s/run//", scratch_root);
    EXPECT_OK(pml_hold_new(path, &slashed, e));
    EXPECT_FAIL(PML_DENIED, "run/way is a link",
                pml_file_write(scratch("run/way/made"), "x", 1, 0600, e));
    EXPECT_OK(pml_folder_sync(scratch("run"), e));
    pml_hold_destroy(&slashed);
    assert_int_equal(names_in(scratch("outside")), 2);
}

static void names_stay_below(void **state)
{
    (void)state;
    pml_hold *hold = held_run();
    char *data = NULL;
    size_t size = 0;
    static const char *const names[] = {"../outside/secret", "inside/../../outside/secret",
                                        "inside//file", "./inside/file", ""};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[400];
        snprintf(path, sizeof path, "%s/run/%s", scratch_root, names[i]);
        EXPECT_FAIL(PML_INVALID, "does not name something in its folder",
                    pml_file_read(path, 100, true, &data, &size, e));
    }
    EXPECT_FAIL(PML_NOT_FOUND, "run/no: No such",
                pml_file_read(scratch("run/no/thing"), 100, true, &data, &size, e));
    EXPECT_FAIL(PML_INVALID, "run/inside/file: Not a directory",
                pml_file_read(scratch("run/inside/file/x"), 100, true, &data, &size, e));
    pml_hold_destroy(&hold);
}

/* The user's own folders may be made of links: those above a run, and those of models. */
static void links_elsewhere_are_followed(void **state)
{
    (void)state;
    pml_hold *hold = held_run();
    pml_hold *linked = NULL;
    char *data = NULL;
    size_t size = 0;
    unlink(scratch("shortcut"));
    assert_int_equal(symlink("run", scratch("shortcut")), 0);
    EXPECT_OK(pml_file_read(scratch("shortcut/way/secret"), 100, false, &data, &size, e));
    free(data);
    EXPECT_OK(pml_hold_new(scratch("shortcut"), &linked, e));
    EXPECT_OK(pml_file_read(scratch("shortcut/inside/file"), 100, false, &data, &size, e));
    free(data);
    EXPECT_FAIL(PML_DENIED, "shortcut/way is a link",
                pml_file_read(scratch("shortcut/way/secret"), 100, false, &data, &size, e));
    pml_hold_destroy(&linked);
    pml_hold_destroy(&hold);
    EXPECT_OK(pml_file_read(scratch("run/way/secret"), 100, false, &data, &size, e));
    free(data);
    EXPECT_FAIL(PML_NOT_FOUND, "nowhere", pml_hold_new(scratch("nowhere"), &hold, e));
    assert_null(hold);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_link_on_the_way_is_refused),
        cmocka_unit_test(a_link_in_the_place_is_refused),
        cmocka_unit_test(who_swaps_a_folder_leads_nowhere),
        cmocka_unit_test(a_folder_made_anew_is_held),
        cmocka_unit_test(anothers_folder_is_not_held),
        cmocka_unit_test(a_moved_folder_is_still_held),
        cmocka_unit_test(a_slash_at_its_end_changes_nothing),
        cmocka_unit_test(names_stay_below),
        cmocka_unit_test(links_elsewhere_are_followed),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
