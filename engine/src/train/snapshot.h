/* Inside of checkpoints: what a snapshot holds. */
#ifndef PML_TRAIN_SNAPSHOT_H
#define PML_TRAIN_SNAPSHOT_H

#include "pml/train/checkpoint.h"

typedef struct pmli_entry {
    char name[112];
    int64_t shape[2];
    int n_dims;
    size_t floats;
} pmli_entry;

struct pml_snapshot {
    pml_train_config config;
    pml_train_state state;
    int32_t layers; /* of the model */
    pmli_entry *entries;
    int n_entries;
    size_t floats;
    bool has[3];       /* value, exp_avg, exp_avg_sq: SGD has fewer */
    float *buffers[3]; /* entries end to end; NULL: it has none, or nothing is in view */
    float *own;        /* the buffers one behind another; NULL: they are somebody else's */
};

#define PMLI_OPTIMIZER_FILE "optimizer.safetensors"
#define PMLI_STATE_FILE     "state.json"
#define PMLI_MANIFEST       "MANIFEST"

static const pml_state pmli_snapshot_states[3] = {PML_STATE_VALUE, PML_STATE_EXP_AVG,
                                                  PML_STATE_EXP_AVG_SQ};

/* What stands before a tensor's name: as torch's optimizers call their buffers. */
static inline const char *pmli_moment_prefix(const pml_snapshot *snapshot, int m)
{
    static const char *const prefixes[3] = {"", "exp_avg.", "exp_avg_sq."};
    bool sgd = snapshot->config.optimizer == PML_OPTIMIZER_SGD;
    return m == 1 && sgd ? "momentum_buffer." : prefixes[m];
}

/* "adapter_model.safetensors" or "model.safetensors". */
static inline const char *pmli_tensor_file(const pml_snapshot *snapshot)
{
    return snapshot->config.method == PML_METHOD_LORA ? "adapter_model.safetensors"
                                                      : "model.safetensors";
}

/* state.json, both ways (train_state.c). */
pml_status pmli_state_write(const char *path, const pml_train_state *state, pml_error *err);
pml_status pmli_state_read(const char *path, pml_train_state *state, pml_error *err);

/* The tensors in user formats into an existing folder (export.c). */
pml_status pmli_write_tensors(const pml_snapshot *snapshot, const char *folder, pml_error *err);

#endif
