/* GPU: what the driver says of this worker's device, for the I/O thread to tell.
 *
 *   its own thread ──each second: pml_gauges_read──►  the last reading  ──►  record gpu of a beat
 *   training thread ──gpu_watch_step: operations, seconds──────────────────►  mfu
 *
 * A driver's answer may take milliseconds, and with a GPU in trouble it may never come: so neither
 * the training thread nor the one that beats waits for it, and a beat says how old its reading is.
 * All functions are thread-safe. */
#ifndef PML_WORKER_GPU_H
#define PML_WORKER_GPU_H

#include "pml/base/error.h"
#include "pml/json/messages.h"

typedef struct gpu_watch gpu_watch;

/* bus: the device's PCI address; uuid: of what this process has of it; name: as the driver calls
 * it. Without NVML the watch is there, and its records say why they have no gauges. */
pml_status gpu_watch_new(int rank, const char *bus, const char *uuid, const char *name,
                         gpu_watch **watch, pml_error *err);
/* Waits for a reading that is under way, a second at most: a driver that does not come back keeps
 * its thread and what that thread reads. */
void gpu_watch_destroy(gpu_watch **watch);

/* Why there are no gauges; "": there are. */
const char *gpu_watch_trouble(const gpu_watch *watch);

/* A step of so many operations took so long: of the training thread, allocates nothing. Its share
 * of the card's peak; 0 where that is not known. */
double gpu_watch_step(gpu_watch *watch, double flops, double seconds);

/* Field gpu of a beat: the last reading, and mfu over the steps since the last beat. */
void gpu_watch_tell(gpu_watch *watch, pml_message *beat);

#endif
