#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/hold.h"

static const char few_files[] = "; raise the limit of open files (ulimit -n)";

/* Above the descriptors 0, 1, 2, those that are given, and the pipe behind them. */
enum { FIRST_ABOVE = 3 + SPAWN_FDS + 1 };

/* Between fork and exec of a process with threads only async-signal-safe functions may be called,
 * so the program's path is looked up before. */
static pml_status find_program(const char *name, char *path, size_t capacity, pml_error *err)
{
    if (strchr(name, '/') != NULL) {
        snprintf(path, capacity, "%s", name);
        if (access(path, X_OK) == 0)
            return PML_OK;
        return PML_FAIL(err, PML_NOT_FOUND, "cannot execute %s: %s", name, strerror(errno));
    }
    const char *dirs = getenv("PATH");
    while (dirs != NULL && *dirs != '\0') {
        size_t n = strcspn(dirs, ":");
        if (n > 0 && dirs[0] == '/' &&
            snprintf(path, capacity, "%.*s/%s", (int)n, dirs, name) < (int)capacity &&
            access(path, X_OK) == 0)
            return PML_OK;
        dirs += n + (dirs[n] == ':');
    }
    return PML_FAIL(err, PML_NOT_FOUND, "there is no program %s in PATH", name);
}

/* What an end without exec has as its reason goes through a pipe, which closes itself at exec. */
static _Noreturn void give_up(int tell, int reason)
{
    ssize_t ignored = write(tell, &reason, sizeof reason);
    (void)ignored;
    _exit(127);
}

/* Descriptors that the child is to have are first put above all that it will have. While there is
 * none free for that (a low limit of open files), the pipe is where it was, and what is at the
 * numbers of the child's own is still the coordinator's: nothing may be written there. */
static int put_above(int fd, int flags, int tell)
{
    int above = fcntl(fd, flags, FIRST_ABOVE);
    if (above < 0)
        give_up(tell, errno == EINVAL ? EMFILE : errno); /* EINVAL: the limit is below */
    return above;
}

static _Noreturn void become(const spawn *s, const char *path, int null_fd, int log_fd, int pipe_fd,
                             pid_t parent)
{
    int high[SPAWN_FDS], n = 0;
    for (; n < SPAWN_FDS && s->fds[n] != SPAWN_END; n++)
        high[n] = put_above(s->fds[n] == SPAWN_NULL ? null_fd : s->fds[n], F_DUPFD, pipe_fd);
    int out = put_above(s->out >= 0 ? s->out : log_fd, F_DUPFD, pipe_fd);
    int log = put_above(log_fd, F_DUPFD, pipe_fd);
    int tell = put_above(pipe_fd, F_DUPFD_CLOEXEC, pipe_fd);
    bool ok = dup2(null_fd, 0) == 0 && dup2(out, 1) == 1 && dup2(log, 2) == 2;
    for (int i = 0; ok && i < n; i++)
        ok = dup2(high[i], 3 + i) == 3 + i;
    if (!ok || dup3(tell, 3 + n, O_CLOEXEC) != 3 + n)
        give_up(tell, errno);
    tell = 3 + n;
    if (syscall(SYS_close_range, tell + 1, ~0U, 0) != 0)
        for (int fd = tell + 1; fd < 65536; fd++)
            close(fd);
    for (int i = 1; i < NSIG; i++)
        signal(i, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (s->dies_with_us && prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
        give_up(tell, errno);
    if (s->dies_with_us && getppid() != parent) /* it died before we asked for its death */
        _exit(127);
    execv(path, (char *const *)s->argv);
    give_up(tell, errno);
}

pml_status spawn_process(spawn *s, pid_t *pid, pml_error *err)
{
    char path[4096];
    *pid = -1;
    pml_status status = find_program(s->argv[0], path, sizeof path, err);
    if (status != PML_OK)
        return status;
    int tell[2] = {-1, -1};
    const pid_t us = getpid();
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC), log_fd = -1;
    s->unlogged = (pml_error)PML_ERROR_INIT;
    if (null_fd >= 0 && pml_open(s->log_path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW, &log_fd,
                                 &s->unlogged) != PML_OK)
        log_fd = fcntl(null_fd, F_DUPFD_CLOEXEC, 0);
    if (null_fd < 0 || log_fd < 0 || pipe2(tell, O_CLOEXEC) != 0)
        status = PML_FAIL(err, PML_IO, "cannot start %s: %s%s", path, strerror(errno),
                          errno == EMFILE ? few_files : "");
    if (status == PML_OK && (*pid = fork()) < 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "cannot start %s: %s", path, strerror(errno));
    if (status == PML_OK && *pid == 0)
        become(s, path, null_fd, log_fd, tell[1], us);
    if (tell[1] >= 0)
        close(tell[1]);
    int reason = 0;
    if (status == PML_OK && read(tell[0], &reason, sizeof reason) == sizeof reason) {
        waitpid(*pid, NULL, 0);
        *pid = -1;
        status = PML_FAIL(err, PML_IO, "cannot execute %s: %s%s", path, strerror(reason),
                          reason == EMFILE ? few_files : "");
    }
    if (tell[0] >= 0)
        close(tell[0]);
    if (log_fd >= 0)
        close(log_fd);
    if (null_fd >= 0)
        close(null_fd);
    return status;
}
