/* What every kind of collective has in common, and the one for a single worker. */
#include <stdlib.h>

#include "comm_internal.h"

static void self_destroy(pml_comm **comm)
{
    free(*comm);
}

static pml_status self_barrier(pml_comm *comm, pml_error *err)
{
    (void)comm, (void)err;
    return PML_OK;
}

static pml_status self_gather(pml_comm *comm, const pml_header *mine, pml_header *all,
                              pml_error *err)
{
    (void)comm, (void)err;
    all[0] = *mine;
    return PML_OK;
}

static pml_status self_f32(pml_comm *comm, float *values, size_t n, pml_error *err)
{
    (void)comm, (void)values, (void)n, (void)err;
    return PML_OK;
}

static pml_status self_f64(pml_comm *comm, double *values, size_t n, pml_error *err)
{
    (void)comm, (void)values, (void)n, (void)err;
    return PML_OK;
}

static pml_comm_place self_where(const pml_comm *comm)
{
    (void)comm;
    return (pml_comm_place){0, -1};
}

static const pmli_comm_kind self_kind = {self_destroy, self_barrier, self_gather,
                                         self_f32,     self_f64,     self_where};

pml_status pml_comm_self(pml_comm **comm, pml_error *err)
{
    *comm = malloc(sizeof **comm);
    if (*comm == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the collectives");
    **comm = (pml_comm){&self_kind, 0, 1};
    return PML_OK;
}

void pml_comm_destroy(pml_comm **comm)
{
    if (*comm != NULL)
        (*comm)->kind->destroy(comm);
    *comm = NULL;
}

pml_comm_place pml_comm_where(const pml_comm *comm)
{
    return comm->kind->where(comm);
}

int pml_comm_rank(const pml_comm *comm)
{
    return comm->rank;
}

int pml_comm_world(const pml_comm *comm)
{
    return comm->world;
}

pml_status pml_comm_barrier(pml_comm *comm, pml_error *err)
{
    return comm->kind->barrier(comm, err);
}

pml_status pml_comm_header(pml_comm *comm, pml_header *header, pml_error *err)
{
    pml_header all[PMLI_WORLD_MAX];
    pml_status status = comm->kind->gather(comm, header, all, err);
    if (status != PML_OK)
        return status;
    pml_header sum = all[0];
    for (int r = 1; r < comm->world; r++) {
        const pml_header *h = &all[r];
        if (h->step != sum.step)
            return PML_FAIL(err, PML_INTERNAL, "rank %d is at step %lld, rank 0 at %lld", r,
                            (long long)h->step, (long long)sum.step);
        sum.labels += h->labels;
        sum.tokens += h->tokens;
        sum.committed = h->committed > sum.committed ? h->committed : sum.committed;
        sum.flags |= h->flags;
        sum.seconds = h->seconds > sum.seconds ? h->seconds : sum.seconds;
    }
    *header = sum;
    return PML_OK;
}

pml_status pml_comm_allreduce_f32(pml_comm *comm, float *values, size_t n, pml_error *err)
{
    return comm->kind->allreduce_f32(comm, values, n, err);
}

pml_status pml_comm_allreduce_f64(pml_comm *comm, double *values, size_t n, pml_error *err)
{
    return comm->kind->allreduce_f64(comm, values, n, err);
}
