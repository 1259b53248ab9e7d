/* Runtime folder, lock and connection file: whose they must be, and what is refused. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "pml/base/file.h"
#include "pml/net/connection.h"

typedef struct place {
    char root[64], run[100], runtime[200], file[256];
} place;

static int set_up(void **state)
{
    place *p = calloc(1, sizeof *p);
    snprintf(p->root, sizeof p->root, "/tmp/pml-test-XXXXXX");
    assert_non_null(mkdtemp(p->root));
    setenv("XDG_RUNTIME_DIR", p->root, 1);
    snprintf(p->run, sizeof p->run, "%s/run", p->root);
    assert_int_equal(mkdir(p->run, 0755), 0);
    assert_int_equal(pml_runtime_create(p->run, p->runtime, sizeof p->runtime, NULL), PML_OK);
    snprintf(p->file, sizeof p->file, "%s/connection.json", p->runtime);
    *state = p;
    return 0;
}

static int tear_down(void **state)
{
    place *p = *state;
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
    snprintf(c.control, sizeof c.control, "ipc://%s/ctl", p->root);
    snprintf(c.telemetry, sizeof c.telemetry, "ipc://%s/pub", p->root);
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
    struct stat st;
    assert_int_equal(stat(p->runtime, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
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

static void an_open_folder_is_refused(void **state)
{
    place *p = *state;
    char path[200];
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(chmod(p->runtime, 0750), 0);
    assert_int_equal(pml_runtime_create(p->run, path, sizeof path, &err), PML_DENIED);
    assert_non_null(strstr(err.message, "750"));
    assert_int_equal(rmdir(p->runtime), 0);
    assert_int_equal(symlink(p->root, p->runtime), 0);
    assert_int_equal(pml_runtime_create(p->run, path, sizeof path, &err), PML_DENIED);
}

static void the_lock_ends_with_its_holder(void **state)
{
    place *p = *state;
    int fd, other;
    assert_int_equal(pml_runtime_locked(p->runtime, NULL), PML_NOT_FOUND);
    assert_int_equal(pml_runtime_lock(p->runtime, &fd, NULL), PML_OK);
    assert_int_equal(pml_runtime_locked(p->runtime, NULL), PML_OK);
    assert_int_equal(pml_runtime_lock(p->runtime, &other, NULL), PML_BUSY);
    close(fd);
    assert_int_equal(pml_runtime_locked(p->runtime, NULL), PML_PEER);
    pid_t child = fork();
    if (child == 0) {
        if (pml_runtime_lock(p->runtime, &fd, NULL) != PML_OK)
            _exit(1);
        kill(getpid(), SIGKILL);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(pml_runtime_lock(p->runtime, &fd, NULL), PML_OK);
    close(fd);
}

static void the_file_reads_back(void **state)
{
    place *p = *state;
    int fd;
    pml_connection c = some_connection(p), back;
    struct stat st;
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_NOT_FOUND);
    assert_int_equal(pml_runtime_lock(p->runtime, &fd, NULL), PML_OK);
    umask(0);
    assert_int_equal(pml_connection_write(p->runtime, &c, NULL), PML_OK);
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
    close(fd);
    assert_int_equal(pml_connection_read(p->file, &back, NULL), PML_PEER); /* left over */
    assert_int_equal(back.keys.secret_key[0], 0);
}

static void what_is_not_ours_alone_is_refused(void **state)
{
    place *p = *state;
    pml_connection c = some_connection(p), back;
    char elsewhere[200];
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
        TEST(the_file_reads_back),
        TEST(what_is_not_ours_alone_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
