#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"

enum { TREE_DEPTH_MAX = 64, FOLDER_FLAGS = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC };

pml_status pml_folder_sync(const char *path, pml_error *err)
{
    int fd;
    pml_status status = pml_open(path, O_RDONLY | O_DIRECTORY, &fd, err);
    if (status != PML_OK)
        return status;
    /* EINVAL: a file system (some FUSE mounts) that has no fsync of folders; nothing better exists
     * there, and failing would make such a place unusable. */
    if (fsync(fd) != 0 && errno != EINVAL)
        status = PML_FAIL(err, PML_IO, "cannot sync %s: %s", path, strerror(errno));
    close(fd);
    return status;
}

/* A new folder is on disk with its name: what will be synced in it must not hang in the air. */
static pml_status make_one(const char *path, pml_error *err)
{
    struct stat info;
    pml_place place;
    pml_status status = pml_place_find(path, &place, err);
    if (status != PML_OK)
        return status;
    int code = mkdirat(place.folder, place.name, 0700) == 0 ? 0 : errno;
    /* Read-only mounts say EROFS and searched-only parents EACCES even where the folder exists. */
    bool there = code != 0 && fstatat(place.folder, place.name, &info,
                                      place.held ? AT_SYMLINK_NOFOLLOW : 0) == 0;
    bool held_itself = place.held && place.folder == AT_FDCWD;
    pml_place_leave(&place);
    if (code == 0) {
        if (held_itself)
            pml_hold_made(path);
        char parent[PATH_MAX];
        status = pml_path_folder(parent, sizeof parent, path, err);
        return status == PML_OK ? pml_folder_sync(parent, err) : status;
    }
    if (!there)
        return PML_FAIL(err, PML_IO, "cannot make the folder %s: %s", path, strerror(code));
    if (S_ISLNK(info.st_mode))
        return PML_FAIL(err, PML_DENIED, "%s is a link: put the folder itself in its place", path);
    if (!S_ISDIR(info.st_mode))
        return PML_FAIL(err, PML_INVALID, "%s exists and is not a folder", path);
    return PML_OK;
}

pml_status pml_folder_make(const char *path, pml_error *err)
{
    char part[PATH_MAX];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof part)
        return PML_FAIL(err, PML_INVALID, "\"%s\" is no name for a folder", path);
    memcpy(part, path, n + 1);
    for (size_t i = 1; i < n; i++) {
        if (part[i] != '/' || part[i - 1] == '/')
            continue;
        part[i] = '\0';
        pml_status status = make_one(part, err);
        if (status != PML_OK)
            return status;
        part[i] = '/';
    }
    return make_one(part, err);
}

static pml_status remove_at(int parent, const char *name, const char *shown, int depth,
                            pml_error *err);

/* Takes folder_fd over. */
static pml_status remove_content(int folder_fd, const char *shown, int depth, pml_error *err)
{
    DIR *folder = fdopendir(folder_fd);
    if (folder == NULL) {
        pml_status status =
            PML_FAIL(err, PML_IO, "cannot list a folder below %s: %s", shown, strerror(errno));
        close(folder_fd);
        return status;
    }
    pml_status status = PML_OK;
    while (status == PML_OK) {
        errno = 0;
        struct dirent *entry = readdir(folder);
        if (entry == NULL) {
            if (errno != 0)
                status = PML_FAIL(err, PML_IO, "cannot list a folder below %s: %s", shown,
                                  strerror(errno));
            break;
        }
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            status = remove_at(dirfd(folder), entry->d_name, shown, depth + 1, err);
    }
    closedir(folder);
    return status;
}

/* Each step is relative to a descriptor that is already inside root, and no step follows a link:
 * a folder swapped for a link while we work is unlinked or refused, never entered. */
static pml_status remove_at(int parent, const char *name, const char *shown, int depth,
                            pml_error *err)
{
    if (depth > TREE_DEPTH_MAX)
        return PML_FAIL(err, PML_INVALID, "%s has more than %d levels of folders", shown,
                        TREE_DEPTH_MAX);
    if (unlinkat(parent, name, 0) == 0 || errno == ENOENT)
        return PML_OK;
    if (errno != EISDIR && errno != EPERM) /* POSIX says EPERM for a folder, Linux EISDIR */
        return PML_FAIL(err, PML_IO, "cannot remove %s below %s: %s", name, shown, strerror(errno));
    int fd = openat(parent, name, FOLDER_FLAGS);
    if (fd < 0)
        return PML_FAIL(err, PML_IO, "cannot remove %s below %s: %s", name, shown, strerror(errno));
    pml_status status = remove_content(fd, shown, depth, err);
    if (status != PML_OK)
        return status;
    if (unlinkat(parent, name, AT_REMOVEDIR) != 0 && errno != ENOENT)
        return PML_FAIL(err, PML_IO, "cannot remove %s below %s: %s", name, shown, strerror(errno));
    return PML_OK;
}

pml_status pml_tree_remove(const char *root, const char *name, pml_error *err)
{
    if (!pml_path_is_below(name))
        return PML_FAIL(err, PML_INVALID, "\"%s\" is not a name below %s", name, root);
    int fd;
    pml_status status = pml_open(root, O_RDONLY | O_DIRECTORY, &fd, err);
    if (status != PML_OK)
        return status;
    char part[NAME_MAX + 1];
    const char *rest = name;
    for (size_t n = strcspn(rest, "/"); rest[n] != '\0'; n = strcspn(rest, "/")) {
        int next = -1;
        if (n < sizeof part) {
            memcpy(part, rest, n);
            part[n] = '\0';
            next = openat(fd, part, FOLDER_FLAGS);
        } else {
            errno = ENAMETOOLONG;
        }
        int code = errno;
        close(fd);
        if (next < 0)
            return code == ENOENT ? PML_OK
                                  : PML_FAIL(err, PML_IO, "cannot enter %s below %s: %s", name,
                                             root, strerror(code));
        fd = next;
        rest += n + 1;
    }
    status = remove_at(fd, rest, root, 0, err);
    close(fd);
    return status;
}

size_t pml_folder_bytes(const char *path)
{
    size_t total = 0;
    int fd;
    pml_open(path, O_RDONLY | O_DIRECTORY, &fd, NULL);
    DIR *folder = fd < 0 ? NULL : fdopendir(fd);
    struct stat info;
    if (folder == NULL && fd >= 0)
        close(fd);
    for (struct dirent *e = folder == NULL ? NULL : readdir(folder); e != NULL; e = readdir(folder))
        if (fstatat(dirfd(folder), e->d_name, &info, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISREG(info.st_mode))
            total += (size_t)info.st_size;
    if (folder != NULL)
        closedir(folder);
    return total;
}
