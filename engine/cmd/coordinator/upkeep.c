/* What a run has in places that others clean, move or remove while it goes on: its folder, the log
 * and the lock in it, and the runtime folder with the sockets and the connection file. Each second
 * it is looked whether all is there still; what is not is put back, and the log says so.
 *
 * It is done from the loop. A network disk that hangs holds the loop here, but no more than in the
 * log's own writes, which are from the loop as well, as nobody is told what is not in the file. A
 * thread for these looks would only move the place. While the disk hangs there are no heartbeats
 * and commands wait; nobody is taken for hanging for it, as only time in which we were there counts
 * against workers (watch.c). */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "coordinator.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"

static const double look_seconds = 1;

/* Once for what goes wrong, not once a second. `said` is of this one thing: of two that go wrong
 * together each would be news after the other. */
static void complain(coordinator *c, char said[COMPLAINT_MAX], const pml_error *err)
{
    char words[COMPLAINT_MAX];
    snprintf(words, sizeof words, "%s", err->message);
    if (strcmp(said, words) == 0)
        return;
    memcpy(said, words, sizeof words);
    emit_log(c, "error", -1, "%s", said);
}

static void look_after_log(coordinator *c)
{
    bool put_back;
    pml_error err = PML_ERROR_INIT;
    if (eventlog_keep(c->log, &put_back, &err) != PML_OK) {
        complain(c, c->upkeep.about_log, &err);
        return;
    }
    c->upkeep.about_log[0] = '\0';
    if (put_back)
        emit_log(c, "warning", -1,
                 "events.jsonl was moved away, or something else put in its place: the log is back "
                 "there");
}

/* The folder's path is in what clients compare, so a moved one needs a new connection file. */
static bool folder_was_moved(const coordinator *c)
{
    char now[PATH_MAX];
    return pml_hold_where(c->folder, now, sizeof now, NULL) == PML_OK &&
           strcmp(now, c->upkeep.folder) != 0;
}

static bool has_connection_file(const coordinator *c)
{
    char path[PATH_MAX];
    return pml_path_join(path, sizeof path, c->runtime, "connection.json", NULL) == PML_OK &&
           access(path, F_OK) == 0;
}

/* Where clients find us. */
static void look_after_doors(coordinator *c)
{
    pml_error err = PML_ERROR_INIT;
    bool moved = folder_was_moved(c);
    pml_status status = pml_runtime_keep(c->folder, c->runtime, sizeof c->runtime, &c->lock, &err);
    bool open = status == PML_OK && pml_hub_is_open(c->hub) && has_connection_file(c);
    if (status == PML_OK && !open)
        status = pml_hub_open_again(c->hub, c->runtime, &err);
    if (status == PML_OK && (moved || !open))
        status = write_connection(c, &err);
    if (status != PML_OK) {
        complain(c, c->upkeep.about_doors, &err);
        return;
    }
    c->upkeep.about_doors[0] = '\0';
    if (moved)
        emit_log(c, "info", -1, "the run's folder is %s now", c->upkeep.folder);
    if (!open)
        emit_log(
            c, "warning", -1,
            "the run's sockets, or the file that names them, were removed: they are there again, "
            "in %s",
            c->runtime);
}

void upkeep_tick(coordinator *c, double now)
{
    if (c->upkeep.removed || now - c->upkeep.looked_at < look_seconds)
        return;
    c->upkeep.looked_at = now;
    c->upkeep.removed = eventlog_removed(c->log);
    if (c->upkeep.removed) {
        emit_log(
            c, "error", -1,
            "the run's folder, or the log in it, has been removed: the run goes on, but its log "
            "is lost, and without its folder nobody can attach to it any more; checkpoint() still "
            "saves what it has learned. To end it: kill %d",
            (int)getpid());
        return;
    }
    look_after_log(c);
    look_after_doors(c);
}
