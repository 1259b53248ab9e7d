#include "pml/net/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "pml/net/connection.h"

enum { TIMEOUT_MS = 20000, READY_FD = 3, ARGV_MAX = 40, WORDS_MAX = 1200, SLICE_MS = 100 };

/* Everything that the child needs, made before fork(): between fork and exec of a process with
 * threads only async-signal-safe functions may be called. */
typedef struct job {
    const char *argv[ARGV_MAX + 1];
    int null_fd, log_fd, ready_fd;
} job;

static const char *const systemd_run_paths[] = {"/usr/bin/systemd-run", "/bin/systemd-run", NULL};

/* Without lingering the user's service manager ends with the last session, and takes its scopes
 * with it: a run in one would be less safe than one that is only detached. */
static bool lingers(void)
{
    struct passwd entry, *user = NULL;
    char text[4096], path[PATH_MAX];
    return getpwuid_r(geteuid(), &entry, text, sizeof text, &user) == 0 && user != NULL &&
           snprintf(path, sizeof path, "/var/lib/systemd/linger/%s", user->pw_name) <
               (int)sizeof path &&
           access(path, F_OK) == 0;
}

/* The program that makes a scope, where this user has a service manager that stays. PML_SCOPE=0:
 * never a scope; 1: whether it stays or not. */
static const char *find_systemd_run(void)
{
    const char *wish = getenv("PML_SCOPE"), *runtime = getenv("XDG_RUNTIME_DIR");
    char manager[PATH_MAX];
    bool wanted = wish != NULL && wish[0] != '\0' ? strcmp(wish, "0") != 0 : lingers();
    if (!wanted || runtime == NULL ||
        snprintf(manager, sizeof manager, "%s/systemd/private", runtime) >= (int)sizeof manager ||
        access(manager, F_OK) != 0)
        return NULL;
    for (int i = 0; systemd_run_paths[i] != NULL; i++)
        if (access(systemd_run_paths[i], X_OK) == 0)
            return systemd_run_paths[i];
    return NULL;
}

static void make_argv(job *j, const pml_launch *launch, const char *folder, const char *systemd_run)
{
    int n = 0;
    if (systemd_run != NULL) {
        static const char *const scope[] = {"--user", "--scope", "--quiet", "--collect", "--"};
        j->argv[n++] = systemd_run;
        for (size_t i = 0; i < sizeof scope / sizeof scope[0]; i++)
            j->argv[n++] = scope[i];
    }
    j->argv[n++] = launch->program;
    j->argv[n++] = folder;
    j->argv[n++] = "--ready-fd";
    j->argv[n++] = "3";
    if (launch->resume != NULL) {
        j->argv[n++] = "--resume";
        j->argv[n++] = launch->resume;
    }
    if (launch->recover)
        j->argv[n++] = "--recover";
    if (launch->accept_changes)
        j->argv[n++] = "--accept-changes";
    if (launch->prepare != NULL)
        j->argv[n++] = "--";
    for (size_t i = 0; launch->prepare != NULL && launch->prepare[i] != NULL && n < ARGV_MAX; i++)
        j->argv[n++] = launch->prepare[i];
    j->argv[n] = NULL;
}

/* As the coordinator would report its own error. */
static _Noreturn void give_up(int ready)
{
    static char words[] = "0 cannot execute the coordinator's program\n";
    words[0] = (char)('0' + PML_IO);
    ssize_t ignored = write(ready, words, sizeof words - 1);
    (void)ignored;
    _exit(127);
}

/* In the child. What has the number READY_FD is our caller's until dup2 has put the pipe there. */
static _Noreturn void become(const job *j)
{
    /* Above the targets first, so that no dup2 overwrites what is still needed. */
    int ready = fcntl(j->ready_fd, F_DUPFD, READY_FD + 1);
    int log = fcntl(j->log_fd, F_DUPFD, READY_FD + 1);
    int null = fcntl(j->null_fd, F_DUPFD, READY_FD + 1);
    if (ready < 0 || log < 0 || null < 0)
        give_up(j->ready_fd);
    if (dup2(null, 0) != 0 || dup2(log, 1) != 1 || dup2(log, 2) != 2 ||
        dup2(ready, READY_FD) != READY_FD)
        give_up(ready);
    if (syscall(SYS_close_range, READY_FD + 1, ~0U, 0) != 0)
        for (int fd = READY_FD + 1; fd < 65536; fd++)
            close(fd);
    for (int s = 1; s < NSIG; s++)
        signal(s, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (chdir("/") == 0)
        execv(j->argv[0], (char *const *)j->argv);
    give_up(READY_FD);
}

/* fork, setsid, fork: the grandchild has no terminal, cannot get one, and is not our child. */
static pml_status start(const job *j, pml_error *err)
{
    pid_t pid = fork();
    if (pid < 0)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot start a process: %s", strerror(errno));
    if (pid == 0) {
        if (setsid() < 0)
            _exit(1);
        pid_t inner = fork();
        if (inner == 0)
            become(j);
        _exit(inner < 0 ? 1 : 0);
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot start a process of its own session");
    return PML_OK;
}

/* One line from the pipe. A "+" before it is a sign of life: a large checkpoint takes its time, and
 * is given it. PML_TIMEOUT: `seconds` without one, or enough; PML_PEER at an end without a line. */
static pml_status read_line(int fd, double seconds, const pml_launch *launch, char *line,
                            size_t capacity, pml_error *err)
{
    size_t n = 0;
    double deadline = pml_clock_monotonic() + seconds;
    for (;;) {
        double left = deadline - pml_clock_monotonic();
        struct pollfd p = {fd, POLLIN, 0};
        if (launch->enough != NULL && launch->enough(launch->asked))
            return PML_FAIL(err, PML_TIMEOUT, "nobody waits for the coordinator any more");
        if (left <= 0)
            return PML_FAIL(err, PML_TIMEOUT, "the coordinator is not ready in time");
        int ready = poll(&p, 1, left < SLICE_MS / 1e3 ? (int)(left * 1e3) + 1 : SLICE_MS);
        if (ready == 0 || (ready < 0 && errno == EINTR))
            continue;
        if (ready < 0)
            return PML_FAIL(err, PML_IO, "cannot wait for the coordinator: %s", strerror(errno));
        ssize_t got = read(fd, line + n, capacity - 1 - n);
        if (got < 0 && errno == EINTR)
            continue;
        n += got > 0 ? (size_t)got : 0;
        line[n] = '\0';
        size_t signs = strspn(line, "+");
        if (signs > 0) {
            deadline = pml_clock_monotonic() + seconds;
            memmove(line, line + signs, n - signs + 1);
            n -= signs;
        }
        char *end = strchr(line, '\n');
        if (end != NULL || n == capacity - 1) {
            if (end != NULL)
                *end = '\0';
            return PML_OK;
        }
        if (got <= 0)
            return PML_FAIL(err, PML_PEER, "the coordinator ended before it was ready");
    }
}

/* The last line of the log, which is where a crash has left its words. */
static void last_line(const char *path, char *line, size_t capacity)
{
    line[0] = '\0';
    int fd;
    char tail[512];
    struct stat st;
    pml_open(path, O_RDONLY | O_NOFOLLOW, &fd, NULL);
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        off_t from = st.st_size > (off_t)sizeof tail - 1 ? st.st_size - (off_t)sizeof tail + 1 : 0;
        ssize_t n = pread(fd, tail, sizeof tail - 1, from);
        while (n > 0 && tail[n - 1] == '\n')
            n--;
        tail[n > 0 ? n : 0] = '\0';
        const char *begin = strrchr(tail, '\n');
        snprintf(line, capacity, "%s", begin == NULL ? tail : begin + 1);
    }
    if (fd >= 0)
        close(fd);
}

/* "0" or "CODE message". */
static pml_status judge(const char *line, pml_error *err)
{
    char *rest;
    long code = strtol(line, &rest, 10);
    if (rest == line || code < 0 || code >= PML_STATUS_COUNT)
        return PML_FAIL(err, PML_INTERNAL, "the coordinator said \"%.200s\"", line);
    if (code == PML_OK)
        return PML_OK;
    return PML_FAIL(err, (pml_status)code, "%s", *rest == ' ' ? rest + 1 : "no reason given");
}

static pml_status attempt(const pml_launch *launch, const char *folder, const char *systemd_run,
                          pml_error *err)
{
    char log_path[PATH_MAX], line[WORDS_MAX];
    pml_status status =
        pml_path_join(log_path, sizeof log_path, folder, "log/coordinator.log", err);
    if (status != PML_OK)
        return status;
    int pipe_fds[2] = {-1, -1};
    job j = {.null_fd = -1};
    status = pml_file_open_regular(folder, "log/coordinator.log", O_WRONLY | O_CREAT | O_APPEND,
                                   &j.log_fd, err);
    if (status != PML_OK)
        return status;
    j.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (j.null_fd < 0)
        status = PML_FAIL(err, PML_IO, "cannot open /dev/null: %s", strerror(errno));
    else if (pipe2(pipe_fds, O_CLOEXEC) != 0)
        status = PML_FAIL(err, PML_IO, "cannot make a pipe: %s", strerror(errno));
    if (status == PML_OK) {
        j.ready_fd = pipe_fds[1];
        make_argv(&j, launch, folder, systemd_run);
        status = start(&j, err);
        close(pipe_fds[1]);
    }
    if (status == PML_OK) {
        int ms = launch->timeout_ms > 0 ? launch->timeout_ms : TIMEOUT_MS;
        status = read_line(pipe_fds[0], ms / 1e3, launch, line, sizeof line, err);
        if (status == PML_OK) {
            status = judge(line, err);
        } else {
            last_line(log_path, line, sizeof line);
            if (status == PML_PEER)
                status =
                    PML_FAIL(err, PML_PEER, "the coordinator ended before it was ready; %s: %s",
                             log_path, line);
        }
    }
    if (pipe_fds[0] >= 0)
        close(pipe_fds[0]);
    if (j.null_fd >= 0)
        close(j.null_fd);
    if (j.log_fd >= 0)
        close(j.log_fd);
    return status;
}

static pml_status check_folder(const char *folder, pml_error *err)
{
    char path[PATH_MAX];
    pml_status status = pml_path_join(path, sizeof path, folder, "run.json", err);
    if (status == PML_OK && access(path, R_OK) != 0)
        status = PML_FAIL(err, pml_status_of_errno(errno), "%s: %s", path, strerror(errno));
    if (status == PML_OK)
        status = pml_path_join(path, sizeof path, folder, "log", err);
    return status == PML_OK ? pml_folder_make(path, err) : status;
}

/* Whether there is a coordinator, within a second, that we have not heard from. */
static bool appears(const char *folder, char *connection_file, size_t capacity)
{
    for (int i = 0; i < 20; i++) {
        pml_connection connection;
        if (pml_connection_find(folder, connection_file, capacity, NULL) == PML_OK &&
            pml_connection_read(connection_file, &connection, NULL) == PML_OK) {
            pml_keypair_forget(&connection.keys);
            return true;
        }
        pml_clock_sleep(0.05);
    }
    connection_file[0] = '\0';
    return false;
}

pml_status pml_launch_coordinator(const pml_launch *launch, char *connection_file, size_t capacity,
                                  pml_error *err)
{
    connection_file[0] = '\0';
    char *folder = realpath(launch->run_folder, NULL);
    if (folder == NULL)
        return PML_FAIL(err, pml_status_of_errno(errno), "run folder %s: %s", launch->run_folder,
                        strerror(errno));
    pml_hold *hold;
    pml_status status = pml_hold_new(folder, &hold, err);
    if (status == PML_OK)
        status = check_folder(folder, err);
    if (status == PML_OK && access(launch->program, X_OK) != 0)
        status = PML_FAIL(err, PML_NOT_FOUND, "%s: %s", launch->program, strerror(errno));
    if (status == PML_OK) {
        /* A manager that is there but does not work says so by ending the pipe without a word. */
        const char *systemd_run = find_systemd_run();
        status = systemd_run == NULL ? PML_PEER : attempt(launch, folder, systemd_run, err);
        if (systemd_run != NULL && status == PML_PEER && appears(folder, connection_file, capacity))
            status = PML_OK;
        if (status == PML_PEER)
            status = attempt(launch, folder, NULL, err);
    }
    if (status == PML_OK)
        status = pml_connection_find(folder, connection_file, capacity, err);
    else if (status == PML_BUSY)
        appears(folder, connection_file, capacity);
    pml_hold_destroy(&hold);
    free(folder);
    return status;
}
