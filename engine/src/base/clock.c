#include "pml/base/clock.h"

#include <errno.h>
#include <time.h>

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t); /* cannot fail for the two clocks asked here */
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double pml_clock_monotonic(void)
{
    return now(CLOCK_MONOTONIC);
}

double pml_clock_unix(void)
{
    return now(CLOCK_REALTIME);
}

void pml_clock_sleep(double seconds)
{
    if (!(seconds > 0))
        return;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    time_t whole = (time_t)seconds;
    until.tv_sec += whole;
    until.tv_nsec += (long)((seconds - (double)whole) * 1e9);
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    /* An absolute end, so that signals do not lengthen the sleep. */
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        continue;
}
