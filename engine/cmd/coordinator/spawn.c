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

/* Why exec failed goes through a pipe that closes itself when it succeeds. */
static _Noreturn void become(const spawn *s, const char *path, int null_fd, int log_fd, int tell)
{
    int high[SPAWN_FDS], n = 0;
    for (; n < SPAWN_FDS && s->fds[n] != SPAWN_END; n++)
        high[n] = fcntl(s->fds[n] == SPAWN_NULL ? null_fd : s->fds[n], F_DUPFD, 32);
    int out = fcntl(s->out >= 0 ? s->out : log_fd, F_DUPFD, 32), log = fcntl(log_fd, F_DUPFD, 32);
    tell = fcntl(tell, F_DUPFD_CLOEXEC, 32);
    bool ok = dup2(null_fd, 0) == 0 && dup2(out, 1) == 1 && dup2(log, 2) == 2;
    for (int i = 0; i < n; i++)
        ok = ok && dup2(high[i], 3 + i) == 3 + i;
    ok = ok && dup2(tell, 3 + n) == 3 + n && fcntl(3 + n, F_SETFD, FD_CLOEXEC) == 0;
    if (syscall(SYS_close_range, 4 + n, ~0U, 0) != 0)
        for (int fd = 4 + n; fd < 65536; fd++)
            close(fd);
    for (int i = 1; i < NSIG; i++)
        signal(i, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (ok && (!s->dies_with_us || prctl(PR_SET_PDEATHSIG, SIGKILL) == 0))
        execv(path, (char *const *)s->argv);
    int reason = errno;
    ssize_t ignored = write(3 + n, &reason, sizeof reason);
    (void)ignored;
    _exit(127);
}

pml_status spawn_process(spawn *s, pid_t *pid, pml_error *err)
{
    char path[4096];
    *pid = -1;
    pml_status status = find_program(s->argv[0], path, sizeof path, err);
    if (status != PML_OK)
        return status;
    int tell[2] = {-1, -1};
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    int log_fd;
    s->unlogged = (pml_error)PML_ERROR_INIT;
    if (pml_open(s->log_path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW, &log_fd, &s->unlogged) !=
        PML_OK)
        log_fd = fcntl(null_fd, F_DUPFD_CLOEXEC, 0);
    if (null_fd < 0 || log_fd < 0 || pipe2(tell, O_CLOEXEC) != 0)
        status = PML_FAIL(err, PML_IO, "cannot start %s: %s", path, strerror(errno));
    if (status == PML_OK && (*pid = fork()) < 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "cannot start %s: %s", path, strerror(errno));
    if (status == PML_OK && *pid == 0)
        become(s, path, null_fd, log_fd, tell[1]);
    if (tell[1] >= 0)
        close(tell[1]);
    int reason = 0;
    if (status == PML_OK && read(tell[0], &reason, sizeof reason) == sizeof reason) {
        waitpid(*pid, NULL, 0);
        *pid = -1;
        status = PML_FAIL(err, PML_IO, "cannot execute %s: %s", path, strerror(reason));
    }
    if (tell[0] >= 0)
        close(tell[0]);
    if (log_fd >= 0)
        close(log_fd);
    if (null_fd >= 0)
        close(null_fd);
    return status;
}
