#include "sdpa_plans.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/log.h"

typedef struct kept {
    pmli_sdpa_plan plan;
    bool too_large; /* said */
    struct kept *next;
} kept;

struct pmli_sdpa_plans {
    pmli_sdpa_builder builder;
    kept *first;
    pthread_mutex_t lock; /* of what follows, never for long */
    pthread_cond_t freed;
    enum { FREE, TAKEN, BUILDS } state;
    bool ahead, meanwhile;       /* meanwhile: said */
    char refused[PMLI_SDPA_WHY]; /* why there is no plan of the last shape that has none */
    bool some;                   /* there is one of another shape */
};

pml_status pmli_sdpa_plans_new(const pmli_sdpa_builder *builder, pmli_sdpa_plans **plans,
                               pml_error *err)
{
    pmli_sdpa_plans *p = calloc(1, sizeof *p);
    *plans = NULL;
    if (p == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "%zu bytes for plans of attention", sizeof *p);
    p->builder = *builder;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->freed, NULL);
    *plans = p;
    return PML_OK;
}

void pmli_sdpa_plans_destroy(pmli_sdpa_plans **plans)
{
    pmli_sdpa_plans *p = *plans;
    if (p == NULL)
        return;
    while (p->first != NULL) {
        kept *gone = p->first;
        p->first = gone->next;
        if (gone->plan.graph != NULL)
            p->builder.drop(gone->plan.graph);
        free(gone);
    }
    pthread_cond_destroy(&p->freed);
    pthread_mutex_destroy(&p->lock);
    free(p);
    *plans = NULL;
}

void pmli_sdpa_plans_refused(pmli_sdpa_plans *plans, char why[PMLI_SDPA_WHY], bool *some)
{
    pthread_mutex_lock(&plans->lock);
    memcpy(why, plans->refused, sizeof plans->refused);
    *some = plans->some;
    pthread_mutex_unlock(&plans->lock);
}

void pmli_sdpa_plans_ahead(pmli_sdpa_plans *plans, bool on)
{
    pthread_mutex_lock(&plans->lock);
    plans->ahead = on;
    pthread_mutex_unlock(&plans->lock);
}

static kept *find(const pmli_sdpa_plans *plans, const pmli_sdpa_shape *shape)
{
    for (kept *k = plans->first; k != NULL; k = k->next)
        if (memcmp(&k->plan.shape, shape, sizeof *shape) == 0)
            return k;
    return NULL;
}

/* What serves in cuDNN's place gives the same but for the order of sums, and is slower: nothing
 * that a result would show. */
static void say(const pmli_sdpa_shape *s, const char *why)
{
    pml_log(PML_LOG_WARNING,
            "cuDNN has no plan that serves for attention%s, %lld %sdocuments of at most %lld "
            "rows; what is slower does: %s",
            s->backward ? "'s backward" : "", (long long)s->slots, s->equal ? "equal " : "",
            (long long)s->longest, why);
}

/* With the lock held: somebody does without. The plan is there soon, those losses stay. */
static void say_meanwhile(pmli_sdpa_plans *plans)
{
    if (!plans->meanwhile)
        pml_log(PML_LOG_INFO,
                "attention is by our own kernels until cuDNN's are compiled, here and "
                "where batches of another number of documents come first: such "
                "steps' last bits are theirs (deterministic=True waits)");
    plans->meanwhile = true;
}

/* A new shape's, with the plans to oneself (BUILDS): whether there is one or not, it is kept. */
static kept *build(const pmli_sdpa_plans *plans, const pmli_sdpa_shape *shape,
                   char why[PMLI_SDPA_WHY])
{
    kept *k = calloc(1, sizeof *k);
    if (k == NULL)
        return NULL;
    memcpy(&k->plan.shape, shape, sizeof *shape);
    if (!plans->builder.build(plans->builder.user, &k->plan, why)) {
        k->plan.graph = NULL;
        if (why[0] == '\0')
            snprintf(why, PMLI_SDPA_WHY, "no reason given");
        say(shape, why);
    }
    return k;
}

/* With the lock held: until the plans are this thread's. false: it need not wait so long. */
static bool become_user(pmli_sdpa_plans *plans, bool waits)
{
    while (plans->state != FREE) {
        if (plans->state == BUILDS && !waits)
            return false;
        pthread_cond_wait(&plans->freed, &plans->lock);
    }
    plans->state = TAKEN;
    return true;
}

void pmli_sdpa_plans_release(pmli_sdpa_plans *plans)
{
    pthread_mutex_lock(&plans->lock);
    plans->state = FREE;
    pthread_cond_broadcast(&plans->freed);
    pthread_mutex_unlock(&plans->lock);
}

/* As take, before what serves is looked at: *k = NULL, and nothing to release, without a wait. */
static pml_status find_or_build(pmli_sdpa_plans *plans, const pmli_sdpa_shape *shape, bool waits,
                                kept **k, pml_error *err)
{
    *k = NULL;
    pthread_mutex_lock(&plans->lock);
    bool mine = become_user(plans, waits);
    if (mine)
        *k = find(plans, shape);
    bool builds = mine && *k == NULL && (waits || !plans->ahead);
    if (builds)
        plans->state = BUILDS;
    else if (*k == NULL)
        say_meanwhile(plans);
    pthread_mutex_unlock(&plans->lock);
    if (mine && *k == NULL && !builds)
        pmli_sdpa_plans_release(plans);
    if (!builds)
        return PML_OK;
    char why[PMLI_SDPA_WHY] = "";
    kept *made = build(plans, shape, why);
    if (made == NULL) {
        pmli_sdpa_plans_release(plans);
        return PML_FAIL(err, PML_NO_MEMORY, "%zu bytes for a plan of attention", sizeof *made);
    }
    pthread_mutex_lock(&plans->lock);
    made->next = plans->first;
    plans->first = made;
    if (made->plan.graph == NULL)
        memcpy(plans->refused, why, sizeof why);
    plans->some |= made->plan.graph != NULL;
    plans->state = TAKEN; /* who waits only for builders may wait again */
    pthread_mutex_unlock(&plans->lock);
    *k = made;
    return PML_OK;
}

pml_status pmli_sdpa_plans_take(pmli_sdpa_plans *plans, const pmli_sdpa_shape *shape, size_t room,
                                bool waits, const pmli_sdpa_plan **plan, pml_error *err)
{
    kept *k;
    *plan = NULL;
    pml_status status = find_or_build(plans, shape, waits, &k, err);
    if (status != PML_OK || k == NULL)
        return status;
    bool fits = k->plan.workspace <= room;
    if (k->plan.graph != NULL && !fits && !k->too_large) {
        char why[PMLI_SDPA_WHY];
        snprintf(why, sizeof why, "it wants %zu bytes of workspace and was planned to have %zu",
                 k->plan.workspace, room);
        say(shape, why);
        k->too_large = true;
    }
    if (k->plan.graph != NULL && fits)
        *plan = &k->plan;
    else
        pmli_sdpa_plans_release(plans);
    return PML_OK;
}
