#include "pml/base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static char program_name[32] = "pml";
static pml_log_level least_level = PML_LOG_INFO;

void pml_log_init(const char *program, pml_log_level least)
{
    snprintf(program_name, sizeof program_name, "%s", program);
    least_level = least;
}

static const char *level_name(pml_log_level level)
{
    static const char *const names[] = {"debug", "info", "warning", "error"};
    return (unsigned)level < sizeof names / sizeof names[0] ? names[level] : "?";
}

/* "2026-11-21T05:13:07.412Z info worker-0[4711] " */
static size_t put_head(char *line, size_t capacity, pml_log_level level)
{
    struct timespec t;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &utc);
    size_t n = strftime(line, capacity, "%Y-%m-%dT%H:%M:%S", &utc);
    int more = snprintf(line + n, capacity - n, ".%03ldZ %s %s[%ld] ", t.tv_nsec / 1000000,
                        level_name(level), program_name, (long)getpid());
    return more > 0 ? n + (size_t)more : n;
}

void pml_log(pml_log_level level, const char *format, ...)
{
    if (level < least_level)
        return;
    int keep_errno = errno; /* logging must not disturb the error it tells of */
    char line[2048];
    size_t head = put_head(line, sizeof line, level);

    va_list args;
    va_start(args, format);
    vsnprintf(line + head, sizeof line - head - 1, format, args);
    va_end(args);

    size_t n = head + strlen(line + head);
    for (size_t i = head; i < n; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = ' ';
    line[n++] = '\n';
    /* One try: there is nowhere to tell that the log itself cannot be written. */
    ssize_t written = write(STDERR_FILENO, line, n);
    (void)written;
    errno = keep_errno;
}
