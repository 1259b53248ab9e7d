/* Inside of the builder: growing tables with one sticky error, and what layout and layers share. */
#ifndef PML_PLAN_BUILD_H
#define PML_PLAN_BUILD_H

#include "pml/plan/program.h"

enum { PMLI_ALIGN = 256, PMLI_PAGE = 4096, PMLI_ABSENT = -1 };

/* The four stacked linear layers of a transformer layer, in forward order. */
typedef enum pmli_linear_index {
    PMLI_QKV = 0,
    PMLI_O,
    PMLI_GATE_UP,
    PMLI_DOWN,
    PMLI_LINEARS
} pmli_linear_index;

typedef struct pmli_linear {
    int32_t inputs, outputs;
    int32_t parts, part_cols[PML_LINEAR_MAX_PARTS];
    uint32_t lora_parts; /* 0: no adapter here */
    int32_t lora_blocks; /* bits set in it */
    int32_t rank;        /* the greatest of its parts: smaller ones end in zeros */
    int32_t border;      /* columns behind its activations and behind and below its weight */
    int32_t part_rank[PML_LINEAR_MAX_PARTS];
    double scale[PML_LINEAR_MAX_PARTS];
    int32_t w, bias, a, b;   /* tensors; absent: PMLI_ABSENT */
    int32_t w_scale, turned; /* where w is in 8 bits; and it turned round, where that is kept */
    int32_t code_border;     /* columns behind its rows then; border is 0 */
    int32_t nf4[PML_NF4_TENSORS]; /* in place of w; absent: PMLI_ABSENT */
    int32_t unpacked; /* while a layer's backward is built: its numbers, that the recompute made */
    int32_t dw, dbias, da, db; /* their gradients where trained */
} pmli_linear;

typedef struct pmli_norm {
    int32_t w, dw;
} pmli_norm;

typedef struct pmli_layer {
    pmli_linear linear[PMLI_LINEARS];
    pmli_norm input_norm, post_norm;
    pmli_norm q_norm, k_norm; /* absent where the model has none */
} pmli_layer;

typedef struct pmli_builder {
    pml_program *program;
    const pml_train_config *config;
    const pml_backend *backend;
    int32_t tensor_capacity, node_capacity, parameter_capacity;
    pml_error *err;
    pml_status status; /* first failure; later calls do nothing */
    bool nameless;     /* an estimate: names, much of the work, are left out */

    pmli_layer *layers;
    pmli_norm final_norm;
    int32_t embed, dembed, head, dhead; /* head == embed where tied */
    int32_t table;                      /* what is looked up: embed, or what it is a rounding of */
    pml_segment segment;                /* the one being built */
} pmli_builder;

/* Whether the residual line begins in float32 where all else has 16 bits: a table that is trained
 * is read as it is trained, and a row of it is rounded after the first layer's attention came to
 * it. */
static inline bool pmli_begins_wide(const pmli_builder *b)
{
    return b->table != b->embed;
}

/* A batch that there can be. */
pml_status pmli_check_limits(const pml_batch_limits *limits, pml_error *err);

/* --- tables (program.c) --- */
typedef struct pmli_shape {
    pml_dtype dtype;
    pml_extent row_extent;
    int64_t rows;
    pml_extent col_extent;
    int64_t cols;
} pmli_shape;

/* A transient tensor: its place is found by lifetime. Returns its number, PMLI_ABSENT on failure.
 */
int32_t pmli_transient(pmli_builder *b, pmli_shape shape, pml_cause cause, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
int32_t pmli_persistent(pmli_builder *b, pmli_shape shape, pml_cause cause, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Room for the low-rank factors behind a tensor's rows, and below them. */
void pmli_border(pmli_builder *b, int32_t tensor, int64_t columns, int64_t rows);
/* rows x cols at element `at` of a persistent tensor. */
int32_t pmli_part(pmli_builder *b, int32_t parent, int64_t at, int64_t rows, int64_t cols,
                  const char *format, ...) __attribute__((format(printf, 6, 7)));
/* A name put together before it is given to one of these; "" where they keep none. */
void pmli_name(const pmli_builder *b, char *to, size_t size, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
pml_parameter *pmli_parameter(pmli_builder *b, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* An op at the end of the program. Its operands are set through pmli_operand; pmli_node_done asks
 * the backend for workspace and closes it. NULL after a failure. */
pml_node *pmli_node(pmli_builder *b, pml_op op, int32_t layer, const char *label);
void pmli_operand(pml_node *node, int index, int32_t tensor);
void pmli_operand_slice(pml_node *node, int index, int32_t tensor, int32_t col, int32_t cols);
void pmli_node_done(pmli_builder *b, pml_node *node);

static inline pmli_shape pmli_fixed(pml_dtype dtype, int64_t rows, int64_t cols)
{
    return (pmli_shape){dtype, PML_EXTENT_FIXED, rows, PML_EXTENT_FIXED, cols};
}

/* --- persistent tensors and parameters (layout.c) --- */
void pmli_layout(pmli_builder *b);

/* --- what the optimizer keeps (moments.c), once the length of the flat buffer is known --- */
void pmli_lay_moments(pmli_builder *b);
/* Floats that a stacked tensor's place in the flat buffer is rounded up to. */
int64_t pmli_flat_align(const pml_train_config *config);

/* The level that a layer stands at: pml_recompute. */
int32_t pmli_level_of(const pml_plan_choices *choices, int32_t layer, int32_t layers);

/* --- what waits on the host (offload.c), once the micro segment's nodes are there, the first of
 *     its backward at `middle` --- */
bool pmli_is_offloaded(const pml_plan_choices *choices, int32_t layer, int32_t layers);
void pmli_offload(pmli_builder *b, int32_t first, int32_t middle);

/* --- segments (layers.c, segments.c) --- */
void pmli_build_micro(pmli_builder *b);
void pmli_build_eval(pmli_builder *b);
void pmli_build_generate(pmli_builder *b);
void pmli_build_norm(pmli_builder *b);
void pmli_build_update(pmli_builder *b);
void pmli_build_clear(pmli_builder *b);

#endif
