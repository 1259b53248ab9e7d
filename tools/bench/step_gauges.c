#include "step_gauges.h"

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "pml/base/clock.h"
#include "pml_op/gauges.h"

enum { STEPS = 50, PAIRS_MOST = 100 };

typedef struct reader {
    pml_gauges *gauges;
    double pause;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool over;
    int readings;
} reader;

/* As the worker's thread (engine/cmd/worker/gpu.c): it reads, then sleeps until it is woken. */
static void *read_on(void *argument)
{
    reader *r = argument;
    pthread_mutex_lock(&r->mutex);
    while (!r->over) {
        pml_reading reading;
        struct timespec end;
        pthread_mutex_unlock(&r->mutex);
        pml_gauges_read(r->gauges, &reading);
        pthread_mutex_lock(&r->mutex);
        r->readings++;
        clock_gettime(CLOCK_REALTIME, &end);
        double until = (double)end.tv_nsec * 1e-9 + r->pause;
        end.tv_sec += (time_t)until;
        end.tv_nsec = (long)((until - floor(until)) * 1e9);
        while (!r->over && r->pause > 0 &&
               pthread_cond_timedwait(&r->changed, &r->mutex, &end) == 0)
            continue;
    }
    pthread_mutex_unlock(&r->mutex);
    return NULL;
}

static double part(void (*step)(void *user), void *user)
{
    double begin = pml_clock_monotonic();
    for (int i = 0; i < STEPS; i++)
        step(user);
    return pml_clock_monotonic() - begin;
}

static pml_status part_with_readings(reader *r, void (*step)(void *user), void *user,
                                     double *seconds, pml_error *err)
{
    pthread_t thread;
    r->over = false;
    if (pthread_create(&thread, NULL, read_on, r) != 0)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot start a thread that reads");
    *seconds = part(step, user);
    pthread_mutex_lock(&r->mutex);
    r->over = true;
    pthread_cond_signal(&r->changed);
    pthread_mutex_unlock(&r->mutex);
    pthread_join(thread, NULL);
    return PML_OK;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The rank, from 0, of the lower end of the median's interval: the most for which so many or fewer
 * of n fair coins are heads with a probability of at most 2.5 %. */
static int lower_rank(int n)
{
    double chance = pow(0.5, n), sum = chance;
    int k = 0;
    while (sum <= 0.025) {
        k++;
        chance = chance * (n - k + 1) / k;
        sum += chance;
    }
    return k > 0 ? k - 1 : 0;
}

static void report(const reader *r, double *differences, int pairs, double seconds, double step)
{
    qsort(differences, (size_t)pairs, sizeof *differences, by_size);
    int low = lower_rank(pairs);
    double median = (differences[(pairs - 1) / 2] + differences[pairs / 2]) / 2;
    double rate = r->readings / seconds;
    printf("gauges, %.1f readings a second beside steps of %.3f ms: %+.3f %% (median of %d pairs "
           "of %d steps, 95 %% from %+.3f to %+.3f); at one a second %+.4f %% (%+.4f to %+.4f)\n",
           rate, 1e3 * step, 100 * median, pairs, STEPS, 100 * differences[low],
           100 * differences[pairs - 1 - low], 100 * median / rate, 100 * differences[low] / rate,
           100 * differences[pairs - 1 - low] / rate);
}

pml_status step_gauges_compare(const char *bus, double pause, int pairs, void (*step)(void *user),
                               void *user, pml_error *err)
{
    double differences[PAIRS_MOST], all = 0, beside = 0;
    if (pairs < 6 || pairs > PAIRS_MOST)
        return PML_FAIL(err, PML_INVALID, "%d pairs: 6 to %d say something", pairs, PAIRS_MOST);
    reader r = {.pause = pause};
    pml_status status = pml_gauges_new(bus, NULL, &r.gauges, err);
    if (status != PML_OK)
        return status;
    pthread_mutex_init(&r.mutex, NULL);
    pthread_cond_init(&r.changed, NULL);
    double before = part(step, user);
    for (int i = 0; status == PML_OK && i < pairs; i++) {
        double with = 0;
        status = part_with_readings(&r, step, user, &with, err);
        double after = part(step, user), without = (before + after) / 2;
        differences[i] = with / without - 1;
        all += with;
        beside += without;
        before = after;
    }
    if (status == PML_OK)
        report(&r, differences, pairs, all, beside / pairs / STEPS);
    pthread_cond_destroy(&r.changed);
    pthread_mutex_destroy(&r.mutex);
    pml_gauges_destroy(&r.gauges);
    return status;
}
