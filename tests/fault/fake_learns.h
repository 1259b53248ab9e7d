/* What a fake step leaves behind: one number that depends on every step and every setting used. */
#ifndef PML_TESTS_FAULT_FAKE_LEARNS_H
#define PML_TESTS_FAULT_FAKE_LEARNS_H

#include <stddef.h>
#include <stdint.h>

/* FNV-1a over the step and its settings, on top of what was learnt before (0 at first). */
static inline uint64_t fake_learns(uint64_t learnt, int64_t step, double rate, double decay)
{
    const double used[] = {(double)step, rate, decay};
    for (size_t i = 0; i < sizeof used; i++)
        learnt = (learnt ^ ((const unsigned char *)used)[i]) * 0x100000001b3U;
    return learnt;
}

#endif
