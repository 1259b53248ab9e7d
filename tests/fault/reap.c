#include "reap.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"

enum { MAX_ENVIRONMENT = 1 << 18 };

/* Whether the process behind this folder of /proc was exec'd with the entry. One that has ended, or
 * is somebody else's, has nothing to read there. */
static bool has_entry(int folder, const char *entry)
{
    static char text[MAX_ENVIRONMENT];
    int fd = openat(folder, "environ", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    size_t size = 0;
    for (ssize_t n = 1; n > 0 && size<sizeof text - 1; size += n> 0 ? (size_t)n : 0)
        n = read(fd, text + size, sizeof text - 1 - size);
    close(fd);
    text[size] = '\0';
    for (const char *at = text; at < text + size; at += strlen(at) + 1)
        if (strcmp(at, entry) == 0)
            return true;
    return false;
}

/* The descriptor of a process is opened before it is looked at: what is killed is what was seen,
 * though its number may be another's by then. */
static bool look_at(pid_t pid, const char *entry, bool end)
{
    char path[32];
    int process = (int)syscall(SYS_pidfd_open, pid, 0);
    if (process < 0)
        return false;
    snprintf(path, sizeof path, "/proc/%d", (int)pid);
    int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool found = folder >= 0 && has_entry(folder, entry);
    if (found && end)
        found = syscall(SYS_pidfd_send_signal, process, SIGKILL, NULL, 0) == 0;
    if (folder >= 0)
        close(folder);
    close(process);
    return found;
}

static int scan(const char *entry, bool end)
{
    int found = 0;
    DIR *processes = opendir("/proc");
    for (struct dirent *e; processes != NULL && (e = readdir(processes)) != NULL;)
        if (isdigit((unsigned char)e->d_name[0]) && atoi(e->d_name) != getpid())
            found += look_at(atoi(e->d_name), entry, end);
    if (processes != NULL)
        closedir(processes);
    return found;
}

int reap_count(const char *entry)
{
    return scan(entry, false);
}

/* One that is being started while we look is found at the next look: a fork has its parent's
 * environment, and its parent was there. */
int reap(const char *entry)
{
    int killed = 0;
    for (int quiet = 0; quiet < 3;) {
        int found = scan(entry, true);
        killed += found;
        quiet = found == 0 ? quiet + 1 : 0;
        pml_clock_sleep(0.02);
    }
    return killed;
}

static _Noreturn void stand_aside(int end, const char *entry)
{
    char byte;
    setsid();
    /* Whoever waits for the end of what the test writes is not to wait for us. */
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd <= 2; fd++)
        dup2(null, fd);
    while (read(end, &byte, 1) < 0 && errno == EINTR)
        continue;
    reap(entry);
    _exit(0);
}

bool reap_at_end(const char *entry)
{
    int end[2];
    if (pipe2(end, O_CLOEXEC) != 0)
        return false;
    pid_t child = fork();
    if (child == 0) {
        close(end[1]);
        pid_t aside = fork(); /* an orphan: no tree of processes has it that could be killed */
        if (aside == 0)
            stand_aside(end[0], entry);
        _exit(aside < 0 ? 1 : 0);
    }
    close(end[0]); /* the other end stays open for as long as we live */
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}
