/* Memory that runs out: every allocation of a piece of work refused, one at a time, whoever asks
 * for it. For tests that are linked with the shim (tests/shim/nomem.c). */
#ifndef PML_TESTS_NO_MEMORY_H
#define PML_TESTS_NO_MEMORY_H

#include "nomem.h"
#include "pml/base/error.h"

/* The work with an allocation refused; whether one was. */
static inline bool work_without(pml_status (*work)(pml_error *err), long number, bool for_good)
{
    pml_error err = PML_ERROR_INIT;
    nomem_watch(NULL);
    long before = nomem_live();
    nomem_refuse(number, for_good);
    pml_status status = work(&err);
    long left = nomem_live() - before;
    nomem_watch_nothing();
    if (status != PML_OK && status != PML_NO_MEMORY)
        fail_msg("allocation %ld: %s (%s)", number, pml_status_name(status), err.message);
    if (left != 0)
        fail_msg("allocation %ld: %ld live blocks (%s)", number, left, err.message);
    if (for_good && nomem_refused())
        assert_int_equal(status, PML_NO_MEMORY);
    return nomem_refused();
}

/* The work with its Nth allocation refused, alone and with all that follow, for each N until none
 * is left to refuse: it answers PML_NO_MEMORY, or succeeds where it can do without, and nothing
 * stays allocated. At least `least` allocations are expected. */
static inline void every_allocation(pml_status (*work)(pml_error *err), long least)
{
    pml_error warm = PML_ERROR_INIT; /* what is only set up once */
    if (work(&warm) != PML_OK)
        fail_msg("%s", warm.message);
    long number = 1;
    while (work_without(work, number, false))
        (void)work_without(work, number++, true);
    assert_true(number > least);
}

#endif
