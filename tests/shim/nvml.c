/* libnvidia-ml.so.1 as a test wants it: what a driver would answer, from a file.
 *
 *   FAKE_NVML   path of lines "name number"; read at each call, so that it may change
 *
 * A number below 0 is an NVML result, with its sign turned: "power -3" is not supported. A name
 * that is not in the file is not supported, either. `process PID BYTES` may come more than once;
 * PID 0 stands for the process that asks. With `mig 1` the card is divided, and its part of the
 * uuid below has part_total, part_reserved, part_used and part_process. `sleep SECONDS`: each
 * reading of the temperature takes so long.
 *
 * Its types are written down here once more, from NVML's documentation, and not taken from
 * kernels/gauges.c: sizes and order of fields are part of what is tested. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct fake_memory {
    unsigned int version;
    unsigned long long total, reserved, free, used;
} fake_memory;

typedef struct fake_process {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} fake_process;

enum { NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, ARGUMENT_VERSION_MISMATCH = 25 };

static FILE *open_file(void)
{
    const char *path = getenv("FAKE_NVML");
    return path == NULL ? NULL : fopen(path, "r");
}

static double look_up(const char *name)
{
    FILE *file = open_file();
    char line[256], found[64];
    double value = -NOT_SUPPORTED, number;
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "%63s %lf", found, &number) == 2 && strcmp(found, name) == 0)
            value = number;
    if (file != NULL)
        fclose(file);
    return value;
}

static int answer(const char *name, unsigned *value)
{
    double found = look_up(name);
    if (found < 0)
        return (int)-found;
    *value = (unsigned)found;
    return 0;
}

EXPORT int nvmlInit_v2(void);
int nvmlInit_v2(void)
{
    double found = look_up("init");
    return found < 0 && found != -NOT_SUPPORTED ? (int)-found : 0;
}

EXPORT const char *nvmlErrorString(int result);
const char *nvmlErrorString(int result)
{
    return result == NOT_FOUND ? "Not Found" : result == NOT_SUPPORTED ? "Not Supported" : "Error";
}

static int gpu, part;

/* There is one GPU, and its address is this. */
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device);
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device)
{
    *device = &gpu;
    return strcmp(bus, "0000:0f:00.0") == 0 ? 0 : NOT_FOUND;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, void **device);
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device)
{
    *device = &part;
    return strcmp(uuid, "MIG-3f2a0c00-0000-4000-8000-00000000000a") == 0 ? 0 : NOT_FOUND;
}

EXPORT int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending);
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending)
{
    *pending = 0;
    return device == &gpu ? answer("mig", current) : NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2]);
int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2])
{
    (void)device;
    rates[1] = 1;
    return answer("utilisation", &rates[0]);
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(void *device, fake_memory *memory);
int nvmlDeviceGetMemoryInfo_v2(void *device, fake_memory *memory)
{
    const bool whole = device == &gpu;
    double total = look_up(whole ? "total" : "part_total");
    if (memory->version != 0x02000028)
        return ARGUMENT_VERSION_MISMATCH;
    if (total < 0)
        return (int)-total;
    memory->total = (unsigned long long)total;
    memory->reserved = (unsigned long long)look_up(whole ? "reserved" : "part_reserved");
    memory->used = (unsigned long long)look_up(whole ? "used" : "part_used");
    memory->free = memory->total - memory->reserved - memory->used;
    return 0;
}

static int list(const char *name, unsigned *count, fake_process *processes)
{
    FILE *file = open_file();
    char line[256], format[64];
    unsigned n = 0, room = *count;
    int result = NOT_SUPPORTED;
    snprintf(format, sizeof format, "%s %%u %%lf", name);
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        fake_process p = {.gpuInstanceId = ~0U, .computeInstanceId = ~0U};
        double bytes;
        if (strncmp(line, "processes", 9) == 0)
            result = 0;
        if (sscanf(line, format, &p.pid, &bytes) != 2)
            continue;
        p.pid = p.pid == 0 ? (unsigned)getpid() : p.pid;
        p.usedGpuMemory = bytes < 0 ? ~0ULL : (unsigned long long)bytes;
        if (n < room)
            processes[n] = p;
        n++;
    }
    if (file != NULL)
        fclose(file);
    *count = n;
    return n > room ? INSUFFICIENT_SIZE : result;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, fake_process *p);
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, fake_process *p)
{
    return list(device == &gpu ? "process" : "part_process", n, p);
}

EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *n, fake_process *p);
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *n, fake_process *p)
{
    (void)device;
    return list("draws", n, p);
}

EXPORT int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *value);
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *value)
{
    (void)device;
    double seconds = look_up("sleep");
    if (seconds > 0)
        nanosleep(&(struct timespec){.tv_sec = (time_t)seconds}, NULL);
    return sensor == 0 ? answer("temperature", value) : NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetPowerUsage(void *device, unsigned *value);
int nvmlDeviceGetPowerUsage(void *device, unsigned *value)
{
    (void)device;
    return answer("milliwatts", value);
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *value);
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *value)
{
    (void)device;
    return answer("limit", value);
}

EXPORT int nvmlDeviceGetClockInfo(void *device, int clock, unsigned *value);
int nvmlDeviceGetClockInfo(void *device, int clock, unsigned *value)
{
    (void)device;
    return answer(clock == 1 ? "clock" : clock == 2 ? "memory_clock" : "?", value);
}

EXPORT int nvmlDeviceGetMaxClockInfo(void *device, int clock, unsigned *value);
int nvmlDeviceGetMaxClockInfo(void *device, int clock, unsigned *value)
{
    (void)device;
    return answer(clock == 1 ? "clock_most" : "?", value);
}

#ifndef FAKE_NVML_OLD /* one that is too old for these */
EXPORT int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules);
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules)
{
    double found = look_up("millijoules");
    (void)device;
    *millijoules = found < 0 ? 0 : (unsigned long long)found;
    return found < 0 ? (int)-found : 0;
}

EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons);
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons)
{
    unsigned value = 0;
    (void)device;
    int result = answer("throttle", &value);
    *reasons = value;
    return result;
}
#endif
