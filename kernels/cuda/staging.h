/* Staging: bytes of a file, or of ordinary (pageable) memory, to the device at the speed of the
 * link.
 *
 *   file, memory  ──pread, memcpy──►  pinned piece  ──copy engine──►  device
 *
 *   lane 0   | fill a | fill b | wait a, fill a | …          each lane is a thread, a stream and
 *   lane 1     | fill a | fill b | wait a, fill a | …        SLOTS pinned pieces; all take the next
 *   …                                                        piece from one list of uploads
 *
 * Files are uploaded while the caller goes on, many of them one after the other without a pause;
 * memory before the call returns. The driver by itself stages such a copy on the caller's thread,
 * at about 10 GB/s, and a file would have to be mapped for it. */
#ifndef PMLI_CUDA_STAGING_H
#define PMLI_CUDA_STAGING_H

#include <stdbool.h>
#include <stddef.h>

#include "driver.h"
#include "pml/base/file_at.h"

typedef struct pmli_staging pmli_staging;

/* Uploads of fewer bytes of memory are not worth the threads. */
enum { PMLI_STAGED_LEAST = 8 << 20 };

/* Threads that sleep until there is an upload, at most twelve. Each pins two pieces of 4 MiB while
 * the caller goes on; where that is refused ordinary memory serves, more slowly, and a warning says
 * so. PML_NO_MEMORY: not even threads. */
pml_status pmli_staging_new(CUcontext context, pmli_staging **staging, pml_error *err);
/* Waits for what is on its way; what has not begun does not. */
void pmli_staging_destroy(pmli_staging **staging);

/* Copy behind what stands on the stream, before what comes. Returns when `from` has been read. */
pml_status pmli_staging_upload(pmli_staging *staging, CUstream stream, void *to, const void *from,
                               size_t bytes, pml_error *err);

/* Rows of a file, as pml_backend's upload_file: behind what stands on the stream. Returns at once,
 * or when one of many uploads has been read. */
pml_status pmli_staging_upload_file(pmli_staging *staging, CUstream stream, void *to, size_t pitch,
                                    const pml_file_at *from, size_t width, size_t rows,
                                    pml_error *err);

/* All uploads have been read, and what comes next on the stream comes behind them. The first error
 * of one of them since the last call; the others after it were not begun. */
pml_status pmli_staging_finish(pmli_staging *staging, CUstream stream, pml_error *err);

#endif
