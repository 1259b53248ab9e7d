/* Staging: bytes from ordinary (pageable) memory to the device at the speed of the link.
 *
 *   caller's memory  ──memcpy──►  pinned piece  ──copy engine──►  device
 *
 *   lane 0   | fill a | fill b | wait a, fill a | …          each lane is a thread, a stream and
 *   lane 1     | fill a | fill b | wait a, fill a | …        SLOTS pinned pieces; all take the next
 *   …                                                        piece of the upload from one counter
 *
 * The driver by itself stages such a copy on the caller's thread, at about 10 GB/s. */
#ifndef PMLI_CUDA_STAGING_H
#define PMLI_CUDA_STAGING_H

#include <stdbool.h>
#include <stddef.h>

#include "driver.h"

typedef struct pmli_staging pmli_staging;

/* Uploads of fewer bytes are not worth the threads. */
enum { PMLI_STAGED_LEAST = 8 << 20 };

/* Threads that sleep until there is an upload, and pinned memory: 8 MiB for each of at most eight.
 * PML_NO_MEMORY where the system does not give them. */
pml_status pmli_staging_new(CUcontext context, pmli_staging **staging, pml_error *err);
/* Waits for what is on its way. */
void pmli_staging_destroy(pmli_staging **staging);

/* Copy behind what stands on the stream, before what comes. Returns when `from` has been read. */
pml_status pmli_staging_upload(pmli_staging *staging, CUstream stream, void *to, const void *from,
                               size_t bytes, pml_error *err);

#endif
