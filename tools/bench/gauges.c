/* What NVML says of a GPU, and what a reading costs:
 *
 *   bench_gauges 0000:0f:00.0 [READINGS] */
#include <stdio.h>
#include <stdlib.h>

#include "pml/base/clock.h"
#include "pml_op/gauges.h"

int main(int argc, char **argv)
{
    pml_error err = PML_ERROR_INIT;
    pml_gauges *gauges = NULL;
    pml_reading r;
    int n = argc > 2 ? atoi(argv[2]) : 20;
    if (argc < 2 || n < 1) {
        fputs("bench_gauges BUS [READINGS]\n", stderr);
        return EXIT_FAILURE;
    }
    if (pml_gauges_new(argv[1], NULL, &gauges, &err) != PML_OK) {
        fprintf(stderr, "bench_gauges: %s\n", err.message);
        return EXIT_FAILURE;
    }
    double begin = pml_clock_monotonic(), longest = 0;
    for (int i = 0; i < n; i++) {
        double before = pml_clock_monotonic();
        pml_gauges_read(gauges, &r);
        double took = pml_clock_monotonic() - before;
        longest = took > longest ? took : longest;
    }
    double mean = (pml_clock_monotonic() - begin) / n;
    for (int g = 0; g < PML_GAUGE_COUNT; g++)
        if (r.missing[g] == NULL)
            printf("%-14s %.6g\n", pml_gauge_name((pml_gauge)g), r.value[g]);
        else
            printf("%-14s not said: %s\n", pml_gauge_name((pml_gauge)g), r.missing[g]);
    for (int i = 0; pml_throttle_reason(&r, i) != NULL; i++)
        printf("throttled by   %s\n", pml_throttle_reason(&r, i));
    printf("a reading      %.3f ms, the longest of %d %.3f ms\n", 1e3 * mean, n, 1e3 * longest);
    pml_gauges_destroy(&gauges);
    return EXIT_SUCCESS;
}
