/* Inside of the search: candidates, and what its parts (plan.c, offload_search.c) share. */
#ifndef PML_PLAN_SEARCH_H
#define PML_PLAN_SEARCH_H

#include "pml/plan/program.h"
#include "pml/plan/rates.h"

typedef struct pmli_tried pmli_tried;

typedef struct pmli_search {
    const pml_model_spec *spec;
    const pml_train_config *config;
    const pml_backend *backend;
    size_t available;     /* bytes, 0: no limit */
    size_t host;          /* bytes of host memory that activations may wait in; 0: none */
    int32_t moments_8bit; /* as pml_plan_choices */
    pml_rates rates;
    pmli_tried *tried; /* what pmli_estimate was asked for, of one batch's limits; or NULL */
} pmli_search;

/* Two clocks: ops follow one another, copies to and from the host follow one another beside them,
 * each no earlier than it was asked for; an await brings the first to where the second is. */
typedef struct pmli_clocks {
    double ops, link;    /* now */
    double busy, waited; /* of the link; of the ops for it */
} pmli_clocks;
void pmli_advance(pmli_clocks *clocks, pml_op op, double seconds);

enum { PMLI_SMALLEST_CHUNK = 8, PMLI_CHUNK_STEP = 4 /* chunks shrink by */ };
enum { PMLI_CPU_CHUNK = 512 /* rows that a product on the CPU gains by */ };

/* Build one candidate and keep its numbers. */
pml_status pmli_try_plan(const pmli_search *s, const pml_batch_limits *limits,
                         const pml_plan_choices *choices, bool estimate, pml_plan *plan,
                         pml_error *err);
/* The same without places, once for the same choices: a search comes by most of them several times,
 * and all of it is done again where places took more than was estimated. */
pml_status pmli_estimate(const pmli_search *s, const pml_batch_limits *limits,
                         const pml_plan_choices *choices, pml_plan *plan, pml_error *err);
pml_status pmli_tried_new(pmli_tried **tried, pml_error *err);
void pmli_tried_destroy(pmli_tried **tried);
/* Where the last estimate's program is kept, whose tables the next is built in. */
pml_program **pmli_tried_spare(pmli_tried *tried);

/* On the device, and what waits on the host there. */
bool pmli_plan_fits(const pmli_search *s, const pml_plan *plan);

/* Chunks shrink from the widest; more rows than there are labels gain nothing. */
int32_t pmli_widest_chunk(const pmli_search *s, const pml_batch_limits *limits);
int32_t pmli_most_pieces(const pml_batch_limits *limits);

/* The cheapest recompute with which the other choices fit: the lowest level, and of it the fewest
 * layers, since memory falls and seconds rise as both rise. *found = false when nothing does, or
 * where it is seen on the way that it will not take less than `below` seconds. */
pml_status pmli_least_recompute(const pmli_search *s, const pml_batch_limits *limits,
                                pml_plan_choices choices, double below, pml_plan *plan, bool *found,
                                pml_error *err);

/* Whether a narrower chunk of the head can do better than *plan, the best with its chunk: even with
 * the narrowest, does anything that costs less fit? Not where the fullest moment is another. */
pml_status pmli_chunk_matters(const pmli_search *s, const pml_batch_limits *limits,
                              const pml_plan *plan, bool *matters, pml_error *err);

/* Whether quantised weights may be unpacked, or turned round, for good: not on the CPU, where what
 * is left is the host's. */
bool pmli_may_unpack(const pmli_search *s);
/* As many weights unpacked for good as what is left holds: all, or the most that fit. None where
 * not even all would bring *plan below so many seconds. */
pml_status pmli_unpack_most(const pmli_search *s, const pml_batch_limits *limits, bool estimate,
                            double below, pml_plan *plan, pml_error *err);

/* Host memory that this worker's activations may wait in: 0 where none are to, a backend's memory
 * is the host's anyway, or it has no op to move them. */
pml_status pmli_host_room(const pml_train_config *config, const pml_backend *backend, size_t *bytes,
                          pml_error *err);

/* A plan that is faster than *plan (or any that fits, where *any is false) because layers wait in
 * host memory; left alone where there is none. */
pml_status pmli_search_offload(const pmli_search *s, const pml_batch_limits *limits, pml_plan *plan,
                               bool *any, pml_error *err);

#endif
