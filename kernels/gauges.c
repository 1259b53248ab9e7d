/* NVML, found at run time. Its types and numbers are those of its documentation ("NVML API
 * Reference"), as far as they are used here: it ships no header with the driver. */
#include "pml_op/gauges.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvml_result; /* 0: success */
typedef struct nvml_device nvml_device;

enum {
    NVML_NOT_SUPPORTED = 3,
    NVML_NO_PERMISSION = 4,
    NVML_NOT_FOUND = 6,
    NVML_INSUFFICIENT_SIZE = 7,
    NVML_GPU_IS_LOST = 15,
    NVML_TEMPERATURE_GPU = 0,
    NVML_CLOCK_SM = 1,
    NVML_CLOCK_MEM = 2,
    MOST_PROCESSES = 128
};

typedef struct nvml_utilization {
    unsigned gpu, memory; /* percent */
} nvml_utilization;

typedef struct nvml_memory {
    unsigned version; /* its size, and 2 in the highest byte */
    unsigned long long total, reserved, free, used;
} nvml_memory;

typedef struct nvml_process {
    unsigned pid;
    unsigned long long memory; /* bytes, or all ones: not available */
    unsigned gpu_instance, compute_instance;
} nvml_process;

/* name, its arguments after the device */
#define NVML_FUNCTIONS(X)                                                                          \
    X(nvmlDeviceGetUtilizationRates, nvml_utilization *)                                           \
    X(nvmlDeviceGetMemoryInfo_v2, nvml_memory *)                                                   \
    X(nvmlDeviceGetComputeRunningProcesses_v3, unsigned *, nvml_process *)                         \
    X(nvmlDeviceGetGraphicsRunningProcesses_v3, unsigned *, nvml_process *)                        \
    X(nvmlDeviceGetTemperature, int, unsigned *)                                                   \
    X(nvmlDeviceGetPowerUsage, unsigned *)                                                         \
    X(nvmlDeviceGetTotalEnergyConsumption, unsigned long long *)                                   \
    X(nvmlDeviceGetEnforcedPowerLimit, unsigned *)                                                 \
    X(nvmlDeviceGetClockInfo, int, unsigned *)                                                     \
    X(nvmlDeviceGetMaxClockInfo, int, unsigned *)                                                  \
    X(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long *)                             \
    X(nvmlDeviceGetMigMode, unsigned *, unsigned *)

static struct {
    nvml_result (*nvmlInit_v2)(void);
    const char *(*nvmlErrorString)(nvml_result);
    nvml_result (*nvmlDeviceGetHandleByPciBusId_v2)(const char *, nvml_device **);
    nvml_result (*nvmlDeviceGetHandleByUUID)(const char *, nvml_device **);
#define MEMBER(name, ...) nvml_result (*name)(nvml_device *, __VA_ARGS__);
    NVML_FUNCTIONS(MEMBER)
#undef MEMBER
} nvml;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool loaded;

struct pml_gauges {
    nvml_device *device; /* the card, and … */
    nvml_device *memory; /* … what of it is asked for memory: all, or a part; NULL: not known */
    nvml_process processes[MOST_PROCESSES];
};

static pml_status load(pml_error *err)
{
    /* Never closed: it has state of its own, and threads of ours may be in it. */
    void *handle = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        return PML_FAIL(err, PML_NOT_FOUND,
                        "no NVML: %s. It comes with the NVIDIA driver (in a container: ask for the "
                        "driver capability \"utility\")",
                        dlerror());
#define FIND(name, ...) *(void **)&nvml.name = dlsym(handle, #name);
    FIND(nvmlInit_v2, )
    FIND(nvmlErrorString, )
    FIND(nvmlDeviceGetHandleByPciBusId_v2, )
    FIND(nvmlDeviceGetHandleByUUID, )
    NVML_FUNCTIONS(FIND) /* one that is not there: its gauges are missing */
#undef FIND
    if (nvml.nvmlInit_v2 == NULL || nvml.nvmlErrorString == NULL ||
        nvml.nvmlDeviceGetHandleByPciBusId_v2 == NULL)
        return PML_FAIL(err, PML_UNSUPPORTED, "the driver's NVML is too old: it has no %s",
                        "nvmlInit_v2 or nvmlDeviceGetHandleByPciBusId_v2");
    nvml_result result = nvml.nvmlInit_v2();
    if (result != 0)
        return PML_FAIL(err, PML_NOT_FOUND, "starting NVML: %s", nvml.nvmlErrorString(result));
    return PML_OK;
}

static pml_status load_once(pml_error *err)
{
    pthread_mutex_lock(&lock);
    pml_status status = loaded ? PML_OK : load(err);
    loaded = status == PML_OK;
    pthread_mutex_unlock(&lock);
    return status;
}

/* Of a card that is divided (MIG) what the driver gives and takes is a part's, and what NVML says
 * of the card is the sum of all parts. */
static nvml_device *find_part(nvml_device *card, const char *uuid)
{
    unsigned divided = 0, soon = 0;
    nvml_device *part = NULL;
    char name[64];
    if (nvml.nvmlDeviceGetMigMode == NULL ||
        nvml.nvmlDeviceGetMigMode(card, &divided, &soon) != 0 || divided == 0)
        return card;
    snprintf(name, sizeof name, "MIG-%.40s", uuid != NULL ? uuid : "");
    bool found = uuid != NULL && nvml.nvmlDeviceGetHandleByUUID != NULL &&
                 nvml.nvmlDeviceGetHandleByUUID(name, &part) == 0;
    return found ? part : NULL;
}

pml_status pml_gauges_new(const char *bus, const char *uuid, pml_gauges **gauges, pml_error *err)
{
    *gauges = NULL;
    pml_status status = load_once(err);
    if (status != PML_OK)
        return status;
    nvml_device *device = NULL;
    nvml_result result = nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, &device);
    if (result != 0)
        return PML_FAIL(err, PML_NOT_FOUND, "NVML and the GPU at %s: %s", bus,
                        nvml.nvmlErrorString(result));
    pml_gauges *g = calloc(1, sizeof *g);
    if (g == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a GPU's gauges");
    g->device = device;
    g->memory = find_part(device, uuid);
    *gauges = g;
    return PML_OK;
}

void pml_gauges_destroy(pml_gauges **gauges)
{
    free(*gauges);
    *gauges = NULL;
}

/* ---- a reading ---- */

static const char *meaning(nvml_result result)
{
    switch (result) {
    case NVML_NOT_SUPPORTED:
        return "this GPU does not support it";
    case NVML_NO_PERMISSION:
        return "the driver does not permit it";
    case NVML_GPU_IS_LOST:
        return "the driver has lost the GPU";
    default:
        return "NVML failed";
    }
}

static const char *const too_old = "the driver's NVML does not have it";

static void put(pml_reading *r, pml_gauge gauge, nvml_result result, double value)
{
    r->missing[gauge] = result == 0 ? NULL : meaning(result);
    r->value[gauge] = result == 0 ? value : 0;
}

static const char *const divided =
    "the card is divided (MIG), and NVML does not say it of this part";

static void read_memory(pml_gauges *g, pml_reading *r)
{
    nvml_memory m = {.version = (unsigned)sizeof m | 2U << 24};
    if (g->memory == NULL)
        r->missing[PML_GAUGE_memory_total] = r->missing[PML_GAUGE_memory_used] = divided;
    if (g->memory == NULL || nvml.nvmlDeviceGetMemoryInfo_v2 == NULL)
        return;
    nvml_result result = nvml.nvmlDeviceGetMemoryInfo_v2(g->memory, &m);
    put(r, PML_GAUGE_memory_total, result, (double)m.total);
    put(r, PML_GAUGE_memory_used, result, (double)m.used);
}

typedef nvml_result (*list_processes)(nvml_device *, unsigned *, nvml_process *);

/* Appends to the n that are there, each process once: one that computes and draws is in both lists
 * with all it has. */
static nvml_result add_processes(pml_gauges *g, list_processes list, unsigned *n)
{
    nvml_process found[MOST_PROCESSES];
    unsigned count = MOST_PROCESSES;
    if (list == NULL)
        return NVML_NOT_SUPPORTED;
    nvml_result result = list(g->memory, &count, found);
    for (unsigned i = 0; result == 0 && i < count && *n < MOST_PROCESSES; i++) {
        unsigned k = 0;
        while (k < *n && g->processes[k].pid != found[i].pid)
            k++;
        if (k == *n)
            g->processes[(*n)++] = found[i];
    }
    return result;
}

static void read_processes(pml_gauges *g, pml_reading *r)
{
    const unsigned long long unknown = ~0ULL;
    const unsigned us = (unsigned)getpid();
    unsigned n = 0;
    double ours = -1, others = 0;
    if (g->memory == NULL)
        r->missing[PML_GAUGE_memory_ours] = r->missing[PML_GAUGE_memory_others] = divided;
    if (g->memory == NULL || nvml.nvmlDeviceGetComputeRunningProcesses_v3 == NULL)
        return;
    nvml_result result = add_processes(g, nvml.nvmlDeviceGetComputeRunningProcesses_v3, &n);
    if (result == 0) /* none that draws is no failure of the others */
        (void)add_processes(g, nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, &n);
    put(r, PML_GAUGE_memory_ours, result, 0);
    put(r, PML_GAUGE_memory_others, result, 0);
    if (result == NVML_INSUFFICIENT_SIZE)
        r->missing[PML_GAUGE_memory_ours] = r->missing[PML_GAUGE_memory_others] =
            "more processes use the GPU than there is room for";
    if (result != 0)
        return;
    for (unsigned i = 0; i < n; i++) {
        const nvml_process *p = &g->processes[i];
        if (p->memory == unknown && p->pid == us)
            r->missing[PML_GAUGE_memory_ours] = "the driver does not say it for a process";
        else if (p->memory == unknown)
            r->missing[PML_GAUGE_memory_others] = "the driver does not say it for every process";
        else if (p->pid == us)
            ours = (double)p->memory;
        else
            others += (double)p->memory;
    }
    /* Process ids of a container are not those that the driver lists. */
    if (ours < 0 && r->missing[PML_GAUGE_memory_ours] == NULL)
        r->missing[PML_GAUGE_memory_ours] = r->missing[PML_GAUGE_memory_others] =
            "the driver does not list this process (by the id that it has here)";
    r->value[PML_GAUGE_memory_ours] = r->missing[PML_GAUGE_memory_ours] == NULL ? ours : 0;
    r->value[PML_GAUGE_memory_others] = r->missing[PML_GAUGE_memory_others] == NULL ? others : 0;
}

typedef nvml_result (*get_number)(nvml_device *, unsigned *);
typedef nvml_result (*get_kind)(nvml_device *, int, unsigned *);

static void read_number(pml_gauges *g, pml_reading *r, pml_gauge gauge, get_number get, double unit)
{
    unsigned value = 0;
    if (get == NULL)
        return;
    nvml_result result = get(g->device, &value);
    put(r, gauge, result, unit * value);
}

static void read_kind(pml_gauges *g, pml_reading *r, pml_gauge gauge, get_kind get, int kind)
{
    unsigned value = 0;
    if (get == NULL)
        return;
    nvml_result result = get(g->device, kind, &value);
    put(r, gauge, result, value);
}

static void read_utilisation(pml_gauges *g, pml_reading *r)
{
    nvml_utilization busy = {0};
    if (nvml.nvmlDeviceGetUtilizationRates == NULL)
        return;
    nvml_result result = nvml.nvmlDeviceGetUtilizationRates(g->device, &busy);
    put(r, PML_GAUGE_utilisation, result, busy.gpu / 100.0);
}

static void read_throttle(pml_gauges *g, pml_reading *r)
{
    unsigned long long reasons = 0;
    if (nvml.nvmlDeviceGetCurrentClocksThrottleReasons == NULL)
        return;
    nvml_result result = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(g->device, &reasons);
    put(r, PML_GAUGE_throttle, result, (double)reasons);
}

void pml_gauges_read(pml_gauges *g, pml_reading *r)
{
    const double milli = 1e-3;
    for (int i = 0; i < PML_GAUGE_COUNT; i++) {
        r->value[i] = 0;
        r->missing[i] = too_old;
    }
    read_utilisation(g, r);
    read_memory(g, r);
    read_processes(g, r);
    read_kind(g, r, PML_GAUGE_temperature, nvml.nvmlDeviceGetTemperature, NVML_TEMPERATURE_GPU);
    read_number(g, r, PML_GAUGE_power, nvml.nvmlDeviceGetPowerUsage, milli);
    read_number(g, r, PML_GAUGE_power_limit, nvml.nvmlDeviceGetEnforcedPowerLimit, milli);
    read_kind(g, r, PML_GAUGE_clock, nvml.nvmlDeviceGetClockInfo, NVML_CLOCK_SM);
    read_kind(g, r, PML_GAUGE_clock_most, nvml.nvmlDeviceGetMaxClockInfo, NVML_CLOCK_SM);
    read_kind(g, r, PML_GAUGE_memory_clock, nvml.nvmlDeviceGetClockInfo, NVML_CLOCK_MEM);
    read_throttle(g, r);
}

pml_status pml_gauges_energy(pml_gauges *g, double *joules, pml_error *err)
{
    unsigned long long millijoules = 0;
    if (nvml.nvmlDeviceGetTotalEnergyConsumption == NULL)
        return PML_FAIL(err, PML_UNSUPPORTED, "a GPU's energy: %s", too_old);
    nvml_result result = nvml.nvmlDeviceGetTotalEnergyConsumption(g->device, &millijoules);
    if (result != 0)
        return PML_FAIL(err, PML_UNSUPPORTED, "a GPU's energy: %s", meaning(result));
    *joules = (double)millijoules * 1e-3;
    return PML_OK;
}

/* ---- words ---- */

const char *pml_gauge_name(pml_gauge gauge)
{
    static const char *const names[PML_GAUGE_COUNT] = {
#define NAME(name) #name,
        PML_GAUGES(NAME)
#undef NAME
    };
    return (unsigned)gauge < PML_GAUGE_COUNT ? names[gauge] : "?";
}

const char *pml_throttle_reason(const pml_reading *reading, int i)
{
    /* nvmlClocksThrottleReason…; bit 0, idle, is left out */
    static const struct {
        unsigned long long bit;
        const char *words;
    } reasons[] = {
        {0x2, "application clocks"},     {0x4, "power cap"},
        {0x8, "hardware slowdown"},      {0x10, "sync boost"},
        {0x20, "temperature"},           {0x40, "hardware: temperature"},
        {0x80, "hardware: power brake"}, {0x100, "display clocks"},
        {0x200, "board limit"},          {0x400, "reliability"},
    };
    if (reading->missing[PML_GAUGE_throttle] != NULL)
        return NULL;
    unsigned long long bits = (unsigned long long)reading->value[PML_GAUGE_throttle];
    for (size_t k = 0; k < sizeof reasons / sizeof *reasons; k++)
        if ((bits & reasons[k].bit) != 0 && i-- == 0)
            return reasons[k].words;
    return NULL;
}
