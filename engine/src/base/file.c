#include "pml/base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/hold.h"
#include "pml/base/path.h"

static pml_status failed(pml_error *err, const char *what, const char *path)
{
    int code = errno;
    return PML_FAIL(err, code == ENOENT ? PML_NOT_FOUND : PML_IO, "cannot %s %s: %s", what, path,
                    strerror(code));
}

/* ---- writing ---- */

struct pml_atomic_file {
    int fd;          /* -1 once closed: then there is no temporary file to remove either */
    pml_place place; /* of path, from the beginning to the end */
    char path[PATH_MAX];
    char temporary[PATH_MAX];
};

pml_status pml_file_write_all(int fd, const void *data, size_t size, const char *path,
                              pml_error *err)
{
    const char *from = data;
    while (size > 0) {
        ssize_t n = write(fd, from, size);
        if (n < 0 && errno != EINTR)
            return PML_FAIL(err, PML_IO, "cannot write %s: %s", path, strerror(errno));
        if (n > 0) {
            from += n;
            size -= (size_t)n;
        }
    }
    return PML_OK;
}

/* What the temporary file is called where `path` is. */
static const char *temporary_name(const pml_atomic_file *file)
{
    return file->temporary + (file->place.name - file->path);
}

static pml_status open_temporary(pml_atomic_file *file, mode_t mode, pml_error *err)
{
    /* Distinct among the threads and processes that write here now; a leftover of a crashed process
     * that had our pid is stepped over by O_EXCL and the next number. */
    static atomic_uint serial;
    for (int attempt = 0; attempt < 100; attempt++) {
        int n = snprintf(file->temporary, sizeof file->temporary, "%s.tmp-%ld-%u", file->path,
                         (long)getpid(), atomic_fetch_add(&serial, 1));
        if (n < 0 || (size_t)n >= sizeof file->temporary)
            return PML_FAIL(err, PML_INVALID, "the path %s is too long", file->path);
        file->fd = openat(file->place.folder, temporary_name(file),
                          O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (file->fd >= 0)
            break;
        if (errno != EEXIST)
            return PML_FAIL(err, PML_IO, "cannot create %s: %s", file->temporary, strerror(errno));
    }
    if (file->fd < 0)
        return PML_FAIL(err, PML_IO, "cannot create %s: too many temporary files", file->path);
    if (fchmod(file->fd, mode) != 0)
        return failed(err, "set the mode of", file->temporary);
    return PML_OK;
}

pml_status pml_atomic_file_new(const char *path, mode_t mode, pml_atomic_file **file,
                               pml_error *err)
{
    pml_atomic_file *f = malloc(sizeof *f);
    if (f == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to write %s", path);
    f->fd = -1;
    f->place = (pml_place){.folder = AT_FDCWD, .name = f->path};
    int n = snprintf(f->path, sizeof f->path, "%s", path);
    pml_status status = n < 0 || (size_t)n >= sizeof f->path
                            ? PML_FAIL(err, PML_INVALID, "the path %s is too long", path)
                            : pml_place_find(f->path, &f->place, err);
    if (status == PML_NOT_FOUND) /* nothing was asked for that could be missing */
        status = PML_FAIL(err, PML_IO, "cannot create %s: %s", path, strerror(ENOENT));
    if (status == PML_OK && strcmp(f->place.name, ".") == 0)
        status = PML_FAIL(err, PML_INVALID, "cannot create %s: it is a folder", path);
    if (status == PML_OK)
        status = open_temporary(f, mode, err);
    if (status != PML_OK) {
        pml_atomic_file_destroy(&f);
        return status;
    }
    *file = f;
    return PML_OK;
}

pml_status pml_atomic_file_write(pml_atomic_file *file, const void *data, size_t size,
                                 pml_error *err)
{
    return pml_file_write_all(file->fd, data, size, file->path, err);
}

pml_status pml_atomic_file_flush(pml_atomic_file *file, pml_error *err)
{
    return fdatasync(file->fd) == 0 ? PML_OK : failed(err, "sync", file->temporary);
}

pml_status pml_atomic_file_commit(pml_atomic_file *file, pml_error *err)
{
    char folder[PATH_MAX];
    pml_status status = pml_path_folder(folder, sizeof folder, file->path, err);
    if (status != PML_OK)
        return status;
    if (fsync(file->fd) != 0)
        return failed(err, "sync", file->temporary);
    /* Network file systems report a full disk only here. */
    int fd = file->fd;
    file->fd = -1;
    if (close(fd) != 0) {
        status = failed(err, "close", file->temporary);
        unlinkat(file->place.folder, temporary_name(file), 0);
        return status;
    }
    if (renameat(file->place.folder, temporary_name(file), file->place.folder, file->place.name) !=
        0) {
        status = PML_FAIL(err, PML_IO, "cannot rename %s to %s: %s", file->temporary, file->path,
                          strerror(errno));
        unlinkat(file->place.folder, temporary_name(file), 0);
        return status;
    }
    return pml_folder_sync(folder, err);
}

void pml_atomic_file_destroy(pml_atomic_file **file)
{
    pml_atomic_file *f = *file;
    if (f == NULL)
        return;
    if (f->fd >= 0) {
        close(f->fd);
        unlinkat(f->place.folder, temporary_name(f), 0);
    }
    pml_place_leave(&f->place);
    free(f);
    *file = NULL;
}

pml_status pml_file_write(const char *path, const void *data, size_t size, mode_t mode,
                          pml_error *err)
{
    pml_atomic_file *file = NULL;
    pml_status status = pml_atomic_file_new(path, mode, &file, err);
    if (status == PML_OK)
        status = pml_atomic_file_write(file, data, size, err);
    if (status == PML_OK)
        status = pml_atomic_file_commit(file, err);
    pml_atomic_file_destroy(&file);
    return status;
}

/* ---- reading ---- */

/* Reads until the end rather than st_size bytes: a file of /proc says 0, and one may grow. */
static pml_status read_all(int fd, const char *path, size_t limit, size_t expect, char **data,
                           size_t *size, pml_error *err)
{
    size_t capacity = (expect < limit ? expect : limit) + 2, used = 0;
    char *buffer = malloc(capacity);
    while (buffer != NULL) {
        ssize_t n = read(fd, buffer + used, capacity - used - 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            pml_status status = failed(err, "read", path);
            free(buffer);
            return status;
        }
        used += (size_t)n;
        if (n == 0 || used > limit)
            break;
        if (used + 1 == capacity) {
            capacity = capacity > SIZE_MAX / 2 ? SIZE_MAX : 2 * capacity;
            char *wider = realloc(buffer, capacity);
            if (wider == NULL)
                free(buffer);
            buffer = wider;
        }
    }
    if (buffer == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to read %s", path);
    if (used > limit) {
        free(buffer);
        return PML_FAIL(err, PML_INVALID, "%s is larger than %zu bytes", path, limit);
    }
    buffer[used] = '\0';
    *data = buffer;
    *size = used;
    return PML_OK;
}

pml_status pml_file_open_regular(const char *folder, const char *name, int flags, int *fd,
                                 pml_error *err)
{
    char path[PATH_MAX];
    struct stat st;
    *fd = -1;
    pml_status status = pml_path_join(path, sizeof path, folder, name, err);
    if (status != PML_OK)
        return status;
    status = pml_open(path, flags | O_NOFOLLOW, fd, err);
    if (status != PML_OK || (fstat(*fd, &st) == 0 && S_ISREG(st.st_mode)))
        return status;
    close(*fd);
    *fd = -1;
    return PML_FAIL(err, PML_DENIED, "%s is not a regular file; remove it", path);
}

pml_status pml_file_read(const char *path, size_t limit, bool follow, char **data, size_t *size,
                         pml_error *err)
{
    struct stat info;
    int fd;
    if (limit > SIZE_MAX / 4)
        limit = SIZE_MAX / 4;
    pml_status status = pml_open(path, O_RDONLY | (follow ? 0 : O_NOFOLLOW), &fd, err);
    if (status != PML_OK)
        return status;
    if (fstat(fd, &info) != 0)
        status = failed(err, "look at", path);
    else if (!S_ISREG(info.st_mode))
        status = PML_FAIL(err, PML_INVALID, "%s is not a regular file", path);
    else if (info.st_size > 0 && (uint64_t)info.st_size > limit)
        status = PML_FAIL(err, PML_INVALID, "%s is larger than %zu bytes", path, limit);
    else
        status = read_all(fd, path, limit, (size_t)info.st_size, data, size, err);
    close(fd);
    return status;
}
