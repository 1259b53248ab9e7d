/* The runtime folder, where sockets and keys of a run live, and the lock in the run folder that
 * names it. The sockets are not in the run folder, which may be on a network disk or have too long
 * a path; the lock is, because who asks from another environment (cron, sudo, a kernel without
 * XDG_RUNTIME_DIR) must come to the same one. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "pml/net/connection.h"
#include "runtime.h"

/* The longest name that a socket has in the folder. */
#define SOCKET_SUFFIX "/0123456789abcdef/ctl"

enum { HEX_DIGITS = 16, LOCK_TEXT_MAX = 1024, HOST_MAX = 65 };

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

/* The path that tells a run folder from all others, wherever it has been moved. */
static pml_status real_path(const char *run_folder, char *path, struct stat *info, pml_error *err)
{
    char now[PATH_MAX];
    pml_status status = pml_hold_where(run_folder, now, sizeof now, err);
    if (status == PML_OK && (realpath(now, path) == NULL || stat(path, info) != 0))
        status = PML_FAIL(err, pml_status_of_errno(errno), "run folder %s: %s", run_folder,
                          strerror(errno));
    return status;
}

static pml_status hex_of(const char *text, char hex[HEX_DIGITS + 1], pml_error *err)
{
    uint8_t hash[PML_HASH_BYTES];
    pml_status status = pml_hash_memory(text, strlen(text), hash, err);
    if (status == PML_OK)
        pml_hash_hex(hash, HEX_DIGITS / 2, hex);
    return status;
}

/* Of the folder itself and not only of its path: one that is moved or removed while its run goes on
 * leaves its path to the next run, and each of the two has its own sockets. */
static pml_status hex_name(const char *run_folder, char hex[HEX_DIGITS + 1], pml_error *err)
{
    char path[PATH_MAX], text[PATH_MAX + 64];
    struct stat info;
    pml_status status = real_path(run_folder, path, &info, err);
    if (status != PML_OK)
        return status;
    snprintf(text, sizeof text, "%s %llx %llx", path, (unsigned long long)info.st_dev,
             (unsigned long long)info.st_ino);
    return hex_of(text, hex, err);
}

pml_status pml_runtime_path(const char *run_folder, char *path, size_t capacity, pml_error *err)
{
    char hex[HEX_DIGITS + 1], parent[PML_SOCKET_PATH_MAX + 1];
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

static pml_status make_with_parent(char *path, pml_error *err)
{
    char *slash = strrchr(path, '/');
    *slash = '\0';
    pml_status status = make_private(path, err);
    *slash = '/';
    return status == PML_OK ? make_private(path, err) : status;
}

/* Not below XDG_RUNTIME_DIR: runs of one user must come to one folder, whatever their environment,
 * and it has to stay when the last session ends. */
pml_status pml_runtime_devices(char *path, size_t capacity, pml_error *err)
{
    int n = snprintf(path, capacity, "/tmp/pml-%u/devices", (unsigned)geteuid());
    if (n < 0 || (size_t)n >= capacity)
        return PML_FAIL(err, PML_INTERNAL, "no room for the path of device files");
    return make_with_parent(path, err);
}

/* ---- the lock ---- */

/* Two bytes of the file, which need not be there: the run has a coordinator, and what the file says
 * is that one's. Between the two it is what the one before has said, whose sockets and keys are
 * still to be removed: who went there would be turned away for good. */
enum { TAKEN_AT = 0, SAID_AT = 1 };

/* An open-file-description lock: like flock it goes with the descriptor, whatever ends the process;
 * unlike flock others can ask for it without taking it, and NFS carries it to other machines. */
static struct flock one_byte(off_t at)
{
    return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
}

/* What a file system without locks answers. */
static bool has_no_locks(int reason)
{
    return reason == ENOLCK || reason == ENOSYS || reason == EOPNOTSUPP || reason == EINVAL;
}

/* Where the lock is when the run folder's file system has none: the same for every process of this
 * user on this machine, whatever its environment. */
static pml_status spare_folder(const char *run_folder, char *path, size_t capacity, pml_error *err)
{
    char hex[HEX_DIGITS + 1], real[PATH_MAX];
    struct stat info;
    pml_status status = real_path(run_folder, real, &info, err);
    if (status == PML_OK)
        status = hex_of(real, hex, err);
    if (status == PML_OK &&
        snprintf(path, capacity, "/tmp/pml-%u/%s", (unsigned)geteuid(), hex) >= (int)capacity)
        status = PML_FAIL(err, PML_INTERNAL, "no room for the lock's path");
    return status;
}

/* PML_UNSUPPORTED: this file system has no locks. */
static pml_status take_lock(const char *folder, int *fd, pml_error *err)
{
    pml_status status = pml_file_open_regular(folder, "lock", O_RDWR | O_CREAT, fd, err);
    if (status != PML_OK)
        return status;
    struct flock lock = one_byte(TAKEN_AT);
    if (fcntl(*fd, F_OFD_SETLK, &lock) == 0)
        return PML_OK;
    int reason = errno;
    close(*fd);
    *fd = -1;
    if (reason == EAGAIN || reason == EACCES)
        return PML_FAIL(err, PML_BUSY, "this run has a coordinator already: attach to it");
    return PML_FAIL(err, has_no_locks(reason) ? PML_UNSUPPORTED : PML_IO, "cannot lock %s/lock: %s",
                    folder, strerror(reason));
}

/* PML_OK: somebody holds it. Else PML_PEER, PML_NOT_FOUND (there is none), PML_UNSUPPORTED. */
static pml_status ask_lock(const char *folder, int *fd, pml_error *err)
{
    pml_status status = pml_file_open_regular(folder, "lock", O_RDONLY, fd, err);
    if (status != PML_OK)
        return status;
    struct flock lock = one_byte(TAKEN_AT);
    if (fcntl(*fd, F_OFD_GETLK, &lock) != 0)
        status = PML_FAIL(err, has_no_locks(errno) ? PML_UNSUPPORTED : PML_IO,
                          "cannot ask for %s/lock: %s", folder, strerror(errno));
    else if (lock.l_type == F_UNLCK)
        status = PML_FAIL(err, PML_PEER, "the coordinator of this run has ended");
    if (status != PML_OK)
        close(*fd);
    return status;
}

/* ---- what it says: "FOLDER\nPID HOST\n" ---- */

static bool is_said(int fd)
{
    struct flock lock = one_byte(SAID_AT);
    return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

/* The runtime folder of a lock file's text, "" when it names none. */
static void read_place(int fd, char *path, size_t capacity, char *who, size_t room)
{
    char text[LOCK_TEXT_MAX];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = '\0';
    path[0] = who[0] = '\0';
    char *line = strchr(text, '\n'), *end = line == NULL ? NULL : strchr(line + 1, '\n');
    if (end == NULL || text[0] != '/' || (size_t)(line - text) >= capacity)
        return;
    *line = *end = '\0';
    snprintf(path, capacity, "%s", text);
    snprintf(who, room, "%s", line + 1);
}

static pml_status write_place(int fd, const char *path, pml_error *err)
{
    char text[LOCK_TEXT_MAX], host[HOST_MAX] = "";
    gethostname(host, sizeof host - 1);
    int n = snprintf(text, sizeof text, "%s\n%ld %s\n", path, (long)getpid(), host);
    if (n < 0 || n >= (int)sizeof text || ftruncate(fd, 0) != 0 ||
        pwrite(fd, text, (size_t)n, 0) != n)
        return PML_FAIL(err, PML_IO, "cannot say in the run's lock where its sockets are: %s",
                        strerror(errno));
    struct flock lock = one_byte(SAID_AT);
    if (fcntl(fd, F_OFD_SETLK, &lock) != 0)
        return PML_FAIL(err, PML_IO, "cannot lock what the run's lock says: %s", strerror(errno));
    return PML_OK;
}

/* A folder of this run that an earlier coordinator left behind; one of another run (a run folder
 * may be a copy, lock and all) stays. */
static void remove_left_over(int fd, const char *hex)
{
    char path[PATH_MAX], who[LOCK_TEXT_MAX], parent[PATH_MAX];
    read_place(fd, path, sizeof path, who, sizeof who);
    if (path[0] != '\0' && strcmp(pml_path_name(path), hex) == 0 &&
        check_private(path, NULL) == PML_OK &&
        pml_path_folder(parent, sizeof parent, path, NULL) == PML_OK)
        pml_tree_remove(parent, hex, NULL);
}

/* ---- taking ---- */

/* In the run folder, or where that has no locks in the spare one. */
static pml_status take_either_lock(const char *run_folder, int *fd, pml_error *err)
{
    char spare[PATH_MAX];
    pml_status status = take_lock(run_folder, fd, err);
    if (status != PML_UNSUPPORTED)
        return status;
    status = spare_folder(run_folder, spare, sizeof spare, err);
    if (status == PML_OK)
        status = make_with_parent(spare, err);
    return status == PML_OK ? take_lock(spare, fd, err) : status;
}

/* A coordinator holds its log, too (eventlog.c): somebody may take away the file `lock`, or put a
 * copy in its place, which nobody has locked. */
static pml_status ask_log(const char *run_folder, pml_error *err)
{
    int fd;
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET}; /* any byte of it */
    pml_status status = pml_file_open_regular(run_folder, "events.jsonl", O_RDONLY, &fd, err);
    if (status != PML_OK)
        return status == PML_NOT_FOUND ? PML_OK : status;
    if (fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK)
        status = PML_FAIL(err, PML_BUSY,
                          "this run has a coordinator already, whose file %s/lock was taken away; "
                          "it puts that back within seconds: attach to it then",
                          run_folder);
    close(fd);
    return status;
}

pml_status pml_runtime_take(const char *run_folder, char *path, size_t capacity, int *lock,
                            pml_error *err)
{
    *lock = -1;
    pml_status status = pml_runtime_path(run_folder, path, capacity, err);
    if (status == PML_OK)
        status = take_either_lock(run_folder, lock, err);
    if (status == PML_OK)
        status = ask_log(run_folder, err);
    if (status == PML_OK) {
        remove_left_over(*lock, pml_path_name(path));
        status = make_with_parent(path, err);
    }
    if (status == PML_OK)
        status = write_place(*lock, path, err);
    if (status != PML_OK && *lock >= 0) {
        close(*lock);
        *lock = -1;
    }
    return status;
}

/* ---- keeping it ---- */

static bool is_lock_of(const char *folder, int lock)
{
    int fd;
    struct stat ours, there;
    if (pml_file_open_regular(folder, "lock", O_RDONLY, &fd, NULL) != PML_OK)
        return false;
    bool same = fstat(lock, &ours) == 0 && fstat(fd, &there) == 0 && ours.st_dev == there.st_dev &&
                ours.st_ino == there.st_ino;
    close(fd);
    return same;
}

static pml_status keep_lock(const char *run_folder, const char *path, int *lock, pml_error *err)
{
    char spare[PATH_MAX];
    int fd;
    if (is_lock_of(run_folder, *lock) ||
        (spare_folder(run_folder, spare, sizeof spare, NULL) == PML_OK && is_lock_of(spare, *lock)))
        return PML_OK;
    pml_status status = take_either_lock(run_folder, &fd, err);
    if (status != PML_OK)
        return status;
    status = write_place(fd, path, err);
    if (status == PML_OK) {
        close(*lock);
        *lock = fd;
    } else {
        close(fd);
    }
    return status;
}

pml_status pml_runtime_keep(const char *run_folder, char *path, size_t capacity, int *lock,
                            pml_error *err)
{
    pml_status status = keep_lock(run_folder, path, lock, err);
    if (status == PML_OK)
        status = check_private(path, err);
    if (status != PML_NOT_FOUND)
        return status;
    status = pml_runtime_path(run_folder, path, capacity, err);
    if (status == PML_OK)
        status = make_with_parent(path, err);
    return status == PML_OK ? write_place(*lock, path, err) : status;
}

/* ---- finding, leaving ---- */

pml_status pml_runtime_find(const char *run_folder, char *path, size_t capacity, pml_error *err)
{
    int pid;
    return pmli_runtime_holder(run_folder, path, capacity, &pid, err);
}

pml_status pmli_runtime_holder(const char *run_folder, char *path, size_t capacity, int *pid,
                               pml_error *err)
{
    int fd;
    char spare[PATH_MAX], who[LOCK_TEXT_MAX];
    pml_status status = ask_lock(run_folder, &fd, err);
    if (status == PML_UNSUPPORTED) {
        status = spare_folder(run_folder, spare, sizeof spare, err);
        if (status == PML_OK)
            status = ask_lock(spare, &fd, err);
    }
    if (status == PML_NOT_FOUND)
        return PML_FAIL(err, PML_NOT_FOUND, "no coordinator has been there for %s", run_folder);
    if (status != PML_OK)
        return status;
    path[0] = '\0';
    if (is_said(fd))
        read_place(fd, path, capacity, who, sizeof who);
    close(fd);
    if (path[0] == '\0')
        return PML_FAIL(err, PML_BUSY, "the coordinator of this run is just starting; ask again");
    *pid = atoi(who);
    status = check_private(path, err);
    if (status == PML_NOT_FOUND)
        status = PML_FAIL(err, PML_BUSY,
                          "the coordinator of this run (process and host: %s) cannot be reached "
                          "from here: there is no %s",
                          who, path);
    return status;
}

void pml_runtime_leave(const char *path, int *lock)
{
    char parent[PATH_MAX];
    if (*lock < 0)
        return;
    if (strlen(pml_path_name(path)) == HEX_DIGITS &&
        pml_path_folder(parent, sizeof parent, path, NULL) == PML_OK)
        pml_tree_remove(parent, pml_path_name(path), NULL);
    close(*lock);
    *lock = -1;
}
