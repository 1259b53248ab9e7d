#include "eventlog.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "eventlog_recover.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/file_at.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "pml/base/table.h"
#include "pml/json/sum.h"

enum { PATH_BYTES = 4096, FIRST_LINES = 1024, FIRST_TAIL = 64 << 10, PIECE_BYTES = 1 << 20 };
_Static_assert((int)PIECE_BYTES > (int)PML_LOG_TORN_MAX,
               "a piece tells what is torn from what is damaged");

struct eventlog {
    int fd;
    char path[PATH_BYTES];
    int64_t *offsets; /* offsets[i]: where line i begins; offsets[n] = the end of all of them */
    size_t n, capacity;
    int64_t written;  /* bytes of the file that are as they should be                     */
    size_t synced;    /* lines that are on disk for sure                                   */
    size_t announced; /* lines that were given to others                                   */
    size_t durable;   /* the first line that must be synced before it is announced, n: none */
    char *tail;       /* lines from `kept` on: those not synced or not announced            */
    bool *is_durable; /* of each of them */
    size_t kept, tail_room, kept_room;
    int64_t timeline, step; /* of the last event; of the last step */
    int64_t step_timeline;  /* which that step is of */
};

static pml_status add_offset(eventlog *log, int64_t offset, pml_error *err)
{
    int64_t *larger = pml_table_room(log->offsets, &log->capacity, log->n + 2, sizeof *larger);
    if (larger == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the index of %s", log->path);
    log->offsets = larger;
    log->offsets[++log->n] = offset;
    return PML_OK;
}

/* ---- opening ---- */

/* While the log is read, `written` is where the piece begins that is looked at. */
static pml_status take_end(void *user, int64_t end, pml_error *err)
{
    eventlog *log = user;
    return add_offset(log, log->written + end, err);
}

static pml_status read_file(const eventlog *log, int64_t begin, char *out, size_t want,
                            pml_error *err)
{
    pml_file_at from = {log->fd, (uint64_t)begin, log->path};
    return pml_file_at_read(&from, out, want, err);
}

/* In pieces: a log of a million steps has hundreds of megabytes. And read, not mapped: a page that
 * the disk does not give is an error with words here, and SIGBUS there. */
static pml_status recover_lines(eventlog *log, recovered *r, int64_t size, pml_error *err)
{
    char *piece = malloc(PIECE_BYTES);
    if (piece == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to read %s", log->path);
    pml_status status = PML_OK;
    for (size_t taken = 1; status == PML_OK && taken > 0 && log->written < size;) {
        int64_t left = size - log->written;
        size_t n = left < PIECE_BYTES ? (size_t)left : PIECE_BYTES;
        taken = 0;
        status = read_file(log, log->written, piece, n, err);
        if (status == PML_OK)
            status = eventlog_recover(r, piece, n, &taken, err);
        log->written += (int64_t)taken;
    }
    free(piece);
    if (status == PML_OK && size - log->written > PML_LOG_TORN_MAX)
        return PML_FAIL(err, PML_CORRUPT,
                        "%s, line %lld: no end in %lld bytes, which is more than was ever unsynced",
                        log->path, (long long)r->lines + 1, (long long)(size - log->written));
    return status;
}

static pml_status recover_file(eventlog *log, recovered *r, size_t *cut, pml_error *err)
{
    struct stat st;
    if (fstat(log->fd, &st) != 0)
        return PML_FAIL(err, PML_IO, "cannot look at %s: %s", log->path, strerror(errno));
    if (st.st_size == 0)
        return PML_OK;
    pml_status status = recover_lines(log, r, st.st_size, err);
    if (status != PML_OK)
        return status;
    *cut = (size_t)(st.st_size - log->written);
    if (*cut > 0 && ftruncate(log->fd, (off_t)log->written) != 0)
        return PML_FAIL(err, PML_IO, "cannot cut the torn end of %s: %s", log->path,
                        strerror(errno));
    /* The lines were whole in the page cache of this boot, which says nothing of the disk. */
    if (fsync(log->fd) != 0)
        return PML_FAIL(err, PML_IO, "cannot put %s on disk: %s", log->path, strerror(errno));
    log->synced = log->announced = log->durable = log->kept = log->n;
    return PML_OK;
}

/* Two that write one log write over each other's lines. The run's lock keeps them apart, but lies
 * beside it as a file that can be taken away; this one goes with what it guards. Where the file
 * system has no locks, the run's lock is elsewhere and has to do. */
static pml_status hold_file(const eventlog *log, pml_error *err)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(log->fd, F_OFD_SETLK, &whole) != 0 && (errno == EAGAIN || errno == EACCES))
        return PML_FAIL(err, PML_BUSY,
                        "somebody else writes %s: this run has a coordinator already", log->path);
    return PML_OK;
}

static pml_status open_file(eventlog *log, const char *folder, pml_error *err)
{
    static const char name[] = "events.jsonl";
    pml_status status = pml_path_join(log->path, sizeof log->path, folder, name, err);
    if (status == PML_OK)
        status = pml_file_open_regular(folder, name, O_RDWR | O_CREAT, &log->fd, err);
    if (status == PML_OK)
        status = hold_file(log, err);
    if (status != PML_OK)
        return status;
    log->offsets = calloc(FIRST_LINES, sizeof *log->offsets);
    log->tail = malloc(FIRST_TAIL);
    log->is_durable = calloc(FIRST_LINES, sizeof *log->is_durable);
    if (log->offsets == NULL || log->tail == NULL || log->is_durable == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the index of %s", log->path);
    log->capacity = log->kept_room = FIRST_LINES;
    log->tail_room = FIRST_TAIL;
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
    recovered r = {.path = log->path,
                   .seen = seen,
                   .line = take_end,
                   .user = log,
                   .seen_user = user,
                   .timeline = -1};
    pml_status status = open_file(log, folder, err);
    if (status == PML_OK)
        status = recover_file(log, &r, cut, err);
    if (status == PML_OK)
        status = pml_folder_sync(folder, err);
    log->timeline = r.timeline;
    log->step = r.step;
    log->step_timeline = r.step_timeline;
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
    free((*log)->is_durable);
    free((*log)->tail);
    free(*log);
    *log = NULL;
}

int64_t eventlog_last(const eventlog *log)
{
    return (int64_t)log->announced;
}

int64_t eventlog_timeline(const eventlog *log)
{
    return log->timeline;
}

size_t eventlog_waiting(const eventlog *log, size_t *bytes)
{
    *bytes = (size_t)(log->offsets[log->n] - log->offsets[log->kept]);
    return log->n - log->announced;
}

int64_t eventlog_step(const eventlog *log)
{
    return log->step;
}

int64_t eventlog_step_timeline(const eventlog *log)
{
    return log->step_timeline;
}

/* ---- writing ---- */

static char *in_tail(const eventlog *log, int64_t offset)
{
    return log->tail + (offset - log->offsets[log->kept]);
}

/* What is on disk and known to all need not be kept. */
static void trim(eventlog *log)
{
    size_t first = log->synced < log->announced ? log->synced : log->announced;
    if (first == log->kept)
        return;
    memmove(log->tail, in_tail(log, log->offsets[first]),
            (size_t)(log->offsets[log->n] - log->offsets[first]));
    memmove(log->is_durable, log->is_durable + (first - log->kept), log->n - first);
    log->kept = first;
}

/* A power of two times what is there, at least `want`. */
static size_t room_for(size_t have, size_t want)
{
    while (have < want)
        have *= 2;
    return have;
}

static pml_status make_room(eventlog *log, size_t bytes, pml_error *err)
{
    size_t have = (size_t)(log->offsets[log->n] - log->offsets[log->kept]);
    size_t room = room_for(log->tail_room, have + bytes);
    char *tail = room == log->tail_room ? log->tail : realloc(log->tail, room);
    if (tail != NULL) {
        log->tail = tail;
        log->tail_room = room;
    }
    room = room_for(log->kept_room, log->n - log->kept + 1);
    bool *marks = room == log->kept_room ? log->is_durable : realloc(log->is_durable, room);
    if (marks != NULL) {
        log->is_durable = marks;
        log->kept_room = room;
    }
    if (tail == NULL || marks == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for events that wait for the disk");
    return PML_OK;
}

pml_status eventlog_append(eventlog *log, pml_message *event, int64_t timeline, bool durable,
                           pml_error *err)
{
    char *text = NULL;
    size_t size = 0;
    trim(log);
    pml_message_stamp(event, (int64_t)log->n + 1, pml_clock_unix(), timeline);
    pml_status status = pml_message_print(event, &text, &size, err);
    if (status == PML_OK)
        status = pml_sum_add(&text, &size, err);
    if (status == PML_OK && size > PML_EVENT_MAX)
        status = PML_FAIL(err, PML_INVALID, "an event has at most %d bytes, this %s has %zu",
                          PML_EVENT_MAX, pml_message_name(pml_message_type_of(event)), size);
    if (status == PML_OK)
        status = make_room(log, size + 1, err);
    int64_t begin = log->offsets[log->n];
    if (status == PML_OK)
        status = add_offset(log, begin + (int64_t)size + 1, err);
    if (status == PML_OK) {
        memcpy(in_tail(log, begin), text, size);
        *in_tail(log, begin + (int64_t)size) = '\n';
        log->is_durable[log->n - 1 - log->kept] = durable;
        if (log->durable == log->n - 1 && !durable) /* none has waited, and this one does not */
            log->durable = log->n;
        log->timeline = timeline;
        if (pml_message_type_of(event) == PML_EVENT_step) {
            log->step = pml_message_int(event, "step");
            log->step_timeline = timeline;
        }
    }
    free(text);
    return status;
}

static pml_status write_up_to(eventlog *log, int64_t end, pml_error *err)
{
    while (log->written < end) {
        ssize_t n = pwrite(log->fd, in_tail(log, log->written), (size_t)(end - log->written),
                           (off_t)log->written);
        if (n < 0 && errno != EINTR)
            return PML_FAIL(err, PML_IO, "cannot write %s: %s", log->path, strerror(errno));
        if (n > 0)
            log->written += n;
    }
    return PML_OK;
}

/* `written` is the end of a line here. */
static pml_status sync_file(eventlog *log, pml_error *err)
{
    if (fdatasync(log->fd) != 0) {
        /* The system has told us once and will not again: pages that it could not write count as
         * clean now. Writing them again is the only way to have them on disk. */
        log->written = log->offsets[log->synced];
        return PML_FAIL(err, PML_IO, "cannot put %s on disk: %s", log->path, strerror(errno));
    }
    while (log->synced < log->n && log->offsets[log->synced + 1] <= log->written)
        log->synced++;
    log->durable = log->synced;
    while (log->durable < log->n && !log->is_durable[log->durable - log->kept])
        log->durable++;
    return PML_OK;
}

/* The lines that may be written now, and whether they must be synced before any more are: up to
 * the first durable one, and not much more than PML_LOG_UNSYNCED bytes that are not on disk. */
static size_t next_stop(const eventlog *log, bool *sync)
{
    const int64_t most = log->offsets[log->synced] + PML_LOG_UNSYNCED;
    size_t stop = log->durable < log->n ? log->durable + 1 : log->n;
    *sync = log->durable < log->n || log->offsets[stop] >= most;
    if (log->offsets[stop] < most)
        return stop;
    for (stop = log->synced + 1; log->offsets[stop] < most;)
        stop++;
    return stop;
}

/* Recovery tells by two things what was torn from what was damaged: a durable line is synced before
 * anything is written behind it, and no tear is longer than what may be unsynced. */
pml_status eventlog_flush(eventlog *log, pml_error *err)
{
    pml_status status = PML_OK;
    trim(log);
    for (bool sync = true; status == PML_OK && sync;) {
        size_t stop = next_stop(log, &sync);
        status = write_up_to(log, log->offsets[stop], err);
        if (status == PML_OK && sync)
            status = sync_file(log, err);
    }
    return status;
}

pml_status eventlog_sync(eventlog *log, pml_error *err)
{
    pml_status status = eventlog_flush(log, err);
    return status == PML_OK && log->synced < log->n ? sync_file(log, err) : status;
}

bool eventlog_next(eventlog *log, const char **text, size_t *size)
{
    size_t i = log->announced;
    if (i >= log->durable || log->offsets[i + 1] > log->written)
        return false;
    *text = in_tail(log, log->offsets[i]);
    *size = (size_t)(log->offsets[i + 1] - log->offsets[i]) - 1;
    log->announced++;
    return true;
}

/* ---- reading ---- */

/* Bytes [begin, begin + want) of the log: of the file, and of the tail, which is as it should be
 * even where the file is not. */
static pml_status read_bytes(const eventlog *log, int64_t begin, char *out, size_t want,
                             pml_error *err)
{
    int64_t end = begin + (int64_t)want, tail = log->offsets[log->kept];
    size_t of_file = end <= tail ? want : begin < tail ? (size_t)(tail - begin) : 0;
    pml_status status = read_file(log, begin, out, of_file, err);
    if (status == PML_OK && of_file < want)
        memcpy(out + of_file, in_tail(log, begin + (int64_t)of_file), want - of_file);
    return status;
}

bool eventlog_removed(const eventlog *log)
{
    struct stat st;
    return fstat(log->fd, &st) == 0 && st.st_nlink == 0;
}

/* By a second name for the open file, which then takes the first one's place. */
static pml_status link_back(const eventlog *log, const pml_place *place, pml_error *err)
{
    static const char aside[] = ".events.jsonl.back";
    char file[64];
    snprintf(file, sizeof file, "/proc/self/fd/%d", log->fd);
    unlinkat(place->folder, aside, 0); /* of an attempt that was cut off */
    if (linkat(AT_FDCWD, file, place->folder, aside, AT_SYMLINK_FOLLOW) != 0 ||
        renameat(place->folder, aside, place->folder, place->name) != 0 ||
        fsync(place->folder) != 0) {
        int code = errno;
        unlinkat(place->folder, aside, 0);
        return PML_FAIL(err, PML_IO, "cannot put the log back to %s: %s", log->path,
                        strerror(code));
    }
    return PML_OK;
}

pml_status eventlog_keep(const eventlog *log, bool *put_back, pml_error *err)
{
    struct stat ours, there;
    pml_place place;
    *put_back = false;
    pml_status status = pml_place_find(log->path, &place, err);
    if (status != PML_OK)
        return status;
    bool same = fstat(log->fd, &ours) == 0 &&
                fstatat(place.folder, place.name, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
                ours.st_dev == there.st_dev && ours.st_ino == there.st_ino;
    if (!same) {
        status = link_back(log, &place, err);
        *put_back = status == PML_OK;
    }
    pml_place_leave(&place);
    return status;
}

pml_status eventlog_read(eventlog *log, int64_t from, char *out, size_t capacity, size_t *size,
                         int64_t *next, pml_error *err)
{
    *size = 0;
    *next = from;
    if (from < 1 || from > eventlog_last(log))
        return PML_OK;
    int64_t begin = log->offsets[from - 1];
    size_t last = (size_t)from; /* lines [from - 1, last) are read; each newline becomes a comma */
    while (last < log->announced && log->offsets[last + 1] - begin <= (int64_t)capacity)
        last++;
    size_t want = (size_t)(log->offsets[last] - begin);
    if (want > capacity)
        return PML_FAIL(err, PML_INTERNAL, "event %lld is longer than any message",
                        (long long)from);
    pml_status status = read_bytes(log, begin, out, want, err);
    if (status != PML_OK)
        return status;
    for (size_t i = (size_t)from; i < last; i++)
        out[log->offsets[i] - begin - 1] = ',';
    *size = want - 1; /* without the last newline */
    *next = (int64_t)last + 1;
    return PML_OK;
}
