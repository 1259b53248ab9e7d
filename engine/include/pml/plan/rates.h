/* Rates: how fast each kind of op runs, so that plans can be compared. Only ratios matter for that;
 * the seconds that come out are an estimate for a machine like the one that was measured.
 *
 * The tables for the CPU and for CUDA are in engine/src/plan/rates.c, each with where and when it
 * was measured. Another is taken from the file that $PANTHERAML_RATES names:
 *
 *     {"linear": {"gflops": 170, "gbytes": 40, "microseconds": 5}, …} */
#ifndef PML_PLAN_RATES_H
#define PML_PLAN_RATES_H

#include "pml/plan/program.h"

typedef struct pml_rate {
    double flops, bytes; /* a second, at most */
    double seconds;      /* of every call, before the first of them */
} pml_rate;

typedef struct pml_rates {
    pml_rate op[PML_OP_COUNT];
    double laid;      /* seconds an element of a weight that a product lays out anew */
    double narrow;    /* so many times as fast are products of two factors in 8 bits */
    char source[256]; /* what was measured, when, and where that is written; or a file's name */
} pml_rates;

/* The file's where there is one (ops it does not name keep the built-in rate), else the backend's.
 */
pml_status pml_rates_get(const char *backend, pml_rates *rates, pml_error *err);

/* The same from text; name is used in messages. */
pml_status pml_rates_parse(const char *text, size_t size, const char *name, pml_rates *rates,
                           pml_error *err);

/* A call takes as long as its slower half: arithmetic or memory. */
double pml_rates_seconds(const pml_rates *rates, pml_op op, pml_cost cost);

#endif
