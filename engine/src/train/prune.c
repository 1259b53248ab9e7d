/* Which checkpoint is the newest that can be trusted, and which may go. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "snapshot.h"

/* The number of "step-000412", -1 for any other name. */
static long long step_number(const char *name)
{
    static const char prefix[] = "step-";
    char *end;
    if (strncmp(name, prefix, sizeof prefix - 1) != 0)
        return -1;
    const char *digits = name + sizeof prefix - 1;
    if (digits[strspn(digits, "0123456789")] != '\0' || *digits == '\0')
        return -1;
    errno = 0;
    long long number = strtoll(digits, &end, 10);
    return errno == 0 ? number : -1;
}

typedef struct step_folder {
    char name[256];
    int64_t timeline;
    long long step;
    bool unread; /* its timeline could not be read, and not for its own sake */
} step_folder;

static int is_step(const struct dirent *entry)
{
    return step_number(entry->d_name) >= 0;
}

/* Of one step, too: who went back and trained again has a later timeline, though fewer steps. */
static int newest_first(const void *left, const void *right)
{
    const step_folder *a = left, *b = right;
    if (a->timeline != b->timeline)
        return a->timeline < b->timeline ? 1 : -1;
    return a->step < b->step ? 1 : -(a->step > b->step);
}

/* One whose timeline is damaged stands where its number puts it among those of the newest. */
static void place_damaged(step_folder *list, int n)
{
    int64_t newest = 0;
    for (int i = 0; i < n; i++)
        if (list[i].timeline != INT64_MAX && list[i].timeline > newest)
            newest = list[i].timeline;
    for (int i = 0; i < n; i++)
        if (list[i].timeline == INT64_MAX)
            list[i].timeline = newest;
}

/* Of the n those that could be read; returns how many. */
static int leave_out_unread(step_folder *list, int n)
{
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (!list[i].unread)
            list[kept++] = list[i];
    return kept;
}

/* The folders step-* of parent, the newest first; *list is malloc'ed. Those whose timeline cannot
 * be read now are left out, and *unread is the first one's failure. */
static pml_status list_steps(const char *parent, step_folder **list, int *n, pml_error *unread,
                             pml_error *err)
{
    struct dirent **found = NULL;
    char path[PML_PATH_MAX];
    *list = NULL;
    *n = 0;
    int count;
    pml_status status = pml_folder_list(parent, &found, is_step, NULL, &count, err);
    if (status != PML_OK)
        return status;
    step_folder *steps = calloc((size_t)count + 1, sizeof *steps);
    if (steps == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory to list %s", parent);
    for (int i = 0; i < count; i++) {
        if (status == PML_OK)
            status = pml_path_join(path, sizeof path, parent, found[i]->d_name, err);
        if (status == PML_OK) {
            snprintf(steps[i].name, sizeof steps[i].name, "%s", found[i]->d_name);
            steps[i].step = step_number(found[i]->d_name);
            steps[i].unread =
                pml_checkpoint_timeline(path, &steps[i].timeline,
                                        unread->code == PML_OK ? unread : NULL) != PML_OK;
        }
        free(found[i]);
    }
    free(found);
    if (status != PML_OK) {
        free(steps);
        return status;
    }
    count = leave_out_unread(steps, count);
    place_damaged(steps, count);
    qsort(steps, (size_t)count, sizeof *steps, newest_first);
    *list = steps;
    *n = count;
    return PML_OK;
}

static pml_status verify(const char *parent, const step_folder *folder, char *path, size_t capacity,
                         pml_error *err)
{
    pml_status status = pml_path_join(path, capacity, parent, folder->name, err);
    return status == PML_OK ? pml_checkpoint_verify(path, err) : status;
}

/* Index of the newest folder that verifies, n when none does. Whatever keeps it from that: who asks
 * wants one that is whole for sure, to keep it. */
static int newest_good(const char *parent, const step_folder *list, int n, pml_error *err)
{
    char path[PML_PATH_MAX];
    int i = 0;
    while (i < n && verify(parent, &list[i], path, sizeof path, err) != PML_OK)
        i++;
    return i;
}

pml_status pml_checkpoint_latest(const char *parent, char *path, size_t capacity, int *refused,
                                 pml_error *err)
{
    step_folder *list;
    int n, unfit = 0;
    pml_error why = PML_ERROR_INIT, unread = PML_ERROR_INIT;
    pml_status status = list_steps(parent, &list, &n, &unread, err);
    if (status != PML_OK)
        return status;
    pml_status found = PML_NOT_FOUND;
    while (unread.code == PML_OK && unfit < n && pml_checkpoint_is_unfit(found)) {
        found = verify(parent, &list[unfit], path, capacity, &why);
        unfit += pml_checkpoint_is_unfit(found);
    }
    if (refused != NULL)
        *refused = unfit;
    if (unread.code != PML_OK)
        why = unread;
    if (found == PML_OK)
        status = PML_OK;
    else if (why.code != PML_OK && !pml_checkpoint_is_unfit(why.code))
        status =
            PML_FAIL(err, why.code, "which checkpoint is the newest is not known: %s", why.message);
    else
        status = n == 0 ? PML_FAIL(err, PML_NOT_FOUND, "%s holds no checkpoint", parent)
                        : PML_FAIL(err, PML_NOT_FOUND, "none of %d checkpoints in %s is whole: %s",
                                   n, parent, why.message);
    free(list);
    return status;
}

/* ".NAME.tmp-PID" of a process that is not this one: the run's lock says that it is gone. */
static int is_leftover(const struct dirent *entry)
{
    const char *mark = strstr(entry->d_name, ".tmp-");
    return entry->d_name[0] == '.' && mark != NULL &&
           strtol(mark + strlen(".tmp-"), NULL, 10) != (long)getpid();
}

/* Whether that step's folder is among [first, n). */
static bool has_step(const step_folder *list, int first, int n, int64_t step)
{
    for (int i = first; i < n; i++)
        if (list[i].step == step)
            return true;
    return false;
}

pml_status pml_checkpoint_prune(const char *parent, int keep, int64_t best, pml_error *err)
{
    step_folder *list;
    int n;
    pml_error why = PML_ERROR_INIT, unread = PML_ERROR_INIT;
    pml_status status = list_steps(parent, &list, &n, &unread, err);
    if (status != PML_OK)
        return status;
    if (keep > 0 && n > keep) {
        /* Hashed only when there is something to remove; usually the first one is good. */
        int good = newest_good(parent, list, n, &why);
        if (good == n) /* perhaps only the disk does not read now: who removes could be wrong */
            status = PML_FAIL(err, why.code, "nothing is removed, as no checkpoint is whole: %s",
                              why.message);
        int from = keep > 1 && has_step(list, keep - 1, n, best) ? keep - 1 : keep;
        for (int i = from; status == PML_OK && i < n; i++)
            if (i != good && list[i].step != best)
                status = pml_tree_remove(parent, list[i].name, err);
    }
    free(list);
    if (status == PML_OK)
        status = pml_folder_clear(parent, is_leftover, err);
    if (status == PML_OK && keep > 0 && unread.code != PML_OK)
        status = PML_FAIL(err, unread.code, "it is not known whether it may be removed: %s",
                          unread.message);
    return status;
}
