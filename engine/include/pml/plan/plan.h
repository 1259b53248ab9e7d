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

/* What of a layer's forward is not kept for its backward but made again, bit for bit, just before
 * it is read. Each level includes the ones before it. SwiGLU's output is never kept: its backward
 * makes it on the way. */
typedef enum pml_recompute {
    PML_RECOMPUTE_NONE = 0,
    PML_RECOMPUTE_NORMS,     /* what norms put out: elementwise, nearly free */
    PML_RECOMPUTE_ATTENTION, /* attention's output and sums */
    PML_RECOMPUTE_LAYER,     /* all but the layer's input */
    PML_RECOMPUTE_COUNT
} pml_recompute;

const char *pml_recompute_name(pml_recompute recompute); /* "none", "norms", … */

/* What the planner chooses. All but the last decide bits, so that a run that goes on is given them
 * again. */
typedef struct pml_plan_choices {
    int32_t recompute;        /* pml_recompute, of the first recompute_layers layers; … */
    int32_t recompute_layers; /* … the layers after them stand one level lower */
    int32_t head_chunk;       /* labelled rows whose logits exist at one time */
    int32_t pieces;           /* a micro-batch is run in about so many, cut between documents */
    int32_t moments_8bit;     /* 1: an AdamW whose width was left open has moments of 8 bits */
    int32_t unpacked;         /* of so many linear layers (all o, then qkv, down, gate_up) NF4 keeps
                               * the numbers in place of codes, FP8 its codes turned round, too */
    /* What offload_layers of the layers keep for their backward waits in host memory meanwhile.
     * They are spread over those that stand at `recompute` (over all where that is none), but never
     * the last layer, and stand themselves at level `offload`, which is pml_recompute too. */
    int32_t offload, offload_layers;
} pml_plan_choices;

/* How many layers there are to choose offload_layers from. */
int32_t pml_offload_span(const pml_plan_choices *choices, int32_t layers);

typedef struct pml_plan {
    size_t by_cause[PML_CAUSE_COUNT]; /* bytes; their sum is total */
    size_t arena;                     /* size of the one allocation */
    size_t total;                     /* arena + runtime */
    size_t available;                 /* what it had to fit in; 0: no limit */
    pml_plan_choices choices;
    pml_batch_limits limits; /* of a piece: what the program is built for */
    double flops, bytes;     /* one full micro-batch: forward, backward (and recompute) */
    double seconds;          /* the same by the table of rates (pml/plan/rates.h); for comparing */
    size_t host;         /* bytes of host memory that activations wait in, page-locked on a GPU */
    double link, waited; /* of `seconds`: copies to and from there, and what of them no op hides */
    int64_t parameters, trainable;
} pml_plan;

/* The fastest plan whose total is at most `available` bytes (0: no limit). PML_NO_MEMORY names how
 * much the smallest plan needs, also in plan->total (0: another failure), and the nearest setting
 * that fits. Needs no device: backend answers workspace sizes with device == NULL. */
pml_status pml_plan_make(const pml_model_spec *spec, const pml_train_config *config,
                         const pml_batch_limits *limits, const pml_backend *backend,
                         size_t available, pml_plan *plan, pml_error *err);

/* The configuration as these choices have settled it: an optimizer that was left open is one of the
 * two. Everything after the plan reads it so. */
void pml_plan_settle(const pml_plan_choices *choices, pml_train_config *config);

/* Of `limit` bytes (0: no limit) those that a plan may take: what a process has beside its plan is
 * known to a few MiB (docs/performance/cpu.md), and a limit is never exceeded. At least 1. */
size_t pml_plan_room(size_t limit);

/* The plan for choices already made: those of an earlier run, whose bits are to be repeated. */
pml_status pml_plan_given(const pml_model_spec *spec, const pml_train_config *config,
                          const pml_batch_limits *limits, const pml_backend *backend,
                          const pml_plan_choices *choices, pml_plan *plan, pml_error *err);

/* Memory that a plan for NF4 weights leaves free, spent on numbers in place of codes, which saves
 * unpacking them for every product; bits are the same. Does nothing for other plans, without a
 * limit (`available` 0), and where the device's memory is the host's, which others want too. */
pml_status pml_plan_unpack(const pml_model_spec *spec, const pml_train_config *config,
                           const pml_batch_limits *limits, const pml_backend *backend,
                           size_t available, pml_plan *plan, pml_error *err);

/* What a worker on such a device takes beside its arena: of a plan's runtime all that is not
 * counted from its program. 0: the CPU. */
size_t pml_plan_beside(const pml_backend *backend);

/* Of that, what recorded graphs may take together. */
size_t pml_plan_graphs(const pml_backend *backend);

/* Capacity of a piece when a micro-batch of `limits` is run in `pieces`: a document is never cut.
 */
pml_batch_limits pml_piece_limits(const pml_batch_limits *limits, int32_t pieces);

/* The program of that plan as a JSON document: the plan's numbers, a sentence for each kind of op,
 * tensors with their places, and every node with shapes, FLOPs, bytes, and seconds by the table of
 * rates. Of the plan only choices and limits need be there. *text is malloc'ed, the caller frees
 * it.
 */
pml_status pml_plan_print_program(const pml_model_spec *spec, const pml_train_config *config,
                                  const pml_plan *plan, const pml_backend *backend, char **text,
                                  pml_error *err);

#endif
