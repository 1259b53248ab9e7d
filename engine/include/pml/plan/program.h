/* Step program: everything a training run makes a device do, as data.
 *
 *   tensors   [ weights | parameters grads exp_avg exp_avg_sq | inputs | activations … ws … ]
 *               persistent: own place in the arena    transient: places shared by lifetime
 *   nodes     MICRO    embed, layers forward, head + loss, layers backward (with recompute)
 *             NORM     allreduce, sum of squares, clipping factor
 *             UPDATE   AdamW or SGD, one range for each parameter group
 *             CLEAR    gradients and loss back to zero
 *             EVAL     forward and loss only
 *             GENERATE a chunk of tokens against cached keys and values: prefill and decode
 *
 * Segments never run at the same time, so their transient tensors overlap in the arena. The program
 * is built once, for a batch's capacity; pml_program_bind turns a node into an op's arguments for
 * the live counts of an actual batch. Backward is written op by op: no tape, no discovery at run
 * time.
 *
 * Weights of projections that share an input are stacked (q,k,v and gate,up: see pml_linear_args).
 * All trained parameters lie in one flat float32 buffer, the ones with weight decay first, and
 * gradients and the optimizer's moments have the same layout (SGD: exp_avg is its momentum buffer,
 * if it has momentum, and there is no exp_avg_sq; AdamW of 8 bits: see pml_range):
 *
 *   [ embed | layer 0: q k v, o, gate up, down | … | head ][ norms and biases ]      full
 *   [ layer 0: A_q A_k A_v, B_q B_k B_v, A_o, B_o, … | layer 1 … ]                    LoRA
 *
 * each stacked tensor at a multiple of 64 floats; the gaps stay zero. With activations of 16 bits a
 * fifth buffer, `rounded`, holds the parameters in that dtype for the products to read; the
 * optimizer writes it along. */
#ifndef PML_PLAN_PROGRAM_H
#define PML_PLAN_PROGRAM_H

#include "pml/plan/plan.h"
#include "pml_op/backend.h"

typedef enum pml_segment {
    PML_SEGMENT_MICRO = 0,
    PML_SEGMENT_NORM,
    PML_SEGMENT_UPDATE,
    PML_SEGMENT_CLEAR,
    PML_SEGMENT_EVAL,
    PML_SEGMENT_GENERATE,
    PML_SEGMENT_COUNT
} pml_segment;

const char *pml_segment_name(pml_segment segment); /* "micro", … */

enum { PML_GENERATE_ROWS = 8 }; /* prompts continued side by side, at most */

/* What a dimension of a tensor follows from batch to batch. */
typedef enum pml_extent {
    PML_EXTENT_FIXED = 0,
    PML_EXTENT_TOKENS, /* tokens of the batch                             */
    PML_EXTENT_BOUNDS, /* documents + 1                                   */
    PML_EXTENT_LABELS, /* labelled rows; sampling: prompts                */
    PML_EXTENT_KEYS    /* cached tokens, those of this chunk included     */
} pml_extent;

/* Live sizes of one batch. */
typedef struct pml_counts {
    int32_t tokens, docs, labels, keys;
    int32_t max_doc; /* longest document's queries */
    int32_t equal;   /* all documents are as long, and there is no token besides */
} pml_counts;

typedef struct pml_tensor {
    char name[64];
    pml_dtype dtype;
    pml_extent row_extent, col_extent;
    int64_t rows, cols; /* capacity */
    int64_t border;     /* columns behind each row that a linear layer works in (pml_linear_args) */
    int64_t below;      /* rows below the last, for the same */
    pml_cause cause;
    int32_t parent;      /* >= 0: a part of that tensor, at element `at`   */
    int64_t at;          /* elements of its own from the parent's start    */
    int32_t master;      /* >= 0: a copy of that float32 tensor, rounded to this one's dtype */
    bool persistent;     /* keeps its place in every segment               */
    bool host;           /* lies in the host block instead, offset from its start */
    bool held;           /* transient, but lives from call to call of its segment (cached keys) */
    int32_t first, last; /* transient: nodes of first and last use, set by placement; -1 unused */
    size_t offset;       /* bytes from the arena's start (a part: of its parent's place + at)     */
} pml_tensor;

/* Elements from row to row. */
static inline int64_t pml_tensor_pitch(const pml_tensor *t)
{
    return t->cols + t->border;
}

typedef struct pml_operand {
    int32_t tensor; /* -1: absent */
    int32_t col;    /* first column of a slice */
    int32_t cols;   /* width of the slice, 0: the whole tensor */
} pml_operand;

typedef struct pml_node {
    pml_op op;
    int32_t layer; /* -1: outside the layers */
    bool again;    /* recomputed in the backward */
    char label[40];
    pml_operand operands[PML_OP_MAX_VIEWS];
    pml_op_args args; /* attributes only; bind adds the views */
} pml_node;

/* A weight in NF4 is four tensors (pml_op/ops.h), each stacked like the weight would be. */
enum { PML_NF4_CODES = 0, PML_NF4_ABSMAX, PML_NF4_SCALES, PML_NF4_OFFSET, PML_NF4_TENSORS };

/* Where the four of a weight of n numbers lie in `loading`; returns the bytes up to their end. */
size_t pml_nf4_stage(int64_t n, size_t at[PML_NF4_TENSORS]);

/* A tensor of a model or adapter file: rows [row, row + rows) of a program tensor, or for a vector
 * (rank 1) its columns [col, col + cols). */
typedef struct pml_parameter {
    char name[112];   /* Hugging Face's or PEFT's */
    char source[112]; /* not "": where its first value is in the model's file (modules_to_save) */
    int32_t tensor;
    int64_t row, col, rows, cols;
    int32_t rank; /* 1: the file has [cols], rows is 1;  2: [rows, cols] */
    bool adapter; /* belongs to the adapter's file, not the model's */
    bool trained; /* lies in the flat buffer, at element `at` of it */
    bool decay;
    int64_t at;
    bool nf4; /* as NF4 has it. tensor is -1; this weight's share of each of the four: */
    int32_t nf4_parts[PML_NF4_TENSORS]; /* -1 where the numbers are kept, in rows of tensor */
    bool fp8; /* tensor holds codes; and this is the weight's share of their scales: */
    int32_t fp8_scale;
    int32_t fp8_turned; /* its columns [row, row + rows) are the codes turned round; or -1 */
} pml_parameter;

/* What one op of the update moves: a run of the flat buffer, whose moments are floats, at `state`
 * of exp_avg and exp_avg_sq; or codes of 8 bits, at `state` of the codes, with a float of `largest`
 * for each PML_ADAMW_8BIT_BLOCK of them from `block` on. Tensors of less than PML_8BIT_LEAST
 * elements have floats, and every tensor begins at a block's beginning: both as in bitsandbytes. */
typedef struct pml_range {
    int64_t at, floats;
    int64_t state, block;
    bool decay, codes;
} pml_range;

enum { PML_8BIT_LEAST = 4096 };

/* What the host reads of a step, as it lies on the device. */
typedef struct pml_told {
    double loss_sum;
    float norm;
} pml_told;

typedef struct pml_program {
    pml_model_spec spec;
    pml_batch_limits limits;
    pml_plan_choices choices;
    int32_t generate_chunk; /* tokens of one GENERATE call, at most */
    int32_t generate_rows;  /* prompts of one GENERATE call, at most */
    int32_t positions;      /* rows of the rope table */

    pml_tensor *tensors;
    int32_t n_tensors;
    pml_node *nodes;
    int32_t n_nodes;
    struct {
        int32_t first, end;
    } segments[PML_SEGMENT_COUNT];

    pml_parameter *parameters;
    int32_t n_parameters;
    int64_t trained_floats; /* length of the flat buffer, gaps included */
    int64_t decay_floats;   /* its front that has weight decay */
    pml_range *ranges;      /* the flat buffer, but for gaps, in order */
    int32_t n_ranges;

    /* Tensors the host reads or writes; -1 where the program has none. */
    int32_t ids, positions_in, bounds, key_bounds, cache_rows, label_rows, labels, last_row;
    int32_t rope, hyper, rng, places, eval_sum, sumsq, logits, loss_scale;
    int32_t told, loss_sum, norm; /* a pml_told, and its parts */
    int32_t values, grads, exp_avg, exp_avg_sq;
    int32_t exp_avg_largest, exp_avg_sq_largest, exp_avg_codes, exp_avg_sq_codes; /* of 8 bits */
    int32_t rounded; /* values in the activations' dtype; -1 where that is float32 */
    int32_t loading; /* where a weight is quantised while the model is loaded: bytes for the largest
                      * in float32, behind it its codes and scales (pml_nf4_stage) where only its
                      * numbers are kept, and the op's workspace; -1: nothing is quantised */

    size_t by_cause[PML_CAUSE_COUNT]; /* of the arena; runtime is 0 here */
    size_t arena;
    size_t stage,
        stage_bytes;   /* whole pages at the arena's end, that no tensor lives in between two
                          steps: where a snapshot is first (pml/train/slots.h); or none */
    size_t host_bytes; /* of the host block: what is offloaded */
    void *host;        /* it; whoever runs the program takes it and gives it back */
} pml_program;

typedef struct pml_program_options {
    const pml_model_spec *spec;
    const pml_train_config *config;
    pml_batch_limits limits;
    const pml_backend *backend;
    pml_plan_choices choices;
    bool estimate;       /* no places: arena is what the fullest moment takes, a bound from below */
    pml_program **spare; /* or NULL: one whose tables are used again; *spare becomes NULL */
} pml_program_options;

/* Build and place. Everything the program needs of options is copied. */
pml_status pml_program_build(const pml_program_options *options, pml_program **program,
                             pml_error *err);
/* The program of a plan that pml_plan_make made. */
pml_status pml_plan_build(const pml_plan *plan, const pml_model_spec *spec,
                          const pml_train_config *config, const pml_backend *backend,
                          pml_program **program, pml_error *err);
void pml_program_destroy(pml_program **program);
/* Host memory that the program itself takes. */
size_t pml_program_bytes(const pml_program *program);

/* The program at full capacity: counts for pricing, printing and workspace. */
pml_counts pml_program_capacity(const pml_program *program, pml_segment segment);

/* Arguments of a node for live counts, with the arena at base. Counts must be within capacity. */
void pml_program_bind(const pml_program *program, const pml_node *node, void *base,
                      const pml_counts *counts, pml_op_args *args);

/* The range that element `at` of the flat buffer lies in; NULL: it is in a gap. */
const pml_range *pml_program_range(const pml_program *program, int64_t at);

/* What the optimizer keeps for n parameters of one tensor, in bytes, beside the parameters and
 * their gradients. */
size_t pml_optimizer_bytes(const pml_train_config *config, int64_t n);

/* Values of all that is trained, and what the optimizer keeps of each: a snapshot. config: settled.
 */
size_t pml_program_snapshot_bytes(const pml_program *program, const pml_train_config *config);

/* A tensor's place in an arena at base, or in the program's host block. */
void *pml_program_data(const pml_program *program, int32_t tensor, void *base);

/* Floating-point operations and bytes moved to and from memory of a bound node. */
typedef struct pml_cost {
    double flops, bytes;
    double narrow; /* of flops: of products whose factors have both 8 bits */
    double laid;   /* elements of weights that products lay out anew, however few rows they have */
} pml_cost;
pml_cost pml_node_cost(pml_op op, pml_op_args *args);

/* Operations of swiglu and its backward that are for the adapters of the layers beside them; 0 for
 * any other op. */
double pml_beside_flops(pml_op op, const pml_op_args *args);

/* Offsets for all tensors by lifetime, sizes by cause, arena size. Called by build; apart for its
 * test. Greedy by size, best fit; the same program always gets the same offsets. */
pml_status pml_program_place(pml_program *program, pml_error *err);

/* Sizes by cause and arena as pml_program_place would find them at best, in one pass. */
pml_status pml_program_estimate(pml_program *program, pml_error *err);

/* Proof that no two transient tensors with meeting lifetimes share a byte, and that all lie inside
 * the arena. PML_INTERNAL names the first pair. For tests and for `pantheraml doctor`. */
pml_status pml_program_check_places(const pml_program *program, pml_error *err);

#endif
