#include "saver.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"

static const double tell_seconds = 2;

struct saver {
    const job_kind *kind;
    job *j;
    keeper *keeper;
    worker_link *link;
    char parent[PATH_MAX]; /* checkpoints/ */
    pthread_t thread;
    bool running;

    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool busy, ending;
    pml_error last; /* of the last write */

    /* The one being written: of the caller until busy, then of the thread. */
    int64_t command;
    char name[129];
    double begun;
    const pml_train_state *whole; /* held by the keeper */
    const void *memory;
    double told;  /* when how far it is was told last, or it was begun */
    size_t total; /* bytes that it was told of, 0: it was not */

    char complained[1200]; /* what was told last: a second attempt that fails alike says nothing */

    pml_train_state state;
    char folder[160]; /* its name in parent */

    /* What is on disk; step -1: nothing of ours. */
    pml_train_state written;
    char written_folder[160];
};

static void announce(saver *s, size_t bytes, double seconds)
{
    char path[200];
    pml_message *event = pml_message_new(PML_EVENT_checkpoint);
    snprintf(path, sizeof path, "checkpoints/%s", s->folder);
    pml_message_set_int(event, "step", s->state.step);
    pml_message_set_string(event, "path", path);
    if (s->name[0] != '\0')
        pml_message_set_string(event, "name", s->name);
    pml_message_set_int(event, "bytes", (int64_t)bytes);
    pml_message_set_number(event, "seconds", seconds);
    if (s->command > 0)
        pml_message_set_int(event, "command", s->command);
    link_event(s->link, event);
}

static void complain(saver *s, const char *level, const pml_error *err)
{
    char text[1200];
    snprintf(text, sizeof text, "checkpoint of step %lld: %.900s%s", (long long)s->state.step,
             err->message,
             err->code == PML_IO ? "; the run goes on, the checkpoints before it are kept: make "
                                   "room or mend the disk before the next"
                                 : "");
    if (s->command == 0 && strcmp(text, s->complained) == 0)
        return;
    memcpy(s->complained, text, sizeof text);
    pml_message *event = pml_message_new(PML_EVENT_log);
    pml_message_set_string(event, "level", level);
    pml_message_set_string(event, "message", text);
    if (s->command > 0)
        pml_message_set_int(event, "command", s->command);
    link_event(s->link, event);
}

/* A save that takes its time says how far it is, in the panel and in the log. */
static void tell(saver *s, double fraction, size_t done, size_t total)
{
    char what[128];
    pml_message *event = pml_message_new(PML_EVENT_progress);
    snprintf(what, sizeof what, "saving step %lld, %zu of %zu MiB", (long long)s->state.step,
             done >> 20, total >> 20);
    pml_message_set_string(event, "what", what);
    pml_message_set_number(event, "fraction", fraction);
    link_event(s->link, event);
}

static void moved(void *user, size_t done, size_t total)
{
    saver *s = user;
    double now = pml_clock_monotonic();
    if (now - s->told < tell_seconds || done >= total)
        return;
    s->told = now;
    s->total = total;
    tell(s, (double)done / (double)total, done, total);
}

/* It is over, well or not: what was told of it does not stand any more. */
static void tell_end(saver *s)
{
    if (s->total > 0)
        tell(s, 1, s->total, s->total);
    s->total = 0;
}

/* Where a file system cannot exchange (NFS, many a FUSE): the old one aside, the new one in. A
 * crash between the two leaves the name empty and both of them whole beside it; a resume then takes
 * the checkpoint before. `name` of the old one is returned for removal. */
static pml_status exchange_in_two(saver *s, const char *folder, const char *beside, char *name,
                                  size_t capacity, pml_error *err)
{
    char old[PATH_MAX];
    snprintf(name, capacity, ".old-%s", s->folder);
    pml_status status = pml_path_join(old, sizeof old, s->parent, name, err);
    if (status == PML_OK)
        status = pml_tree_remove(s->parent, name, err); /* left by a crash */
    if (status != PML_OK)
        return status;
    status = pml_rename(folder, old, 0, err);
    if (status == PML_OK) {
        status = pml_rename(beside, folder, 0, err);
        if (status != PML_OK && pml_rename(old, folder, 0, NULL) != PML_OK)
            pml_error_prefix(err, "what was %s is %s now", folder, old);
    }
    return status;
}

/* PML_SAVE_EXCHANGE=0 does without, as on a file system that has none. */
static pml_status exchange_in_one(const char *folder, const char *beside, pml_error *err)
{
    const char *wish = getenv("PML_SAVE_EXCHANGE");
    if (wish != NULL && strcmp(wish, "0") == 0) {
        errno = ENOSYS;
        return PML_FAIL(err, PML_IO, "exchanging is switched off");
    }
    return pml_rename(beside, folder, RENAME_EXCHANGE, err);
}

/* A folder of that name may be there: from before somebody went back, with other settings, or
 * damaged. The new one is written beside it and takes its place in one rename, so that at every
 * moment a whole one has the name. */
static pml_status exchange(saver *s, const char *folder, const char *beside,
                           const char *beside_name, pml_error *err)
{
    char name[200];
    snprintf(name, sizeof name, "%s", beside_name);
    pml_status status = exchange_in_one(folder, beside, err);
    if (status == PML_IO && (errno == EINVAL || errno == ENOSYS || errno == ENOTSUP))
        status = exchange_in_two(s, folder, beside, name, sizeof name, err);
    if (status == PML_OK)
        status = pml_folder_sync(s->parent, err);
    return status == PML_OK ? pml_tree_remove(s->parent, name, err) : status;
}

static pml_status write_one(saver *s, size_t *bytes, pml_error *err)
{
    char beside_name[200], folder[PATH_MAX], beside[PATH_MAX];
    pml_watch watch = {.moved = moved, .user = s};
    s->told = pml_clock_monotonic();
    snprintf(beside_name, sizeof beside_name, ".new-%s", s->folder);
    pml_status status = pml_folder_make(s->parent, err);
    if (status == PML_OK)
        status = pml_path_join(folder, sizeof folder, s->parent, s->folder, err);
    if (status == PML_OK)
        status = pml_path_join(beside, sizeof beside, s->parent, beside_name, err);
    if (status == PML_OK && !pml_is_there(folder))
        return s->kind->write(s->j, s->whole, s->memory, folder, &watch, bytes, err);
    if (status == PML_OK)
        status = pml_tree_remove(s->parent, beside_name, err); /* left by a crash */
    if (status == PML_OK)
        status = s->kind->write(s->j, s->whole, s->memory, beside, &watch, bytes, err);
    return status == PML_OK ? exchange(s, folder, beside, beside_name, err) : status;
}

static void save_now(saver *s)
{
    size_t bytes = 0;
    pml_error err = PML_ERROR_INIT;
    /* A checkpoint is found after a crash of everything, and then its steps must be in the log. */
    if (!link_flush(s->link))
        pml_log(PML_LOG_WARNING, "the log is behind the checkpoint of step %lld",
                (long long)s->state.step);
    pml_status status = write_one(s, &bytes, &err);
    tell_end(s);
    int64_t best = s->whole->best_step;
    keeper_release(s->keeper);
    if (status != PML_OK) {
        complain(s, "error", &err);
    } else {
        s->written = s->state;
        memcpy(s->written_folder, s->folder, sizeof s->written_folder);
        announce(s, bytes, pml_clock_monotonic() - s->begun);
        s->complained[0] = '\0';
        pml_error prune = PML_ERROR_INIT;
        if (s->kind->prune(s->j, s->parent, best, &prune) != PML_OK)
            complain(s, "warning", &prune);
    }
    pthread_mutex_lock(&s->mutex);
    s->last = status == PML_OK ? (pml_error)PML_ERROR_INIT : err;
    s->busy = false;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

static void *run(void *argument)
{
    saver *s = argument;
    for (;;) {
        pthread_mutex_lock(&s->mutex);
        while (!s->busy && !s->ending)
            pthread_cond_wait(&s->changed, &s->mutex);
        bool work = s->busy;
        pthread_mutex_unlock(&s->mutex);
        if (!work)
            return NULL;
        save_now(s);
    }
}

pml_status saver_new(const job_kind *kind, job *j, keeper *keeper, worker_link *link,
                     const char *folder, const pml_train_state *from, const char *from_folder,
                     saver **out, pml_error *err)
{
    *out = NULL;
    saver *s = calloc(1, sizeof *s);
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the checkpoint thread");
    s->kind = kind;
    s->j = j;
    s->keeper = keeper;
    s->link = link;
    s->written = from != NULL ? *from : (pml_train_state){.step = -1};
    if (from != NULL)
        snprintf(s->written_folder, sizeof s->written_folder, "%s", from_folder);
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    pml_status status = pml_path_join(s->parent, sizeof s->parent, folder, "checkpoints", err);
    if (status == PML_OK && pthread_create(&s->thread, NULL, run, s) != 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "cannot start the checkpoint thread");
    s->running = status == PML_OK;
    if (status != PML_OK)
        saver_destroy(&s);
    *out = s;
    return status;
}

void saver_destroy(saver **out)
{
    saver *s = *out;
    if (s == NULL)
        return;
    *out = NULL;
    if (s->running) {
        pthread_mutex_lock(&s->mutex);
        s->ending = true;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->mutex);
        pthread_join(s->thread, NULL);
    }
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->mutex);
    free(s);
}

static void wait_idle(saver *s)
{
    phase before = pulse_enter(link_pulse(s->link), PHASE_SAVING);
    pthread_mutex_lock(&s->mutex);
    while (s->busy)
        pthread_cond_wait(&s->changed, &s->mutex);
    pthread_mutex_unlock(&s->mutex);
    pulse_enter(link_pulse(s->link), before);
}

static bool same(const pml_train_state *a, const pml_train_state *b)
{
    return a->step == b->step && a->learning_rate == b->learning_rate &&
           a->weight_decay == b->weight_decay && a->max_grad_norm == b->max_grad_norm &&
           a->eval_steps == b->eval_steps && a->save_steps == b->save_steps &&
           a->owes_evaluation == b->owes_evaluation && a->lora_dropout == b->lora_dropout &&
           a->accumulation == b->accumulation && pml_schedule_same(&a->schedule, &b->schedule);
}

/* "step-000412", or with its name behind: then pruning leaves it alone. */
static void name_folder(saver *s, int64_t step, const char *name)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    int n = snprintf(s->folder, sizeof s->folder, "step-%06lld", (long long)step);
    if (name[0] == '\0')
        return;
    snprintf(s->folder + n, sizeof s->folder - (size_t)n, "-%.100s", name);
    for (char *at = s->folder + n; *at != '\0'; at++)
        if (strchr(plain, *at) == NULL)
            *at = '_';
}

/* Whether the checkpoint that we wrote is there still: somebody may have removed it. */
static bool is_whole(const saver *s, const char *folder, char *path, size_t capacity)
{
    char manifest[PATH_MAX];
    return pml_path_join(path, capacity, s->parent, folder, NULL) == PML_OK &&
           pml_path_join(manifest, sizeof manifest, path, "MANIFEST", NULL) == PML_OK &&
           pml_is_there(manifest);
}

pml_status saver_save(saver *s, const pml_train_state *state, const char *name, int64_t command,
                      pml_error *err)
{
    char path[PATH_MAX];
    wait_idle(s);
    s->state = *state;
    s->command = command;
    s->begun = pml_clock_monotonic();
    snprintf(s->name, sizeof s->name, "%s", name);
    name_folder(s, state->step, name);
    bool there = same(&s->written, state);
    if (there && (name[0] == '\0' || strcmp(s->folder, s->written_folder) == 0) &&
        is_whole(s, s->written_folder, path, sizeof path)) {
        memcpy(s->folder, s->written_folder, sizeof s->folder);
        announce(s, pml_folder_bytes(path), 0);
        s->last =
            (pml_error)PML_ERROR_INIT; /* what failed before is made good: this one is there */
        return PML_OK;
    }
    pml_status status = keeper_hold(s->keeper, state, &s->whole, &s->memory, err);
    if (status != PML_OK)
        return status;
    pthread_mutex_lock(&s->mutex);
    s->busy = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    return PML_OK;
}

bool saver_is_writing(saver *s, int64_t step)
{
    pthread_mutex_lock(&s->mutex);
    bool writing = s->busy && s->state.step == step;
    pthread_mutex_unlock(&s->mutex);
    return writing;
}

pml_status saver_wait(saver *s, pml_error *err)
{
    wait_idle(s);
    if (s->last.code == PML_OK)
        return PML_OK;
    return PML_FAIL(err, s->last.code, "%s", s->last.message);
}

const char *saver_last(saver *s)
{
    wait_idle(s);
    return s->written.step < 0 ? "" : s->written_folder;
}
