#include "pml/net/connection.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/path.h"
#include "runtime.h"

pml_status pml_connection_write(const char *folder, const pml_connection *connection,
                                pml_error *err)
{
    char path[PATH_MAX];
    pml_status status = pml_path_join(path, sizeof path, folder, "connection.json", err);
    if (status != PML_OK)
        return status;
    pml_message *m = pml_message_new(PML_FILE_connection);
    pml_message_set_int(m, "format", 1);
    pml_message_set_int(m, "pid", connection->pid);
    pml_message_set_string(m, "run", connection->run);
    pml_message_set_string(m, "control", connection->control);
    pml_message_set_string(m, "telemetry", connection->telemetry);
    pml_message_set_string(m, "server_key", connection->server_key);
    pml_message_set_string(m, "role", pml_role_name(connection->role));
    pml_message_set_string(m, "public_key", connection->keys.public_key);
    pml_message_set_string(m, "secret_key", connection->keys.secret_key);
    char *text;
    size_t size;
    status = pml_message_print(m, &text, &size, err);
    pml_message_destroy(&m);
    if (status != PML_OK)
        return status;
    status = pml_file_write(path, text, size, 0600, err);
    sodium_memzero(text, size);
    free(text);
    return status;
}

/* The content of a file that is ours alone. text is malloc'ed. */
static pml_status read_private(const char *path, char **text, size_t *size, pml_error *err)
{
    *text = NULL;
    *size = 0;
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return PML_FAIL(err, PML_NOT_FOUND, "%s is not there: no coordinator is running", path);
    if (fd < 0 && errno == ELOOP)
        return PML_FAIL(err, PML_DENIED, "%s is a link", path);
    if (fd < 0)
        return PML_FAIL(err, PML_IO, "%s: %s", path, strerror(errno));
    pml_status status = PML_OK;
    struct stat st;
    if (fstat(fd, &st) != 0)
        status = PML_FAIL(err, PML_IO, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 0777) != 0600)
        status = PML_FAIL(
            err, PML_DENIED,
            "%s must be a file of yours with mode 600: whoever reads it steers the run", path);
    else if (st.st_size > PML_MESSAGE_MAX)
        status = PML_FAIL(err, PML_CORRUPT, "%s is not a connection file: %lld bytes", path,
                          (long long)st.st_size);
    if (status == PML_OK && (*text = malloc((size_t)st.st_size + 1)) == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory to read %s", path);
    while (status == PML_OK && *size < (size_t)st.st_size) {
        ssize_t n = read(fd, *text + *size, (size_t)st.st_size - *size);
        if (n < 0 && errno != EINTR)
            status = PML_FAIL(err, PML_IO, "%s: %s", path, strerror(errno));
        if (n == 0)
            break;
        if (n > 0)
            *size += (size_t)n;
    }
    close(fd);
    if (status != PML_OK) {
        free(*text);
        *text = NULL;
    }
    return status;
}

/* All lengths are within the table's limits, which are those of the arrays. */
static void fill(const pml_message *m, pml_connection *c)
{
    memset(c, 0, sizeof *c);
    c->pid = (int)pml_message_int(m, "pid");
    snprintf(c->run, sizeof c->run, "%s", pml_message_string(m, "run"));
    snprintf(c->control, sizeof c->control, "%s", pml_message_string(m, "control"));
    snprintf(c->telemetry, sizeof c->telemetry, "%s", pml_message_string(m, "telemetry"));
    snprintf(c->server_key, sizeof c->server_key, "%s", pml_message_string(m, "server_key"));
    c->role = strcmp(pml_message_string(m, "role"), "view") == 0 ? PML_ROLE_VIEW : PML_ROLE_CONTROL;
    snprintf(c->keys.public_key, PML_KEY_TEXT, "%s", pml_message_string(m, "public_key"));
    snprintf(c->keys.secret_key, PML_KEY_TEXT, "%s", pml_message_string(m, "secret_key"));
}

/* The lock of the run tells for sure, as its text names who holds it: a file that was read a moment
 * before may be of the coordinator before, whose keys open nothing. Where the run folder cannot be
 * seen there is only the process id, and of a coordinator elsewhere only the connection itself. */
static pml_status check_alive(const char *path, const pml_connection *c, pml_error *err)
{
    char folder[PATH_MAX], control[PML_ENDPOINT_MAX];
    int holder;
    if (strncmp(c->control, "ipc://", 6) != 0)
        return PML_OK;
    pml_status status = pmli_runtime_holder(c->run, folder, sizeof folder, &holder, err);
    if (status == PML_NOT_FOUND)
        status = kill(c->pid, 0) != 0 && errno == ESRCH
                     ? PML_FAIL(err, PML_PEER, "its coordinator (process %d) has ended", c->pid)
                     : PML_OK;
    else if (status == PML_OK &&
             (snprintf(control, sizeof control, "ipc://%s/ctl", folder) >= (int)sizeof control ||
              strcmp(control, c->control) != 0))
        status = PML_FAIL(err, PML_PEER, "the run's coordinator is now at %s", folder);
    else if (status == PML_OK && holder != c->pid)
        status = PML_FAIL(err, PML_BUSY,
                          "%s is of process %d, and process %d is the run's coordinator now: ask "
                          "again",
                          path, c->pid, holder);
    if (status == PML_PEER)
        return pml_error_prefix(err, "%s is left over", path), PML_PEER;
    return status;
}

pml_status pml_connection_parse(const char *text, size_t size, pml_connection *connection,
                                pml_error *err)
{
    pml_message *m;
    pml_status status = pml_message_parse_as(PML_FILE_connection, text, size, &m, err);
    if (status != PML_OK)
        return status;
    fill(m, connection);
    pml_message_destroy(&m);
    return PML_OK;
}

pml_status pml_connection_read(const char *path, pml_connection *connection, pml_error *err)
{
    char *text;
    size_t size;
    pml_status status = read_private(path, &text, &size, err);
    if (status != PML_OK)
        return status;
    status = pml_connection_parse(text, size, connection, err);
    sodium_memzero(text, size);
    free(text);
    if (status != PML_OK) {
        pml_error_prefix(err, "%s", path);
        return status;
    }
    status = check_alive(path, connection, err);
    if (status != PML_OK)
        pml_keypair_forget(&connection->keys);
    return status;
}

/* By what they are, not by their paths: a bind mount gives a folder two. One that cannot be seen
 * from here (a container's) is not told from another. */
static bool differ(const char *a, const char *b)
{
    struct stat one, other;
    return stat(a, &one) == 0 && stat(b, &other) == 0 &&
           (one.st_dev != other.st_dev || one.st_ino != other.st_ino);
}

/* Where a coordinator is, the lock's holder says; of a folder from somebody else that may be
 * anybody, and name the coordinator of another run of ours: who comes to steer this one must not
 * steer that. */
pml_status pml_connection_find(const char *run_folder, char *path, size_t capacity, pml_error *err)
{
    char folder[PATH_MAX];
    pml_connection found;
    pml_status status = pml_runtime_find(run_folder, folder, sizeof folder, err);
    if (status == PML_OK)
        status = pml_path_join(path, capacity, folder, "connection.json", err);
    if (status != PML_OK)
        return status;
    status = pml_connection_read(path, &found, err);
    if (status == PML_NOT_FOUND)
        return PML_FAIL(err, PML_BUSY,
                        "the coordinator of this run is just starting or ending; ask again");
    if (status != PML_OK)
        return status;
    pml_keypair_forget(&found.keys);
    if (differ(run_folder, found.run))
        return PML_FAIL(err, PML_DENIED,
                        "%s/lock leads to the coordinator of another run, %s: this folder is not "
                        "what it seems; attach to that run by its own name",
                        run_folder, found.run);
    return PML_OK;
}
