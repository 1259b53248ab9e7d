/* Loop: steps, and what happens between them. */
#ifndef PML_WORKER_LOOP_H
#define PML_WORKER_LOOP_H

#include "job.h"
#include "keeper.h"
#include "link.h"
#include "saver.h"
#include "timing.h"

typedef struct loop {
    const job_kind *kind;
    job *j;
    worker_link *link;
    saver *saver;   /* rank 0 only */
    keeper *keeper; /* likewise */
    pml_comm *comm;
    int rank;
    int64_t max_steps;
    bool has_eval;
    job_policy policy;
    const char *folder;    /* of the run */
    int32_t positions;     /* as job_facts */
    pml_train_state state; /* step = updates made */
    /* Settings of the step after this one, up to this command, are in what was loaded. */
    int64_t loaded_step, loaded_command;

    bool paused, stopping;
    bool skip_nonfinite; /* said at a resume: no pause for such steps */
    bool has_best;       /* the weights are those of the best checkpoint, not of the last step */
    bool finished;       /* the last step is made: serving */
    bool unfollowed;     /* begun from a snapshot whose step has no checkpoint in the log */
    bool told_lack;      /* what the device lacks for its full speed */
    double last_seconds;
    double loss_scale; /* of the last step; 0: none made, or there is no such thing */
    timing timing;     /* rank 0 */
    gpu_watch *gpu;    /* borrowed; NULL: the device is none */
} loop;

/* From go to the end. On failure the coordinator has been told nothing yet. */
pml_status loop_run(loop *l, pml_error *err);

/* Apply one committed command at a safe point and report it. An error is the worker's end; a
 * command that only cannot be carried out is refused, and the worker goes on. */
pml_status loop_apply(loop *l, const order *o, pml_error *err);

/* Take the run's own evaluation into account: best so far, early stopping, schedules that follow
 * it. The same on every rank. */
void loop_measured(loop *l, double loss);
/* Whether evaluations have been without a better one for as long as the run's patience. */
bool loop_out_of_patience(const loop *l);
/* At the end: the weights of the best evaluation, where the run is to end with them. */
pml_status loop_load_best(loop *l, pml_error *err);
/* Steps that the weights have made which serve now. */
int64_t loop_weights_step(const loop *l);

/* A log event of rank 0. */
void loop_say(loop *l, const char *level, const char *text);

/* Whether anybody waits for what takes its time: false once the coordinator has gone, or a stop is
 * committed. */
bool loop_has_reason(const loop *l);

/* Evaluate over all ranks and say so; command 0: nobody asked. Broken off where there is no reason
 * for it any more: one that was asked for is refused, the run's own is owed (state). */
pml_status loop_evaluate(loop *l, int64_t command, pml_error *err);

#endif
