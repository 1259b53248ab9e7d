/* Plans of cuDNN's attention, one a shape, kept to the end: who builds them, who waits for that and
 * who does without. Knows nothing of cuDNN: sdpa.cc is the builder, tests have their own.
 *
 * cuDNN takes 0.7 s and more to build one that the driver does not have kept. So a thread of its
 * own builds what steps will want (pml_backend.prepare), and who can do without a plan meanwhile
 * does (docs/decisions/0115, 0131). */
#ifndef PMLI_CUDA_SDPA_PLANS_H
#define PMLI_CUDA_SDPA_PLANS_H

#include "sdpa.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pmli_sdpa_plans pmli_sdpa_plans;

typedef struct pmli_sdpa_plan {
    pmli_sdpa_shape shape;
    void *graph; /* the builder's; NULL: cuDNN has none */
    size_t workspace;
} pmli_sdpa_plan;

enum { PMLI_SDPA_WHY = 512 };

/* build: graph and workspace of a shape, or false and why there is none. drop: of a graph. */
typedef struct pmli_sdpa_builder {
    bool (*build)(void *user, pmli_sdpa_plan *plan, char why[PMLI_SDPA_WHY]);
    void (*drop)(void *graph);
    void *user; /* outlives the plans */
} pmli_sdpa_builder;

/* Without any plan yet. PML_NO_MEMORY. */
pml_status pmli_sdpa_plans_new(const pmli_sdpa_builder *builder, pmli_sdpa_plans **plans,
                               pml_error *err);
void pmli_sdpa_plans_destroy(pmli_sdpa_plans **plans);

/* A shape's plan, built if there is none yet, with all plans and cuDNN's handle to the caller alone
 * until pmli_sdpa_plans_release. *plan = NULL, and nothing to release, where no plan serves: cuDNN
 * has none, or it wants more than `room` bytes of workspace; each is logged once, with the reason.
 * And, unless `waits`, while another thread builds, or (pmli_sdpa_plans_ahead) is about to and this
 * plan is not built yet; this is logged the first time. PML_NO_MEMORY. Any thread. */
pml_status pmli_sdpa_plans_take(pmli_sdpa_plans *plans, const pmli_sdpa_shape *shape, size_t room,
                                bool waits, const pmli_sdpa_plan **plan, pml_error *err);
void pmli_sdpa_plans_release(pmli_sdpa_plans *plans);

/* Why the last shape that has no plan has none; "": each has one, also if it is too large. *some:
 * there is a plan of another shape, so it is not that none can be built. */
void pmli_sdpa_plans_refused(pmli_sdpa_plans *plans, char why[PMLI_SDPA_WHY], bool *some);

/* From on to off a thread builds plans one after the other, and between two of them, too, nobody
 * else begins to who need not wait. */
void pmli_sdpa_plans_ahead(pmli_sdpa_plans *plans, bool on);

#ifdef __cplusplus
}
#endif
#endif
