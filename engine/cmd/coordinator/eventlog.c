#include "eventlog.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/path.h"

enum { PATH_BYTES = 4096 };

struct eventlog {
    int fd;
    char path[PATH_BYTES];
    int64_t *offsets; /* offsets[i]: where line i begins; offsets[n] = the file's end */
    size_t n, capacity;
    int64_t timeline;
};

static pml_status add_offset(eventlog *log, int64_t offset, pml_error *err)
{
    if (log->n + 2 > log->capacity) {
        size_t capacity = log->capacity == 0 ? 1024 : 2 * log->capacity;
        int64_t *larger = reallocarray(log->offsets, capacity, sizeof *larger);
        if (larger == NULL)
            return PML_FAIL(err, PML_NO_MEMORY, "no memory for the index of %s", log->path);
        log->offsets = larger;
        log->capacity = capacity;
    }
    log->offsets[++log->n] = offset;
    return PML_OK;
}

/* ---- recovery ---- */

static const char *after(const char *text, const char *end, const char *words)
{
    size_t n = strlen(words);
    return (size_t)(end - text) >= n && memcmp(text, words, n) == 0 ? text + n : NULL;
}

/* Our own lines begin with seq, time and timeline; most are steps, which are told apart here
 * without parsing them. */
static bool is_bulk(const char *line, const char *end, int64_t seq)
{
    char begin[48];
    snprintf(begin, sizeof begin, "{\"seq\":%lld,\"time\":", (long long)seq);
    const char *at = after(line, end, begin);
    at = at == NULL ? NULL : memchr(at, ',', (size_t)(end - at));
    at = at == NULL ? NULL : after(at, end, ",\"timeline\":");
    at = at == NULL ? NULL : memchr(at, ',', (size_t)(end - at));
    return at != NULL && end[-1] == '}' &&
           (after(at, end, ",\"type\":\"step\",") != NULL ||
            after(at, end, ",\"type\":\"progress\",") != NULL);
}

typedef struct recovery {
    void (*seen)(void *user, const pml_message *event);
    void *user;
} recovery;

/* One whole line. PML_CORRUPT when it is not the event that belongs here. */
static pml_status take_line(eventlog *log, const recovery *r, const char *line, const char *end,
                            pml_error *err)
{
    int64_t seq = (int64_t)log->n + 1;
    if (is_bulk(line, end, seq))
        return PML_OK;
    pml_message *event;
    pml_status status =
        pml_message_parse(PML_CHANNEL_EVENT, line, (size_t)(end - line), &event, err);
    if (status == PML_NO_MEMORY)
        return status;
    if (status == PML_OK && pml_message_int(event, "seq") != seq)
        status =
            PML_FAIL(err, PML_CORRUPT, "its seq is %lld", (long long)pml_message_int(event, "seq"));
    if (status == PML_OK) {
        log->timeline = pml_message_int(event, "timeline");
        r->seen(r->user, event);
        pml_message_destroy(&event);
        return PML_OK;
    }
    pml_error_prefix(err, "%s, line %lld", log->path, (long long)seq);
    return PML_CORRUPT;
}

/* What follows the last newline was being written when the machine stopped. A last line that has
 * its newline and is still not JSON is the same thing seen through a disk that wrote out of order.
 */
static pml_status recover(eventlog *log, const recovery *r, const char *text, size_t size,
                          size_t *whole, pml_error *err)
{
    *whole = 0;
    pml_status status = PML_OK;
    while (status == PML_OK && *whole < size) {
        const char *line = text + *whole;
        const char *end = memchr(line, '\n', size - *whole);
        if (end == NULL)
            return PML_OK;
        status = take_line(log, r, line, end, err);
        if (status == PML_CORRUPT && end + 1 == text + size)
            return PML_OK;
        if (status == PML_OK) {
            *whole = (size_t)(end + 1 - text);
            status = add_offset(log, (int64_t)*whole, err);
        }
    }
    return status;
}

static pml_status recover_file(eventlog *log, const recovery *r, size_t *cut, pml_error *err)
{
    struct stat st;
    if (fstat(log->fd, &st) != 0 || !S_ISREG(st.st_mode))
        return PML_FAIL(err, PML_INVALID, "%s is not a file", log->path);
    size_t size = (size_t)st.st_size, whole = 0;
    if (size == 0)
        return PML_OK;
    void *text = mmap(NULL, size, PROT_READ, MAP_PRIVATE, log->fd, 0);
    if (text == MAP_FAILED)
        return PML_FAIL(err, PML_IO, "cannot read %s: %s", log->path, strerror(errno));
    pml_status status = recover(log, r, text, size, &whole, err);
    munmap(text, size);
    if (status != PML_OK || whole == size)
        return status;
    *cut = size - whole;
    if (ftruncate(log->fd, (off_t)whole) != 0 || fsync(log->fd) != 0)
        return PML_FAIL(err, PML_IO, "cannot cut the torn end of %s: %s", log->path,
                        strerror(errno));
    return PML_OK;
}

pml_status eventlog_open(const char *folder, void (*seen)(void *user, const pml_message *event),
                         void *user, eventlog **out, size_t *cut, pml_error *err)
{
    *cut = 0;
    *out = NULL;
    eventlog *log = calloc(1, sizeof *log);
    if (log == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the event log");
    log->fd = -1;
    log->timeline = -1;
    recovery r = {seen, user};
    pml_status status = pml_path_join(log->path, sizeof log->path, folder, "events.jsonl", err);
    if (status == PML_OK) {
        log->fd = open(log->path, O_RDWR | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (log->fd < 0)
            status = PML_FAIL(err, PML_IO, "cannot open %s: %s", log->path, strerror(errno));
    }
    if (status == PML_OK && (log->offsets = calloc(1024, sizeof *log->offsets)) == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory for the index of %s", log->path);
    log->capacity = 1024;
    if (status == PML_OK)
        status = recover_file(log, &r, cut, err);
    if (status == PML_OK)
        status = pml_folder_sync(folder, err);
    if (status != PML_OK)
        eventlog_close(&log);
    *out = log;
    return status;
}

void eventlog_close(eventlog **log)
{
    if (*log == NULL)
        return;
    if ((*log)->fd >= 0)
        close((*log)->fd);
    free((*log)->offsets);
    free(*log);
    *log = NULL;
}

int64_t eventlog_last(const eventlog *log)
{
    return (int64_t)log->n;
}

int64_t eventlog_timeline(const eventlog *log)
{
    return log->timeline;
}

/* ---- writing ---- */

pml_status eventlog_append(eventlog *log, pml_message *event, int64_t timeline, bool durable,
                           char **text, size_t *size, pml_error *err)
{
    pml_message_stamp(event, eventlog_last(log) + 1, pml_clock_unix(), timeline);
    pml_status status = pml_message_print(event, text, size, err);
    if (status != PML_OK)
        return status;
    if (*size > PML_EVENT_MAX)
        status = PML_FAIL(err, PML_INVALID, "an event has at most %d bytes, this %s has %zu",
                          PML_EVENT_MAX, pml_message_name(pml_message_type_of(event)), *size);
    int64_t begin = log->offsets[log->n];
    if (status == PML_OK) {
        (*text)[*size] = '\n'; /* in the place of the NUL: one write for the whole line */
        status = pml_file_write_all(log->fd, *text, *size + 1, log->path, err);
        (*text)[*size] = '\0';
        if (status == PML_OK && durable && fdatasync(log->fd) != 0)
            status = PML_FAIL(err, PML_IO, "cannot put %s on disk: %s", log->path, strerror(errno));
        if (status == PML_OK)
            status = add_offset(log, begin + (int64_t)*size + 1, err);
        if (status != PML_OK && ftruncate(log->fd, (off_t)begin) != 0)
            pml_error_prefix(err, "the log is torn");
    }
    if (status != PML_OK) {
        free(*text);
        *text = NULL;
        *size = 0;
        return status;
    }
    log->timeline = timeline;
    return PML_OK;
}

/* ---- reading ---- */

pml_status eventlog_read(eventlog *log, int64_t from, char *out, size_t capacity, size_t *size,
                         int64_t *next, pml_error *err)
{
    *size = 0;
    *next = from;
    if (from < 1 || from > eventlog_last(log))
        return PML_OK;
    int64_t begin = log->offsets[from - 1];
    size_t last = (size_t)from; /* lines [from - 1, last) are read; each newline becomes a comma */
    while (last < log->n && log->offsets[last + 1] - begin <= (int64_t)capacity)
        last++;
    size_t want = (size_t)(log->offsets[last] - begin);
    if (want > capacity)
        return PML_FAIL(err, PML_INTERNAL, "event %lld is longer than any message",
                        (long long)from);
    for (size_t got = 0; got < want;) {
        ssize_t n = pread(log->fd, out + got, want - got, (off_t)begin + (off_t)got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return PML_FAIL(err, PML_IO, "cannot read %s: %s", log->path,
                            n == 0 ? "it became shorter" : strerror(errno));
        got += (size_t)n;
    }
    for (size_t i = (size_t)from; i < last; i++)
        out[log->offsets[i] - begin - 1] = ',';
    *size = want - 1; /* without the last newline */
    *next = (int64_t)last + 1;
    return PML_OK;
}
