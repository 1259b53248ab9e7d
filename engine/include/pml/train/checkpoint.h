/* Checkpoints: a step's trained tensors, optimizer and place in the data, as a folder.
 *
 *   stepper ──take──► snapshot (host memory, preallocated) ──write──► step-000412/
 *   stepper ◄─restore── snapshot ◄──load── step-000412/
 *   stepper ──put──► memory of the caller's ──view──► snapshot
 *
 * Taking and restoring need the stepper and are as fast as a copy; writing and loading never touch
 * it, so another thread may write while training goes on. One thread uses a snapshot at a time.
 *
 * A folder is written under a temporary name beside its final one, every file and the folder
 * fsynced, then renamed: a folder with the final name is whole. MANIFEST holds the BLAKE2b-256 of
 * every file, as b2sum -l 256 prints it, and is checked before anything else is read. */
#ifndef PML_TRAIN_CHECKPOINT_H
#define PML_TRAIN_CHECKPOINT_H

#include "pml/data/sampler.h"
#include "pml/train/config.h"
#include "pml/train/stepper.h"

/* state.json: what a run needs beside the tensors to go on as if it had not stopped. */
typedef struct pml_train_state {
    int64_t step;              /* updates done */
    int64_t applied;           /* of them, not skipped; pml_snapshot_take asks the stepper */
    int32_t rope_length;       /* likewise: what dynamic rope's angles were last made for */
    pml_loss_scale loss_scale; /* likewise; value 0: to be found (again) */
    pml_cursor cursor;
    int64_t timeline;
    int64_t command; /* last command applied, or setting of the log in force again */
    bool heeded;     /* what of these holds from the step after it on is in force in it */
    /* Settings as tuned so far. learning_rate is the peak that the schedule's factors multiply. */
    double learning_rate, weight_decay, max_grad_norm, lora_dropout;
    int64_t eval_steps, save_steps, accumulation;
    pml_schedule schedule;
    pml_schedule_state schedule_state;
    /* Of the run's own evaluations; best_step -1: none yet. */
    double best_loss;
    int64_t best_step, not_better; /* not_better: evaluations in a row */
    bool owes_evaluation; /* the one that is due after `step` is not made yet: it comes first */
    char identity[4096];  /* JSON object: what decides bits (pml_stepper_identity) */
} pml_train_state;

typedef struct pml_snapshot pml_snapshot;

/* Somebody who wants to know how far the writing of a checkpoint has come: `moved` is called on the
 * writing thread with each piece (32 MiB) of the tensors that is on disk. */
typedef struct pml_watch {
    void (*moved)(void *user, size_t done, size_t total); /* bytes */
    void *user;
    size_t done;
} pml_watch;

/* Host buffers for value, exp_avg and exp_avg_sq of this stepper's trained tensors. Config and
 * names are copied; the snapshot may outlive the stepper. */
pml_status pml_snapshot_new(const pml_stepper *stepper, const pml_train_config *config,
                            pml_snapshot **snapshot, pml_error *err);
void pml_snapshot_destroy(pml_snapshot **snapshot);

/* The same without buffers: it is of use when pml_snapshot_view has shown it some. */
pml_status pml_snapshot_frame(const pml_stepper *stepper, const pml_train_config *config,
                              pml_snapshot **snapshot, pml_error *err);
/* The same for what a run's stepper put before it was lost: from the run's configuration alone, so
 * without a device, weights or rows. moments_8bit: as its plan chose (pml_plan_choices); backend:
 * of its device, also where no driver is. */
pml_status pml_snapshot_frame_left(const pml_train_config *config, bool moments_8bit,
                                   const pml_backend *backend, pml_snapshot **snapshot,
                                   pml_error *err);
size_t pml_snapshot_frame_bytes(const pml_snapshot *frame);
/* From now on the frame's buffers are in `memory`, pml_snapshot_frame_bytes of it, as
 * pml_snapshot_put lays them out; borrowed. Only loading and taking write there. */
void pml_snapshot_view(pml_snapshot *frame, const pml_train_state *state, void *memory);

/* Copy the stepper's state and `state` into the snapshot. Does not allocate. */
pml_status pml_snapshot_take(pml_snapshot *snapshot, pml_stepper *stepper,
                             const pml_train_state *state, pml_error *err);

/* Give the snapshot's tensors and step back to a stepper with the same trained tensors. */
pml_status pml_snapshot_restore(const pml_snapshot *snapshot, pml_stepper *stepper, pml_error *err);

/* The same in memory of the caller's (pml/train/slots.h), without a snapshot in between. bytes:
 * what such memory has to hold. whole: state, with what the stepper adds to it. */
size_t pml_snapshot_bytes(const pml_stepper *stepper);
pml_status pml_snapshot_put(pml_stepper *stepper, const pml_train_state *state,
                            pml_train_state *whole, void *memory, pml_error *err);
pml_status pml_snapshot_get(pml_stepper *stepper, const pml_train_state *state, const void *memory,
                            size_t bytes, pml_error *err);

/* The state that was put into it; the snapshot's. */
const pml_train_state *pml_snapshot_state(const pml_snapshot *snapshot);

/* Who watches its writing from now on; NULL: nobody. Borrowed. */
void pml_snapshot_watch(pml_snapshot *snapshot, pml_watch *watch);

/* Write `folder`, which must not exist; its parent must. *bytes (may be NULL) receives the size on
 * disk. */
pml_status pml_checkpoint_write(const pml_snapshot *snapshot, const char *folder, size_t *bytes,
                                pml_error *err);

/* Only the tensors in user formats, without optimizer, state and MANIFEST: an adapter folder that
 * PEFT loads, or a model folder that transformers loads. Same atomicity. */
pml_status pml_snapshot_export(const pml_snapshot *snapshot, const char *folder, pml_error *err);

/* Compare every file with MANIFEST. PML_NOT_FOUND: no such folder, or it has no MANIFEST;
 * PML_CORRUPT names the file that is damaged or missing. Whatever pml_checkpoint_is_unfit does not
 * hold of (PML_IO, PML_NO_MEMORY) says nothing of the checkpoint, which may be whole. */
pml_status pml_checkpoint_verify(const char *folder, pml_error *err);
/* The same, for large ones on slow disks: `moved` (may be NULL) is called as it comes on. */
pml_status pml_checkpoint_verify_watched(const char *folder, void (*moved)(void *user), void *user,
                                         pml_error *err);

/* Verify and read into the snapshot. Names and shapes must be those of the snapshot. `moved` as
 * above. */
pml_status pml_checkpoint_load_watched(const char *folder, void (*moved)(void *user), void *user,
                                       pml_snapshot *snapshot, pml_error *err);
pml_status pml_checkpoint_load(const char *folder, pml_snapshot *snapshot, pml_error *err);

/* state.json alone, after verifying. */
pml_status pml_checkpoint_state(const char *folder, pml_train_state *state, pml_error *err);

/* Whether a failure to read a checkpoint is the checkpoint's own: damaged, not there, or something
 * in its place that no run has made. Only then may an older one stand in for it: a descriptor,
 * memory or a disk that was missing just now says nothing of what is on the disk. */
bool pml_checkpoint_is_unfit(pml_status status);

/* Of state.json, to put checkpoints in order (by timeline, then step: who went back and trained
 * again has fewer steps, and the newer checkpoint). Only this file is verified. INT64_MAX when the
 * checkpoint is unfit: its number is nobody's word, and a newest one that looked old would be
 * passed over in silence. Such a one is placed among those of the newest timeline. Any other
 * failure is told, with INT64_MAX, too. */
pml_status pml_checkpoint_timeline(const char *folder, int64_t *timeline, pml_error *err);

/* Of state.json, which alone is verified: after which step the best evaluation was, and its loss;
 * step -1: there was none. */
pml_status pml_checkpoint_best(const char *folder, int64_t *step, double *loss, pml_error *err);

/* The newest folder step-* of `parent` that verifies, into path (capacity bytes). PML_NOT_FOUND
 * when there is none; *refused (may be NULL) counts newer ones that are unfit. One that cannot be
 * read for another reason is handed on: it may be the newest. */
pml_status pml_checkpoint_latest(const char *parent, char *path, size_t capacity, int *refused,
                                 pml_error *err);

/* Remove the oldest step-* folders so that `keep` remain (0: all remain), and leftovers of
 * interrupted writes. Named checkpoints are not counted and not removed; the newest one that
 * verifies is never removed, nor is that of step `best` (-1: none), which counts as one of those
 * kept where there may be two, as in Hugging Face's Trainer. Where none verifies, nothing is
 * removed. One whose place in the order cannot be read now is left alone and not counted, and the
 * error is that of the first of them. */
pml_status pml_checkpoint_prune(const char *parent, int keep, int64_t best, pml_error *err);

#endif
