/* Merge: the model that training has made, tensor by tensor, as float32.
 *
 *   W' = W + scale B A                a linear layer with an adapter
 *   W' = the checkpoint's             what was trained whole
 *   W' = W                            the rest
 *
 * A weight that the folder holds as NF4 is dequantised, exactly as training saw it. Where an
 * adapter holds the embedding or the head of a model whose head is tied, each is a tensor of its
 * own then, and spec's tied_head is false.
 *
 * The original weights stay in their files and are read once, a piece at a time: a merge
 * holds two pieces and one transposed A, whatever the model's size. Tensors that only repeat others
 * (a tied head, tables of angles) are left out. */
#ifndef PML_TRAIN_MERGE_H
#define PML_TRAIN_MERGE_H

#include "pml/model/safetensors.h"
#include "pml/train/config.h"

typedef struct pml_merge pml_merge;

typedef struct pml_merged {
    const char *name; /* Hugging Face's */
    pml_dtype dtype;  /* as the original is stored */
    int n_dims;       /* 1: [cols], rows is 1;  2: [rows, cols] */
    int64_t rows, cols;
    bool changed; /* by training */
} pml_merged;

enum { PML_MERGE_PIECE = 1 << 22 }; /* floats that pml_merge_rows gives at most */

/* checkpoint: a folder that pml_checkpoint_write or pml_snapshot_export made; threads as in
 * pml_device_options. PML_INVALID names a trained tensor that the model has not. */
pml_status pml_merge_open(const pml_train_config *config, const char *checkpoint, int threads,
                          pml_merge **merge, pml_error *err);
void pml_merge_close(pml_merge **merge);

/* Tensors of the merged model, and its spec: the merge's until close. */
size_t pml_merge_count(const pml_merge *merge);
const pml_merged *pml_merge_at(const pml_merge *merge, size_t index); /* in order of name */
const pml_model_spec *pml_merge_spec(const pml_merge *merge);

/* Rows that one call of pml_merge_rows may ask for: at least 1. */
int64_t pml_merge_step(const pml_merged *tensor);

/* Rows [first, first + rows) into out [rows, cols]. */
pml_status pml_merge_rows(pml_merge *merge, size_t index, int64_t first, int64_t rows, float *out,
                          pml_error *err);

/* n floats as F32, BF16 or F16, rounded to nearest even. */
pml_status pml_merge_round(pml_merge *merge, const float *from, size_t n, pml_dtype dtype, void *to,
                           pml_error *err);

/* ---- as safetensors ---- */

typedef struct pml_merge_options {
    pml_dtype dtype;      /* of every tensor; PML_DTYPE_COUNT: each as the original is stored */
    uint64_t shard_bytes; /* a file has at most so many, but at least one tensor */
    bool (*enough)(void *asked); /* asked at each piece: whoever waits wants no more (Ctrl-C), and
                                    it ends by PML_TIMEOUT; NULL: never                      */
    void *asked;                 /* what it is given                                          */
} pml_merge_options;

typedef struct pml_merge_result {
    uint64_t bytes; /* of data in all files */
    int64_t parameters;
    int files;
    double rounding; /* the largest |stored - merged| of what training changed */
    bool tied_head;  /* of the model that was written */
} pml_merge_result;

/* Write model.safetensors, or model-00001-of-0000N.safetensors and their index, into an existing
 * folder. A failure may leave whole files of the set there: the caller throws the folder away. */
pml_status pml_merge_write(pml_merge *merge, const char *folder, const pml_merge_options *options,
                           pml_merge_result *result, pml_error *err);

#endif
