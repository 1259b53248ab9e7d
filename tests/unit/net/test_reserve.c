/* Device memory that runs reserve: between processes and across their deaths. */
#include "pml/net/reserve.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/net/pass.h"
#include "reserve_bytes.h"
#include "reserve_fixture.h"

/* ---- counting ---- */

static void what_is_not_taken_is_pending(void **state)
{
    (void)state;
    pml_reservation *a = open_as("/runs/a", 1000, -1), *b = open_as("/runs/b", 1000, -1);
    EXPECT_OK(pml_reservation_resize(a, 600 * MIB, e));
    expect(a, 600, 0, 0);
    expect(b, 0, 600, 600);
    EXPECT_FAIL(PML_NO_MEMORY, "other runs have reserved 600, and 401 are wanted",
                pml_reservation_resize(b, 401 * MIB, e));
    expect(b, 0, 600, 600);
    EXPECT_OK(pml_reservation_take(a, 550 * MIB, e));
    expect(b, 0, 600, 50);
    EXPECT_OK(pml_reservation_resize(b, 399 * MIB + 1, e)); /* a part is a whole one */
    expect(b, 400, 600, 50);
    expect(a, 600, 400, 400);

    /* It shrinks, and another's grows into what lies between. */
    EXPECT_OK(pml_reservation_resize(a, 300 * MIB, e));
    EXPECT_OK(pml_reservation_take(a, 300 * MIB, e));
    EXPECT_OK(pml_reservation_resize(b, 700 * MIB, e));
    expect(a, 300, 700, 700);
    EXPECT_OK(pml_reservation_resize(b, 350 * MIB, e));
    EXPECT_OK(pml_reservation_resize(a, 650 * MIB, e));
    expect(b, 350, 650, 350);
    EXPECT_OK(pml_reservation_take(a, 0, e));
    expect(b, 350, 650, 650);
    pml_reservation_destroy(&a);
    expect(b, 350, 0, 0);
    pml_reservation_destroy(&b);
    assert_int_equal(holders(NULL), 0);
}

static void it_says_who_has_it(void **state)
{
    (void)state;
    char words[500];
    pml_holder found[2];
    pml_reserved sum;
    size_t n;
    pml_reservation *a = open_as("/runs/a b", 10000, -1), *b = open_as("/runs/b", 10000, -1);
    pml_reservation_words(b, words, sizeof words);
    assert_string_equal(words, "");
    EXPECT_OK(pml_reservation_resize(a, 2048 * MIB, e));
    EXPECT_OK(pml_reservation_resize(a, 3072 * MIB, e));
    pml_reservation_words(a, words, sizeof words);
    assert_string_equal(words, "");
    pml_reservation_words(b, words, sizeof words);
    assert_non_null(strstr(words, "the run a b (process "));
    assert_non_null(strstr(words, ") has reserved 3.0 GiB"));
    EXPECT_OK(pml_reservation_resize(b, 5 * MIB, e));
    EXPECT_OK(pml_reservation_look(scratch_root, uuid, found, 2, &n, &sum, e));
    assert_int_equal(n, 2);
    assert_string_equal(found[0].run, "/runs/a b");
    assert_int_equal(found[0].pid, getpid());
    assert_int_equal(found[1].bytes, 5 * MIB);
    assert_int_equal(sum.others, 3077 * MIB);
    assert_int_equal(sum.pending, 3077 * MIB);
    pml_reservation_destroy(&a);
    EXPECT_OK(pml_reservation_look(scratch_root, uuid, found, 2, &n, NULL, e));
    assert_int_equal(n, 1); /* behind a byte that nobody has */
    assert_string_equal(found[0].run, "/runs/b");
    pml_reservation_destroy(&b);
    EXPECT_OK(pml_reservation_look(scratch_root, "another", found, 2, &n, &sum, e));
    assert_int_equal(n + sum.others, 0);
}

/* Of one run with several workers on a device each knows the others. */
static void its_own_run_is_nobody_else(void **state)
{
    (void)state;
    char words[500];
    pml_reservation *a = open_as("/runs/a", 1000, -1), *b = open_as("/runs/a", 1000, -1);
    EXPECT_OK(pml_reservation_resize(a, 600 * MIB, e));
    pml_reservation_words(b, words, sizeof words);
    assert_string_equal(words, "");
    expect(b, 0, 600, 600);
    EXPECT_OK(pml_reservation_resize(a, 0, e)); /* and who has nothing is not told of */
    pml_reservation *c = open_as("/runs/c", 1000, -1);
    pml_reservation_words(c, words, sizeof words);
    assert_string_equal(words, "");
    assert_int_equal(holders(NULL), 0);
    pml_reservation_destroy(&a);
    pml_reservation_destroy(&b);
    pml_reservation_destroy(&c);
}

/* One more than there are names for: it counts, and says why it is not told of; a name that is free
 * again is its. */
static void there_are_fewer_names_than_runs(void **state)
{
    (void)state;
    pml_reserved sum;
    pml_reservation *all[PML_HOLDERS_MAX + 1], *last;
    for (int i = 0; i <= PML_HOLDERS_MAX; i++) {
        last = all[i] = open_as("/runs/one", 1000, -1);
        EXPECT_OK(pml_reservation_resize(last, MIB, e));
        if (i < PML_HOLDERS_MAX)
            assert_string_equal(pml_reservation_unnamed(last), "");
    }
    assert_string_equal(pml_reservation_unnamed(last),
                        "256 others have reserved memory of this device");
    assert_int_equal(holders(&sum), PML_HOLDERS_MAX);
    assert_int_equal(sum.others / MIB, PML_HOLDERS_MAX + 1);
    pml_reservation_destroy(&all[7]);
    EXPECT_OK(pml_reservation_resize(last, 3 * MIB, e));
    assert_string_equal(pml_reservation_unnamed(last), "");
    assert_int_equal(holders(&sum), PML_HOLDERS_MAX);
    assert_int_equal(sum.others / MIB, PML_HOLDERS_MAX + 2);
    for (int i = 0; i <= PML_HOLDERS_MAX; i++)
        pml_reservation_destroy(&all[i]);
    assert_int_equal(holders(NULL), 0);
}

/* ---- deaths ---- */

/* A worker: reserves and takes, passes its reservation on, says when, and waits to be killed. */
static pid_t begin_worker(int lease, int said, int inherited, bool turn)
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    pml_reservation *r = open_as("/runs/worker", 1000, inherited);
    bool well = inherited >= 0 || (pml_reservation_resize(r, 600 * MIB, NULL) == PML_OK &&
                                   pml_reservation_take(r, 500 * MIB, NULL) == PML_OK);
    if (turn)
        well = well && pml_reservation_turn(r, long_enough, NULL, NULL, NULL) == PML_OK;
    well = well && pml_pass_send(lease, pml_reservation_descriptor(r), NULL) == PML_OK;
    if (well && inherited >= 0) {
        pml_reserved now;
        well = pml_reservation_turn(r, long_enough, NULL, NULL, NULL) == PML_OK &&
               pml_reservation_read(r, &now, NULL) == PML_OK && now.ours == 600 * MIB &&
               now.others == 0;
        pml_reservation_turn_end(r);
    }
    if (well && write(said, "", 1) == 1)
        pause();
    _exit(1);
}

static void end_worker(pid_t pid)
{
    int status;
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void it_ends_with_its_last_holder(void **state)
{
    (void)state;
    int lease[2], said[2], held;
    char byte[8];
    pml_reservation *other = open_as("/runs/other", 1000, -1);
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, lease), 0);
    assert_int_equal(pipe(said), 0);
    pid_t worker = begin_worker(lease[1], said[1], -1, true);
    assert_int_equal(read(said[0], byte, 1), 1);
    expect(other, 0, 600, 100);

    /* Killed before anybody looked: its turn is over, and what it had taken is the driver's again,
     * so all of the reservation is pending. */
    end_worker(worker);
    EXPECT_OK(pml_reservation_turn(other, long_enough, NULL, NULL, e));
    pml_reservation_turn_end(other);
    expect(other, 0, 600, 600);
    assert_int_equal(pml_pass_receive(lease[0], byte, sizeof byte, &held), 1);
    assert_true(held >= 0);
    expect(other, 0, 600, 600);
    assert_int_equal(holders(NULL), 1);

    /* Who replaces it has it again, under one name, and nothing of it is missing for itself. */
    worker = begin_worker(lease[1], said[1], held, false);
    assert_int_equal(read(said[0], byte, 1), 1);
    assert_int_equal(holders(NULL), 1);
    expect(other, 0, 600, 600);

    /* The coordinator dies: the worker keeps it. */
    int again;
    assert_int_equal(pml_pass_receive(lease[0], byte, sizeof byte, &again), 1);
    close(held);
    close(again);
    expect(other, 0, 600, 600);
    end_worker(worker);
    expect(other, 0, 0, 0);
    assert_int_equal(holders(NULL), 0);
    pml_reservation_destroy(&other);
    for (int i = 0; i < 2; i++) {
        close(lease[i]);
        close(said[i]);
    }
}

/* ---- the order in which a killed process gives up what it has ---- */

enum { DRIVERS = 100, OURS = 512, ABOVE = 700, SLOW_BYTES = 64 << 20 };

/* A lock of `file` by descriptor `number` stands for memory that a driver frees when its file is
 * closed; between it and what is taken lies a file whose end takes long (memory that nobody has
 * mapped), so that who asks at the end of the one sees whether the other's is still to come. */
static bool be_a_driver(const char *file, int number)
{
    const int between = (number + OURS) / 2; /* OURS: from where reserve.c takes its own */
    int fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    int slow = memfd_create("slow", MFD_CLOEXEC);
    const struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
    return fd >= 0 && fcntl(fd, F_DUPFD_CLOEXEC, number) == number && close(fd) == 0 &&
           fcntl(number, F_OFD_SETLK, &whole) == 0 && fallocate(slow, 0, 0, SLOW_BYTES) == 0 &&
           fcntl(slow, F_DUPFD_CLOEXEC, between) == between && close(slow) == 0;
}

/* A worker with 500 MiB taken, whose driver's file has this descriptor, is killed: what others see
 * as taken when its memory is free. */
static size_t taken_when_free(int number)
{
    int said[2], lease[2], held, status;
    char byte[8];
    char file[600];
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
    pml_reserved now;
    snprintf(file, sizeof file, "%s", scratch("driver"));
    pml_reservation *other = open_as("/runs/other", 1000, -1);
    assert_int_equal(pipe(said), 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, lease), 0);
    pid_t pid = fork();
    if (pid == 0) {
        pml_reservation *r = open_as("/runs/worker", 1000, -1);
        if (be_a_driver(file, number) && pml_reservation_resize(r, 500 * MIB, NULL) == PML_OK &&
            pml_reservation_take(r, 500 * MIB, NULL) == PML_OK &&
            pml_pass_send(lease[1], pml_reservation_descriptor(r), NULL) == PML_OK &&
            write(said[1], "", 1) == 1)
            pause();
        _exit(1);
    }
    assert_int_equal(read(said[0], byte, 1), 1);
    assert_int_equal(pml_pass_receive(lease[0], byte, sizeof byte, &held), 1);
    expect(other, 0, 500, 0);
    int fd = open(file, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    kill(pid, SIGKILL);
    assert_int_equal(fcntl(fd, F_OFD_SETLKW, &whole), 0);
    now = read_of(other);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status));
    expect(other, 0, 500, 500); /* the coordinator holds it */
    for (int i = 0; i < 2; i++) {
        close(said[i]);
        close(lease[i]);
    }
    close(held);
    close(fd);
    pml_reservation_destroy(&other);
    return (now.others - now.pending) / MIB;
}

/* Nobody plans with memory that is free and counted as taken, so as nobody's, too. With the
 * driver's file above ours it would be so: the order is the kernel's, and this test sees it. */
static void memory_is_not_free_before_it_is_pending(void **state)
{
    (void)state;
    for (int i = 0; i < 5; i++)
        assert_int_equal(taken_when_free(DRIVERS), 0);
    /* It is one moment, for which we have to get a processor in time: as often as that takes. */
    const double until = pml_clock_monotonic() + 5 * long_enough;
    size_t taken = 0;
    while (taken == 0 && pml_clock_monotonic() < until)
        taken = taken_when_free(ABOVE);
    assert_int_equal(taken, 500);
}

static void a_stopped_one_is_named(void **state)
{
    (void)state;
    int lease[2], said[2];
    char byte, words[100];
    pml_reservation *other = open_as("/runs/other", 1000, -1);
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, lease), 0);
    assert_int_equal(pipe(said), 0);
    pid_t worker = begin_worker(lease[1], said[1], -1, true);
    assert_int_equal(read(said[0], &byte, 1), 1);
    kill(worker, SIGSTOP);
    snprintf(words, sizeof words, "the run worker (process %d) has been planning", (int)worker);
    EXPECT_FAIL(PML_BUSY, words, pml_reservation_turn(other, 0.02, NULL, NULL, e));
    EXPECT_FAIL(PML_BUSY, "stopped, or take another device",
                pml_reservation_turn(other, 0, NULL, NULL, e));
    end_worker(worker);
    EXPECT_OK(pml_reservation_turn(other, long_enough, NULL, NULL, e));
    pml_reservation_destroy(&other);
    for (int i = 0; i < 2; i++) {
        close(lease[i]);
        close(said[i]);
    }
}

/* A file that says who has the turn, and who has it by it. */
typedef struct crowd {
    int fd, looks, end;
} crowd;

/* Who has it ends, and another one has it, at each look; the last one ends. */
static void next_in_the_line(void *user)
{
    crowd *c = user;
    pml_error err = PML_ERROR_INIT;
    pml_status status =
        ++c->looks < c->end
            ? pmli_name_set(c->fd, PML_HOLDERS_MAX, 0, 1000 + c->looks, "/runs/line", &err)
            : pmli_bytes_set(c->fd, PMLI_TURN_AT, 0, 1, false, &err);
    if (status != PML_OK)
        fail_msg("%s", err.message);
}

static void begin_crowd(crowd *c)
{
    pml_error err = PML_ERROR_INIT;
    c->fd = open(scratch(uuid), O_RDWR | O_CLOEXEC);
    assert_true(c->fd >= 0);
    if (pmli_bytes_set(c->fd, PMLI_TURN_AT, 0, 1, true, &err) != PML_OK ||
        pmli_name_set(c->fd, PML_HOLDERS_MAX, 0, 1000, "/runs/line", &err) != PML_OK)
        fail_msg("%s", err.message);
}

static void a_long_line_is_nobodys_fault(void **state)
{
    (void)state;
    crowd c = {.end = 200};
    pml_reservation *r = open_as("/runs/last", 1000, -1);
    begin_crowd(&c);
    EXPECT_OK(pml_reservation_turn(r, 1e-9, next_in_the_line, &c, e));
    assert_int_equal(c.looks, c.end);
    pml_reservation_turn_end(r);
    pml_reservation_destroy(&r);
    close(c.fd);
}

/* It is away, and then the one who has the turn ends. */
static void be_away(void *user)
{
    crowd *c = user;
    if (++c->looks == 1)
        pml_clock_sleep(2.5);
    else
        pmli_bytes_set(c->fd, PMLI_TURN_AT, 0, 1, false, NULL);
}

static void ones_own_absence_counts_for_nobody(void **state)
{
    (void)state;
    crowd c = {0};
    pml_reservation *r = open_as("/runs/away", 1000, -1);
    begin_crowd(&c);
    /* Half a second of it counts, as of any absence: also of one before it, while nobody let us. */
    EXPECT_OK(pml_reservation_turn(r, 2, be_away, &c, e));
    assert_int_equal(c.looks, 2);
    pml_reservation_turn_end(r);
    pml_reservation_destroy(&r);
    close(c.fd);
}

/* ---- all at once ---- */

enum { PROCESSES = 100, ROUNDS = 6, DEVICE = 3000, FOREIGN = 1700 };

/* A driver: who has allocated how much, and whether it was ever more than there is. */
typedef struct driver {
    _Atomic long free, refused, planned;
    _Atomic int had[PROCESSES];
} driver;

static unsigned draw(unsigned *seed, unsigned below)
{
    *seed = *seed * 1664525 + 1013904223;
    return (*seed >> 8) % below;
}

/* One run: asks, plans, allocates a while later, is done or dies at any of these points. */
static bool one_run(driver *d, int who, pml_reservation *r, unsigned *seed, bool dies)
{
    pml_reserved now;
    unsigned death = dies ? draw(seed, 4) : 4;
    if (pml_reservation_turn(r, long_enough, NULL, NULL, NULL) != PML_OK)
        return false;
    if (death == 0)
        raise(SIGKILL);
    long left = atomic_load(&d->free);
    usleep(draw(seed, 100));
    if (pml_reservation_read(r, &now, NULL) != PML_OK)
        return false;
    left -= (long)(now.pending / MIB);
    long unreserved = DEVICE - (long)(now.others / MIB);
    left = left < unreserved ? left : unreserved;
    long wanted = 1 + (long)draw(seed, 200);
    bool fits = wanted <= left;
    if (fits && pml_reservation_resize(r, (size_t)wanted * MIB, NULL) != PML_OK)
        return false; /* what is left can be reserved */
    pml_reservation_turn_end(r);
    if (!fits)
        return true;
    if (death == 1)
        raise(SIGKILL);
    usleep(draw(seed, 2000));
    atomic_fetch_add(&d->planned, 1);
    if (atomic_fetch_sub(&d->free, wanted) < wanted)
        atomic_fetch_add(&d->refused, 1);
    atomic_store(&d->had[who], (int)wanted);
    if (death == 2)
        raise(SIGKILL);
    if (pml_reservation_take(r, (size_t)wanted * MIB, NULL) != PML_OK)
        return false;
    usleep(draw(seed, 2000));
    if (death == 3)
        raise(SIGKILL);
    bool well = pml_reservation_take(r, 0, NULL) == PML_OK;
    atomic_store(&d->had[who], 0);
    atomic_fetch_add(&d->free, wanted);
    return well && pml_reservation_resize(r, 0, NULL) == PML_OK;
}

static int index_of(const pid_t *pids, pid_t pid)
{
    for (int i = 0; i < PROCESSES; i++)
        if (pids[i] == pid)
            return i;
    fail_msg("process %d is no run", (int)pid);
    return -1;
}

/* We hold each run's reservation, as a coordinator does, until the driver has what it had: memory
 * of a killed one that is neither free nor reserved would be planned with by who has asked the
 * driver before it was allocated. */
static void a_hundred_never_plan_the_same(void **state)
{
    (void)state;
    pml_reserved sum;
    driver *d = mmap(NULL, sizeof *d, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(d != MAP_FAILED);
    atomic_store(&d->free, DEVICE - FOREIGN); /* of which reservations know nothing */
    pid_t pids[PROCESSES] = {0};
    int held[PROCESSES];
    for (int i = 0; i < PROCESSES; i++) {
        held[i] = open(scratch(uuid), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        assert_true(held[i] >= 0);
        pids[i] = fork();
        if (pids[i] == 0) {
            for (int other = 0; other < i; other++)
                close(held[other]);
            unsigned seed = (unsigned)i * 7919 + 1;
            pml_reservation *r = open_as("/runs/one", DEVICE, held[i]);
            bool well = true;
            for (int n = 0; n < ROUNDS && well; n++)
                well = one_run(d, i, r, &seed, n == ROUNDS - 1 && i % 4 == 0);
            _exit(well ? 0 : 1);
        }
    }
    int killed = 0;
    for (int n = 0, status; n < PROCESSES; n++) {
        int i = index_of(pids, wait(&status));
        killed += WIFSIGNALED(status);
        if (!WIFSIGNALED(status))
            assert_int_equal(WEXITSTATUS(status), 0);
        atomic_fetch_add(&d->free, atomic_exchange(&d->had[i], 0)); /* as a driver does */
        close(held[i]);
    }
    assert_int_equal(atomic_load(&d->refused), 0);
    assert_true(atomic_load(&d->planned) > PROCESSES);
    assert_true(killed > 0);
    assert_int_equal(holders(&sum), 0);
    assert_int_equal(sum.others, 0);
    munmap(d, sizeof *d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(what_is_not_taken_is_pending, remove_file),
        cmocka_unit_test_teardown(it_says_who_has_it, remove_file),
        cmocka_unit_test_teardown(its_own_run_is_nobody_else, remove_file),
        cmocka_unit_test_teardown(there_are_fewer_names_than_runs, remove_file),
        cmocka_unit_test_teardown(it_ends_with_its_last_holder, remove_file),
        cmocka_unit_test_teardown(memory_is_not_free_before_it_is_pending, remove_file),
        cmocka_unit_test_teardown(a_stopped_one_is_named, remove_file),
        cmocka_unit_test_teardown(a_long_line_is_nobodys_fault, remove_file),
        cmocka_unit_test_teardown(ones_own_absence_counts_for_nobody, remove_file),
        cmocka_unit_test_teardown(a_hundred_never_plan_the_same, remove_file),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
