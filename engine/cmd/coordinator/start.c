/* The start: arguments, run.json, the log, where the run was left, the doors. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "coordinator.h"
#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"
#include "pml/train/run.h"

pml_status parse_arguments(coordinator *c, int argc, char **argv, pml_error *err)
{
    const char *folder = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--resume") == 0) {
            c->resume = true;
            if (i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0) {
                snprintf(c->wanted, sizeof c->wanted, "%s", argv[++i]);
                c->named = c->wanted[0] != '\0';
            }
        } else if (strcmp(argv[i], "--recover") == 0) {
            c->resume = c->recover = true;
        } else if (strcmp(argv[i], "--accept-changes") == 0) {
            c->accept_changes = true;
        } else if (strcmp(argv[i], "--ready-fd") == 0 && i + 1 < argc) {
            c->ready_fd = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--") == 0 && i + 1 < argc) {
            c->prepare_argv = &argv[i + 1];
            break;
        } else if (argv[i][0] != '-' && folder == NULL) {
            folder = argv[i];
        } else {
            return PML_FAIL(err, PML_INVALID, "unknown argument \"%s\"", argv[i]);
        }
    }
    if (folder == NULL)
        return PML_FAIL(err, PML_INVALID,
                        "usage: pml-coordinator RUNDIR [--resume [step-000412]] [--recover] "
                        "[--accept-changes] [--ready-fd N] [-- PREPARE ARG...]");
    if (realpath(folder, c->folder) == NULL)
        return PML_FAIL(err, pml_status_of_errno(errno), "run folder %s: %s", folder,
                        strerror(errno));
    if (c->ready_fd >= 0 && fcntl(c->ready_fd, F_SETFD, FD_CLOEXEC) != 0)
        return PML_FAIL(err, PML_INVALID, "there is no descriptor %d", c->ready_fd);
    return PML_OK;
}

static pml_status read_run(coordinator *c, pml_error *err)
{
    pml_status status = pml_run_read(c->folder, &c->run, err);
    static const char *const shards[] = {"train_data", "eval_data"};
    for (int i = 0; i < 2 && status == PML_OK; i++) {
        const char *name = pml_message_string(c->run, shards[i]);
        if (name[0] != '\0' && !pml_path_is_below(name))
            status =
                PML_FAIL(err, PML_INVALID, "%s/run.json: %s \"%.200s\" is not below the run folder",
                         c->folder, shards[i], name);
    }
    if (status == PML_OK)
        pml_message_remove(c->run, "sum"); /* of the file, not of what is in it */
    return status;
}

static pml_status make_workers(coordinator *c, pml_error *err)
{
    int world = (int)pml_message_count(c->run, "devices");
    c->workers = calloc((size_t)world, sizeof *c->workers);
    if (c->workers == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for %d workers", world);
    c->world = world;
    c->max_steps = pml_message_int(c->run, "max_steps");
    for (int r = 0; r < world; r++) {
        worker *w = &c->workers[r];
        w->rank = r;
        w->device = pml_message_string_at(c->run, "devices", (size_t)r);
        w->lease = w->reserved = -1;
        snprintf(w->state, sizeof w->state, "starting");
    }
    return PML_OK;
}

static void recover_event(void *user, const pml_message *event)
{
    coordinator *c = user;
    if (c->broken != PML_OK) /* what comes next would only seem to be out of order */
        return;
    commands_recover(c, event);
    resume_recover(c, event);
    recover_recover(c, event);
    handover_recover(c, event);
}

static pml_status open_log(coordinator *c, pml_error *err)
{
    size_t cut;
    pml_status status = eventlog_open(c->folder, recover_event, c, &c->log, &cut, err);
    if (status == PML_BUSY) /* the runtime folder is of whoever writes it */
        c->runtime[0] = '\0';
    if (status != PML_OK)
        return status;
    if (c->broken == PML_CORRUPT)
        return PML_FAIL(err, PML_CORRUPT,
                        "%s/events.jsonl: its commands are out of order, or no commands of this "
                        "version",
                        c->folder);
    if (c->broken != PML_OK)
        return PML_FAIL(err, c->broken, "no memory for what %s/events.jsonl says was set",
                        c->folder);
    if (eventlog_last(c->log) > 0 && !c->resume)
        return PML_FAIL(err, PML_BUSY, "this run has a history: resume it, or take another name");
    c->n_logged = c->n_commands;
    c->timeline = eventlog_timeline(c->log);
    if (c->recover &&
        (!pml_run_restarts(c->run) || strcmp(c->logged_state, "finished") == 0 ||
         strcmp(c->logged_state, "stopped") == 0 || strcmp(c->logged_state, "failed") == 0))
        return PML_FAIL(err, PML_BUSY, "the run is %s and does not go on by itself: resume it",
                        c->logged_state);
    if (eventlog_last(c->log) == 0)
        c->timeline = 0;
    if (cut > 0)
        emit_log(c, "warning", -1, "%zu bytes of a torn end were cut from the log", cut);
    return PML_OK;
}

/* Where the run was left, and where it goes on. Nobody else is at its folder any more. */
pml_status take_up(coordinator *c, pml_error *err)
{
    if (!c->resume)
        return PML_OK;
    pml_status status = handover_take(c, err);
    if (status != PML_OK || c->recover)
        return status;
    c->timeline++;
    c->restarts = 0;
    return resume_choose(c, err);
}

/* It is tried again, once a second: the list of keys is not for those that nobody has. The file may
 * be there, and only its folder not on disk. */
static void take_back(coordinator *c, const pml_connection *connection)
{
    char path[PATH_MAX];
    (void)pml_hub_revoke(c->hub, connection->keys.public_key, NULL);
    if (pml_path_join(path, sizeof path, c->runtime, "connection.json", NULL) == PML_OK)
        unlink(path);
}

/* Its key pair is the control key of this coordinator's life, or from here on one more. */
pml_status write_connection(coordinator *c, pml_error *err)
{
    pml_connection connection = {.pid = (int)getpid(), .role = PML_ROLE_CONTROL};
    char folder[PATH_MAX];
    pml_status status = pml_hold_where(c->folder, folder, sizeof folder, err);
    if (status == PML_OK)
        status = pml_keypair_new(&connection.keys, err);
    if (status == PML_OK)
        status = pml_hub_allow(c->hub, connection.keys.public_key, PML_ROLE_CONTROL, -1, err);
    if (status != PML_OK)
        return status;
    snprintf(connection.run, sizeof connection.run, "%s", folder);
    snprintf(connection.control, sizeof connection.control, "%s",
             pml_hub_endpoint(c->hub, PML_DOOR_CONTROL));
    snprintf(connection.telemetry, sizeof connection.telemetry, "%s",
             pml_hub_endpoint(c->hub, PML_DOOR_TELEMETRY));
    snprintf(connection.server_key, sizeof connection.server_key, "%s", pml_hub_server_key(c->hub));
    status = pml_connection_write(c->runtime, &connection, err);
    if (status != PML_OK)
        take_back(c, &connection);
    pml_keypair_forget(&connection.keys);
    if (status == PML_OK)
        snprintf(c->upkeep.folder, sizeof c->upkeep.folder, "%s", folder);
    return status;
}

static pml_status open_doors(coordinator *c, pml_error *err)
{
    pml_status status = pml_hub_new(c->runtime, &c->hub, err);
    return status == PML_OK ? write_connection(c, err) : status;
}

/* Keys are in our memory, in libzmq's too, and in the workers', who inherit this: a core file would
 * keep them, in a folder or a service of the machine's choice. One byte, not none: of the limits
 * that leave no file, only this one also counts where a program takes cores (core(5)). The hard
 * limit stays, so that who looks for a fault can raise this one with prlimit. */
static pml_status leave_no_core(pml_error *err)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_CORE, &limit) != 0)
        return PML_FAIL(err, PML_INTERNAL, "cannot ask for the limit of core files: %s",
                        strerror(errno));
    limit.rlim_cur = limit.rlim_max < 1 ? limit.rlim_max : 1;
    if (setrlimit(RLIMIT_CORE, &limit) != 0)
        return PML_FAIL(err, PML_INTERNAL, "cannot limit core files: %s", strerror(errno));
    return PML_OK;
}

/* Signals come through a descriptor, in every thread's absence. */
static pml_status take_over_signals(coordinator *c, pml_error *err)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    signal(SIGPIPE, SIG_IGN);
    if (sigprocmask(SIG_BLOCK, &set, NULL) != 0 ||
        (c->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK)) < 0)
        return PML_FAIL(err, PML_INTERNAL, "cannot take over signals: %s", strerror(errno));
    return PML_OK;
}

/* Where that cannot be found out just now, a run that goes on by itself asks again (handover_tick);
 * a person is told at once. */
static pml_status look_for_workers(coordinator *c, pml_error *err)
{
    pml_status status = handover_workers(c, &c->waiting, err);
    if (status == PML_OK || !c->recover)
        return status;
    c->waiting = true;
    return PML_OK;
}

pml_status set_up(coordinator *c, pml_error *err)
{
    char log_folder[PATH_MAX];
    pml_status status = leave_no_core(err);
    if (status == PML_OK)
        status = pml_hold_new(c->folder, &c->hold, err);
    if (status == PML_OK)
        status = pml_runtime_take(c->folder, c->runtime, sizeof c->runtime, &c->lock, err);
    if (status == PML_OK)
        status = read_run(c, err);
    if (status == PML_OK)
        status = pml_path_join(log_folder, sizeof log_folder, c->folder, "log", err);
    if (status == PML_OK)
        status = pml_folder_make(log_folder, err);
    if (status == PML_OK)
        status = make_workers(c, err);
    if (status == PML_OK)
        status = take_over_signals(c, err);
    if (status == PML_OK)
        status = open_log(c, err);
    if (status == PML_OK && c->resume)
        status = look_for_workers(c, err);
    if (status == PML_OK) /* before what may take long: who asks meanwhile is answered */
        status = open_doors(c, err);
    if (status == PML_OK && !c->waiting)
        status = take_up(c, err);
    return status;
}

void say_ready(coordinator *c, const pml_error *err)
{
    if (c->ready_fd < 0)
        return;
    char line[1100];
    int n = err == NULL ? snprintf(line, sizeof line, "0\n")
                        : snprintf(line, sizeof line, "%d %s\n", (int)err->code, err->message);
    if (write(c->ready_fd, line, (size_t)n) != n)
        pml_log(PML_LOG_WARNING, "nobody waits for us to be ready");
    close(c->ready_fd);
    c->ready_fd = -1;
}
