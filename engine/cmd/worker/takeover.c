#include "takeover.h"

#include <limits.h>

#include "pml/base/clock.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/net/connection.h"
#include "pml/net/launch.h"

static const double patience_seconds = 5, look_seconds = 0.02;

/* Whether the run has another coordinator than ours, which is dead. The end of a lease may come a
 * moment before the lock of the dying one is free. */
static bool somebody_was_quicker(const char *folder, pid_t dead)
{
    char path[PATH_MAX];
    double end = pml_clock_monotonic() + patience_seconds;
    while (pml_runtime_find(folder, path, sizeof path, NULL) == PML_OK) {
        pml_connection found;
        bool there = pml_connection_find(folder, path, sizeof path, NULL) == PML_OK &&
                     pml_connection_read(path, &found, NULL) == PML_OK;
        pml_keypair_forget(&found.keys);
        if ((there && found.pid != (int)dead) || pml_clock_monotonic() > end)
            return true;
        pml_clock_sleep(look_seconds);
    }
    return false;
}

/* A coordinator that could not read its run's files, or had no memory, may a moment later; whoever
 * else starts one meanwhile is quicker. 92 seconds, as a coordinator gives its checkpoints. */
static pml_status launch(const pml_launch *job, pid_t dead, pml_error *err)
{
    enum { TRIES = 10 };
    static const double longest = 30;
    char file[PATH_MAX];
    double delay = 0.25;
    for (int tries = 1;; tries++) {
        pml_status status = pml_launch_coordinator(job, file, sizeof file, err);
        if ((status != PML_IO && status != PML_NO_MEMORY) || tries == TRIES)
            return status;
        pml_log(PML_LOG_WARNING, "%s: tried again in %g s", err->message, delay);
        for (double end = pml_clock_monotonic() + delay; pml_clock_monotonic() < end;) {
            pml_clock_sleep(look_seconds);
            if (somebody_was_quicker(job->run_folder, dead))
                return PML_FAIL(err, PML_BUSY, "somebody else has started a coordinator");
        }
        delay = 2 * delay < longest ? 2 * delay : longest;
    }
}

void take_over(const pml_message *start, pid_t dead)
{
    char folder[PATH_MAX];
    pml_error err = PML_ERROR_INIT;
    const char *program = pml_message_string(start, "coordinator");
    if (program[0] == '\0')
        return;
    /* It may have been moved, and the next run of that name be where it was. */
    if (pml_hold_where(pml_message_string(start, "folder"), folder, sizeof folder, &err) !=
        PML_OK) {
        pml_log(PML_LOG_ERROR, "no other coordinator is started: %s", err.message);
        return;
    }
    if (somebody_was_quicker(folder, dead)) /* another worker, or a person */
        return;
    const pml_launch job = {.program = program, .run_folder = folder, .recover = 1};
    pml_status status = launch(&job, dead, &err);
    if (status != PML_OK && status != PML_BUSY)
        pml_log(PML_LOG_ERROR, "cannot start another coordinator: %s", err.message);
    else
        pml_log(PML_LOG_INFO, "%s", status == PML_OK ? "another coordinator goes on" : err.message);
}
