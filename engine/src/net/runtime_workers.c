/* Which workers of a run are there, whoever started them and whether a coordinator is.
 *
 *   run folder/workers:   16 bytes of text for each rank, its process id …   lock bytes, from 1 MiB
 *
 * It is in the run folder, as the coordinator's lock is and for the same reasons. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/path.h"
#include "pml/net/connection.h"

enum { SIGN_BYTES = 16, LOCKS_AT = 1 << 20, RANKS_MAX = 65536 };

static struct flock bytes_of(int rank, int n, short type)
{
    return (struct flock){
        .l_type = type, .l_whence = SEEK_SET, .l_start = LOCKS_AT + rank, .l_len = n};
}

static pml_status sign(int fd, int rank, int pid, pml_error *err)
{
    char text[SIGN_BYTES + 1];
    snprintf(text, sizeof text, "%15d\n", pid);
    if (pwrite(fd, text, SIGN_BYTES, (off_t)rank * SIGN_BYTES) != SIGN_BYTES)
        return PML_FAIL(err, PML_IO, "cannot sign as worker %d in the run's file workers: %s", rank,
                        strerror(errno));
    return PML_OK;
}

static int signature(int fd, int rank)
{
    char text[SIGN_BYTES + 1] = "";
    return pread(fd, text, SIGN_BYTES, (off_t)rank * SIGN_BYTES) == SIGN_BYTES ? atoi(text) : 0;
}

/* Who was there before has signed: that goes first, or a lock would stand beside a stranger's id.
 */
pml_status pml_runtime_worker_lock(const char *run_folder, int rank, int *fd, pml_error *err)
{
    pml_status status = pml_file_open_regular(run_folder, "workers", O_RDWR | O_CREAT, fd, err);
    if (status != PML_OK)
        return status;
    struct flock lock = bytes_of(rank, 1, F_WRLCK);
    if (fcntl(*fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK)
        status = sign(*fd, rank, 0, err);
    lock = bytes_of(rank, 1, F_WRLCK);
    if (status == PML_OK && fcntl(*fd, F_OFD_SETLK, &lock) != 0 &&
        (errno == EAGAIN || errno == EACCES)) /* a file system without locks goes without */
        status = PML_FAIL(err, PML_BUSY, "there is a worker %d already", rank);
    if (status != PML_OK) {
        close(*fd);
        *fd = -1;
    }
    return status;
}

pml_status pml_runtime_worker_sign(int fd, int rank, pml_error *err)
{
    return sign(fd, rank, (int)getpid(), err);
}

/* Of a file system, or a server that it is on. */
static bool knows_no_locks(int code)
{
    return code == ENOLCK || code == EOPNOTSUPP || code == ENOSYS || code == EINVAL;
}

pml_status pml_runtime_workers(const char *run_folder, pml_error *err)
{
    int fd;
    pml_status status = pml_file_open_regular(run_folder, "workers", O_RDWR, &fd, err);
    if (status != PML_OK)
        return status;
    struct flock lock = bytes_of(0, RANKS_MAX, F_WRLCK);
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
        status = PML_FAIL(err, knows_no_locks(errno) ? PML_PEER : pml_status_of_errno(errno),
                          "cannot ask for %s/workers: %s", run_folder, strerror(errno));
    else if (lock.l_type == F_UNLCK)
        status = PML_FAIL(err, PML_PEER, "the workers of this run have ended");
    close(fd);
    return status;
}

/* Whether a process has the file open, as all workers of a run have. errno is 0, or says why it
 * could not be looked at. */
static bool has_open(int pid, int file)
{
    char path[64];
    struct stat wanted, info;
    bool found = false;
    snprintf(path, sizeof path, "/proc/%d/fd", pid);
    errno = 0;
    DIR *dir = fstat(file, &wanted) == 0 ? opendir(path) : NULL;
    int code = errno;
    for (struct dirent *e = dir == NULL ? NULL : readdir(dir); e != NULL && !found;
         e = readdir(dir))
        found = fstatat(dirfd(dir), e->d_name, &info, 0) == 0 && info.st_dev == wanted.st_dev &&
                info.st_ino == wanted.st_ino;
    if (dir != NULL)
        closedir(dir);
    errno = code;
    return found;
}

/* Whether it runs a program of that name. The name, not the file: a worker outlives the
 * installation of the next version over its own, and /proc says " (deleted)" behind it then. */
static bool runs(int pid, const char *program)
{
    static const char gone[] = " (deleted)";
    char path[64], exe[PATH_MAX];
    snprintf(path, sizeof path, "/proc/%d/exe", pid);
    ssize_t got = readlink(path, exe, sizeof exe - 1);
    size_t n = got > 0 ? (size_t)got : 0, tail = sizeof gone - 1;
    exe[n] = '\0';
    if (n > tail && strcmp(exe + n - tail, gone) == 0)
        exe[n - tail] = '\0';
    return strcmp(pml_path_name(exe), pml_path_name(program)) == 0;
}

/* Not of a process that is gone, or is not ours to look at: that is an answer. */
static bool is_want(int code)
{
    return code == EMFILE || code == ENFILE || code == ENOMEM;
}

/* The lock is still held and the signature the same after the process descriptor was opened: so it
 * is the holder's, and stays it. In a folder from somebody else both may be a stranger's, who names
 * a process of ours: that one does not have the file, or is no worker. We that ask have it, too. */
static pml_status kill_holder(int fd, int rank, const char *program, pml_error *err)
{
    int pid = signature(fd, rank);
    if (pid <= 0 || pid == getpid())
        return PML_OK;
    int process = (int)syscall(SYS_pidfd_open, pid, 0);
    struct flock lock = bytes_of(rank, 1, F_WRLCK);
    bool has = process >= 0 && has_open(pid, fd);
    int code = errno;
    if (has && runs(pid, program) && fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK &&
        signature(fd, rank) == pid)
        syscall(SYS_pidfd_send_signal, process, SIGKILL, NULL, 0);
    if (process >= 0)
        close(process);
    if (!has && is_want(code))
        return PML_FAIL(err, PML_IO, "cannot look at worker %d, process %d: %s", rank, pid,
                        strerror(code));
    return PML_OK;
}

pml_status pml_runtime_workers_kill(const char *run_folder, const char *program, pml_error *err)
{
    int fd;
    struct stat info;
    pml_status status = pml_file_open_regular(run_folder, "workers", O_RDWR, &fd, err);
    if (status != PML_OK)
        return status;
    if (fstat(fd, &info) != 0 || info.st_nlink != 1) { /* who has it open has it as another file */
        close(fd);
        return PML_FAIL(err, PML_DENIED,
                        "%s/workers is a hard link: nobody is killed for what it says; end the "
                        "run's workers by hand, and remove it",
                        run_folder);
    }
    for (int rank = 0; rank < RANKS_MAX;) {
        struct flock lock = bytes_of(rank, RANKS_MAX - rank, F_WRLCK);
        if (fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type == F_UNLCK)
            break;
        rank = (int)lock.l_start - LOCKS_AT;
        pml_error why = PML_ERROR_INIT;
        pml_status killed = kill_holder(fd, rank++, program, &why);
        if (killed != PML_OK && status == PML_OK && err != NULL)
            *err = why;
        status = status == PML_OK ? killed : status;
    }
    close(fd);
    return status;
}

/* 'T' behind the name in /proc/PID/stat: somebody has stopped it. */
static bool is_stopped(int pid)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *stat = pid > 0 ? fopen(path, "r") : NULL;
    if (stat == NULL)
        return false;
    text[fread(text, 1, sizeof text - 1, stat)] = '\0';
    fclose(stat);
    const char *name_end = strrchr(text, ')');
    return name_end != NULL && strncmp(name_end, ") T", 3) == 0;
}

bool pml_runtime_workers_stopped(const char *run_folder)
{
    int fd;
    bool stopped = false;
    if (pml_file_open_regular(run_folder, "workers", O_RDWR, &fd, NULL) != PML_OK)
        return false;
    for (int rank = 0; rank < RANKS_MAX && !stopped; rank++) {
        struct flock lock = bytes_of(rank, RANKS_MAX - rank, F_WRLCK);
        if (fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type == F_UNLCK)
            break;
        rank = (int)lock.l_start - LOCKS_AT;
        stopped = is_stopped(signature(fd, rank));
    }
    close(fd);
    return stopped;
}
