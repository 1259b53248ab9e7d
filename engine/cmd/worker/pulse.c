#include "pulse.h"

#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"

/* An interval between two looks counts so much at most: they are a quarter of a second apart. */
static const double look_most = 0.5;
/* A hang is found and its workers are ended within hang_timeout, so the word of it leaves earlier:
 * by 1.5 seconds, or by a tenth where that is less. */
static const double early_seconds = 1.5;

static const char *const names[] = {
    [PHASE_LOADING] = "loading",   [PHASE_STEPPING] = "stepping", [PHASE_EVALUATING] = "evaluating",
    [PHASE_SAMPLING] = "sampling", [PHASE_SAVING] = "saving",     [PHASE_STANDING] = "standing"};

void pulse_init(pulse *p)
{
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->mutex, NULL);
    p->micro_at = p->looked_at = pml_clock_monotonic();
    p->waits_for = -1;
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

void pulse_set_comm(pulse *p, const pml_comm *comm)
{
    pthread_mutex_lock(&p->mutex);
    p->comm = comm;
    pthread_mutex_unlock(&p->mutex);
}

/* ---- of the training thread ---- */

phase pulse_enter(pulse *p, phase next)
{
    pulse_move(p);
    pthread_mutex_lock(&p->mutex);
    phase before = p->phase;
    p->phase = next;
    p->micro_at = pml_clock_monotonic();
    pthread_mutex_unlock(&p->mutex);
    return before;
}

void pulse_move(pulse *p)
{
    atomic_fetch_add_explicit(&p->moves, 1, memory_order_relaxed);
}

void pulse_tick(pulse *p)
{
    double now = pml_clock_monotonic();
    pulse_move(p);
    pthread_mutex_lock(&p->mutex);
    if (p->phase == PHASE_STEPPING)
        p->micros[p->n++ % PULSE_KEPT] = now - p->micro_at;
    p->micro_at = now;
    pthread_mutex_unlock(&p->mutex);
}

void pulse_step(pulse *p, double seconds)
{
    pthread_mutex_lock(&p->mutex);
    p->longest = seconds > p->longest ? seconds : p->longest;
    pthread_mutex_unlock(&p->mutex);
}

/* ---- of the I/O thread ---- */

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
    double least =
        p->hang_timeout > 2 * early_seconds ? p->hang_timeout - early_seconds : p->hang_timeout;
    if (p->phase == PHASE_LOADING || p->phase == PHASE_SAVING)
        return 20 * least;
    memcpy(sorted, p->micros, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_size);
    double ten = n > 0 ? 10 * sorted[n / 2] : 0;
    double limit = ten > least ? ten : least;
    return p->phase == PHASE_STEPPING ? limit : 4 * limit;
}

static bool is_late(const pulse *p)
{
    double limit = limit_of(p);
    return limit > 0 && p->idle > limit;
}

bool pulse_look(pulse *p)
{
    double now = pml_clock_monotonic();
    pthread_mutex_lock(&p->mutex);
    pml_comm_place place = {0, -1};
    if (p->comm != NULL)
        place = pml_comm_where(p->comm);
    uint64_t moves = atomic_load_explicit(&p->moves, memory_order_relaxed) + place.moves;
    double passed = now - p->looked_at;
    bool was_late = is_late(p);
    p->idle = moves == p->seen ? p->idle + (passed < look_most ? passed : look_most) : 0;
    p->seen = moves;
    p->looked_at = now;
    p->waits_for = place.waits_for;
    bool late = is_late(p);
    pthread_mutex_unlock(&p->mutex);
    return late && !was_late;
}

void pulse_tell(pulse *p, pml_message *beat)
{
    pthread_mutex_lock(&p->mutex);
    pml_message_set_string(beat, "phase", names[p->phase]);
    pml_message_set_number(beat, "idle", p->idle);
    pml_message_set_number(beat, "limit", limit_of(p));
    pml_message_set_number(beat, "longest", p->longest);
    if (p->waits_for >= 0)
        pml_message_set_int(beat, "waits_for", p->waits_for);
    pthread_mutex_unlock(&p->mutex);
}

bool pulse_hangs(pulse *p)
{
    pthread_mutex_lock(&p->mutex);
    bool hangs = is_late(p) && p->waits_for < 0;
    pthread_mutex_unlock(&p->mutex);
    return hangs;
}
