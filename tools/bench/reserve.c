/* What reserving a device's memory costs the start of a run, beside runs that are there already.
 *
 *   bench_reserve [FOLDER]    (of device files; a temporary one in /tmp)
 *
 * All that a worker does for it: the file opened, a turn for its context, a turn in which it asks
 * and reserves its plan, and what is taken. Median and worst of 200, in microseconds. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/net/reserve.h"

enum { TIMES = 200, MOST = 64, TOTAL_MIB = 143771 /* an H200's */ };

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error e = PML_ERROR_INIT, *err = &e;                                                   \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "%s\n", e.message);                                                    \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static pml_reservation *reserve(const char *folder, size_t mib)
{
    const pml_reservation_options options = {.folder = folder,
                                             .device = "bench",
                                             .run = "/runs/bench",
                                             .total = (size_t)TOTAL_MIB << 20,
                                             .inherited = -1};
    const size_t parts[] = {580, mib};
    pml_reservation *r;
    pml_reserved now;
    MUST(pml_reservation_new(&options, &r, err));
    for (int i = 0; i < 2; i++) {
        MUST(pml_reservation_turn(r, 10, NULL, NULL, err));
        MUST(pml_reservation_read(r, &now, err));
        MUST(pml_reservation_resize(r, parts[i] << 20, err));
        pml_reservation_turn_end(r);
    }
    MUST(pml_reservation_take(r, (mib - 50) << 20, err));
    return r;
}

static int by_size(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static void measure(const char *folder, int others)
{
    pml_reservation *there[MOST];
    double seconds[TIMES];
    for (int i = 0; i < others; i++)
        there[i] = reserve(folder, 1000);
    for (int i = 0; i < TIMES; i++) {
        double begin = pml_clock_monotonic();
        pml_reservation *r = reserve(folder, 20000);
        seconds[i] = pml_clock_monotonic() - begin;
        pml_reservation_destroy(&r);
    }
    qsort(seconds, TIMES, sizeof *seconds, by_size);
    printf("beside %d runs: median %.0f us, worst %.0f us\n", others, seconds[TIMES / 2] * 1e6,
           seconds[TIMES - 1] * 1e6);
    for (int i = 0; i < others; i++)
        pml_reservation_destroy(&there[i]);
}

int main(int argc, char **argv)
{
    char own[] = "/tmp/pml-bench-XXXXXX";
    const char *folder = argc > 1 ? argv[1] : mkdtemp(own);
    if (folder == NULL)
        return 1;
    measure(folder, 0);
    measure(folder, 1);
    measure(folder, 8);
    measure(folder, MOST);
    MUST(pml_tree_remove(folder, "bench", err));
    return argc > 1 || rmdir(own) == 0 ? 0 : 1;
}
