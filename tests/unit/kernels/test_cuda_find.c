/* Where CUDA's libraries are looked for, on a made-up file system: a library that opens (a copy of
 * the loader test's) under names that only these tests have. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h> /* wants the ones above before it */

#include <sys/stat.h>
#include <unistd.h>

#include "cuda/find_library.c"

static const pmli_library library = {"libpmltest.so", "testlib", "nvidia-test", 0};
static char root[64];

/* root/path, its folders made. */
static void place(char *full, const char *path)
{
    snprintf(full, PATH_MAX, "%s/%s", root, path);
    for (char *slash = strchr(full + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(full, 0700);
        *slash = '/';
    }
}

/* A copy, not a link: the loader would take two names of one file for one library. */
static void put_library(const char *path)
{
    char full[PATH_MAX], block[4096];
    place(full, path);
    FILE *from = fopen(FAKE_CUDA_BACKEND, "rb"), *to = fopen(full, "wb");
    assert_non_null(from);
    assert_non_null(to);
    size_t n;
    while ((n = fread(block, 1, sizeof block, from)) > 0)
        assert_int_equal(fwrite(block, 1, n, to), n);
    fclose(from);
    assert_int_equal(fclose(to), 0);
}

static void expect_opened(int newest_major, const char *path)
{
    void *handle = NULL;
    pml_error err = PML_ERROR_INIT;
    if (pmli_open_library(&library, newest_major, &handle, &err) != PML_OK)
        fail_msg("%s", err.message);
    Dl_info info;
    assert_int_not_equal(dladdr(dlsym(handle, "pml_cuda_backend"), &info), 0);
    char want[PATH_MAX];
    snprintf(want, sizeof want, "%s/%s", root, path);
    assert_string_equal(info.dli_fname, want);
}

static void expect_missing(int newest_major, const char *words)
{
    void *handle = NULL;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pmli_open_library(&library, newest_major, &handle, &err), PML_NOT_FOUND);
    if (strstr(err.message, words) == NULL)
        fail_msg("'%s' does not say '%s'", err.message, words);
}

static int make_root(void **state)
{
    (void)state;
    char pattern[] = "/tmp/pml-find-XXXXXX";
    if (mkdtemp(pattern) == NULL)
        return -1;
    snprintf(root, sizeof root, "%s", pattern);
    unsetenv("PML_CUDA_LIBS");
    unsetenv("VIRTUAL_ENV");
    unsetenv("CONDA_PREFIX");
    return setenv("PATH", root, 1);
}

static int remove_root(void **state)
{
    (void)state;
    char command[sizeof root + 16];
    snprintf(command, sizeof command, "/bin/rm -rf %s", root);
    return system(command);
}

static void says_what_to_install(void **state)
{
    (void)state;
    expect_missing(13, "pip install 'nvidia-test==13.*'");
    expect_missing(12, "pip install 'nvidia-test-cu12'");
}

static void beside_a_python(void **state)
{
    (void)state;
    char environment[PATH_MAX], program[PATH_MAX];
    put_library("env/lib/python3.12/site-packages/nvidia/testlib/lib/libpmltest.so.12");
    place(environment, "env");
    setenv("VIRTUAL_ENV", environment, 1);
    expect_opened(13, "env/lib/python3.12/site-packages/nvidia/testlib/lib/libpmltest.so.12");

    /* A newer major version is preferred, but not one the driver is too old for. */
    put_library("env/lib/python3.12/site-packages/nvidia/cu13/lib/libpmltest.so.13");
    expect_opened(13, "env/lib/python3.12/site-packages/nvidia/cu13/lib/libpmltest.so.13");
    expect_opened(12, "env/lib/python3.12/site-packages/nvidia/testlib/lib/libpmltest.so.12");
    unsetenv("VIRTUAL_ENV");

    /* The Python on the PATH: bin/python3 is a link out of the environment, which must not matter.
     */
    place(program, "env/bin/python3");
    assert_int_equal(symlink("/bin/sh", program), 0);
    *strrchr(program, '/') = '\0';
    setenv("PATH", program, 1);
    expect_opened(13, "env/lib/python3.12/site-packages/nvidia/cu13/lib/libpmltest.so.13");
    setenv("PATH", root, 1);
}

static void named_folders_and_no_others(void **state)
{
    (void)state;
    char folders[3 * PATH_MAX], environment[PATH_MAX];
    put_library("env2/lib/python3.11/site-packages/nvidia/cu13/lib/libpmltest.so.13");
    put_library("named/libpmltest.so.12");
    place(environment, "env2");
    setenv("VIRTUAL_ENV", environment, 1);
    snprintf(folders, sizeof folders, "/nowhere:%s/named", root);
    setenv("PML_CUDA_LIBS", folders, 1);
    expect_opened(13, "named/libpmltest.so.12");
    setenv("PML_CUDA_LIBS", "/nowhere", 1);
    expect_missing(13, "PML_CUDA_LIBS=/nowhere");
    unsetenv("PML_CUDA_LIBS");
    unsetenv("VIRTUAL_ENV");
}

/* The three that are used, by number: where each lies, what to install, no more. */
static void says_what_there_is(void **state)
{
    (void)state;
    static const char *const here[] = {"three/libcublasLt.so.12", "three/libcudnn.so.9"};
    char folder[PATH_MAX], got[PATH_MAX], want[PATH_MAX];
    for (int i = 0; i < 2; i++)
        put_library(here[i]);
    place(folder, "three");
    setenv("PML_CUDA_LIBS", folder, 1);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pmli_find_library(i, got, sizeof got, NULL), PML_OK);
        snprintf(want, sizeof want, "%s/%s", root, here[i]);
        assert_string_equal(got, want);
    }
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pmli_find_library(2, got, sizeof got, &err), PML_NOT_FOUND);
    assert_non_null(strstr(err.message, "libnvrtc.so"));
    assert_int_equal(pmli_find_library(3, got, sizeof got, &err), PML_NOT_FOUND);
    assert_non_null(strstr(err.message, "libcudart.so"));
    assert_int_equal(pmli_find_library(4, got, sizeof got, NULL), PML_INVALID);
    assert_int_equal(pmli_find_library(-1, got, sizeof got, NULL), PML_INVALID);
    assert_int_equal(pmli_find_library(0, got, 4, NULL), PML_INTERNAL); /* no room for the path */
    unsetenv("PML_CUDA_LIBS");
}

static void tells_why_one_does_not_open(void **state)
{
    (void)state;
    char path[PATH_MAX];
    place(path, "damaged/libpmltest.so.13");
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    fputs("not a library", file);
    fclose(file);
    *strrchr(path, '/') = '\0';
    setenv("PML_CUDA_LIBS", path, 1);
    expect_missing(13, "libpmltest.so.13 did not open");
    unsetenv("PML_CUDA_LIBS");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(says_what_to_install),        cmocka_unit_test(beside_a_python),
        cmocka_unit_test(named_folders_and_no_others), cmocka_unit_test(says_what_there_is),
        cmocka_unit_test(tells_why_one_does_not_open),
    };
    return cmocka_run_group_tests(tests, make_root, remove_root);
}
