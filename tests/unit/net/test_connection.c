/* Runtime folder, lock and connection file: whose they must be, and what is refused. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "pml/base/file.h"
#include "pml/net/connection.h"

typedef struct place {
    char root[64], run[100], runtime[200], file[256];
    int lock;
} place;

/* A file system that has no locks, for files below this prefix; "" = every one has them. */
static char lockless[128];
/* Called once, at the moment in which a lock was taken and nothing else was done. */
static void (*when_locked)(void);

int fcntl(int fd, int command, ...)
{
    va_list args;
    va_start(args, command);
    void *argument = va_arg(args, void *);
    va_end(args);
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = lockless[0] == '\0' ? 0 : readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = '\0';
    if ((command == F_OFD_SETLK || command == F_OFD_GETLK) && lockless[0] != '\0' &&
        strncmp(path, lockless, strlen(lockless)) == 0) {
        errno = ENOLCK;
        return -1;
    }
    int result = (int)syscall(SYS_fcntl, fd, command, argument);
    void (*call)(void) = when_locked;
    if (command == F_OFD_SETLK && result == 0 && call != NULL) {
        when_locked = NULL;
        call();
    }
    return result;
}

static void take(place *p)
{
    pml_error err = PML_ERROR_INIT;
    if (pml_runtime_take(p->run, p->runtime, sizeof p->runtime, &p->lock, &err) != PML_OK)
        fail_msg("%s", err.message);
}

static int set_up(void **state)
{
    place *p = calloc(1, sizeof *p);
    p->lock = -1;
    snprintf(p->root, sizeof p->root, "/tmp/pml-test-XXXXXX");
    assert_non_null(mkdtemp(p->root));
    setenv("XDG_RUNTIME_DIR", p->root, 1);
    snprintf(p->run, sizeof p->run, "%s/run", p->root);
    assert_int_equal(mkdir(p->run, 0755), 0);
    assert_int_equal(pml_runtime_path(p->run, p->runtime, sizeof p->runtime, NULL), PML_OK);
    snprintf(p->file, sizeof p->file, "%s/connection.json", p->runtime);
    *state = p;
    return 0;
}

static int tear_down(void **state)
{
    place *p = *state;
    lockless[0] = '\0';
    if (p->lock >= 0)
        pml_runtime_leave(p->runtime, &p->lock);
    pml_tree_remove("/tmp", p->root + 5, NULL);
    free(p);
    return 0;
}

static pml_connection some_connection(const place *p)
{
    pml_connection c = {.pid = (int)getpid(), .role = PML_ROLE_CONTROL};
    pml_keypair server;
    assert_int_equal(pml_keypair_new(&c.keys, NULL), PML_OK);
    assert_int_equal(pml_keypair_new(&server, NULL), PML_OK);
    memcpy(c.server_key, server.public_key, sizeof c.server_key);
    snprintf(c.run, sizeof c.run, "%s", p->run);
    snprintf(c.control, sizeof c.control, "ipc://%s/ctl", p->runtime);
    snprintf(c.telemetry, sizeof c.telemetry, "ipc://%s/pub", p->runtime);
    return c;
}

static void keys_differ(void **state)
{
    (void)state;
    pml_keypair a, b;
    assert_int_equal(pml_keypair_new(&a, NULL), PML_OK);
    assert_int_equal(pml_keypair_new(&b, NULL), PML_OK);
    assert_int_equal(strlen(a.public_key), PML_KEY_TEXT - 1);
    assert_int_equal(strlen(a.secret_key), PML_KEY_TEXT - 1);
    assert_string_not_equal(a.secret_key, b.secret_key);
    pml_keypair_forget(&a);
    for (int i = 0; i < PML_KEY_TEXT; i++)
        assert_int_equal(a.secret_key[i], 0);
}

static void one_folder_for_every_path(void **state)
{
    place *p = *state;
    char around[200], link[100], path[200];
    snprintf(around, sizeof around, "%s/./../run/", p->run);
    assert_int_equal(pml_runtime_path(around, path, sizeof path, NULL), PML_OK);
    assert_string_equal(path, p->runtime);
    snprintf(link, sizeof link, "%s/link", p->root);
    assert_int_equal(symlink(p->run, link), 0);
    assert_int_equal(pml_runtime_path(link, path, sizeof path, NULL), PML_OK);
    assert_string_equal(path, p->runtime);
    assert_int_equal(pml_runtime_path("/nowhere/run", path, sizeof path, NULL), PML_NOT_FOUND);
}

/* A runtime folder that is too long for a socket, or not ours alone, is not used. */
static void unusable_places_are_passed_over(void **state)
{
    place *p = *state;
    char path[200], want[64], deep[300];
    snprintf(want, sizeof want, "/tmp/pml-%u/", (unsigned)geteuid());
    snprintf(deep, sizeof deep, "%s/%080d", p->root, 1);
    assert_int_equal(mkdir(deep, 0700), 0);
    setenv("XDG_RUNTIME_DIR", deep, 1);
    assert_int_equal(pml_runtime_path(p->run, path, sizeof path, NULL), PML_OK);
    assert_memory_equal(path, want, strlen(want));
    setenv("XDG_RUNTIME_DIR", p->run, 1); /* mode 755 */
    assert_int_equal(pml_runtime_path(p->run, path, sizeof path, NULL), PML_OK);
    assert_memory_equal(path, want, strlen(want));
    unsetenv("XDG_RUNTIME_DIR");
    assert_int_equal(pml_runtime_path(p->run, path, sizeof path, NULL), PML_OK);
    assert_memory_equal(path, want, strlen(want));
}

/* What lies where the runtime folder goes and is not ours alone is not used. */
static void an_open_folder_is_refused(void **state)
{
    place *p = *state;
    char path[200], parent[200];
    pml_error err = PML_ERROR_INIT;
    snprintf(parent, sizeof parent, "%s/pml", p->root);
    assert_int_equal(mkdir(parent, 0700), 0);
    assert_int_equal(mkdir(p->runtime, 0700), 0);
    assert_int_equal(chmod(p->runtime, 0750), 0);
    assert_int_equal(pml_runtime_take(p->run, path, sizeof path, &p->lock, &err), PML_DENIED);
    assert_non_null(strstr(err.message, "750"));
    assert_int_equal(p->lock, -1);
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_PEER); /* let go */
    assert_int_equal(rmdir(p->runtime), 0);
    assert_int_equal(symlink(p->root, p->runtime), 0);
    assert_int_equal(pml_runtime_take(p->run, path, sizeof path, &p->lock, &err), PML_DENIED);
    assert_int_equal(unlink(p->runtime), 0);
    take(p);
    struct stat st;
    assert_int_equal(stat(p->runtime, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
}

static void the_lock_ends_with_its_holder(void **state)
{
    place *p = *state;
    int other;
    char path[200];
    struct stat st;
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_NOT_FOUND);
    take(p);
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_OK);
    assert_string_equal(path, p->runtime);
    assert_int_equal(pml_runtime_take(p->run, path, sizeof path, &other, NULL), PML_BUSY);
    pml_runtime_leave(p->runtime, &p->lock);
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_PEER);
    assert_int_equal(stat(p->runtime, &st), -1); /* nothing stays behind */
    pid_t child = fork();
    if (child == 0) {
        if (pml_runtime_take(p->run, path, sizeof path, &other, NULL) != PML_OK)
            _exit(1);
        kill(getpid(), SIGKILL);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_PEER);
    take(p);
}

static const place *looked_at;

static void nobody_is_found(void)
{
    char path[200];
    pml_connection c;
    assert_int_equal(pml_runtime_find(looked_at->run, path, sizeof path, NULL), PML_BUSY);
    assert_int_equal(access(looked_at->file, F_OK), 0); /* of the one before */
    assert_int_equal(pml_connection_read(looked_at->file, &c, NULL), PML_BUSY);
    assert_int_equal(pml_connection_find(looked_at->run, path, sizeof path, NULL), PML_BUSY);
}

/* At no moment of a change of coordinators are the keys of the one before found: who came with them
 * would be turned away for good. */
static void what_was_left_leads_nowhere(void **state)
{
    place *p = *state;
    pml_connection c = some_connection(p), found;
    take(p);
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK);
    assert_int_equal(pml_connection_read(p->file, &found, NULL), PML_OK);
    close(p->lock); /* as SIGKILL does */
    assert_int_equal(pml_connection_read(p->file, &found, NULL), PML_PEER);
    looked_at = p;
    when_locked = nobody_is_found;
    take(p);
    assert_true(when_locked == NULL);
    assert_int_equal(pml_connection_read(p->file, &found, NULL), PML_NOT_FOUND);
    c.pid++; /* as for one who has read the file before it went, and asks for the lock only now */
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK);
    assert_int_equal(pml_connection_read(p->file, &found, NULL), PML_BUSY);
}

/* The lock and the folder are found from cron, from sudo and from a kernel, whatever each has for
 * an environment; what a killed coordinator left in another place is removed. */
static void one_place_whoever_asks(void **state)
{
    place *p = *state;
    char path[200], second[100], left[200];
    int other;
    take(p);
    snprintf(left, sizeof left, "%s", p->runtime);
    snprintf(second, sizeof second, "%s/other", p->root);
    assert_int_equal(mkdir(second, 0700), 0);
    const char *const environments[] = {NULL, second, "/nowhere", ""};
    for (size_t i = 0; i < 4; i++) {
        if (environments[i] == NULL)
            unsetenv("XDG_RUNTIME_DIR");
        else
            setenv("XDG_RUNTIME_DIR", environments[i], 1);
        assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_OK);
        assert_string_equal(path, left);
        assert_int_equal(pml_runtime_take(p->run, path, sizeof path, &other, NULL), PML_BUSY);
    }
    close(p->lock); /* as SIGKILL does: the folder stays */
    assert_int_equal(access(left, F_OK), 0);
    setenv("XDG_RUNTIME_DIR", second, 1);
    take(p);
    assert_memory_equal(p->runtime, second, strlen(second));
    assert_int_equal(access(left, F_OK), -1);
}

/* A copied run folder has a copy of the lock's words, and they are another run's. */
static void a_copied_folder_takes_nothing_away(void **state)
{
    place *p = *state;
    char copy[120], from[120], to[140], path[200], *text;
    size_t size;
    int other;
    take(p);
    snprintf(copy, sizeof copy, "%s/copy", p->root);
    snprintf(from, sizeof from, "%s/lock", p->run);
    snprintf(to, sizeof to, "%s/lock", copy);
    assert_int_equal(mkdir(copy, 0700), 0);
    assert_int_equal(pml_file_read(from, 4096, false, &text, &size, NULL), PML_OK);
    assert_int_equal(pml_file_write(to, text, size, 0600, NULL), PML_OK);
    free(text);
    assert_int_equal(pml_runtime_find(copy, path, sizeof path, NULL), PML_PEER);
    assert_int_equal(pml_runtime_take(copy, path, sizeof path, &other, NULL), PML_OK);
    assert_int_equal(access(p->runtime, F_OK), 0);
    assert_string_not_equal(path, p->runtime);
    pml_runtime_leave(path, &other);
}

/* A run folder is moved away under its coordinator, and another made where it was. */
static void two_runs_of_one_path_have_two_places(void **state)
{
    place *p = *state;
    char moved[120], path[200];
    int other;
    take(p);
    snprintf(moved, sizeof moved, "%s/moved", p->root);
    assert_int_equal(rename(p->run, moved), 0);
    assert_int_equal(mkdir(p->run, 0700), 0);
    assert_int_equal(pml_runtime_take(p->run, path, sizeof path, &other, NULL), PML_OK);
    assert_string_not_equal(path, p->runtime);
    pml_runtime_leave(path, &other);
    assert_int_equal(access(p->runtime, F_OK), 0);
    assert_int_equal(pml_runtime_find(moved, path, sizeof path, NULL), PML_OK);
    assert_string_equal(path, p->runtime);
}

/* What was put in the place of the runtime folder is not used: who made it would have our sockets.
 */
static void what_is_open_to_others_is_not_kept(void **state)
{
    place *p = *state;
    pml_error err = PML_ERROR_INIT;
    take(p);
    assert_int_equal(pml_runtime_keep(p->run, p->runtime, sizeof p->runtime, &p->lock, &err),
                     PML_OK);
    assert_int_equal(chmod(p->runtime, 0755), 0);
    assert_int_equal(pml_runtime_keep(p->run, p->runtime, sizeof p->runtime, &p->lock, &err),
                     PML_DENIED);
    assert_non_null(strstr(err.message, "is open to others"));
    assert_int_equal(chmod(p->runtime, 0700), 0);
    assert_int_equal(pml_runtime_keep(p->run, p->runtime, sizeof p->runtime, &p->lock, &err),
                     PML_OK);
}

/* A run folder on a file system without locks: one place for every environment still. */
static void without_locks_there_is_another_place(void **state)
{
    place *p = *state;
    char path[200];
    int other;
    snprintf(lockless, sizeof lockless, "%s/", p->run);
    take(p);
    unsetenv("XDG_RUNTIME_DIR");
    assert_int_equal(pml_runtime_take(p->run, path, sizeof path, &other, NULL), PML_BUSY);
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_OK);
    assert_string_equal(path, p->runtime);
    pml_runtime_leave(p->runtime, &p->lock);
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_PEER);
}

/* A lock that somebody has prepared: a link, a pipe, or words that point elsewhere. */
static void a_prepared_lock_is_refused(void **state)
{
    place *p = *state;
    char lock[120], path[200];
    int fd;
    snprintf(lock, sizeof lock, "%s/lock", p->run);
    assert_int_equal(symlink("/etc/passwd", lock), 0);
    assert_int_equal(pml_runtime_take(p->run, path, sizeof path, &fd, NULL), PML_DENIED);
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_DENIED);
    assert_int_equal(unlink(lock), 0);
    assert_int_equal(mkfifo(lock, 0600), 0);
    assert_int_equal(pml_runtime_find(p->run, path, sizeof path, NULL), PML_DENIED);
    assert_int_equal(unlink(lock), 0);
    take(p);
    static const char *const words[] = {
        "",         "/tmp",        "relative\n1 h\n",
        "/\n1 h\n", "/tmp\n1 h\n", "/nowhere/0123456789abcdef\n1 h\n"};
    const pml_status expected[] = {PML_BUSY, PML_BUSY, PML_BUSY, PML_DENIED, PML_DENIED, PML_BUSY};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        assert_int_equal(ftruncate(p->lock, 0), 0);
        assert_int_equal(pwrite(p->lock, words[i], strlen(words[i]), 0), strlen(words[i]));
        pml_status status = pml_runtime_find(p->run, path, sizeof path, NULL);
        /* root owns / and /tmp; they are open to others all the same */
        assert_int_equal(status, expected[i]);
    }
}

/* Somebody's folder, whose lock somebody holds: it names the coordinator of a run of ours. */
static void a_lock_leads_to_no_other_run(void **state)
{
    place *p = *state;
    char theirs[120], path[200], file[256], link[120], text[300];
    int lock;
    pml_connection c = some_connection(p);
    pml_error err = PML_ERROR_INIT;
    take(p);
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK);
    snprintf(theirs, sizeof theirs, "%s/theirs", p->root);
    assert_int_equal(mkdir(theirs, 0700), 0);
    assert_int_equal(pml_runtime_take(theirs, path, sizeof path, &lock, NULL), PML_OK);
    int n = snprintf(text, sizeof text, "%s\n1 h\n", p->runtime);
    assert_int_equal(ftruncate(lock, 0), 0);
    assert_int_equal(pwrite(lock, text, (size_t)n, 0), n);
    assert_int_equal(pml_connection_find(theirs, file, sizeof file, &err), PML_DENIED);
    assert_non_null(strstr(err.message, "theirs/lock leads to the coordinator of another run"));
    close(lock);
    pml_tree_remove(p->root, path + strlen(p->root) + 1, NULL);
    /* Another path to the run itself is none. */
    snprintf(link, sizeof link, "%s/link", p->root);
    assert_int_equal(symlink(p->run, link), 0);
    assert_int_equal(pml_connection_find(link, file, sizeof file, NULL), PML_OK);
    assert_string_equal(file, p->file);
}

static void the_file_reads_back(void **state)
{
    place *p = *state;
    pml_connection c = some_connection(p), back;
    struct stat st;
    char file[256];
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_NOT_FOUND);
    assert_int_equal(pml_connection_find(p->run, file, sizeof file, NULL), PML_NOT_FOUND);
    take(p);
    assert_int_equal(pml_connection_find(p->run, file, sizeof file, NULL), PML_BUSY);
    umask(0);
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK);
    assert_int_equal(pml_connection_find(p->run, file, sizeof file, NULL), PML_OK);
    assert_string_equal(file, p->file);
    assert_int_equal(lstat(p->file, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK); /* replaces it */
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_OK);
    assert_string_equal(back.control, c.control);
    assert_string_equal(back.telemetry, c.telemetry);
    assert_string_equal(back.server_key, c.server_key);
    assert_string_equal(back.keys.public_key, c.keys.public_key);
    assert_string_equal(back.keys.secret_key, c.keys.secret_key);
    assert_int_equal(back.role, PML_ROLE_CONTROL);
    assert_int_equal(back.pid, getpid());
    close(p->lock);
    p->lock = -1;
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_PEER); /* left over */
    assert_int_equal(back.keys.secret_key[0], 0);
    snprintf(c.control, sizeof c.control, "tcp://127.0.0.1:1"); /* only a connection can tell */
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK);
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_OK);
}

static void what_is_not_ours_alone_is_refused(void **state)
{
    place *p = *state;
    pml_connection c = some_connection(p), back;
    char elsewhere[200], parent[200];
    snprintf(parent, sizeof parent, "%s/pml", p->root);
    assert_int_equal(mkdir(parent, 0700), 0);
    assert_int_equal(mkdir(p->runtime, 0700), 0);
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK);
    assert_int_equal(chmod(p->file, 0640), 0);
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_DENIED);
    assert_int_equal(chmod(p->file, 0600), 0);
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_OK); /* no lock: by process */
    snprintf(elsewhere, sizeof elsewhere, "%s/elsewhere", p->root);
    assert_int_equal(rename(p->file, elsewhere), 0);
    assert_int_equal(symlink(elsewhere, p->file), 0);
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_DENIED);
    assert_int_equal(unlink(p->file), 0);
    assert_int_equal(mkfifo(p->file, 0600), 0); /* does not hang either */
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_DENIED);
    assert_int_equal(unlink(p->file), 0);
    assert_int_equal(pml_file_write(p->file, "{\"format\":1}", 12, 0600, NULL), PML_OK);
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_INVALID);
    assert_int_equal(pml_file_write(p->file, "{", 1, 0600, NULL), PML_OK);
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_CORRUPT);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(keys_differ),
        TEST(one_folder_for_every_path),
        TEST(unusable_places_are_passed_over),
        TEST(an_open_folder_is_refused),
        TEST(the_lock_ends_with_its_holder),
        TEST(what_was_left_leads_nowhere),
        TEST(one_place_whoever_asks),
        TEST(a_lock_leads_to_no_other_run),
        TEST(a_copied_folder_takes_nothing_away),
        TEST(two_runs_of_one_path_have_two_places),
        TEST(what_is_open_to_others_is_not_kept),
        TEST(without_locks_there_is_another_place),
        TEST(a_prepared_lock_is_refused),
        TEST(the_file_reads_back),
        TEST(what_is_not_ours_alone_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
