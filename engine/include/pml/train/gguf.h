/* A merged model as GGUF, and one read back into a stepper to be compared. */
#ifndef PML_TRAIN_GGUF_H
#define PML_TRAIN_GGUF_H

#include "pml/model/gguf.h"
#include "pml/train/merge.h"
#include "pml/train/stepper.h"

typedef struct pml_gguf_options {
    pml_gguf_type type; /* of matrices; vectors are float32 always */
    const pml_json
        *pairs; /* general.name and the tokenizer's, as pml_gguf_writer_pairs takes them */
    bool (*enough)(void *asked); /* asked at each piece: whoever waits wants no more (Ctrl-C), and
                                    it ends by PML_TIMEOUT; NULL: never                      */
    void *asked;                 /* what it is given                                          */
} pml_gguf_options;

typedef struct pml_gguf_result {
    uint64_t bytes; /* of data */
    int64_t parameters;
    int tensors;
    int not_quantised; /* matrices whose rows are no multiple of 32: float16 in place of Q8_0 */
    char notes[512];   /* what llama.cpp does otherwise with such a model; "" = nothing */
} pml_gguf_result;

/* Write `path` from the merge's tensors, one after another. Llama's queries and keys are put into
 * the row order that llama.cpp's rotation wants. PML_UNSUPPORTED names what llama.cpp cannot have.
 */
pml_status pml_gguf_export(pml_merge *merge, const char *path, const pml_gguf_options *options,
                           pml_gguf_result *result, pml_error *err);

/* GGUF's name of one of Hugging Face's tensors; PML_UNSUPPORTED when it has none. */
pml_status pml_gguf_name(const char *name, char *out, size_t capacity, pml_error *err);

/* Whether the rows of this tensor are in the other order in GGUF: Llama's queries and keys, where
 * row 2i + j of a head is Hugging Face's row i + j head_dim/2. */
bool pml_gguf_reorders(const pml_model_spec *spec, const char *name);

/* Put the file's tensors in the place of the stepper's model weights; what is not in the file and
 * should be is PML_NOT_FOUND. */
pml_status pml_gguf_load(pml_stepper *stepper, const char *path, pml_error *err);

#endif
