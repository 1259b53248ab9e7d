#include "reserve_bytes.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { TEXT_BYTES = 1024, STRETCHES_MAX = 1000 /* between two of which others lie */ };

static struct flock stretch(off_t region, size_t from, size_t to, short type)
{
    return (struct flock){.l_type = type,
                          .l_whence = SEEK_SET,
                          .l_start = region + (off_t)from,
                          .l_len = (off_t)(to - from)};
}

static pml_status refused(int reason, pml_error *err)
{
    if (reason == EAGAIN || reason == EACCES)
        return PML_FAIL(err, PML_BUSY, "somebody else holds these bytes");
    bool none = reason == ENOLCK || reason == ENOSYS || reason == EOPNOTSUPP || reason == EINVAL;
    return none ? PML_FAIL(err, PML_UNSUPPORTED,
                           "the file system of device files does not lock them: %s",
                           strerror(reason))
                : PML_FAIL(err, PML_IO, "cannot lock bytes of a device file: %s", strerror(reason));
}

/* The kernel names any lock in the way, not the first one: what lies left and right of it is asked
 * for in turn. */
static pml_status walk(int fd, off_t region, size_t from, size_t to, int depth, pmli_stretch each,
                       void *user, pml_error *err)
{
    while (from < to) {
        struct flock lock = stretch(region, from, to, F_WRLCK);
        if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
            return refused(errno, err);
        if (lock.l_type == F_UNLCK)
            return PML_OK;
        off_t begin = lock.l_start - region, end = begin + lock.l_len;
        size_t first = begin > (off_t)from ? (size_t)begin : from;
        size_t last = lock.l_len == 0 || end > (off_t)to ? to : (size_t)end;
        each(user, first, last);
        if (depth == STRETCHES_MAX)
            return PML_FAIL(err, PML_CORRUPT, "a device file is locked in too many pieces");
        pml_status status = walk(fd, region, from, first, depth + 1, each, user, err);
        if (status != PML_OK)
            return status;
        from = last;
    }
    return PML_OK;
}

pml_status pmli_bytes_walk(int fd, off_t region, size_t from, size_t to, pmli_stretch each,
                           void *user, pml_error *err)
{
    return walk(fd, region, from, to, 0, each, user, err);
}

static void add(void *user, size_t from, size_t to)
{
    *(size_t *)user += to - from;
}

pml_status pmli_bytes_count(int fd, off_t region, size_t *n, pml_error *err)
{
    *n = 0;
    return pmli_bytes_walk(fd, region, 0, PMLI_SPAN, add, n, err);
}

pml_status pmli_bytes_set(int fd, off_t region, size_t from, size_t to, bool locked, pml_error *err)
{
    struct flock lock = stretch(region, from, to, locked ? F_WRLCK : F_UNLCK);
    if (from >= to || fcntl(fd, F_OFD_SETLK, &lock) == 0)
        return PML_OK;
    return refused(errno, err);
}

/* ---- names ---- */

static pml_status write_text(int fd, size_t place, size_t mib, int pid, const char *run,
                             pml_error *err)
{
    char text[TEXT_BYTES] = "";
    int n = snprintf(text, sizeof text, "%zu %d %.*s\n", mib, pid, PML_HOLDER_RUN_MAX - 1, run);
    ssize_t written = n < 0 || n >= (int)sizeof text
                          ? -1
                          : pwrite(fd, text, sizeof text, (off_t)(place * sizeof text));
    if (written != (ssize_t)sizeof text)
        return PML_FAIL(err, PML_IO, "cannot say in the device's file who has reserved memory: %s",
                        written < 0 ? strerror(errno) : "the disk is full");
    return PML_OK;
}

static bool parse(const char *text, pml_holder *holder)
{
    size_t mib;
    int at = 0;
    if (sscanf(text, "%8zu %d %n", &mib, &holder->pid, &at) != 2 || at == 0)
        return false;
    const char *end = strchr(text + at, '\n');
    size_t length = end == NULL ? PML_HOLDER_RUN_MAX : (size_t)(end - text) - (size_t)at;
    if (length >= PML_HOLDER_RUN_MAX)
        return false;
    holder->bytes = mib << 20;
    memcpy(holder->run, text + at, length);
    holder->run[length] = '\0';
    return true;
}

void pmli_name_clear(int fd, size_t place)
{
    pmli_bytes_set(fd, PMLI_NAMED_AT, place, place + 1, false, NULL);
}

pml_status pmli_name_set(int fd, size_t place, size_t mib, int pid, const char *run, pml_error *err)
{
    pmli_name_clear(fd, place);
    pml_status status = write_text(fd, place, mib, pid, run, err);
    return status == PML_OK ? pmli_bytes_set(fd, PMLI_NAMED_AT, place, place + 1, true, err)
                            : status;
}

/* Who takes a place over writes before it locks: a text that stands there before and after the lock
 * is seen is of the one who has it. */
bool pmli_name_read(int fd, size_t place, pml_holder *holder)
{
    char before[TEXT_BYTES + 1] = "", after[TEXT_BYTES + 1] = "";
    const off_t at = (off_t)(place * TEXT_BYTES);
    size_t named = 0;
    *holder = (pml_holder){0};
    return pread(fd, before, TEXT_BYTES, at) == TEXT_BYTES &&
           pmli_bytes_walk(fd, PMLI_NAMED_AT, place, place + 1, add, &named, NULL) == PML_OK &&
           named > 0 && pread(fd, after, TEXT_BYTES, at) == TEXT_BYTES &&
           memcmp(before, after, sizeof before) == 0 && parse(after, holder);
}
