#include "pml/base/hold.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/path.h"

enum { FOLDER = O_RDONLY | O_DIRECTORY | O_CLOEXEC };

struct pml_hold {
    pml_hold *next;
    int fd;
    size_t length;
    char path[];
};

/* Few: a run's process has one, a client one for each that it starts or exports just then. */
static pml_hold *holds;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

pml_status pml_hold_new(const char *folder, pml_hold **hold, pml_error *err)
{
    size_t length = strlen(folder);
    *hold = NULL;
    while (length > 1 && folder[length - 1] == '/') /* paths below it have one there */
        length--;
    pml_hold *h = malloc(sizeof *h + length + 1);
    if (h == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to hold %s", folder);
    memcpy(h->path, folder, length);
    h->path[length] = '\0';
    h->length = length;
    h->fd = open(folder, FOLDER);
    if (h->fd < 0) {
        int code = errno;
        free(h);
        return PML_FAIL(err, code == ENOENT ? PML_NOT_FOUND : PML_IO, "cannot open %s: %s", folder,
                        strerror(code));
    }
    pthread_mutex_lock(&guard);
    h->next = holds;
    holds = h;
    pthread_mutex_unlock(&guard);
    *hold = h;
    return PML_OK;
}

void pml_hold_destroy(pml_hold **hold)
{
    pml_hold *h = *hold;
    if (h == NULL)
        return;
    pthread_mutex_lock(&guard);
    pml_hold **at = &holds;
    while (*at != h)
        at = &(*at)->next;
    *at = h->next;
    pthread_mutex_unlock(&guard);
    close(h->fd);
    free(h);
    *hold = NULL;
}

/* ---- the way ---- */

static pml_status refused(pml_error *err, int code, const char *path, int length)
{
    errno = code;
    if (code == ELOOP)
        return PML_FAIL(err, PML_DENIED,
                        "%.*s is a link, which is not followed here: remove it, or put what it "
                        "leads to in its place",
                        length, path);
    if (code == ESTALE)
        return PML_FAIL(err, PML_IO,
                        "%.*s was removed, and another folder of that name is not this run's",
                        length, path);
    return PML_FAIL(err, code == ENOENT ? PML_NOT_FOUND : PML_IO, "cannot open %.*s: %s", length,
                    path, strerror(code));
}

/* ELOOP for a link: of one that should be a folder the system says only that it is none. */
static int reason(int folder, const char *name, int code)
{
    struct stat info;
    bool link = code == ENOTDIR && fstatat(folder, name, &info, AT_SYMLINK_NOFOLLOW) == 0 &&
                S_ISLNK(info.st_mode);
    return link ? ELOOP : code;
}

/* A descriptor of the folder for the caller, or -errno; ESTALE where it was removed and something
 * else has its name: that may be the next run's, in which we have nothing to look for. */
static int folder_of(const pml_hold *h)
{
    struct stat info;
    if (fstat(h->fd, &info) != 0 || info.st_nlink == 0) {
        int other = open(h->path, FOLDER | O_NOFOLLOW);
        int code = other < 0 ? reason(AT_FDCWD, h->path, errno) : ESTALE;
        if (other >= 0)
            close(other);
        return -code;
    }
    int fd = fcntl(h->fd, F_DUPFD_CLOEXEC, 0);
    return fd < 0 ? -errno : fd;
}

void pml_hold_made(const char *path)
{
    struct stat info;
    pthread_mutex_lock(&guard);
    for (const pml_hold *h = holds; h != NULL; h = h->next) {
        if (strcmp(path, h->path) != 0 || (fstat(h->fd, &info) == 0 && info.st_nlink > 0))
            continue;
        int made = open(path, FOLDER | O_NOFOLLOW);
        if (made < 0)
            continue;
        dup3(made, h->fd, O_CLOEXEC);
        close(made);
    }
    pthread_mutex_unlock(&guard);
}

/* What the system calls a folder by now, "" where it cannot say or that is none of its names. */
static void name_of(int fd, char *path, size_t capacity)
{
    char link[64];
    struct stat held, there;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, capacity - 1);
    path[n > 0 ? n : 0] = '\0';
    if (fstat(fd, &held) != 0 || stat(path, &there) != 0 || held.st_dev != there.st_dev ||
        held.st_ino != there.st_ino)
        path[0] = '\0';
}

pml_status pml_hold_where(const char *folder, char *path, size_t capacity, pml_error *err)
{
    char found[PATH_MAX];
    snprintf(found, sizeof found, "%s", folder);
    pthread_mutex_lock(&guard);
    const pml_hold *h = holds;
    while (h != NULL && strcmp(folder, h->path) != 0)
        h = h->next;
    if (h != NULL)
        name_of(h->fd, found, sizeof found);
    pthread_mutex_unlock(&guard);
    if (found[0] == '\0')
        return PML_FAIL(err, PML_NOT_FOUND, "the folder %s was removed", folder);
    if (snprintf(path, capacity, "%s", found) >= (int)capacity)
        return PML_FAIL(err, PML_INVALID, "no room for the path %s", found);
    return PML_OK;
}

/* Whether a path is a folder that is held, or below one: that one's descriptor, and where the
 * path's first part below it begins. NULL: it is the folder itself, which may have been moved, and
 * another made where it was. */
static bool find_hold(const char *path, const char **rest, int *fd)
{
    bool found = false;
    pthread_mutex_lock(&guard);
    for (const pml_hold *h = holds; h != NULL && !found; h = h->next) {
        found = strncmp(path, h->path, h->length) == 0 &&
                (path[h->length] == '/' || path[h->length] == '\0');
        if (found) {
            *rest = path[h->length] == '/' ? path + h->length + 1 : NULL;
            *fd = folder_of(h);
        }
    }
    pthread_mutex_unlock(&guard);
    return found;
}

pml_status pml_place_find(const char *path, pml_place *place, pml_error *err)
{
    const char *rest;
    int fd;
    *place = (pml_place){.folder = AT_FDCWD, .name = path};
    if (!find_hold(path, &rest, &fd))
        return PML_OK;
    if (rest == NULL) { /* one that was removed may be made anew, but not with a link's help */
        *place = fd < 0 ? (pml_place){.folder = AT_FDCWD, .name = path, .held = true}
                        : (pml_place){.folder = fd, .name = ".", .held = true};
        return PML_OK;
    }
    if (fd < 0)
        return refused(err, -fd, path, (int)(rest - path) - 1);
    pml_status status = PML_OK;
    if (!pml_path_is_below(rest))
        status = PML_FAIL(err, PML_INVALID, "%s does not name something in its folder", path);
    for (size_t n = strcspn(rest, "/"); status == PML_OK && rest[n] != '\0';
         n = strcspn(rest, "/")) {
        char part[NAME_MAX + 1];
        int next = -1, code = ENAMETOOLONG;
        if (n < sizeof part) {
            memcpy(part, rest, n);
            part[n] = '\0';
            next = openat(fd, part, FOLDER | O_NOFOLLOW);
            code = next < 0 ? reason(fd, part, errno) : 0;
        }
        rest += n;
        if (next < 0) {
            status = refused(err, code, path, (int)(rest - path));
            break;
        }
        close(fd);
        fd = next;
        rest++;
    }
    if (status != PML_OK) {
        int code = errno;
        close(fd);
        errno = code;
        return status;
    }
    *place = (pml_place){.folder = fd, .name = rest, .held = true};
    return PML_OK;
}

void pml_place_leave(pml_place *place)
{
    int code = errno;
    if (place->folder >= 0)
        close(place->folder);
    *place = (pml_place){.folder = AT_FDCWD, .name = ""};
    errno = code;
}

/* ---- what is done there ---- */

/* Whether something else stands where a file was looked for: a file in the place of a folder on the
 * way, or a socket. No disk fails then, and to try again mends nothing. */
static bool is_something_else(int code)
{
    return code == ENOTDIR || code == ENXIO;
}

pml_status pml_open(const char *path, int flags, int *fd, pml_error *err)
{
    pml_place place;
    *fd = -1;
    pml_status status = pml_place_find(path, &place, err);
    if (status == PML_IO && is_something_else(errno))
        return err == NULL ? PML_INVALID : (err->code = PML_INVALID);
    if (status != PML_OK)
        return status;
    flags |= O_CLOEXEC | O_NONBLOCK | (place.held ? O_NOFOLLOW : 0);
    *fd = openat(place.folder, place.name, flags, 0600);
    if (*fd < 0) {
        int code = (flags & O_NOFOLLOW) != 0 ? reason(place.folder, place.name, errno) : errno;
        status = refused(err, code, path, (int)strlen(path));
        if (is_something_else(code))
            status = err == NULL ? PML_INVALID : (err->code = PML_INVALID);
    }
    pml_place_leave(&place);
    return status;
}

pml_status pml_rename(const char *from, const char *to, unsigned flags, pml_error *err)
{
    pml_place old, new;
    pml_status status = pml_place_find(from, &old, err);
    if (status != PML_OK)
        return status;
    status = pml_place_find(to, &new, err);
    if (status == PML_OK) {
        if (renameat2(old.folder, old.name, new.folder, new.name, flags) != 0)
            status = PML_FAIL(err, PML_IO, "cannot rename %s to %s: %s", from, to, strerror(errno));
        pml_place_leave(&new);
    }
    pml_place_leave(&old);
    return status;
}

bool pml_is_there(const char *path)
{
    pml_place place;
    struct stat info;
    if (pml_place_find(path, &place, NULL) != PML_OK)
        return false;
    bool there = fstatat(place.folder, place.name, &info, AT_SYMLINK_NOFOLLOW) == 0;
    pml_place_leave(&place);
    return there;
}

pml_status pml_folder_list(const char *path, struct dirent ***list,
                           int (*wanted)(const struct dirent *entry),
                           int (*order)(const struct dirent **a, const struct dirent **b), int *n,
                           pml_error *err)
{
    int fd;
    *list = NULL;
    *n = 0;
    pml_status status = pml_open(path, FOLDER, &fd, err);
    if (status != PML_OK)
        return status;
    int count = scandirat(fd, ".", list, wanted, order);
    if (count < 0)
        status = PML_FAIL(err, errno == ENOMEM ? PML_NO_MEMORY : PML_IO, "cannot list %s: %s", path,
                          strerror(errno));
    else
        *n = count;
    close(fd);
    return status;
}

pml_status pml_folder_clear(const char *path, int (*wanted)(const struct dirent *entry),
                            pml_error *err)
{
    struct dirent **list;
    int n;
    pml_status status = pml_folder_list(path, &list, wanted, alphasort, &n, err);
    for (int i = 0; i < n; i++) {
        if (status == PML_OK)
            status = pml_tree_remove(path, list[i]->d_name, err);
        free(list[i]);
    }
    free(list);
    return status;
}
