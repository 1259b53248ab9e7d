#include "disk.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DESCRIPTORS = 4096 };

static disk_control own, *control;
static int record_fd = -1;
static const char *strike; /* a coordinator's, recorded */
static char record_prefix[512];
static char *paths[DESCRIPTORS]; /* of descriptors below prefix that may change something */
static bool written[DESCRIPTORS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* POSIX says that dlsym's answer is a function's address, ISO C that it is none. */
#pragma GCC diagnostic ignored "-Wpedantic"
#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL)
        abort();
    return found;
}

__attribute__((constructor)) static void begin(void)
{
    const char *file = getenv("PML_DISK"), *program = getenv("PML_DISK_PROGRAM");
    const char *record = getenv("PML_DISK_RECORD"), *prefix = getenv("PML_DISK_PREFIX");
    if (program != NULL && strcmp(program, program_invocation_short_name) != 0)
        return;
    control = &own;
    if (file != NULL) {
        int fd = REAL(open)(file, O_RDWR | O_CLOEXEC);
        void *at = fd < 0 ? MAP_FAILED
                          : mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        control = at == MAP_FAILED ? &own : at;
        REAL(close)(fd);
    }
    if (record != NULL && prefix != NULL) {
        snprintf(record_prefix, sizeof record_prefix, "%s", prefix);
        /* High, so that nobody who counts on low numbers is disturbed. */
        int fd = REAL(open)(record, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        record_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
        REAL(close)(fd);
        if (strcmp(program_invocation_short_name, "pml-coordinator") == 0)
            strike = getenv("PML_DISK_STRIKE");
    }
}

disk_control *disk_control_here(void)
{
    return control;
}

/* ---- which files ---- */

static bool below(const char *path, const char *prefix)
{
    size_t n = strlen(prefix);
    return n > 0 && strncmp(path, prefix, n) == 0 && (path[n] == '\0' || path[n] == '/');
}

static bool watched(const char *path)
{
    return (control != NULL && below(path, control->prefix)) ||
           (record_fd >= 0 && below(path, record_prefix));
}

/* The absolute path of name at the descriptor of a folder; links on the way are as they were given:
 * the prefix is a real path, and so is what our programs use below it. */
static void absolute(int at, const char *name, char out[PATH_MAX])
{
    char base[PATH_MAX] = "";
    if (name[0] != '/') {
        if (at == AT_FDCWD) {
            if (getcwd(base, sizeof base) == NULL)
                base[0] = '\0';
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t n = readlink(link, base, sizeof base - 1);
            base[n < 0 ? 0 : n] = '\0';
        }
        strncat(base, "/", sizeof base - strlen(base) - 1);
    }
    snprintf(out, PATH_MAX, "%.2000s%.2000s", base, name);
}

static const char *path_of(int fd)
{
    return fd >= 0 && fd < DESCRIPTORS ? paths[fd] : NULL;
}

static void remember(int fd, const char *path, bool may_write)
{
    if (fd < 0 || fd >= DESCRIPTORS)
        return;
    pthread_mutex_lock(&mutex);
    free(paths[fd]);
    paths[fd] = watched(path) ? strdup(path) : NULL;
    written[fd] = may_write;
    pthread_mutex_unlock(&mutex);
}

/* ---- failing ---- */

/* Counts one operation in *seen; true: it is one of those that fail, errno is set. */
static bool counted_fails(const char *what, const char *path, _Atomic int64_t *seen, int64_t from,
                          int64_t to, int code)
{
    int64_t n = atomic_fetch_add(seen, 1) + 1;
    if (from == 0 || n < from || n > to)
        return false;
    snprintf(control->last, sizeof control->last, "%s %.560s", what, path);
    errno = code;
    return true;
}

static bool is_ours(const char *path)
{
    return control != NULL && path != NULL && below(path, control->prefix);
}

static bool fails(const char *what, const char *path)
{
    return is_ours(path) &&
           counted_fails(what, path, &control->n, control->from, control->to, control->code);
}

static bool read_fails(const char *what, const char *path)
{
    return is_ours(path) && control->read_of[0] != '\0' &&
           strstr(path + strlen(control->prefix), control->read_of) != NULL &&
           counted_fails(what, path, &control->reads, control->read_from, control->read_to,
                         control->read_code);
}

/* ---- recording ---- */

/* One line of JSON, then the bytes of a write; in one append, so that records of several processes
 * do not mix. Made when the operation has returned: what is recorded before something else had
 * happened before it. */
static void record(const char *what, const char *path, const char *other, int64_t offset,
                   const void *data, size_t size)
{
    if (record_fd < 0 || !below(path, record_prefix))
        return;
    int keep = errno;
    char head[PATH_MAX * 2 + 200];
    int n = snprintf(head, sizeof head,
                     "{\"op\":\"%s\",\"path\":\"%s\",\"other\":\"%s\",\"at\":%lld,\"size\":%zu}\n",
                     what, path, other, (long long)offset, size);
    char *whole = malloc((size_t)n + size + 1);
    if (whole == NULL)
        abort();
    memcpy(whole, head, (size_t)n);
    if (size > 0)
        memcpy(whole + n, data, size);
    whole[(size_t)n + size] = '\n';
    if (REAL(write)(record_fd, whole, (size_t)n + size + 1) != (ssize_t)((size_t)n + size + 1))
        abort();
    free(whole);
    /* Who takes the strike away is struck. */
    if (strike != NULL && REAL(unlink)(strike) == 0)
        kill(getpid(), SIGKILL);
    errno = keep;
}

/* ---- the calls ---- */

static int open_at(int at, const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    bool may_write = (flags & O_ACCMODE) != O_RDONLY, making = (flags & O_CREAT) != 0;
    absolute(at, name, path);
    /* A file without a name is nobody's after a crash. */
    bool ours = watched(path) && (flags & O_TMPFILE) != O_TMPFILE;
    if (ours &&
        (((may_write || making) && fails("open", path)) || (!making && read_fails("open", path))))
        return -1;
    bool new = ours &&making &&REAL(faccessat)(at, name, F_OK, AT_SYMLINK_NOFOLLOW) != 0;
    int fd = REAL(openat)(at, name, flags, mode);
    if (fd >= 0 && (ours || path_of(fd) != NULL))
        remember(fd, path, may_write);
    if (fd >= 0 && ours && may_write && (new || (flags & O_TRUNC) != 0))
        record(new ? "create" : "empty", path, "", 0, NULL, 0);
    return fd;
}

#define OPEN(NAME, AT, ...)                                                                        \
    {                                                                                              \
        mode_t mode = 0;                                                                           \
        if ((flags & (O_CREAT | O_TMPFILE)) != 0) {                                                \
            va_list args;                                                                          \
            va_start(args, flags);                                                                 \
            mode = va_arg(args, mode_t);                                                           \
            va_end(args);                                                                          \
        }                                                                                          \
        return open_at(AT, name, flags, mode);                                                     \
    }

int open(const char *name, int flags, ...)
    OPEN(open, AT_FDCWD) int open64(const char *name, int flags, ...)
        OPEN(open64, AT_FDCWD) int openat(int at, const char *name, int flags, ...)
            OPEN(openat, at) int openat64(int at, const char *name, int flags, ...)
                OPEN(openat64, at)

                    int close(int fd)
{
    char *path = NULL;
    bool was_written = false;
    if (path_of(fd) != NULL) {
        pthread_mutex_lock(&mutex);
        path = paths[fd];
        was_written = written[fd];
        paths[fd] = NULL;
        pthread_mutex_unlock(&mutex);
    }
    bool failing = path != NULL && was_written && fails("close", path);
    int code = errno;
    free(path);
    int result = REAL(close)(fd); /* it is closed in every case, as the system's is */
    errno = failing ? code : errno;
    return failing ? -1 : result;
}

static ssize_t put(int fd, const void *data, size_t size, off_t offset, bool positioned)
{
    /* closedir closes past us: a folder's number may be a socket's by now. */
    const char *path = path_of(fd) != NULL && written[fd] ? paths[fd] : NULL;
    if (path != NULL && fails("write", path)) {
        if (!control->half || size < 2)
            return -1;
        size /= 2; /* and the next one finds no room at all: the caller asks again */
    }
    off_t at = path == NULL || positioned ? offset : lseek(fd, 0, SEEK_CUR);
    if (path != NULL && !positioned && (fcntl(fd, F_GETFL) & O_APPEND) != 0)
        at = lseek(fd, 0, SEEK_END);
    ssize_t n = positioned ? REAL(pwrite)(fd, data, size, offset) : REAL(write)(fd, data, size);
    if (n > 0 && path != NULL)
        record("write", path, "", at, data, (size_t)n);
    return n;
}

ssize_t read(int fd, void *data, size_t size)
{
    const char *path = path_of(fd);
    if (control != NULL && path != NULL && strstr(path, ".safetensors") != NULL)
        usleep((useconds_t)control->read_ms * 1000);
    if (path != NULL && read_fails("read", path))
        return -1;
    return REAL(read)(fd, data, size);
}

static ssize_t get_at(int fd, void *data, size_t size, off_t offset)
{
    const char *path = path_of(fd);
    if (path != NULL && read_fails("read", path))
        return -1;
    return REAL(pread)(fd, data, size, offset);
}

ssize_t pread(int fd, void *data, size_t size, off_t offset)
{
    return get_at(fd, data, size, offset);
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset)
{
    return get_at(fd, data, size, offset);
}

ssize_t write(int fd, const void *data, size_t size)
{
    return put(fd, data, size, 0, false);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    return put(fd, data, size, offset, true);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    return put(fd, data, size, offset, true);
}

#define OF_DESCRIPTOR(NAME, AT, LAZY, PARAMETERS, ...)                                             \
    int NAME PARAMETERS                                                                            \
    {                                                                                              \
        const char *path = path_of(fd);                                                            \
        if (path != NULL && fails(#NAME, path))                                                    \
            return -1;                                                                             \
        int result = LAZY ? 0 : REAL(NAME)(__VA_ARGS__);                                           \
        if (result == 0 && path != NULL)                                                           \
            record(#NAME, path, "", AT, NULL, 0);                                                  \
        return result;                                                                             \
    }

static bool is_lazy(int fd)
{
    const char *path = path_of(fd);
    return control != NULL && control->lazy && path != NULL && below(path, control->prefix);
}

OF_DESCRIPTOR(fsync, 0, is_lazy(fd), (int fd), fd)
OF_DESCRIPTOR(fdatasync, 0, is_lazy(fd), (int fd), fd)
OF_DESCRIPTOR(fchmod, 0, false, (int fd, mode_t mode), fd, mode)
OF_DESCRIPTOR(ftruncate, size, false, (int fd, off_t size), fd, size)
OF_DESCRIPTOR(ftruncate64, size, false, (int fd, off64_t size), fd, size)

static int make_folder(int at, const char *name, mode_t mode)
{
    char path[PATH_MAX];
    absolute(at, name, path);
    if (watched(path) && fails("mkdir", path))
        return -1;
    int result = REAL(mkdirat)(at, name, mode);
    if (result == 0)
        record("mkdir", path, "", 0, NULL, 0);
    return result;
}

int mkdir(const char *name, mode_t mode)
{
    return make_folder(AT_FDCWD, name, mode);
}

int mkdirat(int at, const char *name, mode_t mode)
{
    return make_folder(at, name, mode);
}

static int move(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
    char path[PATH_MAX], other[PATH_MAX];
    absolute(from_at, from, path);
    absolute(to_at, to, other);
    if (watched(path) && fails("rename", path))
        return -1;
    int result = REAL(renameat2)(from_at, from, to_at, to, flags);
    if (result == 0)
        record((flags & RENAME_EXCHANGE) != 0 ? "exchange" : "rename", path, other, 0, NULL, 0);
    return result;
}

int rename(const char *from, const char *to)
{
    return move(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    return move(from_at, from, to_at, to, 0);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
    return move(from_at, from, to_at, to, flags);
}

static int take_away(int at, const char *name, int flags)
{
    char path[PATH_MAX];
    absolute(at, name, path);
    if (watched(path) && fails("unlink", path))
        return -1;
    int result = REAL(unlinkat)(at, name, flags);
    if (result == 0)
        record("unlink", path, "", 0, NULL, 0);
    return result;
}

int unlink(const char *name)
{
    return take_away(AT_FDCWD, name, 0);
}

int unlinkat(int at, const char *name, int flags)
{
    return take_away(at, name, flags);
}

int rmdir(const char *name)
{
    return take_away(AT_FDCWD, name, AT_REMOVEDIR);
}
