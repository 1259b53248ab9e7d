/* Programs of a test's runs on a disk that the test makes fail: tests/shim/disk.h, loaded into
 * them.
 */
#ifndef PML_TESTS_FAULT_WATCHED_H
#define PML_TESTS_FAULT_WATCHED_H

#include "disk.h"
#include "harness.h"

extern disk_control *disk; /* shared with them */

/* Before the tests: the shim's file. */
void watched_library(const char *path);
/* Of a group of tests. */
int watched_begin(void **state);
int watched_end(void **state);

/* From now on programs of this name get the shim, as does whom they start; NULL: none. */
void watch(const char *program, const harness *h);
/* The same, and what fails goes on to fail. */
void watch_again(const char *program);

#endif
