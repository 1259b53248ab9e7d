/* Slots: the two newest snapshots of a run in shared memory, to go on from when a worker dies.
 *
 *   memfd:  header page | slot 0: pml_train_state, payload | slot 1: pml_train_state, payload
 *
 * The memory is the coordinator's: it makes the memfd, every worker inherits it, and it outlives
 * all of them. One worker writes (data parallel ranks are equal bit for bit between two steps), all
 * read. A slot counts only after its last byte, and the other one stands meanwhile, so a death at
 * any moment leaves at least the snapshot before. Checkpoints are written from the same memory: a
 * slot that is held is not begun again. What is in the payload is the writer's affair.
 *
 * With a stage there is one slot's memory less: the payload of slot 1 lies in memory that the
 * writer uses otherwise while it makes a step. A snapshot is taken there and copied into slot 0
 * before the next step begins, so that one of the two is whole at every moment:
 *
 *   begin ─► payload written ─► commit ─► settle: slot 0 is written ─► slot 1 is nothing again
 *            └ slot 0 stands ────────────┘└ slot 1 stands ──────────┘                          */
#ifndef PML_TRAIN_SLOTS_H
#define PML_TRAIN_SLOTS_H

#include "pml/train/checkpoint.h"

/* Make the memfd (close-on-exec, empty). *fd is the caller's. */
pml_status pml_slots_create(int *fd, pml_error *err);

/* The newest whole slot of at most `most` steps: *slot is 0 or 1, -1 when there is none; *step its
 * step. The other slot is forgotten: what it holds is not this run's past any more. What was left
 * on a stage is settled, for the next worker has other use for that memory. Nobody may be writing.
 */
pml_status pml_slots_choose(int fd, int64_t most, int *slot, int64_t *step, pml_error *err);

typedef struct pml_slots pml_slots;

/* The writer's side, for payloads of `bytes`. Does not take fd. All pages of both slots are taken
 * here and stay resident, so that a process's memory is the same at every snapshot and one that is
 * short of it is told so before the first step. PML_INVALID: the memfd was made for other payloads;
 * PML_NO_MEMORY: there is none for two.
 * stage: NULL, or whole pages for a payload in private memory of the caller's, borrowed until
 * pml_slots_close. What is in them is lost; they are the caller's to use but from pml_slots_begin
 * until the snapshot is settled or dropped. */
pml_status pml_slots_open(int fd, size_t bytes, void *stage, pml_slots **slots, pml_error *err);
void pml_slots_close(pml_slots **slots);

/* The payload of the slot that is not the newest, or of the one that is not held; it holds nothing
 * until pml_slots_commit. It can be written only in between: no stray write reaches a snapshot.
 * Maps nothing. */
pml_status pml_slots_begin(pml_slots *slots, void **payload, pml_error *err);
/* The payload is whole: it is the newest from now on. */
void pml_slots_commit(pml_slots *slots, const pml_train_state *state);

/* After commit, with a stage: from there into slot 0. Without one there is nothing to do. */
pml_status pml_slots_settle(pml_slots *slots, pml_error *err);
/* With a stage: what was begun or committed there is nothing; slot 0 stands. */
void pml_slots_drop(pml_slots *slots);
/* Whether a snapshot can be taken and settled: with a stage not while slot 0 is held. */
bool pml_slots_room(const pml_slots *slots);
bool pml_slots_staged(const pml_slots *slots);

/* Hold what was committed last, and settled: it can be read, and is not written again, until
 * pml_slots_release, which any thread may call. One at a time. */
void pml_slots_hold(pml_slots *slots, const pml_train_state **state, const void **payload);
void pml_slots_release(pml_slots *slots);

/* The reader's side: map slot 0 or 1. *state (may be NULL) and *payload point into the mapping, of
 * *size bytes, until pml_slots_unmap. PML_NOT_FOUND: nothing whole is in it. */
typedef struct pml_slot_view {
    const pml_train_state *state;
    const void *payload;
    size_t bytes; /* of the payload */
    void *mapping;
    size_t mapped;
} pml_slot_view;
pml_status pml_slots_map(int fd, int slot, pml_slot_view *view, pml_error *err);
void pml_slots_unmap(pml_slot_view *view);

#endif
