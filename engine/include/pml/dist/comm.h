/* Collectives between the workers of one run. One interface; shared memory on a machine's CPUs now,
 * NCCL for GPUs behind the same functions. Every worker calls the same functions in the same
 * order. Sums are made in rank order, so they do not depend on timing.
 *
 * A worker that has gone (its lease broke, or the coordinator raised the abort flag) turns every
 * wait into PML_PEER within a second; nothing waits for ever. */
#ifndef PML_DIST_COMM_H
#define PML_DIST_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"

typedef struct pml_comm pml_comm;

/* The step header: one small collective at the start of each optimizer step, 128 bytes a rank. */
typedef struct pml_header {
    int64_t labels;    /* labelled tokens of this rank in the coming step; result: the sum */
    int64_t tokens;    /* all tokens, likewise */
    int64_t committed; /* sequence number of the last committed command known here; result: the
                          maximum */
    int64_t step;      /* must agree on all ranks, else PML_INTERNAL */
    int64_t flags;     /* result: bitwise or */
    double seconds;    /* of the last step; result: the maximum */
    int64_t reserved[10];
} pml_header;

/* One worker: no memory, no waiting. */
pml_status pml_comm_self(pml_comm **comm, pml_error *err);

/* Bytes of shared memory that `world` workers need (pml_comm_shared maps so much of the memfd). */
size_t pml_comm_shared_bytes(int world);

/* Create the memfd (close-on-exec, sealed against shrinking) that the coordinator hands to its
 * workers. */
pml_status pml_comm_shared_create(int world, int *fd, pml_error *err);

/* Join over a memfd made by pml_comm_shared_create. Does not close fd. */
pml_status pml_comm_shared(int fd, int rank, int world, pml_comm **comm, pml_error *err);

/* Wake every waiter of this memfd with PML_PEER, for good. For the coordinator; safe at any time.
 */
pml_status pml_comm_shared_abort(int fd, pml_error *err);

void pml_comm_destroy(pml_comm **comm);

/* Which of how many: rank in [0, world). */
int pml_comm_rank(const pml_comm *comm);
int pml_comm_world(const pml_comm *comm);

/* Every rank calls the same collectives in the same order; each returns when all have come.
 * PML_PEER: one is gone. */
pml_status pml_comm_barrier(pml_comm *comm, pml_error *err);
pml_status pml_comm_header(pml_comm *comm, pml_header *header, pml_error *err);

/* Where a rank is, for another thread than the one that calls collectives. Nobody is waited for
 * who has come as far as the one that waits, so of those that wait for each other's work at least
 * one waits for nobody: that is the one that all others wait for. */
typedef struct pml_comm_place {
    uint64_t moves; /* grows with each wait that it came to or left */
    int waits_for;  /* the first rank that has not come to where it waits now; -1: none */
} pml_comm_place;
pml_comm_place pml_comm_where(const pml_comm *comm);

/* values[n] summed in place over ranks, in rank order. */
pml_status pml_comm_allreduce_f32(pml_comm *comm, float *values, size_t n, pml_error *err);
pml_status pml_comm_allreduce_f64(pml_comm *comm, double *values, size_t n, pml_error *err);

#endif
