/* Gauges: what an NVIDIA driver says of a GPU while it works, read by NVML.
 *
 *   pml_gauges_new()     ──►  pml_gauges_read(): a few milliseconds of the driver's time at most,
 *                             none of the GPU's; no context, no memory on the device
 *
 * NVML (libnvidia-ml.so.1) comes with the driver and is found at run time. What it does not say is
 * not made up: the reading names each such gauge and why. One thread at a time reads one
 * pml_gauges. */
#ifndef PML_OP_GAUGES_H
#define PML_OP_GAUGES_H

#include <stdbool.h>
#include <stddef.h>

#include "pml/base/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* name and unit, as messages have them (messages.def, record gpu) */
#define PML_GAUGES(X)                                                                              \
    X(utilisation)   /* share of the driver's last sample period in which a kernel ran */          \
    X(memory_total)  /* bytes of the card, or of the part of it that is asked for (MIG) */         \
    X(memory_used)   /* bytes: all processes together          */                                  \
    X(memory_ours)   /* bytes: this process */                                                     \
    X(memory_others) /* bytes: the other processes that the driver lists */                        \
    X(temperature)   /* degrees Celsius */                                                         \
    X(power)         /* watts */                                                                   \
    X(power_limit)   /* watts that the driver keeps it below */                                    \
    X(clock)         /* MHz of the multiprocessors */                                              \
    X(clock_most)    /* MHz at best */                                                             \
    X(memory_clock)  /* MHz */                                                                     \
    X(throttle)      /* bits of the reasons for which clocks are lower than they could be */

typedef enum pml_gauge {
#define PML_GAUGE(name) PML_GAUGE_##name,
    PML_GAUGES(PML_GAUGE)
#undef PML_GAUGE
        PML_GAUGE_COUNT
} pml_gauge;

typedef struct pml_reading {
    double value[PML_GAUGE_COUNT];
    const char *missing[PML_GAUGE_COUNT]; /* NULL: value is there; else why not, a literal */
} pml_reading;

typedef struct pml_gauges pml_gauges;

/* bus: PCI address of the GPU, "0000:0f:00.0", since NVML counts devices in an order of its own.
 * uuid: of the device, as pml_device_identity has it: of a card that is divided (MIG) memory and
 * processes are that part's; NULL: nobody's. All else is the card's. PML_NOT_FOUND: no NVML, or no
 * such GPU; PML_UNSUPPORTED: one that is too old. */
pml_status pml_gauges_new(const char *bus, const char *uuid, pml_gauges **gauges, pml_error *err);
void pml_gauges_destroy(pml_gauges **gauges);

/* All of them now; one that cannot be read says why in `missing`. */
void pml_gauges_read(pml_gauges *gauges, pml_reading *reading);

/* What the card has taken since its driver was loaded. The driver counts on in steps of some
 * milliseconds, so look for a step's edge to time it. PML_UNSUPPORTED where it does not count. */
pml_status pml_gauges_energy(pml_gauges *gauges, double *joules, pml_error *err);

const char *pml_gauge_name(pml_gauge gauge); /* "utilisation", … */

/* Words for the bits of a throttle gauge, the i-th of them that is set; NULL: there are no more.
 * An idle GPU's low clocks are no reason. */
const char *pml_throttle_reason(const pml_reading *reading, int i);

/* What a card's data sheet says of dense products of 16-bit floats with float32 sums, in operations
 * a second; 0: not in our table. name: as the driver calls the card. */
double pml_peak_flops(const char *name);

#ifdef __cplusplus
}
#endif
#endif
