/* A folder of its own for each test program, and checks of statuses that print the message. */
#ifndef TESTS_SCRATCH_H
#define TESTS_SCRATCH_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "pml/base/error.h"
#include "pml/base/file.h"
#include "pml/base/path.h"

#define EXPECT_OK(call)                                                                            \
    do {                                                                                           \
        pml_error err = PML_ERROR_INIT;                                                            \
        pml_error *e = &err;                                                                       \
        if ((call) != PML_OK)                                                                      \
            fail_msg("%s: %s", #call, err.message);                                                \
    } while (0)

/* The call fails with this status, says so in the error too, and the message holds `words`. */
#define EXPECT_FAIL(code_wanted, words, call)                                                      \
    do {                                                                                           \
        pml_error err = PML_ERROR_INIT;                                                            \
        pml_error *e = &err;                                                                       \
        pml_status got = (call);                                                                   \
        if (got != (code_wanted) || err.code != (code_wanted) ||                                   \
            strstr(err.message, words) == NULL)                                                    \
            fail_msg("%s: %s (%s), wanted %s with \"%s\"", #call, pml_status_name(got),            \
                     err.message, pml_status_name(code_wanted), words);                            \
    } while (0)

static char scratch_root[64];

static inline int scratch_setup(void **state)
{
    (void)state;
    snprintf(scratch_root, sizeof scratch_root, "/tmp/pml-test-XXXXXX");
    return mkdtemp(scratch_root) == NULL ? -1 : 0;
}

static inline int scratch_teardown(void **state)
{
    (void)state;
    return pml_tree_remove("/tmp", scratch_root + strlen("/tmp/"), NULL) == PML_OK ? 0 : -1;
}

/* scratch/name; the text stays until the fourth call after. */
static inline const char *scratch(const char *name)
{
    static char paths[4][512];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", scratch_root, name);
    return path;
}

static inline void put_file(const char *path, const void *data, size_t size)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static inline void put_text(const char *path, const char *text)
{
    put_file(path, text, strlen(text));
}

#endif
