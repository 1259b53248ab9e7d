/* Two snapshots in shared memory, of which one is whole at every moment. */
#include "pml/train/slots.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { BYTES = 300000, STAGE_BYTES = 303104 /* in whole pages */ };

static void put_unsettled(pml_slots *s, int64_t step)
{
    void *payload;
    pml_train_state state = {.step = step, .learning_rate = 1.0 / (double)step};
    assert_int_equal(pml_slots_begin(s, &payload, NULL), PML_OK);
    memset(payload, (int)(step & 0xff), BYTES);
    pml_slots_commit(s, &state);
}

static void put(pml_slots *s, int64_t step)
{
    put_unsettled(s, step);
    assert_int_equal(pml_slots_settle(s, NULL), PML_OK);
}

static unsigned char *new_stage(void)
{
    unsigned char *stage = aligned_alloc(4096, STAGE_BYTES);
    assert_non_null(stage);
    memset(stage, 0xee, STAGE_BYTES);
    return stage;
}

/* The slot holds that step and nothing of another. */
static void check_slot(int fd, int slot, int64_t step)
{
    pml_slot_view v;
    assert_int_equal(pml_slots_map(fd, slot, &v, NULL), PML_OK);
    assert_int_equal(v.state->step, step);
    assert_int_equal(v.bytes, BYTES);
    const unsigned char *bytes = v.payload;
    for (size_t i = 0; i < BYTES; i++)
        if (bytes[i] != (unsigned char)(step & 0xff))
            fail_msg("byte %zu of step %lld is %d", i, (long long)step, bytes[i]);
    pml_slots_unmap(&v);
}

static void the_newest_is_given_and_the_other_forgotten(void **unused)
{
    (void)unused;
    int fd, slot;
    int64_t step;
    pml_slots *s;
    assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
    assert_int_equal(pml_slots_choose(fd, 100, &slot, &step, NULL), PML_OK);
    assert_int_equal(slot, -1); /* nobody has written */
    assert_int_equal(pml_slots_open(fd, BYTES, NULL, &s, NULL), PML_OK);
    assert_int_equal(pml_slots_choose(fd, 100, &slot, &step, NULL), PML_OK);
    assert_int_equal(slot, -1);
    for (int64_t k = 1; k <= 5; k++)
        put(s, k);
    /* Step 5 is not in the log yet: the one before counts, and 5 never happened. */
    assert_int_equal(pml_slots_choose(fd, 4, &slot, &step, NULL), PML_OK);
    assert_int_equal(step, 4);
    check_slot(fd, slot, 4);
    assert_int_equal(pml_slots_choose(fd, 100, &slot, &step, NULL), PML_OK);
    assert_int_equal(step, 4);
    pml_slots_close(&s);

    /* Another writer goes on beside what is left, never over it. */
    assert_int_equal(pml_slots_open(fd, BYTES, NULL, &s, NULL), PML_OK);
    put(s, 5);
    check_slot(fd, slot, 4);
    check_slot(fd, 1 - slot, 5);
    pml_slots_close(&s);
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_slots_open(fd, BYTES + 1, NULL, &s, &err), PML_INVALID);
    assert_null(s);
    close(fd);
}

static void begun_and_not_committed_is_nothing(void **unused)
{
    (void)unused;
    int fd, slot;
    int64_t step;
    pml_slots *s;
    void *payload;
    assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
    assert_int_equal(pml_slots_open(fd, BYTES, NULL, &s, NULL), PML_OK);
    put(s, 7);
    assert_int_equal(pml_slots_begin(s, &payload, NULL), PML_OK);
    memset(payload, 1, BYTES);
    pml_slots_close(&s);
    assert_int_equal(pml_slots_choose(fd, 100, &slot, &step, NULL), PML_OK);
    assert_int_equal(step, 7);
    check_slot(fd, slot, 7);
    pml_slot_view v;
    assert_int_equal(pml_slots_map(fd, 1 - slot, &v, NULL), PML_NOT_FOUND);
    close(fd);
}

/* A checkpoint that is being written from a slot is not written over, however many snapshots come
 * meanwhile, and is what is left when the next one is not finished. */
static void a_held_slot_stays(void **unused)
{
    (void)unused;
    int fd;
    pml_slots *s;
    const pml_train_state *state;
    const void *payload;
    void *begun;
    assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
    assert_int_equal(pml_slots_open(fd, BYTES, NULL, &s, NULL), PML_OK);
    put(s, 1);
    put(s, 2);
    pml_slots_hold(s, &state, &payload);
    for (int64_t k = 3; k <= 6; k++) {
        put(s, k);
        assert_int_equal(state->step, 2);
        assert_int_equal(((const unsigned char *)payload)[BYTES - 1], 2);
    }
    assert_int_equal(pml_slots_begin(s, &begun, NULL), PML_OK);
    assert_ptr_not_equal(begun, payload);
    check_slot(fd, 1, 2);
    pml_slots_release(s);
    put(s, 7);
    put(s, 8); /* nobody holds the other any more */
    check_slot(fd, 0, 7);
    check_slot(fd, 1, 8);
    pml_slots_close(&s);
    close(fd);
}

static size_t status_bytes(const char *format)
{
    FILE *file = fopen("/proc/self/status", "re");
    char line[256];
    size_t kib = 0;
    assert_non_null(file);
    while (fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, format, &kib) == 1)
            break;
    fclose(file);
    return kib * 1024;
}

static size_t shared_bytes(void)
{
    return status_bytes("RssShmem: %zu");
}

static size_t resident_bytes(void)
{
    return shared_bytes() + status_bytes("RssAnon: %zu");
}

/* What the plan counts is there from the beginning, and no snapshot takes more or gives any back.
 */
static void all_of_it_is_resident_always(void **unused)
{
    (void)unused;
#ifdef __SANITIZE_THREAD__
    skip(); /* what it keeps of each page is resident, too, until the page is mapped anew */
#endif
    enum { LARGE = 8 << 20 };
    int fd;
    pml_slots *s;
    void *payload;
    size_t before = shared_bytes();
    assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
    assert_int_equal(pml_slots_open(fd, LARGE, NULL, &s, NULL), PML_OK);
    size_t opened = shared_bytes();
    assert_true(opened - before >= 2 * (size_t)LARGE);
    assert_true(opened - before < 2 * (size_t)LARGE + (1 << 20));
    for (int64_t k = 1; k <= 3; k++) {
        const pml_train_state state = {.step = k};
        assert_int_equal(pml_slots_begin(s, &payload, NULL), PML_OK);
        memset(payload, 1, LARGE);
        assert_int_equal(shared_bytes(), opened);
        pml_slots_commit(s, &state);
        assert_int_equal(shared_bytes(), opened);
    }
    pml_slots_close(&s);
    close(fd);
}

/* A snapshot of the stage is in slot 0 when it is settled, and what the stage's memory is used for
 * after that changes nothing. */
static void a_stage_is_used_otherwise_between(void **unused)
{
    (void)unused;
    int fd, slot;
    int64_t step;
    pml_slots *s;
    pml_slot_view v;
    void *payload;
    unsigned char *stage = new_stage();
    assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
    assert_int_equal(pml_slots_open(fd, BYTES, stage, &s, NULL), PML_OK);
    assert_true(pml_slots_staged(s));
    for (int64_t k = 1; k <= 3; k++) {
        put(s, k);
        memset(stage, 0xdd, STAGE_BYTES); /* a step */
        check_slot(fd, 0, k);
        assert_int_equal(pml_slots_map(fd, 1, &v, NULL), PML_NOT_FOUND);
    }
    assert_int_equal(pml_slots_begin(s, &payload, NULL), PML_OK);
    assert_ptr_equal(payload, stage);
    memset(stage, 4, BYTES); /* begun and not committed */
    pml_slots_drop(s);
    check_slot(fd, 0, 3);
    put_unsettled(s, 5); /* committed, and the log has not got so far */
    pml_slots_drop(s);
    check_slot(fd, 0, 3);
    assert_int_equal(pml_slots_choose(fd, 100, &slot, &step, NULL), PML_OK);
    assert_int_equal(slot, 0);
    assert_int_equal(step, 3);

    const pml_train_state *state;
    put(s, 6);
    pml_slots_hold(s, &state, (const void **)&payload);
    assert_false(pml_slots_room(s)); /* there is no other place for one */
    memset(stage, 0xcc, STAGE_BYTES);
    assert_int_equal(state->step, 6);
    assert_int_equal(((const unsigned char *)payload)[BYTES - 1], 6);
    pml_slots_release(s);
    assert_true(pml_slots_room(s));
    pml_slots_close(&s);
    memset(stage, 0xbb, STAGE_BYTES); /* ordinary memory again */
    check_slot(fd, 0, 6);
    free(stage);
    close(fd);
}

/* Its writer has died before it was settled: the next worker's stage may be elsewhere, so slot 0
 * has it before anybody is told. Where the log lacks its step it never was. */
static void what_is_left_on_a_stage_is_settled(void **unused)
{
    (void)unused;
    for (int64_t known = 1; known <= 2; known++) {
        int fd, slot;
        int64_t step;
        pml_slots *s;
        unsigned char *stage = new_stage();
        assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
        assert_int_equal(pml_slots_open(fd, BYTES, stage, &s, NULL), PML_OK);
        put(s, 1);
        put_unsettled(s, 2);
        pml_slots_close(&s);
        free(stage);
        assert_int_equal(pml_slots_choose(fd, known, &slot, &step, NULL), PML_OK);
        assert_int_equal(slot, 0);
        assert_int_equal(step, known);
        check_slot(fd, 0, known);
        pml_slot_view v;
        assert_int_equal(pml_slots_map(fd, 1, &v, NULL), PML_NOT_FOUND);
        close(fd);
    }
}

/* With a stage a snapshot's memory is taken once: the other's was there before. */
static void a_stage_takes_nothing_more(void **unused)
{
    (void)unused;
#ifdef __SANITIZE_THREAD__
    skip(); /* what it keeps of each page is resident, too, until the page is mapped anew */
#endif
    enum { LARGE = 8 << 20 };
    int fd;
    pml_slots *s;
    unsigned char *stage = aligned_alloc(4096, LARGE);
    assert_non_null(stage);
    memset(stage, 1, LARGE);
    size_t before = resident_bytes();
    assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
    assert_int_equal(pml_slots_open(fd, LARGE, stage, &s, NULL), PML_OK);
    assert_in_range(resident_bytes() - before, LARGE, LARGE + (1 << 20));
    pml_slots_close(&s);
    free(stage);
    close(fd);
}

/* SIGKILL at any moment of a writer that does nothing else; with a stage it uses that between. */
static void a_killed_writer_leaves_a_whole_one(void **unused)
{
    (void)unused;
    srand(20261121);
    for (int round = 0; round < 80; round++) {
        int fd, slot, status, told[2];
        int64_t step, last = 0;
        unsigned char *stage = round % 2 == 0 ? new_stage() : NULL;
        assert_int_equal(pml_slots_create(&fd, NULL), PML_OK);
        assert_int_equal(pipe(told), 0);
        pid_t child = fork();
        if (child == 0) {
            pml_slots *s;
            if (pml_slots_open(fd, BYTES, stage, &s, NULL) != PML_OK)
                _exit(1);
            for (int64_t k = 1;; k++) {
                put(s, k);
                if (stage != NULL)
                    memset(stage, 0xdd, STAGE_BYTES);
                if (write(told[1], &k, sizeof k) != sizeof k)
                    _exit(1);
            }
        }
        close(told[1]);
        int64_t until = 1 + rand() % 5;
        while (last < until && read(told[0], &last, sizeof last) == sizeof last)
            ;
        usleep((useconds_t)(rand() % 300));
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(WTERMSIG(status), SIGKILL);
        while (read(told[0], &last, sizeof last) == sizeof last)
            ;
        close(told[0]);
        assert_int_equal(pml_slots_choose(fd, INT64_MAX, &slot, &step, NULL), PML_OK);
        assert_true(slot >= 0 && (step == last || step == last + 1));
        assert_true(stage == NULL || slot == 0);
        check_slot(fd, slot, step);
        free(stage);
        close(fd);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_newest_is_given_and_the_other_forgotten),
        cmocka_unit_test(begun_and_not_committed_is_nothing),
        cmocka_unit_test(a_held_slot_stays),
        cmocka_unit_test(all_of_it_is_resident_always),
        cmocka_unit_test(a_stage_is_used_otherwise_between),
        cmocka_unit_test(what_is_left_on_a_stage_is_settled),
        cmocka_unit_test(a_stage_takes_nothing_more),
        cmocka_unit_test(a_killed_writer_leaves_a_whole_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
