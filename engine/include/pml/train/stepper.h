/* Stepper: the thing a worker drives. Owns model weights, adapters, optimizer state and
 * activations, all in one planned arena on one device; knows nothing of processes, sockets or files
 * of a run.
 *
 *   for each optimizer step:   micro() × accumulation  ──►  update()
 *   between steps:             evaluate()  generate()  snapshot()  restore()
 *
 * Two kinds exist behind this interface: the step program on an op backend (CPU, CUDA), and a
 * whole-step executable (TPU). One thread drives a stepper. No call allocates after new(), except
 * where stated. */
#ifndef PML_TRAIN_STEPPER_H
#define PML_TRAIN_STEPPER_H

#include "pml/data/batch.h"
#include "pml/dist/comm.h"
#include "pml/model/spec.h"
#include "pml/plan/plan.h"
#include "pml/train/config.h"
#include "pml/train/loss_scale.h"
#include "pml_op/backend.h"

typedef struct pml_stepper pml_stepper;

/* Others plan with the device's memory, too: between begin and settle they wait. Each returns
 * PML_OK, or the error that the stepper is not made for. */
typedef struct pml_memory_claim {
    pml_status (*begin)(void *user, pml_error *err);
    /* What may be planned with, when the device says that it has so much. */
    pml_status (*ask)(void *user, const pml_device_info *info, size_t *bytes, pml_error *err);
    /* The plan takes so many: they are ours from now on. */
    pml_status (*settle)(void *user, size_t bytes, pml_error *err);
    /* The device cannot be opened, there is no plan (one needs `wanted` bytes; else 0), or what was
     * settled is refused by the device: for the reason in err, which may get words. */
    void (*give_up)(void *user, size_t wanted, pml_error *err);
    /* Of them so many are allocated. */
    pml_status (*taken)(void *user, size_t bytes, pml_error *err);
    void *user;
} pml_memory_claim;

typedef struct pml_stepper_options {
    const pml_train_config *config;
    const pml_backend *backend;
    int device_index;
    int threads;
    const char *cache;       /* pml_device_options.cache */
    pml_comm *comm;          /* borrowed; all-reduce happens inside update() */
    pml_batch_limits limits; /* capacity of a micro-batch (pml/plan/plan.h) */
    /* The planner's choices of an earlier run, whose bits are to be repeated (its plan event and
     * identity have them); head_chunk 0: the planner chooses. */
    pml_plan_choices choices;
    /* Quantised weights in memory that is left, which decide no bits, are as many as those choices
     * say: for a test of just that. False: as many as fit today. */
    bool unpacked_as_given;
    /* Called while loading (0..1), may be NULL. */
    void (*progress)(void *user, const char *what, double fraction);
    /* Called before each op, for who wants to see it come on. May be NULL. */
    void (*move)(void *user);
    void *user;
    /* Asked at each tensor that is loaded and each token of pml_stepper_logits: whoever waits wants
     * no more (Ctrl-C), and PML_TIMEOUT is what it comes to. May be NULL. */
    bool (*enough)(void *asked);
    void *asked;
    const pml_memory_claim *claim; /* NULL: what the device says is ours */
    /* Instead of what config.json says, and of the folder's weights: the caller brings some
     * (pml_gguf_load). NULL: as the folder has them. */
    const pml_model_spec *spec;
} pml_stepper_options;

/* Read config.json, plan, take the arena, load weights, make or load the adapter. Where the device
 * refuses the arena it plans once more, for less; where the host refuses the memory that
 * activations were to wait in, without it (pml_stepper_note). */
pml_status pml_stepper_new(const pml_stepper_options *options, pml_stepper **stepper,
                           pml_error *err);
void pml_stepper_destroy(pml_stepper **stepper);

/* Whether the backend compiles, on a thread of its own, kernels that steps will have (CUDA: cuDNN's
 * attention): from new() on, and again when a micro-batch has a number of documents that none had
 * before. What is not recorded until then is slower, and is made op by op. For who measures. */
bool pml_stepper_is_compiling(const pml_stepper *stepper);

/* Before the first micro-batch of a step: finds the loss scale where it is to be found (float16, no
 * update yet and none restored), by running this one a few times; else does nothing. Every worker
 * calls it, with the first micro-batch of its own, which may be empty. */
pml_status pml_stepper_calibrate(pml_stepper *stepper, const pml_batch *batch, pml_error *err);

/* The loss scale; after a restore, or for a test: from the next micro-batch on. */
pml_loss_scale pml_stepper_loss_scale(const pml_stepper *stepper);
pml_status pml_stepper_set_loss_scale(pml_stepper *stepper, pml_loss_scale scale, pml_error *err);

/* Forward and backward of one micro-batch; gradients and loss add up until update(). An empty
 * batch (n_tokens = 0) does nothing. PML_INVALID where the loss scale is still to be found. */
pml_status pml_stepper_micro(pml_stepper *stepper, const pml_batch *batch, pml_error *err);

typedef struct pml_update {
    int64_t step; /* 1-based number of this update, skipped ones counted */
    double learning_rate, weight_decay, max_grad_norm;
    int64_t labels; /* labelled tokens of the global batch, all ranks and micro-batches */
} pml_update;

typedef struct pml_step_result {
    double loss;       /* token-weighted mean over the global batch */
    double grad_norm;  /* of the mean gradient, before clipping */
    bool skipped;      /* loss or norm not finite: nothing was updated */
    bool overflow;     /* skipped, because the gradient was too large for the loss scale, which is
                          smaller now */
    double loss_scale; /* that the gradient had; 0: there is none */
    double flops;      /* what the model asked of this rank, forward and backward; nothing that was
                          padded or made again */
} pml_step_result;

/* All-reduce, clip, AdamW; clears the accumulators. The same result on every rank. */
pml_status pml_stepper_update(pml_stepper *stepper, const pml_update *update,
                              pml_step_result *result, pml_error *err);

/* Loss sum over the labelled rows of one batch on this rank, added to *loss_sum. */
pml_status pml_stepper_evaluate(pml_stepper *stepper, const pml_batch *batch, double *loss_sum,
                                pml_error *err);

typedef struct pml_generate_options {
    /* Prompts behind one another, and the length of each; NULL: there is one, of n_prompt. */
    const int32_t *prompt;
    int32_t n_prompt; /* tokens of all of them */
    const int32_t *lengths;
    int32_t n_prompts;
    int32_t max_new_tokens; /* of each */
    /* How the next token is chosen, in the order in which transformers applies them. */
    double repetition_penalty; /* 1 (or 0) = none; of tokens of prompt and answer alike */
    double temperature;        /* 0 = greedy (lowest id wins a tie): the rest is ignored */
    int32_t top_k;             /* 0 = all */
    double top_p;              /* 1 (or 0) = all */
    uint64_t seed;             /* the same noise for each prompt, whatever is beside it */
    /* Called with each new token of prompt `row`, in the order of each row; returning false ends
     * that row. May be NULL. */
    bool (*on_token)(void *user, int32_t row, int32_t token);
    void *user;
} pml_generate_options;

/* Continue prompts with the weights as they are, as many side by side as the planned cache has room
 * for (PML_GENERATE_ROWS at most), the others after them. out [n_prompts, max_new_tokens];
 * n_out [n_prompts] counts them; an eos token ends a row and is included. PML_INVALID when a prompt
 * and its new tokens exceed the planned length, or when the model's output is not finite. */
pml_status pml_stepper_generate(pml_stepper *stepper, const pml_generate_options *options,
                                int32_t *out, int32_t *n_out, pml_error *err);

/* Logits after each of n tokens, out [n, vocab]: what continuing each prefix would choose from. The
 * same bits as generating has. PML_INVALID when n exceeds the planned length. */
pml_status pml_stepper_logits(pml_stepper *stepper, const int32_t *tokens, int32_t n, float *out,
                              pml_error *err);

/* Trainable tensors by their PEFT or Hugging Face names, for checkpoints, export and tests.
 * `state` selects which of the flat buffers. */
typedef enum pml_state {
    PML_STATE_VALUE = 0,
    PML_STATE_GRAD,
    PML_STATE_EXP_AVG,    /* AdamW's, or SGD's momentum buffer; of 8 bits: that of small tensors */
    PML_STATE_EXP_AVG_SQ, /* AdamW's; likewise */
    PML_STATE_EXP_AVG_LARGEST, /* of 8 bits: a float for each block of 256 elements */
    PML_STATE_EXP_AVG_SQ_LARGEST,
    PML_STATE_EXP_AVG_CODES, /* of 8 bits: a byte for each element */
    PML_STATE_EXP_AVG_SQ_CODES,
    PML_STATE_COUNT
} pml_state;
/* Whether this optimizer has that buffer. */
bool pml_stepper_has(const pml_stepper *stepper, pml_state state);
/* What it has of one trainable tensor: elements, of U8 where they are codes, else of F32. They may
 * be none. */
pml_dtype pml_state_dtype(pml_state state);
size_t pml_stepper_state_elements(const pml_stepper *stepper, pml_state state, int index);
/* Of all of them, in bytes. */
size_t pml_stepper_state_bytes(const pml_stepper *stepper, pml_state state);
int pml_stepper_trainable_count(const pml_stepper *stepper);
/* name: static for the stepper's life, e.g.
 * "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" (LoRA) or
 * "model.layers.0.self_attn.q_proj.weight" (full). rows, cols: as the file's shape; n_dims (may be
 * NULL): 1 for a vector of cols elements (rows is 1), else 2. */
void pml_stepper_trainable(const pml_stepper *stepper, int index, const char **name, int64_t *rows,
                           int64_t *cols, int *n_dims);
size_t pml_stepper_state_floats(const pml_stepper *stepper); /* trainable elements */

/* Copy one whole state buffer to the host / back. host: pml_stepper_state_bytes, tensors in index
 * order, each row-major and unpadded. */
pml_status pml_stepper_read(pml_stepper *stepper, pml_state state, void *host, pml_error *err);
pml_status pml_stepper_write(pml_stepper *stepper, pml_state state, const void *host,
                             pml_error *err);

/* Updates that were not skipped: Adam's t, as in torch, where a step that is skipped leaves the
 * optimizer's count alone. */
int64_t pml_stepper_applied(const pml_stepper *stepper);

/* Length that dynamic rope's angles were last made for in training; 0 for other models. */
int32_t pml_stepper_rope_length(const pml_stepper *stepper);

/* After a restore: so many updates are done, of which `applied` were not skipped. Dropout masks are
 * a function of the first, Adam's bias correction of the second. */
void pml_stepper_seek(pml_stepper *stepper, int64_t updates, int64_t applied, int32_t rope_length);

/* Dropout of the adapters from the next micro-batch on. PML_UNSUPPORTED: it was planned without, so
 * that there is no room for the masks. */
pml_status pml_stepper_set_dropout(pml_stepper *stepper, double dropout, pml_error *err);

/* The plan in force (its runtime is the planner's reserve until the first update has been
 * measured), and what decides bits (printed into run.json). */
const pml_plan *pml_stepper_plan(const pml_stepper *stepper);
pml_status pml_stepper_identity(pml_stepper *stepper, char *json, size_t capacity, pml_error *err);
/* Whole pages that nothing lives in between two steps (pml/train/slots.h), and how many bytes: of a
 * snapshot at least. NULL: the plan has none. */
void *pml_stepper_stage(const pml_stepper *stepper, size_t *bytes);
/* That the plan is not the first one, since its memory was refused; "": it is. */
const char *pml_stepper_note(const pml_stepper *stepper);
/* What its device says of itself now. */
pml_status pml_stepper_device(pml_stepper *stepper, pml_device_info *info, pml_error *err);
/* What its device was found to lack by now, as in its info; "": nothing new can be found out of it.
 * Allocates nothing. */
void pml_stepper_lacks(pml_stepper *stepper, char lacks[PML_LACKS]);
const pml_model_spec *pml_stepper_spec(const pml_stepper *stepper);

#endif
