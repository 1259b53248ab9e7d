/* Runs whose device has 4,000 MiB and is otherwise made up (fake_worker.c), and what is reserved of
 * it.
 */
#ifndef PML_TESTS_FAULT_DEVICE_H
#define PML_TESTS_FAULT_DEVICE_H

#include "history.h"
#include "pml/net/reserve.h"

#define MIB ((size_t)1 << 20)

/* As fake_worker.c has it; with FAKE_EACH those of rank 0 and 1 are "90-" and "80-fake-device". */
extern const char device[];

/* A folder of device files for all runs of a test program: cmocka's group setup and teardown. */
int device_setup(void **state);
int device_teardown(void **state);
const char *device_folder(void);

/* A run of so many workers whose plans take `mib` of the device each. */
harness *device_start(int workers, const char *mib, const char *extra);

/* What is reserved of a device, in MiB; *pending likewise. */
size_t device_reserved(const char *name, size_t *pending);
void device_wait(const char *name, size_t mib);

/* As another run has it: this process, with so many MiB. */
pml_reservation *device_reserve(const char *name, size_t mib);

/* Of the state `failed`. Borrowed. */
const char *device_reason(harness *h);

#endif
