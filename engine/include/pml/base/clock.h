/* Clocks. Durations and deadlines use the monotonic one, which does not jump when the date is set;
 * records that people read use unix time. */
#ifndef PML_BASE_CLOCK_H
#define PML_BASE_CLOCK_H

/* Seconds since some fixed moment of this boot. Comparable between processes of one machine. */
double pml_clock_monotonic(void);

/* Seconds since 1970-01-01 UTC, with fractions. */
double pml_clock_unix(void);

/* Sleep at least so long, through interruptions by signals. */
void pml_clock_sleep(double seconds);

#endif
