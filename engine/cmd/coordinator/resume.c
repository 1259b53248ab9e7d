/* Going on from a checkpoint: which one, what the log says was set after it, and whether what
 * decides bits is still the same. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"
#include "pml/base/table.h"
#include "pml/json/sum.h"
#include "pml/train/checkpoint.h"
#include "pml/train/run.h"

/* 412 of "step-000412" and of "step-000412-tried-1e-4" (one that was given a name); else -1. */
static int64_t step_of(const char *name)
{
    static const char prefix[] = "step-";
    const char *digits = name + sizeof prefix - 1;
    if (strncmp(name, prefix, sizeof prefix - 1) != 0)
        return -1;
    size_t n = strspn(digits, "0123456789");
    if (n == 0 || n > 15 || (digits[n] != '\0' && digits[n] != '-') || strchr(digits, '/') != NULL)
        return -1;
    return strtoll(digits, NULL, 10);
}

int64_t resume_newest_step(const coordinator *c)
{
    int64_t step = step_of(pml_path_name(c->newest));
    return step < 0 ? 0 : step;
}

/* "step-000412": what a step asks for by itself. */
static bool is_nameless(const char *path)
{
    const char *name = pml_path_name(path);
    return step_of(name) >= 0 && strchr(name + strlen("step-"), '-') == NULL;
}

bool resume_is_saved(const coordinator *c, int64_t step)
{
    return c->saved_step == step;
}

/* ---- which checkpoint ---- */

static int is_checkpoint(const struct dirent *entry)
{
    return step_of(entry->d_name) >= 0;
}

typedef struct candidate {
    char name[256];
    int64_t timeline, step;
    char unfit[600]; /* why it is not gone on from; "": it was not looked at */
} candidate;

/* Who went back and trained again has fewer steps, and the newer checkpoint. */
static int newest_first(const void *left, const void *right)
{
    const candidate *a = left, *b = right;
    if (a->timeline != b->timeline)
        return a->timeline < b->timeline ? 1 : -1;
    return a->step != b->step ? (a->step < b->step) - (a->step > b->step)
                              : strcmp(a->name, b->name);
}

/* Those of the folder checkpoints whose steps are `most` at most, the newest first; malloc'ed. One
 * whose place among them cannot be read now is a failure: it may be the newest. */
static pml_status list_checkpoints(const char *parent, int64_t most, candidate **list, int *n,
                                   pml_error *err)
{
    struct dirent **found = NULL;
    char path[PATH_MAX];
    *list = NULL;
    *n = 0;
    int count;
    pml_status status = pml_folder_list(parent, &found, is_checkpoint, NULL, &count, err);
    if (status != PML_OK)
        return status == PML_NOT_FOUND ? PML_OK : status;
    candidate *all = calloc((size_t)count + 1, sizeof *all);
    if (all == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory to list %s", parent);
    for (int i = 0; i < count; i++) {
        const char *name = found[i]->d_name;
        if (status == PML_OK && step_of(name) <= most) {
            candidate *c = &all[(*n)++];
            snprintf(c->name, sizeof c->name, "%s", name);
            c->step = step_of(name);
            status = pml_path_join(path, sizeof path, parent, name, err);
            if (status == PML_OK)
                status = pml_checkpoint_timeline(path, &c->timeline, err);
            if (status != PML_OK)
                pml_error_prefix(err, "checkpoint %s", name);
        }
        free(found[i]);
    }
    free(found);
    if (status != PML_OK) {
        free(all);
        return status;
    }
    qsort(all, (size_t)*n, sizeof *all, newest_first);
    *list = all;
    return PML_OK;
}

/* ---- what was set after it ---- */

/* A set takes the place of what was set for later steps before somebody went back. */
static void supersede(coordinator *c, int64_t step, const pml_message *args)
{
    for (size_t i = 0; i < c->n_tuned; i++)
        if (c->tuned[i].step > step)
            pml_run_supersede(c->tuned[i].args, args);
}

/* Takes args. Without memory the run must not go on as if nothing had been set. */
static void keep(coordinator *c, int64_t step, int64_t command, pml_message *args)
{
    tuned *larger =
        args == NULL ? NULL
                     : pml_table_room(c->tuned, &c->tuned_capacity, c->n_tuned + 1, sizeof *larger);
    if (larger == NULL) {
        pml_message_destroy(&args);
        pml_log(PML_LOG_ERROR, "no memory to keep what was set at step %lld: the run ends",
                (long long)step);
        c->broken = PML_NO_MEMORY;
        return;
    }
    c->tuned = larger;
    size_t at = c->n_tuned++;
    for (; at > 0 && c->tuned[at - 1].step > step; at--)
        c->tuned[at] = c->tuned[at - 1];
    c->tuned[at] = (tuned){step, command, args};
}

/* Likewise. */
static void keep_setting(coordinator *c, const pml_message *event, pml_message *args)
{
    int64_t step = pml_message_int(event, "step");
    if (args != NULL)
        supersede(c, step, args);
    keep(c, step, pml_message_int(event, "command"), args);
}

static void forget_after(coordinator *c, int64_t step)
{
    size_t n = 0;
    for (size_t i = 0; i < c->n_tuned; i++) {
        if (c->tuned[i].step > step)
            pml_message_destroy(&c->tuned[i].args);
        else
            c->tuned[n++] = c->tuned[i];
    }
    c->n_tuned = n;
}

static void stand(coordinator *c, pml_message_type verb, int64_t step)
{
    if (c->standing.verb == PML_REQUEST_stop) /* there is nothing behind it */
        return;
    c->standing.verb = verb;
    c->standing.step = step;
    c->standing.reason[0] = '\0'; /* somebody's, who gives none */
}

static void stand_no_more(coordinator *c)
{
    c->standing.verb = PML_MESSAGE_COUNT;
    c->standing.reason[0] = '\0';
}

static void take_applied(coordinator *c, const pml_message *event)
{
    const char *verb = pml_message_string(event, "verb");
    int64_t step = pml_message_int(event, "step");
    if (strcmp(verb, "set") == 0) {
        keep_setting(c, event, pml_message_part(event, "args", 0));
    } else if (strcmp(verb, "stop") == 0) {
        stand(c, PML_REQUEST_stop, step);
    } else if (strcmp(verb, "pause") == 0) {
        stand(c, PML_REQUEST_pause, step);
    } else if (strcmp(verb, "resume") == 0) {
        pml_message *args = pml_message_part(event, "args", 0);
        stand(c, PML_MESSAGE_COUNT, 0);
        bool lost = args == NULL && pml_message_has(event, "args");
        if (lost || pml_message_has(args, "nonfinite"))
            keep_setting(c, event, args);
        else
            pml_message_destroy(&args);
    }
}

static void take_checkpoint(coordinator *c, const pml_message *event)
{
    const char *path = pml_message_string(event, "path");
    snprintf(c->newest, sizeof c->newest, "%s", path);
    if (is_nameless(path))
        c->saved_step = pml_message_int(event, "step");
}

/* One of a later step was not fit to go on from, or somebody has gone back: it is not what will be
 * there when its step comes again. */
static void take_start(coordinator *c, const pml_message *event)
{
    int64_t step = pml_message_int(event, "step");
    if (pml_message_has(event, "checkpoint") &&
        is_nameless(pml_message_string(event, "checkpoint")))
        c->saved_step = step;
    else if (c->saved_step > step)
        c->saved_step = -1;
}

/* A timeline that begins without a restart is somebody's who resumed the run: it goes. */
static bool is_resumed(const coordinator *c, const pml_message *event)
{
    int64_t timeline = pml_message_int(event, "timeline");
    return strcmp(pml_message_string(event, "state"), "starting") == 0 && timeline > c->logged_in &&
           timeline != c->restarted_in;
}

static bool is_an_end(const char *state)
{
    return strcmp(state, "finished") == 0 || strcmp(state, "stopped") == 0 ||
           strcmp(state, "failed") == 0;
}

/* It may also pause by itself, so the state counts beside the commands; only a resume ends it, the
 * command or a person's of a run that has ended. Why it stands is told again where it stands by
 * another worker, who does not know. */
static void take_state(coordinator *c, const pml_message *event)
{
    const char *state = pml_message_string(event, "state");
    snprintf(c->logged_state, sizeof c->logged_state, "%s", state);
    if (is_an_end(state) || is_resumed(c, event))
        stand_no_more(c);
    c->logged_in = pml_message_int(event, "timeline");
    if (strcmp(state, "paused") == 0) {
        if (c->standing.verb == PML_MESSAGE_COUNT)
            stand(c, PML_REQUEST_pause, pml_message_int(event, "step") + 1);
        snprintf(c->standing.reason, sizeof c->standing.reason, "%s",
                 pml_message_string(event, "reason"));
    }
    if (pml_message_bool(event, "rewound")) {
        snprintf(c->newest, sizeof c->newest, "%s", pml_message_string(event, "checkpoint"));
        forget_after(c, step_of(pml_path_name(c->newest)));
    }
    if (strcmp(state, "starting") == 0)
        take_start(c, event);
}

void resume_recover(coordinator *c, const pml_message *event)
{
    owed_recover(c, event);
    switch (pml_message_type_of(event)) {
    case PML_EVENT_applied:
        take_applied(c, event);
        break;
    case PML_EVENT_state:
        take_state(c, event);
        break;
    case PML_EVENT_checkpoint:
        take_checkpoint(c, event);
        break;
    case PML_EVENT_restart:
        c->restarted_in = pml_message_int(event, "timeline");
        break;
    default:
        break;
    }
}

/* ---- choosing ---- */

static const double long_seconds = 1; /* of checking: then people are told how far it is */

bool resume_is_checking(const coordinator *c, char *words, size_t capacity)
{
    if (c->checking.name == NULL || pml_clock_monotonic() - c->checking.begun < long_seconds)
        return false;
    snprintf(words, capacity, "checking %s, %zu of %zu MiB", c->checking.name,
             c->checking.done >> 20, c->checking.total >> 20);
    return true;
}

/* With each megabyte. The log may be about to be read by somebody who waits: it tells, too. */
static void checked(void *user)
{
    coordinator *c = user;
    char words[400];
    double now = pml_clock_monotonic();
    c->checking.done += (size_t)1 << 20;
    if (c->checking.done > c->checking.total)
        c->checking.done = c->checking.total;
    keep_in_touch(c);
    if (now - c->checking.told < long_seconds || !resume_is_checking(c, words, sizeof words))
        return;
    c->checking.told = now;
    pml_message *event = pml_message_new(PML_EVENT_progress);
    pml_message_set_string(event, "what", words);
    pml_message_set_number(event, "fraction",
                           (double)c->checking.done / (double)(c->checking.total + 1));
    emit(c, event, false);
    journal_write(c);
}

static pml_status verify(coordinator *c, const char *folder, pml_error *err)
{
    double now = pml_clock_monotonic();
    c->checking.name = pml_path_name(folder);
    c->checking.done = 0;
    c->checking.total = pml_folder_bytes(folder);
    c->checking.begun = c->checking.told = now;
    pml_status status = pml_checkpoint_verify_watched(folder, checked, c, err);
    c->checking.name = NULL;
    return status;
}

/* Who names one wants to go back: what was set after it is not set again. */
static pml_status choose_named(coordinator *c, pml_error *err)
{
    char path[PATH_MAX], relative[sizeof c->checkpoint];
    const int64_t step = step_of(c->wanted);
    if (step < 0)
        return PML_FAIL(err, PML_INVALID,
                        "a checkpoint is named as its folder, \"step-000412\"; "
                        "not \"%s\"",
                        c->wanted);
    snprintf(relative, sizeof relative, "checkpoints/%s", c->wanted);
    pml_status status = pml_path_join(path, sizeof path, c->folder, relative, err);
    if (status == PML_OK)
        status = verify(c, path, err);
    if (status != PML_OK)
        return status;
    memcpy(c->checkpoint, relative, sizeof relative);
    c->step = step;
    forget_after(c, step);
    return PML_OK;
}

/* *whole: whether it can be gone on from; where it cannot for its own sake, it->unfit says why. All
 * else is a failure: the checkpoint may be whole, and the one before it is no stand-in for that. */
static pml_status look_at(coordinator *c, candidate *it, bool *whole, pml_error *err)
{
    char path[PATH_MAX], relative[300];
    pml_error why = PML_ERROR_INIT;
    snprintf(relative, sizeof relative, "checkpoints/%s", it->name);
    pml_status status = pml_path_join(path, sizeof path, c->folder, relative, &why);
    if (status == PML_OK)
        status = verify(c, path, &why);
    *whole = status == PML_OK;
    if (pml_checkpoint_is_unfit(status)) {
        snprintf(it->unfit, sizeof it->unfit, "%.599s", why.message);
        return PML_OK;
    }
    if (status != PML_OK) {
        *err = why;
        pml_error_prefix(err, "checkpoint %s", it->name);
    }
    return status;
}

static void say_unfit(coordinator *c, const candidate *it)
{
    if (it->unfit[0] != '\0')
        emit_log(c, "warning", -1, "checkpoint %s is not used, the one before it is: %s", it->name,
                 it->unfit);
}

/* The newest that was announced, where that is whole. The others are looked at only where it is
 * not: an old one that cannot be read is in nobody's way. */
static pml_status choose_newest(coordinator *c, pml_error *err)
{
    char parent[PATH_MAX];
    candidate announced = {.step = INT64_MAX}, *list = NULL;
    const candidate *chosen = NULL;
    bool whole = false;
    int n = 0;
    pml_status status = pml_path_join(parent, sizeof parent, c->folder, "checkpoints", err);
    if (status == PML_OK && c->newest[0] != '\0') {
        snprintf(announced.name, sizeof announced.name, "%.255s", pml_path_name(c->newest));
        announced.step = step_of(announced.name);
        status = look_at(c, &announced, &whole, err);
        chosen = whole ? &announced : NULL;
    }
    if (status == PML_OK && chosen == NULL)
        status = list_checkpoints(parent, announced.step, &list, &n, err);
    for (int i = 0; status == PML_OK && chosen == NULL && i < n; i++) {
        if (strcmp(list[i].name, announced.name) == 0)
            continue;
        status = look_at(c, &list[i], &whole, err);
        chosen = whole ? &list[i] : NULL;
    }
    if (status == PML_OK) { /* only now: what fails is tried again, and would be told each time */
        say_unfit(c, &announced);
        for (int i = 0; i < n; i++)
            say_unfit(c, &list[i]);
        if (chosen == NULL)
            emit_log(c, "warning", -1, "there is no whole checkpoint: the run begins again");
        else
            snprintf(c->checkpoint, sizeof c->checkpoint, "checkpoints/%s", chosen->name);
        c->step =
            chosen == NULL ? 0 : chosen->step; /* a run that ends while it loads stands there */
    }
    free(list);
    return status;
}

/* The cause may be as long as the message; what to do comes behind it, and is not cut. */
static void say_what_to_do(pml_error *err)
{
    static const char words[] =
        "; it may be whole, so no older one takes its place: mend the cause and resume, or go back "
        "to an older one by its name (pantheraml doctor says which there are)";
    size_t room = sizeof err->message - sizeof words, n = strlen(err->message);
    n = n < room ? n : room;
    while (n > 0 && ((unsigned char)err->message[n] & 0xC0) == 0x80) /* no half of a character */
        n--;
    memcpy(err->message + n, words, sizeof words);
}

pml_status resume_choose_newest(coordinator *c, pml_error *err)
{
    pml_status status = choose_newest(c, err);
    if (status != PML_OK && !pml_checkpoint_is_unfit(status))
        say_what_to_do(err);
    return status;
}

pml_status resume_choose(coordinator *c, pml_error *err)
{
    if (!c->resume || c->recover)
        return PML_OK;
    stand_no_more(c); /* whoever resumes wants it to go */
    pml_status status = c->named ? choose_named(c, err) : resume_choose_newest(c, err);
    if (status == PML_OK && c->named)
        owed_give_up(c, "a checkpoint that was asked for is not written: the run has gone back");
    return status;
}

/* ---- what comes back ---- */

/* answers: the command that a checkpoint was asked for by, or a setting; 0: it is neither. */
static void send_again(coordinator *c, worker *w, int64_t step, pml_message_type verb,
                       const pml_message *args, int64_t answers)
{
    pml_message *again = pml_message_new(PML_ORDER_again);
    pml_message_set_int(again, "step", step);
    pml_message_set_string(again, "verb", pml_message_name(verb));
    pml_message_set_args(again, "args", args);
    if (answers > 0)
        pml_message_set_int(again, "answers", answers);
    worker_order(c, w, again);
    pml_message_destroy(&again);
}

/* How far the orders have been sent. */
typedef struct sent_so_far {
    size_t owed;
    bool standing;
} sent_so_far;

/* What the run stood at, if that is before such a step. */
static void send_standing(coordinator *c, worker *w, int64_t step, sent_so_far *sent)
{
    if (sent->standing || c->standing.verb == PML_MESSAGE_COUNT || c->standing.step >= step)
        return;
    pml_message *nothing = pml_message_new(c->standing.verb);
    send_again(c, w, c->standing.step, c->standing.verb, nothing, 0);
    pml_message_destroy(&nothing);
    sent->standing = true;
}

/* All but settings that is before such a step and has not been sent. */
static void send_before(coordinator *c, worker *w, int64_t step, sent_so_far *sent)
{
    for (; sent->owed < c->n_owed && c->owed[sent->owed].step < step; sent->owed++) {
        const owed *o = &c->owed[sent->owed];
        send_standing(c, w, o->step, sent);
        send_again(c, w, o->step, PML_REQUEST_checkpoint, o->args, o->command);
    }
    send_standing(c, w, step, sent);
}

/* By their steps, for a worker takes them in the order in which they come: what waits for a later
 * step would hold up a pause. */
void resume_apply_again(coordinator *c, worker *w)
{
    sent_so_far sent = {0};
    for (size_t i = 0; i < c->n_tuned; i++) {
        const tuned *t = &c->tuned[i];
        pml_message_type verb = pml_message_type_of(t->args);
        send_before(c, w, t->step, &sent);
        /* Settings are in what is loaded; what is done about a step that is not finite is not. */
        bool loaded = t->step <= w->step && verb == PML_REQUEST_set;
        if (!loaded && !pml_message_is_empty(t->args))
            send_again(c, w, t->step, verb, t->args, t->command);
    }
    send_before(c, w, INT64_MAX, &sent);
}

/* ---- what decides bits ---- */

static pml_status write_run(coordinator *c, pml_error *err)
{
    char path[PATH_MAX], *text = NULL;
    size_t size;
    pml_status status = pml_path_join(path, sizeof path, c->folder, "run.json", err);
    if (status == PML_OK)
        status = pml_message_print(c->run, &text, &size, err);
    if (status == PML_OK)
        status = pml_sum_add(&text, &size, err);
    if (status == PML_OK)
        status = pml_file_write(path, text, size, 0600, err);
    free(text);
    return status;
}

/* A disk that does not take run.json now is no reason to end: it is as it was, and tried again. */
static pml_status keep_identity(coordinator *c, const pml_message *ready, pml_error *err)
{
    pml_error why = PML_ERROR_INIT;
    pml_message_set_part(c->run, "identity", pml_message_part(ready, "identity", 0));
    pml_status status = write_run(c, &why);
    if (status != PML_OK && status != PML_IO)
        return PML_FAIL(err, status, "%s", why.message);
    if (status == PML_IO) {
        c->run_unwritten = pml_clock_monotonic();
        emit_log(c, "warning", -1,
                 "what decides bits is not in run.json yet: %s; make room, it is tried again",
                 why.message);
    }
    return PML_OK;
}

void resume_write_run_again(coordinator *c, double now)
{
    pml_error err = PML_ERROR_INIT;
    if (c->run_unwritten == 0 || now - c->run_unwritten < c->retry_seconds)
        return;
    c->run_unwritten = now;
    if (write_run(c, &err) != PML_OK)
        return; /* as before, and that was told */
    c->run_unwritten = 0;
    emit_log(c, "info", -1, "run.json could be written now");
}

pml_status resume_check_identity(coordinator *c, const pml_message *ready, pml_error *err)
{
    char difference[512];
    if (!pml_message_has(c->run, "identity"))
        return keep_identity(c, ready, err);
    pml_message_differs(c->run, "identity", ready, "identity", difference, sizeof difference);
    if (difference[0] == '\0')
        return PML_OK;
    if (c->step >= c->max_steps) { /* it is finished: nothing that could differ is made */
        pml_log(PML_LOG_INFO, "what decides bits has changed since the run's end: %s", difference);
        return PML_OK;
    }
    if (pml_message_bool(c->run, "deterministic") && !c->accept_changes)
        return PML_FAIL(err, PML_INVALID,
                        "what decides bits has changed (%s): resume with accept_changes to go on "
                        "with other last bits",
                        difference);
    emit_log(c, "warning", -1,
             "what decides bits has changed (%s): the run goes on, not bitwise as "
             "it would have",
             difference);
    return keep_identity(c, ready, err);
}

void resume_free(coordinator *c)
{
    for (size_t i = 0; i < c->n_tuned; i++)
        pml_message_destroy(&c->tuned[i].args);
    free(c->tuned);
    owed_free(c);
}
