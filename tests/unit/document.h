/* A page of docs/ that is printed from a table: held against it by a test, written by `--write`. */
#ifndef TESTS_DOCUMENT_H
#define TESTS_DOCUMENT_H

#include "scratch.h"

/* Fail where the file is not `want`, which is freed. */
static inline void document_check(const char *path, char *want)
{
    assert_non_null(want);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        fail_msg("%s is not there: run this test with --write", path);
    char *have = calloc(1, strlen(want) + 2);
    assert_non_null(have);
    size_t n = fread(have, 1, strlen(want) + 1, file);
    fclose(file);
    if (n != strlen(want) || strcmp(want, have) != 0)
        fail_msg("%s is not what the table says: run this test with --write", path);
    free(want);
    free(have);
}

/* Write it; `text` is freed. Returns the program's exit status. */
static inline int document_write(const char *path, char *text)
{
    FILE *file = text == NULL ? NULL : fopen(path, "w");
    int failed = file == NULL || fputs(text, file) < 0;
    failed |= file != NULL && fclose(file) != 0;
    free(text);
    if (failed)
        perror(path);
    return failed;
}

#endif
