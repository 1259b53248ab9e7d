/* The runtime folder: where sockets, keys and the lock of a run live. Never in the run folder,
 * which may be on a network disk that has neither sockets nor locks. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/hash.h"
#include "pml/net/connection.h"

/* The longest name that a socket has in the folder. */
#define SOCKET_SUFFIX "/0123456789abcdef/ctl"

/* A folder, ours, closed to others; not a link to one. */
static pml_status check_private(const char *path, pml_error *err)
{
    struct stat st;
    if (lstat(path, &st) != 0)
        return PML_FAIL(err, errno == ENOENT ? PML_NOT_FOUND : PML_IO, "%s: %s", path,
                        strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return PML_FAIL(err, PML_DENIED, "%s is not a folder; remove it", path);
    if (st.st_uid != geteuid())
        return PML_FAIL(err, PML_DENIED, "%s belongs to user %u, not to you; set XDG_RUNTIME_DIR",
                        path, (unsigned)st.st_uid);
    if ((st.st_mode & 0077) != 0)
        return PML_FAIL(err, PML_DENIED, "%s is open to others (mode %03o): chmod 700 it", path,
                        (unsigned)(st.st_mode & 0777));
    return PML_OK;
}

/* The folder above: $XDG_RUNTIME_DIR/pml where that is usable, else /tmp/pml-<uid>. */
static void parent_path(char *path, size_t capacity)
{
    const char *xdg = getenv("XDG_RUNTIME_DIR");
    if (xdg != NULL && xdg[0] == '/' && check_private(xdg, NULL) == PML_OK) {
        int n = snprintf(path, capacity, "%s/pml", xdg);
        if (n > 0 && (size_t)n + strlen(SOCKET_SUFFIX) <= PML_SOCKET_PATH_MAX)
            return;
    }
    snprintf(path, capacity, "/tmp/pml-%u", (unsigned)geteuid());
}

static pml_status hex_name(const char *run_folder, char hex[17], pml_error *err)
{
    char *real = realpath(run_folder, NULL);
    if (real == NULL)
        return PML_FAIL(err, errno == ENOENT ? PML_NOT_FOUND : PML_IO, "run folder %s: %s",
                        run_folder, strerror(errno));
    uint8_t hash[PML_HASH_BYTES];
    pml_status status = pml_hash_memory(real, strlen(real), hash, err);
    free(real);
    if (status == PML_OK)
        pml_hash_hex(hash, 8, hex);
    return status;
}

pml_status pml_runtime_path(const char *run_folder, char *path, size_t capacity, pml_error *err)
{
    char hex[17], parent[PML_SOCKET_PATH_MAX + 1];
    pml_status status = hex_name(run_folder, hex, err);
    if (status != PML_OK)
        return status;
    parent_path(parent, sizeof parent);
    int n = snprintf(path, capacity, "%s/%s", parent, hex);
    if (n < 0 || (size_t)n >= capacity)
        return PML_FAIL(err, PML_INVALID, "no room for the runtime folder's path");
    return PML_OK;
}

static pml_status make_private(const char *path, pml_error *err)
{
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return PML_FAIL(err, PML_IO, "cannot make %s: %s", path, strerror(errno));
    return check_private(path, err);
}

pml_status pml_runtime_create(const char *run_folder, char *path, size_t capacity, pml_error *err)
{
    pml_status status = pml_runtime_path(run_folder, path, capacity, err);
    if (status != PML_OK)
        return status;
    char *slash = strrchr(path, '/');
    *slash = '\0';
    status = make_private(path, err);
    *slash = '/';
    return status == PML_OK ? make_private(path, err) : status;
}

/* An open-file-description lock: like flock it goes with the descriptor, whatever ends the process;
 * unlike flock others can ask for it without taking it. */
static struct flock whole_file(short type)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET};
}

static pml_status open_lock(const char *folder, int flags, int *fd, pml_error *err)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/lock", folder) >= (int)sizeof path)
        return PML_FAIL(err, PML_INVALID, "no room for the lock's path");
    *fd = open(path, flags | O_RDWR | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (*fd < 0)
        return PML_FAIL(err, errno == ENOENT ? PML_NOT_FOUND : PML_IO, "%s: %s", path,
                        strerror(errno));
    return PML_OK;
}

pml_status pml_runtime_lock(const char *folder, int *fd, pml_error *err)
{
    pml_status status = open_lock(folder, O_CREAT, fd, err);
    if (status != PML_OK)
        return status;
    struct flock lock = whole_file(F_WRLCK);
    if (fcntl(*fd, F_OFD_SETLK, &lock) == 0)
        return PML_OK;
    int reason = errno;
    close(*fd);
    *fd = -1;
    if (reason == EAGAIN || reason == EACCES)
        return PML_FAIL(err, PML_BUSY, "this run has a coordinator already: attach to it");
    return PML_FAIL(err, PML_IO, "cannot lock %s/lock: %s", folder, strerror(reason));
}

pml_status pml_runtime_locked(const char *folder, pml_error *err)
{
    int fd;
    pml_status status = open_lock(folder, 0, &fd, err);
    if (status != PML_OK)
        return status;
    struct flock lock = whole_file(F_WRLCK);
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
        status = PML_FAIL(err, PML_IO, "cannot ask for %s/lock: %s", folder, strerror(errno));
    else if (lock.l_type == F_UNLCK)
        status = PML_FAIL(err, PML_PEER, "the coordinator of this run has ended");
    close(fd);
    return status;
}
