#include "gpu.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pml/base/clock.h"
#include "pml_op/gauges.h"

enum { PERIOD_SECONDS = 1 };

struct gpu_watch {
    int rank;
    char name[128], trouble[1000];
    double peak; /* operations a second, 0: not known */
    pml_gauges *gauges;

    pthread_t thread;
    bool running;

    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool over, ended;
    pml_reading reading;
    double read_at;        /* 0: not yet */
    double flops, seconds; /* of the steps since the last beat */
};

/* With the mutex held; false: it was woken before. */
static bool slept(gpu_watch *w, int seconds)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += seconds;
    while (!w->over && pthread_cond_timedwait(&w->changed, &w->mutex, &end) != ETIMEDOUT)
        continue;
    return !w->over;
}

static void *read_gauges(void *argument)
{
    gpu_watch *w = argument;
    pthread_mutex_lock(&w->mutex);
    do {
        pml_reading reading;
        pthread_mutex_unlock(&w->mutex);
        pml_gauges_read(w->gauges, &reading);
        pthread_mutex_lock(&w->mutex);
        w->reading = reading;
        w->read_at = pml_clock_monotonic();
    } while (slept(w, PERIOD_SECONDS));
    w->ended = true;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
    return NULL;
}

static void init_waiting(gpu_watch *w)
{
    pthread_condattr_t clock; /* one that nobody sets */
    pthread_mutex_init(&w->mutex, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&w->changed, &clock);
    pthread_condattr_destroy(&clock);
}

pml_status gpu_watch_new(int rank, const char *bus, const char *uuid, const char *name,
                         gpu_watch **watch, pml_error *err)
{
    pml_error why = PML_ERROR_INIT;
    gpu_watch *w = calloc(1, sizeof *w);
    *watch = w;
    if (w == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to watch the GPU");
    w->rank = rank;
    snprintf(w->name, sizeof w->name, "%s", name);
    w->peak = pml_peak_flops(name);
    init_waiting(w);
    if (pml_gauges_new(bus, uuid, &w->gauges, &why) != PML_OK)
        snprintf(w->trouble, sizeof w->trouble, "%s", why.message);
    else if (pthread_create(&w->thread, NULL, read_gauges, w) != 0)
        snprintf(w->trouble, sizeof w->trouble, "cannot start a thread to read NVML");
    else
        w->running = true;
    return PML_OK;
}

void gpu_watch_destroy(gpu_watch **watch)
{
    gpu_watch *w = *watch;
    *watch = NULL;
    if (w == NULL)
        return;
    if (w->running) {
        struct timespec end;
        clock_gettime(CLOCK_MONOTONIC, &end);
        end.tv_sec += 1;
        pthread_mutex_lock(&w->mutex);
        w->over = true;
        pthread_cond_broadcast(&w->changed);
        while (!w->ended && pthread_cond_timedwait(&w->changed, &w->mutex, &end) != ETIMEDOUT)
            continue;
        bool ended = w->ended;
        pthread_mutex_unlock(&w->mutex);
        if (!ended) { /* it is in the driver, and this process is about to end */
            pthread_detach(w->thread);
            return;
        }
        pthread_join(w->thread, NULL);
    }
    pml_gauges_destroy(&w->gauges);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->mutex);
    free(w);
}

const char *gpu_watch_trouble(const gpu_watch *w)
{
    return w->trouble;
}

double gpu_watch_step(gpu_watch *w, double flops, double seconds)
{
    pthread_mutex_lock(&w->mutex);
    w->flops += flops;
    w->seconds += seconds;
    pthread_mutex_unlock(&w->mutex);
    return w->peak > 0 && seconds > 0 ? flops / seconds / w->peak : 0;
}

/* ---- telling ---- */

typedef struct words {
    char text[1000];
    size_t n;
} words;

static void add(words *w, const char *between, const char *what, const char *why)
{
    int n = snprintf(w->text + w->n, sizeof w->text - w->n, "%s%s%s%s", w->n > 0 ? between : "",
                     what, why[0] != '\0' ? ": " : "", why);
    w->n += n > 0 && (size_t)n < sizeof w->text - w->n ? (size_t)n : 0;
    w->text[w->n] = '\0';
}

/* Bytes and megahertz are whole numbers; of throttle the words are told, not the bits. */
static void write_gauges(const pml_reading *r, pml_message *gpu)
{
    words missing = {0}, throttle = {0};
    for (int g = 0; g < PML_GAUGE_COUNT; g++) {
        const char *name = pml_gauge_name((pml_gauge)g);
        if (r->missing[g] != NULL)
            add(&missing, "; ", name, r->missing[g]);
        else if (g == PML_GAUGE_utilisation || g == PML_GAUGE_temperature || g == PML_GAUGE_power ||
                 g == PML_GAUGE_power_limit)
            pml_message_set_number(gpu, name, r->value[g]);
        else if (g != PML_GAUGE_throttle)
            pml_message_set_int(gpu, name, (int64_t)r->value[g]);
    }
    for (int i = 0; pml_throttle_reason(r, i) != NULL; i++)
        add(&throttle, ", ", pml_throttle_reason(r, i), "");
    if (r->missing[PML_GAUGE_throttle] == NULL)
        pml_message_set_string(gpu, "throttle", throttle.text);
    if (missing.n > 0)
        pml_message_set_string(gpu, "missing", missing.text);
}

void gpu_watch_tell(gpu_watch *w, pml_message *beat)
{
    pml_message *gpu = pml_message_new(PML_RECORD_gpu);
    pml_message_set_int(gpu, "rank", w->rank);
    pml_message_set_string(gpu, "name", w->name);
    pthread_mutex_lock(&w->mutex);
    if (w->peak > 0) {
        pml_message_set_number(gpu, "peak_flops", w->peak);
        if (w->seconds > 0)
            pml_message_set_number(gpu, "mfu", w->flops / w->seconds / w->peak);
    }
    w->flops = w->seconds = 0;
    const pml_reading reading = w->reading;
    double age = w->read_at > 0 ? pml_clock_monotonic() - w->read_at : -1;
    pthread_mutex_unlock(&w->mutex);
    if (w->trouble[0] != '\0')
        pml_message_set_string(gpu, "trouble", w->trouble);
    if (age >= 0) {
        pml_message_set_number(gpu, "age", age);
        write_gauges(&reading, gpu);
    }
    pml_message_set_part(beat, "gpu", gpu);
}
