/* Job: what a worker drives, behind function pointers, so that the worker's own logic (order of
 * commands, safe points, leases, checkpoints) can be tested without a model. One thread calls all
 * of them, except write and prune, which belong to the checkpoint thread. *j is there to be closed
 * also when it could not be opened, unless it is NULL. */
#ifndef PML_WORKER_JOB_H
#define PML_WORKER_JOB_H

#include "pml/data/sampler.h"
#include "pml/json/messages.h"
#include "pml/train/checkpoint.h"
#include "pml/train/profile.h"

typedef struct job job;

typedef struct job_setup {
    const char *folder;          /* of the run, absolute */
    const char *checkpoint;      /* folder to go on from, "" = from the start */
    const pml_train_state *kept; /* snapshot to go on from instead, with its payload; NULL */
    const void *payload;
    size_t payload_bytes;
    const pml_message *run; /* run.json */
    int rank, world;
    int share;      /* workers that share this machine's cores */
    pml_comm *comm; /* borrowed */
    void (*progress)(void *user, const char *what, double fraction);
    /* Called after each micro-batch, of training and of evaluation. */
    void (*tick)(void *user);
    void (*move)(void *user); /* before each op */
    int reserved; /* descriptor of the reservation of the worker that this one replaces, which the
                     job takes over; -1 */
    void (*keep)(void *user, int descriptor); /* to hold this reservation beyond our end */
    void *user;
} job_setup;

/* What a run does by itself beside training. */
typedef struct job_policy {
    bool eval_epochs, save_epochs, save_best, load_best; /* as pml_train_config */
    int64_t early_patience;
    double early_threshold;
} job_policy;

typedef struct job_facts {
    int64_t max_steps;
    bool has_eval;
    job_policy policy;
    pml_plan plan;
    int32_t positions;         /* max_position_embeddings; 0: no model */
    int32_t max_length;        /* of a row, as configured */
    size_t available;          /* bytes that the plan had to fit in */
    size_t payload_bytes;      /* of a snapshot by put */
    bool slots;                /* the run goes on by itself, and there is room for its snapshots */
    void *stage;               /* whole pages for one that steps alone use otherwise; NULL: none */
    char note[160];            /* pml_stepper_note */
    char lacks[PML_LACKS];     /* as pml_device_info */
    char unreserved[400];      /* claim_trouble; "": what the plan takes is reserved, if need be */
    bool crowded;              /* it could not be opened for what others have of its device */
    char device[128], bus[20]; /* name and PCI address of a GPU; bus "": it is none */
    char uuid[37];             /* as pml_device_identity */
    pml_train_state state; /* from the checkpoint, or from the configuration; with its identity */
} job_facts;

typedef struct job_kind {
    pml_status (*open)(const job_setup *setup, job **j, job_facts *facts, pml_error *err);
    /* What `setup` has of a snapshot that was left behind, to be written: a job for write, prune
     * and close alone. Takes no device, and no memory to speak of. */
    pml_status (*open_left)(const job_setup *setup, job **j, pml_error *err);
    void (*close)(job **j);

    /* This rank's share of the step at the cursor. */
    pml_share (*share)(job *j);
    /* How many times the data has been passed. */
    double (*epoch)(const job *j);
    /* Factor of the schedule for the update after state->step: on state->learning_rate. */
    double (*factor)(const job *j, const pml_train_state *state);
    /* Put state's dropout and accumulation into force. PML_UNSUPPORTED: the plan has no room for
     * that; nothing has changed. NULL: the job has no such settings. */
    pml_status (*tune)(job *j, const pml_train_state *state, pml_error *err);
    /* Micro-batches and update; moves the cursor. */
    pml_status (*step)(job *j, const pml_update *update, pml_step_result *result, pml_error *err);
    /* Loss sum and labelled tokens of this rank's part of the held-out data. goes_on is asked
     * before each micro-batch; once it says no, what is left of them is left out. */
    pml_status (*evaluate)(job *j, bool (*goes_on)(void *user), void *user, double *loss_sum,
                           double *labels, pml_error *err);
    pml_status (*sample)(job *j, const pml_generate_options *options, pml_error *err);

    /* As pml_stepper_is_compiling, _timing, _times and _peak. NULL, all four: the job has no ops.
     */
    bool (*is_compiling)(const job *j);
    void (*timing)(job *j, bool on);
    const pml_op_time *(*times)(const job *j, int32_t *n_nodes);
    pml_status (*peak)(job *j, double seconds, pml_peak *peak, pml_error *err);
    /* As pml_stepper_lacks. */
    void (*lacks)(job *j, char lacks[PML_LACKS]);

    /* Snapshot to memory of payload_bytes; whole: state, with cursor and identity, which are the
     * job's to fill in. */
    pml_status (*put)(job *j, const pml_train_state *state, pml_train_state *whole, void *memory,
                      pml_error *err);

    /* The weights of a checkpoint folder; the place in the data stays. memory: payload_bytes to
     * use on the way; NULL: the job takes some. */
    pml_status (*go_back)(job *j, const char *folder, void *memory, pml_error *err);
    /* What put has left in `memory` to a folder, told to `watch` as it comes on; and the old ones
     * but that of step `best` away. */
    pml_status (*write)(job *j, const pml_train_state *whole, const void *memory,
                        const char *folder, pml_watch *watch, size_t *bytes, pml_error *err);
    pml_status (*prune)(job *j, const char *parent, int64_t best, pml_error *err);
} job_kind;

/* The real one: stepper, sampler and checkpoints. */
extern const job_kind job_train;

#endif
