/* Which checkpoint is the newest that can be trusted, and which may go. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/file.h"
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

static int is_step(const struct dirent *entry)
{
    return step_number(entry->d_name) >= 0;
}

static int newest_first(const struct dirent **left, const struct dirent **right)
{
    long long a = step_number((*left)->d_name), b = step_number((*right)->d_name);
    return a < b ? 1 : -(a > b);
}

static pml_status list_steps(const char *parent, struct dirent ***list, int *n, pml_error *err)
{
    *n = scandir(parent, list, is_step, newest_first);
    if (*n >= 0)
        return PML_OK;
    *n = 0;
    *list = NULL;
    return PML_FAIL(err, errno == ENOENT ? PML_NOT_FOUND : PML_IO, "%s: %s", parent,
                    strerror(errno));
}

static void free_list(struct dirent **list, int n)
{
    for (int i = 0; i < n; i++)
        free(list[i]);
    free(list);
}

/* Index of the newest folder that verifies, n when none does; path is its path. */
static int newest_good(const char *parent, struct dirent **list, int n, char *path, size_t capacity,
                       pml_error *err)
{
    int i = 0;
    while (i < n && (pml_path_join(path, capacity, parent, list[i]->d_name, err) != PML_OK ||
                     pml_checkpoint_verify(path, err) != PML_OK))
        i++;
    return i;
}

pml_status pml_checkpoint_latest(const char *parent, char *path, size_t capacity, int *refused,
                                 pml_error *err)
{
    struct dirent **list;
    int n;
    pml_error why = PML_ERROR_INIT;
    pml_status status = list_steps(parent, &list, &n, err);
    if (status != PML_OK)
        return status;
    int good = newest_good(parent, list, n, path, capacity, &why);
    if (refused != NULL)
        *refused = good;
    if (good == n)
        status = n == 0 ? PML_FAIL(err, PML_NOT_FOUND, "%s holds no checkpoint", parent)
                        : PML_FAIL(err, PML_NOT_FOUND, "none of %d checkpoints in %s is whole: %s",
                                   n, parent, why.message);
    free_list(list, n);
    return status;
}

/* ".NAME.tmp-PID" of a process that is not this one: the run's lock says that it is gone. */
static int is_leftover(const struct dirent *entry)
{
    const char *mark = strstr(entry->d_name, ".tmp-");
    return entry->d_name[0] == '.' && mark != NULL &&
           strtol(mark + strlen(".tmp-"), NULL, 10) != (long)getpid();
}

static pml_status remove_leftovers(const char *parent, pml_error *err)
{
    struct dirent **list = NULL;
    pml_status status = PML_OK;
    int n = scandir(parent, &list, is_leftover, alphasort);
    if (n < 0)
        return PML_FAIL(err, PML_IO, "%s: %s", parent, strerror(errno));
    for (int i = 0; status == PML_OK && i < n; i++)
        status = pml_tree_remove(parent, list[i]->d_name, err);
    free_list(list, n);
    return status;
}

/* Whether that step's folder is among [first, n). */
static bool has_step(struct dirent **list, int first, int n, int64_t step)
{
    for (int i = first; i < n; i++)
        if (step_number(list[i]->d_name) == step)
            return true;
    return false;
}

pml_status pml_checkpoint_prune(const char *parent, int keep, int64_t best, pml_error *err)
{
    struct dirent **list;
    int n;
    char path[PML_PATH_MAX];
    pml_status status = list_steps(parent, &list, &n, err);
    if (status != PML_OK)
        return status;
    if (keep > 0 && n > keep) {
        /* Hashed only when there is something to remove; usually the first one is good. */
        int good = newest_good(parent, list, n, path, sizeof path, NULL);
        int from = keep > 1 && has_step(list, keep - 1, n, best) ? keep - 1 : keep;
        for (int i = from; status == PML_OK && i < n; i++)
            if (i != good && step_number(list[i]->d_name) != best)
                status = pml_tree_remove(parent, list[i]->d_name, err);
    }
    free_list(list, n);
    return status == PML_OK ? remove_leftovers(parent, err) : status;
}
