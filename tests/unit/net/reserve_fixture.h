/* A device's reservations in a folder of the test's own. */
#ifndef TESTS_UNIT_NET_RESERVE_FIXTURE_H
#define TESTS_UNIT_NET_RESERVE_FIXTURE_H

#include "pml/net/reserve.h"
#include "scratch.h"

#define MIB ((size_t)1 << 20)
static const double long_enough = 60; /* only a failure waits so long */
static const char uuid[] = "3f2a0c00-0000-4000-8000-00000000000a";

static inline pml_reservation *open_as(const char *run, size_t total, int inherited)
{
    pml_reservation *r = NULL;
    const pml_reservation_options options = {.folder = scratch_root,
                                             .device = uuid,
                                             .run = run,
                                             .total = total * MIB,
                                             .inherited = inherited};
    EXPECT_OK(pml_reservation_new(&options, &r, e));
    return r;
}

static inline pml_reserved read_of(pml_reservation *r)
{
    pml_reserved now = {0};
    EXPECT_OK(pml_reservation_read(r, &now, e));
    return now;
}

static inline void expect(pml_reservation *r, size_t ours, size_t others, size_t pending)
{
    pml_reserved now = read_of(r);
    assert_int_equal(now.ours / MIB, ours);
    assert_int_equal(now.others / MIB, others);
    assert_int_equal(now.pending / MIB, pending);
}

static inline size_t holders(pml_reserved *sum)
{
    size_t n = 0;
    EXPECT_OK(pml_reservation_look(scratch_root, uuid, NULL, 0, &n, sum, e));
    return n;
}

static inline int remove_file(void **state)
{
    (void)state;
    return pml_tree_remove(scratch_root, uuid, NULL) == PML_OK ? 0 : -1;
}

#endif
