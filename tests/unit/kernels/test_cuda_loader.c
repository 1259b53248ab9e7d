/* The loader's answers where there is no CUDA backend to be had: each says what is missing and what
 * to do. Where a GPU is, tests/gpu asks for the rest. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h> /* wants the ones above before it */

#include <dlfcn.h>

#include "backend_loader.h"

static void expect_refusal(const char *object, pml_status want, const char *words)
{
    if (object != NULL)
        setenv("PML_CUDA_BACKEND", object, 1);
    else
        unsetenv("PML_CUDA_BACKEND");
    const pml_backend *backend = (const pml_backend *)&words;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_backend_cuda(&backend, &err), want);
    assert_null(backend);
    assert_int_equal(err.code, want);
    assert_true(err.line > 0);
    if (strstr(err.message, words) == NULL)
        fail_msg("'%s' does not say '%s'", err.message, words);
}

static void no_such_object(void **state)
{
    (void)state;
    expect_refusal("/nowhere/pml_cuda.so", PML_NOT_FOUND, "/nowhere/pml_cuda.so");
}

static void some_other_library(void **state)
{
    (void)state;
    expect_refusal("libm.so.6", PML_UNSUPPORTED, "libm.so.6 is no CUDA backend");
}

static void another_build(void **state)
{
    (void)state;
    expect_refusal(FAKE_CUDA_BACKEND, PML_UNSUPPORTED, "from the same build");
}

static void error_is_optional(void **state)
{
    (void)state;
    setenv("PML_CUDA_BACKEND", FAKE_CUDA_BACKEND, 1);
    const pml_backend *backend;
    assert_int_equal(pml_backend_cuda(&backend, NULL), PML_UNSUPPORTED);
    assert_null(backend);
}

#ifdef CUDA_BACKEND /* this build has the real one */
static void asks_for_its_own_build(void **state)
{
    (void)state;
    void *handle = dlopen(CUDA_BACKEND, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        fail_msg("%s", dlerror());
    pml_backend_entry *entry;
    *(void **)&entry = dlsym(handle, PML_CUDA_ENTRY_NAME);
    assert_non_null(entry);
    const pml_backend *backend;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(entry(PML_BACKEND_ABI + 1, &backend, &err), PML_UNSUPPORTED);
    assert_non_null(strstr(err.message, "the same build"));
}

static void real_object(void **state)
{
    (void)state;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (driver == NULL) {
        expect_refusal(CUDA_BACKEND, PML_NOT_FOUND, "no NVIDIA driver");
        expect_refusal(NULL, PML_NOT_FOUND, "no NVIDIA driver"); /* it lies beside this program */
        return;
    }
    /* With a driver only the libraries can be missing. */
    setenv("PML_CUDA_LIBS", "/nowhere", 1);
    expect_refusal(CUDA_BACKEND, PML_NOT_FOUND, "PML_CUDA_LIBS=/nowhere");
    unsetenv("PML_CUDA_LIBS");
}
#else
static void not_built(void **state)
{
    (void)state;
    expect_refusal(NULL, PML_NOT_FOUND, "pml_cuda.so is not beside the program");
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_such_object),         cmocka_unit_test(some_other_library),
        cmocka_unit_test(another_build),          cmocka_unit_test(error_is_optional),
#ifdef CUDA_BACKEND
        cmocka_unit_test(asks_for_its_own_build), cmocka_unit_test(real_object),
#else
        cmocka_unit_test(not_built),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
