/* Inside of checkpoints: what a snapshot holds. */
#ifndef PML_TRAIN_SNAPSHOT_H
#define PML_TRAIN_SNAPSHOT_H

#include "pml/model/safetensors.h"
#include "pml/plan/program.h"
#include "pml/train/checkpoint.h"

/* Values, and what the optimizer keeps: floats before codes, so that a file's tensors are aligned.
 */
enum { PMLI_SNAPSHOT_STATES = 7 };

static const pml_state pmli_snapshot_states[PMLI_SNAPSHOT_STATES] = {PML_STATE_VALUE,
                                                                     PML_STATE_EXP_AVG,
                                                                     PML_STATE_EXP_AVG_SQ,
                                                                     PML_STATE_EXP_AVG_LARGEST,
                                                                     PML_STATE_EXP_AVG_SQ_LARGEST,
                                                                     PML_STATE_EXP_AVG_CODES,
                                                                     PML_STATE_EXP_AVG_SQ_CODES};

typedef struct pmli_entry {
    char name[112];
    int64_t shape[2];
    int n_dims;
    size_t elements[PMLI_SNAPSHOT_STATES]; /* of each buffer; may be none */
} pmli_entry;

struct pml_snapshot {
    pml_train_config config;
    pml_train_state state;
    int32_t layers; /* of the model */
    pmli_entry *entries;
    int n_entries;
    size_t bytes[PMLI_SNAPSHOT_STATES];  /* of each buffer; 0: this optimizer has none */
    char *buffers[PMLI_SNAPSHOT_STATES]; /* entries end to end; NULL: it has none, or nothing is in
                                            view */
    char *own;        /* the buffers one behind another; NULL: they are somebody else's */
    pml_watch *watch; /* NULL: nobody looks */
};

#define PMLI_OPTIMIZER_FILE "optimizer.safetensors"
#define PMLI_STATE_FILE     "state.json"
#define PMLI_MANIFEST       "MANIFEST"

/* What stands before a tensor's name: as torch's optimizers call their buffers. */
static inline const char *pmli_moment_prefix(const pml_snapshot *snapshot, int m)
{
    static const char *const prefixes[PMLI_SNAPSHOT_STATES] = {"",
                                                               "exp_avg.",
                                                               "exp_avg_sq.",
                                                               "exp_avg_largest.",
                                                               "exp_avg_sq_largest.",
                                                               "exp_avg_codes.",
                                                               "exp_avg_sq_codes."};
    bool sgd = snapshot->config.optimizer == PML_OPTIMIZER_SGD;
    return m == 1 && sgd ? "momentum_buffer." : prefixes[m];
}

/* How entry i of buffer m stands in a file: as its tensor, or a float for each block of it. */
typedef struct pmli_stored_moment {
    pml_dtype dtype;
    int64_t shape[2];
    int n_dims;
    size_t bytes; /* 0: it does not */
} pmli_stored_moment;

static inline pmli_stored_moment pmli_moment_of(const pml_snapshot *snapshot, int m, int i)
{
    const pmli_entry *e = &snapshot->entries[i];
    pml_state state = pmli_snapshot_states[m];
    pml_dtype dtype = pml_state_dtype(state);
    size_t bytes = e->elements[m] * pml_dtype_size(dtype);
    if (state == PML_STATE_EXP_AVG_LARGEST || state == PML_STATE_EXP_AVG_SQ_LARGEST)
        return (pmli_stored_moment){dtype, {(int64_t)e->elements[m], 0}, 1, bytes};
    return (pmli_stored_moment){dtype, {e->shape[0], e->shape[1]}, e->n_dims, bytes};
}

/* "adapter_model.safetensors" or "model.safetensors". */
static inline const char *pmli_tensor_file(const pml_snapshot *snapshot)
{
    return snapshot->config.method == PML_METHOD_LORA ? "adapter_model.safetensors"
                                                      : "model.safetensors";
}

/* What a program keeps of one of its trained parameters (state.c): as pml_stepper_state_elements.
 */
size_t pmli_state_elements(const pml_program *program, pml_state state, const pml_parameter *p);
const pml_program *pmli_stepper_program(const pml_stepper *stepper);

/* state.json, both ways (train_state.c). */
pml_status pmli_state_write(const char *path, const pml_train_state *state, pml_error *err);
pml_status pmli_state_read(const char *path, pml_train_state *state, pml_error *err);

/* Buffer m as the data of a file, in pieces, told to who watches (checkpoint.c). */
pml_status pmli_write_buffer(const pml_snapshot *snapshot, int m, pml_safetensors_writer *file,
                             pml_error *err);

/* The tensors in user formats into an existing folder (export.c). */
pml_status pmli_write_tensors(const pml_snapshot *snapshot, const char *folder, pml_error *err);

#endif
