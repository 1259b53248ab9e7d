#include "pulse.h"

#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"

static const char *const names[] = {
    [PHASE_LOADING] = "loading",   [PHASE_STEPPING] = "stepping", [PHASE_EVALUATING] = "evaluating",
    [PHASE_SAMPLING] = "sampling", [PHASE_SAVING] = "saving",     [PHASE_STANDING] = "standing"};

void pulse_init(pulse *p)
{
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->mutex, NULL);
    p->at = pml_clock_monotonic();
}

void pulse_destroy(pulse *p)
{
    pthread_mutex_destroy(&p->mutex);
}

void pulse_set_timeout(pulse *p, double hang_timeout)
{
    pthread_mutex_lock(&p->mutex);
    p->hang_timeout = hang_timeout;
    pthread_mutex_unlock(&p->mutex);
}

phase pulse_enter(pulse *p, phase next)
{
    pthread_mutex_lock(&p->mutex);
    phase before = p->phase;
    p->phase = next;
    p->at = pml_clock_monotonic();
    pthread_mutex_unlock(&p->mutex);
    return before;
}

void pulse_tick(pulse *p)
{
    double now = pml_clock_monotonic();
    pthread_mutex_lock(&p->mutex);
    if (p->phase == PHASE_STEPPING)
        p->micros[p->n++ % PULSE_KEPT] = now - p->at;
    p->at = now;
    pthread_mutex_unlock(&p->mutex);
}

void pulse_step(pulse *p, double seconds)
{
    pthread_mutex_lock(&p->mutex);
    p->longest = seconds > p->longest ? seconds : p->longest;
    pthread_mutex_unlock(&p->mutex);
}

void pulse_forgive(pulse *p, double seconds)
{
    double now = pml_clock_monotonic();
    pthread_mutex_lock(&p->mutex);
    p->at = p->at + seconds < now ? p->at + seconds : now;
    pthread_mutex_unlock(&p->mutex);
}

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* With the mutex held. */
static double limit_of(const pulse *p)
{
    double sorted[PULSE_KEPT];
    int n = p->n < PULSE_KEPT ? p->n : PULSE_KEPT;
    if (p->hang_timeout == 0 || p->phase == PHASE_STANDING)
        return 0;
    if (p->phase == PHASE_LOADING || p->phase == PHASE_SAVING)
        return 20 * p->hang_timeout;
    memcpy(sorted, p->micros, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_size);
    double ten = n > 0 ? 10 * sorted[n / 2] : 0;
    double limit = ten > p->hang_timeout ? ten : p->hang_timeout;
    return p->phase == PHASE_STEPPING ? limit : 4 * limit;
}

void pulse_tell(pulse *p, pml_message *beat)
{
    double now = pml_clock_monotonic();
    pthread_mutex_lock(&p->mutex);
    pml_message_set_string(beat, "phase", names[p->phase]);
    pml_message_set_number(beat, "idle", now > p->at ? now - p->at : 0);
    pml_message_set_number(beat, "limit", limit_of(p));
    pml_message_set_number(beat, "longest", p->longest);
    pthread_mutex_unlock(&p->mutex);
}

bool pulse_hangs(pulse *p)
{
    double now = pml_clock_monotonic();
    pthread_mutex_lock(&p->mutex);
    double limit = limit_of(p);
    bool hangs = limit > 0 && now - p->at > limit;
    pthread_mutex_unlock(&p->mutex);
    return hangs;
}
