/* What a kind of collective provides; comm.c calls through it. */
#ifndef PML_DIST_COMM_INTERNAL_H
#define PML_DIST_COMM_INTERNAL_H

#include "pml/dist/comm.h"

typedef struct pmli_comm_kind {
    void (*destroy)(pml_comm **comm);
    pml_status (*barrier)(pml_comm *comm, pml_error *err);
    /* all[world] headers, this rank's first filled in at its place. */
    pml_status (*gather)(pml_comm *comm, const pml_header *mine, pml_header *all, pml_error *err);
    pml_status (*allreduce_f32)(pml_comm *comm, float *values, size_t n, pml_error *err);
    pml_status (*allreduce_f64)(pml_comm *comm, double *values, size_t n, pml_error *err);
    /* Thread-safe. */
    pml_comm_place (*where)(const pml_comm *comm);
} pmli_comm_kind;

/* Every kind's struct begins with this. */
struct pml_comm {
    const pmli_comm_kind *kind;
    int rank, world;
};

enum { PMLI_WORLD_MAX = 512 };

#endif
