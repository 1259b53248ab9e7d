/* Places where device memory cannot be reserved, or only without a name. */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/net/pass.h"
#include "reserve_fixture.h"

static pml_status try(const char *folder, const char *device, pml_error *err)
{
    pml_reservation *r = NULL;
    const pml_reservation_options options = {
        .folder = folder, .device = device, .run = "/runs/a", .total = MIB, .inherited = -1};
    pml_status status = pml_reservation_new(&options, &r, err);
    assert_true((status == PML_OK) == (r != NULL));
    pml_reservation_destroy(&r);
    return status;
}

static void a_strangers_file_is_not_used(void **state)
{
    (void)state;
    const char *path = scratch(uuid);
    char target[600], kept[8] = "";
    snprintf(target, sizeof target, "%s", scratch("target"));
    put_text(target, "kept");
    assert_int_equal(symlink(target, path), 0);
    EXPECT_FAIL(PML_DENIED, "is a link, which is not followed here: remove it",
                try(scratch_root, uuid, e));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkfifo(path, 0600), 0);
    EXPECT_FAIL(PML_DENIED, "is not a regular file", try(scratch_root, uuid, e));
    assert_int_equal(unlink(path), 0);
    put_text(path, "");
    assert_int_equal(chmod(path, 0644), 0);
    EXPECT_FAIL(PML_DENIED, "is not yours alone", try(scratch_root, uuid, e));
    assert_int_equal(chmod(path, 0600), 0);
    EXPECT_OK(try(scratch_root, uuid, e));
    if (geteuid() == 0) { /* else nobody can give a file away */
        assert_int_equal(chown(path, 12345, 12345), 0);
        EXPECT_FAIL(PML_DENIED, "is not yours alone", try(scratch_root, uuid, e));
    }
    EXPECT_FAIL(PML_INVALID, "is no name", try(scratch_root, "../target", e));
    EXPECT_FAIL(PML_INVALID, "is no name", try(scratch_root, "", e));
    FILE *file = fopen(target, "r");
    assert_non_null(fgets(kept, sizeof kept, file));
    fclose(file);
    assert_string_equal(kept, "kept");
}

/* As a read-only disk answers: nothing can be made there, by root neither. */
static void a_folder_that_takes_no_file(void **state)
{
    (void)state;
    EXPECT_FAIL(PML_NOT_FOUND, uuid, try("/proc/self/fdinfo", uuid, e));
    EXPECT_FAIL(PML_NOT_FOUND, uuid, try(scratch("nowhere"), uuid, e));
}

/* The bytes of text are refused, as by a full disk; bytes that are locked take none. */
static void a_full_disk_takes_the_name_only(void **state)
{
    (void)state;
    const struct rlimit none = {0, 0};
    int said[2], status;
    char byte;
    pml_reservation *other = open_as("/runs/other", 1000, -1);
    /* What another one has left in its place, and in that of the turn, is not its name. */
    EXPECT_OK(pml_reservation_turn(other, long_enough, NULL, NULL, e));
    EXPECT_OK(pml_reservation_resize(other, 300 * MIB, e));
    pml_reservation_destroy(&other);
    other = open_as("/runs/other", 1000, -1);
    assert_int_equal(pipe(said), 0);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGXFSZ, SIG_IGN);
        pml_reservation *r = open_as("/runs/full", 1000, -1);
        if (setrlimit(RLIMIT_FSIZE, &none) != 0 ||
            pml_reservation_turn(r, long_enough, NULL, NULL, NULL) != PML_OK ||
            pml_reservation_resize(r, 400 * MIB, NULL) != PML_OK ||
            strstr(pml_reservation_unnamed(r), "cannot say in the device's file") == NULL ||
            write(said[1], "", 1) != 1)
            _exit(1);
        pause();
    }
    assert_int_equal(read(said[0], &byte, 1), 1);
    expect(other, 0, 400, 400);
    assert_int_equal(holders(NULL), 0); /* that have a name */
    EXPECT_FAIL(PML_BUSY, "another run has been planning",
                pml_reservation_turn(other, 0, NULL, NULL, e));
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    expect(other, 0, 0, 0);
    pml_reservation_destroy(&other);
    close(said[0]);
    close(said[1]);
}

/* In a process whose kernel answers as NFS without a lock service does. */
static int without_locks(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fcntl, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, F_OFD_GETLK, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, F_OFD_SETLK, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOLCK),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_fprog program = {sizeof code / sizeof *code, code};
    pml_error err = PML_ERROR_INIT;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) != 0)
        return 2;
    pml_status status = try(scratch_root, uuid, &err);
    return status == PML_UNSUPPORTED && strstr(err.message, "does not lock") != NULL ? 0 : 1;
}

static void a_disk_without_locks_is_told(void **state)
{
    (void)state;
    int status;
    pid_t pid = fork();
    if (pid == 0)
        _exit(without_locks());
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 2)
        skip(); /* no system call can be refused here */
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* The name has come to be a smaller device's, and its file has an older one's text. */
static void a_recycled_name(void **state)
{
    (void)state;
    pml_holder stale = {0};
    size_t n;
    pml_reservation *large = open_as("/runs/large", 1000, -1);
    EXPECT_OK(pml_reservation_resize(large, 900 * MIB, e));
    pml_reservation *small = open_as("/runs/small", 500, -1);
    expect(small, 0, 900, 900);
    EXPECT_FAIL(PML_NO_MEMORY, "500 MiB other runs have reserved 900",
                pml_reservation_resize(small, MIB, e));
    pml_reservation_destroy(&large);
    EXPECT_OK(pml_reservation_look(scratch_root, uuid, &stale, 1, &n, NULL, e));
    assert_int_equal(n, 0); /* its words are there, and it is not */
    EXPECT_OK(pml_reservation_resize(small, 500 * MIB, e));

    /* The file was swept away and is another: what is inherited is of the old one. */
    int old = fcntl(pml_reservation_descriptor(small), F_DUPFD_CLOEXEC, 0);
    pml_reservation_destroy(&small);
    assert_int_equal(unlink(scratch(uuid)), 0);
    small = open_as("/runs/small", 500, old);
    expect(small, 0, 0, 0);
    assert_false(pml_reservation_inherited(small));

    /* And of this one it is the same. */
    EXPECT_OK(pml_reservation_resize(small, 300 * MIB, e));
    old = fcntl(pml_reservation_descriptor(small), F_DUPFD_CLOEXEC, 0);
    pml_reservation_destroy(&small);
    small = open_as("/runs/small", 500, old);
    assert_true(pml_reservation_inherited(small));
    EXPECT_OK(pml_reservation_turn(small, long_enough, NULL, NULL, e));
    expect(small, 300, 0, 0);
    assert_true(pml_reservation_inherited(small));
    pml_reservation_destroy(&small);
}

/* It is told from words, and from nothing. */
static void a_descriptor_without_room_is_lost(void **state)
{
    (void)state;
    int lease[2], got;
    char byte[8];
    struct rlimit before, none;
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, lease), 0);
    EXPECT_OK(pml_pass_send(lease[1], lease[1], e));
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    none.rlim_cur = 0;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    ssize_t n = pml_pass_receive(lease[0], byte, sizeof byte, &got);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(n, 1);
    assert_int_equal(got, PML_PASS_LOST);
    assert_int_equal(send(lease[1], "word", 4, 0), 4);
    assert_int_equal(pml_pass_receive(lease[0], byte, sizeof byte, &got), 4);
    assert_int_equal(got, -1);
    EXPECT_OK(pml_pass_send(lease[1], lease[1], e));
    assert_int_equal(pml_pass_receive(lease[0], byte, sizeof byte, &got), 1);
    assert_true(got >= 0);
    close(got);
    close(lease[0]);
    close(lease[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(a_strangers_file_is_not_used, remove_file),
        cmocka_unit_test(a_folder_that_takes_no_file),
        cmocka_unit_test_teardown(a_full_disk_takes_the_name_only, remove_file),
        cmocka_unit_test_teardown(a_disk_without_locks_is_told, remove_file),
        cmocka_unit_test_teardown(a_recycled_name, remove_file),
        cmocka_unit_test(a_descriptor_without_room_is_lost),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
