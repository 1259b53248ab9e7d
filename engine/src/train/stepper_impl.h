/* Inside of the stepper that runs a step program on an op backend. */
#ifndef PML_TRAIN_STEPPER_IMPL_H
#define PML_TRAIN_STEPPER_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "pml/plan/program.h"
#include "pml/train/profile.h"
#include "pml/train/stepper.h"

/* What a segment's graph was recorded for. Where the backend records, batches are padded to a few
 * sizes (pmli_bucket), so that a handful of graphs serve all of them. */
typedef struct pmli_recorded {
    pml_segment segment;
    pml_counts counts;
    pml_graph *graph;  /* NULL: runs op by op */
    size_t bytes;      /* that the graph takes on the device, or would; 0: nobody knows yet */
    int32_t uses;      /* lately: halved now and then */
    int64_t last_used; /* by the stepper's count of launches; 0: a free slot */
    bool is_warm;      /* has run with all compiled that it asks for, and may be recorded */
} pmli_recorded;

enum { PMLI_RECORDED = 32 };

/* Operations of a micro-batch: for each of its tokens and labelled rows, and for each pair of
 * tokens that attention looks at, of layers without and with a window. */
typedef struct pmli_flops {
    double token, label, pair, windowed_pair;
    int32_t window;
} pmli_flops;

enum {
    PMLI_INPUTS = 2,
    PMLI_MARKS = PML_MARKS - PMLI_INPUTS /* below: the profile's */
};

typedef struct pmli_inputs {
    int32_t *ints;   /* of one batch, end to end */
    int64_t *places; /* one for each of its tokens */
    int64_t *rng;    /* two */
} pmli_inputs;

struct pml_stepper {
    pml_train_config config;
    pml_model_spec spec;
    pml_plan plan;
    pml_batch_limits limits; /* of a whole micro-batch; the program's are those of a piece */
    pml_program *program;
    char note[160]; /* what a person should know of how the plan came about; "" */
    const pml_backend *backend;
    pml_comm *comm; /* borrowed; NULL: alone */
    void (*progress)(void *user, const char *what, double fraction);
    void (*move)(void *user);
    bool (*enough)(void *asked);
    void *asked;
    void *user;

    pml_device *device;
    pml_queue *queue;
    void *arena;

    pmli_flops cost;
    double flops; /* since the last update */

    int64_t updates; /* done so far, skipped ones too */
    int64_t applied; /* of them, those that moved the weights: Adam's t before the next */
    pml_loss_scale scale;
    float scale_there; /* what the device reads of it; host memory that uploads read */
    /* Dynamic rope: its angles are made for some length. */
    int32_t rope_length; /* that of the training steps so far, see pmli_rope_for_training */
    int32_t rope_made;   /* that of the table in the arena */
    float *angles;       /* host memory the table is made in; NULL where it never changes */

    bool timing;        /* segments run node by node between marks, and */
    pml_op_time *times; /* … what each node of the program took is added up here */

    pthread_t ahead; /* compiles while weights load and steps are made, see ahead.c */
    bool is_ahead;   /* a thread to be joined */
    atomic_bool ahead_enough, ahead_done;
    pml_counts ahead_for[2]; /* batches that it compiles for */
    int n_ahead;
    uint64_t asked_for; /* all that it ever did so: bits, see ahead.c */

    /* A sampled token's nodes as they were bound last: its sizes are those of the token before, but
     * for the number of prompts. NULL where segments are recorded. */
    pml_op_args *bound;
    pml_counts bound_for;

    bool runtime_measured;
    pmli_recorded recorded[PMLI_RECORDED];
    int64_t launches;
    int32_t *trained; /* program->parameters that are trained, in order of the flat buffer */
    int32_t n_trained;
    size_t trained_floats; /* their elements, gaps not counted */

    /* Host memory that uploads read and downloads fill: until the queue is beyond them it stays as
     * it is. Two batches, each with a mark behind it: one is filled while the device has the other
     * before it. What a GPU reads is page-locked, or it would be waited for. */
    pmli_inputs inputs[PMLI_INPUTS];
    int64_t taken; /* batches so far */
    pml_told *told;
    int32_t *staged; /* the first one's numbers, for what begins with a sync */
    size_t staged_ints;
    float hyper[2][PML_HYPER_COUNT];
    float *reduced;  /* a piece of the gradients on its way through the collective */
    float *logits;   /* generate_rows rows */
    int32_t *chosen; /* tokens by their logits, and which are there already: see choose.h */
    int32_t *said;   /* prompts and answers so far, where the cache has them: generate_length */
};

enum { PMLI_REDUCE_FLOATS = 1 << 18 };

/* Live counts rounded up to what graphs are recorded for, within the plan's capacity; as they are
 * where the backend does not record. What is added is empty: tokens outside every document, slots
 * without a document, labelled rows of -1. */
pml_counts pmli_bucket(const pml_stepper *s, pml_counts live);

/* What the model's own work on a batch is (flops.c). */
void pmli_count_flops(const pml_program *program, void *arena, pmli_flops *flops);
double pmli_flops_of(const pmli_flops *flops, const pml_batch *batch);

/* Put the loss scale into force (1 while it is to be found). */
pml_status pmli_set_scale(pml_stepper *s, pml_error *err);

/* Check a batch and put it on the device; *counts are what its segment is to run with. */
pml_status pmli_take_batch(pml_stepper *s, const pml_batch *batch, pml_counts *counts,
                           pml_error *err);

/* Run a segment as a graph: op by op the first time, and as long as something is compiled aside,
 * recorded then, replayed from then on whatever is compiled. Op by op always where the backend does
 * not record. */
pml_status pmli_run_recorded(pml_stepper *s, pml_segment segment, const pml_counts *counts,
                             pml_error *err);
void pmli_drop_recorded(pml_stepper *s);

/* Have the backend compile on a thread of its own what the first step will ask for; end it after
 * what it is at. Between the two attention's nodes of the program stay as they are. Nothing where a
 * backend compiles nothing, or no thread was to be had: the first step does it then. */
void pmli_ahead_begin(pml_stepper *s);
void pmli_ahead_end(pml_stepper *s);
/* A micro-batch of these counts comes: the same for what it will ask for, unless that was done
 * before, or the thread is still at something: then it is done when the next one like it comes. */
void pmli_ahead_meet(pml_stepper *s, const pml_counts *counts);

/* Forward and backward of a checked micro-batch, piece by piece. */
pml_status pmli_run_micro(pml_stepper *s, const pml_batch *batch, pml_error *err);

/* Run all nodes of a segment for live counts. */
pml_status pmli_run_segment(pml_stepper *s, pml_segment segment, const pml_counts *counts,
                            pml_error *err);

/* Whether there are other workers to sum gradients with. */
bool pmli_is_shared(const pml_stepper *s);
/* PML_TIMEOUT where who waits wants no more (options.enough). */
pml_status pmli_go_on(const pml_stepper *s, pml_error *err);
/* One node with its arguments; an error names it. */
pml_status pmli_run_node(pml_stepper *s, const pml_node *node, const pml_op_args *args,
                         pml_error *err);
/* pmli_run_segment between marks (profile.c). */
pml_status pmli_run_timed(pml_stepper *s, pml_segment segment, const pml_counts *counts,
                          pml_error *err);

/* Host → tensor, whole or its first `bytes`. The source must live until the next sync. */
pml_status pmli_upload(pml_stepper *s, int32_t tensor, const void *from, size_t bytes,
                       pml_error *err);

/* The table of angles for sequences up to `length` tokens, made anew where dynamic rope asks for
 * another (rope.c). */
pml_status pmli_rope_fit(pml_stepper *s, int32_t length, pml_error *err);
/* The same for a training micro-batch, with transformers' memory of longer ones before it. */
pml_status pmli_rope_for_training(pml_stepper *s, int32_t length, pml_error *err);
/* The parameters in the activations' dtype, after their float32 values were written. */
pml_status pmli_round_values(pml_stepper *s, pml_error *err);

/* Weights, adapter, rope table and zeroed optimizer state: everything that must stand in the arena
 * before the first step; the model's own only if `weights`. */
pml_status pmli_load(pml_stepper *s, bool weights, pml_error *err);

#endif
