/* Data preparation: a child that tokenises, before the workers start. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator.h"
#include "pml/base/clock.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"
#include "pml/base/path.h"
#include "spawn.h"

static const double progress_seconds = 0.25; /* between two progress events */

pml_status prepare_start(coordinator *c, pml_error *err)
{
    enum { ARGS_MAX = 64 };
    const char *argv[ARGS_MAX + 2];
    size_t n = 0;
    while (n < ARGS_MAX && c->prepare_argv[n] != NULL) {
        argv[n] = c->prepare_argv[n];
        n++;
    }
    char log_path[PATH_MAX], folder[PATH_MAX];
    int out[2];
    pml_status status = pml_hold_where(c->folder, folder, sizeof folder, err);
    argv[n] = folder;
    argv[n + 1] = NULL;
    if (status == PML_OK)
        status = pml_path_join(log_path, sizeof log_path, c->folder, "log/prepare.log", err);
    if (status != PML_OK)
        return status;
    if (pipe2(out, O_CLOEXEC) != 0 || fcntl(out[0], F_SETFL, O_NONBLOCK) != 0)
        return PML_FAIL(err, PML_IO, "cannot make a pipe: %s", strerror(errno));
    spawn s = {
        .argv = argv, .log_path = log_path, .out = out[1], .fds = {-1}, .dies_with_us = true};
    status = spawn_process(&s, &c->prepare, err);
    if (s.unlogged.code != PML_OK)
        emit_log(c, "warning", -1, "%s: what is said there is lost", s.unlogged.message);
    close(out[1]);
    c->prepare_out = out[0];
    if (status != PML_OK)
        c->prepare = 0;
    return status;
}

static void take_line(coordinator *c, const char *line, size_t size)
{
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    if (pml_message_parse(PML_CHANNEL_LINE, line, size, &m, &err) != PML_OK) {
        pml_log(PML_LOG_WARNING, "prepare: %s: %.200s", err.message, line);
        return;
    }
    double now = pml_clock_monotonic();
    pml_message *event = NULL;
    switch (pml_message_type_of(m)) {
    case PML_LINE_progress:
        if (now - c->prepare_logged < progress_seconds && pml_message_number(m, "fraction") < 1)
            break;
        c->prepare_logged = now;
        event = pml_message_new(PML_EVENT_progress);
        pml_message_set_string(event, "what", pml_message_string(m, "what"));
        pml_message_set_number(event, "fraction", pml_message_number(m, "fraction"));
        emit(c, event, false);
        break;
    case PML_LINE_log:
        emit_log(c, pml_message_string(m, "level"), -1, "%s", pml_message_string(m, "message"));
        break;
    default: /* error */
        c->prepare_code = PML_INVALID;
        for (int i = 1; i < PML_STATUS_COUNT; i++)
            if (strcmp(pml_status_name((pml_status)i), pml_message_string(m, "code")) == 0)
                c->prepare_code = (pml_status)i;
        snprintf(c->prepare_error, sizeof c->prepare_error, "%s", pml_message_string(m, "message"));
    }
    pml_message_destroy(&m);
}

/* What the pipe has, line by line; a line that is too long is dropped in pieces that are not JSON.
 */
void prepare_read(coordinator *c)
{
    while (c->prepare_out >= 0) {
        char *into = c->prepare_line + c->prepare_n;
        ssize_t n = read(c->prepare_out, into, sizeof c->prepare_line - c->prepare_n - 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            close(c->prepare_out);
            c->prepare_out = -1;
            return;
        }
        c->prepare_n += (size_t)n;
        char *begin = c->prepare_line, *end;
        while ((end = memchr(begin, '\n', c->prepare_n - (size_t)(begin - c->prepare_line)))) {
            *end = '\0';
            if (end > begin)
                take_line(c, begin, (size_t)(end - begin));
            begin = end + 1;
        }
        c->prepare_n -= (size_t)(begin - c->prepare_line);
        memmove(c->prepare_line, begin, c->prepare_n);
        if (c->prepare_n == sizeof c->prepare_line - 1)
            c->prepare_n = 0;
    }
}

void prepare_ended(coordinator *c, int status)
{
    pml_error err = PML_ERROR_INIT;
    c->prepare = 0;
    prepare_read(c);
    if (c->prepare_out >= 0)
        close(c->prepare_out);
    c->prepare_out = -1;
    if (run_is_over(c))
        return;
    if (c->prepare_error[0] != '\0') {
        fail_later(c, c->prepare_code, -1, c->prepare_error);
    } else if (WIFSIGNALED(status)) {
        PML_FAIL(&err, PML_INTERNAL, "data preparation was killed by signal %d (%s)",
                 WTERMSIG(status), strsignal(WTERMSIG(status)));
        fail_later(c, err.code, -1, err.message);
    } else if (WEXITSTATUS(status) != 0) {
        PML_FAIL(&err, PML_INTERNAL, "data preparation ended with status %d; see log/prepare.log",
                 WEXITSTATUS(status));
        fail_later(c, err.code, -1, err.message);
    } else if (workers_start(c, &err) != PML_OK) {
        fail_later(c, err.code, -1, err.message);
    }
}
