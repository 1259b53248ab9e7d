/* Plan: how much of a device's memory a run takes, by cause, before the first byte is taken. */
#ifndef PML_PLAN_PLAN_H
#define PML_PLAN_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/model/spec.h"
#include "pml/plan/config.h"
#include "pml_op/backend.h"

typedef enum pml_cause {
    PML_CAUSE_WEIGHTS = 0,
    PML_CAUSE_ADAPTERS,
    PML_CAUSE_GRADIENTS,
    PML_CAUSE_OPTIMIZER,
    PML_CAUSE_ACTIVATIONS,
    PML_CAUSE_WORKSPACE,
    PML_CAUSE_COMMUNICATION,
    PML_CAUSE_RUNTIME, /* libraries, contexts, thread stacks: measured, not planned */
    PML_CAUSE_COUNT
} pml_cause;

const char *pml_cause_name(pml_cause cause); /* "weights", … */

/* Capacity of a micro-batch. */
typedef struct pml_batch_limits {
    int32_t tokens, docs, labels;
    int32_t max_doc;         /* longest document */
    int32_t generate_length; /* prompt + new tokens that sampling must have room for, 0 = none */
} pml_batch_limits;

typedef struct pml_plan {
    size_t by_cause[PML_CAUSE_COUNT]; /* bytes; their sum is total */
    size_t arena;                     /* size of the one allocation */
    size_t total;                     /* arena + runtime */
    size_t available;                 /* what it had to fit in; 0: no limit */
    int32_t recompute_layers;         /* layers whose inside is computed again in the backward */
    int32_t head_chunk;               /* labelled rows whose logits exist at one time */
    pml_batch_limits limits;
    double flops, bytes; /* one full micro-batch: forward, backward (and recompute) */
    int64_t parameters, trainable;
} pml_plan;

/* The fastest plan whose total is at most `available` bytes (0: no limit). PML_NO_MEMORY names how
 * much the smallest plan needs and the nearest setting that fits. Needs no device: backend answers
 * workspace sizes with device == NULL. */
pml_status pml_plan_make(const pml_model_spec *spec, const pml_train_config *config,
                         const pml_batch_limits *limits, const pml_backend *backend,
                         size_t available, pml_plan *plan, pml_error *err);

/* The plan for choices already made: those of an earlier run, whose bits are to be repeated. */
pml_status pml_plan_given(const pml_model_spec *spec, const pml_train_config *config,
                          const pml_batch_limits *limits, const pml_backend *backend,
                          int32_t recompute_layers, int32_t head_chunk, pml_plan *plan,
                          pml_error *err);

/* The program of that plan as text: one line an op with shapes, FLOPs, bytes and its sentence.
 * *text is malloc'ed, the caller frees it. json: a JSON document instead. */
pml_status pml_plan_print_program(const pml_model_spec *spec, const pml_train_config *config,
                                  const pml_plan *plan, const pml_backend *backend, bool json,
                                  char **text, pml_error *err);

#endif
