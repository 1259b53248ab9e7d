/* Which worker hangs, and which is silent.
 *
 * A worker says each second what it does, for how long it has not come on, how long it may, and in
 * a collective for whom it waits. From that, never from who was late first:
 *
 *   not come on within its limit, waits for nobody       it hangs
 *   the same, but it waits for a worker                  that one's limit decides; where it has
 *                                                        none, because it stands, it hangs, if it
 *                                                        says so still: else it may be silent, or
 *                                                        have come on (behind a jam the next beat
 *                                                        comes after all that it had to tell)
 *   no beat                                              silent: stopped, or not given a processor
 *
 * Who waits for nobody always exists: of all that take part in a collective, those that have come
 * to the fewest (pml/dist/comm.h).
 *
 * Seconds are those in which the one who counts was there. Workers count their own so; we count
 * each round of our loop as `round_most` at most, so that a coordinator that was stopped, starved
 * or suspended with its machine finds that no time has passed, and the beats that came meanwhile in
 * its queues. A silent worker that could run and is not let is starved: it gets more time. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator.h"
#include "pml/train/run.h"

static const double round_most = 0.4;     /* a round takes 0.2 s when nothing happens */
static const double beats_seconds = 2.5;  /* without a beat: it is not only its training thread */
static const double missed_seconds = 1.5; /* one beat has not come: what it does is not known */
static const double starved_times = 10;   /* of the silence that is allowed, where it is starved */

double watch_since(const coordinator *c, double then)
{
    return c->attended - then;
}

static void attend(coordinator *c, double now)
{
    double passed = c->looked_at > 0 ? now - c->looked_at : 0;
    c->looked_at = now;
    c->attended += passed < round_most ? passed : round_most;
}

/* Whether a thread of the process waits for a processor, or has one: 'R' in /proc. What is stopped
 * ('T') or waits for something else is not starved. */
static bool could_run(pid_t pid)
{
    char path[64], file[350], text[512];
    bool could = false;
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    DIR *dir = opendir(path);
    for (struct dirent *e = dir == NULL ? NULL : readdir(dir); e != NULL && !could;
         e = readdir(dir)) {
        snprintf(file, sizeof file, "%s/%s/stat", path, e->d_name);
        FILE *stat = e->d_name[0] == '.' ? NULL : fopen(file, "r");
        if (stat == NULL)
            continue;
        size_t n = fread(text, 1, sizeof text - 1, stat);
        text[n] = '\0';
        fclose(stat);
        const char *name_end = strrchr(text, ')');
        could = name_end != NULL && strncmp(name_end, ") R", 3) == 0;
    }
    if (dir != NULL)
        closedir(dir);
    return could;
}

static bool is_silent(const coordinator *c, const worker *w, double timeout)
{
    double since = watch_since(c, w->heard_at);
    double allowed = timeout > beats_seconds ? timeout : beats_seconds;
    return since > allowed && (since > starved_times * allowed || !could_run(w->pid));
}

void watch_heard(const coordinator *c, worker *w)
{
    if (watch_since(c, w->heard_at) >= missed_seconds)
        w->back_at = c->attended;
    w->heard_at = c->attended;
}

bool watch_may_speak(const coordinator *c, const worker *w, double seconds)
{
    double timeout = pml_run_hang_timeout(c->run);
    if (watch_since(c, w->heard_at) < missed_seconds)
        return w->back_at > 0 && watch_since(c, w->back_at) < seconds;
    return timeout > 0 && !is_silent(c, w, timeout);
}

/* 0: it may take what it takes. A stop waits for the safe point after a step, and not for long; but
 * the save that it is for has a save's time. */
static double limit_of(const coordinator *c, const worker *w, double timeout)
{
    bool hurries = stop_is_asked(c) && strcmp(w->phase, "saving") != 0;
    return hurries && w->limit > 0 ? timeout + 2 * w->longest : w->limit;
}

static bool is_late(const coordinator *c, const worker *w, double timeout)
{
    double limit = limit_of(c, w, timeout);
    return limit > 0 && w->idle > limit;
}

static void call_silent(coordinator *c, const worker *w)
{
    char reason[300];
    snprintf(reason, sizeof reason,
             "worker %d (process %d) is silent: no heartbeat for %.0f s (stopped, or starved)",
             w->rank, (int)w->pid, watch_since(c, w->heard_at));
    fail_worker(c, w, "silent", reason);
}

static void call_hung(coordinator *c, const worker *w)
{
    char reason[300];
    snprintf(reason, sizeof reason,
             "worker %d (process %d) hung: its heart beats, but it has not come on for %.0f s "
             "while %s",
             w->rank, (int)w->pid, w->idle, w->phase);
    fail_worker(c, w, "hung", reason);
}

/* w is late and waits for another one, which stands: it should have come. */
static void call_absent(coordinator *c, const worker *other, const worker *w)
{
    char reason[300];
    snprintf(reason, sizeof reason,
             "worker %d (process %d) hung: it is %s while worker %d has waited for it for %.0f s",
             other->rank, (int)other->pid, other->phase, w->rank, w->idle);
    fail_worker(c, other, "hung", reason);
}

static void judge(coordinator *c, const worker *w, double timeout)
{
    if (is_silent(c, w, timeout)) {
        call_silent(c, w);
        return;
    }
    if (!is_late(c, w, timeout))
        return;
    if (w->waits_for < 0 || w->waits_for >= c->world) {
        call_hung(c, w);
        return;
    }
    const worker *other = &c->workers[w->waits_for];
    bool beats = other->beat_at > 0 && watch_since(c, other->heard_at) < missed_seconds;
    if (other->pid > 0 && beats && !other->told_since && other->waits_for < 0 && other->limit == 0)
        call_absent(c, other, w);
}

void watch_tick(coordinator *c, double now)
{
    double timeout = pml_run_hang_timeout(c->run);
    attend(c, now);
    for (int r = 0; r < c->world && timeout > 0; r++) {
        const worker *w = &c->workers[r];
        if (c->recovery.under_way || c->failure.seen)
            return;
        if (w->pid > 0 && !w->asked_to_end)
            judge(c, w, timeout);
    }
}
